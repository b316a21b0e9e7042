"""NeST's edges (Dai et al., 2017): join the neurons between which an edge would have the largest gradient."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from irgrow.growth.data import Data, Loss
from irgrow.growth.probe import REDUCTIONS, bad_loss, evaluating
from irgrow.growth.selection import Candidate, Held, Selection, held_batches, measured_fall
from irgrow.ir.errors import BadData, Refused, UnknownName
from irgrow.ir.network import Network
from irgrow.kernels.outer import accumulate
from irgrow.passes.edges import AddEdges
from irgrow.runtime.model import CompiledNetwork


@dataclass(frozen=True)
class NewEdges:
    """The `edges` absent edges u -> v with the largest |E[h_u g_v]|, at weight -`rate` times that gradient.

    h_u is the parent's activation, g_v the loss gradient at the child's pre-activation: their product is the
    gradient that the edge's weight would have. At rate 0 (the default) outputs stay the same and the edges
    learn from the next step on. Edges lead to deeper neurons only, within and between groups, over
    convolutions too (where an edge joins two positions). `sites`: only edges into these groups.

    Memory: one float64 number per pair of neurons of two groups at a time. The predicted gain is rate times
    the squared gradients. Refused: no absent edge with a gradient.
    Source: arXiv:1711.02017, section 3.2 (gradient-based connection growth).
    """

    edges: int = 1
    rate: float = 0.0
    reduction: str = "mean"
    batch_size: int = 1024

    def __post_init__(self) -> None:
        if self.edges < 1 or not self.rate >= 0:
            raise Refused("NewEdges", f"edges={self.edges}, rate={self.rate}", "at least one edge, a rate of 0 or more")
        if self.reduction not in REDUCTIONS:
            raise UnknownName(f"NewEdges: reduction {self.reduction!r}", expected=f"one of {', '.join(REDUCTIONS)}")

    def select(
        self, model: CompiledNetwork, data: Data, loss: Loss, *, sites: Iterable[str] | None = None
    ) -> Selection:
        """The edges, as a pass; the model stays as it is."""
        network, who = model.structure, "NewEdges"
        children = [network.group(name).name for name in (network.groups if sites is None else sites)]
        children = [c for c in children if c not in network.inputs and network.groups[c].aggregation == "sum"]
        held = held_batches(model, data, self.batch_size, None, who)
        values, gradients = self._observed(model, held, loss, children)
        best: list[tuple[float, str, int, int]] = []
        for source, h in values.items():
            for target in children:
                absent = _absent(network, source, target)
                if not bool(absent.any()):
                    continue
                total = torch.zeros(h.shape[1], gradients[target].shape[1], dtype=torch.float64, device=h.device)
                found = accumulate(total, h, gradients[target]) / h.shape[0]
                found = torch.where(absent.to(found.device), found, 0.0)
                size = found.abs().flatten().topk(min(self.edges, found.numel())).indices
                columns = found.shape[1]
                parents, ends = network.ids(source), network.ids(target)
                for at in size.tolist():
                    g = float(found.flatten()[at])
                    if g:
                        best.append((g, f"{source} -> {target}", int(parents[at // columns]), int(ends[at % columns])))
        best = sorted(best, key=lambda b: -abs(b[0]))[: self.edges]
        if not best:
            raise Refused(who, "no absent edge with a gradient", "two neurons to join", do="grow units, or train on")
        weights = tuple(-self.rate * g for g, *_ in best) if self.rate else None
        step = AddEdges(tuple((parent, child) for _, _, parent, child in best), weights)
        return Selection(
            step,
            tuple(Candidate("edge", site, v, g, -self.rate * g, self.rate * g**2, True) for g, site, _, v in best),
            self.rate * sum(g**2 for g, *_ in best),
            measured_fall(model, step(network).after, held, loss, who) if self.rate else 0.0,
        )

    def _observed(
        self, model: CompiledNetwork, held: Held, loss: Loss, children: list[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Activations of every group and per-sample gradients of the children, `[samples, neurons]`, in eval mode."""
        network = model.structure
        names = tuple(network.groups)
        values: dict[str, list[Tensor]] = {name: [] for name in names}
        gradients: dict[str, list[Tensor]] = {name: [] for name in children}
        for inputs, targets in held:
            count = targets.shape[0]
            with evaluating(model), torch.enable_grad():
                shapes = {name: network.groups[name].shape for name in children}
                shifts = {name: inputs[0].new_zeros(count, *s).requires_grad_() for name, s in shapes.items()}
                outputs, recorded = model.record(*inputs, values=names, shifts=shifts)
                value = loss(outputs, targets)
                if not isinstance(value, Tensor) or value.dim():
                    raise BadData("NewEdges: loss", "not one number", "a loss that returns one number for the batch")
                if not bool(torch.isfinite(value)):
                    raise bad_loss("NewEdges", model, inputs)
                found = torch.autograd.grad(value, list(shifts.values()), allow_unused=True)
            for name, shift, gradient in zip(shifts, shifts.values(), found, strict=True):
                g = torch.zeros_like(shift) if gradient is None else gradient
                if not bool(torch.isfinite(g).all()):
                    raise BadData(f"NewEdges: group {name!r}: gradient", "NaN or infinity", "finite values",
                                  do="check the loss")  # fmt: skip
                gradients[name].append(g.flatten(1) * (count if self.reduction == "mean" else 1))
            for name in names:
                values[name].append(recorded[name].detach().flatten(1))
        return {n: torch.cat(v) for n, v in values.items()}, {n: torch.cat(g) for n, g in gradients.items()}


def _absent(network: Network, source: str, target: str) -> Tensor:
    """`[parents, children]`: where no edge is and one could be, to a deeper neuron."""
    deeper = network.levels[source].reshape(-1, 1) < network.levels[target].reshape(1, -1)
    free = np.array(deeper)
    for bundle in network.leaving(source):
        if bundle.target == target:
            for s, t, _ in bundle.pattern.edges(*network.shapes(bundle)):
                free[s, t] = False
    return torch.from_numpy(free)
