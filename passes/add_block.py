"""New groups and bundles that begin without effect: between any two groups, around one, and across."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from irgrow.ir.edit import Edit
from irgrow.ir.errors import BadData, Refused, StaleMorphism, UnknownName
from irgrow.ir.morphism import FirstOrder, Promise, SameFunction
from irgrow.ir.network import Network
from irgrow.ir.pattern import Conv2d, Dense, Identity, Pattern, Shape
from irgrow.ir.proposal import Proposal
from irgrow.kernels.activations import ACTIVATIONS
from irgrow.passes.base import Pass, register

Wires = tuple[Shape, Pattern, Pattern]  # shape of the new group, what enters it, what leaves it


@register
@dataclass(frozen=True)
class AddGroup(Pass):
    """Between two groups stands a new one, beside what joins them already; at zero fan-out outputs stay the same.

        a --W--> b     becomes     a --W--> b     and     a --fan_in--> new --fan_out--> b

    The two may lie anywhere, as long as `child` does not feed `parent`. From an image the new group is an
    image of the child's size (where that is one), by `kernel` x `kernel` convolutions, the first with the
    stride that it takes; otherwise, or with `kernel=None`, it is flat and dense. Fan-in and bias are drawn
    from `seed` like a new layer's and the fan-out is 0; or all come from `proposal`, with
    `fan_in={parent: ...}` and `fan_out={child: ...}` in the weights' shapes.

    Promise: SameFunction at zero fan-out, or zero fan-in where sigma(0) = 0; else FirstOrder in what is new.
    Refused: a child that feeds the parent, is an input or aggregates by max; images that no stride joins.
    Source: Evci et al., GradMax, arXiv:2201.05125, appendix A (auxiliary layers); AutoGrow.
    """

    parent: str
    child: str
    units: int = 1
    activation: str = "relu"
    kernel: int | None = 3
    bias: bool = True
    seed: int = 0
    name: str | None = None
    proposal: Proposal | None = None
    reference: ClassVar[str] = "GradMax, arXiv:2201.05125, appendix A"

    @classmethod
    def places(cls, network: Network) -> Iterator[AddGroup]:
        for source in network.groups:
            for target in network.groups:
                for kernel in (3, None):
                    try:
                        candidate = cls(source, target, 2, kernel=kernel)
                        candidate.requires(network)
                        into, outof = candidate.shapes(network)
                        drawn = candidate._tensors(network)[0]
                        given = Proposal(
                            "new", network.structure, "Random", {source: drawn}, {target: torch.ones(outof)}
                        )
                    except Refused:
                        continue
                    yield candidate
                    yield cls(source, target, 2, kernel=kernel, bias=False, proposal=given.scaled(1.0, 0.1))
                    break

    def shapes(self, network: Network) -> tuple[Shape, Shape]:
        """The shapes of the new fan-in and fan-out weights."""
        source, target = network.group(self.parent), network.group(self.child)
        shape, into, outof = _wires("AddGroup", source.shape, target.shape, self.units, self.kernel)
        return into.weight_shape(source.shape, shape), outof.weight_shape(shape, target.shape)

    def requires(self, network: Network) -> None:
        who = f"AddGroup: {self.parent} -> {self.child}"
        source, target = network.group(self.parent), network.group(self.child)
        _check_new(who, network, self.units, self.activation, self.kernel, self.name)
        _check_target(who, network, source.name, target.name)
        _wires(who, source.shape, target.shape, self.units, self.kernel)
        if self.proposal is not None:
            _check_proposal(who, network, self.proposal, self.parent, self.child, *self.shapes(network), self.units)
            if self.proposal.bias is not None and not self.bias:
                raise Refused(who, "a proposal with a bias", "none, with bias=False")

    def promise(self, network: Network) -> Promise:
        return _quiet(self.proposal, self.activation)

    def rewrite(self, edit: Edit) -> None:
        name = edit.free_name(self.name or f"{self.parent}_{self.child}_between")
        _insert(
            edit, name, self.parent, self.child, self.units, self.activation, self.kernel, self._tensors(edit.before)
        )

    def _tensors(self, network: Network) -> tuple[Tensor, Tensor, Tensor | None]:
        return _weights(network, *self.shapes(network), self.units, self.bias, self.seed, self.proposal)


@register
@dataclass(frozen=True)
class AddResidual(Pass):
    """Behind the group stands I + h, where h is a new group; at zero fan-out outputs stay the same.

        g --v--> b     becomes     g --I--> g_block --v--> b     and     g --fan_in--> h --fan_out--> g_block

    Everything that left the group leaves the block, a new group without activation. `h` has `units` units
    (default: as many as the group); for the rest see AddGroup (a proposal says `{group: ...}` twice).

    Refused: an output, a group that nothing leaves or that lies in a loop of groups.
    Source: Wu et al., Firefly, section 2.3; network morphism, arXiv:1603.01670.
    """

    group: str
    units: int | None = None
    activation: str = "relu"
    kernel: int | None = 3
    bias: bool = True
    seed: int = 0
    proposal: Proposal | None = None
    reference: ClassVar[str] = "Firefly, arXiv:2102.08574, section 2.3"

    @classmethod
    def places(cls, network: Network) -> Iterator[AddResidual]:
        for name in network.groups:
            for kernel in (3, None):
                candidate = cls(name, kernel=kernel)
                try:
                    candidate.requires(network)
                except Refused:
                    continue
                yield candidate
                break

    def shapes(self, network: Network) -> tuple[Shape, Shape]:
        """The shapes of the new fan-in and fan-out weights."""
        group = network.group(self.group)
        shape, into, outof = _wires("AddResidual", group.shape, group.shape, self._width(network), self.kernel)
        return into.weight_shape(group.shape, shape), outof.weight_shape(shape, group.shape)

    def requires(self, network: Network) -> None:
        group, who = network.group(self.group), f"AddResidual: group {self.group!r}"
        if self.group in network.outputs:
            raise Refused(who, "an output", "a group that others read", do="add the block in front of the output")
        if not network.leaving(self.group):
            raise Refused(who, "nothing leaves it", "a group that others read")
        if any(cyclic and self.group in names for names, cyclic in network.components):
            raise Refused(who, "it lies in a loop of groups", "a group outside loops")
        _check_new(who, network, self._width(network), self.activation, self.kernel, None)
        _wires(who, group.shape, group.shape, self._width(network), self.kernel)
        if self.proposal is not None:
            shapes = self.shapes(network)
            _check_proposal(who, network, self.proposal, self.group, self.group, *shapes, self._width(network))
            if self.proposal.bias is not None and not self.bias:
                raise Refused(who, "a proposal with a bias", "none, with bias=False")

    def promise(self, network: Network) -> Promise:
        return _quiet(self.proposal, self.activation)

    def rewrite(self, edit: Edit) -> None:
        network = edit.before
        total = edit.free_name(f"{self.group}_block")
        edit.add_group(total, network.groups[self.group].shape)
        for bundle in network.leaving(self.group):
            edit.redirect(bundle.name, source=total)
        one = torch.ones((), dtype=network.dtype)
        edit.add_bundle(edit.free_name(f"{self.group}_{total}"), self.group, total, Identity(), one, trainable=False)
        width, name = self._width(network), edit.free_name(f"{self.group}_residual")
        tensors = _weights(network, *self.shapes(network), width, self.bias, self.seed, self.proposal)
        _insert(edit, name, self.group, total, width, self.activation, self.kernel, tensors)

    def _width(self, network: Network) -> int:
        return network.group(self.group).units if self.units is None else self.units


@register
@dataclass(frozen=True)
class AddSkip(Pass):
    """Two groups are joined by a new bundle of weight 0; every output stays the same.

        a     b     becomes     a --0--> b

    Between images it is a `kernel` x `kernel` convolution with the stride that it takes, else (or with
    `kernel=None`) dense.

    Refused: a child that feeds the parent, is an input or aggregates by max (0 counts there); such a bundle
    that exists; images that no stride joins.
    Source: Wei et al., Network Morphism, arXiv:1603.01670, section 4 (skip by a zero edge).
    """

    parent: str
    child: str
    kernel: int | None = 1
    reference: ClassVar[str] = "Network Morphism, arXiv:1603.01670"

    @classmethod
    def places(cls, network: Network) -> Iterator[AddSkip]:
        for source in network.groups:
            for target in network.groups:
                for kernel in (1, None):
                    candidate = cls(source, target, kernel)
                    try:
                        candidate.requires(network)
                    except Refused:
                        continue
                    yield candidate
                    break

    def requires(self, network: Network) -> None:
        who = f"AddSkip: {self.parent} -> {self.child}"
        source, target = network.group(self.parent), network.group(self.child)
        _check_new(who, network, 1, "identity", self.kernel, None)
        _check_target(who, network, source.name, target.name)
        pattern = self._pattern(network)
        for bundle in network.leaving(self.parent):
            if bundle.target == self.child and bundle.pattern == pattern:
                raise Refused(who, f"bundle {bundle.name!r} of the same pattern", "a new connection")

    def _pattern(self, network: Network) -> Pattern:
        source, target = network.group(self.parent).shape, network.group(self.child).shape
        if self.kernel is None or len(source) != 3 or len(target) != 3:
            return Dense()
        return _conv(f"AddSkip: {self.parent} -> {self.child}", source, target, self.kernel)

    def rewrite(self, edit: Edit) -> None:
        network = edit.before
        pattern = self._pattern(network)
        shape = pattern.weight_shape(network.groups[self.parent].shape, network.groups[self.child].shape)
        name = edit.free_name(f"{self.parent}_{self.child}")
        edit.add_bundle(name, self.parent, self.child, pattern, torch.zeros(shape, dtype=network.dtype))


def _insert(
    edit: Edit,
    name: str,
    source: str,
    target: str,
    units: int,
    activation: str,
    kernel: int | None,
    tensors: tuple[Tensor, Tensor, Tensor | None],
) -> None:
    """The new group and its two bundles."""
    fan_in, fan_out, bias = tensors
    shape, into, outof = _wires(name, edit.groups[source].shape, edit.groups[target].shape, units, kernel)
    edit.add_group(name, shape, activation=activation, bias=bias)
    edit.add_bundle(edit.free_name(f"{source}_{name}"), source, name, into, fan_in)
    edit.add_bundle(edit.free_name(f"{name}_{target}"), name, target, outof, fan_out)


def _wires(who: str, source: Shape, target: Shape, units: int, kernel: int | None) -> Wires:
    """The shape of a new group between groups of these shapes, and the patterns that join them."""
    if kernel is None or len(source) != 3:
        return (units,), Dense(), Dense()
    same = Conv2d((kernel, kernel), padding=(kernel // 2, kernel // 2))
    if len(target) != 3:
        return (units, *source[1:]), same, Dense()
    return (units, *target[1:]), _conv(who, source, target, kernel), same


def _conv(who: str, source: Shape, target: Shape, kernel: int) -> Conv2d:
    """The convolution that makes an image of the child's size; Refused if no stride does."""
    stride = (-(-source[1] // target[1]), -(-source[2] // target[2]))
    conv = Conv2d((kernel, kernel), stride, (kernel // 2, kernel // 2))
    if conv.output(source) != target[1:]:
        raise Refused(
            who, f"images of {source[1]}x{source[2]} and {target[1]}x{target[2]}", "sizes that a stride joins",
            do="use kernel=None for dense bundles",
        )  # fmt: skip
    return conv


def _weights(
    network: Network, into: Shape, outof: Shape, units: int, bias: bool, seed: int, proposal: Proposal | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Fan-in, fan-out and bias: those of the proposal, or a drawn fan-in (as torch's layers do) and no fan-out."""
    dtype = network.dtype
    zero = torch.zeros(units, dtype=dtype) if bias else None
    if proposal is not None:
        (fan_in,), (fan_out,) = proposal.fan_in.values(), proposal.fan_out.values()
        given = zero if proposal.bias is None else proposal.bias.detach().to(dtype)
        return fan_in.detach().to(dtype), fan_out.detach().to(dtype), given
    draw = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(max(1, math.prod(into[1:])))

    def uniform(shape: Shape) -> Tensor:
        return ((torch.rand(shape, generator=draw, dtype=torch.float64) * 2 - 1) * bound).to(dtype)

    fan_in = uniform(into)
    return fan_in, torch.zeros(outof, dtype=dtype), uniform((units,)) if bias else None


def _quiet(proposal: Proposal | None, activation: str) -> Promise:
    if proposal is None or not any(bool(w.any()) for w in proposal.fan_out.values()):
        return SameFunction()
    parts = [*proposal.fan_in.values(), *([] if proposal.bias is None else [proposal.bias])]
    if not any(bool(w.any()) for w in parts) and ACTIVATIONS[activation].at_zero == 0:
        return SameFunction()
    return FirstOrder()


def _check_new(who: str, network: Network, units: int, activation: str, kernel: int | None, name: str | None) -> None:
    if units < 1:
        raise Refused(who, f"{units} units", "at least 1")
    if activation not in ACTIVATIONS:
        raise UnknownName(f"activation {activation!r}", expected=f"one of {', '.join(ACTIVATIONS)}")
    if kernel is not None and (kernel < 1 or kernel % 2 == 0):
        raise Refused(who, f"kernel {kernel}", "an odd kernel, or None for dense bundles")
    if name is not None and not name.isidentifier():
        raise Refused(who, f"name {name!r}", "letters, digits and _")


def _check_target(who: str, network: Network, source: str, target: str) -> None:
    """Raises Refused unless new edges of weight 0 from source to target change nothing and close no loop."""
    if target in network.inputs:
        raise Refused(who, f"the input {target!r} as target", "a group that is no input")
    if network.groups[target].aggregation == "max":
        raise Refused(who, f"{target!r}, which aggregates by max", "a target that sums, where weight 0 is no edge")
    seen, queue = {target}, [target]
    while queue:
        for bundle in network.leaving(queue.pop()):
            if bundle.target not in seen:
                seen.add(bundle.target)
                queue.append(bundle.target)
    if source in seen:
        raise Refused(
            who, f"{target!r}, which feeds {source!r}" if source != target else "one group", "no loop of groups"
        )


def _check_proposal(
    who: str, network: Network, p: Proposal, source: str, target: str, into: Shape, outof: Shape, units: int
) -> None:
    if p.structure != network.structure:
        raise StaleMorphism(who, "a proposal for another structure", "one made for this network", do="make it again")
    if p.delta:
        raise Refused(who, "a proposal with changes of existing weights", "none")
    for what, found, name, shape in (("fan-in", p.fan_in, source, into), ("fan-out", p.fan_out, target, outof)):
        if set(found) != {name}:
            raise Refused(f"{who}: {what}", f"weights for {sorted(found)}", f"for {name!r}")
        _fits(f"{who}: {what}", found[name], shape)
    if p.bias is not None:
        _fits(f"{who}: bias", p.bias, (units,))


def _fits(who: str, tensor: Tensor, shape: Shape) -> None:
    if tuple(tensor.shape) != shape:
        raise Refused(who, f"shape {tuple(tensor.shape)}", shape)
    if not bool(torch.isfinite(tensor).all()):
        raise BadData(who, "NaN or infinity", "finite values")
