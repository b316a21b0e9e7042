"""NORTH's trigger: grow where the activations of a group use (nearly) all of its width."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from irgrow.growth.candidates import Candidates
from irgrow.growth.data import Data, batches
from irgrow.growth.probe import Recordable, evaluating
from irgrow.growth.when import Moment
from irgrow.ir.errors import BadData, Refused
from irgrow.ir.network import Network
from irgrow.kernels.outer import accumulate_gram, mirror
from irgrow.runtime.model import CompiledNetwork


def effective_rank(second_moment: Tensor, *, threshold: float = 0.01, absolute: bool = False) -> int:
    """How many singular values of A / sqrt(n) exceed the threshold, from E[a a^T] `[units, units]`.

    Relative to the largest, so that a layer's scale does not matter; `absolute`: above the number itself, as
    the authors of NORTH count (there 0.01).
    """
    values = torch.linalg.eigvalsh(second_moment.double()).clamp(min=0.0).sqrt()
    limit = threshold if absolute else threshold * float(values[-1])
    return int((values > limit).sum())


def effective_ranks(
    model: Recordable,
    data: Data,
    groups: Iterable[str],
    *,
    threshold: float = 0.01,
    absolute: bool = False,
    batch_size: int = 1024,
) -> dict[str, int]:
    """The effective rank of each group's activations on the data, in eval mode; on images every position counts.

    BadData for no samples, or for NaN or infinity.
    """
    names = tuple(groups)
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(names, 0)
    device = next(iter(model.structure.tensors().values())).device
    for inputs, _ in batches(data, batch_size, "effective_ranks"):
        with evaluating(model), torch.no_grad():
            values = model.record(*(x.to(device) for x in inputs), values=names)[1]
        for name in names:
            value = values[name].double()
            if not bool(torch.isfinite(value).all()):
                raise BadData(f"effective_ranks: group {name!r}: activations", "NaN or infinity", "finite values")
            rows = value.reshape(value.shape[0], value.shape[1], -1).mT.reshape(-1, value.shape[1])
            total = sums.setdefault(name, rows.new_zeros(rows.shape[1], rows.shape[1]))
            accumulate_gram(total, rows)
            counts[name] += rows.shape[0]
    if not all(counts.values()):
        raise BadData("effective_ranks: data", "no samples", "at least one")
    return {n: effective_rank(mirror(sums[n]) / counts[n], threshold=threshold, absolute=absolute) for n in names}


@dataclass(frozen=True, eq=False)
class FullRank:
    """When and where to grow: where the effective rank of a site is at least `share` of its width.

        full = ig.FullRank(data)
        growth = ig.Growth(when=full, where=full, how=ig.North(2))     # grows every site that is full

    `data` are the samples to look at (`(inputs, targets)` or batches). Looks every `epochs` epochs; at most
    `times` times. `ranks(network)` says what it sees. threshold and absolute as in `effective_rank`.
    Source: Maile et al., NORTH, arXiv:2202.08539.
    """

    data: Data
    share: float = 0.95
    threshold: float = 0.01
    absolute: bool = False
    epochs: int = 1
    times: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or not self.threshold > 0 or self.epochs < 1:
            raise Refused(
                "FullRank",
                f"share={self.share}, threshold={self.threshold}, epochs={self.epochs}",
                "0 < share <= 1, a positive threshold, at least 1 epoch",
            )

    def ranks(self, network: Network, groups: Iterable[str]) -> Mapping[str, int]:
        """The effective rank of each of these groups."""
        return effective_ranks(
            CompiledNetwork(network), self.data, groups, threshold=self.threshold, absolute=self.absolute
        )

    def due(self, moment: Moment) -> bool:
        """True if a site that could grow is full."""
        if not moment.epoch_ended or moment.epoch % self.epochs:
            return False
        if self.times is not None and moment.growths >= self.times:
            return False
        return bool(self.choose(moment.candidates))

    def choose(self, candidates: Candidates) -> list[str]:
        """The sites that are full, in the order of the network's groups."""
        network = candidates.network
        found = self.ranks(network, [name for name in candidates.sites if name in network.groups])
        return [name for name, rank in found.items() if rank >= self.share * network.groups[name].units]
