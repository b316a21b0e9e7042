"""The flatness measures against dense Hessians, and what they do and do not depend on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_hessian import NETWORKS, data_for, dense, inserted
from torch import nn

import irgrow as ig
from irgrow.analysis import MEASURES, blocks, flatness
from irgrow.ir.errors import UnknownName

F64 = torch.float64
DEEP = [6, 7, 6, 3]


def deep() -> ig.Network:
    return ig.mlp(DEEP, dtype=F64, seed=3)


def measure(network: ig.Network, samples: int = 30) -> dict[str, float]:
    return flatness(ig.compile(network), data_for(network, samples), F.cross_entropy)


def by_depths(network: ig.Network) -> dict[str, np.ndarray]:
    """||W_block||_F^2 of every parameter entry, counted edge by edge."""
    totals: dict[object, float] = {}
    keys: dict[str, list[object]] = {}
    for b in network.bundles.values():
        source, target = network.levels[b.source], network.levels[b.target]
        keys[b.tensor] = [None] * b.weight.numel()
        for s, t, w in zip(*b.pattern.all_edges(*network.shapes(b)), strict=True):
            if keys[b.tensor][w] is None:
                keys[b.tensor][w] = ("weight", int(source[s]), int(target[t]))
        weights = b.weight.reshape(-1).tolist() if b.trainable else []
        for key, value in zip(keys[b.tensor], weights, strict=False):
            totals[key] = totals.get(key, 0.0) + value**2
    for g in network.groups.values():
        for name, tensor in g.tensors():
            depth = network.levels[g.name].max()
            keys[name] = [(name.partition(".")[0], int(depth))] * tensor.numel()
            for key, value in zip(keys[name], tensor.tolist(), strict=True):
                totals[key] = totals.get(key, 0.0) + value**2
    return {name: np.array([totals.get(key, 0.0) for key in keys[name]]) for name in keys}


@pytest.mark.parametrize("name", [*NETWORKS, "deep"])
def test_against_the_dense_hessian(name: str) -> None:
    network = deep() if name == "deep" else NETWORKS[name]()
    data = data_for(network)
    names = [n for n, _ in ig.compile(network).named_parameters()]
    hessian, held = dense(network, data, names), network.tensors()
    d = {
        "plain": torch.ones(len(hessian), dtype=F64),
        "edge": torch.cat([held[n].reshape(-1) for n in names]).square(),
        "depth blocks": torch.from_numpy(np.concatenate([by_depths(network)[n] for n in names])),
    }
    found = flatness(ig.compile(network), data, F.cross_entropy)
    for measured in MEASURES:
        root = d[measured].sqrt()
        values = torch.linalg.eigvalsh(root[:, None] * hessian * root)
        expected = float(values[values.abs().argmax()])
        assert found[measured] == pytest.approx(expected, rel=1e-6)


def rescaled(network: ig.Network, factors: dict[int, float]) -> ig.Network:
    """The same ReLU network with neurons (by number) times c and what they feed divided by c."""
    tensors = {n: t.clone() for n, t in network.tensors().items()}
    factor = {g: np.array([factors.get(int(i), 1.0) for i in network.ids(g)]) for g in network.groups}
    for b in network.bundles.values():
        s, t, w = b.pattern.all_edges(*network.shapes(b))
        flat = tensors[b.tensor].reshape(-1)
        flat[torch.as_tensor(w).long()] *= torch.from_numpy(factor[b.target][t] / factor[b.source][s])
    for g in network.groups.values():
        if g.bias is not None:
            tensors[f"bias.{g.name}"] *= torch.from_numpy(factor[g.name])
    return network.with_tensors(tensors)


def layers(network: ig.Network) -> dict[int, float]:
    """A factor for every hidden neuron, the same for neurons of one depth."""
    c = {1: 3.0, 2: 0.2}
    hidden = [g for g in network.groups if network.is_hidden(g)]
    pairs = ((g, i, d) for g in hidden for i, d in zip(network.ids(g), network.levels[g], strict=True))
    return {int(i): c.get(int(d), 1.7) for _, i, d in pairs}


@pytest.mark.parametrize("make", [deep, inserted])
def test_layer_rescaling_changes_neither_but_plain(make) -> None:
    network = make()
    other = rescaled(network, layers(network))
    x, _ = data_for(network)
    assert torch.allclose(ig.interpret(other, x), ig.interpret(network, x), rtol=1e-12)
    before, after = measure(network), measure(other)
    for name in ("depth blocks", "edge"):
        assert after[name] == pytest.approx(before[name], rel=1e-7)
    assert abs(after["plain"] / before["plain"] - 1) > 0.1


@pytest.mark.parametrize("make", [deep, inserted])
def test_neuron_rescaling_changes_depth_blocks_but_not_edge(make) -> None:
    network = make()
    hidden = next(g for g in network.groups if network.is_hidden(g))
    other = rescaled(network, {int(network.ids(hidden)[1]): 5.0})
    x, _ = data_for(network)
    assert torch.allclose(ig.interpret(other, x), ig.interpret(network, x), rtol=1e-12)
    before, after = measure(network), measure(other)
    assert after["edge"] == pytest.approx(before["edge"], rel=1e-7)
    assert abs(after["depth blocks"] / before["depth blocks"] - 1) > 0.01


def test_a_bias_inside_its_weight_block_would_break_the_invariance() -> None:
    """The control: blocks of weights and biases together change under layer rescaling."""

    def together(network: ig.Network) -> float:
        model = ig.compile(network)
        hessian = ig.analysis.Hessian(model, data_for(network, 30), F.cross_entropy)
        held, block = dict(model.named_parameters()), {}
        for g in network.groups:
            for b in network.entering(g):
                square = held[b.tensor].detach().square().sum() + held[f"bias.{g}"].detach().square().sum()
                block[b.tensor] = block[f"bias.{g}"] = square.sqrt()
        scale = torch.cat([block[n].expand(held[n].numel()) for n in hessian.names])
        return hessian.eigenvalues(scale=scale)[0]

    network = deep()
    assert abs(together(rescaled(network, layers(network))) / together(network) - 1) > 1e-3


def test_blocks_of_a_network_inside_a_module() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(2, 4)
            self.inner = ig.compile(inserted())

        def forward(self, x):
            return self.inner(self.first(x))

    found = blocks(Around())
    alone = blocks(ig.compile(inserted()))
    assert list(found) == ["first.weight", "first.bias", *(f"inner.{n}" for n in alone)]
    assert found["first.weight"].unique().numel() == found["first.bias"].unique().numel() == 1
    inner = torch.cat([found[f"inner.{n}"].reshape(-1) for n in alone])
    outer = torch.cat([alone[n].reshape(-1) for n in alone])
    same = inner[:, None] == inner
    assert torch.equal(same, outer[:, None] == outer)
    assert not set(inner.tolist()) & {int(found["first.weight"][0, 0]), int(found["first.bias"][0])}


def test_a_sparse_layer_is_one_block_as_the_dense_one() -> None:
    network = deep()
    sparse = {
        n: replace(b, pattern=b.pattern.to_sparse(*network.shapes(b)), weight=b.weight.reshape(-1))
        for n, b in network.bundles.items()
    }
    other = ig.Network(network.groups, sparse, network.inputs, network.outputs, network.next_serial).verify()
    assert measure(other) == pytest.approx(measure(network), rel=1e-7)


def test_refusals() -> None:
    with pytest.raises(UnknownName, match="flatness: measure 'sharpness': expected one of depth blocks, edge, plain"):
        flatness(ig.compile(deep()), data_for(deep()), F.cross_entropy, measures=["sharpness"])
