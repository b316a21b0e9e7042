"""Embedding a convolutional network into the space of networks without its priors, and measuring how far it moves.

CNN  --to="local"-->  eLCN (no weight sharing)        CNN  --to="dense"-->  eFCN (no locality either)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from irgrow.ir.edit import Edit
from irgrow.ir.errors import BadData, BadShape, Refused, UnknownName
from irgrow.ir.lineage import Flat, Gather, Through
from irgrow.ir.morphism import Morphism
from irgrow.ir.network import Bundle, Network
from irgrow.ir.pattern import Conv2d, Dense, Identity, Local2d, Pattern, Pool2d, Sparse
from irgrow.passes.base import Pass, register

TARGETS = ("dense", "local")


@register
@dataclass(frozen=True)
class EmbedConv(Pass):
    """Every convolution has free weights between single neurons; every output stays the same.

        x (3,32,32) --conv K--> h (64,32,32) --max pool--> p (64,16,16)

    becomes, with `to="dense"` (eFCN) and `to="local"` (eLCN),

        x (3,32,32) --dense W--> h (65536) --fixed edges--> p (16384)     W[j, i] = K[tap] on the edges, else 0
        x (3,32,32) --edges W--> h (65536) --fixed edges--> p (16384)     one weight for each edge

    The groups are flattened, so that a unit is a neuron: its bias and its batch norm (scale, shift and
    running statistics) are its own from now on, and in train mode its batch statistics too. Neurons keep
    their numbers. Inputs and outputs keep their shapes. Pooling keeps its edges and its one weight, fixed
    ones fixed. With `flatten=False` groups stay images, whose bias and norm are per channel, pooling stays
    as it is and `local` means `Local2d`, which needs no index arrays.

    `groups` (default all) are the hidden groups to embed, with every bundle at them. The gradients of
    the new weights sum over the ties to the convolution's gradient; a single one has no exact relation to
    it, so optimizer state starts fresh, or with `share_state` is divided by the number of ties.

    Refused: a dense bundle into a group that aggregates by max (edges of weight 0 would count there), or
    inside a loop of groups (they could close a cycle of neurons); nothing to embed.
    Source: d'Ascoli et al., Finding the Needle in the Haystack with Convolutions, section 3.
    """

    to: str = "dense"
    groups: tuple[str, ...] = ()
    flatten: bool = True
    share_state: bool = False
    reference: ClassVar[str] = "d'Ascoli et al. 2019, section 3"

    @classmethod
    def places(cls, network: Network) -> Iterator[EmbedConv]:
        for to in TARGETS:
            for flatten in (True, False):
                candidate = cls(to, flatten=flatten)
                try:
                    candidate.requires(network)
                except Refused:
                    continue
                yield candidate

    def requires(self, network: Network) -> None:
        if self.to not in TARGETS:
            raise UnknownName(f"EmbedConv: to={self.to!r}", expected=f"one of {', '.join(TARGETS)}")
        for name in self.groups:
            group, who = network.group(name), f"EmbedConv: group {name!r}"
            if not network.is_hidden(name):
                raise Refused(who, "an input or output, which keeps its shape", "a hidden group")
            if len(group.shape) == 1:
                raise Refused(who, "a flat group", "a group with positions")
        bundles = self._bundles(network)
        if not bundles and not (self.flatten and self._flat(network)):
            raise Refused(
                "EmbedConv", "nothing to embed", "a convolution" if not self.flatten else "a convolution or an image"
            )
        for bundle in bundles:
            if self.to == "dense" and isinstance(bundle.pattern, Conv2d):
                refuse_dense(f"EmbedConv: bundle {bundle.name!r}", network, bundle, do="use to='local'")

    def _flat(self, network: Network) -> set[str]:
        """The groups that become flat."""
        if not self.flatten:
            return set()
        images = (n for n, g in network.groups.items() if network.is_hidden(n) and len(g.shape) > 1)
        return set(self.groups) or set(images)

    def _bundles(self, network: Network) -> list[Bundle]:
        """The bundles whose pattern changes."""
        flat = self._flat(network)
        found = []
        for bundle in network.bundles.values():
            ends = {bundle.source, bundle.target}
            if isinstance(bundle.pattern, Conv2d):
                free = self.to == "local" and isinstance(bundle.pattern, Local2d) and not ends & flat
                if (not self.groups or ends & set(self.groups)) and not free:
                    found.append(bundle)
            elif isinstance(bundle.pattern, (Pool2d, Identity)) and ends & flat:
                found.append(bundle)
        return found

    def rewrite(self, edit: Edit) -> None:
        before, flat = edit.before, self._flat(edit.before)
        for name in before.groups:
            if name in flat:
                edit.flatten(name, share=self.share_state)
        for bundle in self._bundles(before):
            pattern, ends = bundle.pattern, {bundle.source, bundle.target}
            shapes = before.shapes(bundle)
            if isinstance(pattern, Conv2d):
                new: Pattern
                if self.to == "dense":
                    new = Dense()
                elif ends & flat:
                    s, t, _ = pattern.all_edges(*shapes)
                    new = Sparse(s, t)
                else:
                    new = Local2d(**{f.name: getattr(pattern, f.name) for f in fields(Conv2d)})
                edit.repattern(bundle.name, new, _spread(edit, bundle, new, self.share_state))
            elif isinstance(pattern, Identity) and ends <= flat:
                positions = before.groups[bundle.source].positions
                edit.repattern(bundle.name, Identity(pattern.start * positions), edit.gathers(bundle.tensor)[0])
            else:
                one = Flat(bundle.tensor, (), (1,), torch.zeros(1, dtype=torch.long))
                edit.repattern(bundle.name, pattern.to_sparse(*shapes), one)


@register
@dataclass(frozen=True)
class Densify(Pass):
    """The bundle is dense: the edges it lacked have weight 0, shared weights are free; outputs stay the same.

        a --some edges--> b     becomes     a --dense W--> b     W[j, i] = the weight of edge i -> j, else 0

    It takes the locality from one bundle, for example of an eLCN. Optimizer state stays where no tie breaks;
    see EmbedConv for `share_state`.

    Refused: a dense bundle, a target that aggregates by max, a bundle inside a loop of groups, tagged edges.
    """

    bundle: str
    share_state: bool = False
    reference: ClassVar[str] = "d'Ascoli et al. 2019, section 3"

    @classmethod
    def places(cls, network: Network) -> Iterator[Densify]:
        for name in network.bundles:
            candidate = cls(name)
            try:
                candidate.requires(network)
            except Refused:
                continue
            yield candidate

    def requires(self, network: Network) -> None:
        bundle, who = network.bundle(self.bundle), f"Densify: bundle {self.bundle!r}"
        if isinstance(bundle.pattern, Dense):
            raise Refused(who, "a dense bundle", "one that lacks edges or shares weights")
        if isinstance(bundle.pattern, Sparse) and bundle.pattern.tags:
            raise Refused(
                who, f"edges with tags {', '.join(bundle.pattern.tags)}", "edges without, since all would count"
            )
        refuse_dense(who, network, bundle, do=None)

    def rewrite(self, edit: Edit) -> None:
        bundle = edit.bundles[self.bundle]
        edit.repattern(self.bundle, Dense(), _spread(edit, bundle, Dense(), self.share_state))


def refuse_dense(who: str, network: Network, bundle: Bundle, do: str | None) -> None:
    """Raises Refused where edges of weight 0 between all neurons of a bundle's ends would not be exact."""
    if network.groups[bundle.target].aggregation == "max":
        raise Refused(
            who,
            f"its target {bundle.target!r} aggregates by max, where edges of weight 0 count",
            "a target that sums",
            do=do,
        )
    for names, cyclic in network.components:
        if cyclic and bundle.source in names and bundle.target in names:
            raise Refused(who, "a loop of groups, where dense edges could close a cycle", "none", do=do)


def _spread(edit: Edit, bundle: Bundle, new: Pattern, share: bool) -> Gather:
    """The weights of a bundle of the network before, on the same edges of another pattern."""
    between, after = edit.before.shapes(bundle), edit.shapes(bundle.name)
    old_shape, shape = tuple(bundle.weight.shape), new.weight_shape(*after)
    return Through(bundle.tensor, old_shape, shape, bundle.pattern, new, between, after, share)


def local_masks(morphism: Morphism) -> dict[str, Tensor]:
    """For every embedded weight, by tensor name: True where the convolution had an edge (its local part).

    `morphism` is what `EmbedConv(to="dense")` returned, alone or followed by other passes. Weights that came
    through unchanged have no mask.
    """
    masks = {}
    for bundle in morphism.after.bundles.values():
        gathers = morphism.lineage.gathers.get(bundle.tensor, ())
        if isinstance(bundle.pattern, Dense) and gathers and not any(g.exact for g in gathers):
            mask = torch.zeros(bundle.weight.shape, dtype=torch.bool)
            for gather in gathers:
                mask |= gather.covers()
            masks[bundle.tensor] = mask
    return masks


def masked(network: Network, masks: Mapping[str, Tensor]) -> Network:
    """The network with the masked weights zero where their mask is False.

    With `local_masks` it computes with local weights only; with their inverse (`~mask`) with off-local ones.
    """
    tensors = network.tensors()
    fitting = {n: _fitting(tensors, n, m) for n, m in masks.items()}
    return network.with_tensors({n: tensors[n] * m.to(tensors[n]) for n, m in fitting.items()})


def deviation(network: Network, masks: Mapping[str, Tensor], among: Iterable[str] | None = None) -> float:
    """delta = ||theta_off-local|| / ||theta||: how far an eFCN has left the subspace of local weights.

    theta are the tensors named by `among`; by default those with a mask, that is the embedded weights without
    biases and without layers that were dense before. Norms are accumulated in float64; 0 for all-zero weights.
    Source: d'Ascoli et al., section 4.3.
    """
    tensors = network.tensors()
    fitting = {n: _fitting(tensors, n, m) for n, m in masks.items()}
    off = sum(_square(tensors[n] * (~m).to(tensors[n])) for n, m in fitting.items())
    names = list(masks if among is None else among)
    unknown = [n for n in names if n not in tensors]
    if unknown:
        raise UnknownName(f"deviation: tensor {unknown[0]!r}", expected=f"one of {', '.join(tensors)}")
    missing = [n for n in masks if n not in names]
    if missing:
        raise BadData("deviation: among", f"it leaves out {missing[0]!r}, which has a mask", "all tensors with a mask")
    total = sum(_square(tensors[n]) for n in names)
    return float((off / total) ** 0.5) if total else 0.0


def _square(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().sum())


def _fitting(tensors: Mapping[str, Tensor], name: str, mask: Tensor) -> Tensor:
    if name not in tensors:
        raise UnknownName(f"mask of {name!r}", expected=f"one of {', '.join(tensors)}")
    if mask.shape != tensors[name].shape:
        raise BadShape(f"mask of {name!r}", tuple(mask.shape), tuple(tensors[name].shape))
    return mask.to(tensors[name].device)
