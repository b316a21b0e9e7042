"""Firefly's experiments on images and on tasks in a row: small, but whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from irgrow.experiments import firefly_cells, firefly_continual, firefly_deepen, firefly_widen, images
from irgrow.experiments.neighbours import best_neighbour
from irgrow.experiments.reproduce import Setting
from irgrow.ir.builder import mlp
from irgrow.ir.interpreter import interpret
from irgrow.passes.widen import WidenUnits
from irgrow.runtime.model import compile

WIDER = firefly_widen.Plan(growths=1, epochs=1)
DEEPER = firefly_deepen.Plan(growths=1, epochs=1, last=2)


def test_the_best_neighbour_stays() -> None:
    model = compile(mlp([2, 3, 2]))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    before = model.network()
    losses = iter((3.0, 1.0, 2.0))
    ways = [lambda network, n=n: WidenUnits("hidden", n) for n in (1, 2, 3)]
    assert best_neighbour(model, optimizer, ways, lambda: next(losses)) == 1
    assert model.structure.groups["hidden"].units == 5 and len(model.ledger) == 1
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert before.groups["hidden"].units == 3


def test_pixels_are_repeated() -> None:
    (small, labels), _ = images.load()
    (large, same), _ = images.load(16)
    assert small.shape[1:] == (1, 8, 8) and large.shape[1:] == (1, 16, 16) and torch.equal(labels, same)
    assert torch.equal(torch.nn.functional.avg_pool2d(large, 2), small)


@pytest.mark.parametrize("method", firefly_widen.METHODS)
def test_widening(method: str) -> None:
    path = firefly_widen.grown(method, 0, WIDER)
    assert path.parameters[1] > path.parameters[0] and path.structure[0] == "4-4-4"
    assert (path.samples > 0) == (method != "net2net")
    if method.startswith("firefly"):
        assert sum(map(int, path.structure[1].split("-"))) == 12 + 4  # ceil(0.3 * 12)


@pytest.mark.parametrize("method", firefly_deepen.METHODS)
def test_deepening(method: str) -> None:
    path, *controls = firefly_deepen.grown(method, 0, DEEPER)
    assert path.structure[0] == "1-1-1-1"
    assert path.parameters[0] == firefly_deepen.start((1, 16, 16), 8, 0).counts.parameters
    if method == "firefly":
        (control,) = controls
        assert (control.parameters[-1], control.structure[-1]) == (path.parameters[-1], path.structure[-1])
    if method == "nash":
        assert path.structure[1] == "2-2-2-2"
    assert path.samples > 0


def test_tasks_in_a_row_forget_nothing(tmp_path: Path) -> None:
    short = {n: replace(s, tasks=2, epochs=1, masks=1) for n, s in firefly_continual.SEQUENCES.items()}
    found = firefly_continual.learned("five pairs", replace(short["five pairs"], epochs=3, masks=3), 0, "firefly")
    assert found.changed == 0 and len(found.averages) == 2 and found.parameters[1] > found.parameters[0]
    findings = firefly_continual.run(Setting((0,), tmp_path, progress=False), short)
    by_name = {c.name: c for c in findings.claims}
    assert by_name["forgetting, five pairs"].status == by_name["forgetting, ten permutations"].status == "holds"
    assert (tmp_path / "accuracy.png").stat().st_size > 5000


def test_tasks_are_what_they_say() -> None:
    pairs = firefly_continual.tasks_of(firefly_continual.SEQUENCES["five pairs"], 0)
    assert len(pairs) == 5 and sum(len(train[1]) for train, _ in pairs) == 1347
    assert all(set(train[1].tolist()) == {0, 1} for train, _ in pairs)
    permuted = firefly_continual.tasks_of(replace(firefly_continual.SEQUENCES["ten permutations"], tasks=2), 0)
    (a, _), (b, _) = permuted
    assert not torch.equal(a[0], b[0]) and torch.equal(a[0].sort(1).values, b[0].sort(1).values)


def test_cells() -> None:
    plan, image = firefly_cells.Plan(), (1, 8, 8)
    network = firefly_cells.stack(plan, image, 0).verify()
    assert len(list(firefly_cells.edges())) == 2 + 3 + 4 + 5
    x = torch.randn(2, *image)
    compiled = compile(network)(x)
    exact = interpret(network, x)
    assert np.allclose(compiled.detach(), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))
    widths = {(a, b, kind): 3 for a, b in firefly_cells.edges() for kind in plan.operations}
    widths[0, 2, "dilated"] = 5
    choice = firefly_cells.choose(plan, widths, 3)
    assert choice[0, 2] == "dilated" and set(choice.values()) == {"dilated", "identity"}
    smaller = firefly_cells.stack(plan, image, 0, [choice] * 3).verify()
    assert smaller.counts.parameters < network.counts.parameters
