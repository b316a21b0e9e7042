"""`Continual`: one master network learns task after task, and forgets none.

    learner = ig.Continual(ig.mlp((64, 8, 2)), seed=0)
    learner.learn("zeros", (x0, y0))
    learner.learn("ones", (x1, y1), target=0.98, budget=8)   # a mask over what is there, then growth
    learner.model("zeros")(x)                                # bit for bit what it was after "zeros"

Every unit is locked once the task that made it is over: from then on no number that it computes with
changes. A task is a list of units (by serial; serials never change) and a head of its own. It runs as its
own network of only these units, of the shapes it was learned with, hence through the same kernels in the
same order. To compute it within the master, with zeros where units are masked, would not do: zero columns
change how a float32 sum is cut into parts, and so its last bits.

What a unit reads is fixed with it: units made later never feed it (their weight to it is 0 and is not trained).

Source: Firefly (Wu et al., NeurIPS 2020, arXiv:2102.08574), section 2.4 and algorithm 2; masks by a
straight-through estimator as in Piggyback (arXiv:1801.06519).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from irgrow.growth.data import Data, Loss, batches
from irgrow.growth.fit import accuracy
from irgrow.ir.edit import Edit
from irgrow.ir.errors import BadData, Diverged, Refused, UnknownName
from irgrow.ir.network import Bundle, Group, Network, Unit
from irgrow.ir.pattern import Conv2d, Dense, Pool2d
from irgrow.ir.site import Site
from irgrow.ir.units import UnitMap
from irgrow.runtime.model import CompiledNetwork

Batch = tuple[tuple[Tensor, ...], Tensor]


@dataclass(frozen=True)
class Learned:
    """How a task was learned.

    `mask_accuracy`: with the mask alone, before any growth (None for the first task: it has no mask).
    `selected`: locked units in use per site; `unlocked`, `new`: units that growth added; `rounds`: growths.
    """

    task: str
    accuracy: float
    solved: bool
    mask_accuracy: float | None
    selected: Mapping[str, int]
    unlocked: int
    new: int
    rounds: int


@dataclass(frozen=True)
class _Record:
    """What a task runs on: its head, and per group the serials of its units in the order it was learned with."""

    head: str
    units: Mapping[str, NDArray[np.int64]]
    next_serial: int
    learned: Learned


class Continual:
    """A master network, and for each task its units in it and its head.

    `network`: sums over Dense, Conv2d (one channel group) and fixed Pool2d bundles, one output group fed by
    Dense bundles, no normalisation. That output is the pattern for the heads: the group `<output>_<task>`
    with as many units as the task has classes, its weights drawn by `seed`. `loss` is the mean over a batch.

    Refused: networks of another kind (an Identity, a sparse bundle, a norm), or without a site.
    """

    def __init__(self, network: Network | CompiledNetwork, *, loss: Loss = F.cross_entropy, seed: int = 0) -> None:
        network = network.network() if isinstance(network, CompiledNetwork) else network.verify().clone()
        _require_plain(network)
        self._master = network
        self._output = network.group(network.outputs[0])
        self._entering = tuple(network.entering(self._output.name))
        self._sites = _sites(network)
        self._records: dict[str, _Record] = {}
        self.loss, self.seed = loss, seed

    # ---- what there is ------------------------------------------------------------------------------------

    @property
    def network(self) -> Network:
        """The master: every unit, and one head per task. It shares its tensors; clone it to change them."""
        return self._master

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks learned so far, in order."""
        return tuple(self._records)

    @property
    def locked(self) -> tuple[Unit, ...]:
        """The units whose weights never change again: after the first task, every hidden one."""
        if not self._records:
            return ()
        hidden = [g for g in self._master.groups.values() if self._master.is_hidden(g.name)]
        return tuple(Unit(g.name, s) for g in hidden for s in g.serials.tolist())

    def learned(self, task: str) -> Learned:
        """How a task was learned; UnknownName lists the tasks."""
        return self._record(task).learned

    def mask(self, task: str) -> dict[str, Tensor]:
        """Per site the binary mask of a task over the master's units of today; UnknownName lists the tasks."""
        units = self._record(task).units
        return {s: torch.from_numpy(np.isin(self._master.groups[s].serials, units[s])) for s in self._sites}

    def extract(self, task: str) -> Network:
        """The task's own network: the units its mask selects, and its head; always equal to what was learned.

        Same shapes, same order, bit-equal weights, so equal outputs (torch.equal) whatever was learned since.
        Raises UnknownName for a task that was not learned.
        """
        record = self._record(task)
        network = _chosen(_one_head(self._master, record.head), {s: record.units[s] for s in self._sites})
        return replace(network, next_serial=record.next_serial).clone()

    def model(self, task: str) -> CompiledNetwork:
        """The task's own network, compiled, in eval mode. Training it changes nothing here."""
        model = CompiledNetwork(self.extract(task))
        model.eval()
        return model

    def _record(self, task: str) -> _Record:
        if task not in self._records:
            raise UnknownName(f"task {task!r}", expected=f"one of {', '.join(self._records) or 'none yet'}")
        return self._records[task]

    def __repr__(self) -> str:
        widths = "-".join(str(self._master.groups[s].units) for s in self._sites)
        return f"<Continual: {len(self._records)} tasks, widths {widths}>"

    # ---- learning -----------------------------------------------------------------------------------------

    def learn(
        self,
        task: str,
        data: Data,
        *,
        classes: int | None = None,
        test: Data | None = None,
        target: float = 0.95,
        budget: int = 16,
        units: int = 4,
        candidates: int = 8,
        epochs: int = 30,
        mask_epochs: int = 20,
        batch_size: int = 32,
        rate: float = 0.01,
        sparsity: float = 0.001,
    ) -> Learned:
        """The task is learned and its units are locked; every earlier task's outputs are bit-identical.

        The first task trains every weight. A later one trains a binary mask over the locked units and its
        head for `mask_epochs`, then goes on with the units selected. While its accuracy on `test` (default:
        on `data`) is below `target` and fewer than `budget` units were added, it grows by at most `units`
        and trains its own units and its head for `epochs`. Candidates, per site:

            unlocked copies   theta_i + eps delta_i    of every locked unit in use; the original stays as it is
            new units         eps sigma(delta_i)       `candidates` of them, fan-in and bias drawn with norm 1

        ranked by the fall of the loss per eps under ||delta|| = 1, which to first order is the gradient's
        norm: at the copy's fan-in and bias, at the new unit's fan-out. A copy takes over what its original
        gave to the head and to the task's own units, so copying keeps the function. It cannot feed locked
        units; one that nothing else reads has gradient 0 and is no candidate. The first task only has new units.

        classes     the head's units (default: those of the network's output); targets are 0 to classes - 1
        sparsity    the weight of the mean of the mask in the loss: units that do not help are masked

        Weights are trained by Adam at `rate`. The same seed, tasks and options give the same bits. Tasks that
        remain unsolved are kept too (`solved` says so). If anything raises, nothing was learned.
        Refused: a name in use, options out of range. BadData: data that does not fit. Diverged: a loss of NaN.
        """
        who = f"Continual: task {task!r}"
        counts = {"units": (units, 1), "budget": (budget, 0), "candidates": (candidates, 0), "epochs": (epochs, 1)}
        counts |= {"mask_epochs": (mask_epochs, 1), "batch_size": (batch_size, 1)}
        for name, (value, least) in counts.items():
            if value < least:
                raise Refused(f"{who}: {name}", value, f"at least {least}")
        if not 0 < target <= 1 or not rate > 0 or not sparsity >= 0:
            found = f"target {target}, rate {rate}, sparsity {sparsity}"
            raise Refused(who, found, "a target in (0, 1], a positive rate, a sparsity of at least 0")
        if not isinstance(task, str) or not f"a_{task}".isidentifier():
            raise Refused(who, "that name", "letters, digits and underscores")
        if task in self._records:
            raise Refused(who, "a task of that name", "a new name")
        classes = self._output.units if classes is None else classes
        if classes < 2:
            raise Refused(f"{who}: classes", classes, "at least 2")
        whole = _checked(data, self._master, classes, who)
        unseen = whole if test is None else _checked(test, self._master, classes, f"{who}: test")

        seed = self.seed * 1_000_003 + len(self._records)
        with torch.random.fork_rng(devices=[]):  # dropout draws from torch's own generator
            torch.manual_seed(seed)
            draw = torch.Generator().manual_seed(seed)
            master = self._with_head(task, classes, draw)
            head = master.outputs[-1]
            run = _Task(who, _one_head(master, head), head, self._sites, whole, self.loss, batch_size, rate, draw)
            mask_accuracy = None
            if self._records:
                run.select(mask_epochs, sparsity)
                run.train(max(1, mask_epochs // 2))
                mask_accuracy = run.accuracy(unseen)
            else:
                run.own = {s for g in master.groups.values() if master.is_hidden(g.name) for s in g.serials.tolist()}
                run.train(epochs)
            reached, rounds = run.accuracy(unseen), 0
            while reached < target and run.added < budget:
                if not run.grow(min(units, budget - run.added), candidates):
                    break
                run.train(epochs)
                reached, rounds = run.accuracy(unseen), rounds + 1

        network = run.network
        old = {s: int(np.isin(network.groups[s].serials, self._master.groups[s].serials).sum()) for s in self._sites}
        learned = Learned(task, reached, reached >= target, mask_accuracy, old, run.unlocked, run.new, rounds)
        hidden = [g for g in network.groups.values() if network.is_hidden(g.name)]
        record = _Record(head, {g.name: g.serials for g in hidden}, network.next_serial, learned)
        before = self._master
        self._master = _merged(master, network, run.own, head, self._sites)
        self._records[task] = record
        if self.extract(task) != network:
            self._master = before
            del self._records[task]
            raise AssertionError(f"{who}: the extracted network is not the one that was learned")
        return learned

    def _with_head(self, task: str, classes: int, draw: torch.Generator) -> Network:
        """The master with a head for a new task, fed by everything that fed the output; the output is gone."""
        edit, output = Edit(self._master), self._output
        if output.name in edit.groups:
            for bundle in self._entering:
                edit.remove_bundle(bundle.name)
            edit.remove_group(output.name)
            edit.outputs = ()
        shape = (classes, *output.shape[1:])
        fan_in = sum(edit.groups[b.source].neurons for b in self._entering)
        name = edit.free_name(f"{output.name}_{task}")
        bias = None if output.bias is None else torch.zeros(classes).to(output.bias)
        edit.add_group(name, shape, activation=output.activation, bias=bias)
        for bundle in self._entering:
            sizes = Dense().weight_shape(edit.groups[bundle.source].shape, shape)
            drawn = (2 * torch.rand(*sizes, generator=draw, dtype=torch.float64) - 1) / math.sqrt(fan_in)
            wire = edit.free_name(f"{bundle.name}_{task}")
            edit.add_bundle(wire, bundle.source, name, Dense(), drawn.to(bundle.weight))
        edit.outputs = (*edit.outputs, name)
        return edit.finish()[0]


class _Task:
    """One task while it is learned: its network, and which of its units are its own (the others are locked)."""

    def __init__(
        self,
        who: str,
        network: Network,
        head: str,
        sites: tuple[str, ...],
        data: Batch,
        loss: Loss,
        batch_size: int,
        rate: float,
        draw: torch.Generator,
    ) -> None:
        self.who, self.network, self.head, self.sites = who, network, head, sites
        self.data, self.loss, self.batch_size, self.rate, self.draw = data, loss, batch_size, rate, draw
        self.own: set[int] = set()  # serials, of tied groups too
        self.copied: set[int] = set()  # locked units that have an unlocked copy here
        self.unlocked = self.new = 0

    @property
    def added(self) -> int:
        return self.unlocked + self.new

    def accuracy(self, data: Batch) -> float:
        found = accuracy(CompiledNetwork(self.network), data)
        if found is None:
            raise BadData(self.who, "outputs with positions", "one score per class")
        return found

    def shuffled(self) -> Iterator[Batch]:
        inputs, targets = self.data
        for index in torch.randperm(len(targets), generator=self.draw).split(self.batch_size):
            at = index.to(targets.device)
            yield tuple(x[at] for x in inputs), targets[at]

    def free(self) -> dict[str, Tensor]:
        """Per tensor that is trained, which of its entries are: the head's, and the rows of own units."""
        found = {}
        for bundle in self.network.bundles.values():
            if bundle.trainable and bundle.weight.dim():
                rows = _along(self.rows(bundle.target), _blocks(self.network, bundle))
                found[bundle.tensor] = rows.expand(_blocks(self.network, bundle).shape).reshape(bundle.weight.shape)
        for group in self.network.groups.values():
            if group.bias is not None:
                found[f"bias.{group.name}"] = self.rows(group.name)
        device = next(iter(self.network.tensors().values())).device
        return {name: entries.to(device) for name, entries in found.items() if entries.any()}

    def rows(self, group: str) -> Tensor:
        """Which units of a group are the task's own; the head's all are."""
        serials = self.network.groups[group].serials
        return torch.from_numpy(np.isin(serials, list(self.own)) | (group == self.head))

    # ---- the mask -----------------------------------------------------------------------------------------

    def select(self, epochs: int, sparsity: float) -> None:
        """The network is that of the locked units a trained mask selects; the head was trained along.

        Forward, what leaves a unit is multiplied by m = [score > 0]; backward, dL/dscore = dL/dm. The best
        score of a site is always on. Scores wait for the first third of the epochs: what a unit is worth
        means nothing under a head that is still random. Kept are the mask and head of the epoch after which
        the loss over all data, with the mask's price, was least.
        """
        network, free = self.network, self.free()
        model = CompiledNetwork(network)
        device = model._device
        head = {name: network.tensors()[name].detach().clone().requires_grad_() for name in free}
        scores = {
            s: (0.05 + 0.05 * torch.rand(network.groups[s].units, generator=self.draw)).to(device).requires_grad_()
            for s in self.sites
        }
        fixed = {name: tensor.detach() for name, tensor in network.tensors().items()} | head
        optimizer = torch.optim.Adam([*head.values(), *scores.values()], lr=self.rate)

        def objective(batch: Batch, train: bool) -> Tensor:
            inputs, targets = batch
            masks = {s: _on(score) + score - score.detach() for s, score in scores.items()}
            outputs, _ = model.program.run(_masked(network, fixed, masks), inputs, train=train)
            return self.loss(outputs[0], targets) + sparsity * torch.cat(list(masks.values())).mean()

        least, best = math.inf, network
        for epoch in range(epochs):
            for batch in self.shuffled():
                value = objective(batch, True)
                optimizer.zero_grad()
                self.require_finite(value, "its mask")
                value.backward()
                if 3 * epoch < epochs:
                    for score in scores.values():
                        score.grad = None
                optimizer.step()
            with torch.no_grad():
                reached = float(objective(self.data, False))
            if reached < least:
                kept = {s: network.groups[s].serials[_on(score).bool().cpu().numpy()] for s, score in scores.items()}
                trained = {name: tensor.detach().clone() for name, tensor in head.items()}
                least, best = reached, _chosen(network.with_tensors(trained), kept)
        self.require_finite(torch.tensor(least), "its mask")
        self.network = best

    # ---- weights ------------------------------------------------------------------------------------------

    def train(self, epochs: int) -> None:
        """The free entries are trained; every other one is frozen and keeps its bits."""
        free = self.free()
        model = CompiledNetwork(replace(self.network, frozen={name: ~entries.cpu() for name, entries in free.items()}))
        tensors = model.tensors()
        optimizer = torch.optim.Adam([tensors[name] for name in free], lr=self.rate)
        model.train()
        for _ in range(epochs):
            for inputs, targets in self.shuffled():
                model.zero_grad()
                loss = self.loss(model(*inputs), targets)
                self.require_finite(loss, "training")
                loss.backward()
                optimizer.step()
        self.network = replace(model.network(), frozen={})

    def require_finite(self, loss: Tensor, what: str) -> None:
        if not math.isfinite(float(loss.detach())):
            raise Diverged(f"{self.who}: {what}", f"a loss of {float(loss.detach())}", "a finite one", do="lower rate")

    # ---- growth -------------------------------------------------------------------------------------------

    def grow(self, units: int, candidates: int) -> bool:
        """The network has the best candidates in addition, at most `units`; False if none lowers the loss."""
        ranked: list[tuple[float, str, int, int]] = []  # gain, site, locked serial or -1, number of the new unit
        drawn: dict[str, dict[str, Tensor]] = {}
        for site in self.sites:
            serials = self.network.groups[site].serials
            locked = [s for s in serials.tolist() if s not in self.own and s not in self.copied]
            drawn[site] = self.fan_in(site, candidates)
            gains = self.gains(site, locked, drawn[site], candidates)
            ranked += [(g, site, s, -1) for g, s in zip(gains, locked, strict=False)]
            ranked += [(g, site, -1, i) for i, g in enumerate(gains[len(locked) :])]
        kept = sorted((c for c in ranked if c[0] > 0), key=lambda c: -c[0])[:units]
        for site in reversed(self.sites):  # last first: fan-ins were drawn for the units there were
            copies = [s for _, at, s, _ in kept if at == site and s >= 0]
            new = [i for _, at, s, i in kept if at == site and s < 0]
            if copies or new:
                fan_in = {name: w[new] for name, w in drawn[site].items()}
                self.network, own = self.with_units(site, copies, fan_in, len(new))
                self.own |= own
                self.copied |= set(copies)
                self.drop(site, copies)
                self.unlocked, self.new = self.unlocked + len(copies), self.new + len(new)
        return bool(kept)

    def fan_in(self, site: str, count: int) -> dict[str, Tensor]:
        """By tensor: `[count, a, S, b]` (see `_blocks`) per entering bundle, `[count, 1, 1, 1]` for a bias.

        Normal, each unit's of norm 1 over all of them.
        """
        wires = [self.network.bundles[n] for n in Site.of(self.network, site).entering]
        shapes = {b.tensor: tuple(_blocks(self.network, b).shape[1:]) for b in wires}
        tensors = self.network.tensors()
        shapes |= {n: (1, 1, 1) for b in wires if (n := f"bias.{b.target}") in tensors}
        drawn = {n: torch.randn(count, *s, generator=self.draw, dtype=torch.float64) for n, s in shapes.items()}
        norm = torch.stack([w.flatten(1).norm(dim=1) for w in drawn.values()]).norm(dim=0)
        return {n: (w / norm[:, None, None, None]).to(tensors[n]) for n, w in drawn.items()}

    def gains(self, site: str, locked: list[int], fan_in: Mapping[str, Tensor], new: int) -> list[float]:
        """-dL/d eps of every candidate of a site along its best direction of norm 1: the copies', then the new."""
        if not locked and not new:
            return []
        old = self.network.groups[site].units
        network, own = self.with_units(site, locked, fan_in, new)
        model = CompiledNetwork(network)
        model.eval()
        count = len(self.data[1])
        for inputs, targets in batches(self.data, 1024, self.who):
            (self.loss(model(*inputs), targets) * (len(targets) / count)).backward()
        gradient = {name: t.grad for name, t in model.tensors().items() if t.grad is not None}
        at, first = Site.of(network, site), old + len(locked)
        squares = torch.zeros(len(locked) + new, dtype=torch.float64)
        for name in at.entering:
            bundle = network.bundles[name]
            if bundle.tensor in gradient:
                rows = _blocks(network, bundle, gradient[bundle.tensor])[old:first]
                squares[: len(locked)] += rows.double().square().flatten(1).sum(1).cpu()
                bias = gradient.get(f"bias.{bundle.target}")
                if bias is not None and bundle.name == at.entering[0]:
                    squares[: len(locked)] += bias[old:first].double().square().cpu()
        for name in at.leaving:
            bundle = network.bundles[name]
            if bundle.tensor in gradient:
                columns = _blocks(network, bundle, gradient[bundle.tensor])[self.rows(bundle.target)][:, :, first:]
                squares[len(locked) :] += columns.double().square().sum((0, 1, 3)).cpu()
        found: list[float] = squares.sqrt().tolist()
        return found

    def with_units(
        self, site: str, copies: list[int], fan_in: Mapping[str, Tensor], new: int
    ) -> tuple[Network, set[int]]:
        """The network with unlocked copies and new units behind those of a site, and the serials that came.

        A copy has what its original gave to the head and to own units; a new unit has fan-out 0. Neither
        feeds a locked unit. The function is the same.
        """
        network = self.network
        at, group = Site.of(network, site), network.groups[site]
        index = np.array([network.index(Unit(site, s)) for s in copies], np.int64)
        edit = Edit(network)
        edit.rewire({site: UnitMap(np.concatenate([np.arange(group.units), index, np.full(new, -1)]))})
        old, first = group.units, group.units + len(copies)
        originals = torch.from_numpy(index)
        grown = edit.view()
        for name in at.leaving:
            bundle = grown.bundles[name]
            weight = _blocks(grown, bundle).clone()
            rows = self.rows(bundle.target)
            weight[:, :, old:first] = weight[:, :, originals] * _along(rows, weight).to(weight)
            taken = weight[:, :, originals]
            taken[rows] = 0
            weight[:, :, originals] = taken
            edit.write(bundle.tensor, weight.reshape(bundle.weight.shape))
        for name, rows_in in fan_in.items():
            kind, owner = name.split(".")
            if kind == "bias":
                bias = edit.tensor(name).clone()
                bias[first:] = rows_in.flatten()
                edit.write(name, bias)
                continue
            bundle = grown.bundles[owner]
            weight = _blocks(grown, bundle).clone()
            weight[first:] = rows_in
            edit.write(name, weight.reshape(bundle.weight.shape))
        after, _ = edit.finish()
        return after, {int(s) for g in at.groups for s in after.groups[g].serials[old:]}

    def drop(self, site: str, copies: list[int]) -> None:
        """Originals that feed nothing any more (no locked unit reads them) are no longer in the task's network."""
        network, leaving = self.network, Site.of(self.network, site).leaving
        if copies and all(bool(self.rows(network.bundles[n].target).all()) for n in leaving):
            serials = network.groups[site].serials
            self.network = _chosen(network, {site: serials[~np.isin(serials, copies)]})


# ---- networks ---------------------------------------------------------------------------------------------


def _require_plain(network: Network) -> None:
    """Refused unless every unit's value depends on its own row alone and every weight belongs to one unit."""
    who = "Continual"
    if len(network.outputs) != 1:
        raise Refused(who, f"{len(network.outputs)} outputs", "one, as the pattern of the tasks' heads")
    if network.frozen:
        raise Refused(
            who, f"frozen entries of {next(iter(network.frozen))!r}", "none: what is locked is its own choice"
        )
    for group in network.groups.values():
        if group.norm is not None:
            raise Refused(f"{who}: group {group.name!r}", f"a {group.norm.kind} norm", "none: tasks would share it")
        pools = all(isinstance(b.pattern, Pool2d) for b in network.entering(group.name))
        if group.aggregation != "sum" and not pools:
            raise Refused(f"{who}: group {group.name!r}", f"aggregation {group.aggregation!r}", "sums, or pooling")
    for bundle in network.bundles.values():
        plain = isinstance(bundle.pattern, Dense) or (
            isinstance(bundle.pattern, Conv2d) and bundle.pattern.channel_groups == 1
        )
        pooled = isinstance(bundle.pattern, Pool2d) and not bundle.trainable
        to_head = bundle.target == network.outputs[0]
        if not (plain or pooled) or (to_head and not isinstance(bundle.pattern, Dense)):
            expected = "Dense" if to_head else "Dense, Conv2d with one channel group, or a fixed Pool2d"
            raise Refused(f"{who}: bundle {bundle.name!r}", type(bundle.pattern).__name__, expected)
    if len(network.group(network.outputs[0]).shape) != 1 or network.leaving(network.outputs[0]):
        raise Refused(f"{who}: output {network.outputs[0]!r}", "positions, or bundles that leave it", "plain scores")


def _sites(network: Network) -> tuple[str, ...]:
    """The sites, in topological order; Refused if there is none, or a hidden group belongs to none."""
    place = {name: i for i, (names, _) in enumerate(network.components) for name in names}
    sites = Site.all(network)
    held = {g for s in sites for g in s.groups}
    outside = [g for g in network.groups if network.is_hidden(g) and g not in held]
    if outside or not sites:
        found = f"{', '.join(map(repr, outside))} outside of every site" if outside else "no hidden units"
        raise Refused("Continual", found, "hidden units, all of which can be added to")
    return tuple(sorted((s.name for s in sites), key=lambda name: place[name]))


def _one_head(network: Network, head: str) -> Network:
    """The network without the other heads."""
    edit = Edit(network)
    for other in network.outputs:
        if other != head:
            for bundle in network.entering(other):
                edit.remove_bundle(bundle.name)
            edit.remove_group(other)
    edit.outputs = (head,)
    return edit.finish()[0]


def _chosen(network: Network, serials: Mapping[str, NDArray[np.int64]]) -> Network:
    """The network of only these units, in this order, per site."""
    edit = Edit(network)
    for site, chosen in serials.items():
        edit.rewire({site: UnitMap(np.array([network.index(Unit(site, s)) for s in chosen.tolist()], np.int64))})
    return edit.finish()[0]


def _merged(master: Network, task: Network, own: Iterable[int], head: str, sites: tuple[str, ...]) -> Network:
    """The master with the task's own units behind its others and the task's head; nothing else changes."""
    edit = Edit(master)
    for site in sites:
        fresh = int((~np.isin(task.groups[site].serials, master.groups[site].serials)).sum())
        if fresh:
            edit.rewire({site: UnitMap(np.concatenate([np.arange(master.groups[site].units), np.full(fresh, -1)]))})
    for name, group in master.groups.items():
        if master.is_hidden(name):
            serials = task.groups[name].serials
            new = serials[~np.isin(serials, group.serials)]
            edit.groups[name] = replace(edit.groups[name], serials=np.concatenate([group.serials, new]))
    edit.next_serial = task.next_serial
    grown = edit.view()

    def rows(group: Group) -> NDArray[np.int64]:
        """The task's units of a group that it may write: own ones, and the head's."""
        return np.flatnonzero(np.isin(group.serials, list(own)) | (group.name == head))

    def places(group: Group, units: NDArray[np.int64]) -> Tensor:
        """Where the master has these units of the task."""
        stored = {s: i for i, s in enumerate(grown.groups[group.name].serials.tolist())}
        return torch.tensor([stored[s] for s in group.serials[units].tolist()], dtype=torch.long)

    for bundle in task.bundles.values():
        source, target = task.groups[bundle.source], task.groups[bundle.target]
        mine = rows(target)
        if not bundle.weight.dim() or not mine.size:
            continue
        weight = _blocks(grown, grown.bundles[bundle.name]).clone()
        part = torch.zeros_like(weight[: mine.size])
        part[:, :, places(source, np.arange(source.units))] = _blocks(task, bundle).detach()[torch.from_numpy(mine)]
        weight[places(target, mine)] = part
        edit.write(bundle.tensor, weight.reshape(grown.bundles[bundle.name].weight.shape))
    for group in task.groups.values():
        mine = rows(group)
        if group.bias is not None and mine.size:
            bias = edit.tensor(f"bias.{group.name}").clone()
            bias[places(group, mine)] = group.bias.detach()[torch.from_numpy(mine)]
            edit.write(f"bias.{group.name}", bias)
    return edit.finish()[0].verify()


# ---- tensors ----------------------------------------------------------------------------------------------


def _blocks(network: Network, bundle: Bundle, weight: Tensor | None = None) -> Tensor:
    """The weight (or a tensor of its shape) as `[target units, a, source units, b]`.

    Dense: a and b are positions. Conv2d: a is 1, b the kernel's entries.
    """
    weight = bundle.weight if weight is None else weight
    source, target = network.groups[bundle.source], network.groups[bundle.target]
    if isinstance(bundle.pattern, Conv2d):
        return weight.reshape(target.units, 1, source.units, -1)
    return weight.reshape(target.units, target.positions, source.units, source.positions)


def _along(rows: Tensor, blocks: Tensor) -> Tensor:
    """A number per target unit, to multiply blocks with."""
    return rows.to(blocks.device)[:, None, None, None]


def _on(score: Tensor) -> Tensor:
    """1 where a score is positive, and at the largest."""
    on = (score.detach() > 0).to(score)
    on[score.argmax()] = 1
    return on


def _masked(network: Network, tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with everything that leaves a unit multiplied by its mask."""
    found = dict(tensors)
    for site, mask in masks.items():
        for name in Site.of(network, site).leaving:
            bundle = network.bundles[name]
            blocks = _blocks(network, bundle, found[bundle.tensor])
            found[bundle.tensor] = (blocks * mask.to(blocks.dtype)[:, None]).reshape(bundle.weight.shape)
    return found


def _checked(data: Data, network: Network, classes: int, who: str) -> Batch:
    """The whole data as one batch; BadData for what does not fit the network or the classes."""
    read = list(batches(data, None, who))
    if not read or not sum(len(targets) for _, targets in read):
        raise BadData(who, "no samples", "at least one")
    inputs = tuple(torch.cat(parts) for parts in zip(*(x for x, _ in read), strict=True))
    targets = torch.cat([y for _, y in read])
    like = next(iter(network.tensors().values()))
    shapes = [network.groups[name].shape for name in network.inputs]
    if [tuple(x.shape[1:]) for x in inputs] != shapes or any(x.dtype != like.dtype for x in inputs):
        found = ", ".join(f"{tuple(x.shape[1:])} of {x.dtype}" for x in inputs)
        raise BadData(f"{who}: inputs", found, f"{', '.join(map(str, shapes))} of {like.dtype}")
    if not all(bool(x.isfinite().all()) for x in inputs):
        raise BadData(f"{who}: inputs", "NaN or infinity", "finite numbers")
    if targets.dim() != 1 or targets.is_floating_point() or targets.dtype == torch.bool:
        raise BadData(f"{who}: targets", f"shape {tuple(targets.shape)} of {targets.dtype}", "one class per sample")
    if int(targets.min()) < 0 or int(targets.max()) >= classes:
        found = f"classes {int(targets.min())} to {int(targets.max())}"
        raise BadData(f"{who}: targets", found, f"0 to {classes - 1}", do="relabel them, or give classes=")
    return tuple(x.to(like.device) for x in inputs), targets.to(like.device)
