"""What enters one group of a site: its features as rows, and the units that already stand there.

For methods that compare new units with old ones (NORTH, copies, splitting). The pre-activations of the old
units are `rows @ weights.mT`: one row per sample and position, one column per fan-in weight, the bias last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from irgrow.growth.data import Data, batches
from irgrow.growth.geometry import Geometry
from irgrow.growth.probe import Recordable, evaluating
from irgrow.ir.errors import BadData, Refused
from irgrow.ir.network import Group, Network
from irgrow.ir.pattern import Sparse
from irgrow.ir.site import Site
from irgrow.kernels.outer import accumulate_gram, mirror

MEMORY = 1 << 25  # numbers of features held at once, about


@dataclass(frozen=True, eq=False)
class Entrance:
    """The one group where a site is entered. Raises Refused where there are several, or a norm across units."""

    who: str
    network: Network
    site: str
    bias: bool = True  # whether the constant 1 is the last feature

    @cached_property
    def geometry(self) -> Geometry:
        geometry = Geometry(self.network, Site.of(self.network, self.site))
        groups = dict.fromkeys(e.group for e in geometry.entries)
        if len(groups) > 1:
            raise Refused(
                self.who,
                f"a site that is entered at {len(groups)} groups ({', '.join(groups)})",
                "one group where all of a unit's fan-in arrives",
                do="use Random, GradMax or Tiny there",
            )
        assert geometry.slopes  # refuses norms across units
        return geometry

    @property
    def group(self) -> Group:
        """The group whose pre-activations the fan-in makes."""
        return self.network.groups[self.geometry.entries[0].group]

    @property
    def flat(self) -> bool:
        return self.geometry.entries[0].windows is None

    @property
    def sources(self) -> tuple[str, ...]:
        """The groups whose activations are the features."""
        return tuple(dict.fromkeys(e.source for e in self.geometry.entries))

    @property
    def width(self) -> int:
        """How many features there are, the constant 1 included."""
        return sum(e.block.width for e in self.geometry.entries) + self.bias

    @cached_property
    def weights(self) -> Tensor:
        """The fan-in of the units that stand there, `[units, width]` in float64."""
        parts = []
        for entry in self.geometry.entries:
            bundle = self.network.bundles[entry.block.name.removeprefix("weight.")]
            weight = bundle.weight.detach().double()
            if isinstance(bundle.pattern, Sparse):
                whole = weight.new_zeros(self.group.units, entry.block.width)
                at = (bundle.pattern.target, bundle.pattern.source, bundle.pattern.index)
                t, s, w = (torch.from_numpy(i).long().to(weight.device) for i in at)
                parts.append(whole.index_put((t, s), weight[w], accumulate=True))
            else:
                parts.append(weight.reshape(self.group.units, -1))
        if self.bias:
            bias = self.group.bias
            parts.append(parts[0].new_zeros(self.group.units, 1) if bias is None else bias.detach().double()[:, None])
        return torch.cat(parts, 1)

    def rows(self, values: dict[str, Tensor]) -> Tensor:
        """The features `[samples * positions, width]` in float64, from activations by group (positions fastest)."""
        parts = []
        for entry in self.geometry.entries:
            x = values[entry.source].detach()
            if entry.windows is None:
                parts.append(x.reshape(x.shape[0], -1))
            else:
                parts.append(entry.windows.unfold(x).mT.reshape(-1, entry.block.width))
        if self.bias:
            parts.append(parts[0].new_ones(parts[0].shape[0], 1))
        return torch.cat(parts, 1).double()

    @property
    def batch_size(self) -> int:
        """How many samples at once, so that rows stay below a few hundred megabytes."""
        return max(1, min(1024, MEMORY // (self.group.positions * self.width)))

    def second_moment(self, model: Recordable, data: Data) -> Tensor:
        """E[b b^T] over rows, `[width, width]` in float64."""
        total = torch.zeros(self.width, self.width, dtype=torch.float64)
        count = 0
        for values in self.batches(model, data):
            b = self.rows(values)
            total = total.to(b.device)
            accumulate_gram(total, b)
            count += b.shape[0]
        return mirror(total) / count

    def batches(self, model: Recordable, data: Data, *also: str) -> Iterator[dict[str, Tensor]]:
        """Activations of the sources (and of groups `also`), batch by batch, in eval mode; BadData for no samples."""
        device = next(iter(self.network.tensors().values())).device
        found = False
        for inputs, _ in batches(data, self.batch_size, self.who):
            if inputs[0].shape[0] == 0:
                continue
            found = True
            with evaluating(model), torch.no_grad():
                values = model.record(*(x.to(device) for x in inputs), values=(*self.sources, *also))[1]
            for name, value in values.items():
                if not bool(torch.isfinite(value).all()):
                    raise BadData(f"{self.who}: group {name!r}: activations", "NaN or infinity", "finite values")
            yield values
        if not found:
            raise BadData(f"{self.who}: data", "no samples", "at least one")
