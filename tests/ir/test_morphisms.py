"""`Morphism.verify` tests promises: with the interpreter, with other runners, and says what it found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import irgrow as ig
from irgrow.ir.errors import BadSerial, PromiseBroken
from irgrow.ir.interpreter import interpret
from irgrow.ir.morphism import Changes, FirstOrder, Morphism, SameFunction
from irgrow.passes import AddUnits, SplitUnit
from irgrow.testing import places

F64 = torch.float64


def split(dtype: torch.dtype = F64, share: float = 0.3) -> Morphism:
    net = ig.mlp([3, 4, 2], activation="tanh", dtype=dtype)
    return SplitUnit(net.unit("hidden", 1), share)(net)


def spoiled(morphism: Morphism, by: float, name: str = "weight.hidden_output") -> Morphism:
    tensors = morphism.after.tensors()
    return replace(morphism, after=morphism.after.with_tensors({name: tensors[name] + by}))


@pytest.mark.parametrize(("dtype", "seen", "unseen"), [(F64, 1e-11, 1e-14), (torch.float32, 1e-3, 1e-7)])
def test_the_tolerance_is_that_of_the_network_s_dtype(dtype: torch.dtype, seen: float, unseen: float) -> None:
    morphism = split(dtype)
    assert morphism.verify() is morphism
    spoiled(morphism, unseen).verify()
    with pytest.raises(
        PromiseBroken, match=r"SplitUnit\(unit='hidden#4', share=0.3\): found outputs that change by \d"
    ):
        spoiled(morphism, seen).verify()
    spoiled(morphism, seen).verify(tolerance=0.1)


def test_any_runner_and_any_inputs() -> None:
    asked = []

    def run(network: ig.Network, *x: torch.Tensor) -> torch.Tensor:
        asked.append([t.dtype for t in x])
        return interpret(network, *x)

    split(torch.float32).verify(run=run)
    assert asked == [[torch.float32], [torch.float32]]
    zeros = torch.zeros(2, 3, dtype=F64)
    morphism = spoiled(split(), 1.0, "weight.input_hidden")
    morphism.verify(inputs=(zeros,))  # the difference does not show at zero
    with pytest.raises(PromiseBroken):
        morphism.verify()


def test_outputs_that_are_not_finite_break_the_promise() -> None:
    def run(network: ig.Network, *x: torch.Tensor) -> torch.Tensor:
        return interpret(network, *x) / (0.0 if network.groups["hidden"].units == 5 else 1.0)

    with pytest.raises(PromiseBroken, match="outputs that change by inf"):
        split().verify(run=run)


def test_both_networks_are_verified() -> None:
    morphism = split()
    with pytest.raises(BadSerial):
        replace(morphism, after=replace(morphism.after, next_serial=0)).verify()


def test_first_order_is_tested_at_three_scales() -> None:
    net = ig.mlp([3, 4, 2], activation="tanh", dtype=F64)
    morphism = places(net, [AddUnits])[0](net)
    assert isinstance(morphism.promise, FirstOrder)
    morphism.verify()
    with pytest.raises(PromiseBroken, match=r"at scale 1e-04 and .* at 0.1, expected a change that shrinks|at scale 0"):
        replace(morphism, lineage=type(morphism.lineage)({})).verify()
    assert isinstance(replace(morphism, promise=Changes("why")).verify(), Morphism)
    with pytest.raises(PromiseBroken):
        replace(morphism, promise=SameFunction()).verify()


def test_repr() -> None:
    text = repr(split())
    assert text.startswith("<Morphism SplitUnit(unit='hidden#4', share=0.3): <Network: 3 groups, 9 neurons")
    assert text.endswith("SameFunction()>")
