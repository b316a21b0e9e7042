"""Splitting steepest descent (Liu, Wu and Wang, NeurIPS 2019): split the units whose splitting lowers the loss most.

A unit that becomes two of half its fan-out, with fan-ins theta + eps v and theta - eps v, changes the loss by

    eps^2 / 2  v^T S v,      S = E[ L'_sigma sigma''(z) b b^T ]

to second order: L'_sigma the gradient with respect to the unit's activation, z its pre-activation, b its
features (a constant 1 last where it has a bias; on images a sum over positions). The best direction is the
eigenvector of the smallest eigenvalue, and splitting pays only where that is negative.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from irgrow.growth.data import Data, Loss
from irgrow.growth.entries import Entrance
from irgrow.growth.probe import REDUCTIONS, bad_loss, evaluating
from irgrow.growth.selection import Candidate, Held, Selection, downstream_first, held_batches, measured_fall
from irgrow.ir.edit import Edit
from irgrow.ir.errors import BadData, Refused, UnknownName
from irgrow.ir.network import Network, Unit
from irgrow.ir.pattern import Identity
from irgrow.ir.proposal import Proposal
from irgrow.ir.site import Site
from irgrow.kernels.activations import Activation
from irgrow.passes.base import Pass, Sequence
from irgrow.passes.exactness import refuse_loops
from irgrow.passes.split_offset import SplitUnits
from irgrow.runtime.model import CompiledNetwork


@dataclass(frozen=True, eq=False)
class Splitting:
    """The splitting matrices of one site: `matrices` `[units, F, F]`, smallest eigenvalues and their eigenvectors."""

    site: str
    matrices: Tensor
    values: Tensor  # [units]
    vectors: Tensor  # [units, F]


@dataclass(frozen=True)
class SplittingDescent:
    """Splits the `units` units with the most negative eigenvalues, over all sites, by eps along the eigenvectors.

    eps         how far the two copies move apart, each way (absolute)
    beta        sigma'' of an activation with a corner (ReLU) is taken from a softplus of this sharpness there
    threshold   eigenvalues above -threshold times the largest |eigenvalue| are no reason to split

    `select` returns passes; the predicted gain is -eps^2/2 times the eigenvalues that were chosen.
    Refused where splitting has no such form: sites entered at several groups or with further activations,
    norms or depthwise convolutions on their way; nothing to gain anywhere.
    Source: Liu et al., arXiv:1910.02366 (splitting matrices, the softplus in place of ReLU).
    """

    units: int = 1
    eps: float = 0.01
    beta: float = 3.0
    threshold: float = 1e-6
    reduction: str = "mean"
    batch_size: int = 1024

    def __post_init__(self) -> None:
        if self.units < 1 or not self.eps > 0 or not self.beta > 0:
            found = f"units={self.units}, eps={self.eps}, beta={self.beta}"
            raise Refused("SplittingDescent", found, "at least 1 unit, positive eps and beta")

    def select(
        self, model: CompiledNetwork, data: Data, loss: Loss, *, sites: Iterable[str] | None = None
    ) -> Selection:
        """The splits; `sites` (default: all that have this form) says where to look."""
        network, who = model.structure, "SplittingDescent"
        names, notes = _usable(who, network, sites)
        held = held_batches(model, data, self.batch_size, None, who)
        found = splitting(model, held, loss, names, beta=self.beta, reduction=self.reduction)
        table = [(float(v), name, at) for name, s in found.items() for at, v in enumerate(s.values)]
        largest = max(abs(v) for v, *_ in table)
        chosen = sorted(t for t in table if t[0] < -self.threshold * largest)[: self.units]
        if not chosen:
            raise Refused(
                who,
                f"no negative eigenvalue among {len(table)} units",
                "a unit that can gain by splitting",
                do="train on, or add new units",
            )
        picked = {(name, at) for _, name, at in chosen}
        steps: list[Pass] = []
        after, proposals = network, []
        for name in downstream_first(network, dict.fromkeys(name for name, _ in picked)):
            at = sorted(i for n, i in picked if n == name)
            step = _split(self, after, network, found[name], at)
            assert step.offsets is not None
            proposals.append(step.offsets)
            after = step(after).after
            steps.append(step)
        gain = self.eps**2 / 2
        candidates = tuple(
            Candidate(
                "split", name, int(network.groups[name].serials[at]), v, self.eps, -gain * v, (name, at) in picked
            )
            for v, name, at in table
        )
        return Selection(
            steps[0] if len(steps) == 1 else Sequence(tuple(steps)),
            candidates,
            -gain * sum(v for v, *_ in chosen),
            measured_fall(model, after, held, loss, who),
            tuple(proposals),
            notes,
        )


def splitting(
    model: CompiledNetwork,
    data: Data | Held,
    loss: Loss,
    sites: Iterable[str] | None = None,
    *,
    beta: float = 3.0,
    reduction: str = "mean",
    batch_size: int = 1024,
) -> dict[str, Splitting]:
    """The splitting matrices of each site and their smallest eigenpairs, in eval mode.

    Means over samples of per-sample sums over positions, in float64; `reduction`: how the loss combines
    samples. The model stays as it is. Raises Refused for sites without that form, BadData.
    """
    who = "splitting"
    if reduction not in REDUCTIONS:
        raise UnknownName(f"{who}: reduction {reduction!r}", expected=f"one of {', '.join(REDUCTIONS)}")
    network = model.structure
    names, _ = _usable(who, network, sites)
    entrances = {name: _entrance(who, network, name) for name in names}
    observed, seen = _observed(network, entrances)
    watching = CompiledNetwork(observed, backend=model.backend).eval()
    sums = {n: torch.zeros(e.group.units, e.width, e.width, dtype=torch.float64) for n, e in entrances.items()}
    count = 0
    values = dict.fromkeys(seen.get(s, (s, s))[0] for e in entrances.values() for s in e.sources)
    values |= dict.fromkeys(e.group.name for e in entrances.values())
    taps = {name: seen[e.group.name][1] for name, e in entrances.items()}
    size = min([batch_size, *(e.batch_size for e in entrances.values())])
    held = held_batches(model, data, size, None, who)
    for inputs, targets in held:
        samples = targets.shape[0]
        with evaluating(watching), torch.enable_grad():
            shapes = {t: observed.groups[t].shape for t in taps.values()}
            shifts = {t: inputs[0].new_zeros(samples, *s).requires_grad_() for t, s in shapes.items()}
            outputs, recorded = watching.record(*inputs, values=tuple(values), shifts=shifts)
            value = loss(outputs, targets)
            if not isinstance(value, Tensor) or value.dim():
                raise BadData(f"{who}: loss", "not one number", "a loss that returns one number for the batch")
            if not bool(torch.isfinite(value)):
                raise bad_loss(who, model, inputs)
            found = torch.autograd.grad(value, list(shifts.values()), allow_unused=True)
        gradients = dict(zip(shifts, found, strict=True))
        for name, tap in taps.items():
            gradient = gradients[tap]
            if gradient is not None and not bool(torch.isfinite(gradient).all()):
                where = f"{who}: group {entrances[name].group.name!r}: gradient"
                raise BadData(where, "NaN or infinity", "finite values", do="check the loss")
        for name, entrance in entrances.items():
            gradient = gradients[taps[name]]
            if gradient is not None:
                activations = {s: recorded[seen.get(s, (s, s))[0]] for s in entrance.sources}
                z = recorded[entrance.group.name].detach().double()
                curve = gradient.double() * second_derivative(entrance.group.function, z, beta)
                _add(sums[name], entrance, activations, curve, samples if reduction == "mean" else 1)
        count += samples
    return {name: _solved(name, entrances[name], total / count) for name, total in sums.items()}


def second_derivative(function: Activation, z: Tensor, beta: float = 3.0) -> Tensor:
    """sigma''(z); the corner of an activation that has one at 0 counts as that of a softplus of sharpness beta.

    A corner where the slope jumps by J has sigma'' = J times a delta function at 0, here J beta s(1 - s) with
    s = sigmoid(beta z).
    """
    with torch.enable_grad():
        z = z.detach().clone().requires_grad_()
        (first,) = torch.autograd.grad(function(z).sum(), z, create_graph=True)
        found = torch.zeros_like(z)
        if first.requires_grad:
            (second,) = torch.autograd.grad(first.sum(), z, allow_unused=True)
            found = found if second is None else second.detach()
    if function.smooth:
        return found
    near = torch.tensor([-1e-9, 1e-9], dtype=z.dtype, requires_grad=True)
    with torch.enable_grad():
        (slopes,) = torch.autograd.grad(function(near).sum(), near)
    s = torch.sigmoid(beta * z.detach())
    return found + float(slopes[1] - slopes[0]) * beta * s * (1 - s)


def _add(total: Tensor, entrance: Entrance, values: dict[str, Tensor], curve: Tensor, samples: int) -> None:
    """Adds sum over rows of curve_i b b^T for every unit i; a batch norm stretches the features by its slope."""
    b = entrance.rows(values)
    rows = curve.reshape(curve.shape[0], entrance.group.units, -1).mT.reshape(-1, entrance.group.units) * samples
    norm = entrance.group.norm
    if norm is not None:
        assert norm.variance is not None
        rows = rows * (norm.scale.detach().double() ** 2 / (norm.variance.double() + norm.eps))
    for unit in range(rows.shape[1]):
        total[unit] += ((b * rows[:, unit : unit + 1]).mT @ b).to(total.device)


def _solved(site: str, entrance: Entrance, S: Tensor) -> Splitting:
    S = (S + S.mT) / 2
    values, vectors = torch.linalg.eigh(S)
    return Splitting(site, S, values[:, 0], vectors[:, :, 0])


def _split(method: SplittingDescent, network: Network, before: Network, found: Splitting, at: list[int]) -> SplitUnits:
    """The pass that splits these units of the site along their eigenvectors."""
    entrance = _entrance("SplittingDescent", before, found.site)
    offsets = method.eps * found.vectors[at]
    fan_in, first = {}, 0
    for entry in entrance.geometry.entries:
        part = offsets[:, first : first + entry.block.width]
        first += entry.block.width
        fan_in[entry.block.name.removeprefix("weight.")] = part.reshape(len(at), *entry.block.shape)
    bias = offsets[:, -1] if entrance.bias else None
    proposal = Proposal(found.site, network.structure, "SplittingDescent", fan_in, {}, bias)
    serials = before.groups[found.site].serials
    return SplitUnits(tuple(Unit(found.site, int(serials[i])) for i in at), proposal)


def _usable(who: str, network: Network, sites: Iterable[str] | None) -> tuple[list[str], tuple[str, ...]]:
    """The sites that can split: those named (Refused if one cannot), or all that can, with notes of the others."""
    if sites is not None:
        names = list(sites)
        for name in names:
            _entrance(who, network, name)
        return names, ()
    names, left = [], list[Refused]()
    for site in Site.all(network):
        try:
            _entrance(who, network, site.name)
        except Refused as refused:
            left.append(refused)
            continue
        names.append(site.name)
    if not names:
        raise left[0] if left else Refused(who, "no site", "a site that can split")
    return names, tuple(f"left out: {refused}" for refused in left)


def _entrance(who: str, network: Network, name: str) -> Entrance:
    """Where the site is entered; Refused where a split is not a second-order matter of one pre-activation."""
    where = f"{who}: site {name!r}"
    site = Site.of(network, name)
    refuse_loops(where, network, site)
    entrance = Entrance(where, network, name, True)
    entrance = replace(entrance, bias=entrance.group.bias is not None)
    for group in (network.groups[g] for g in site.groups if g != entrance.group.name):
        if group.activation != "identity" or group.norm is not None:
            what = f"activation {group.activation}" if group.norm is None else f"{group.norm.kind} norm"
            raise Refused(where, f"a second {what} at {group.name!r}", "one activation between fan-in and fan-out")
    sparse = [
        e for e in entrance.geometry.entries
        if getattr(network.bundles[e.block.name.removeprefix("weight.")].pattern, "source", None) is not None
    ]  # fmt: skip
    if sparse:
        raise Refused(where, f"sparse edges ({sparse[0].block.name})", "dense bundles or convolutions")
    if entrance.group.aggregation != "sum":
        raise Refused(where, "a maximum of parents", "a sum")
    try:
        SplitUnits((Unit(name, int(network.groups[name].serials[0])),)).requires(network)
    except Refused as refused:
        raise Refused(where, refused.found, refused.expected, refused.do) from None
    return entrance


def _observed(network: Network, entrances: dict[str, Entrance]) -> tuple[Network, dict[str, tuple[str, str]]]:
    """The same function with each entered group in three: pre-activation, activation, and a copy to shift.

    Returns for each group the names of its activation and of the copy; the group itself says z.
    """
    edit = Edit(network)
    one = torch.ones((), dtype=network.dtype, device=next(iter(network.tensors().values())).device)
    seen = {}
    for entrance in entrances.values():
        group = entrance.group
        activation, copy = edit.free_name(f"{group.name}_sigma"), edit.free_name(f"{group.name}_seen")
        edit.groups[group.name] = replace(group, activation="identity")
        edit.add_group(activation, group.shape, activation=group.activation)
        edit.add_group(copy, group.shape)
        for bundle in network.leaving(group.name):
            edit.redirect(bundle.name, source=copy)
        edit.add_bundle(
            edit.free_name(f"{group.name}_to_sigma"), group.name, activation, Identity(), one, trainable=False
        )
        edit.add_bundle(edit.free_name(f"{group.name}_to_seen"), activation, copy, Identity(), one, trainable=False)
        seen[group.name] = (activation, copy)
    return edit.finish()[0], seen
