"""When to grow: asked at the end of every epoch (and after every step, if it says so), yes or no.

One of your own is a class with one method:

    class Overfitting:
        "Once the test accuracy has fallen twice in a row."

        def due(self, moment):
            a = moment.test_accuracy[-3:]
            return len(a) == 3 and a[0] > a[1] > a[2]

    ig.fit(..., growth=ig.Growth(when=Overfitting(), how=ig.Tiny(units=2)))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from irgrow.growth.candidates import Candidates
from irgrow.ir.errors import Refused


@dataclass
class Moment:
    """The state of training that `when` decides on. `epoch` and `step` count what is completed."""

    epoch: int
    step: int
    epoch_ended: bool
    train_loss: Sequence[float]  # one per completed epoch
    test_accuracy: Sequence[float | None]
    growths: int  # so far
    last_growth: int  # the epoch of the last one, 0 if none
    candidates: Candidates  # measured only if asked


class When(Protocol):
    """Says whether growing is due. `per_step = True` (optional) asks for a call after every step."""

    def due(self, moment: Moment) -> bool: ...


@dataclass(frozen=True)
class Every:
    """Every so many epochs, or every so many steps; at most `times` times."""

    epochs: int | None = None
    steps: int | None = None
    times: int | None = None

    def __post_init__(self) -> None:
        given = [n for n in (self.epochs, self.steps) if n is not None]
        if len(given) != 1 or given[0] < 1:
            raise Refused("Every", f"epochs={self.epochs}, steps={self.steps}", "one of them, at least 1")

    @property
    def per_step(self) -> bool:
        return self.steps is not None

    def due(self, moment: Moment) -> bool:
        """True at multiples."""
        if self.times is not None and moment.growths >= self.times:
            return False
        if self.steps is not None:
            return moment.step > 0 and moment.step % self.steps == 0
        assert self.epochs is not None
        return moment.epoch_ended and moment.epoch % self.epochs == 0


@dataclass(frozen=True)
class Schedule:
    """After exactly these epochs."""

    epochs: tuple[int, ...]

    def __init__(self, epochs: Sequence[int]) -> None:
        object.__setattr__(self, "epochs", tuple(int(e) for e in epochs))

    def due(self, moment: Moment) -> bool:
        """True after an epoch of the list."""
        return moment.epoch_ended and moment.epoch in self.epochs


@dataclass(frozen=True)
class OnPlateau:
    """When the training loss has not fallen by `threshold` (relative) below its best for `patience` epochs.

    Counted anew after every growth; at most `times` times.
    """

    patience: int = 3
    threshold: float = 1e-3
    times: int | None = None

    def due(self, moment: Moment) -> bool:
        """True on a plateau."""
        if not moment.epoch_ended or (self.times is not None and moment.growths >= self.times):
            return False
        since = list(moment.train_loss[moment.last_growth :])
        if len(since) <= self.patience:
            return False
        best = min(since[: -self.patience])
        return min(since[-self.patience :]) > best - self.threshold * abs(best)


@dataclass(frozen=True)
class GainAbove:
    """When the best site's gain passes a threshold; looks every `epochs` epochs.

    The gain is the measured one where there is one, else the predicted one.
    """

    threshold: float
    epochs: int = 1
    times: int | None = None

    def due(self, moment: Moment) -> bool:
        """True if some proposal promises more than the threshold."""
        if not moment.epoch_ended or moment.epoch % self.epochs or (self.times or moment.growths + 1) <= moment.growths:
            return False
        return max(moment.candidates.gains(), default=0.0) > self.threshold
