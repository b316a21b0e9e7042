"""The papers' own image data for `--full`, read through torchvision from a local folder; nothing is downloaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from irgrow.experiments.reproduce import MissingData

Split = tuple[Tensor, Tensor]
FOLDER = "IRGROW_DATA"  # a variable that names another folder than ./data


def images(name: str, folder: Path | None = None) -> tuple[Split, Split]:
    """Training and test data of `MNIST` or `CIFAR10`: images `[n, C, H, W]` in [0, 1] (float32), labels `[n]`.

    folder: default $IRGROW_DATA, else `data`. Raises MissingData, saying what is missing and how to get it.
    """
    root = folder or Path(os.environ.get(FOLDER, "data"))
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:  # RuntimeError: one built for another torch
        raise MissingData(
            f"--full: {name}", f"no working torchvision ({error})", "torchvision", do="pip install torchvision"
        ) from None
    parts = []
    for train in (True, False):
        try:
            part: Any = getattr(torchvision.datasets, name)(str(root), train=train, download=False)
        except RuntimeError as error:
            raise MissingData(
                f"--full: {name}",
                f"no data in {root}/ ({error})",
                f"the files as torchvision keeps them, in {root}/ or the folder that {FOLDER} names",
                do=f"run python -c \"import torchvision; torchvision.datasets.{name}('{root}', download=True)\"",
            ) from None
        pixels = torch.as_tensor(np.asarray(part.data)).float() / 255
        pixels = pixels[:, None] if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2).contiguous()
        parts.append((pixels, torch.as_tensor(part.targets).long()))
    return parts[0], parts[1]
