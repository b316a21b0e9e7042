"""Damaged and forged files: one exception type, quickly, with little memory, and nothing loaded wrong."""

from __future__ import annotations

import json
import random
import resource
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forging import Forged, flipped_loop, forgeries, inserted, sealed, zoo
from safetensors.torch import load as plain_load

import irgrow as ig
from irgrow.io.structure import describe
from irgrow.ir import errors
from irgrow.runtime.ledger import Entry

ZOO = zoo()
LOW = 1.0  # seconds for one small file, on a machine that does other things as well


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "net.irgrow"


def saved(network: ig.Network, file: Path) -> bytes:
    ig.save(file, network, extra={"epoch": 3, "pair": (1, 2)})
    return file.read_bytes()


def checkpoint(file: Path) -> bytes:
    model = ig.compile(ig.mlp([3, 4, 2]))
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    ig.save_checkpoint(
        file,
        model,
        optimizer=optimizer,
        scheduler=scheduler,
        progress={"epoch": 1},
        ledger=[Entry("SplitUnit()", "a", "b")],
    )
    return file.read_bytes()


# ---- bit flips ----------------------------------------------------------------------------------------------


def flip(raw: bytes, bit: int) -> bytes:
    flipped = bytearray(raw)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


def undetected(raw: bytes, bits: list[int], file: Path) -> int:
    count = 0
    for bit in bits:
        file.write_bytes(flip(raw, bit))
        try:
            ig.load(file)
        except errors.BadFile:
            continue
        count += 1
    return count


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_every_bit_flip_is_detected(count: int, file: Path) -> None:
    for raw in (saved(inserted(6, 3, 12), file), checkpoint(file)):
        draw = random.Random(count)
        start = 8 + int.from_bytes(raw[:8], "little")
        payload = [draw.randrange(8 * start, 8 * len(raw)) for _ in range(count)]
        header = [draw.randrange(8 * start) for _ in range(count // 2)]
        assert undetected(raw, payload + header, file) == 0


@pytest.mark.slow
def test_every_single_bit_of_a_file(file: Path) -> None:
    raw = saved(ig.mlp([2, 2]), file)
    assert undetected(raw, list(range(8 * len(raw))), file) == 0


def test_control_without_hashes_flips_go_unseen(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from irgrow.io import container

    raw = saved(ig.mlp([8, 8]), file)
    start = 8 + int.from_bytes(raw[:8], "little")
    bits = [8 * byte for byte in range(start, len(raw), 7)]
    assert undetected(raw, bits, file) == 0
    monkeypatch.setattr(container.Container, "_compare", lambda self, name, found: self._left.discard(name))
    assert undetected(raw, bits, file) > len(bits) / 2
    for bit in bits:
        plain_load(flip(raw, bit))  # the format alone has no hashes: this does not complain


# ---- thousands of files ----------------------------------------------------------------------------------------


def judge(made: bytes, file: Path) -> str | None:
    """What is wrong with how a forged file was treated; None if nothing is."""
    file.write_bytes(made)
    for read in (ig.load, ig.load_checkpoint, ig.read_extra):
        begin = time.perf_counter()
        try:
            found = read(file)
        except errors.BadFile as error:
            if error.__cause__ is not None and not isinstance(error.__cause__, (errors.IrgrowError, OSError)):
                return f"{read.__name__}: an error nobody foresaw: {error.__cause__!r}"
        except Exception as error:
            return f"{read.__name__}: {type(error).__name__}: {error}"
        else:
            if read is ig.load and (complaint := unfaithful(found, made)):
                return complaint
        if time.perf_counter() - begin > LOW:
            return f"{read.__name__}: {time.perf_counter() - begin:.1f} s"
    return None


def unfaithful(network: ig.Network, made: bytes) -> str | None:
    """A forged file may be a good file of another network; then that network must be what was loaded."""
    try:
        network.verify()
    except errors.IrgrowError as error:
        return f"loaded, and is not well formed: {error}"
    said = Forged(made)
    structure, tensors = describe(network)
    if json.dumps(structure) != json.dumps(said.sections["structure"]):
        return "loaded as another structure than the file's"
    for name, tensor in tensors.items():
        begin, end = said.table[name]["data_offsets"]
        if bytes_of(tensor) != said.payload[begin:end]:
            return f"loaded with other numbers in {name!r} than the file's"
    return None


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@pytest.mark.parametrize("count", [60, pytest.param(1500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [*ZOO, "checkpoint"])
def test_malformed_files(kind: str, count: int, file: Path) -> None:
    raw = checkpoint(file) if kind == "checkpoint" else saved(ZOO[kind], file)
    assert judge(raw, file) is None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made_in = set()
    for how, made in forgeries(raw, count, seed=count):
        made_in.add(how)
        complaint = judge(made, file)
        assert complaint is None, f"{how}: {complaint}"
    assert len(made_in) >= 8
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # kilobytes


def test_most_forgeries_are_refused_for_their_contents(file: Path) -> None:
    """A control of the test itself: forged files get past the hashes, and few are good files by chance."""
    raw = saved(ZOO["patterns"], file)
    by_hash = refused = loaded = 0
    for how, made in forgeries(raw, 150, seed=1):
        if how not in ("json", "tensors", "values"):
            continue
        file.write_bytes(made)
        try:
            ig.load(file)
            loaded += 1
        except errors.BadFile as error:
            by_hash += "hash that" in str(error)
            refused += 1
    assert by_hash == 0
    assert refused > 5 * loaded


def test_control_the_judge_notices(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from irgrow.io import structure

    raw = saved(ZOO["mlp"], file)
    monkeypatch.setattr(structure, "_is_pair", lambda value: 1 / 0)
    cnn = saved_without_check(ZOO["cnn"], file)
    monkeypatch.setitem(structure._PATTERN, "Conv2d", {**structure._PATTERN["Conv2d"], "kernel": lambda value: 1 / 0})
    assert "ZeroDivisionError" in str(judge(cnn, file))
    forged = Forged(raw)
    forged.sections["structure"]["groups"][1]["activation"] = "tanh"
    assert judge(forged.bytes(), file) is None
    monkeypatch.setattr(
        structure.Reader,
        "_group",
        lambda self, r, real=structure.Reader._group: real(self, {**r, "bias": False}),
    )
    assert judge(forged.bytes(), file) is not None


def saved_without_check(network: ig.Network, file: Path) -> bytes:
    from irgrow.io.container import write

    sections, tensors = describe(network)
    write(file, {"structure": sections}, tensors)
    return file.read_bytes()


# ---- by name -----------------------------------------------------------------------------------------------------


def refusal(made: bytes, file: Path) -> str:
    file.write_bytes(made)
    with pytest.raises(errors.BadFile) as caught:
        ig.load(file)
    assert str(file) in str(caught.value)
    return str(caught.value)


def test_each_mistake_is_named(file: Path) -> None:
    raw = saved(ZOO["mlp"], file)
    assert "a file of 0 bytes" in refusal(b"", file)
    assert "another beginning" in refusal(
        sealed(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' * 3, b"abcd"), file
    )
    assert "the file is damaged" in refusal(flip(raw, 8 * len(raw) - 1), file)
    assert "bytes" in refusal(raw[:-1], file)
    assert "bytes" in refusal(raw + b"x", file)
    assert "found a length of 18446744073709551615" in refusal(b"\xff" * 8 + raw[8:], file)

    forged = Forged(raw)
    forged.format = "irgrow 2"
    assert "another format or version" in refusal(forged.bytes(), file)

    forged = Forged(raw)
    forged.remove("bias.hidden")
    assert "'bias.hidden': found none in the file" in refusal(forged.bytes(), file)

    forged = Forged(raw)
    forged.append("bias.more", np.zeros(1, "f4"), "F32")
    assert "'bias.more': found nothing that it belongs to" in refusal(forged.bytes(), file)

    forged = Forged(raw)
    forged.table["weight.input_hidden"]["shape"] = [5, 4]
    assert "expected (4, 5)" in refusal(forged.bytes(), file)

    forged = Forged(raw)
    forged.table["weight.input_hidden"]["shape"] = [-4, -5]
    assert "shape: found [-4, -5]" in refusal(forged.bytes(), file)

    forged = Forged(raw)
    forged.table["bias.output"]["dtype"] = "I32"
    assert "expected a floating tensor" in refusal(forged.bytes(), file)

    forged = Forged(raw)
    forged.sections["structure"]["groups"][1]["shape"] = [1 << 30, 1 << 30]
    assert "neurons: found 1,152,921,504,606,846,984" in refusal(forged.bytes(), file)

    forged = Forged(raw)
    forged.sections["structure"]["groups"][1]["shape"] = [True]
    assert "groups[1].shape: found [True]" in refusal(forged.bytes(), file)

    forged = Forged(raw)
    forged.put("bias.output", np.array([0, np.inf, 0], "f4"))
    assert "a finite value" in refusal(forged.bytes(), file)

    forged = Forged(raw)
    forged.sections["structure"]["bundles"][0]["target"] = "input"
    assert "BadFile" not in refusal(forged.bytes(), file)


def test_a_cycle_in_a_file(file: Path) -> None:
    looped = saved_without_check(flipped_loop(inserted(4, 2, 12)), file)
    assert "feed themselves" in refusal(looped, file)


def test_serials_near_the_largest_integer(file: Path) -> None:
    forged = Forged(saved(ZOO["max pooling"], file))
    forged.put("serials.output", np.array([2**63 - 1, 2**63 - 2], "i8"))
    forged.sections["structure"]["next_serial"] = 2**62
    assert "out of range" in refusal(forged.bytes(), file)


@pytest.mark.parametrize(
    "change",
    [
        {"image": [1, 1 << 20, 1 << 20]},
        {"image": [1, 4000, 4000], "kernel": [3000, 3000], "pooled": [1, 1001, 1001]},
        {"image": [1, 4000, 4000], "kernel": [1, 1], "padding": [1 << 30, 0], "pooled": [1, 4000 + (1 << 31), 4000]},
        {"image": [1, 4, 4], "kernel": [1 << 30, 1 << 30], "padding": [1 << 29, 1 << 29], "pooled": [1, 5, 5]},
    ],
)
def test_little_files_cannot_mean_much_work(change: dict[str, list[int]], file: Path) -> None:
    """Pooling is a few numbers in a file; what they stand for is limited by the size of the file."""
    b = ig.Builder()
    b.input("image", (1, 4, 4))
    b.output("pooled", (1, 4, 4))
    b.connect("image", "pooled", ig.Pool2d((1, 1)))
    forged = Forged(saved(b.build(), file))
    structure = forged.sections["structure"]
    for n, name in enumerate(("image", "pooled")):
        structure["groups"][n]["shape"] = change.get(name, structure["groups"][n]["shape"])
    structure["next_serial"] = 1 << 60
    for key in ("kernel", "padding"):
        structure["bundles"][0]["pattern"][key] = change.get(key, structure["bundles"][0]["pattern"][key])
    begin = time.perf_counter()
    refusal(forged.bytes(), file)
    assert time.perf_counter() - begin < LOW


def test_a_deep_or_repetitive_header(file: Path) -> None:
    length = int.from_bytes((raw := saved(ZOO["mlp"], file))[:8], "little")
    header, payload = raw[8 : 8 + length].rstrip(), raw[8 + length :]
    deep = header[:-1] + b',"x":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    assert "no readable JSON" in refusal(sealed(deep, payload), file)
    twice = header[:-1] + b',"bias.hidden":{},"bias.hidden":{}}'
    assert "one key twice" in refusal(sealed(twice, payload), file)
    constant = header[:-1] + b',"x":NaN}'
    assert "the number NaN" in refusal(sealed(constant, payload), file)
