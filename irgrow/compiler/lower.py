"""`lower`: from a network to a program, one kernel per stage, each choice with its reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from irgrow.compiler.matrices import BATCHES, Engine, by_batch, engine
from irgrow.compiler.parts import Add, Masked, maximum_function, part_function
from irgrow.compiler.program import Fetch, Places, Program, Run, Step
from irgrow.compiler.schedule import Block, Part, Walk, schedule
from irgrow.ir.errors import BackendError
from irgrow.ir.network import Bundle, Group, Network
from irgrow.ir.pattern import Dense
from irgrow.kernels import costs, gpu, graph
from irgrow.kernels import walk as walk_kernel
from irgrow.kernels.activations import ACTIVATIONS

BACKENDS = ("auto", "torch", "numba", "triton")


def lower(
    network: Network, *, device: torch.device | str = "cpu", backend: str = "auto", every_route: bool = False
) -> Program:
    """A program for a verified network. Depends on the structure only, never on weights.

    backend: `auto` chooses; `torch` runs everything in plain torch; `numba` and `triton` walk irregular regions
    with their kernels and multiply sparse matrices with them, on a CPU and on a GPU. Dense products, convolutions,
    pooling and norms are the library's. `every_route`: routes that are never the fastest are kept as well, to be
    measured by name (`Program.run`).
    """
    device = torch.device(device)
    if backend not in BACKENDS:
        raise BackendError(f"backend {backend!r}", expected=f"one of {', '.join(BACKENDS)}")
    runs = engine(*_walker(backend, device, network.dtype), device, network.dtype, backend)
    runs = replace(runs, every=every_route)
    places = Places(network, device)
    for name in network.inputs:
        places.put(places.new_slot(by_rows=False), name, None, None)
    steps: list[Step] = []
    for stage in schedule(network, runs):
        if isinstance(stage, Block):
            steps.append(BlockStep(network, stage, places, runs))
        elif stage.either:
            steps.append(_faster(network, stage, places, runs))
        else:
            steps.append(WalkStep(network, stage, places, runs))
        if isinstance(stage, Walk) or any(part.walked for part in stage.parts):
            steps[-1].reason += f"; walked by {runs.by}"
    outputs = tuple(places.fetch(name) for name in network.outputs)
    return Program(tuple(steps), network.inputs, outputs, len(places), places)


def _walker(backend: str, device: torch.device, dtype: torch.dtype) -> tuple[Callable[..., Tensor], str]:
    """The walk of a backend there, and what runs it; raises BackendError if that is not the one asked for."""
    if backend == "torch":
        return walk_kernel.walk_reference, "plain torch"
    if backend == "triton":
        missing = gpu.why_not_triton(device)
        if missing:
            do = "move the network there, set TRITON_INTERPRET=1 before Python starts, or use backend='auto'"
            raise BackendError("backend 'triton'", missing, "a GPU and triton", do=do)
        from irgrow.kernels import walk_triton

        return walk_triton.walk, "interpreted Triton" if gpu.interpreted() else "Triton"
    by = walk_kernel.walked_by(device, dtype)
    if backend == "numba" and by != "numba":
        raise BackendError("backend 'numba'", f"{dtype} on {device}: {by}", "float32 or float64 on a CPU, with numba")
    return walk_kernel.walk, by


class BlockStep:
    """A group, or its neurons at one level: sum (or max) of parts, bias, shift, norm, activation, dropout."""

    def __init__(self, network: Network, block: Block, places: Places, engine: Engine) -> None:
        group = block.group
        self.group = group
        self._function = ACTIVATIONS[group.activation].function if group.activation != "identity" else None
        self._local = None if block.local is None else places.tensor(block.local)
        self._linear: tuple[Fetch, str] | None = None
        self._parts = []
        kinds = []
        if group.aggregation == "max" and block.parts and not block.parts[0].walked:
            self._parts.append(maximum_function(network, block.parts, places))
            kinds.append("maximum")
        else:
            for n, part in enumerate(block.parts):
                simple = isinstance(part.bundle.pattern, Dense) and part.rows is None and not part.walked
                if n == 0 and simple and group.bias is not None and len(group.shape) == 1:
                    self._linear = (places.fetch(part.bundle.source), part.bundle.tensor)  # bias in one call
                    kinds.append("dense")
                    continue
                function, kind = (
                    _walked(network, group, part, places, engine)
                    if part.walked
                    else part_function(network, part, places, engine)
                )
                self._parts.append(function)
                kinds.append(kind)
        self._bias = f"bias.{group.name}" if group.bias is not None and self._linear is None else None
        self._bias_name = f"bias.{group.name}"
        self._unit = None if self._local is None else self._local // group.positions
        self._slot = places.new_slot(by_rows=False)
        places.put(self._slot, group.name, block.local, None if block.local is None else np.arange(block.local.size))
        self.matrices = [part.matrix for part in self._parts if isinstance(part, Masked)]
        self.walks = sum(bool(part.walked) for part in block.parts)
        alone = self._parts[0] if len(self._parts) == 1 and self._linear is None and self._local is None else None
        plain = group.norm is None and len(group.shape) == 1
        self._alone = alone if isinstance(alone, Masked) and plain else None  # with bias and activation in one call
        how = iter(matrix.explain() for matrix in self.matrices)
        self.reason = "; ".join(
            f"{kind} [{part.bundle.name}]: {part.reason}{f': {next(how)}' if part.masked else ''}"
            for kind, part in zip(kinds, block.parts, strict=False)
        )
        rows = "" if block.local is None else f"[{block.local.size} of {group.neurons}]"
        inputs = ", ".join(f"{kind} {part.bundle.source}" for kind, part in zip(kinds, block.parts, strict=False))
        if group.aggregation == "max" and block.parts:
            sources = [b.source for part in block.parts for b in part.walked or (part.bundle,)]
            inputs = f"max of {', '.join(sources)}"
        tail = [] if group.norm is None else [f"{group.norm.kind} norm"]
        tail += [group.activation] if self._function else []
        self.text = f"{group.name}{rows} <- {inputs or 'nothing'}{''.join(f' -> {word}' for word in tail)}"

    def run(self, run: Run) -> None:
        group, z = self.group, None
        if self._alone is not None and group.name not in run.shifts:
            z = self._alone.activated(run, run.tensors[self._bias] if self._bias else None, group.activation)
            run.slots[self._slot] = F.dropout(z, group.dropout) if group.dropout and run.train else z
            return
        if self._linear is not None:
            fetch, weight = self._linear
            z = F.linear(fetch.flat(run), run.tensors[weight], run.tensors[self._bias_name])
        for part in self._parts:
            value = part(run)
            z = value if z is None else z + (value if value.shape == z.shape else value.reshape(z.shape))
        if z is None:
            z = next(t for t in run.slots if t is not None).new_zeros(run.batch, self._neurons())
        if self._local is None:
            z = z.reshape(run.batch, *group.shape) if z.dim() != len(group.shape) + 1 else z
        if self._bias is not None:
            z = z + self._shaped_bias(run.tensors[self._bias])
        if group.name in run.shifts:
            shift = run.shifts[group.name]
            z = z + (shift if self._local is None else shift.flatten(1).index_select(1, self._local))
        if group.norm is not None:
            z = normalise(group, z, run.tensors, run.train)
        if self._function is not None:
            z = self._function(z)
        if group.dropout and run.train:
            z = F.dropout(z, group.dropout)
        run.slots[self._slot] = z

    def _neurons(self) -> int:
        return self.group.neurons if self._local is None else self._local.numel()

    def _shaped_bias(self, bias: Tensor) -> Tensor:
        if self._unit is not None:
            return bias.index_select(0, self._unit)
        return bias.reshape(-1, *[1] * (len(self.group.shape) - 1))


def normalise(group: Group, z: Tensor, tensors, train: bool) -> Tensor:  # type: ignore[no-untyped-def]
    """z `[B, *shape]` normalised; in train mode a batch norm uses and updates batch statistics."""
    norm, name = group.norm, group.name
    assert norm is not None
    scale, shift = tensors[f"scale.{name}"], tensors[f"shift.{name}"]
    if norm.kind == "batch":
        mean, variance = tensors[f"mean.{name}"], tensors[f"variance.{name}"]
        return F.batch_norm(z, mean, variance, scale, shift, train, norm.momentum, norm.eps)
    return F.group_norm(z, norm.groups if norm.kind == "group" else 1, scale, shift, norm.eps)


class WalkStep:
    """An irregular region: one kernel call computes all its rows."""

    def __init__(self, network: Network, stage: Walk, places: Places, engine: Engine) -> None:
        self._walk = engine.walk
        groups = list({g.name: g for g in stage.groups}.values())
        number = {g.name: n for n, g in enumerate(groups)}
        owner = np.array([number[g.name] for g in stage.groups], np.int32)[stage.number]
        row_of: dict[str, NDArray[np.int32]] = {}
        rows_of: dict[str, NDArray[np.integer]] = {}
        for g in groups:
            mine = np.arange(stage.rows) if len(groups) == 1 else np.flatnonzero(owner == number[g.name])
            row_of[g.name] = np.full(g.neurons, -1, np.int32)
            row_of[g.name][stage.local[mine]] = mine
            rows_of[g.name] = mine
        edges = _edges(network, list(stage.bundles.values()), row_of, places)
        self._inputs, self.weights = edges.fetches, [b.tensor for b in edges.bundles]
        code = np.array([g.function.code for g in groups], np.int32)[owner]
        maximum = np.array([walk_kernel.MAX if g.aggregation == "max" else walk_kernel.SUM for g in groups], np.int32)
        self._biases = [f"bias.{g.name}" for g in groups if g.bias is not None]
        bias = _bias_index(groups, owner, stage.local)
        self.plan = walk_kernel.plan(
            edges.inputs,
            edges.pointer,
            edges.column,
            code=code,
            weight=edges.weight,
            aggregation=maximum[owner],
            bias=bias,
        )
        self._offsets = [
            (first, last, [part_function(network, part, places, engine)[0] for part in parts])
            for first, last, parts in stage.offsets
        ]
        self._groups = [(g, rows_of[g.name], stage.local[rows_of[g.name]]) for g in groups]
        self._shift_rows = {g.name: (places.tensor(rows), places.tensor(local)) for g, rows, local in self._groups}
        self._slot, self.slot = places.new_slot(by_rows=True), places.new_slot(by_rows=False)
        self._read = self._publish(network, stage, places)
        self.published_rows = self._read.count
        self._read_index = places.tensor(self._read.tensor.numpy())
        self.reason = "; ".join(stage.reasons)
        names = ", ".join(
            f"{g.name}{'' if r.size == g.neurons else f'[{r.size} of {g.neurons}]'}" for g, r, _ in self._groups
        )
        sources = sorted({b.source for b in edges.bundles} - {g.name for g in groups})
        added = sum(len(parts) for _, _, parts in stage.offsets)
        self.text = (
            f"{names} <- walk of {self.plan.neurons:,} rows, {self.plan.edges:,} edges, {self.plan.levels:,} levels"
            f" from {', '.join(sources) or 'themselves'}{f' + {added} matrix parts' if added else ''}"
        )

    def _publish(self, network: Network, stage: Walk, places: Places) -> walk_kernel.Rows:
        """The rows that other steps read, group by group; the other groups are found only where all is recorded."""
        read: list[NDArray[np.integer]] = []
        self.published: list[str] = []  # groups, in the order in which they lie in the slot that others read
        count = 0
        inside = {g.name for g, rows, _ in self._groups if rows.size == g.neurons}
        added = {part.bundle.name for _, _, parts in stage.offsets for part in parts}
        walked = {name for name, bundle in stage.bundles.items() if bundle.target in inside} - added
        for g, rows, local in self._groups:
            private = g.name in inside and g.name not in network.outputs
            if private and all(bundle.name in walked for bundle in network.leaving(g.name)):
                places.put(self._slot, g.name, local, rows)
                continue
            order = np.argsort(local)
            read.append(rows[order])
            self.published.append(g.name)
            places.put(self.slot, g.name, local[order], count + np.arange(rows.size))
            count += rows.size
        whole = next((g.name for g, rows, _ in self._groups if count == rows.size == g.neurons), None)
        if whole is not None and len(read) == 1:
            places.put(self.slot, whole, None, None)
        tensors = network.tensors()
        parts = walk_kernel.parts_of(self.plan, [tensors[name].numel() for name in self.weights])
        return walk_kernel.Rows(np.concatenate(read) if read else np.empty(0, np.int32), parts)

    def run(self, run: Run) -> None:
        x = _side_by_side(self._inputs, run)
        tensors = run.tensors
        w = tuple([tensors[name] for name in self.weights])
        b = tuple([tensors[name] for name in self._biases]) if self._biases else None
        offset = self._offset(run, x) if self._offsets or run.shifts else None
        if self._walk is walk_kernel.walk and not run.record:
            run.slots[self.slot] = walk_kernel.walk_rows(self.plan, self._read, x, w, b, offset)
            return
        values = self._walk(self.plan, x, w, b, offset)
        run.slots[self._slot] = values
        run.slots[self.slot] = values.index_select(0, self._read_index).t()

    def _offset(self, run: Run, like: Tensor) -> Tensor | None:
        offset: Tensor | None = None
        if self._offsets:
            pieces, done = [], 0
            for first, last, parts in self._offsets:
                if first > done:
                    pieces.append(like.new_zeros(first - done, run.batch))
                total = parts[0](run)
                for part in parts[1:]:
                    total = total + part(run).reshape(total.shape)
                pieces.append(total.flatten(1).t())
                done = last
            if done < self.plan.neurons:
                pieces.append(like.new_zeros(self.plan.neurons - done, run.batch))
            offset = torch.cat(pieces).contiguous()
        for name, (rows, local) in self._shift_rows.items():
            if name in run.shifts:
                shift = run.shifts[name].flatten(1).index_select(1, local).t()
                if offset is None:
                    offset = like.new_zeros(self.plan.neurons, run.batch)
                offset = offset.index_add(0, rows, shift)
        return offset


def _faster(network: Network, stage: Walk, places: Places, engine: Engine) -> Step:
    """The walk, or for the batches for which that is faster its groups one by one."""
    inside = places.branch()
    steps = [BlockStep(network, block, inside, engine) for block in stage.blocks or ()]
    walk = WalkStep(network, stage, places, engine)
    either = EitherStep(walk, steps, inside)
    faster = any(either.by_steps(batch, training) for batch in BATCHES for training in (False, True))
    return either if faster or engine.every else walk


class EitherStep:
    """A region by one walk, or group by group: whichever takes less time for the batch."""

    def __init__(self, walk: WalkStep, steps: Sequence[BlockStep], places: Places) -> None:
        self._walk, self.steps = walk, steps
        self._read = [places.fetch(name) for name in walk.published]
        self._chosen: dict[tuple[int, bool], bool] = {}
        names = {False: "the walk", True: "the matrices"}
        self.text = walk.text
        alike: dict[str, int] = {}
        for matrix in (matrix for step in steps for matrix in step.matrices):
            alike[matrix.explain()] = alike.get(matrix.explain(), 0) + 1
        matrices = "; ".join(f"matrices ({count}): {how}" for how, count in alike.items())
        when = by_batch(lambda batch, training: names[self.by_steps(batch, training)])
        self.reason = f"{walk.reason}; {when}; {matrices}"

    def by_steps(self, batch: int, training: bool) -> bool:
        """Whether the matrices take less time than the walk; a function of the structure and these."""
        key = batch, training
        if key not in self._chosen:
            matrices = [matrix for step in self.steps for matrix in step.matrices]
            edges = sum(matrix.mask.edges for matrix in matrices)
            size = costs.Size(self._walk.plan.inputs, self._walk.published_rows, edges, batch)
            walk = costs.estimate("walk", size, training=training)
            levels = sum(step.walks for step in self.steps) * costs.COSTS["walk", training].call
            levels += sum(m.estimate(m.route(batch, training), batch, training) for m in matrices)
            self._chosen[key] = levels < walk
        return self._chosen[key]

    def run(self, run: Run) -> None:
        if run.record or run.route == "walk" or torch.compiler.is_compiling():
            return self._walk.run(run)
        if run.route is None:
            training = torch.is_grad_enabled() and any(run.tensors[w].requires_grad for w in self._walk.weights)
            if not self.by_steps(run.batch, training):
                return self._walk.run(run)
        for step in self.steps:
            step.run(run)
        read = [fetch.flat(run) for fetch in self._read]
        run.slots[self._walk.slot] = read[0] if len(read) == 1 else torch.cat(read, 1)


class _Edges:
    """The edges of a walk, sorted by row: what `plan` takes."""

    def __init__(self, rows: int) -> None:
        self.inputs = 0
        self.fetches: list[Fetch] = []
        self.bundles: list[Bundle] = []
        self.pointer = np.zeros(rows + 1, np.int32)
        self.column = self.weight = np.empty(0, np.int32)


def _edges(network: Network, bundles: Sequence[Bundle], row_of: dict[str, NDArray[np.int32]], places: Places) -> _Edges:
    """Every edge of these bundles into the rows of a walk. Value rows: inputs from outside first, then the rows."""
    out = _Edges(max(int(rows.max(initial=-1)) for rows in row_of.values()) + 1)
    used: dict[str, NDArray[np.bool_]] = {}
    kept: list[tuple[Bundle, tuple[NDArray[np.int32], ...]]] = []
    for bundle in bundles:
        edges = tuple(np.ascontiguousarray(a, np.int32) for a in bundle.pattern.all_edges(*network.shapes(bundle)))
        marks = used.get(bundle.source)
        if marks is None:
            marks = np.zeros(network.groups[bundle.source].neurons, np.bool_)
        if graph.count_edges(edges[0], edges[1], row_of[bundle.target], out.pointer, marks):
            used[bundle.source] = marks
            kept.append((bundle, edges))
    columns_of: dict[str, NDArray[np.int32]] = {}
    for name, marks in used.items():
        neurons, inner = marks.size, row_of.get(name)
        outside = np.flatnonzero(marks if inner is None else marks & (inner < 0))
        place = np.full(neurons, -1, np.int32)
        if outside.size:
            if inner is None and 2 * outside.size >= neurons and places.complete(name):
                outside = np.arange(neurons)  # most are read: take the group as it lies
            out.fetches.append(places.fetch(name, None if outside.size == neurons else outside))
            place[outside] = np.arange(out.inputs, out.inputs + outside.size)
            out.inputs += outside.size
        columns_of[name] = place
    for name, place in columns_of.items():
        inner = row_of.get(name)
        if inner is not None:
            place[inner >= 0] = inner[inner >= 0] + out.inputs
    np.cumsum(out.pointer, out=out.pointer)
    out.column, out.weight = (np.empty(out.pointer[-1], np.int32) for _ in range(2))
    where, first_weight = out.pointer[:-1].copy(), 0
    for bundle, (s, t, w) in kept:
        row, place = row_of[bundle.target], columns_of[bundle.source]
        graph.fill_edges(s, t, w, row, place, first_weight, where, out.column, out.weight)
        first_weight += bundle.weight.numel()
        out.bundles.append(bundle)
    return out


def _bias_index(groups: Sequence[Group], owner: NDArray[np.int32], local: NDArray[np.integer]) -> NDArray[np.int32]:
    bias, first = np.full(owner.size, -1, np.int32), 0
    for n, group in enumerate(groups):
        if group.bias is not None:
            mine = owner == n
            bias[mine] = first + local[mine] // group.positions
            first += group.units
    return bias


def _walked(network: Network, group: Group, part: Part, places: Places, engine: Engine) -> tuple[Add, str]:
    """Single edges aggregated by a walk of their own, before a norm or dropout: `(run) -> [B, neurons]`."""
    row_of = {group.name: np.arange(group.neurons, dtype=np.int32)}
    edges = _edges(network, part.walked, row_of, places)
    kind = walk_kernel.MAX if group.aggregation == "max" else walk_kernel.SUM
    plan = walk_kernel.plan(
        edges.inputs, edges.pointer, edges.column, code=0, weight=edges.weight, aggregation=kind, bias=-1
    )
    names = [b.tensor for b in edges.bundles]

    def walked(run: Run) -> Tensor:
        x = _side_by_side(edges.fetches, run)
        return engine.walk(plan, x, [run.tensors[name] for name in names], None, None).t()

    return walked, "walk"


def _side_by_side(fetches: Sequence[Fetch], run: Run) -> Tensor:
    """The value rows a walk reads, [n, B], lying anyhow."""
    if len(fetches) == 1:
        return fetches[0].flat(run).t()
    if not fetches:
        like = run.slots[0]
        assert like is not None
        return like.new_zeros(0, run.batch)
    return torch.cat([fetch.flat(run).t() for fetch in fetches])
