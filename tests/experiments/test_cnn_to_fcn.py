"""CNN to FCN: exact embeddings, lines that begin and end where they should, equal runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import irgrow as ig
from irgrow.experiments import cnn_to_fcn
from irgrow.experiments.cnn_to_fcn import PATH, Plan, _rank_correlation, data_of, fresh, one, placed, short
from irgrow.experiments.reproduce import MissingData, Setting

TINY = Plan(channels=(3, 3), samples=100, batch_size=20, relax=(0, 2), epochs=2, curvature_on=20)


def test_digits_stand_somewhere_on_the_canvas() -> None:
    images = torch.rand(100, 1, 8, 8) + 0.5
    out = placed(images, torch.Generator().manual_seed(0))
    corners = set()
    for image, original in zip(out, images, strict=True):
        rows, columns = (image[0] > 0).any(1).nonzero(), (image[0] > 0).any(0).nonzero()
        i, j = int(rows.min()), int(columns.min())
        corners.add((i, j))
        assert torch.equal(image[:, i : i + 8, j : j + 8], original) and int((image > 0).sum()) == 64
    assert corners == {(i, j) for i in range(3) for j in range(3)}
    (x, y), (x_test, y_test) = data_of(TINY)
    assert x.shape == (100, 1, 10, 10) and len(x_test) == len(y_test) == 2 * 1697
    assert abs(float(x.mean())) < 1e-5 and float(x.std()) == pytest.approx(1.0)


def test_one_seed() -> None:
    found = one(TINY, 0)
    assert len(found["cnn"]["loss"]) == 3 and len(found["fcn"]["accuracy"]) == 3
    for cell in found["relaxed"]:
        assert cell["difference"] <= 1e-12
        assert 0 < cell["delta"] < 0.3 < found["fcn"]["delta"] < 1
        path = dict(zip(PATH, cell["path"], strict=True))
        assert path[0.0]["accuracy"] == cell["accuracy"][0] and path[1.0]["accuracy"] == cell["accuracy"][-1]
        assert cell["loss"][0] == pytest.approx(cell["continued loss"][0], rel=1e-5)
        start, end = (torch.tensor(f) for f in cell["filters"])
        assert start.shape == (10, 10)
        outside = torch.ones(10, 10, dtype=torch.bool)
        outside[4:7, 4:7] = False  # a 3 x 3 kernel in the middle
        assert float(start[outside].abs().max()) == 0 < float(end[outside].abs().max())
    assert found["relaxed"][1]["accuracy"][0] == found["cnn"]["accuracy"][2]


def test_a_fresh_start_keeps_pooling_and_bounds() -> None:
    network = ig.EmbedConv()(ig.cnn((1, 6, 6), [2], 3)).after
    tensors, old = fresh(network, 0).tensors(), network.tensors()
    assert float(tensors["weight.conv1_pool1"]) == 1.0
    bound = 36**-0.5
    assert 0.9 * bound < float(tensors["weight.input_conv1"].abs().max()) <= bound
    assert not torch.equal(tensors["weight.input_conv1"], old["weight.input_conv1"])
    assert tensors["bias.conv1"].unique().numel() == 72


def test_small_things() -> None:
    assert _rank_correlation((0, 3, 10), (0.9, 0.5, 0.1)) == pytest.approx(-1.0)
    assert _rank_correlation((0, 3, 10), (0.5, 0.9, 0.1)) == pytest.approx(-0.5)
    assert short({"a": [1.23456789, 2], "b": "c"}) == {"a": [1.2346, 2], "b": "c"}


def test_missing_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(MissingData, match="--full: CIFAR10: found no working torchvision"):
        cnn_to_fcn.run(Setting((0,), tmp_path, full=True, progress=False))
