"""A grown head inside a Hugging Face model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import irgrow as ig
from irgrow.experiments import flatness_head
from irgrow.experiments.flatness import bare
from irgrow.experiments.flatness_head import Head, Plan, encoder, load, made_up, save
from irgrow.experiments.reproduce import MissingData, Setting
from irgrow.passes import InsertNeuron

TINY = Plan(neurons=16, hidden=16, layers=1, tokens=20, length=6, samples=40, epochs=8, measured_on=16)


def test_made_up_sentences() -> None:
    (tokens, mask), labels = made_up(TINY, 200, torch.Generator().manual_seed(0))
    for row, shown, label in zip(tokens.tolist(), mask.tolist(), labels.tolist(), strict=True):
        end = row.index(2)
        words = row[1:end]
        assert row[0] == 0 and set(row[end + 1 :]) <= {1} and len(words) >= 3 and min(words) >= 3
        assert shown == [1] * (end + 1) + [0] * (len(row) - end - 1)
        assert label == int(2 * sum(w >= 11 for w in words) > len(words))
    assert 0.3 < float(labels.double().mean()) < 0.7


def test_without_transformers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingData, match=r"no working transformers .* pip install irgrow\[hf\]"):
        flatness_head.run(Setting((0,), tmp_path, progress=False))


def test_save_and_reload(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = encoder(TINY)
    head = ig.compile(bare(16, 2, 0))
    model.classifier = Head(head)
    optimizer = torch.optim.AdamW(model.parameters())
    for seed in range(5):
        head.grow(InsertNeuron(16, seed=seed, activation="tanh")(head.structure), optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert all(id(p) in held for p in model.parameters())
    (tokens, mask), _ = made_up(TINY, 8, torch.Generator().manual_seed(0))
    save(model.eval(), tmp_path)
    again = load(tmp_path)
    one, two = (m(input_ids=tokens, attention_mask=mask).logits for m in (model, again))
    assert torch.equal(one, two) and one.shape == (8, 2)
    assert again.classifier.network.structure == head.structure
    assert "kernels" not in sys.modules


def test_full_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingData, match="cola: found no working datasets"):
        flatness_head.run(Setting((0,), tmp_path, full=True, progress=False))
    with pytest.raises(MissingData, match="no-such-model: found no weights"):
        encoder(Plan(str(tmp_path / "no-such-model")))


def test_claims(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    result = flatness_head.run(Setting((0,), tmp_path, progress=False), TINY)
    claims = {c.name: c for c in result.claims}
    assert claims["reload"].status == claims["parameters"].status == "holds"
    assert [r["parameters"] for r in result.data["runs"]] == [16 * 18] * 3
