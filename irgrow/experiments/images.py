"""Small images to grow networks on: scikit-learn's digits, training on them, and what growing costs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from irgrow.experiments import digits
from irgrow.growth.fit import accuracy
from irgrow.runtime.model import CompiledNetwork

Data = tuple[Tensor, Tensor]
BATCH = 64


def load(side: int = 8) -> tuple[Data, Data]:
    """Training and test images `[n, 1, side, side]` in [0, 1], labels `[n]`; pixels are repeated side / 8 times."""
    parts = []
    for x, y in digits.load():
        image = x.reshape(-1, 1, 8, 8)
        parts.append((image.repeat_interleave(side // 8, 2).repeat_interleave(side // 8, 3), y))
    return parts[0], parts[1]


def train(
    model: CompiledNetwork, optimizer: torch.optim.Optimizer, data: Data, epochs: int, draw: torch.Generator
) -> float:
    """The model has trained on `data` for so many epochs; the mean loss of the last one."""
    x, y = data
    model.train()
    total = 0.0
    for _ in range(epochs):
        total = 0.0
        for index in torch.randperm(len(y), generator=draw).split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[index]), y[index])
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(index) / len(y)
    model.eval()
    return total


def score(model: CompiledNetwork, data: Data) -> float:
    """Accuracy in eval mode."""
    found = accuracy(model, data)
    assert found is not None
    return found


class Counted:
    """Cross entropy that counts the samples it was computed for: what growing costs, the same on every machine."""

    def __init__(self) -> None:
        self.samples = 0

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.samples += len(targets)
        return F.cross_entropy(outputs, targets)


@dataclass
class Path:
    """How one network grew: after every phase its accuracy, parameters and structure; what the growths cost."""

    method: str
    seed: int
    accuracy: list[float] = field(default_factory=list)
    parameters: list[int] = field(default_factory=list)
    structure: list[str] = field(default_factory=list)
    samples: int = 0  # for which a loss was computed while growing
    seconds: float = 0.0  # spent growing
    notes: list[str] = field(default_factory=list)

    def note(self, model: CompiledNetwork, test: Data, structure: str) -> None:
        """The end of a phase."""
        self.accuracy.append(score(model, test))
        self.parameters.append(model.structure.counts.parameters)
        self.structure.append(structure)
