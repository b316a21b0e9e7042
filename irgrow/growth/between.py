"""`Between`: a new group between any two groups, as a place where every growth method works.

GradMax (appendix A) finds new layers through an auxiliary matrix of zeros between the two layers. Here it is
an auxiliary network: the same function with one unit between them that has no weights yet. To a method that
unit is a site like any other, so nothing else has to know about layers that do not exist.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from irgrow.growth.data import Data, Loss
from irgrow.growth.probe import probe
from irgrow.ir.errors import Refused, StaleMorphism
from irgrow.ir.network import Network
from irgrow.ir.pattern import Sparse
from irgrow.ir.proposal import Proposal
from irgrow.ir.statistics import Statistics
from irgrow.passes.add_block import AddGroup
from irgrow.passes.freeze import Freeze
from irgrow.runtime.model import CompiledNetwork


@dataclass(frozen=True)
class Between:
    """A new group of this activation between `parent` and `child`, any two groups of which the first comes first.

        place = ig.Between("input", "output", activation="relu")
        empty = place.within(model)                       # the same function, and an empty group at the place
        statistics = place.probe(empty, data, loss, want=how.needs)
        proposal = ig.refine(how.propose(statistics), empty, batch, loss)
        model.grow(place.passes(proposal, model.structure)(model.structure), optimizer)

    In `fit`: `Growth(sites=("hidden", place))`. Once the group exists its name is a site like others, and further
    units join it. For the other fields see `AddGroup`, which is what is done in the end.
    Refused: two groups that AddGroup cannot join; a change of existing weights (dW*) beside the new group.
    Source: Evci et al., GradMax, arXiv:2201.05125, appendix A.
    """

    parent: str
    child: str
    activation: str = "relu"
    kernel: int | None = 3
    bias: bool = True
    group: str | None = None

    @property
    def name(self) -> str:
        """The new group's name."""
        return self.group or f"{self.parent}_{self.child}_between"

    def within(self, model: CompiledNetwork) -> CompiledNetwork:
        """A copy of the model with one unit at the place, without weights; its function is the model's."""
        device = next(iter(model.tensors().values())).device
        return CompiledNetwork(self.auxiliary(model.structure), backend=model.backend, device=device)

    def auxiliary(self, network: Network) -> Network:
        """The network with one unit at the place that nothing feeds and that feeds nothing."""
        if self.name in network.groups:
            raise Refused(
                f"Between: {self.parent} -> {self.child}", f"a group {self.name!r}", "a new name",
                do="grow that group, or give this one another name (group=...)",
            )  # fmt: skip
        into, outof = AddGroup(self.parent, self.child, 1, self.activation, self.kernel, self.bias).shapes(network)
        nothing = Proposal(
            self.name, network.structure, "none", {self.parent: torch.zeros(into)}, {self.child: torch.zeros(outof)}
        )
        return self._pass(1, nothing)(network).after

    def probe(
        self,
        empty: CompiledNetwork,
        data: Data,
        loss: Loss,
        *,
        reduction: str = "mean",
        want: Iterable[str] = ("S", "M_prev", "N"),
        taps: str = "full",
        mode: str = "eval",
        batch_size: int = 1024,
    ) -> Statistics:
        """The statistics of the place, from `within(model)`; options as of `probe`.

        Outgoing weights that a method may compare with are those that already feed the child, by source unit.
        """
        network = empty.structure
        (leaving,) = network.leaving(self.name)
        fixed = Freeze(leaving.name)(network).after  # so that it is none of the weights that feed the child already
        seen = CompiledNetwork(fixed, backend=empty.backend, device=next(iter(empty.tensors().values())).device)
        found = probe(
            seen,
            data,
            loss,
            sites=[self.name],
            reduction=reduction,
            want=want,
            taps=taps,
            mode=mode,
            batch_size=batch_size,
        )
        return replace(found[self.name], structure=network.structure, fan_out_norm=self._norm(network))

    def passes(self, proposal: Proposal, network: Network) -> AddGroup:
        """The pass that puts the proposal's units there; StaleMorphism unless it was made for this network."""
        if proposal.structure != self.auxiliary(network).structure:
            who = f"Between: {self.parent} -> {self.child}"
            raise StaleMorphism(who, "a proposal for another structure", "one made within this one", do="probe again")
        (fan_in,), (fan_out,) = proposal.fan_in.values(), proposal.fan_out.values()
        placed = replace(
            proposal, structure=network.structure, fan_in={self.parent: fan_in}, fan_out={self.child: fan_out}
        )
        return self._pass(placed.units, placed)

    def _pass(self, units: int, proposal: Proposal) -> AddGroup:
        return AddGroup(
            self.parent, self.child, units, self.activation, self.kernel, self.bias, name=self.name, proposal=proposal
        )

    def _norm(self, network: Network) -> float:
        """The mean over source units of the norm of the weights by which they feed the child (1 if nothing does)."""
        norms: list[Tensor] = []
        for bundle in network.entering(self.child):
            if not bundle.trainable or bundle.source == self.name or isinstance(bundle.pattern, Sparse):
                continue
            units = network.groups[bundle.source].units
            weight = bundle.weight.detach().double()
            if weight.shape[1] % units == 0:
                norms.append(weight.reshape(weight.shape[0], units, -1).square().sum((0, 2)).sqrt())
        mean = float(torch.cat(norms).mean()) if norms else 0.0
        return mean if mean > 0 else 1.0
