"""`probe`: the statistics of every site, from one run over the data.

Every batch is one forward and one backward of the model in eval mode: zero shifts are added to the
pre-activations of all targets of all sites, and the gradient of the loss with respect to a shift is g. No
loop over samples, no gradient with respect to a weight, and the parameters' `.grad` stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from irgrow.growth.conv_statistics import add_image_moments, add_image_residual
from irgrow.growth.data import Data, Loss
from irgrow.growth.data import batches as cut
from irgrow.growth.geometry import Geometry
from irgrow.growth.moments import Sums
from irgrow.growth.waiting import Waiting
from irgrow.ir.errors import BadData, UnknownName
from irgrow.ir.network import Network
from irgrow.ir.pattern import Sparse
from irgrow.ir.site import Site
from irgrow.ir.statistics import MOMENTS, Statistics

REDUCTIONS = ("mean", "sum")
KEPT = 1 << 26  # numbers of the first run's batches that are kept for the second


class Recordable(Protocol):
    """What `probe` needs of a model: `CompiledNetwork` has it."""

    @property
    def structure(self) -> Network: ...

    def record(
        self, *inputs: Tensor, values: Collection[str] = (), shifts: Mapping[str, Tensor] | None = None
    ) -> tuple[Any, dict[str, Tensor]]: ...


def probe(
    model: Recordable,
    data: Data,
    loss: Loss,
    *,
    sites: Iterable[str] | None = None,
    reduction: str = "mean",
    want: Iterable[str] = ("S", "M_prev", "N"),
    batches: int | None = None,
    bias_row: bool | None = None,
    taps: str = "full",
    batch_size: int = 1024,
    mode: str = "eval",
) -> dict[str, Statistics]:
    """The statistics of each site (default: all sites), all from one run over `data` in eval mode.

    `data`: `(inputs, targets)` or an iterable of such batches, inputs one tensor `[B, *shape]` or a tuple;
    pairs are cut into batches of `batch_size`. `loss(outputs, targets)` is what the model is trained with
    and `reduction` how it combines samples (`mean` or `sum`). `want`: the moments (a method's `needs`;
    with none, the data is not read). `N` is what TINY needs: for image sites it is measured in a second
    run over the data, with dW* from the first, because C would be far larger than N. Activations and gradients
    of the first batches (256 MB of float32) are kept for it, so the model runs again for the others only.
    `batches`: stop after that many. `bias_row`: whether the constant 1 belongs to b (default: where the
    grown group has a bias). `taps`: `centre` restricts fan-outs of convolutions to their centre tap.
    `mode`: in `train` mode a batch norm takes mean and variance from the batch, as a training step does:
    E[b g^T] becomes E[(b - E b) g^T], and a new unit's slope 1/sqrt(eps) instead of 1/sqrt(1 + eps). The
    norm couples the samples of a batch, so such moments are those of batches of this size; dropout drops.

    Moments are means over samples of per-sample products, accumulated in float64: they do not depend on
    the batch size, and statistics of two halves add. The model keeps its mode, its values and its `.grad`.
    Raises BadData (naming the group) for NaN or infinity and for empty data; Refused for a site whose new
    units are not linear in their fan-in; UnknownName.
    """
    network = model.structure
    names = [site.name for site in Site.all(network)] if sites is None else list(sites)
    gathering = Gathering(network, names, want=want, reduction=reduction, bias_row=bias_row, taps=taps, mode=mode)
    if not gathering.want:
        return gathering.statistics()
    if gathering.twice and isinstance(data, Iterator):
        data = list(data)
    with evaluating(model, training=mode == "train"):
        for inputs, targets in islice(cut(data, batch_size, "probe"), batches):
            gathering.run(model, inputs, targets, loss)
        if gathering.twice:
            gathering.fix_moves()
            kept = gathering.run_kept()
            for inputs, targets in islice(cut(data, batch_size, "probe"), kept, batches):
                gathering.run(model, inputs, targets, loss)
    return gathering._means(last=True)


@dataclass
class Gathering:
    """Sums over samples for several sites at once; `run` adds a batch, `statistics` reads them.

    Also for ordinary training steps, so that growing needs no run over the data of its own:

        gathering = Gathering(model.structure, ["hidden"], want=how.needs, single_run=True, mode="train")
        for x, y in loader:
            outputs = gathering.forward(model, x)      # instead of model(x)
            loss(outputs, y).backward()
            gathering.collect()
            optimizer.step()
        proposal = how.propose(gathering.statistics()["hidden"])

    Such statistics mix the weights of all those steps. `mode` is the one the model runs in: it says where a
    batch norm takes its statistics from (see `probe`).
    `single_run=True` takes N from C for image sites too, which may be large.
    """

    network: Network
    names: Sequence[str]
    want: Iterable[str] = ("S", "M_prev", "N")
    reduction: str = "mean"
    bias_row: bool | None = None
    taps: str = "full"
    single_run: bool = False
    mode: str = "eval"
    n: int = 0
    second: bool = False
    sums: dict[str, Sums] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.want = tuple(self.want)
        if not self.names:
            raise UnknownName("probe: sites", "no site", "at least one site that can grow")
        for name in self.want:
            if name not in (*MOMENTS, "N"):
                raise UnknownName(f"probe: moment {name!r}", expected=f"one of {', '.join((*MOMENTS, 'N'))}")
        if self.reduction not in REDUCTIONS:
            raise UnknownName(
                f"probe: reduction {self.reduction!r}",
                expected=f"one of {', '.join(REDUCTIONS)}",
                do="give a loss that returns one number for the batch",
            )
        if self.taps not in ("full", "centre"):
            raise UnknownName(f"probe: taps {self.taps!r}", expected="full or centre")
        if self.mode not in ("eval", "train"):
            raise UnknownName(f"probe: mode {self.mode!r}", expected="eval or train")
        for name in self.names:
            geometry = Geometry(self.network, Site.of(self.network, name), self.taps, self.mode == "train")
            bias = bool(geometry.biased) if self.bias_row is None else self.bias_row
            want = {*self.want, "C"} if self.single_run and "N" in self.want else set(self.want)
            self.sums[name] = Sums(geometry, bias, frozenset(want))
        self._rows = Waiting()
        self._kept: list[tuple[dict[str, Tensor], dict[str, Tensor], int]] = []
        self._room = KEPT
        self._waiting: tuple[dict[str, Tensor], dict[str, Tensor], int] | None = None

    @property
    def twice(self) -> bool:
        """Whether some N needs a second run, after `fix_moves`."""
        return any(sums.twice for sums in self.sums.values())

    def fix_moves(self) -> None:
        """Ends the first run: what is added from now on measures N with the dW* so far."""
        if self.n == 0:
            raise BadData("probe: data", "no samples", "at least one")
        self._catch_up()
        self.second = True
        for name, sums in self.sums.items():
            if sums.twice:
                sums.move = self._statistics(name, sums, ("S_in", "M")).best_move

    def run_kept(self) -> int:
        """Adds again, for the second run, the first batches, which were kept, and forgets them; how many they were."""
        kept, self._kept = self._kept, []
        for values, gradients, count in kept:
            if count:
                self._add(values, gradients, count)
        return len(kept)

    def _keep(self, values: dict[str, Tensor], gradients: dict[str, Tensor], count: int) -> None:
        """Keeps a batch for the second run, while there is room: running the model again would take longer."""
        self._room -= sum(x.numel() for x in (*values.values(), *gradients.values()))
        if self._room >= 0:
            held = {n: x.clone() if n in self.network.inputs else x for n, x in values.items()}  # theirs may change
            self._kept.append((held, gradients, count))

    @property
    def _active(self) -> list[Sums]:
        """The sites that this run is for."""
        return [s for s in self.sums.values() if s.twice or not self.second]

    @property
    def targets(self) -> tuple[str, ...]:
        """The groups whose gradient is needed."""
        needed = [s for s in self._active if {"M_prev", "M", "E"} & s.want]
        return tuple(dict.fromkeys(t.name for s in needed for t in s.geometry.targets))

    @property
    def values(self) -> tuple[str, ...]:
        """The groups whose activations are needed, inputs included."""
        names: dict[str, None] = {}
        for s in self._active:
            if {"S", "M_prev", "C"} & s.want:
                names.update(dict.fromkeys(e.source for e in s.geometry.entries))
            if {"S_in", "M", "C"} & s.want:
                names.update(dict.fromkeys(f.source for t in s.geometry.targets for f in t.feeding))
        return tuple(names)

    def shifts(self, count: int, like: Tensor) -> dict[str, Tensor]:
        """Zero shifts `[count, *shape]` for every target, to be given to `record`."""
        shapes = {name: self.network.groups[name].shape for name in self.targets}
        return {n: like.new_zeros(count, *shape).requires_grad_() for n, shape in shapes.items()}

    def forward(self, model: Recordable, *inputs: Tensor) -> Any:
        """The model's outputs, as `model(*inputs)`; `collect` after the backward adds this batch."""
        mode = "train" if getattr(model, "training", False) else "eval"
        normed = any(self.network.groups[g].norm for s in self.sums.values() for g in s.geometry.site.groups)
        if mode != self.mode and normed:
            raise BadData("gathering: forward", f"a model in {mode} mode", f"{self.mode} mode, as the norms are read",
                          do=f"use Gathering(..., mode={mode!r})")  # fmt: skip
        count = inputs[0].shape[0]
        shifts = self.shifts(count, inputs[0])
        outputs, values = model.record(*inputs, values=self.values, shifts=shifts)
        self._waiting = (values, shifts, count)
        return outputs

    def collect(self) -> None:
        """Adds the batch of the last `forward`, whose loss has been differentiated since."""
        if self._waiting is None:
            raise BadData("gathering: collect", "no batch", "forward, then loss.backward(), before each collect")
        (values, shifts, count), self._waiting = self._waiting, None
        gradients = {n: torch.zeros_like(s) if s.grad is None else s.grad for n, s in shifts.items()}
        self.add(values, gradients, count)

    def run(self, model: Recordable, inputs: tuple[Tensor, ...], targets: Tensor, loss: Loss) -> None:
        """Adds a batch: one forward, one backward."""
        count = inputs[0].shape[0]
        if count == 0:
            if self.twice and not self.second:
                self._keep({}, {}, 0)
            return
        device = next(iter(self.network.tensors().values())).device
        inputs, targets = tuple(x.to(device) for x in inputs), targets.to(device)
        with torch.enable_grad():
            shifts = self.shifts(count, inputs[0])
            outputs, values = model.record(*inputs, values=self.values, shifts=shifts)
            gradients: dict[str, Tensor] = {}
            if shifts:
                value = loss(outputs, targets)
                if not isinstance(value, Tensor) or value.dim():
                    shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    raise BadData("probe: loss", f"shape {shape}", f"one number, the {self.reduction} over samples")
                if not bool(torch.isfinite(value)):
                    raise bad_loss("", model, inputs)
                found = torch.autograd.grad(value, list(shifts.values()), allow_unused=True)
                gradients = {
                    name: torch.zeros_like(shift) if g is None else g
                    for (name, shift), g in zip(shifts.items(), found, strict=True)
                }
        self.add(values, gradients, count)

    @torch.no_grad()
    def add(self, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor], count: int) -> None:
        """Adds a batch's activations and its autograd gradients with respect to the targets' pre-activations."""
        scale = float(count) if self.reduction == "mean" else 1.0
        for name, value in values.items():
            if not _finite(value):
                raise BadData(f"group {name!r}: activations", "NaN or infinity", "finite values", do="check the data")
        for name, value in gradients.items():
            if not _finite(value):
                raise BadData(f"group {name!r}: gradient", "NaN or infinity", "finite values", do="check the loss")
        per_sample = {name: g * scale for name, g in gradients.items()}
        held = {name: value.detach() for name, value in values.items()}
        if self.twice and not self.second:
            self._keep(held, per_sample, count)
        self._add(held, per_sample, count)

    @torch.no_grad()
    def _add(self, held: dict[str, Tensor], per_sample: dict[str, Tensor], count: int) -> None:
        """Adds a batch of finite numbers; gradients per sample."""
        if any(_waits(sums) for sums in self._active):
            self._later(held, per_sample, count)
        for sums in self._active:
            if _waits(sums):
                continue
            if sums.geometry.flat:
                add_flat_moments(sums, held, per_sample, count)
            elif sums.move is None:
                add_image_moments(sums, held, per_sample)
            else:
                add_image_residual(sums, held, per_sample)
        self.n += 0 if self.second else count

    def _later(self, values: dict[str, Tensor], gradients: dict[str, Tensor], count: int) -> None:
        """Adds a batch to the sites whose samples are independent rows, once there are enough rows for a product."""
        sites = [sums for sums in self._active if _waits(sums)]
        targets = {t.name for sums in sites for t in sums.geometry.targets}
        sources = {e.source for sums in sites for e in sums.geometry.entries}
        sources |= {f.source for sums in sites for t in sums.geometry.targets for f in t.feeding}
        rows = {("value", name): value for name, value in values.items() if name in sources}
        rows |= {("gradient", name): value for name, value in gradients.items() if name in targets}
        if not self._rows.fits(count):
            self._catch_up()
        if self._rows.fits(count):
            self._rows.put(rows, count)
        else:
            self._add_rows(rows, count)

    @torch.no_grad()
    def _catch_up(self) -> None:
        """No batch waits any more."""
        if self._rows.count:
            self._add_rows(*self._rows.take())

    def _add_rows(self, rows: dict[tuple[str, str], Tensor], count: int) -> None:
        values, gradients = ({n: v for (k, n), v in rows.items() if k == kind} for kind in ("value", "gradient"))
        for sums in self.sums.values():
            if _waits(sums):
                add_flat_moments(sums, values, gradients, count)

    def explain(self) -> str:
        """Which kernel made each moment of each site, by which route, and how many products it took: as counted."""
        self._catch_up()
        lines = [f"{self.n} samples"]
        for name, sums in self.sums.items():
            lines.append(f"{name}:")
            for moment, kernels in sums.used.items():
                lines.append(f"  {moment:<7} " + "; ".join(f"{kernel} ({n} times)" for kernel, n in kernels.items()))
        return "\n".join(lines)

    def statistics(self) -> dict[str, Statistics]:
        """The means so far; BadData if no sample was added."""
        return self._means()

    def _means(self, *, last: bool = False) -> dict[str, Statistics]:
        """`statistics`; with `last` the memory of the sums is theirs, and nothing more may be added."""
        if self.n == 0 and self.want:
            raise BadData("probe: data", "no samples", "at least one")
        self._catch_up()
        return {name: self._statistics(name, sums, sums.want, last) for name, sums in self.sums.items()}

    def _statistics(self, name: str, sums: Sums, want: Iterable[str], last: bool = False) -> Statistics:
        geometry = sums.geometry
        moments = {k: sums.total(k, take=last).div_(self.n) for k in want}
        if sums.move is not None:
            moments["residual"] = sums.total("N", take=last).div_(self.n)
        return Statistics(
            name,
            self.network.structure,
            self.n,
            sums.fan_in,
            tuple(e.block for e in geometry.exits),
            geometry.feeding,
            **moments,
            activation=geometry.activation,
            at_zero=geometry.at_zero,
            slope=geometry.slope,
            smooth=geometry.smooth,
            units=self.network.groups[name].units,
            fan_out_norm=fan_out_norm(geometry),
            notes=geometry.notes,
        )


def _waits(sums: Sums) -> bool:
    """Whether batches may be joined: flat, and no norm of the site takes its mean from the batch."""
    return sums.geometry.flat and not sums.geometry.centres


def add_flat_moments(sums: Sums, values: Mapping[str, Tensor], g: Mapping[str, Tensor], count: int) -> None:
    """Adds one batch of a flat site: features `[B, F]`, gradients `[B, O]`."""
    geometry, want = sums.geometry, sums.want
    features: dict[str, Tensor] = {}
    if {"S", "M_prev", "C"} & want:
        for way in geometry.exits:
            if way.group not in features:
                features[way.group] = _flat_features(sums, values, way.group, count)
    if "S" in want:
        for exit, _ in geometry.places:
            sums.gram("S", features[exit], 1.0 / len(geometry.places))
    fed = {}
    if {"S_in", "M", "C"} & want:
        for target in geometry.targets:
            parts = [values[f.source].reshape(count, -1) for f in target.feeding]
            fed[target.name] = _joined(parts, target.bias, values, g, count)
    sums.add_targets(fed, {name: value.reshape(count, -1) for name, value in g.items()})
    for at, way in enumerate(geometry.exits):
        if "M_prev" in want:
            columns = sums.columns("M_prev", at)
            sums.cross("M_prev", features[way.group], g[way.target].reshape(count, -1), columns=columns)
        if "C" in want:
            sums.cross("C", features[way.group], fed[way.target], columns=sums.columns("C", at))


def _flat_features(sums: Sums, values: Mapping[str, Tensor], exit: str, count: int) -> Tensor:
    """b at one exit `[B, F]`, the constant 1 last."""
    geometry = sums.geometry
    parts = []
    for entry in geometry.entries:
        x = values[entry.source].reshape(count, -1)
        carried = geometry.carry(entry.group, x).get(exit)
        parts.append(torch.zeros_like(x) if carried is None else carried)
    if sums.bias:
        one = parts[0].new_ones(count, 1)
        groups = geometry.biased or (geometry.entries[0].group,)
        reached = [geometry.carry(group, one).get(exit) for group in groups]
        parts.append(sum((r for r in reached if r is not None), one.new_zeros(count, 1)))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _joined(
    parts: list[Tensor], bias: bool, values: Mapping[str, Tensor], g: Mapping[str, Tensor], count: int
) -> Tensor:
    like = parts[0] if parts else next(iter([*values.values(), *g.values()]))
    if bias:
        parts = [*parts, like.new_ones(count, 1)]
    return torch.cat(parts, 1) if parts else like.new_zeros(count, 0)


def fan_out_norm(geometry: Geometry) -> float:
    """The mean over the site's units of the norm of all their outgoing weights (1 if nothing leaves them yet)."""
    total: Tensor | None = None
    network = geometry.network
    first = geometry.exits[0].group
    for way in geometry.exits:
        bundle = network.bundles[way.block.name.removeprefix("weight.")]
        if way.group != first and network.groups[way.group].units != network.groups[first].units:
            continue
        weight, units = bundle.weight.detach().double(), network.groups[way.group].units
        if isinstance(bundle.pattern, Sparse):
            source = torch.from_numpy(bundle.pattern.source // network.groups[way.group].positions).long()
            at = torch.from_numpy(bundle.pattern.index).long()
            square = weight.new_zeros(units).index_add(0, source.to(weight.device), weight[at] ** 2)
        else:
            square = weight.reshape(weight.shape[0], units, -1).square().sum((0, 2))
        total = square if total is None else total + square
    assert total is not None
    norm = float(total.sqrt().mean())
    return norm if norm > 0 else 1.0


@contextmanager
def evaluating(model: object, *, training: bool = False) -> Iterator[None]:
    """The model in eval mode (or train mode); its modes and buffers are restored afterwards, also after an error."""
    modes = [(m, m.training) for m in model.modules()] if isinstance(model, nn.Module) else []
    held = [(b, b.clone()) for b in model.buffers()] if training and isinstance(model, nn.Module) else []
    try:
        for module, _ in modes:
            module.training = training
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for buffer, value in held:  # running means and variances
            buffer.data.copy_(value)


def _finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value.detach().sum())) or bool(torch.isfinite(value.detach()).all())


def bad_loss(who: str, model: Recordable, inputs: tuple[Tensor, ...]) -> BadData:
    """The error for a loss that is not finite: it names the first group whose activations are not, if there is one."""
    network, prefix = model.structure, f"{who}: " if who else ""
    with evaluating(model), torch.no_grad():
        values = model.record(*inputs, values=tuple(network.groups))[1]
    for name in (name for names, _ in network.components for name in names):
        if not _finite(values[name]):
            found = f"{prefix}group {name!r}: activations"
            return BadData(found, "NaN or infinity", "finite values", do="check the data and the weights")
    return BadData(f"{who or 'probe'}: loss", "NaN or infinity", "a finite value", do="check the targets and the loss")


def require_finite(who: str, network: Network, inputs: tuple[Tensor, ...]) -> None:
    """BadData, naming the input group, for NaN or infinity in a batch."""
    for name, x in zip(network.inputs, inputs, strict=False):
        if not _finite(x):
            raise BadData(
                f"{who}: group {name!r}: activations", "NaN or infinity", "finite values", do="check the data"
            )
