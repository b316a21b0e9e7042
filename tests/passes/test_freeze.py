"""Weights that training leaves alone."""

from __future__ import annotations

import pytest
from laws import obey, zoo

import irgrow as ig
from irgrow.ir.errors import Refused, UnknownName
from irgrow.passes.freeze import Freeze, Unfreeze


@pytest.mark.parametrize("name", zoo())
def test_at_every_place(name: str) -> None:
    network = zoo()[name]
    for kind in (Freeze, Unfreeze):
        for place in kind.places(network):
            obey(place, network, chain=False)  # what is not trained has no gradient to sum


def test_there_and_back() -> None:
    network = zoo()["dense"]
    frozen = Freeze("input_hidden1")(network)
    assert "weight.input_hidden1" not in frozen.after.trainable()
    assert frozen.after.counts.parameters == network.counts.parameters - 20
    assert frozen.after.structure != network.structure
    assert Unfreeze("input_hidden1")(frozen.after).after == network
    grown = ig.SplitUnit(network.unit("hidden1", 0))(frozen.after).after
    assert not grown.bundle("input_hidden1").trainable


def test_refusals() -> None:
    network = zoo()["cnn"]
    with pytest.raises(Refused, match="Freeze: bundle 'conv1_pool1': found fixed weights, expected trained ones"):
        Freeze("conv1_pool1")(network)
    with pytest.raises(Refused, match="Unfreeze: bundle 'input_conv1': found trained weights, expected fixed ones"):
        Unfreeze("input_conv1")(network)
    with pytest.raises(UnknownName, match="bundle 'none': expected one of input_conv1"):
        Freeze("none")(network)
