"""`--full` of every experiment that needs data: its own path on tiny data, and what it says when there is none."""

from __future__ import annotations

import gzip
import json
import pickle
import struct
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from irgrow.experiments import (
    cnn_to_fcn,
    firefly_cells,
    firefly_continual,
    firefly_deepen,
    firefly_rbf,
    firefly_widen,
    flatness,
    flatness_head,
    full_data,
    gradmax_images,
    tiny_methods,
    tiny_resnet,
)
from irgrow.experiments.reproduce import Findings, MissingData, Setting

SHAPES = {
    "MNIST": (28, 28),
    "FashionMNIST": (28, 28),
    "SVHN": (3, 32, 32),
    "CIFAR10": (32, 32, 3),
    "CIFAR100": (32, 32, 3),
}


def pixels(name: str, train: bool) -> tuple[np.ndarray, list[int]]:
    """Every class twice in training, once in testing."""
    classes = 100 if name == "CIFAR100" else 10
    n = classes * (2 if train else 1)
    return np.random.default_rng(n).integers(0, 256, (n, *SHAPES[name]), np.uint8), [i % classes for i in range(n)]


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for torchvision, which is an optional extra: arrays of bytes with labels."""

    class Images:
        def __init__(self, root: str, train: bool = True, split: str = "train", download: bool = False) -> None:
            assert not download
            name = type(self).__name__
            self.data, self.targets = pixels(name, train and split == "train")
            self.labels = np.array(self.targets)

    library = ModuleType("torchvision")
    library.datasets = ModuleType("datasets")
    for name in SHAPES:
        setattr(library.datasets, name, type(name, (Images,), {}))
    monkeypatch.setitem(sys.modules, "torchvision", library)


def whole(run: Any, out: Path, *given: Any) -> Findings:
    """The experiment's findings: one seed, whose claims are open or exact, and pictures that are there."""
    found = run(Setting((0,), out, full=True, progress=False), *given)
    assert found.claims and found.rows and found.figures
    assert all((out / file).stat().st_size > 1000 for file in found.figures)
    assert json.dumps(found.data)
    return found


def test_widen(stored: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (firefly_widen.FULL.epochs, firefly_widen.FULL.new, firefly_widen.FULL.tuning) == (160, 50, 17)
    short = replace(firefly_widen.FULL, widths=(2,) * 16, growths=1, epochs=1, new=1, tuning=1)
    monkeypatch.setattr(firefly_widen, "FULL", short)
    monkeypatch.setattr(firefly_widen, "NEIGHBOURS", 1)
    found = whole(firefly_widen.run, tmp_path)
    start, end = found.data["net2net"]["structure"][0]
    assert (start, end) == ("-".join(["2"] * 16), "-".join(["3"] * 16))


def test_deepen(stored: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all((p.growths, p.epochs, p.last, p.new, p.tuning) == (11, 40, 200, 20, 17) for p in firefly_deepen.FULL)
    monkeypatch.setattr(firefly_deepen, "NEIGHBOURS", 1)
    short = [replace(p, channels=2, growths=1, epochs=1, last=1, new=2, tuning=1) for p in firefly_deepen.FULL[::2]]
    monkeypatch.setattr(firefly_deepen, "FULL", tuple(short))
    found = whole(firefly_deepen.run, tmp_path)
    assert {row[0] for row in found.rows} == {"MNIST", "SVHN"} == set(found.data)
    assert {c.name.split(":")[0] for c in found.claims} == {"MNIST", "SVHN"}


def test_continual(stored: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = firefly_continual.FULL
    assert [(s.tasks, s.classes, s.budget, s.candidates) for s in full.values()] == [
        (10, 10, 256, 15),
        (20, 5, 256, 15),
    ]
    parts = firefly_continual.tasks_of(full["20-way CIFAR-100"], 0)
    assert len(parts) == 20 and all(train[1].tolist().count(4) == 2 for train, _ in parts)
    assert sum(len(test[1]) for _, test in parts) == 100
    short = {n: replace(s, tasks=2, hidden=1, alone=1, budget=1, epochs=1, masks=1) for n, s in full.items()}
    monkeypatch.setattr(firefly_continual, "FULL", short)
    found = whole(firefly_continual.run, tmp_path)
    assert [c.status for c in found.claims if c.name.startswith("forgetting")] == ["holds", "holds"]


def test_cells(stored: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "CIFAR10", (8, 8, 3))
    monkeypatch.setattr(firefly_cells, "NODES", 2)
    full = firefly_cells.FULL
    assert sum(full.repeats) == 20 and full.rounds * len(full.widths) * full.epochs == 100
    assert list(full.operations) == ["separable3", "dilated3", "separable5", "dilated5"]
    short = replace(
        full, channels=(2, 2), widths=(1, 1), reduced=(1,), new=(1, 1), rounds=1, epochs=1, steps=1, repeats=(1, 2),
        final_channels=(2, 2), final_widths=(1, 1), last=1, controls=1, samples=10,
    )  # fmt: skip
    monkeypatch.setattr(firefly_cells, "FULL", short)
    found = whole(firefly_cells.run, tmp_path)
    assert found.columns[-1] == "separable3 / dilated3 / separable5 / dilated5 / identity"
    choice = [dict.fromkeys(firefly_cells.edges(), "identity")] * 2
    network = firefly_cells.stack(short, (3, 8, 8), 0, choice)
    assert [network.groups[f"c{n}_out"].shape[1] for n in range(3)] == [8, 4, 4]  # a repeated cell halves once


def test_rbf_needs_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    one = firefly_rbf._one
    monkeypatch.setattr(
        firefly_rbf, "_one", lambda m, s, neurons, iterations: asked.append((neurons, iterations)) or one(m, s, 2, 2)
    )
    with pytest.raises(ValueError):  # the picture has twelve phases, these runs two
        firefly_rbf.run(Setting((0,), tmp_path, full=True, progress=False))
    assert set(asked) == {(12, 10_000)}


def test_gradmax(stored: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bases = gradmax_images.bases(True)
    assert {n: (p.data, p.epochs, p.batch_size, p.rate) for n, p in bases.items() if p.data != "ImageNet"} == {
        "vgg": ("CIFAR10", 200, 128, 0.05),
        "wrn": ("CIFAR10", 200, 128, 0.1),
        "wrn CIFAR-100": ("CIFAR100", 200, 128, 0.1),
    }
    assert (bases["mobilenet"].batch_size, bases["mobilenet"].width) == (512, 32)
    few = {"epochs": 2, "growths": 1, "batch_size": 10, "steps": 1, "until": 0.5, "whole": False}
    short = {n: replace(p, width=4, **few) for n, p in bases.items()}
    del short["wrn"]  # its table 2 is what the tests of the default setting run
    monkeypatch.setattr(gradmax_images, "bases", lambda full: short)
    monkeypatch.setenv("IRGROW_DATA", str(tmp_path / "absent"))
    found = whole(gradmax_images.run, tmp_path)
    assert {row[0].split(",")[0] for row in found.rows} == {"vgg", "wrn CIFAR-100", "vgg BN"}
    assert any("left out: --full: ImageNet: found no images" in note for note in found.notes)

    class Stream:
        side, classes = 32, 3

        def __init__(self, train: bool) -> None:
            self.train = train

        def __len__(self) -> int:
            return 12

        def __iter__(self) -> Any:
            draw = torch.Generator().manual_seed(int(self.train))
            return iter([(torch.rand(6, 3, 32, 32, generator=draw), torch.arange(6) % 3) for _ in range(2)])

    monkeypatch.setattr(full_data, "imagenet", lambda size: (Stream(True), Stream(False)))
    monkeypatch.setattr(gradmax_images, "replace", lambda value, **change: value)
    plan = replace(short["mobilenet"], batch_size=6, width=8)
    first, second = gradmax_images.run_one(plan, 0), gradmax_images.run_one(plan, 0)
    assert first == second and len(first["jumps"]) == 1 and 0 <= first["accuracy"] <= 1


def test_cnn_to_fcn(stored: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "CIFAR10", (8, 8, 3))
    monkeypatch.setattr(cnn_to_fcn, "FULL", replace(cnn_to_fcn.FULL, channels=(1,), relax=(0, 1), epochs=1,
                                                    samples=20, batch_size=10, curvature_on=2))  # fmt: skip
    found = whole(cnn_to_fcn.run, tmp_path)
    assert found.data["runs"][0]["cnn"]["parameters"] > 0


def test_tiny(stored: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "CIFAR100", (4, 4, 3))
    full = tiny_resnet.FULL
    assert full.growths * full.units == len(full.sites) * 64 and list(full.sites.values())[-1] == 8
    short = replace(full, channels=(64, 128), blocks=1, growths=2, train=20)
    monkeypatch.setattr(tiny_resnet, "FULL", short)
    found = whole(tiny_resnet.run, tmp_path)
    assert found.rows[0][1] > 64 * 128
    tasks = tiny_methods.tasks(True)
    assert sum(name.startswith("block") for name in tasks["CIFAR-100"][0](0).groups) == 2
    assert tasks["CIFAR-100"][3]["sites"] == ("inside1", "inside2")
    few = {"budget": 5e7, "growths": 1, "sites": ("inside1",), "batch_size": 4, "samples": 20}
    monkeypatch.setattr(tiny_methods, "tasks", lambda full: {"digits": (*tasks["CIFAR-100"][:3], few)})
    methods = {name: replace(how, units=2) for name, how in tiny_methods.METHODS.items()}
    whole(lambda setting: tiny_methods.run(setting, methods), tmp_path)


def sentences(folder: Path) -> None:
    """AG News and CoLA as `save_to_disk` writes them."""
    datasets = pytest.importorskip("datasets")
    words = ("The stocks fell", "A cat sat", "Who won the game", "New chips are fast")
    for name, part, column in (("ag_news", "test", "text"), ("cola", "validation", "sentence")):
        classes = 4 if name == "ag_news" else 2
        tables = {
            p: datasets.Dataset.from_dict({column: list(words), "label": [i % classes for i in range(4)]})
            for p in ("train", part)
        }
        datasets.DatasetDict(tables).save_to_disk(str(folder / name))


def test_words_become_inputs() -> None:
    found = flatness.words_in(["The cat, the CAT!", "", "cat"])
    assert found.shape == (3, flatness.WORDS) and found.sum(1).tolist() == [2.0, 0.0, 1.0]
    assert bool((found[0] >= found[2]).all())


def test_flatness(stored: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flatness, "data_of", flatness.data_of.__wrapped__)
    monkeypatch.setattr(full_data, "sentences", lambda name: ((["a b", "c"] * 4, torch.arange(8) % 4),) * 2)
    monkeypatch.setattr(flatness, "WORDS", 40)
    monkeypatch.setitem(SHAPES, "MNIST", (6, 6))
    short = tuple(
        replace(p, hidden=10, insertions=((1, 10),), target=9.0, limit=2, measured_on=8, batch_sizes=(4, 8))
        for p in flatness.FULL[1::2]
    )
    monkeypatch.setattr(flatness, "FULL", short)
    found = whole(flatness.run, tmp_path)
    assert {row[0] for row in found.rows} == {"MNIST-10", "AG News-10"}
    papers = {c.name: c.paper for c in found.claims}
    assert papers["MNIST-batch-grown"] == "40.2" and papers["AG News-batch-a"] == "20.3"
    assert papers["flatter-AG News-10-4"] == "5.7 (6.0, 12.3)"


def test_some_data_is_enough(stored: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flatness, "data_of", flatness.data_of.__wrapped__)
    monkeypatch.setitem(sys.modules, "datasets", None)
    short = tuple(replace(p, hidden=10, insertions=(), fixed=("a",), limit=1, batch_sizes=(20,)) for p in
                  flatness.FULL[::2])  # fmt: skip
    monkeypatch.setattr(flatness, "budget", lambda *sizes: [])
    found = flatness.run(Setting((0,), tmp_path, full=True, progress=False), short)
    assert {row[0] for row in found.rows} == {"MNIST-10"}
    assert any("left out: --full: ag_news: found no working datasets" in note for note in found.notes)


def test_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("transformers")
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a", "b", "c", "t", "s", "Ġ"]
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    library.RobertaTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt")).save_pretrained(
        folder
    )
    plan = flatness_head.Plan(neurons=16, hidden=16, layers=1, tokens=60, length=60)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flatness_head.encoder(plan).save_pretrained(folder)
    texts = (["a cat", "b sat", "cats", "a b c"], torch.tensor([0, 1, 0, 1]))
    monkeypatch.setattr(full_data, "sentences", lambda name: (texts, texts))
    assert flatness_head.FULL.weights == "roberta-large" and flatness_head.FULL.neurons == 1024
    short = replace(flatness_head.FULL, weights=str(folder), neurons=16, hidden=16, epochs=8, measured_on=4)
    monkeypatch.setattr(flatness_head, "FULL", short)
    found = whole(flatness_head.run, tmp_path)
    claims = {c.name: c.status for c in found.claims}
    assert claims["reload"] == claims["parameters"] == "holds"
    monkeypatch.setattr(flatness_head, "FULL", replace(short, weights=str(tmp_path / "absent")))
    with pytest.raises(MissingData, match="absent: found no weights .* run hf download"):
        whole(flatness_head.run, tmp_path)


# ---- files as the libraries keep them -------------------------------------------------------------------------


def vision() -> Any:
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"no working torchvision: {error}")
    return torchvision


def keep(name: str, root: Path) -> None:
    """The pixels of `pixels` in the files that torchvision reads."""
    for train in (True, False):
        data, labels = pixels(name, train)
        if name.endswith("MNIST"):
            folder = root / name / "raw"
            folder.mkdir(parents=True, exist_ok=True)
            stem = "train" if train else "t10k"
            for kind, dims, bytes_ in (("images-idx3", data.shape, data), ("labels-idx1", (len(data),), labels)):
                head = struct.pack(f">4B{len(dims)}I", 0, 0, 8, len(dims), *dims)
                (folder / f"{stem}-{kind}-ubyte").write_bytes(head + np.array(bytes_, np.uint8).tobytes())
                gzip.open(folder / f"{stem}-{kind}-ubyte.gz", "w").close()
        elif name == "SVHN":
            from scipy.io import savemat

            answers = np.where(np.array(labels) == 0, 10, labels).reshape(-1, 1)
            savemat(root / f"{'train' if train else 'test'}_32x32.mat", {"X": data.transpose(2, 3, 1, 0), "y": answers})
        else:
            folder = root / ("cifar-10-batches-py" if name == "CIFAR10" else "cifar-100-python")
            folder.mkdir(parents=True, exist_ok=True)
            key = "labels" if name == "CIFAR10" else "fine_labels"
            files = (["train"] if train else ["test"]) if name == "CIFAR100" else (
                [f"data_batch_{n}" for n in range(1, 6)] if train else ["test_batch"])  # fmt: skip
            rows = data.transpose(0, 3, 1, 2).reshape(len(data), -1)
            step = len(data) // len(files)
            for n, file in enumerate(files):
                part = slice(n * step, (n + 1) * step)
                (folder / file).write_bytes(pickle.dumps({"data": rows[part], key: labels[part]}))
            meta = "batches.meta" if name == "CIFAR10" else "meta"
            names = "label_names" if name == "CIFAR10" else "fine_label_names"
            (folder / meta).write_bytes(pickle.dumps({names: list(map(str, range(max(labels) + 1)))}))


@pytest.mark.parametrize("name", list(SHAPES))
def test_torchvisions_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = vision().datasets
    with pytest.raises(MissingData, match=f"--full: {name}: found no data in .* import {name} as d; "):
        full_data.images(name, tmp_path)
    keep(name, tmp_path)
    for module in (datasets.cifar, datasets.svhn):  # these files have other sums than the real ones
        monkeypatch.setattr(module, "check_integrity", lambda path, *_: Path(path).exists())
    for train, (x, y) in zip((True, False), full_data.images(name, tmp_path), strict=True):
        data, labels = pixels(name, train)
        assert y.tolist() == labels
        like = data[:, None] if data.ndim == 3 else data if name == "SVHN" else data.transpose(0, 3, 1, 2)
        assert np.array_equal((255 * x).round().numpy(), like)


def test_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_data, "READERS", 0)
    monkeypatch.setattr(full_data, "_library", lambda *_: None)
    with pytest.raises(MissingData, match=r"ImageNet: found no images in .*train/.*unpack ILSVRC2012"):
        full_data.imagenet(4, tmp_path)
    monkeypatch.undo()
    vision()
    monkeypatch.setattr(full_data, "READERS", 0)
    from PIL import Image

    for part in ("train", "val"):
        for kind in ("cat", "dog"):
            folder = tmp_path / "imagenet" / part / kind
            folder.mkdir(parents=True)
            for n in range(3):
                Image.fromarray(np.full((40, 50, 3), 40 * n, np.uint8)).save(folder / f"{n}.JPEG")
    train, test = (replace(p, side=32) for p in full_data.imagenet(4, tmp_path))
    assert (len(train), train.classes) == (6, 2)
    state = torch.random.get_rng_state()
    first, second = list(train), list(train)
    assert [len(y) for _, y in first] == [4, 2] and first[0][0].shape == (4, 3, 32, 32)
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, second, strict=True))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.cat([y for _, y in test]).tolist() == [0, 0, 0, 1, 1, 1]


def test_datasets_files(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(MissingData, match=r"ag_news: found no data in .*save_to_disk"):
        full_data.sentences("ag_news", tmp_path)
    sentences(tmp_path)
    (texts, labels), _ = full_data.sentences("ag_news", tmp_path)
    assert texts[1] == "A cat sat" and labels.tolist() == [0, 1, 2, 3]
    assert full_data.sentences("cola", tmp_path)[1][1].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    "experiment",
    [firefly_widen, firefly_deepen, firefly_continual, firefly_cells, gradmax_images, flatness, cnn_to_fcn, tiny_resnet,
     tiny_methods],
)  # fmt: skip
def test_missing_data_says_what_to_do(experiment: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingData, match=r"--full: \w+: found no working \w+ .* pip install (torchvision|datasets)"):
        experiment.run(Setting((0,), tmp_path, full=True, progress=False))
