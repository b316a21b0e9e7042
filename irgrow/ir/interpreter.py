"""The reference interpreter: what a network means, in float64, neuron by neuron.

Everything else (passes, compiler, kernels) is tested against this page, gradients included: it is plain
torch over `pattern.edges()`, level by level, and can be differentiated any number of times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from irgrow.ir.errors import BadData
from irgrow.ir.network import Group, Network, Norm
from irgrow.ir.pattern import Shape


def interpret(
    network: Network, *inputs: Tensor, tensors: Mapping[str, Tensor] | None = None, train: bool = False
) -> Tensor | tuple[Tensor, ...]:
    """The outputs `[B, *shape]` (float64) for one tensor `[B, *shape]` per input group.

    One output group gives a tensor, several a tuple in the order of `network.outputs`. `tensors` replaces
    tensors of the network by name (to differentiate with respect to them). `train=True` normalises with
    batch statistics; dropout is not drawn here. Raises BadData for inputs that do not fit.
    """
    values = interpret_groups(network, *inputs, tensors=tensors, train=train)
    outputs = tuple(values[name] for name in network.outputs)
    return outputs[0] if len(outputs) == 1 else outputs


def interpret_groups(
    network: Network, *inputs: Tensor, tensors: Mapping[str, Tensor] | None = None, train: bool = False
) -> dict[str, Tensor]:
    """The activations `[B, *shape]` (float64) of every group; see `interpret`."""
    batch = check_inputs(network, inputs)
    held = {n: t.to("cpu", torch.float64) for n, t in (network.tensors() | dict(tensors or {})).items()}
    groups = network.groups.values()
    first = dict(zip(network.groups, np.cumsum([0] + [g.neurons for g in groups]).tolist(), strict=False))
    level = torch.from_numpy(np.concatenate([network.levels[g.name] for g in groups])).long()
    source, target, weight = _edges(network, first, held)
    order = torch.argsort(level[target], stable=True)  # edge order within a neuron is kept
    source, target, weight = source[order], target[order], weight[order]
    bounds = torch.searchsorted(level[target], torch.arange(int(level.max()) + 2)).tolist()

    y = torch.zeros(batch, level.numel(), dtype=torch.float64)
    given = [x.to("cpu", torch.float64).reshape(batch, -1) for x in inputs]
    for now in range(int(level.max()) + 1):
        edges = slice(bounds[now], bounds[now + 1])
        s, t, w = source[edges], target[edges], weight[edges]
        z = torch.zeros_like(y).index_add(1, t, y[:, s] * w)
        for g in groups:
            mine = torch.from_numpy(np.flatnonzero(network.levels[g.name] == now)) + first[g.name]
            if mine.numel() == 0:
                continue
            if g.name in network.inputs:
                value = given[network.inputs.index(g.name)]
            else:
                pre = _first_max(y, s, t, w, mine) if g.aggregation == "max" else z[:, mine]
                value = g.function(_bias_and_norm(g, pre, mine - first[g.name], held, train))
            y = y.index_copy(1, mine, value)
    return {g.name: y[:, first[g.name] : first[g.name] + g.neurons].reshape(batch, *g.shape) for g in groups}


def check_inputs(network: Network, inputs: Sequence[Tensor]) -> int:
    """The common batch size; raises BadData unless there is one floating tensor `[B, *shape]` per input group."""
    if len(inputs) != len(network.inputs):
        raise BadData("inputs", f"{len(inputs)} tensors", f"{len(network.inputs)}, one each for {network.inputs}")
    for name, x in zip(network.inputs, inputs, strict=True):
        check_input(name, network.groups[name].shape, x)
    batches = {x.shape[0] for x in inputs}
    if len(batches) != 1:
        raise BadData("inputs", f"batches of {sorted(batches)} samples", "one batch size for all inputs")
    return batches.pop()


def check_input(name: str, shape: Shape, x: object) -> None:
    """Raises BadData unless x is a floating tensor `[B, *shape]`."""
    wanted = f"a floating tensor of shape (batch, {', '.join(map(str, shape))})"
    if not isinstance(x, Tensor):
        raise BadData(f"input {name!r}", type(x).__name__, wanted, do="use torch.as_tensor")
    if tuple(x.shape[1:]) != shape or x.dim() == 0:
        raise BadData(f"input {name!r}", f"shape {tuple(x.shape)}", wanted)
    if not x.is_floating_point():
        raise BadData(f"input {name!r}", x.dtype, wanted, do="convert it with .float()")


def _edges(network: Network, first: dict[str, int], held: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    sources, targets, weights = [torch.empty(0).long()], [torch.empty(0).long()], [torch.empty(0).double()]
    for bundle in network.bundles.values():
        s, t, w = (torch.from_numpy(a.astype(np.int64)) for a in bundle.pattern.all_edges(*network.shapes(bundle)))
        sources.append(s + first[bundle.source])
        targets.append(t + first[bundle.target])
        weights.append(held[bundle.tensor].reshape(-1)[w])
    return torch.cat(sources), torch.cat(targets), torch.cat(weights)


def _first_max(y: Tensor, s: Tensor, t: Tensor, w: Tensor, mine: Tensor) -> Tensor:
    """The largest incoming value per neuron of `mine`; a tie sends its gradient to the first parent in edge order."""
    keep = torch.isin(t, mine)
    v, row = y[:, s[keep]] * w[keep], torch.searchsorted(mine, t[keep])
    best = torch.full((v.shape[0], mine.numel()), -torch.inf, dtype=v.dtype)
    best = best.scatter_reduce(1, row.expand_as(v), v.detach(), "amax")
    at = torch.where((v.detach() == best[:, row]) | v.detach().isnan(), torch.arange(v.shape[1]), v.shape[1])
    chosen = torch.full_like(best, v.shape[1], dtype=torch.long).scatter_reduce(1, row.expand_as(v), at, "amin")
    with_none = torch.cat([v, v.new_zeros(v.shape[0], 1)], 1)  # a neuron without parents has 0
    return with_none.gather(1, chosen)


def _bias_and_norm(g: Group, z: Tensor, local: Tensor, held: Mapping[str, Tensor], train: bool) -> Tensor:
    unit = local // g.positions
    if g.bias is not None:
        z = z + held[f"bias.{g.name}"][unit]
    if g.norm is None:
        return z
    n: Norm = g.norm
    shaped = z.reshape(z.shape[0], g.units, g.positions)
    if n.kind == "batch" and not train:
        mean, variance = held[f"mean.{g.name}"][unit], held[f"variance.{g.name}"][unit]
        z = (z - mean) / torch.sqrt(variance + n.eps)
    else:
        if n.kind == "batch":
            mean = shaped.mean((0, 2), keepdim=True)
            variance = shaped.var((0, 2), unbiased=False, keepdim=True)
        else:
            shaped = shaped.reshape(z.shape[0], n.groups if n.kind == "group" else 1, -1)
            mean = shaped.mean(2, keepdim=True)
            variance = shaped.var(2, unbiased=False, keepdim=True)
        z = ((shaped - mean) / torch.sqrt(variance + n.eps)).reshape(z.shape)
    return z * held[f"scale.{g.name}"][unit] + held[f"shift.{g.name}"][unit]
