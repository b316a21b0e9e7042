"""Passes as text: they read back, and text that is no pass says why."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

import irgrow as ig
from irgrow import passes
from irgrow.ir.errors import IrgrowError, Refused, UnknownName
from irgrow.ir.network import Unit
from irgrow.passes import AddLayer, AddUnits, InsertNeuron, Pass, Sequence, SplitUnit
from irgrow.testing import places, random_network

SPLIT = SplitUnit(Unit("hidden", 3), 0.25)


def test_the_text_is_the_constructor() -> None:
    assert str(SPLIT) == "SplitUnit(unit='hidden#3', share=0.25)"
    assert str(AddLayer("h")) == "AddLayer(group='h', activation=None, kernel=3, bias=True)"
    insert = InsertNeuron(2, seed=5, after=4, others=(7,), weights=(0.5, -0.25))
    assert str(insert) == (
        "InsertNeuron(parents=2, seed=5, activation='relu', group='inserted', after=4, others=(7,), "
        "weights=(0.5, -0.25))"
    )
    for pass_ in (SPLIT, AddLayer("h", "tanh"), insert, SPLIT >> insert >> AddLayer("g")):
        assert Pass.from_text(str(pass_)) == pass_


def test_fields_with_a_default_may_be_left_out() -> None:
    assert Pass.from_text("SplitUnit(unit='hidden#3')") == SplitUnit(Unit("hidden", 3))
    assert Pass.from_text("InsertNeuron()") == InsertNeuron()


def test_sequences_are_flat() -> None:
    a, b, c = SPLIT, AddLayer("h"), InsertNeuron()
    assert (a >> b) >> c == a >> (b >> c) == Sequence((a, b, c))
    assert str(a >> b) == f"{a} >> {b}"
    with pytest.raises(Refused, match="Sequence: found no steps, expected at least one"):
        Sequence(())(ig.mlp([2, 2]))


def test_proposals_are_found_by_their_hash() -> None:
    net = ig.mlp([3, 4, 2])
    pass_ = places(net, [AddUnits])[0]
    assert isinstance(pass_, AddUnits)
    text = str(pass_)
    assert text == f"AddUnits(proposal='proposal:{pass_.proposal.hash}')"
    assert Pass.from_text(text, {pass_.proposal.hash: pass_.proposal}) == pass_
    with pytest.raises(UnknownName, match=rf"proposal '{pass_.proposal.hash}': expected one of none given"):
        Pass.from_text(text)


@given(st.integers(0, 10**6), st.sampled_from([*passes.list().values()]))
def test_every_place_reads_back(seed: int, kind: type[Pass]) -> None:
    for pass_ in places(random_network(seed, steps=2), [kind], most=3):
        if "proposal:" not in str(pass_):
            assert Pass.from_text(str(pass_)) == pass_


TEXTS = {
    "": r"pass text '': expected text like SplitUnit\(unit='hidden#3', share=0.5\)",
    "SplitUnit(": r"pass text 'SplitUnit\(': expected text like",
    "SplitUnit": r"pass text 'SplitUnit': expected Name\(field=value, \.\.\.\)",
    "1 + 1": r"pass text '1 \+ 1': expected Name\(field=value",
    "SplitUnit('hidden#3')": r"expected Name\(field=value",
    "a.SplitUnit(unit='hidden#3')": r"expected Name\(field=value",
    "Explode(unit='hidden#3')": r"pass 'Explode': expected one of .*AddLayer.*SplitUnit",
    "SplitUnit(unti='hidden#3')": r"SplitUnit: field 'unti': expected one of share, unit",
    "SplitUnit(share=0.5)": r"SplitUnit: found no value for unit, expected all fields without a default",
    "SplitUnit(unit='hidden')": r"unit 'hidden': expected text like hidden#12",
    "SplitUnit(unit='hidden#x')": r"unit 'hidden#x': expected text like hidden#12",
    "SplitUnit(unit=3)": r"SplitUnit: unit: found 3, expected text like 'hidden#12'",
    "SplitUnit(unit='hidden#3', share='half')": r"SplitUnit: share: found 'half', expected float",
    "SplitUnit(unit='hidden#3', share=open('x'))": r"SplitUnit: share: found open\('x'\), expected a plain value",
    "SplitUnit(unit='hidden#3', share=0.5, share=0.5)": r"SplitUnit: field 'share': found it twice",
    "SplitUnit(**{'unit': 'hidden#3'})": r"SplitUnit: field None: expected one of",
    "InsertNeuron(parents=2.5)": r"InsertNeuron: parents: found 2.5, expected int",
    "InsertNeuron(others=[1, 2])": r"InsertNeuron: others: found \[1, 2\], expected tuple\[int, \.\.\.\] \| None",
    "InsertNeuron(others=(1, 'a'))": r"InsertNeuron: others: found \(1, 'a'\), expected tuple",
    "InsertNeuron(seed=None)": r"InsertNeuron: seed: found None, expected int",
    "AddUnits(proposal=3)": r"AddUnits: proposal: found 3, expected text like 'proposal:",
    "AddUnits(proposal='proposal:ab')": r"proposal 'ab': expected one of none given",
    "SplitUnit(unit='hidden#3') >> Explode()": r"pass 'Explode'",
    "SplitUnit(unit='hidden#3') << SplitUnit(unit='hidden#3')": r"expected Name\(field=value",
    "SplitUnit(unit='a\0#3')": r"pass text .*: expected text like",
    "(" * 500 + ")" * 500: r"pass text '\(\(\(.*\.\.\.': expected text like",
    "-" * 100_000 + "1": r"pass text '---.*\.\.\.': expected text like",
}


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:40] or "nothing")
def test_text_that_is_no_pass(text: str) -> None:
    with pytest.raises(IrgrowError, match=TEXTS[text]) as caught:
        Pass.from_text(text)
    assert len(str(caught.value)) < 2000


@given(st.text(alphabet="SplitUn(=)'#,>|.0123 []{}:", max_size=60))
def test_any_text_is_a_pass_or_a_named_error(text: str) -> None:
    with contextlib.suppress(IrgrowError):
        assert isinstance(Pass.from_text(text), Pass)


# ---- the list -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ig.passes.list())
def test_every_pass_says_what_it_does_and_where_it_comes_from(name: str) -> None:
    kind = ig.passes.list()[name]
    text = kind.__doc__ or ""
    assert text.partition("\n")[0].endswith(".") and kind.reference
    assert "becomes" in text or "->" in text, "what stands there before and after"
    assert "Refused" in text or "refused" in text


def test_the_list_prints_a_line_for_every_pass() -> None:
    lines = str(ig.passes.list()).splitlines()
    assert [line.split()[0] for line in lines] == list(ig.passes.list())
    (split,) = (line for line in lines if line.startswith("SplitUnit "))
    assert "becomes two that share its outgoing weights" in split and split.endswith("section 2.2)")
