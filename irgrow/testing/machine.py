"""`GrowthMachine`: a hypothesis state machine that rewrites a network again and again.

After every step: the pass kept all it owes (`assert_promise`); while every step so far promised the same
function, the outputs are those of the first network; and the composed morphism carries other weights of
the first network to where the single steps carry them.

    class TestMine(GrowthMachine.TestCase): ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from irgrow.ir.morphism import Morphism, SameFunction
from irgrow.ir.network import Network
from irgrow.passes.base import Pass, registered
from irgrow.testing.promises import VALUE, assert_close, assert_promise, largest_change, network_with_other_weights
from irgrow.testing.recipe import inputs_for
from irgrow.testing.strategies import networks, places, seeded_networks

LARGEST = 300  # neurons; beyond that a run stops growing


class GrowthMachine(RuleBasedStateMachine):
    """Random sequences of registered passes (or of `passes`) on one drawn network."""

    passes: ClassVar[Sequence[type[Pass]] | None] = None
    options: ClassVar[dict[str, object]] = {"steps": 3, "widest": 4}

    def __init__(self) -> None:
        super().__init__()
        self.first: Network | None = None
        self.network: Network | None = None
        self.total: Morphism | None = None
        self.steps = 0

    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        kinds = seeded_networks(**self.options), networks(**self.options), seeded_networks(**self.options, frozen=True)
        self.first = self.network = data.draw(st.one_of(kinds))
        self.other = network_with_other_weights(self.first)
        self.carried = self.other.tensors()

    @rule(data=st.data(), seed=st.integers(0, 1000))
    def grow(self, data: st.DataObject, seed: int) -> None:
        network = self.network
        assert network is not None
        if network.counts.neurons > LARGEST:
            return
        kinds = list(registered().values() if self.passes is None else self.passes)
        kind = data.draw(st.sampled_from(kinds))
        found = places(network, [kind], most=10)
        if not found:
            return
        pass_ = data.draw(st.sampled_from(found))
        morphism = assert_promise(pass_, network, seed=seed)
        self.carried = morphism.tensors(self.carried)
        self.total = morphism if self.total is None else self.total >> morphism
        self.network = morphism.after
        self.steps += 1

    @invariant()
    def composes(self) -> None:
        if self.total is None:
            return
        assert self.first is not None and self.network is not None
        assert self.total.before == self.first and self.total.after == self.network
        text = "composed, its lineage does not carry other weights as its steps do"
        assert_close(self.total.tensors(self.other.tensors()), self.carried, self.total.by, text)
        if isinstance(self.total.promise, SameFunction):
            change = largest_change(self.first, self.network, inputs_for(self.first))
            limit = self.steps * VALUE[self.first.dtype]
            assert change <= limit, f"{self.total.by}: outputs changed by {change:.2e} (relative)"
