"""`fit`: an ordinary training loop that also grows.

    history = ig.fit(model, (x, y), F.cross_entropy, optimizer, epochs=60, test=(x_test, y_test),
                     growth=ig.Growth(when=ig.Every(epochs=5), where=ig.LargestGain(), how=ig.Tiny(units=4)))

Every growth is the four calls one can also make by hand: `probe`, `how.propose`, `refine`,
`model.grow(AddUnits(proposal)(model.structure), optimizer)`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from irgrow.growth.candidates import Candidates
from irgrow.growth.data import Batch, Data, Loss, as_inputs, batches, is_pair, take
from irgrow.growth.methods import Method, NeedsModel, Tiny
from irgrow.growth.methods.with_model import propose
from irgrow.growth.probe import evaluating, probe
from irgrow.growth.refine import refine
from irgrow.growth.when import Every, Moment, When
from irgrow.growth.where import RoundRobin, Where
from irgrow.ir.errors import Diverged, Refused
from irgrow.ir.proposal import Proposal
from irgrow.ir.site import Site
from irgrow.passes.add_units import AddUnits
from irgrow.runtime.model import CompiledNetwork

Event = dict[str, Any]


@dataclass(frozen=True)
class Growth:
    """When, where and how a network grows while it trains.

    sites       which sites may grow (default: all)
    refine      signs, amplitude and measured gain on a batch (see `refine`); `delta`, `lookahead`, `limit` go there
    samples     how many training samples the statistics are taken over, at most
    batch       how many others the proposal is refined on, at most (and at most a quarter of the data)
    """

    when: When = field(default_factory=lambda: Every(epochs=5))
    where: Where = field(default_factory=RoundRobin)
    how: Method | NeedsModel = field(default_factory=Tiny)
    sites: tuple[str, ...] | None = None
    refine: bool = True
    delta: str = "separate"
    lookahead: float = 0.1
    limit: float = 1000.0
    samples: int = 10_000
    batch: int = 1024


@dataclass
class History:
    """What happened: one event per epoch and per growth, in order, and where the time went.

    Every event has `event` (`epoch` or `growth`), `epoch`, `train_loss` (mean over the last epoch's steps),
    `test_accuracy` (None without test data or classes), `widths` (units per hidden group), `parameters`;
    a growth also `site`, `predicted_gain`, `measured_gain`, `seconds`. `notes` lists growths that did not happen.
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
        if self.growth is None:
            return
        begun = time.perf_counter()
        candidates = self._candidates()
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
        assert self.growth is not None
        try:
            chosen = list(self.growth.where.choose(candidates))
        except Refused as refused:
            self._note(str(refused), begun)
            return
        for number, site in enumerate(chosen):
            if number:  # the network has changed: measure again
                begun, candidates = time.perf_counter(), self._candidates()
            try:
                proposal = candidates[site]
            except Refused as refused:
                self._note(str(refused), begun)
                continue
            morphism = AddUnits(proposal)(self.model.structure)
            self.model.grow(morphism, self.optimizer)
            seconds = time.perf_counter() - begun
            self.history.seconds_growing += seconds
            self._event(
                "growth",
                self.epoch,
                self.history.train_loss[-1] if self.epoch else math.nan,
                site=site,
                predicted_gain=proposal.predicted_gain,
                measured_gain=proposal.measured_gain,
                seconds=seconds,
            )
        if chosen:
            self.growths += 1
            self.last_growth = self.epoch

    def _candidates(self) -> Candidates:
        assert self.growth is not None
        network = self.model.structure
        sites = self.growth.sites or tuple(site.name for site in Site.all(network))
        return Candidates(tuple(sites), network, self.growths, self._measure)

    def _measure(self, sites: Iterable[str]) -> dict[str, Proposal | Refused]:
        """A proposal for each site, or why there is none: one run over the data for all of them."""
        assert self.growth is not None
        growth, how, names = self.growth, self.growth.how, list(sites)
        seen, unseen = self._split()
        taps = getattr(how, "taps", "full")
        found: dict[str, Proposal | Refused] = {}
        for name in names:
            try:
                Site.of(self.model.structure, name)
            except Refused as refused:
                found[name] = refused
        for group in ([n for n in names if n not in found], *([n] for n in names if n not in found)):
            rest = [n for n in group if n not in found]
            if not rest:
                continue
            try:
                measured = probe(
                    self.model, seen, self.loss, sites=rest, want=how.needs, reduction=self.reduction, taps=taps
                )
            except Refused as refused:  # one site cannot be measured: measure them one by one
                if len(rest) == 1:
                    found[rest[0]] = refused
                continue
            for name, statistics in measured.items():
                try:
                    proposal = propose(how, statistics, self.model, seen, self.loss)
                    if growth.refine and unseen is not None:
                        with evaluating(self.model):
                            proposal = refine(
                                proposal,
                                self.model,
                                unseen,
                                self.loss,
                                delta=growth.delta,
                                lookahead=growth.lookahead,
                                limit=growth.limit,
                            )
                    found[name] = proposal
                except Refused as refused:
                    found[name] = refused
        return found

    def _split(self) -> tuple[Data, Batch | None]:
        """Data for the statistics, and a batch that they do not see."""
        assert self.growth is not None
        if is_pair(self.data):
            inputs, targets = as_inputs(self.data[0], "fit"), self.data[1]
            order = torch.randperm(len(targets), generator=self.draw).to(targets.device)
            held = min(self.growth.batch, len(targets) // 4) if self.growth.refine else 0
            seen = take(inputs, targets, order[held : held + self.growth.samples])
            return seen, take(inputs, targets, order[:held]) if held else None
        read: list[Batch] = []
        count, first = 0, None
        for batch in batches(self.data, None, "fit"):
            if first is None and self.growth.refine:
                first = batch
                continue
            read.append(batch)
            count += len(batch[1])
            if count >= self.growth.samples:
                break
        return read or ([] if first is None else [first]), first

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
