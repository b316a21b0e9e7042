"""Saving and loading: round trips, bytes that repeat, what is refused."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from forging import flipped_loop, inserted, zoo
from safetensors import safe_open
from safetensors.torch import load_file

import irgrow as ig
from irgrow.ir import errors

ZOO = zoo()


@pytest.mark.parametrize("kind", ZOO)
def test_a_network_comes_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    network = ZOO[kind]
    ig.save(tmp_path / "net.irgrow", network)
    loaded = ig.load(tmp_path / "net.irgrow")
    assert loaded == network
    assert loaded.structure == network.structure
    assert loaded.tensors().keys() == network.tensors().keys()
    for name, tensor in network.tensors().items():
        assert loaded.tensors()[name].contiguous().view(-1).tolist() == tensor.view(-1).tolist()
    for name, group in network.groups.items():
        assert np.array_equal(loaded.groups[name].serials, group.serials)
    for name, bundle in network.bundles.items():
        assert type(loaded.bundles[name].pattern) is type(bundle.pattern)
        assert loaded.bundles[name].pattern == bundle.pattern
        assert loaded.bundles[name].trainable == bundle.trainable
        if isinstance(bundle.pattern, ig.Sparse):
            for tag, array in bundle.pattern.tags.items():
                assert loaded.bundles[name].pattern.tags[tag].dtype == array.dtype  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["mlp", "cnn", "inserted"])
def test_a_loaded_network_computes_the_same_and_grows(kind: str, tmp_path: Path) -> None:
    network = ZOO[kind]
    ig.save(tmp_path / "net.irgrow", network)
    loaded = ig.load(tmp_path / "net.irgrow")
    x = torch.randn(3, *network.groups["input"].shape)
    assert torch.equal(ig.interpret(loaded, x), ig.interpret(network, x))  # type: ignore[arg-type]
    for rewrite in [*ig.SplitUnit.places(network)][:1] + [*ig.InsertNeuron.places(network)][:1]:
        assert rewrite(loaded).after == rewrite(network).after


def test_special_values_keep_their_bits(tmp_path: Path) -> None:
    weight = torch.tensor([[-0.0, 5e-324, 1.7e308, -1e-310]], dtype=torch.float64)
    network = ig.mlp([4, 1], bias=False, dtype=torch.float64).with_tensors({"weight.input_output": weight})
    ig.save(tmp_path / "net.irgrow", network)
    back = ig.load(tmp_path / "net.irgrow").tensors()["weight.input_output"]
    assert back.view(torch.int64).tolist() == weight.view(torch.int64).tolist()


def test_tensors_need_not_be_contiguous_nor_detached(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(5, 4).t())
    network = ig.mlp([5, 4]).with_tensors({"weight.input_output": weight})
    ig.save(tmp_path / "net.irgrow", network)
    assert torch.equal(ig.load(tmp_path / "net.irgrow").tensors()["weight.input_output"], weight)


def test_a_compiled_network_is_saved_with_its_current_values(tmp_path: Path) -> None:
    model = ig.compile(ig.mlp([3, 2]))
    with torch.no_grad():
        model.tensors()["weight.input_output"].fill_(7.0)
    ig.save(tmp_path / "net.irgrow", model)
    assert ig.load(tmp_path / "net.irgrow").tensors()["weight.input_output"].eq(7).all()


def test_other_programs_can_read_the_weights(tmp_path: Path) -> None:
    for kind, network in ZOO.items():
        ig.save(tmp_path / "net.irgrow", network, extra={"note": kind})
        tensors = load_file(tmp_path / "net.irgrow")
        for name, tensor in network.tensors().items():
            assert torch.equal(tensors[name], tensor)
        with safe_open(tmp_path / "net.irgrow", "pt") as file:
            assert '"groups"' in file.metadata()["structure"]


def test_the_same_network_gives_the_same_bytes(tmp_path: Path) -> None:
    for network in ZOO.values():
        for name in ("a", "b"):
            ig.save(tmp_path / name, network.clone(), extra={"z": 1, "a": 2})
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    ig.save(tmp_path / "a", ZOO["mlp"].with_tensors({"bias.output": torch.ones(3)}))
    assert (tmp_path / "a").read_bytes() != (tmp_path / "b").read_bytes()  # the comparison can fail


def test_another_process_gives_the_same_bytes(tmp_path: Path) -> None:
    network = inserted(4, 2, 8)
    ig.save(tmp_path / "here", network, extra={"b": 1, "a": [2.5]})
    code = (
        "import irgrow as ig; from forging import inserted;"
        f"ig.save({str(tmp_path / 'there')!r}, inserted(4, 2, 8), extra={{'b': 1, 'a': [2.5]}})"
    )
    folders = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": folders, "PYTHONHASHSEED": "7"}
    )
    here, there = ((tmp_path / name).read_bytes() for name in ("here", "there"))
    assert hashlib.sha256(here).hexdigest() == hashlib.sha256(there).hexdigest()


# ---- extra ------------------------------------------------------------------------------------------------------


def test_extra_comes_back_as_it_was(tmp_path: Path) -> None:
    extra = {
        "text": 'µ "quoted" \n $',
        "numbers": [1, -(2**80), 0.1, 1e-320, float("inf"), True, None],
        "pair": (1, (2.0, [])),
        "by number": {3: "three", -1: {"$": 1, "$tuple": [2]}},
        "numpy": np.float64(0.5),
    }
    ig.save(tmp_path / "net.irgrow", ZOO["mlp"], extra=extra)
    back = ig.read_extra(tmp_path / "net.irgrow")
    assert back == extra
    assert isinstance(back["pair"], tuple) and isinstance(back["pair"][1], tuple)
    ig.save(tmp_path / "net.irgrow", ZOO["mlp"], extra={"best": float("nan")})
    assert ig.read_extra(tmp_path / "net.irgrow")["best"] != ig.read_extra(tmp_path / "net.irgrow")["best"]
    ig.save(tmp_path / "net.irgrow", ZOO["mlp"])
    assert ig.read_extra(tmp_path / "net.irgrow") == {}


@pytest.mark.parametrize("value", [object(), {1.5: 2}, {1, 2}, b"bytes", torch.ones(2), np.ones(2), lambda: 0])
def test_extra_must_be_plain_data(value: object, tmp_path: Path) -> None:
    with pytest.raises(errors.BadData, match=r"extra\.there\.1.*expected (plain data|text or an integer)"):
        ig.save(tmp_path / "net.irgrow", ZOO["mlp"], extra={"there": [0, value]})
    assert list(tmp_path.iterdir()) == []


def test_extra_that_holds_itself_is_refused(tmp_path: Path) -> None:
    extra: dict[str, object] = {}
    extra["again"] = extra
    with pytest.raises(errors.BadData, match="nested"):
        ig.save(tmp_path / "net.irgrow", ZOO["mlp"], extra=extra)


# ---- what is refused --------------------------------------------------------------------------------------------


def test_networks_that_could_not_be_loaded_are_not_saved(tmp_path: Path) -> None:
    network = ZOO["mlp"]
    bad = network.with_tensors({"bias.output": torch.tensor([1.0, float("nan"), 0.0])})
    with pytest.raises(errors.NonFinite, match=r"bias\.output"):
        ig.save(tmp_path / "net.irgrow", bad)
    with pytest.raises(errors.CyclicNetwork):
        ig.save(tmp_path / "net.irgrow", flipped_loop(ZOO["inserted"]))
    assert list(tmp_path.iterdir()) == []


def test_patterns_of_other_classes_are_not_saved(tmp_path: Path) -> None:
    class Mine(ig.Dense):
        pass

    b = ig.Builder()
    b.input("x", 2)
    b.output("y", 2)
    b.connect("x", "y", Mine())
    with pytest.raises(errors.Refused, match=r"bundle 'x_y'.*class Mine.*to_sparse"):
        ig.save(tmp_path / "net.irgrow", b.build())


def test_only_networks_and_models_are_saved(tmp_path: Path) -> None:
    with pytest.raises(errors.BadData, match="found a Linear, expected a Network or a compiled network"):
        ig.save(tmp_path / "net.irgrow", torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_every_field_of_the_representation_is_in_the_file() -> None:
    """Fails when somebody adds a field to a group, bundle, norm or pattern that files would silently drop."""
    from dataclasses import fields

    from irgrow.io.structure import PATTERNS
    from irgrow.ir.pattern import Pattern

    known = {
        ig.Network: {"groups", "bundles", "inputs", "outputs", "next_serial", "frozen"},
        ig.Group: {"name", "shape", "activation", "aggregation", "bias", "norm", "dropout", "serials"},
        ig.Norm: {"kind", "scale", "shift", "mean", "variance", "eps", "momentum", "groups"},
        ig.Bundle: {"name", "source", "target", "pattern", "weight", "trainable"},
        ig.Dense: set(),
        ig.Sparse: {"source", "target", "weight_index", "weights", "tags"},
        ig.Identity: {"start"},
        ig.Pool2d: {"kernel", "stride", "padding", "dilation"},
        ig.Conv2d: {"kernel", "stride", "padding", "dilation", "channel_groups"},
        ig.Local2d: {"kernel", "stride", "padding", "dilation", "channel_groups"},
    }
    for kind, names in known.items():
        assert {f.name for f in fields(kind)} == names, f"irgrow/io/structure.py must learn about {kind.__name__}"

    def concrete(kind: type) -> set[type]:
        below = {c for sub in kind.__subclasses__() for c in concrete(sub)}
        return below | (set() if kind.__abstractmethods__ else {kind})  # type: ignore[attr-defined]

    ours = {c for c in concrete(Pattern) if c.__module__.startswith("irgrow.")}
    assert ours == set(PATTERNS.values())


# ---- paths ------------------------------------------------------------------------------------------------------


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(errors.BadFile, match="No such file.*check the path"):
        ig.load(tmp_path / "missing")
    with pytest.raises(errors.BadFile, match="a directory or device"):
        ig.load(tmp_path)
    with pytest.raises(errors.BadFile, match="a directory or device"):
        ig.load("/dev/zero" if os.path.exists("/dev/zero") else tmp_path)
    with pytest.raises(errors.BadFile, match="null"):
        ig.load("a\0b")
    with pytest.raises(errors.BadFile, match="path: found a int"):
        ig.load(3)  # type: ignore[arg-type]
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(errors.BadFile, match="a directory or device"):
            ig.load(tmp_path / "pipe")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ig.save(tmp_path / "net.irgrow", ZOO["mlp"])

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(errors.BadFile, match=r"net\.irgrow: found Permission denied"):
        ig.load(tmp_path / "net.irgrow")


def test_an_error_while_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from irgrow.io import container

    ig.save(tmp_path / "net.irgrow", ZOO["mlp"])

    class Broken:
        def __init__(self, *_: object, **__: object) -> None:
            self.file = os.open(tmp_path / "net.irgrow", os.O_RDONLY)

        def fileno(self) -> int:
            return self.file

        def readinto(self, _: object) -> int:
            raise OSError(5, "Input/output error")

        def close(self) -> None:
            os.close(self.file)

    monkeypatch.setattr(container, "open", Broken, raising=False)
    with pytest.raises(errors.BadFile, match="Input/output error"):
        ig.load(tmp_path / "net.irgrow")


def test_a_link_stays_a_link_and_permissions_stay(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target = tmp_path / "real" / "net.irgrow"
    ig.save(target, ZOO["mlp"])
    target.chmod(0o640)
    (tmp_path / "link").symlink_to(target)
    ig.save(tmp_path / "link", ZOO["cnn"])
    assert (tmp_path / "link").is_symlink()
    assert ig.load(target) == ZOO["cnn"]
    assert target.stat().st_mode & 0o777 == 0o640


def test_a_single_number_of_any_stride_is_saved(tmp_path: Path) -> None:
    wide = torch.randn(1, 2, dtype=torch.float64)
    network = ig.mlp([1, 1], bias=False, dtype=torch.float64).with_tensors({"weight.input_output": wide[:, :1]})
    ig.save(tmp_path / "one.safetensors", network)
    assert ig.load(tmp_path / "one.safetensors") == network
