"""`schedule`: the order in which a network is computed, as stages of whole blocks and of irregular rows.

A `Block` is a group, or the part of one at one level, whose values are sums of matrix products, convolutions
and poolings. A `Walk` is a set of rows (single neurons) that one kernel computes in order, from sparse edges;
what blocks add to such rows arrives as an offset. Loops of the group graph are condensed by (group, level),
so dense bundles stay matrix products even there, and runs of irregular rows are merged into one walk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from irgrow.compiler.matrices import Engine
from irgrow.ir.network import Bundle, Group, Network
from irgrow.ir.pattern import Identity, Pool2d, Sparse, Window

Local = NDArray[np.integer] | None  # local neuron indices of a group; None: all of them in order

CROSSOVER = 0.4  # density above which a sparse bundle in a loop runs as a dense one with a mask (PERFORMANCE.md)
# Edges below which a sparse bundle stays in a walk whatever its density: with fewer, the calls of a step of its own
# (20 us forward, 80 us with gradients) cost more than the 5 to 20 ns that a matrix saves per edge at batch 64 to 256.
SMALLEST_MATRIX = 4096


@dataclass(frozen=True)
class Part:
    """What one bundle adds to neurons `rows` of its target, from neurons `columns` of its source.

    `masked`: a sparse bundle as a matrix; `edges` are then its edges between these rows and columns (None: all).
    `walked`: these bundles of single edges are aggregated together by a walk of their own (under a norm or
    dropout); then `bundle` is the first of them.
    """

    bundle: Bundle
    reason: str
    rows: Local = None
    columns: Local = None
    masked: bool = False
    edges: NDArray[np.integer] | None = None
    walked: tuple[Bundle, ...] = ()

    def reads(self) -> set[str]:
        return {bundle.source for bundle in (self.bundle, *self.walked)}


@dataclass
class Block:
    """Neurons `local` of a group, computed at once from `parts`."""

    group: Group
    local: Local
    parts: list[Part]

    def reads(self) -> set[str]:
        return set().union(*(part.reads() for part in self.parts))


@dataclass
class Walk:
    """Rows computed in order by one kernel, from the edges of `bundles`.

    Row r is neuron `local[r]` of group `groups[number[r]]`. An offset `(first, last, parts)` is what matrix
    parts add to rows first..last-1. `blocks` compute the same group by group, None where that is never faster.
    """

    groups: list[Group] = field(default_factory=list)
    number: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    local: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    offsets: list[tuple[int, int, list[Part]]] = field(default_factory=list)
    bundles: dict[str, Bundle] = field(default_factory=dict)
    reasons: dict[str, None] = field(default_factory=dict)
    blocks: list[Block] | None = None

    @staticmethod
    def of(group: Group, local: Local, bundles: Sequence[Bundle], reasons: Sequence[str], parts: list[Part]) -> Walk:
        """Rows of one group."""
        local = np.arange(group.neurons) if local is None else local
        offsets = [(0, local.size, parts)] if parts else []
        number = np.zeros(local.size, np.int32)
        table = {b.name: b for b in bundles}
        return Walk([group], number, local.astype(np.int32), offsets, table, dict.fromkeys(reasons))

    @property
    def rows(self) -> int:
        return self.local.size

    def reads(self) -> set[str]:
        return {name for _, _, parts in self.offsets for part in parts for name in part.reads()}

    @property
    def either(self) -> bool:
        """Whether matrices may be faster."""
        return self.blocks is not None and any(part.masked for block in self.blocks for part in block.parts)

    def computes(self) -> set[str]:
        return {group.name for group in self.groups}

    def extend(self, later: Walk) -> None:
        """Appends the rows of another walk."""
        self.blocks = None if self.blocks is None or later.blocks is None else self.blocks + later.blocks
        self.offsets += [(first + self.rows, last + self.rows, parts) for first, last, parts in later.offsets]
        self.number = np.concatenate([self.number, later.number + len(self.groups)]).astype(np.int32)
        self.local = np.concatenate([self.local, later.local])
        self.groups += later.groups
        self.bundles |= later.bundles
        self.reasons |= later.reasons


Stage = Block | Walk


def schedule(network: Network, engine: Engine) -> list[Stage]:
    """The stages in an order in which each finds what it reads.

    Where the engine has several routes for a matrix, both what walks and what multiplies are given for groups
    outside loops: which is faster depends on the batch.
    """
    stages: list[Stage] = []
    waiting = Walk()  # rows that may still be joined by later ones

    def emit(stage: Stage) -> None:
        nonlocal waiting
        blocked = bool(stage.reads() & waiting.computes())
        if isinstance(stage, Block):
            if blocked:
                stages.append(waiting)
                waiting = Walk()
            stages.append(stage)
        elif blocked or (waiting.rows and waiting.either != stage.either and None in (waiting.blocks, stage.blocks)):
            stages.append(waiting)
            waiting = stage
        elif waiting.rows:
            waiting.extend(stage)
        else:
            waiting = stage

    for names, cyclic in network.components:
        if cyclic:
            for stage in _loop(network, names, engine):
                emit(stage)
        elif names[0] not in network.inputs:
            emit(_whole(network, network.groups[names[0]], engine))
    if waiting.rows:
        stages.append(waiting)
    return stages


def _whole(network: Network, group: Group, engine: Engine) -> Stage:
    """A group outside loops."""
    entering = network.entering(group.name)
    if group.aggregation == "max":
        if not entering or all(_pools(network, bundle) for bundle in entering):
            return Block(group, None, [Part(bundle, "elementwise or pooled maximum") for bundle in entering])
        reason = "a maximum over single edges"
        if _finishes(group):
            return Block(group, None, [Part(entering[0], reason, walked=tuple(entering))])
        return Walk.of(group, None, entering, [reason], [])
    sparse = {b.name: _choice(b, network, engine, 1) for b in entering if isinstance(b.pattern, Sparse)}
    walked = [b for b in entering if b.name in sparse and not sparse[b.name][0]]
    if engine.measured and not engine.wide:  # any batch may prefer a matrix, or not
        smallest = 0 if engine.every else SMALLEST_MATRIX
        large = [b.name for b in entering if isinstance(b.pattern, Sparse) and b.pattern.source.size >= smallest]
        block = _block(group, entering, large, sparse)
        if _finishes(group) or not sparse:
            return block
        every = [b for b in entering if b.name in sparse]
        rest = [Part(b, "structured") for b in entering if b.name not in sparse]
        walk = Walk.of(group, None, every, [sparse[b.name][1] for b in every], rest)
        walk.blocks = [block]
        return walk
    matrices = [name for name, (matrix, _) in sparse.items() if matrix]
    if not walked or _finishes(group):
        return _block(group, entering, matrices, sparse)
    parts = [_part(b, sparse) for b in entering if b not in walked]
    return Walk.of(group, None, walked, [sparse[b.name][1] for b in walked], parts)


def _block(
    group: Group, entering: Sequence[Bundle], matrices: Sequence[str], sparse: dict[str, tuple[bool, str]]
) -> Block:
    """The group at once: these sparse bundles as matrices, the other sparse ones by a walk of their own."""
    walked = [b for b in entering if b.name in sparse and b.name not in matrices]
    parts = [_part(b, sparse) for b in entering if b not in walked]
    if walked:
        parts.append(Part(walked[0], sparse[walked[0].name][1], walked=tuple(walked)))
    return Block(group, None, parts)


def _finishes(group: Group) -> bool:
    """Whether something other than bias and activation follows the aggregation."""
    return group.norm is not None or group.dropout > 0


def _part(bundle: Bundle, sparse: dict[str, tuple[bool, str]]) -> Part:
    if bundle.name in sparse:
        return Part(bundle, sparse[bundle.name][1], masked=True)
    return Part(bundle, "structured")


def _choice(bundle: Bundle, network: Network, engine: Engine, levels: int) -> tuple[bool, str]:
    """Whether a sparse bundle runs as a matrix whatever the batch, and why. `levels`: of its target."""
    assert isinstance(bundle.pattern, Sparse)
    edges = bundle.pattern.source.size
    if edges < SMALLEST_MATRIX:
        return False, f"sparse, {edges} edges: too few for a matrix"
    if engine.wide:
        wide = edges >= SMALLEST_MATRIX * levels
        return wide, f"sparse, {edges} edges on {levels} levels: {'enough' if wide else 'too few'} for a matrix"
    source, target = network.shapes(bundle)
    rows, columns = _used(bundle.pattern.target, target), _used(bundle.pattern.source, source)
    density = edges / (rows * columns)
    if density >= CROSSOVER:
        return True, f"sparse, density {density:.2f} of {rows}x{columns}"
    return False, f"sparse, density {density:.3g} of {rows}x{columns}"


def _used(ends: NDArray[np.integer], shape: tuple[int, ...]) -> int:
    return int(np.count_nonzero(np.bincount(ends, minlength=1)))


def _pools(network: Network, bundle: Bundle) -> bool:
    """Whether a bundle into a max group can be computed as a pooled or elementwise maximum."""
    source, target = network.shapes(bundle)
    pattern = bundle.pattern
    if isinstance(pattern, Identity):
        return source == target
    if not isinstance(pattern, Pool2d):
        return False
    inside = all(2 * pattern.padding[a] <= pattern.kernel[a] for a in (0, 1))
    return inside and np.unique(pattern.taps(source)[1]).size == target[1] * target[2]


def _loop(network: Network, names: tuple[str, ...], engine: Engine) -> list[Stage]:
    """A loop of the group graph, condensed by (group, level)."""
    blocks: dict[str, list[Bundle]] = {}
    walked: dict[str, list[Bundle]] = {}
    reasons: dict[str, str] = {}
    for name in names:
        blocks[name], walked[name] = [], []
        for bundle in network.entering(name):
            dense, reason = True, "structured"
            if network.groups[name].aggregation == "max":
                dense, reason = False, "a maximum over single edges"
            elif isinstance(bundle.pattern, Sparse):
                levels = np.unique(network.levels[name]).size if engine.wide else 1
                dense, reason = _choice(bundle, network, engine, levels)
            elif isinstance(bundle.pattern, (Window, Identity)) and not _one_level(network, bundle):
                dense, reason = False, "a pattern whose target lies on several levels"
            (blocks if dense else walked)[name].append(bundle)
            reasons[bundle.name] = reason
    level = network.levels
    plain = [name for name in names if not blocks[name]]
    cuts = sorted({int(at) for name in names if blocks[name] for at in np.unique(level[name])})
    stages: list[Stage] = []
    walk = _irregular(network, plain, walked, reasons)
    depths = _depths(network, plain, walk)
    first = 0
    for cut in cuts:
        last = int(np.searchsorted(depths, cut))
        stages += _segment(walk, first, last)
        first = last
        for name in names:
            if blocks[name]:
                stage = _node(network, name, cut, blocks[name], walked[name], reasons)
                if stage is not None:
                    stages.append(stage)
    return stages + _segment(walk, first, walk.rows)


def _one_level(network: Network, bundle: Bundle) -> bool:
    level = network.levels[bundle.target]
    return level.size > 0 and int(level.min()) == int(level.max())


def _irregular(
    network: Network, names: Sequence[str], walked: dict[str, list[Bundle]], reasons: dict[str, str]
) -> Walk:
    """All rows of the groups without matrix parts, in level order."""
    walk = Walk()
    for name in names:
        bundles = walked[name]
        walk.extend(Walk.of(network.groups[name], None, bundles, [reasons[b.name] for b in bundles], []))
    order = np.argsort(_depths(network, names, walk), kind="stable")
    walk.number, walk.local = walk.number[order], walk.local[order]
    return walk


def _depths(network: Network, names: Sequence[str], walk: Walk) -> NDArray[np.int32]:
    depths = np.empty(walk.rows, np.int32)
    for number, name in enumerate(names):
        mine = walk.number == number
        depths[mine] = network.levels[name][walk.local[mine]]
    return depths


def _segment(walk: Walk, first: int, last: int) -> list[Stage]:
    """Rows first..last-1 of a walk without offsets, as a walk of its own; nothing if there are none."""
    if first == last:
        return []
    part = slice(first, last)
    return [Walk(list(walk.groups), walk.number[part], walk.local[part], [], dict(walk.bundles), dict(walk.reasons))]


def _node(
    network: Network,
    name: str,
    at: int,
    blocks: list[Bundle],
    walked: list[Bundle],
    reasons: dict[str, str],
) -> Stage | None:
    """The neurons of a group with matrix parts at one level."""
    group, level = network.groups[name], network.levels[name]
    local: Local = np.flatnonzero(level == at)
    assert local is not None
    if local.size == 0:
        return None
    if local.size == level.size:
        local = None
    parts = [part for b in blocks if (part := _piece(network, b, local, reasons[b.name])) is not None]
    edges = [b for b in walked if _enters(b, local)]
    if not edges:
        return Block(group, local, parts)
    return Walk.of(group, local, edges, [reasons[b.name] for b in edges], parts)


def _enters(bundle: Bundle, local: Local) -> bool:
    if local is None or not isinstance(bundle.pattern, Sparse):
        return True
    return bool(np.isin(bundle.pattern.target, local).any())


def _piece(network: Network, bundle: Bundle, local: Local, reason: str) -> Part | None:
    """The part of a bundle that enters these neurons."""
    pattern = bundle.pattern
    if not isinstance(pattern, Sparse):
        return Part(bundle, reason, rows=local)
    edges = None if local is None else np.flatnonzero(np.isin(pattern.target, local))
    if edges is not None and edges.size == 0:
        return None
    used = np.unique(pattern.source if edges is None else pattern.source[edges])
    columns = None if used.size == network.groups[bundle.source].neurons else used
    return Part(bundle, reason, rows=local, columns=columns, masked=True, edges=edges)
