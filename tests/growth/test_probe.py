"""`probe` against its definition: sample by sample, neuron by neuron, and its refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from growth_nets import DOUBLE, conv_pair, drawn, forked, mlp, pooled, relative, residual
from torch.nn import functional as F

import irgrow as ig
from irgrow.growth.probe import Gathering, probe
from irgrow.ir.errors import BadData, Refused, UnknownName
from irgrow.ir.interpreter import interpret_groups

ALL = ("S", "M_prev", "S_in", "M", "C", "E")


def by_hand(network, site, data, bias=True):
    """The moments of a flat site with one target, one sample at a time, by the interpreter."""
    groups = {b.source: b for b in network.bundles.values()}
    entering = [b for b in network.bundles.values() if b.target == site]
    target = next(b.target for b in network.bundles.values() if b.source == site)
    feeding = [b for b in network.bundles.values() if b.target == target]
    totals = dict.fromkeys(ALL, 0.0)
    n = len(data[1])
    shift = network.tensors()[f"bias.{target}"].clone().requires_grad_()
    assert groups
    for i in range(n):
        x = data[0][i : i + 1]
        values = interpret_groups(network, x)
        out = ig.interpret(network, x, tensors={f"bias.{target}": shift})
        (g,) = torch.autograd.grad(F.cross_entropy(out, data[1][i : i + 1]), shift)
        one = torch.ones(1, dtype=DOUBLE)
        b = torch.cat([values[e.source].reshape(-1) for e in entering] + ([one] if bias else []))
        c = torch.cat([*(values[f.source].reshape(-1) for f in feeding), one])
        pairs = {"S": (b, b), "M_prev": (b, g), "S_in": (c, c), "M": (c, g), "C": (b, c), "E": (g, g)}
        for name, (left, right) in pairs.items():
            totals[name] = totals[name] + torch.outer(left, right) / n
    return totals


@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu"])
def test_moments_are_means_over_samples(activation: str) -> None:
    network = mlp(activation)
    data = drawn(network, 11)
    found = probe(ig.compile(network), data, F.cross_entropy, want=ALL)
    assert sorted(found) == ["hidden1", "hidden2"]
    for site, statistics in found.items():
        for name, expected in by_hand(network, site, data).items():
            assert relative(getattr(statistics, name), expected) < 1e-12, (site, name)
        assert statistics.n == 11


def test_batches_and_halves_do_not_matter() -> None:
    network = forked()
    model, data = ig.compile(network), drawn(network, 23)
    whole = probe(model, data, F.cross_entropy, want=ALL)
    small = probe(model, data, F.cross_entropy, want=ALL, batch_size=5)
    first, second = (
        probe(model, (tuple(x[p] for x in data[0]), data[1][p]), F.cross_entropy, want=ALL)
        for p in (slice(0, 7), slice(7, None))
    )
    for site, statistics in whole.items():
        added = first[site] + second[site]
        assert added.n == 23
        for name in ALL:
            assert relative(getattr(small[site], name), getattr(statistics, name)) < 1e-12
            assert relative(getattr(added, name), getattr(statistics, name)) < 1e-12


def test_a_sum_loss_gives_the_gradients_of_the_sum() -> None:
    network = mlp()
    model, data = ig.compile(network), drawn(network, 23)
    mean = probe(model, data, F.cross_entropy)["hidden1"]
    total = probe(model, data, lambda o, t: F.cross_entropy(o, t, reduction="sum"), reduction="sum", batch_size=4)
    assert relative(total["hidden1"].M_prev, mean.M_prev) < 1e-12
    scaled = probe(model, data, lambda o, t: 7 * F.cross_entropy(o, t))["hidden1"]
    for k in (1, 2, 3, 4):
        assert ig.Tiny(k).propose(scaled).units == ig.Tiny(k).propose(mean).units
        assert ig.GradMax(k).propose(scaled).notes == ig.GradMax(k).propose(mean).notes


def test_several_bundles_and_targets() -> None:
    """N against its definition, E[b v_perp^T], with v_perp from a least-squares fit of every target."""
    network = forked()
    model, data = ig.compile(network), drawn(network, 40)
    s = probe(model, data, F.cross_entropy, want=ALL, sites=["hidden"])["hidden"]
    assert [b.name for b in s.fan_in] == ["weight.x_hidden", "weight.y_hidden", "bias.hidden"]
    assert [(b.name, b.group) for b in s.fan_out] == [("weight.hidden_next", "next"), ("weight.hidden_out", "out")]
    assert [b.name for b in s.feeding if b.group == "out"] == [
        "weight.hidden_out",
        "weight.next_out",
        "weight.x_out",
        "bias.out",
    ]
    values = interpret_groups(network, *data[0])
    one = torch.ones(40, 1, dtype=DOUBLE)
    b = torch.cat([values["x"], values["y"].reshape(40, -1), one], 1)
    left = []
    for target, parts in (("next", ["hidden"]), ("out", ["hidden", "next", "x"])):
        shift = torch.zeros(40, 3, dtype=DOUBLE, requires_grad=True)
        outputs, _ = model.record(*data[0], shifts={target: shift})
        (g,) = torch.autograd.grad(F.cross_entropy(outputs, data[1]) * 40, shift)
        c = torch.cat([*(values[p] for p in parts), one], 1)
        left.append(-g - c @ torch.linalg.lstsq(c, -g).solution)
    v_perp = torch.cat(left, 1)
    assert relative(s.N, b.mT @ v_perp / 40) < 1e-10
    # dW* is the best change of the existing weights: no gradient is left along them
    assert relative(-s.best_move @ s.S_in, s.M.mT) < 1e-10


@pytest.mark.parametrize("network", [forked(), residual(), pooled("mean", True), conv_pair(ig.Conv2d(3), ig.Conv2d(3))])
def test_M_is_the_gradient_of_the_existing_weights(network) -> None:
    model, data = ig.compile(network), drawn(network, 9)
    inputs = data[0] if isinstance(data[0], tuple) else (data[0],)
    F.cross_entropy(model(*inputs), data[1]).backward()
    gradients = {name: p.grad for name, p in model.tensors().items() if p.grad is not None}
    for s in probe(model, data, F.cross_entropy).values():
        for name, (g, c) in s.targets.items():
            at = c.start
            for block in (b for b in s.feeding if b.group == name):
                part = s.M[at : at + block.width, g].mT
                assert relative(part.reshape(gradients[block.name].shape), gradients[block.name]) < 1e-10, block.name
                at += block.width


def test_only_what_is_wanted() -> None:
    network = mlp()
    model, data = ig.compile(network), drawn(network, 9)
    s = probe(model, data, F.cross_entropy, want=ig.GradMax.needs)["hidden1"]
    assert s.M_prev is not None and s.S is None and s.C is None
    with pytest.raises(BadData, match="no S, expected S measured"):
        ig.Tiny(1).propose(s)
    calls = []
    geometry_only = probe(model, iter([]), lambda o, t: calls.append(1), want=())["hidden1"]
    assert not calls and geometry_only.n == 0 and ig.Random(2).propose(geometry_only).units == 2


def test_bias_row() -> None:
    network = mlp()
    model, data = ig.compile(network), drawn(network, 9)
    with_one = probe(model, data, F.cross_entropy)["hidden1"]
    without = probe(model, data, F.cross_entropy, bias_row=False)["hidden1"]
    assert with_one.bias and not without.bias
    assert torch.equal(with_one.S[:-1, :-1], without.S)
    assert torch.equal(with_one.S[-1, -1], torch.tensor(1.0, dtype=DOUBLE))
    morphism = ig.AddUnits(ig.Tiny(2).propose(without))(network)
    assert torch.equal(morphism.after.groups["hidden1"].bias[5:], torch.zeros(2, dtype=DOUBLE))


def test_a_loader_and_a_number_of_batches() -> None:
    network = mlp()
    model, data = ig.compile(network), drawn(network, 20)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=6)
    assert (
        relative(probe(model, loader, F.cross_entropy)["hidden1"].N, probe(model, data, F.cross_entropy)["hidden1"].N)
        < 1e-12
    )
    assert probe(model, loader, F.cross_entropy, batches=2)["hidden1"].n == 12


def test_mode_values_and_gradients_stay() -> None:
    network = ig.mlp([6, 5, 3], norm="batch", dtype=DOUBLE)
    model, data = ig.compile(network), drawn(network, 20)
    model.train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    model.tensors()["weight.input_hidden"].grad = held = torch.ones(5, 6, dtype=DOUBLE)
    probe(model, data, F.cross_entropy)
    assert model.training and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.tensors()["weight.input_hidden"].grad is held and bool((held == 1).all())
    assert model.tensors()["weight.hidden_output"].grad is None

    def fails(outputs, targets):
        assert not model.training
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        probe(model, data, fails)
    assert model.training


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_named(value: float) -> None:
    network = mlp()
    model, data = ig.compile(network), drawn(network, 20)
    data[0][3, 2] = value
    with pytest.raises(BadData, match="group 'input': activations: found NaN or infinity"):
        probe(model, data, F.cross_entropy)
    data[0][3, 2] = 0.0

    def steep(outputs, targets):
        return (outputs - outputs.detach()).abs().sqrt().sum()

    with pytest.raises(BadData, match="group 'hidden2': gradient: found NaN or infinity"):
        probe(model, data, steep)
    with torch.no_grad():
        model.tensors()["bias.hidden1"][0] = np.nan
    with pytest.raises(BadData, match="group 'hidden1': activations"):
        probe(model, data, F.cross_entropy, sites=["hidden2"])


def test_refusals() -> None:
    network = mlp()
    model, data = ig.compile(network), drawn(network, 20)
    empty = (data[0][:0], data[1][:0])
    for nothing in (empty, []):
        with pytest.raises(BadData, match="probe: data: found no samples"):
            probe(model, nothing, F.cross_entropy)
    with pytest.raises(UnknownName, match="reduction 'none': expected one of mean, sum"):
        probe(model, data, F.cross_entropy, reduction="none")
    with pytest.raises(BadData, match=r"loss: found shape \(20,\), expected one number"):
        probe(model, data, lambda o, t: F.cross_entropy(o, t, reduction="none"))
    with pytest.raises(UnknownName, match="site 'hiden'"):
        probe(model, data, F.cross_entropy, sites=["hiden"])
    with pytest.raises(UnknownName, match="moment 'T'"):
        probe(model, data, F.cross_entropy, want=["T"])
    with pytest.raises(BadData, match="targets: found shape"):
        probe(model, (data[0], data[1][:3]), F.cross_entropy)
    with pytest.raises(Refused, match="layer norm, where a new unit changes the old ones"):
        probe(ig.compile(ig.mlp([6, 5, 3], norm="layer", dtype=DOUBLE)), data, F.cross_entropy)


@pytest.mark.parametrize("network", [mlp("relu"), conv_pair(ig.Conv2d(3), ig.Conv2d(3))])
def test_statistics_from_training_steps(network) -> None:
    """With a learning rate of zero they are those of `probe`; the weights' gradients are the usual ones."""
    model, data, twin = ig.compile(network), drawn(network, 24), ig.compile(network)
    gathering = Gathering(model.structure, [next(iter(probe(model, data, F.cross_entropy)))], single_run=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for i in range(0, 24, 8):
        x, y = data[0][i : i + 8], data[1][i : i + 8]
        optimizer.zero_grad()
        F.cross_entropy(gathering.forward(model, x), y).backward()
        twin.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        for name, p in twin.tensors().items():
            assert relative(model.tensors()[name].grad, p.grad) < 1e-12
        gathering.collect()
        optimizer.step()
    for site, s in gathering.statistics().items():
        expected = probe(model, data, F.cross_entropy)[site]
        assert s.n == 24
        for name in ("S", "M_prev", "N"):
            assert relative(getattr(s, name), getattr(expected, name)) < 1e-8
    with pytest.raises(BadData, match="gathering: collect: found no batch"):
        gathering.collect()


@pytest.mark.parametrize("room", [0, 600, 1 << 26])
def test_batches_that_are_kept_for_the_second_run_change_nothing(room: int, monkeypatch) -> None:
    """With room for none, some and all, an empty batch among them; and the data is the user's to write over."""
    b = ig.Builder(seed=0)
    b.input("input", (2, 6, 6))
    b.group("hidden", (3, 6, 6), activation="relu", bias=True)
    b.connect("input", "hidden", ig.Conv2d((3, 3), (1, 1), (1, 1)))
    b.output("output", (2, 6, 6), bias=True)
    b.connect("hidden", "output", ig.Conv2d((3, 3), (1, 1), (1, 1)))
    network = b.build()
    draw = torch.Generator().manual_seed(0)
    xs = [torch.randn(n, 2, 6, 6, generator=draw) for n in (2, 0, 3, 1)]
    runs = []

    class Reused:
        """Batches that all lie in the same memory."""

        def __iter__(self):
            held = torch.empty(3, 2, 6, 6)
            for x in xs:
                held[: len(x)] = x
                yield held[: len(x)], x.mean((1, 2, 3))

    def loss(outputs, targets):
        runs.append(len(outputs))
        return (outputs.mean((1, 2, 3)) - targets).square().sum()

    def found():
        runs.clear()
        return probe(ig.compile(network), Reused(), loss, sites=["hidden"], reduction="sum")["hidden"]

    kept = found().N
    assert len(runs) == 3
    monkeypatch.setattr("irgrow.growth.probe.KEPT", room)
    again = found().N
    assert len(runs) == {0: 6, 600: 5, 1 << 26: 3}[room], runs
    assert relative(again, kept) < 1e-12


@pytest.mark.parametrize("network, places", [(mlp(), 1), (residual(), 2)], ids=["mlp", "residual"])
def test_explain_counts_the_kernels_that_ran(network, places, monkeypatch) -> None:
    outer = pytest.importorskip("irgrow.kernels.outer_cpu")
    from irgrow.kernels import outer as door

    ran = []

    def add(*given, adding=outer.add, **options):
        ran.append(1)
        return adding(*given, **options)

    monkeypatch.setattr(outer, "add", add)
    model, (x, y) = ig.compile(network), drawn(network, 12)
    site = next(site.name for site in ig.Site.all(network))

    def explained() -> str:
        gathering = Gathering(network, [site], want=("S", "M_prev"))
        gathering.run(model, (x,), y, lambda outputs, targets: outputs.square().mean())
        gathering.statistics()
        return gathering.explain()

    told = explained()
    assert site in told and f"S       accumulate_gram by tiles ({places} times)" in told and len(ran) == 2 * places, (
        told
    )
    ran.clear()
    monkeypatch.setattr(door, "compiled", lambda: None)  # the control: without the compiled code it says so
    told = explained()
    assert "by products" in told and "tiles" not in told and not ran, told


def test_explain_names_the_kernels_of_image_sites() -> None:
    b = ig.Builder(seed=0)
    b.input("input", (2, 6, 6))
    b.group("hidden", (3, 6, 6), activation="relu", bias=True)
    b.connect("input", "hidden", ig.Conv2d((3, 3), (1, 1), (1, 1)))
    b.output("output", (2, 6, 6), bias=True)
    b.connect("hidden", "output", ig.Conv2d((3, 3), (1, 1), (1, 1)))
    network = b.build()
    gathering = Gathering(network, ["hidden"], want=("S", "M_prev", "M"))
    gathering.run(ig.compile(network), (torch.randn(4, 2, 6, 6),), torch.zeros(4), lambda o, t: o.square().mean())
    told = gathering.explain()
    for moment, kernel in (("S", "PatchGram, "), ("M_prev", "through_cross by "), ("M", "patch_cross by ")):
        assert f"  {moment:<7} {kernel}" in told, told
