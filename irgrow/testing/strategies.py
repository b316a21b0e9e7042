"""Hypothesis strategies: networks that shrink, and passes at places of a network.

@given(networks(), st.data())
def test_my_pass(network, data):
    assert_promise(data.draw(rewrites(network, [MyPass])), network)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, TypeVar

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from irgrow.ir.network import Network
from irgrow.passes.base import Pass, registered
from irgrow.testing.recipe import cook, random_network

T = TypeVar("T")


class _Drawn:
    """Choices of a recipe, made by hypothesis: smaller and earlier is simpler."""

    def __init__(self, draw: DrawFn) -> None:
        self._draw = draw

    def integer(self, low: int, high: int) -> int:
        return self._draw(st.integers(low, high))

    def pick(self, options: Sequence[T]) -> T:
        return options[self._draw(st.integers(0, len(options) - 1))]


@st.composite  # type: ignore[arg-type]
def networks(draw: DrawFn, **options: Any) -> Network:
    """Verified networks of any kind; the options are those of `irgrow.testing.cook`."""
    return cook(_Drawn(draw), **options)


def seeded_networks(**options: Any) -> SearchStrategy[Network]:
    """Networks of `random_network`: more variety in few examples than `networks`, but failures shrink less."""
    return st.integers(0, 10**6).map(lambda seed: random_network(seed, **options))


def places(network: Network, passes: Iterable[type[Pass]] | None = None, *, most: int = 20) -> list[Pass]:
    """The first `most` places of every one of these passes (default: all registered ones) in a network."""
    kinds = registered().values() if passes is None else passes
    return [found for kind in kinds for found in islice(kind.places(network), most)]


def rewrites(network: Network, passes: Iterable[type[Pass]] | None = None) -> SearchStrategy[Pass]:
    """One pass at one place of a network; rejects the example where there is none."""
    return st.one_of([st.sampled_from(found) for kind in _kinds(passes) if (found := places(network, [kind]))])


def _kinds(passes: Iterable[type[Pass]] | None) -> list[type[Pass]]:
    return list(registered().values() if passes is None else passes)
