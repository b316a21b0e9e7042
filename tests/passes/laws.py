"""What the tests of passes share: networks of every kind, and the laws of gradients under growth."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

import torch
from torch import Tensor

import irgrow as ig
from irgrow.ir.interpreter import interpret
from irgrow.ir.morphism import Changes, FirstOrder, Morphism
from irgrow.ir.network import Network
from irgrow.passes.base import Pass
from irgrow.testing import assert_promise, gradients, inputs_for

LIMIT = 1e-10  # relative to the largest gradient of the network, float64


def obey(rewrite: Pass, network: Network, *, chain: bool = True) -> Morphism:
    """Applies a pass and asserts all of its laws; `chain=False` for passes that take entries away."""
    morphism = assert_promise(rewrite, network)
    if chain and not isinstance(morphism.promise, Changes):
        assert_chain(morphism)
    return morphism


def assert_chain(morphism: Morphism) -> None:
    """The new gradients, summed through the lineage, are the old ones: L_old(theta) = L_new(gather(theta))."""
    before = morphism.before
    after = morphism.after
    if isinstance(morphism.promise, FirstOrder):
        after = after.with_tensors(morphism.tensors(before.tensors(), scale=0.0))
    x = inputs_for(before, 5, seed=3)
    old, new = gradients(before, x), gradients(after, x)
    leaves = {n: t.detach().double().clone().requires_grad_() for n, t in before.tensors().items()}
    total = torch.zeros((), dtype=torch.float64)
    for name, gradient in new.items():
        total = total + (morphism.lineage.gather(leaves, name, after.tensors()[name]) * gradient).sum()
    pulled = torch.autograd.grad(total, [leaves[n] for n in old], allow_unused=True)
    scale = max(float(g.abs().max()) for g in old.values())
    for (name, expected), found in zip(old.items(), pulled, strict=True):
        error = float((expected - (0 if found is None else found)).abs().max()) / scale
        assert error <= LIMIT, f"{morphism.by}: gradients of {name} off by {error:.1e}"


def some(places: Iterable[Pass], most: int = 8) -> list[Pass]:
    """At most that many of the places, spread evenly."""
    found = list(places)
    return found[:: max(1, -(-len(found) // most))]


def difference(before: Network, after: Network, run: Callable[..., Tensor] = interpret) -> float:
    """Largest relative change of the outputs."""
    x = inputs_for(before, 5, seed=3)
    a, b = run(before, *x), run(after, *x)
    a, b = ((a,), (b,)) if isinstance(a, Tensor) else (a, b)
    return max(float((u - v).abs().max() / u.abs().max()) for u, v in zip(a, b, strict=True))


def shake(network: Network, seed: int = 0) -> Network:
    """The same structure with every tensor moved a little, so that no bias, scale or statistic is a round number."""
    draw = torch.Generator().manual_seed(seed)
    moved = {}
    for name, tensor in network.tensors().items():
        if name in network.trainable() or name.startswith(("mean.", "variance.")):
            noise = torch.rand(tensor.shape, generator=draw, dtype=torch.float64).to(tensor)
            moved[name] = tensor * (1 + 0.5 * noise) if name.startswith("variance.") else tensor + 0.2 * (noise - 0.5)
    return clean(network.with_tensors(moved))


def clean(network: Network) -> Network:
    """Entries of Local2d weights that have no edge are zero again."""
    moved = {}
    for b in network.bundles.values():
        if isinstance(b.pattern, ig.Local2d):
            used = torch.zeros(b.weight.numel(), dtype=b.weight.dtype)
            for _, _, w in b.pattern.edges(*network.shapes(b)):
                used[torch.from_numpy(w)] = 1
            moved[b.tensor] = b.weight * used.reshape(b.weight.shape)
    return network.with_tensors(moved)


@cache
def zoo() -> dict[str, Network]:
    """Small float64 networks of every kind, with random values everywhere."""
    made = {
        "dense": ig.mlp([4, 5, 6, 3], seed=1, dtype=torch.float64, activation="relu"),
        "tanh": ig.mlp([3, 4, 2], seed=2, dtype=torch.float64, activation="tanh", norm="batch"),
        "cnn": ig.cnn((2, 6, 5), [4, 3], 3, seed=3, dtype=torch.float64, norm="batch", pool=2),
        "mean": ig.cnn((1, 5, 6), [3, 2], 2, seed=4, dtype=torch.float64, pooling="mean", activation="tanh"),
        "residual": residual(),
        "separable": separable(),
        "irregular": irregular(),
        "concatenated": concatenated(),
    }
    return {name: shake(network, n) for n, (name, network) in enumerate(made.items())}


def residual() -> Network:
    b = ig.Builder(seed=5, dtype=torch.float64)
    b.input("x", (2, 3, 4))
    b.group("stem", (4, 3, 4), activation="relu", bias=True)
    b.connect("x", "stem", ig.Conv2d((3, 3), (1, 1), (1, 1)))
    b.group("inner", (3, 3, 4), activation="relu", norm="batch")
    b.connect("stem", "inner", ig.Conv2d((3, 3), (1, 1), (1, 1)))
    b.group("sum", (4, 3, 4), activation="relu", bias=True)
    b.connect("inner", "sum", ig.Conv2d((1, 1)))
    b.connect("stem", "sum", ig.Identity())
    b.output("y", 3, bias=True)
    b.connect("sum", "y")
    return b.build()


def separable() -> Network:
    b = ig.Builder(seed=6, dtype=torch.float64)
    b.input("x", (3, 5, 4))
    b.group("point", (4, 5, 4), activation="relu", bias=True)
    b.connect("x", "point", ig.Conv2d((1, 1)))
    b.group("depth", (8, 3, 2), activation="silu", norm="batch")
    b.connect("point", "depth", ig.Conv2d((3, 3), (2, 2), (1, 1), channel_groups=4))
    b.group("grouped", (4, 3, 2), activation="relu", bias=True)
    b.connect("depth", "grouped", ig.Conv2d((3, 3), (1, 1), (1, 1), channel_groups=2))
    b.group("mean", (4, 1, 1))
    b.connect("grouped", "mean", ig.Pool2d((3, 2)), 1 / 6, trainable=False)
    b.output("y", 2, bias=True)
    b.connect("mean", "y")
    return b.build()


def irregular() -> Network:
    network = ig.mlp([3, 2], seed=7, dtype=torch.float64, bias=False)
    for seed in range(6):
        network = ig.InsertNeuron(seed=seed, activation="tanh")(network).after
    return network


def concatenated() -> Network:
    b = ig.Builder(seed=8, dtype=torch.float64)
    b.input("x", 4)
    b.group("left", 3, activation="relu", bias=True)
    b.group("right", 2, activation="tanh", bias=True)
    b.connect("x", "left")
    b.connect("x", "right")
    b.group("both", 5)
    b.connect("left", "both", ig.Identity())
    b.connect("right", "both", ig.Identity(3))
    b.output("y", 2, bias=True)
    b.connect("both", "y")
    b.connect("x", "y")
    return b.build()
