"""`irgrow show`: what is in a file, on a terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

import irgrow as ig
from irgrow import cli
from irgrow.ir import errors
from irgrow.viz import show


@pytest.fixture
def file(tmp_path: Path) -> Path:
    model = ig.compile(ig.mlp([6, 5, 2], seed=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    model(torch.randn(3, 6)).sum().backward()
    optimizer.step()
    network = model.network()
    model.grow(ig.SplitUnit(network.unit("hidden", 0))(network), optimizer)
    ig.save_checkpoint(
        tmp_path / "run.irgrow", model, optimizer=optimizer, progress={"epoch": 7}, extra={"note": "x" * 100}
    )
    return tmp_path / "run.irgrow"


def shown(file: Path, encoding: str = "utf-8") -> str:
    out = io.TextIOWrapper(raw := io.BytesIO(), encoding=encoding)
    show(file, to=out)
    out.flush()
    return raw.getvalue().decode(encoding)


def test_a_checkpoint_is_told(file: Path) -> None:
    text = shown(file)
    assert text.startswith(str(ig.load(file)))
    assert "weight.input_hidden     6x6" in text
    assert "optimizer: AdamW, lr 0.02, state of 4 of 4 parameters" in text
    assert "random state: saved" in text
    assert "progress: epoch = 7" in text
    assert "extra: note = 'xxx" in text and "x" * 90 not in text
    assert "growths: 1\n  SplitUnit(unit='hidden#6'" in text


def test_a_plain_network_has_no_training(tmp_path: Path) -> None:
    ig.save(tmp_path / "net", ig.mlp([3, 2]))
    assert "optimizer" not in shown(tmp_path / "net")


def test_histograms_count_values(tmp_path: Path) -> None:
    weight = torch.tensor([[-1.0, 1.0, 1.0, 1.0]])
    ig.save(tmp_path / "net", ig.mlp([4, 1], bias=False).with_tensors({"weight.input_output": weight}))
    assert "|▃             █|" in shown(tmp_path / "net")


def test_terminals_without_blocks_get_letters(file: Path) -> None:
    text = shown(file, "ascii")
    assert "|" in text and text.isascii()


def test_the_command_prints_and_draws(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", str(file), "--svg", str(tmp_path / "net.svg")]) == 0
    assert "drawn to" in capsys.readouterr().out
    assert (tmp_path / "net.svg").read_text().startswith("<svg")
    file.write_bytes(file.read_bytes()[:-1])
    assert cli.main(["show", str(file)]) == 2
    assert "run.irgrow" in capsys.readouterr().err


def test_files_that_cannot_be_shown(file: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.BadFile):
        show(tmp_path / "missing")
    with pytest.raises(errors.BadFile, match="drawing to"):
        show(file, svg=tmp_path / "missing" / "net.svg", to=io.StringIO())
