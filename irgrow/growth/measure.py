"""`Growth`: when, where and how; `Measuring`: what could grow now, as that says.

The one way from a method to a morphism, for all three kinds of methods: those that read statistics, those
that also read the model, and those that choose their own places (Firefly, splitting descent).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch

from irgrow.growth.between import Between
from irgrow.growth.candidates import Candidates
from irgrow.growth.data import Batch, Data, Loss, as_inputs, batches, is_pair, take
from irgrow.growth.methods import Method, NeedsModel, Tiny
from irgrow.growth.methods.with_model import OnModel, propose
from irgrow.growth.probe import evaluating, probe
from irgrow.growth.refine import refine
from irgrow.growth.selection import Selection, Selects, held_batches, measured_fall
from irgrow.growth.when import Every, When
from irgrow.growth.where import RoundRobin, Where
from irgrow.ir.errors import Refused
from irgrow.ir.morphism import Morphism
from irgrow.ir.proposal import Proposal
from irgrow.ir.site import Site
from irgrow.ir.statistics import Statistics
from irgrow.passes.add_units import AddUnits
from irgrow.runtime.model import CompiledNetwork


@dataclass(frozen=True)
class Growth:
    """When, where and how a network grows while it trains.

    where       which of the sites (default: one after the other). None for a method that chooses its own places,
                units and layers (Firefly, SplittingDescent): its budgets are fields of its own
    sites       which sites may grow, by name, or new layers as `Between(...)` (default: all that there are)
    share       how many units per growth: this share of the width that a site had when `fit` began, rounded, at
                least one, instead of the method's `units` (for a method that chooses its places: of all widths)
    refine      signs, amplitude and measured gain on a batch (see `refine`); `signs`, `amplitude`, `delta`,
                `lookahead`, `limit` go there. What a method chose itself it has trained already: only its gain is
                measured on the batch
    samples     how many training samples the statistics are taken over, at most
    batch       how many others the proposal is refined on, at most (and at most a quarter of the data)
    """

    when: When = field(default_factory=lambda: Every(epochs=5))
    where: Where | None = None
    how: Method | NeedsModel | Selects = field(default_factory=Tiny)
    sites: tuple[str | Between, ...] | None = None
    share: float | None = None
    refine: bool = True
    signs: bool = True
    amplitude: bool = True
    delta: str = "separate"
    lookahead: float = 0.1
    limit: float = 1000.0
    samples: int = 10_000
    batch: int = 1024

    def __post_init__(self) -> None:
        name = type(self.how).__name__
        if self.selects and self.where is not None:
            found = f"{type(self.where).__name__} with {name}"
            raise Refused("Growth: where", found, "none, as the method chooses its own places")
        if self.selects and any(isinstance(site, Between) for site in self.sites or ()):
            raise Refused("Growth: sites", f"Between with {name}", "names of groups", do="use the method's layers")
        if self.share is not None:
            if not self.share > 0:
                raise Refused("Growth: share", self.share, "a positive number")
            with_units(self.how, 2)

    @property
    def selects(self) -> bool:
        """Whether the method chooses its own places."""
        return isinstance(self.how, Selects)


class Measuring:
    """What could grow, measured for a model on the training data."""

    def __init__(
        self, growth: Growth, model: CompiledNetwork, data: Data, loss: Loss, reduction: str, draw: torch.Generator
    ) -> None:
        self.growth, self.model, self.data, self.loss = growth, model, data, loss
        self.reduction, self.draw = reduction, draw
        self._places = {site.name: site for site in growth.sites or () if isinstance(site, Between)}
        self._began = {name: group.units for name, group in model.structure.groups.items()}

    def candidates(self, growths: int) -> Candidates:
        """The candidates now; nothing is measured yet."""
        network = self.model.structure
        given = self.growth.sites
        sites = (
            tuple(site.name for site in Site.all(network))
            if given is None
            else tuple(site.name if isinstance(site, Between) else site for site in given)
        )
        return Candidates(sites, network, growths, self._proposals, self._selection if self.growth.selects else None)

    def morphism(self, found: Proposal | Selection) -> Morphism:
        """The growth, for the model as it is now."""
        network = self.model.structure
        if isinstance(found, Selection):
            return found(network)
        if self._is_new(found.site):
            return self._places[found.site].passes(found, network)(network)
        return AddUnits(found)(network)

    def _is_new(self, site: str) -> bool:
        return site in self._places and site not in self.model.structure.groups

    # ---- methods that propose units for a site ----------------------------------------------------------------

    def _proposals(self, sites: Iterable[str]) -> dict[str, Proposal | Refused]:
        """A proposal for each site, or why there is none: one run over the data for all that exist."""
        seen, unseen = self._split()
        found: dict[str, Proposal | Refused] = {}
        for name, statistics in self._statistics(list(sites), seen).items():
            try:
                if isinstance(statistics, Refused):
                    raise statistics
                at = self._places[name].within(self.model) if self._is_new(name) else self.model
                found[name] = self._proposal(statistics, at, seen, unseen)
            except Refused as refused:
                found[name] = refused
        return found

    def _statistics(self, sites: list[str], seen: Data) -> dict[str, Statistics | Refused]:
        found: dict[str, Statistics | Refused] = {}
        new = [name for name in sites if self._is_new(name)]
        for name in sites:
            try:
                if name in new:
                    place = self._places[name]
                    found[name] = place.probe(place.within(self.model), seen, self.loss, **self._options())
                else:
                    Site.of(self.model.structure, name)
            except Refused as refused:
                found[name] = refused
        old = [name for name in sites if name not in found]
        for group in (old, *([name] for name in old)):
            rest = [name for name in group if name not in found]
            if not rest:
                continue
            try:
                found |= probe(self.model, seen, self.loss, sites=rest, **self._options())
            except Refused as refused:  # one site cannot be measured: measure them one by one
                if len(rest) == 1:
                    found[rest[0]] = refused
        return {name: found[name] for name in sites}

    def _options(self) -> dict[str, Any]:
        how: Any = self.growth.how
        given = {"taps": getattr(how, "taps", "full"), "mode": getattr(how, "mode", "eval")}
        return {"want": how.needs, "reduction": self.reduction, **given}

    def _proposal(self, statistics: Statistics, model: CompiledNetwork, seen: Data, unseen: Batch | None) -> Proposal:
        growth, how = self.growth, self.growth.how
        assert not isinstance(how, Selects)
        if growth.share is not None and statistics.site in self._began:
            how = with_units(how, max(1, round(growth.share * self._began[statistics.site])))
        proposal = propose(how, statistics, model, seen, self.loss)
        if not growth.refine or unseen is None:
            return proposal
        with evaluating(model):
            return refine(
                proposal,
                model,
                unseen,
                self.loss,
                signs=growth.signs,
                amplitude=growth.amplitude,
                delta=growth.delta,
                lookahead=growth.lookahead,
                limit=growth.limit,
            )

    # ---- methods that choose their own places -------------------------------------------------------------------

    def _selection(self) -> Selection:
        """What the method chose, its gain measured on the batch that it has not seen."""
        growth, how = self.growth, self.growth.how
        assert isinstance(how, Selects)
        network = self.model.structure
        names = None if growth.sites is None else [site for site in growth.sites if isinstance(site, str)]
        if growth.share is not None:
            grown = [site.name for site in Site.all(network)] if names is None else names
            how = with_units(how, max(1, round(growth.share * sum(self._began.get(name, 0) for name in grown))))
        if _has(how, "reduction"):
            how = replace(how, reduction=self.reduction)  # type: ignore[type-var]
        seen, unseen = self._split()
        found = how.select(self.model, seen, self.loss, sites=names)
        if unseen is None:
            return found
        who = type(how).__name__
        held = held_batches(self.model, unseen, growth.batch, None, who)
        return replace(found, measured_gain=measured_fall(self.model, found(network).after, held, self.loss, who))

    # ---- data ---------------------------------------------------------------------------------------------------

    def _split(self) -> tuple[Data, Batch | None]:
        """Data for the statistics, and a batch that they do not see."""
        growth = self.growth
        if is_pair(self.data):
            inputs, targets = as_inputs(self.data[0], "fit"), self.data[1]
            order = torch.randperm(len(targets), generator=self.draw).to(targets.device)
            held = min(growth.batch, len(targets) // 4) if growth.refine else 0
            seen = take(inputs, targets, order[held : held + growth.samples])
            return seen, take(inputs, targets, order[:held]) if held else None
        read: list[Batch] = []
        count, first = 0, None
        for batch in batches(self.data, None, "fit"):
            if first is None and growth.refine:
                first = batch
                continue
            read.append(batch)
            count += len(batch[1])
            if count >= growth.samples:
                break
        return read or ([] if first is None else [first]), first


def chooser(growth: Growth) -> Where:
    """Where, for methods that do not choose themselves."""
    return RoundRobin() if growth.where is None else growth.where


def with_units(how: Any, units: int) -> Any:
    """The same method for so many units; Refused unless it is a dataclass with a field of that name."""
    if isinstance(how, OnModel):
        return replace(how, method=with_units(how.method, units))
    if not _has(how, "units"):
        raise Refused("Growth: share", f"{type(how).__name__}, whose units are no field", "a dataclass with `units`")
    return replace(how, units=units)


def _has(how: object, name: str) -> bool:
    return is_dataclass(how) and name in {f.name for f in fields(how)}
