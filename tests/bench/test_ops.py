"""Every op at its smallest size: it runs, its results agree with its opponents', its rows are complete."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import irgrow as ig
from bench import engines, gromo_side, nets, patches, suite
from bench.memory import Peak
from bench.suite import Missing, Row
from bench.timing import Roof

OPS = suite.ops()
TOLERATED = (suite.FINE, suite.SKIPPED)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These tests share their cores with others: a second thread would mostly wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", OPS)
def test_every_op_runs_and_passes_its_gate(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "peak", lambda *_: Peak(1, 2, None))  # a process each; large_graph starts a real one
    rows = smallest(name, "cpu")
    assert rows
    assert [(row.case, row.note) for row in rows if row.state not in TOLERATED] == []
    assert all(row.name == name and row.device == "cpu" and row.when and row.machine for row in rows)
    measured = [row for row in rows if row.state == suite.FINE]
    assert all(row.opponent and row.ratio and row.ratio > 0 for row in measured)
    assert len({(row.case, row.opponent) for row in rows}) == len(rows)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name, one in OPS.items() if "cuda" in one.devices])
def test_ops_run_on_a_gpu(name: str) -> None:
    assert [row.note for row in smallest(name, "cuda") if row.state not in TOLERATED] == []


def smallest(name: str, device: str) -> list[Row]:
    roof = Roof(device)
    if device == "cpu":  # not measured here
        roof._flops.update(float32=1e11, float64=5e10)
        roof._bandwidth.update({exponent: 1e10 for exponent in range(14, 29)})
    return suite.run([name], device=device, tiny=True, roof=roof, say=lambda _: None)


def test_every_op_has_a_summary_and_a_tiny_form() -> None:
    for one in OPS.values():
        assert one.summary.endswith((".", ":")) or len(one.summary) > 20, one.name
        assert one.tiny or one.cases == ({},), one.name
        assert set(one.tiny) <= {key for case in one.cases for key in case}, one.name


# --- the networks


def test_grown_networks_are_what_insert_neuron_grows() -> None:
    growth = nets.grow(25, parents=4, inputs=6, outputs=3, seed=3)
    builder = ig.Builder()
    builder.input("x", 6)
    builder.output("y", 3)
    start = growth.drawn.dtype.type(0) + np.random.default_rng(3).uniform(-1, 1, 18) / np.sqrt(6)
    builder.connect("x", "y", ig.Sparse(np.repeat(np.arange(6), 3), np.tile(np.arange(3), 6)), torch.from_numpy(start))
    network = builder.build()
    ids = [*network.ids("x").tolist(), *network.ids("y").tolist()]
    for parents, weights in zip(growth.parents, growth.drawn, strict=True):
        after, *others = (ids[k] for k in parents)
        change = ig.InsertNeuron(parents=4, after=after, others=tuple(others), weights=tuple(weights.tolist()))
        network = change(network).after
        ids.append(int(network.ids("inserted")[-1]))
    mine = {
        (ids[s], ids[t]): pytest.approx(w, rel=1e-5)
        for s, t, w in zip(growth.source, growth.target, growth.weight, strict=True)
    }
    assert {(s, t): w for s, t, w in network.edges()} == mine
    assert nets.to_network(growth).depth == network.depth


@pytest.mark.parametrize(
    ("network", "neurons"),
    [
        (lambda: nets.grown(200), 200),
        (lambda: nets.layered(20, 3, 0.2), 20 * 4 + 10),
        (lambda: nets.small_world(150, degree=8), 150 + 74),
    ],
)
def test_engines_compute_what_the_network_means(network, neurons: int) -> None:  # type: ignore[no-untyped-def]
    net: ig.Network = network()
    assert net.counts.neurons == neurons
    levels = engines.Levels(net)
    x = torch.randn(5, levels.inputs, generator=torch.Generator().manual_seed(0))
    expected = ig.interpret(net.to(torch.float64), x.double())
    for name, run in engines.forward_engines(levels, x).items():
        assert suite.difference(run(), expected) < 1e-5, name


def test_engines_have_the_network_s_gradients() -> None:
    net = nets.grown(150)
    levels = engines.Levels(net)
    draw = torch.Generator().manual_seed(0)
    x, g = torch.randn(4, 64, generator=draw), torch.randn(4, 10, generator=draw)
    double = net.to(torch.float64)
    leaves = [bundle.weight.requires_grad_() for bundle in double.bundles.values()]
    expected = torch.cat(
        [w.reshape(-1) for w in torch.autograd.grad(ig.interpret(double, x.double()), leaves, g.double())]
    )
    for name, (run, converted) in engines.training_engines(levels, x, g).items():
        _, gradients = run()
        assert suite.difference(levels.flat(converted(gradients)), expected) < 1e-4, name


# --- GroMo


def test_gromo_s_absence_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gromo", None)
    with pytest.raises(Missing, match="needs gromo: pip install gromo"):
        gromo_side.require()
    rows = smallest("digits", "cpu")
    assert [row.note for row in rows if row.state == suite.SKIPPED] == ["needs gromo: pip install gromo"]
    assert not any(row.failed for row in rows)
