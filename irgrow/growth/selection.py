"""`Selection`: what a method that chooses among many candidates chose, as passes.

Firefly and splitting steepest descent decide where to grow themselves, over all sites at once, and split
units as well as adding some. They return a `Selection`; `selection.passes(model.network())` is the morphism.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from irgrow.growth.data import Data, Loss, batches
from irgrow.growth.probe import evaluating, require_finite
from irgrow.ir.errors import BadData
from irgrow.ir.morphism import Morphism
from irgrow.ir.network import Network
from irgrow.ir.proposal import Proposal
from irgrow.ir.site import Site
from irgrow.passes.base import Pass
from irgrow.runtime.model import CompiledNetwork


@dataclass(frozen=True)
class Candidate:
    """One thing that could grow.

    kind `split` (the unit's serial is `unit`), `unit` (new unit number `unit` of the site), `layer` (unit number
    `unit` of a new layer behind group `site`) or `edge` (into neuron `unit`). `score`: s, the mean gradient of
    the loss along the switch (a split's eigenvalue in splitting descent, an edge's gradient); `eps`: where its
    switch stands; `gain`: the predicted fall of the loss; `kept`: whether it was chosen.
    """

    kind: str
    site: str
    unit: int
    score: float
    eps: float
    gain: float
    kept: bool

    def __str__(self) -> str:
        mark = "+" if self.kept else "-"
        what = f"{self.site}#{self.unit}" if self.kind == "split" else f"{self.site}[{self.unit}]"
        return f"{mark} {self.kind:5} {what:20} s {self.score:+.3e}  eps {self.eps:+.3e}  gain {self.gain:+.3e}"


@dataclass(frozen=True, eq=False)
class Selection:
    """The chosen candidates as `passes`, all candidates with their scores, and what they promise.

    `predicted_gain` is the sum over the kept, to first order in their switches; `measured_gain` the fall of
    the loss on the data that scored them.
    """

    passes: Pass
    candidates: tuple[Candidate, ...]
    predicted_gain: float
    measured_gain: float
    proposals: tuple[Proposal, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def kept(self) -> tuple[Candidate, ...]:
        return tuple(c for c in self.candidates if c.kept)

    @property
    def site(self) -> str:
        """The sites that grow (for a layer: the group behind which it begins), joined by commas."""
        return ", ".join(dict.fromkeys(c.site for c in self.kept))

    def __call__(self, network: Network) -> Morphism:
        """The growth, as a morphism of the network it was made for."""
        return self.passes(network)

    def __str__(self) -> str:
        ranked = sorted(self.candidates, key=lambda c: -c.gain)
        return "\n".join([repr(self), *map(str, ranked)])

    def __repr__(self) -> str:
        kinds = [
            f"{n} {kind}{'s' if n != 1 else ''}"
            for kind in ("split", "unit", "layer", "edge")
            if (n := self._count(kind))
        ]
        notes = [f"({note})" for note in self.notes]
        gains = f"predicted gain {self.predicted_gain:.3g}, measured gain {self.measured_gain:.3g}"
        return f"<Selection of {', '.join(kinds)} among {len(self.candidates)}: {', '.join([gains, *notes])}>"

    def _count(self, kind: str) -> int:
        if kind == "layer":
            return len({c.site for c in self.kept if c.kind == kind})
        return sum(c.kind == kind for c in self.kept)


@runtime_checkable
class Selects(Protocol):
    """A method that decides where to grow itself. The model stays as it is, also on error."""

    def select(
        self, model: CompiledNetwork, data: Data, loss: Loss, *, sites: Iterable[str] | None = None
    ) -> Selection: ...


Held = list[tuple[tuple[Tensor, ...], Tensor]]


def held_batches(model: CompiledNetwork, data: Data, size: int, most: int | None, who: str) -> Held:
    """The batches of the data on the model's device, at most so many; BadData for no samples, NaN or infinity."""
    device = next(iter(model.tensors().values())).device
    found = []
    for inputs, targets in islice(batches(data, size, who), most):
        if inputs[0].shape[0]:
            require_finite(who, model.structure, inputs)
            found.append((tuple(x.to(device) for x in inputs), targets.to(device)))
    if not found:
        raise BadData(f"{who}: data", "no samples", "at least one")
    return found


def mean_loss(run: Callable[..., Any], held: Held, loss: Loss, who: str) -> Tensor:
    """The mean loss per batch, weighted by samples, of `run(*inputs)`; BadData unless it is one finite number."""
    total: Tensor | float = 0.0
    count = sum(targets.shape[0] for _, targets in held)
    for inputs, targets in held:
        value = loss(run(*inputs), targets)
        if not isinstance(value, Tensor) or value.dim() or not bool(torch.isfinite(value)):
            raise BadData(f"{who}: loss", "not one finite number", "a finite loss", do="check the data")
        total = total + value * (targets.shape[0] / count)
    assert isinstance(total, Tensor)
    return total


@torch.no_grad()
def measured_fall(model: CompiledNetwork, after: Network, held: Held, loss: Loss, who: str) -> float:
    """By how much the mean loss falls from the model to the grown network, in eval mode."""
    grown = CompiledNetwork(after, backend=model.backend).eval()
    with evaluating(model):
        return float(mean_loss(model, held, loss, who)) - float(mean_loss(grown, held, loss, who))


def downstream_first(network: Network, sites: Iterable[str]) -> list[str]:
    """These sites in an order in which none is fed by one that comes before it.

    Passes that change a site's units leave the fan-ins of the sites behind them in this order as they are.
    """
    rank = {name: i for i, (names, _) in enumerate(network.components) for name in names}
    return sorted(sites, key=lambda name: -max(rank[g] for g in Site.of(network, name).groups))
