"""`CompiledNetwork` as a user of `nn.Module` expects it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import irgrow as ig
from irgrow.ir.errors import BadData, UnknownName


def test_it_is_an_ordinary_module() -> None:
    network = ig.mlp([6, 5, 3], seed=1)
    model = ig.compile(network)
    assert set(model.state_dict()) == {"weight.input_hidden", "weight.hidden_output", "bias.hidden", "bias.output"}
    assert all(isinstance(p, torch.nn.Parameter) for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == network.counts.parameters
    other = ig.compile(ig.mlp([6, 5, 3], seed=2))
    other.load_state_dict(model.state_dict())
    x = torch.randn(4, 6)
    assert torch.equal(model(x), other(x))
    assert other.network() == model.network()
    again = copy.deepcopy(model)
    assert torch.equal(again(x), model(x))
    with torch.no_grad():
        next(again.parameters()).zero_()
    assert not torch.equal(again(x), model(x)) and again.network() == again.structure
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


def test_fixed_weights_are_buffers() -> None:
    model = ig.compile(ig.cnn((1, 4, 4), [2], 2, norm="batch"))
    assert set(dict(model.named_buffers())) == {"weight.conv1_pool1", "mean.conv1", "variance.conv1"}


def test_double_and_structure_follow() -> None:
    model = ig.compile(ig.mlp([6, 5, 3]))
    structure = model.structure.structure
    model.double()
    assert model(torch.randn(2, 6, dtype=torch.float64)).dtype == torch.float64
    assert model.network().dtype == torch.float64 and model.structure.structure == structure


def test_structure_is_live_and_network_is_a_copy() -> None:
    model = ig.compile(ig.mlp([6, 5, 3]))
    kept = model.network()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert model.structure != kept and model.network() == model.structure


def test_the_compiled_network_has_weights_of_its_own() -> None:
    network = ig.mlp([6, 5, 3])
    model = ig.compile(network)
    with torch.no_grad():
        next(model.parameters()).zero_()
    assert float(network.tensors()["weight.input_hidden"].abs().sum()) > 0


def test_train_and_eval_mode() -> None:
    builder = ig.Builder(seed=0)
    builder.input("x", 6)
    builder.group("h", 50, activation="relu", bias=True, dropout=0.5)
    builder.connect("x", "h")
    builder.output("y", 2)
    builder.connect("h", "y")
    model, x = ig.compile(builder.build()), torch.randn(3, 6)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (lambda: torch.randn(4, 7), r"input 'input': found shape \(4, 7\), expected .*\(batch, 6\)"),
        (lambda: torch.zeros(4, 6, dtype=torch.long), r"input 'input': found torch.int64, expected .*\.float\(\)"),
        (lambda: torch.zeros(4, 6, dtype=torch.float64), r"found torch.float64, expected torch.float32, as the model"),
        (lambda: [[0.0] * 6], r"input 'input': found list"),
    ],
)
def test_bad_inputs(x, text: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BadData, match=text):
        ig.compile(ig.mlp([6, 5, 3]))(x())


def test_wrong_number_of_inputs() -> None:
    model = ig.compile(ig.mlp([6, 5, 3]))
    with pytest.raises(BadData, match="2 tensors"):
        model(torch.zeros(1, 6), torch.zeros(1, 6))


@pytest.mark.parametrize("irregular", [False, True])
def test_record_gives_activations_and_gradients_of_pre_activations(irregular: bool) -> None:
    network = ig.mlp([6, 5, 3], dtype=torch.float64)
    name = "hidden"
    if irregular:
        for seed in range(6):
            network = ig.InsertNeuron(2, seed=seed)(network).after
        name = "inserted"
    model = ig.compile(network)
    x = torch.randn(4, 6, dtype=torch.float64)
    units = network.groups[name].units
    shift = torch.zeros(4, units, dtype=torch.float64, requires_grad=True)
    y, recorded = model.record(x, values=(name, "input"), shifts={name: shift})
    assert torch.equal(y, model(x)) and torch.equal(recorded["input"], x)
    (gradient,) = torch.autograd.grad(y.pow(2).sum(), shift)
    step = torch.zeros(4, units, dtype=torch.float64)
    step[1, 2] = 1e-6
    up, _ = model.record(x, shifts={name: step})
    down, _ = model.record(x, shifts={name: -step})
    difference = float((up.pow(2).sum() - down.pow(2).sum()).detach() / 2e-6)
    assert abs(difference - float(gradient[1, 2])) <= 1e-6 * max(1.0, abs(difference))
    with pytest.raises(UnknownName, match="nowhere"):
        model.record(x, values=("nowhere",))
