"""Statistics of image sites: sums over positions, exact at borders and for any stride, padding and dilation.

For a leaving convolution, tap t of target position r reads position q(r, t) of the grown group, and

    M_prev[:, (o, t)] = E sum_r b(q(r, t)) g_o(r)

is the map from new fan-out filters to the gradient of the new fan-in filters (times the slope): exact, where
patches of size k1 + k2 - 1 of the auxiliary gradient (GradMax, appendix B) are only exact without padding or
with a 1x1 kernel. Where an image is flattened into a dense bundle, every position is a tap.

Nothing is unfolded for a convolution that leaves: the gradient is spread back over the positions each tap read
(and along the site, through pooling), which makes M_prev the weight gradient of a convolution with O * taps
outputs; S, S_in and M are products of patches by shifts (irgrow.kernels.patches). N is M_prev once more, with
g + dW* c in place of -g. Only C, the mean over several exits, and pooled features unfold, a few samples at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from irgrow.growth.geometry import Exit, Target
from irgrow.growth.moments import Sums
from irgrow.growth.windows import Windows
from irgrow.kernels.outer import accumulate
from irgrow.kernels.patches import patch_cross
from irgrow.kernels.patches_through import through_cross

MEMORY = 1 << 26  # numbers held at once, about
PER_MULTIPLY = 0.03  # what a multiply-add costs beside a number read or written


def add_image_moments(sums: Sums, values: Mapping[str, Tensor], g: Mapping[str, Tensor]) -> None:
    """Adds one batch of an image site; values and gradients `[B, C, H, W]` (flat targets: `[B, O]`)."""
    geometry, want = sums.geometry, sums.want
    for target in geometry.targets:
        if target.shared:
            _add_shared_target(sums, target, values, g)
        else:
            fed = {target.name: _flat_feeding(target, values)} if {"S_in", "M"} & want else {}
            sums.add_targets(fed, {n: v.flatten(1) for n, v in g.items() if n == target.name})
    direct = _direct(sums)
    if "S" in want and direct is not None:
        sums.patches("S", values[geometry.entries[0].source], direct, sums.bias)
    if "M_prev" in want:
        _add_products(sums, "M_prev", values, g, 1.0)
    if ("S" in want and direct is None) or "C" in want:
        for part in _parts(sums, values):
            _add_unfolded(sums, {n: v[part] for n, v in values.items()}, direct is not None)


def add_image_residual(sums: Sums, values: Mapping[str, Tensor], g: Mapping[str, Tensor]) -> None:
    """Adds one batch to N, measured with the dW* in `sums.move`: v_perp = -g - dW* c at every target."""
    assert sums.move is not None
    left = {}
    for target in sums.geometry.targets:
        columns, rows = sums.ranges[target.name]
        left[target.name] = g[target.name] + _moved(target, sums.move[rows, columns], values, g[target.name])
    _add_products(sums, "N", values, left, -1.0)


def _moved(target: Target, move: Tensor, values: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """How dW* `[O, c]` moves a target: `[B, O, *positions]`."""
    out, at = torch.zeros_like(like), 0
    move = move.to(like)
    for f in target.feeding:
        part = move[:, at : at + f.block.width]
        at += f.block.width
        if f.windows is None:
            out += (values[f.source].flatten(1) @ part.mT).reshape(out.shape)
        else:
            w = f.windows
            weight = part.reshape(target.outputs, *f.block.shape)
            out += F.conv2d(values[f.source], weight, None, w.stride, w.padding, w.dilation)
    if target.bias:
        out += move[:, -1].reshape(1, -1, *(1,) * (out.dim() - 2))
    return out


# ---- what already feeds the targets -----------------------------------------------------------------------------


def _add_shared_target(sums: Sums, target: Target, values: Mapping[str, Tensor], g: Mapping[str, Tensor]) -> None:
    """S_in, M and E of a target whose positions share weights."""
    columns, rows = sums.ranges[target.name]
    if "E" in sums.want:
        sums.gram("E", _rows(g[target.name]), at=rows)
    if "S_in" in sums.want:
        if len(target.feeding) == 1:
            f = target.feeding[0]
            assert f.windows is not None
            sums.patches(target.name, values[f.source], f.windows, target.bias)
        else:
            for part in _parts(sums, values):
                c = _shared_feeding(sums, target, {n: v[part] for n, v in values.items()})
                sums.gram("S_in", _rows(c), at=columns)
    if "M" in sums.want:
        at = columns.start
        for f in target.feeding:
            assert f.windows is not None
            product = _patch_cross(values[f.source], g[target.name], f.windows)
            sums.put("M", product, slice(at, at + f.block.width), rows, by="patch_cross")
            at += f.block.width
        if target.bias:
            total = g[target.name].sum((2, 3)).sum(0, dtype=torch.float64)
            sums.put("M", total[None], slice(at, at + 1), rows, by="a sum")


def _shared_feeding(sums: Sums, target: Target, values: Mapping[str, Tensor]) -> Tensor:
    """c of a target whose positions share weights: `[B, c, positions]`."""
    parts = [f.windows.unfold(values[f.source]) for f in target.feeding if f.windows is not None]
    count = sums.geometry.network.groups[target.name].positions
    like = parts[0] if parts else next(iter(values.values()))
    if target.bias:
        parts.append(like.new_ones(like.shape[0], 1, count))
    return torch.cat(parts, 1) if parts else like.new_zeros(like.shape[0], 0, count)


def _flat_feeding(target: Target, values: Mapping[str, Tensor]) -> Tensor:
    """c of a flat target: `[B, c]`."""
    like = next(iter(values.values()))
    parts = [values[f.source].flatten(1) for f in target.feeding]
    if target.bias:
        parts.append(like.new_ones(like.shape[0], 1))
    return torch.cat(parts, 1) if parts else like.new_zeros(like.shape[0], 0)


# ---- features of new units times what arrives at the targets -----------------------------------------------------


def _add_products(sums: Sums, name: str, values: Mapping[str, Tensor], g: Mapping[str, Tensor], sign: float) -> None:
    """Adds sign * E sum_r b(q(r, t)) g_o(r) for every leaving bundle."""
    for at, way in enumerate(sums.geometry.exits):
        columns = sums.columns(name, at)
        for part in _parts(sums, values):
            here = {n: v[part] for n, v in values.items()}
            if way.windows is None:
                product, by = _flattened_product(sums, way, here, g[way.target][part]), "accumulate"
            elif not sums.geometry.steps and not sums.geometry.centres:
                product, by = _through_product(sums, way, here, g[way.target][part]), "through_cross"
            elif _spreading_pays(sums, way):
                product, by = _spread_product(sums, way, here, g[way.target][part]), "patch_cross"
            else:
                product, by = _read_product(sums, way, here, g[way.target][part]), "accumulate"
            sums.put(name, sign * product, columns=columns, by=by)


def _through_product(sums: Sums, way: Exit, values: Mapping[str, Tensor], g: Tensor) -> Tensor:
    """`[F, O * taps]` for a convolution that leaves where others enter: two windows in a row."""
    assert way.windows is not None
    geometry, outer = sums.geometry, way.windows.kernel_window
    rows, constant = [], g.new_zeros(way.block.width, dtype=torch.float64)
    for entry in geometry.entries:
        assert entry.windows is not None
        if entry.group != way.group:
            rows.append(g.new_zeros(entry.block.width, way.block.width, dtype=torch.float64))
            continue
        product = through_cross(values[entry.source], entry.windows.kernel_window, g, outer, tap=way.block.tap)
        rows.append(product[:-1])
        constant = product[-1]
    if sums.bias:
        biased = geometry.biased or (geometry.entries[0].group,)
        rows.append((constant if way.group in biased else torch.zeros_like(constant))[None])
    scale = (geometry.slopes[way.group] or 1.0) / (geometry.slope or 1.0)
    return torch.cat(rows) * scale


def _spread_product(sums: Sums, way: Exit, values: Mapping[str, Tensor], g: Tensor) -> Tensor:
    """`[F, O * taps]` for a leaving convolution."""
    assert way.windows is not None
    geometry = sums.geometry
    height, width = geometry.network.groups[way.group].shape[1:]
    back = way.windows.spread(g, (height, width), way.block.tap)
    at_entry = geometry.carry_back(way.group, back)
    rows = []
    for entry in geometry.entries:
        assert entry.windows is not None
        spread = at_entry.get(entry.group)
        if spread is None:
            rows.append(back.new_zeros(entry.block.width, back.shape[1], dtype=torch.float64))
        else:
            rows.append(_patch_cross(values[entry.source], spread, entry.windows))
    if sums.bias:
        groups = [n for n in geometry.biased or (geometry.entries[0].group,) if n in at_entry]
        reached = [at_entry[name].sum((2, 3)).sum(0, dtype=torch.float64) for name in groups]
        rows.append(sum(reached, back.new_zeros(back.shape[1], dtype=torch.float64))[None])
    return torch.cat(rows)


def _read_product(sums: Sums, way: Exit, values: Mapping[str, Tensor], g: Tensor) -> Tensor:
    """The same from unfolded features: cheaper where pooling or strides leave few positions."""
    product = _summed(_read(way, _features(sums, values)[way.group]), g.flatten(2))
    return product.reshape(sums.features, way.block.taps, way.block.outputs).mT.reshape(sums.features, -1)


def _spreading_pays(sums: Sums, way: Exit) -> bool:
    """Whether gradients spread over entry positions cost less than features gathered at target positions."""
    groups = sums.geometry.network.groups
    entry, exit, target = (groups[n].positions for n in (sums.geometry.entries[0].group, way.group, way.target))
    b, columns, taps = sums.features, way.block.width, way.block.taps
    spread = 2 * b * columns * entry * PER_MULTIPLY + 3 * columns * (exit + (entry if sums.geometry.steps else 0))
    read = 2 * b * columns * target * PER_MULTIPLY + 3 * b * (entry + exit + taps * target)
    return spread < read


def _flattened_product(sums: Sums, way: Exit, values: Mapping[str, Tensor], g: Tensor) -> Tensor:
    """`[F, O * positions]` for a dense bundle that leaves an image."""
    b = _features(sums, values)[way.group].flatten(1)  # [B, F * positions]
    total = torch.zeros(b.shape[1], way.block.outputs, dtype=torch.float64, device=b.device)
    product = accumulate(total, b, g.flatten(1))
    return product.reshape(sums.features, way.block.taps, way.block.outputs).mT.reshape(sums.features, -1)


def _add_unfolded(sums: Sums, values: Mapping[str, Tensor], direct: bool) -> None:
    """S where it is no plain product of patches, and C."""
    geometry = sums.geometry
    features = _features(sums, values)
    if "S" in sums.want and not direct:
        for exit, windows in geometry.places:
            b = features[exit] if windows is None else windows.pick(features[exit], windows.centre)
            sums.gram("S", _rows(b), 1.0 / len(geometry.places))
    if "C" not in sums.want:
        return
    targets = {t.name: t for t in geometry.targets}
    for at, way in enumerate(geometry.exits):
        target, b = targets[way.target], features[way.group]
        if way.windows is None:
            product = _summed(b.flatten(1)[..., None], _flat_feeding(target, values)[..., None])
        else:
            product = _summed(_read(way, b), _shared_feeding(sums, target, values))
        sums.put("C", product.reshape(sums.features, -1), columns=sums.columns("C", at), by="accumulate")


def _read(way: Exit, b: Tensor) -> Tensor:
    """What the taps of a leaving convolution read of `b [B, F, H, W]`: `[B, F * taps, positions]`."""
    assert way.windows is not None
    return way.windows.unfold(b) if way.block.tap is None else way.windows.pick(b, way.block.tap).flatten(2)


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


# ---- parts -------------------------------------------------------------------------------------------------------


def _direct(sums: Sums) -> Windows | None:
    """The windows whose patches have S for Gram matrix, if there is one entry, left where it is entered."""
    geometry = sums.geometry
    if len(geometry.entries) != 1 or geometry.steps or len(geometry.places) != 1 or geometry.centres:
        return None
    entry, (exit, picked) = geometry.entries[0], geometry.places[0]
    if entry.group != exit or entry.windows is None or geometry.slopes[exit] not in (geometry.slope, 0.0):
        return None
    hidden, image = (geometry.network.groups[name].shape[1:] for name in (exit, entry.source))
    return entry.windows if picked is None else entry.windows.at(picked, (hidden[0], hidden[1]), (image[0], image[1]))


def _patch_cross(x: Tensor, y: Tensor, w: Windows) -> Tensor:
    """The sum of patch y^T over samples and positions: `[C * taps, Q]`."""
    return patch_cross(x, y, w.kernel, stride=w.stride, padding=w.padding, dilation=w.dilation)


def _rows(x: Tensor) -> Tensor:
    """`[B, width, *positions]` as rows `[B * positions, width]`, feature-major in memory."""
    return x.flatten(2).transpose(0, 1).reshape(x.shape[1], -1).mT


def _summed(x: Tensor, y: Tensor) -> Tensor:
    """The sum over samples and positions of x y^T in float64: `[B, X, R]`, `[B, Y, R]` -> `[X, Y]`."""
    total = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, device=x.device)
    return accumulate(total, _rows(x), _rows(y))


def _parts(sums: Sums, values: Mapping[str, Tensor]) -> Iterator[slice]:
    """Ranges of samples whose intermediate numbers fit into MEMORY; all at once where a norm needs the whole batch."""
    geometry, groups = sums.geometry, sums.geometry.network.groups
    most = sum(sums.features * groups[name].positions for name in geometry.site.groups)
    for way in geometry.exits:
        most += way.block.width * groups[way.group].positions if way.windows else 0
        if "C" in sums.want:
            most += sums.features * way.block.taps * (groups[way.target].positions if way.windows else 1)
    for target in geometry.targets:
        most += target.width * (groups[target.name].positions if target.shared else 1)
    count = next(iter(values.values())).shape[0]
    step = count if geometry.centres else max(1, MEMORY // most)
    for first in range(0, count, step):
        yield slice(first, first + step)
