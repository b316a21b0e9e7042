"""The papers' own data for `--full`, read from a local folder through torchvision and datasets; nothing is downloaded.

$IRGROW_DATA, or ./data
    MNIST/  FashionMNIST/  cifar-10-batches-py/  cifar-100-python/      as torchvision keeps them
    train_32x32.mat  test_32x32.mat                                     SVHN, the same
    imagenet/train/<class>/*  imagenet/val/<class>/*                    ImageNet, as images
    ag_news/  cola/                                                     as `save_to_disk` of datasets writes them
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from irgrow.experiments.reproduce import MissingData

T = TypeVar("T")
Split = tuple[Tensor, Tensor]
FOLDER = "IRGROW_DATA"  # a variable that names another folder than ./data
SENTENCES = {  # the name of datasets, its two parts, the column of the text
    "ag_news": ("'fancyzhx/ag_news'", ("train", "test"), "text"),
    "cola": ("'nyu-mll/glue', 'cola'", ("train", "validation"), "sentence"),
}
READERS = 4  # processes that read ImageNet


def those_present(names: Iterable[str], read: Callable[[str], T]) -> tuple[dict[str, T], list[str]]:
    """What `read(name)` gives for every name whose data is there, and a text for each that is missing.

    Raises the first MissingData if nothing is there.
    """
    found: dict[str, T] = {}
    missing: list[MissingData] = []
    for name in names:
        try:
            found[name] = read(name)
        except MissingData as error:
            missing.append(error)
    if missing and not found:
        raise missing[0]
    return found, [f"left out: {error}" for error in missing]


def images(name: str, folder: Path | None = None) -> tuple[Split, Split]:
    """Training and test data of MNIST, FashionMNIST, SVHN, CIFAR10, CIFAR100: images `[n, C, H, W]` in [0, 1], labels.

    float32 and int64. folder: default $IRGROW_DATA, else `data`. Raises MissingData, saying what is missing and how
    to get it.
    """
    root, vision = _root(folder), _library("torchvision", name)
    parts = []
    for train in (True, False):
        kind, word = ("split", "train" if train else "test") if name == "SVHN" else ("train", train)
        try:
            part: Any = getattr(vision.datasets, name)(str(root), **{kind: word}, download=False)
        except RuntimeError as error:
            words = ("train", "test") if name == "SVHN" else (True,)
            calls = "; ".join(f"d('{root}', {kind}={word!r}, download=True)" for word in words)
            raise MissingData(
                f"--full: {name}",
                f"no data in {root}/ ({error})",
                f"the files as torchvision keeps them, in {root}/ or the folder that {FOLDER} names",
                do=f'run python -c "from torchvision.datasets import {name} as d; {calls}"',
            ) from None
        pixels = torch.as_tensor(np.asarray(part.data)).float() / 255
        if pixels.dim() == 3:
            pixels = pixels[:, None]
        elif name != "SVHN":
            pixels = pixels.permute(0, 3, 1, 2).contiguous()
        parts.append((pixels, torch.as_tensor(part.labels if name == "SVHN" else part.targets).long()))
    return parts[0], parts[1]


@dataclass(frozen=True)
class Photographs:
    """ImageNet's batches `(images [n, 3, side, side], labels [n])`, read anew every time they are gone through.

    Training images are cropped at random and mirrored, and come in an order of their own for every `seed`; test
    images are cut from the middle. Images are standardised.
    """

    folder: Path
    train: bool
    batch_size: int
    side: int = 224
    seed: int = 0

    def __len__(self) -> int:
        return len(self._files())

    @property
    def classes(self) -> int:
        """How many folders there are."""
        return len(self._files().classes)

    def __iter__(self) -> Iterator[Split]:
        draw = torch.Generator().manual_seed(self.seed)
        reader: Any = torch.utils.data.DataLoader(
            self._files(), self.batch_size, shuffle=self.train, num_workers=READERS, generator=draw
        )
        with torch.random.fork_rng():  # the crops draw from the global generator
            torch.manual_seed(self.seed)
            yield from reader

    def _files(self) -> Any:
        vision = _library("torchvision", "ImageNet")
        t = vision.transforms
        if self.train:
            cut = [t.RandomResizedCrop(self.side), t.RandomHorizontalFlip()]
        else:
            cut = [t.Resize(self.side * 8 // 7), t.CenterCrop(self.side)]
        scale = t.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        return vision.datasets.ImageFolder(str(self.folder), t.Compose([*cut, t.ToTensor(), scale]))


def imagenet(batch_size: int, folder: Path | None = None) -> tuple[Photographs, Photographs]:
    """Training and test images; MissingData says where they belong."""
    root = _root(folder) / "imagenet"
    _library("torchvision", "ImageNet")
    for part in ("train", "val"):
        if not any((root / part).glob("*/*")):
            raise MissingData(
                "--full: ImageNet",
                f"no images in {root / part}/",
                f"{root}/train/<class>/*.JPEG and {root}/val/<class>/*.JPEG, or the folder `imagenet` in that which "
                f"{FOLDER} names",
                do="unpack ILSVRC2012 there (image-net.org gives it out after registration)",
            )
    return Photographs(root / "train", True, batch_size), Photographs(root / "val", False, batch_size)


def sentences(name: str, folder: Path | None = None) -> tuple[tuple[list[str], Tensor], tuple[list[str], Tensor]]:
    """Training and test texts of `ag_news` or `cola` (whose test labels are not public: its validation part)."""
    known, parts, column = SENTENCES[name]
    place, library = _root(folder) / name, _library("datasets", name)
    try:
        stored = library.load_from_disk(str(place))
    except (OSError, ValueError) as error:
        raise MissingData(
            f"--full: {name}",
            f"no data in {place}/ ({str(error).splitlines()[0]})",
            f"what save_to_disk of datasets writes, in {place}/ or the folder that {FOLDER} names",
            do=f"run python -c \"import datasets; datasets.load_dataset({known}).save_to_disk('{place}')\"",
        ) from None
    first, second = ((list(stored[p][column]), torch.tensor(list(stored[p]["label"]))) for p in parts)
    return first, second


def _root(folder: Path | None) -> Path:
    return folder or Path(os.environ.get(FOLDER, "data"))


def _library(name: str, who: str) -> Any:
    """The optional package; MissingData where it does not load."""
    try:
        return __import__(name)
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        raise MissingData(f"--full: {who}", f"no working {name} ({error})", name, do=f"pip install {name}") from None
