"""`verify` names what is broken: every corruption, in random networks, with its error and its text."""

from __future__ import annotations

import re

import pytest

from irgrow.ir.errors import InvalidNetwork
from irgrow.ir.network import Network
from irgrow.testing import CORRUPTIONS, Corruption, fingerprint, random_network

BROKEN_NETWORKS = 4  # per corruption


def test_there_are_enough_of_them() -> None:
    assert len(CORRUPTIONS) >= 30
    assert len({c.name for c in CORRUPTIONS}) == len(CORRUPTIONS)


@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda c: c.name)
def test_each_gives_its_own_error(corruption: Corruption) -> None:
    done = 0
    for seed in range(300):
        network = random_network(seed)
        before = fingerprint(network)
        broken = corruption(network, seed)
        assert fingerprint(network) == before, "a corruption makes a new value"
        if broken is None:
            continue
        with pytest.raises(InvalidNetwork) as caught:
            broken.verify()
        assert type(caught.value) is corruption.error, f"seed {seed}: {caught.value!r}"
        assert re.search(corruption.says, str(caught.value)), f"seed {seed}: {caught.value}"
        done += 1
        if done == BROKEN_NETWORKS:
            return
    pytest.fail(f"only {done} networks had a place for it")


def test_the_sound_networks_pass() -> None:
    for seed in range(50):
        network = random_network(seed)
        assert isinstance(network.verify(), Network)
