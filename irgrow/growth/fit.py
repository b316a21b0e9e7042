"""`fit`: an ordinary training loop that also grows.

    history = ig.fit(model, (x, y), F.cross_entropy, optimizer, epochs=60, test=(x_test, y_test),
                     growth=ig.Growth(when=ig.Every(epochs=5), where=ig.LargestGain(), how=ig.Tiny(units=4)))

Every growth is the four calls one can also make by hand: `probe`, `how.propose`, `refine`,
`model.grow(AddUnits(proposal)(model.structure), optimizer)`; or, for methods that choose their own places
(Firefly, splitting descent), the two: `how.select`, `model.grow(selection(model.structure), optimizer)`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from irgrow.growth.candidates import Candidates
from irgrow.growth.data import Data, Loss, as_inputs, batches, is_pair
from irgrow.growth.measure import Growth as Growth
from irgrow.growth.measure import Measuring, chooser
from irgrow.growth.probe import evaluating
from irgrow.growth.when import Moment
from irgrow.ir.errors import Diverged, Refused
from irgrow.runtime.model import CompiledNetwork

Event = dict[str, Any]


@dataclass
class History:
    """What happened: one event per epoch and per growth, in order, and where the time went.

    Every event has `event` (`epoch` or `growth`), `epoch`, `train_loss` (mean over the last epoch's steps),
    `test_accuracy` (None without test data or classes), `widths` (units per hidden group), `parameters`;
    a growth also `site` (several, joined by commas, where the method chose them), `predicted_gain`,
    `measured_gain`, `seconds`. `notes` lists growths that did not happen.
    """

    events: list[Event] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds_training: float = 0.0
    seconds_growing: float = 0.0

    @property
    def epochs(self) -> list[Event]:
        return [e for e in self.events if e["event"] == "epoch"]

    @property
    def growths(self) -> list[Event]:
        return [e for e in self.events if e["event"] == "growth"]

    @property
    def train_loss(self) -> list[float]:
        """Per epoch."""
        return [e["train_loss"] for e in self.epochs]

    @property
    def test_accuracy(self) -> list[float | None]:
        """Per epoch."""
        return [e["test_accuracy"] for e in self.epochs]

    def __repr__(self) -> str:
        last = self.events[-1] if self.events else {}
        widths = "-".join(map(str, last.get("widths", {}).values()))
        accuracy = last.get("test_accuracy")
        return (
            f"<History: {len(self.epochs)} epochs, {len(self.growths)} growths, widths {widths}, "
            f"loss {last.get('train_loss', math.nan):.4g}"
            + (f", test accuracy {accuracy:.4f}" if accuracy is not None else "")
            + f", {self.seconds_training:.2f} s training, {self.seconds_growing:.2f} s growing>"
        )


def fit(
    model: CompiledNetwork,
    data: Data,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    growth: Growth | None = None,
    test: Data | None = None,
    batch_size: int = 32,
    seed: int = 0,
    reduction: str = "mean",
    progress: bool = True,
    on_event: Callable[[Event], None] | None = None,
    scheduler: Any = None,
) -> History:
    """The model after `epochs` epochs of training on `data`, grown on the way as `growth` says.

    `data`: `(inputs, targets)`, shuffled by `seed` and cut into batches of `batch_size`, or an iterable of
    batches (a DataLoader), taken as it comes. `loss(outputs, targets)` is the `reduction` over a batch.
    `scheduler.step()` follows every epoch. `on_event` gets every event as it happens. There is no growth
    after the last epoch. A site that refuses is noted in the history, and training goes on.
    Raises Diverged, naming the epoch, when the training loss becomes NaN or infinite.
    """
    run = _Run(model, data, loss, optimizer, growth, test, batch_size, seed, reduction, on_event)
    bar = _bar(epochs, run.steps_per_epoch, progress)
    try:
        for epoch in range(1, epochs + 1):
            run.train(epoch, bar)
            if scheduler is not None:
                args = (run.history.train_loss[-1],) if isinstance(scheduler, ReduceLROnPlateau) else ()
                scheduler.step(*args)
            _show(bar, run.history.events[-1], run.steps_per_epoch is None)
            if epoch < epochs:
                run.maybe_grow(epoch_ended=True)
    finally:
        bar.close()
    return run.history


class _Run:
    def __init__(
        self,
        model: CompiledNetwork,
        data: Data,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        growth: Growth | None,
        test: Data | None,
        batch_size: int,
        seed: int,
        reduction: str,
        on_event: Callable[[Event], None] | None,
    ) -> None:
        self.model, self.data, self.loss, self.optimizer = model, data, loss, optimizer
        self.growth, self.test, self.batch_size, self.reduction = growth, test, batch_size, reduction
        self.on_event = on_event
        self.draw = torch.Generator().manual_seed(seed)
        self.measuring = None if growth is None else Measuring(growth, model, data, loss, reduction, self.draw)
        self.history = History()
        self.epoch = self.step = self.growths = self.last_growth = 0
        self.device = next(iter(model.tensors().values())).device
        self.steps_per_epoch: int | None = None
        if is_pair(data):
            self.steps_per_epoch = max(1, math.ceil(len(data[1]) / batch_size))
        elif isinstance(data, Sized):
            self.steps_per_epoch = len(data)

    # ---- training -----------------------------------------------------------------------------------------

    def train(self, epoch: int, bar: Any) -> None:
        """One epoch, then its event."""
        per_step = self.growth is not None and bool(getattr(self.growth.when, "per_step", False))
        total: Tensor | float = 0.0
        count = 0
        self.model.train()
        begun, elsewhere = time.perf_counter(), self.history.seconds_growing
        for inputs, targets in self._shuffled():
            if per_step and count:  # what is due after the last step waits for the epoch's event
                self.maybe_grow(epoch_ended=False)
                self.model.train()
            self.optimizer.zero_grad()
            value = self.loss(self.model(*inputs), targets)
            value.backward()
            self.optimizer.step()
            size = targets.shape[0]
            total = total + value.detach() * (size if self.reduction == "mean" else 1)
            count += size
            self.step += 1
            bar.update(1 if self.steps_per_epoch else 0)
        mean = float(total) / count if count else math.nan
        growing = self.history.seconds_growing - elsewhere
        self.history.seconds_training += time.perf_counter() - begun - growing
        if not math.isfinite(mean):
            found = f"a training loss of {mean}" if count else "no training samples"
            raise Diverged(f"fit: epoch {epoch}", found, "a finite loss", do="lower the learning rate, check the data")
        self.epoch = epoch
        self._event("epoch", epoch, mean)

    def _shuffled(self) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        if not is_pair(self.data):
            for inputs, targets in batches(self.data, None, "fit"):
                yield tuple(x.to(self.device) for x in inputs), targets.to(self.device)
            return
        inputs, targets = as_inputs(self.data[0], "fit"), self.data[1]
        order = torch.randperm(len(targets), generator=self.draw)
        for first in range(0, len(order), self.batch_size):
            index = order[first : first + self.batch_size].to(targets.device)
            yield tuple(x[index].to(self.device) for x in inputs), targets[index].to(self.device)

    # ---- growing ------------------------------------------------------------------------------------------

    def maybe_grow(self, *, epoch_ended: bool) -> None:
        """Grows if it is due, wherever `where` says."""
        if self.growth is None or self.measuring is None:
            return
        begun = time.perf_counter()
        candidates = self.measuring.candidates(self.growths)
        moment = Moment(
            self.epoch,
            self.step,
            epoch_ended,
            self.history.train_loss,
            self.history.test_accuracy,
            self.growths,
            self.last_growth,
            candidates,
        )
        due = self.growth.when.due(moment)
        if due:
            self._grow(candidates, begun)
        else:
            self.history.seconds_growing += time.perf_counter() - begun

    def _grow(self, candidates: Candidates, begun: float) -> None:
        assert self.growth is not None and self.measuring is not None
        chosen: list[str | None] = [None]  # one growth, at the places that the method chooses
        try:
            if not self.growth.selects:
                chosen = list(chooser(self.growth).choose(candidates))
        except Refused as refused:
            self._note(str(refused), begun)
            return
        for number, site in enumerate(chosen):
            if number:  # the network has changed: measure again
                begun, candidates = time.perf_counter(), self.measuring.candidates(self.growths)
            try:
                found = candidates.selection() if site is None else candidates[site]
            except Refused as refused:
                self._note(str(refused), begun)
                continue
            self.model.grow(self.measuring.morphism(found), self.optimizer)
            seconds = time.perf_counter() - begun
            self.history.seconds_growing += seconds
            self._event(
                "growth",
                self.epoch,
                self.history.train_loss[-1] if self.epoch else math.nan,
                site=found.site,
                predicted_gain=found.predicted_gain,
                measured_gain=found.measured_gain,
                seconds=seconds,
            )
        if chosen:
            self.growths += 1
            self.last_growth = self.epoch

    def _note(self, text: str, begun: float) -> None:
        self.history.notes.append(f"epoch {self.epoch}: no growth: {text}")
        self.history.seconds_growing += time.perf_counter() - begun

    # ---- events -------------------------------------------------------------------------------------------

    def _event(self, kind: str, epoch: int, train_loss: float, **more: Any) -> None:
        network = self.model.structure
        event: Event = {
            "event": kind,
            "epoch": epoch,
            "train_loss": train_loss,
            "test_accuracy": None if self.test is None else accuracy(self.model, self.test),
            "widths": {g.name: g.units for g in network.groups.values() if network.is_hidden(g.name)},
            "parameters": network.counts.parameters,
            **more,
        }
        self.history.events.append(event)
        if self.on_event is not None:
            self.on_event(dict(event))


@torch.no_grad()
def accuracy(model: CompiledNetwork, data: Data, batch_size: int = 4096) -> float | None:
    """The share of samples whose largest output is their class, in eval mode; None if targets are no classes."""
    device = next(iter(model.tensors().values())).device
    right = count = 0
    with evaluating(model):
        for inputs, targets in batches(data, batch_size, "fit: test"):
            outputs = model(*(x.to(device) for x in inputs))
            if not isinstance(outputs, Tensor) or targets.is_floating_point() or outputs.dim() != targets.dim() + 1:
                return None
            right += int((outputs.argmax(1) == targets.to(device)).sum())
            count += targets.shape[0]
    return right / count if count else None


def _bar(epochs: int, steps: int | None, progress: bool) -> Any:
    from tqdm import tqdm

    total = epochs * steps if steps else epochs
    return tqdm(total=total, disable=not progress, unit="step" if steps else "epoch", leave=True)


def _show(bar: Any, event: Event, by_epoch: bool) -> None:
    """The epoch's figures behind the progress bar."""
    bar.update(1 if by_epoch else 0)
    if bar.disable:
        return
    found = {"epoch": event["epoch"], "loss": f"{event['train_loss']:.4f}"}
    if event["test_accuracy"] is not None:
        found["accuracy"] = f"{event['test_accuracy']:.4f}"
    found["widths"] = "-".join(str(n) for n in event["widths"].values())
    bar.set_postfix(found, refresh=False)
