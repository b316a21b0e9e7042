"""Checkpoints: training goes on as if it had never stopped, also across growth and after being killed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import irgrow as ig
from irgrow.ir import errors

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.99)),
    "tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01)),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2),
}
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "steps": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4]),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=50),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "sequence": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.CosineAnnealingLR(o, 10)],
        milestones=[3],
    ),
}


class Run:
    """A small training run: everything that a checkpoint has to bring back."""

    def __init__(self, network: ig.Network, optimizer: str = "adamw", scheduler: str = "steps", turned: bool = False):
        self.model = ig.compile(network)
        parameters = list(self.model.parameters())
        self.optimizer = OPTIMIZERS[optimizer](parameters[::-1] if turned else parameters)
        self.scheduler = SCHEDULERS[scheduler](self.optimizer)
        self.data = torch.Generator().manual_seed(3)
        self.noise = np.random.default_rng(4)

    @property
    def generators(self) -> dict[str, Any]:
        return {"data": self.data, "noise": self.noise}

    def step(self) -> None:
        x = torch.randn(16, 6, generator=self.data) + 0.1 * torch.rand(1).item() + 0.1 * random.random()
        y = torch.sin(x[:, :2]) + 0.1 * float(self.noise.normal()) + 0.1 * float(np.random.rand())
        losses: list[float] = []

        def loss() -> torch.Tensor:
            self.optimizer.zero_grad()
            value = (self.model(x) - y).square().mean()
            value.backward()
            losses.append(value.item())
            return value

        self.optimizer.step(loss)  # type: ignore[arg-type]
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(losses[0])
        else:
            self.scheduler.step()

    def grow(self, seed: int) -> None:
        network = self.model.network()
        morphism = ig.SplitUnit(network.unit("hidden", seed))(network)
        self.model.grow(morphism, self.optimizer)

    def save(self, path: Path, **progress: Any) -> None:
        ig.save_checkpoint(
            path,
            self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            progress=progress,
            generators=self.generators,
        )

    def restore(self, checkpoint: ig.Checkpoint) -> None:
        checkpoint.restore(self.model, self.optimizer, self.scheduler, generators=self.generators)


def scramble() -> None:
    """Another process has other global random states."""
    torch.manual_seed(99)
    np.random.seed(98)
    random.seed(97)


def fresh() -> ig.Network:
    return ig.mlp([6, 5, 2], norm="batch", seed=1)


@pytest.mark.parametrize(
    ("optimizer", "scheduler"),
    [(o, "steps") for o in OPTIMIZERS] + [("adamw", s) for s in SCHEDULERS if s != "steps"],
)
def test_training_goes_on_bit_for_bit(optimizer: str, scheduler: str, tmp_path: Path) -> None:
    scramble()
    run = Run(fresh(), optimizer, scheduler)
    for n in range(4):
        run.step()
        if optimizer != "lbfgs" and n == 1:
            run.grow(seed=0)
    run.save(tmp_path / "run", step=4)
    for _ in range(4):
        run.step()

    scramble()
    checkpoint = ig.load_checkpoint(tmp_path / "run")
    again = Run(checkpoint.network, optimizer, scheduler, turned=optimizer != "lbfgs")
    again.restore(checkpoint)
    assert checkpoint.progress == {"step": 4}
    for _ in range(4):
        again.step()
    assert again.model.network() == run.model.network()
    assert again.optimizer.param_groups[0]["lr"] == run.optimizer.param_groups[0]["lr"]


def test_control_every_part_is_needed(tmp_path: Path) -> None:
    """Without optimizer state, scheduler, or random state, training ends elsewhere."""
    scramble()
    run = Run(fresh())
    for _ in range(3):
        run.step()
    run.save(tmp_path / "run")
    run.step()
    run.step()

    def resumed(leave_out: str) -> ig.Network:
        scramble()
        checkpoint = ig.load_checkpoint(tmp_path / "run")
        again = Run(checkpoint.network)
        checkpoint.restore(
            again.model,
            None if leave_out == "optimizer" else again.optimizer,
            None if leave_out == "scheduler" else again.scheduler,
            generators=again.generators,
            random=leave_out != "random",
        )
        again.step()
        again.step()
        return again.model.network()

    assert resumed("nothing") == run.model.network()
    for part in ("optimizer", "scheduler", "random"):
        assert resumed(part) != run.model.network(), part


def test_parameter_groups_come_back_as_they_were(tmp_path: Path) -> None:
    def two_groups(model: ig.CompiledNetwork) -> torch.optim.Optimizer:
        biases = [p for name, p in model.tensors().items() if isinstance(p, nn.Parameter) and name.startswith("bias")]
        rest = [p for p in model.parameters() if not any(p is b for b in biases)]
        return torch.optim.AdamW([{"params": rest}, {"params": biases, "weight_decay": 0.0, "lr": 0.5}])

    model = ig.compile(fresh())
    optimizer = two_groups(model)
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    moved = optimizer.param_groups[1]["params"].pop()  # a grouping that no rule by name would give
    optimizer.param_groups[0]["params"].append(moved)
    ig.save_checkpoint(tmp_path / "run", model, optimizer=optimizer)

    again = ig.compile(ig.load(tmp_path / "run"))
    other = two_groups(again)
    ig.load_checkpoint(tmp_path / "run").restore(again, other)
    names = {id(p): n for n, p in model.tensors().items()} | {id(p): n for n, p in again.tensors().items()}
    for mine, theirs in zip(optimizer.param_groups, other.param_groups, strict=True):
        assert [names[id(p)] for p in mine["params"]] == [names[id(p)] for p in theirs["params"]]
        assert {k: v for k, v in mine.items() if k != "params"} == {k: v for k, v in theirs.items() if k != "params"}
        for p, q in zip(mine["params"], theirs["params"], strict=True):
            assert torch.equal(optimizer.state[p]["exp_avg_sq"], other.state[q]["exp_avg_sq"])
            assert optimizer.state[p]["step"] == other.state[q]["step"]


def test_training_on_does_not_change_the_checkpoint(tmp_path: Path) -> None:
    run = Run(fresh())
    run.step()
    run.save(tmp_path / "run")
    checkpoint = ig.load_checkpoint(tmp_path / "run")
    results = []
    for _ in range(2):
        again = Run(checkpoint.network)
        again.restore(checkpoint)
        again.step()
        results.append(again.model.network())
    assert results[0] == results[1]


def test_the_ledger_comes_back_and_goes_on(tmp_path: Path) -> None:
    from irgrow.growth.replay import replay

    run = Run(fresh())
    for seed in range(3):
        run.grow(seed)
    run.save(tmp_path / "run")
    checkpoint = ig.load_checkpoint(tmp_path / "run")
    assert checkpoint.ledger == run.model.ledger and len(checkpoint.ledger) == 3
    assert replay(checkpoint.ledger, fresh()).after.structure == checkpoint.network.structure
    assert "3 growths" in repr(checkpoint)
    again = Run(checkpoint.network)
    again.restore(checkpoint)
    again.grow(0)
    assert len(again.model.ledger) == 4 and again.model.ledger.first(3) == checkpoint.ledger
    network = again.model.network()
    steps = [ig.SplitUnit(network.unit("hidden", 0))(network)]  # morphisms can be given by hand
    ig.save_checkpoint(tmp_path / "run", again.model, ledger=steps)
    [entry] = ig.load_checkpoint(tmp_path / "run").ledger
    assert (entry.by, entry.before) == (steps[0].by, network.structure)
    with pytest.raises(errors.BadData, match="found a str, expected a Ledger, its entries, or morphisms"):
        ig.save_checkpoint(tmp_path / "run", again.model, ledger=["SplitUnit()"])  # type: ignore[list-item]


def test_a_checkpoint_is_a_network_file_and_the_other_way_round(tmp_path: Path) -> None:
    run = Run(fresh())
    run.step()
    run.save(tmp_path / "run")
    assert ig.load(tmp_path / "run") == run.model.network()
    ig.save(tmp_path / "net", run.model, optimizer=run.optimizer, extra={"a": 1})
    checkpoint = ig.load_checkpoint(tmp_path / "net")
    assert checkpoint.network == run.model.network()
    assert checkpoint.optimizer is not None and checkpoint.optimizer.kind == "AdamW"
    assert checkpoint.scheduler is None and checkpoint.random is None and len(checkpoint.ledger) == 0
    assert checkpoint.extra == {"a": 1}


def test_optimizers_of_other_models_are_refused(tmp_path: Path) -> None:
    model, other = ig.compile(fresh()), nn.Linear(3, 3)
    optimizer = torch.optim.Adam([*model.parameters(), *other.parameters()])
    with pytest.raises(errors.BadData, match=r"2 parameters that are not the network's, one of shape \(3, 3\)"):
        ig.save_checkpoint(tmp_path / "run", model, optimizer=optimizer)
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    run = Run(fresh())
    run.step()
    run.save(tmp_path / "run")
    checkpoint = ig.load_checkpoint(tmp_path / "run")

    def refused(match: str, model: Any = None, optimizer: Any = None, **named: Any) -> None:
        again = Run(fresh())
        model, optimizer = model or again.model, optimizer(again.model) if optimizer else again.optimizer
        before, groups = model.network(), [list(g["params"]) for g in optimizer.param_groups]
        state = torch.get_rng_state()
        with pytest.raises(errors.BadData, match=match):
            checkpoint.restore(model, optimizer, **{"generators": again.generators, **named})
        assert model.network() == before
        assert all(
            a is b
            for g, h in zip(groups, optimizer.param_groups, strict=True)
            for a, b in zip(g, h["params"], strict=True)
        )
        assert not optimizer.state
        assert torch.equal(torch.get_rng_state(), state)

    refused("the checkpoint's structure", model=ig.compile(ig.mlp([6, 7, 2])))
    refused("found SGD, expected AdamW", optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    refused("expected 1, as saved", optimizer=lambda m: torch.optim.AdamW([{"params": [p]} for p in m.parameters()]))
    refused("0 other parameters and 1 missing", optimizer=lambda m: torch.optim.AdamW(list(m.parameters())[1:]))
    refused("expected data, noise, as saved", generators={"data": torch.Generator()})
    refused(
        "expected the kind that was saved",
        generators={"data": np.random.default_rng(), "noise": np.random.default_rng()},
    )
    ig.save(tmp_path / "net", run.model)
    with pytest.raises(errors.BadData, match="a checkpoint without a optimizer|without an optimizer"):
        ig.load_checkpoint(tmp_path / "net").restore(run.model, run.optimizer)


def test_moments_of_another_shape_are_refused(tmp_path: Path) -> None:
    from forging import Forged

    run = Run(fresh())
    run.step()
    run.save(tmp_path / "run")
    forged = Forged((tmp_path / "run").read_bytes())
    forged.table["optimizer.weight.input_hidden.exp_avg"]["shape"] = [6, 5]
    (tmp_path / "run").write_bytes(forged.bytes())
    with pytest.raises(errors.BadFile, match=r"exp_avg of 'weight.input_hidden': found \(6, 5\)"):
        ig.load_checkpoint(tmp_path / "run")


def test_random_states_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    from forging import Forged

    run = Run(fresh())
    run.save(tmp_path / "run")
    raw = (tmp_path / "run").read_bytes()
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]
    for change in (
        {"torch": {"$tensor": "serials.hidden"}},
        {"python": {"version": 3, "internal": {"$array": "random.torch"}, "gauss": None}},
        {"numpy": {"bit_generator": "PCG64"}},
        {"generators": {"data": {"numpy": {"bit_generator": "os.system"}}}},
        {"cuda": 3},
    ):
        forged = Forged(raw)
        forged.sections["random"].update(change)
        (tmp_path / "run").write_bytes(forged.bytes())
        with pytest.raises(errors.BadFile, match="random"):
            ig.load_checkpoint(tmp_path / "run")
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # type: ignore[index]
    assert before[2] == random.getstate()


# ---- killed ---------------------------------------------------------------------------------------------------

TRAINING = """
import hashlib, json, os, random, signal, sys, time
import numpy, torch
import irgrow as ig

torch.set_num_threads(1)
folder, trials, steps = sys.argv[1], int(sys.argv[2]), 36
path = os.path.join(folder, "run")

def train(path):
    if os.path.exists(path):
        checkpoint = ig.load_checkpoint(path)
        model = ig.compile(checkpoint.network)
        optimizer = torch.optim.AdamW(model.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.5)
        checkpoint.restore(model, optimizer, scheduler)
        first = checkpoint.progress["step"]
    else:
        torch.manual_seed(5), numpy.random.seed(5), random.seed(5)
        model = ig.compile(ig.mlp([6, 4, 2], seed=1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.5)
        first = 0
    for step in range(first, steps):
        x = torch.randn(16, 6)
        optimizer.zero_grad()
        (model(x) - x[:, :2].sin()).square().mean().backward()
        optimizer.step()
        scheduler.step()
        if step % 12 == 7:
            network = model.network()
            morphism = ig.SplitUnit(network.unit("hidden", step % 4))(network)
            model.grow(morphism, optimizer)
        progress = {"step": step + 1}
        ig.save_checkpoint(path, model, optimizer=optimizer, scheduler=scheduler, progress=progress)

def child(path):
    pid = os.fork()
    if pid == 0:
        try:
            train(path)
        except BaseException:
            import traceback; traceback.print_exc(); os._exit(1)
        os._exit(0)
    return pid

def digest(path):
    return hashlib.sha256(open(path, "rb").read()).hexdigest()

train(os.path.join(folder, "warm"))  # everything compiled and imported
begin = time.time()
assert os.waitpid(child(os.path.join(folder, "whole")), 0)[1] == 0
needed = time.time() - begin
expected = digest(os.path.join(folder, "whole"))
assert expected == digest(os.path.join(folder, "warm"))
same, kills, draw = 0, 0, random.Random(0)
for trial in range(trials):
    if os.path.exists(path):
        os.unlink(path)
    for attempt in range(100):
        pid = child(path)
        if attempt < 3:
            time.sleep(draw.uniform(0.0, 0.4 * needed))
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if status == 0:
            break
        assert status == signal.SIGKILL, status
        kills += 1
    same += digest(path) == expected
print(json.dumps({"same": same, "kills": kills}))
"""


@pytest.mark.parametrize("trials", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_the_same_weights(trials: int, tmp_path: Path) -> None:
    """Training, growing and saving is killed at random moments and resumed; the last checkpoint is bit-identical."""
    from test_crash import run as run_program

    done = run_program(TRAINING, str(tmp_path), str(trials))
    assert done["same"] == trials
    assert done["kills"] >= trials


@pytest.mark.gpu
def test_a_model_on_a_gpu_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def start(network: ig.Network) -> tuple[ig.CompiledNetwork, torch.optim.Optimizer]:
        model = ig.compile(network, device="cuda")
        return model, torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)

    def step(model: ig.CompiledNetwork, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        outputs = model(torch.randn(16, 6, device="cuda"))
        assert isinstance(outputs, torch.Tensor)
        outputs.square().mean().backward()
        optimizer.step()

    model, optimizer = start(fresh())
    step(model, optimizer)
    ig.save_checkpoint(tmp_path / "run", model, optimizer=optimizer)
    step(model, optimizer)
    checkpoint = ig.load_checkpoint(tmp_path / "run")
    again, other = start(checkpoint.network)
    checkpoint.restore(again, other)
    step(again, other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
