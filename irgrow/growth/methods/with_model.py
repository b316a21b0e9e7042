"""Methods that need more than statistics: they run the model, or train copies of it, on data.

proposal = North(4).propose_with(statistics, model, data)        # as `propose`, with a model and data
fit(..., growth=Growth(how=North(4).on(model, data, loss)))      # the same method where `propose` is called
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from irgrow.growth.data import Data, Loss
from irgrow.growth.methods.base import Method
from irgrow.ir.errors import BadData, Refused, StaleMorphism
from irgrow.ir.network import Network
from irgrow.ir.proposal import Proposal
from irgrow.ir.statistics import Statistics
from irgrow.runtime.model import CompiledNetwork


@runtime_checkable
class NeedsModel(Protocol):
    """A method whose `propose_with` reads a model and data as well; the model stays as it is, also on error."""

    @property
    def units(self) -> int: ...

    @property
    def needs(self) -> tuple[str, ...]: ...

    def propose_with(
        self, statistics: Statistics, model: CompiledNetwork, data: Data | None = None, loss: Loss | None = None
    ) -> Proposal: ...


def propose(
    method: Method | NeedsModel,
    statistics: Statistics,
    model: CompiledNetwork,
    data: Data | None = None,
    loss: Loss | None = None,
) -> Proposal:
    """The method's proposal, whichever kind of method it is."""
    if isinstance(method, NeedsModel):
        return method.propose_with(statistics, model, data, loss)
    return method.propose(statistics)


class Bindable:
    """Gives a method that needs a model the `propose` of those that do not, once it is bound to both."""

    def on(self, model: CompiledNetwork, data: Data | None = None, loss: Loss | None = None) -> OnModel:
        """This method on this model and data: a `Method` like any other, for as long as the model grows."""
        return OnModel(self, model, data, loss)  # type: ignore[arg-type]

    def propose(self, statistics: Statistics) -> Proposal:
        """Refused: statistics alone are not enough."""
        name = type(self).__name__
        raise Refused(
            f"{name}: site {statistics.site!r}",
            "statistics alone",
            "a model and data as well",
            do=f"use propose_with(statistics, model, data, loss), or {name}(...).on(model, data, loss)",
        )


@dataclass(frozen=True, eq=False)
class OnModel:
    """A method bound to a model and data."""

    method: NeedsModel
    model: CompiledNetwork
    data: Data | None = None
    loss: Loss | None = None

    @property
    def units(self) -> int:
        return self.method.units

    @property
    def needs(self) -> tuple[str, ...]:
        return self.method.needs

    @property
    def taps(self) -> Any:
        return getattr(self.method, "taps", "full")

    def propose(self, statistics: Statistics) -> Proposal:
        """What the method proposes for the model as it is now."""
        return self.method.propose_with(statistics, self.model, self.data, self.loss)


def require_model(method: object, statistics: Statistics, model: CompiledNetwork) -> Network:
    """The model's network; StaleMorphism unless the statistics were measured on it."""
    network = model.structure
    if network.structure != statistics.structure:
        who = f"{type(method).__name__}: site {statistics.site!r}"
        raise StaleMorphism(who, "statistics of another structure", "those of this model", do="probe again")
    return network


def require_data(method: object, statistics: Statistics, data: Data | None) -> Data:
    """The data; BadData where none was given."""
    if data is None:
        raise BadData(f"{type(method).__name__}: site {statistics.site!r}", "no data", "a batch (inputs, targets)")
    return data


def require_loss(method: object, statistics: Statistics, loss: Loss | None) -> Loss:
    """The loss; BadData where none was given."""
    if loss is None:
        raise BadData(f"{type(method).__name__}: site {statistics.site!r}", "no loss", "what the model is trained with")
    return loss
