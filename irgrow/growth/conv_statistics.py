"""Statistics of image sites: sums over positions, exact at borders and for any stride, padding and dilation.

For a leaving convolution, tap t of target position r reads position q(r, t) of the grown group, and

    M_prev[:, (o, t)] = E sum_r b(q(r, t)) g_o(r)

is the map from new fan-out filters to the gradient of the new fan-in filters (times the slope): exact, where
patches of size k1 + k2 - 1 of the auxiliary gradient (GradMax, appendix B) are only exact without padding or
with a 1x1 kernel. Where an image is flattened into a dense bundle, every position is a tap.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from irgrow.growth.geometry import Exit, Geometry
from irgrow.growth.moments import Sums

MEMORY = 1 << 26  # numbers of unfolded patches held at once, about


def add_image_moments(sums: Sums, values: Mapping[str, Tensor], g: Mapping[str, Tensor], count: int) -> None:
    """Adds one batch of an image site; values and gradients `[B, C, H, W]` (flat targets: `[B, O]`)."""
    step = max(1, MEMORY // _numbers(sums))
    for first in range(0, count, step):
        part = slice(first, first + step)
        _add(sums, {n: v[part] for n, v in values.items()}, {n: v[part] for n, v in g.items()})


def _add(sums: Sums, values: Mapping[str, Tensor], g: Mapping[str, Tensor]) -> None:
    geometry, want = sums.geometry, sums.want
    features: dict[str, Tensor] = {}
    if {"S", "M_prev", "C"} & want:
        features = _features(sums, values)
    if "S" in want:
        for exit, windows in geometry.places:
            b = features[exit] if windows is None else windows.pick(features[exit], windows.centre)
            sums.gram("S", _rows(b), 1.0 / len(geometry.places))
    gradients = {
        t.name: g[t.name].reshape(-1, t.outputs, _positions(geometry, t.name, t.shared))
        for t in geometry.targets
        if t.name in g
    }
    fed = _feeding(geometry, values, g) if {"S_in", "M", "C"} & want else {}
    sums.add_targets({n: _rows(c) for n, c in fed.items()}, {n: _rows(v) for n, v in gradients.items()})
    if not {"M_prev", "C"} & want:
        return
    for at, way in enumerate(geometry.exits):
        b = _by_tap(way, features[way.group])
        if "M_prev" in want:
            product = _summed(b, gradients[way.target])  # [F * taps, O]
            product = product.reshape(sums.features, way.block.taps, way.block.outputs).mT
            sums.put("M_prev", product.reshape(sums.features, -1), columns=sums.columns("M_prev", at))
        if "C" in want:
            product = _summed(b, fed[way.target]).reshape(sums.features, -1)
            sums.put("C", product, columns=sums.columns("C", at))


def _features(sums: Sums, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """b at every exit group: `[B, F, H, W]`, the constant 1 last."""
    geometry = sums.geometry
    shape = {name: geometry.network.groups[name].shape[1:] for name in geometry.site.groups}
    parts: list[tuple[int, dict[str, Tensor]]] = []
    for entry in geometry.entries:
        assert entry.windows is not None
        patches = entry.windows.unfold(values[entry.source])
        patches = patches.reshape(*patches.shape[:2], *shape[entry.group])
        parts.append((entry.block.width, geometry.carry(entry.group, patches)))
    like = parts[0][1][geometry.entries[0].group]
    if sums.bias:
        total: dict[str, Tensor] = {}
        for group in geometry.biased or (geometry.entries[0].group,):
            ones = like.new_ones(like.shape[0], 1, *shape[group])
            for name, value in geometry.carry(group, ones).items():
                total[name] = value if name not in total else total[name] + value
        parts.append((1, total))
    found = {}
    for exit in dict.fromkeys(way.group for way in geometry.exits):
        zeros = like.new_zeros(like.shape[0], 1, *shape[exit])
        columns = [part.get(exit, zeros.expand(-1, width, -1, -1)) for width, part in parts]
        found[exit] = columns[0] if len(columns) == 1 else torch.cat(columns, 1)
    return found


def _feeding(geometry: Geometry, values: Mapping[str, Tensor], g: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """c of every target: `[B, c, positions]`, one position where the target is flat."""
    found = {}
    like = next(iter([*values.values(), *g.values()]))
    for target in geometry.targets:
        positions = _positions(geometry, target.name, target.shared)
        parts = []
        for f in target.feeding:
            x = values[f.source]
            parts.append(x.reshape(x.shape[0], -1, 1) if f.windows is None else f.windows.unfold(x))
        if target.bias:
            parts.append(like.new_ones(like.shape[0], 1, positions))
        found[target.name] = torch.cat(parts, 1) if parts else like.new_zeros(like.shape[0], 0, positions)
    return found


def _by_tap(way: Exit, b: Tensor) -> Tensor:
    """`[B, F * taps, positions]`: what each tap of the leaving bundle reads of `b [B, F, H, W]`."""
    if way.windows is None:
        return b.reshape(b.shape[0], -1, 1)
    if way.block.tap is not None:
        return way.windows.pick(b, way.block.tap).flatten(2)
    return way.windows.unfold(b)


def _positions(geometry: Geometry, target: str, shared: bool) -> int:
    return geometry.network.groups[target].positions if shared else 1


def _rows(x: Tensor) -> Tensor:
    """`[B, width, *positions]` as rows `[B * positions, width]`."""
    return x.flatten(2).mT.reshape(-1, x.shape[1])


def _summed(x: Tensor, y: Tensor) -> Tensor:
    """sum over samples and positions of x y^T: `[B, X, R]`, `[B, Y, R]` -> `[X, Y]`."""
    if x.shape[2] == 1:
        return x[:, :, 0].mT @ y[:, :, 0]
    return torch.bmm(x, y.mT).sum(0, dtype=torch.float64)


def _numbers(sums: Sums) -> int:
    """How many numbers of patches one sample needs."""
    geometry = sums.geometry
    groups = geometry.network.groups
    most = sum(sums.features * groups[name].positions for name in geometry.site.groups)
    for way in geometry.exits:
        most += sums.features * way.block.taps * (groups[way.target].positions if way.windows else 1)
    for target in geometry.targets:
        most += target.width * (groups[target.name].positions if target.shared else 1)
    return most
