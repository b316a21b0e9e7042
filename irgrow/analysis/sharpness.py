"""How flat a minimum is: the eigenvalue of largest modulus of D^{1/2} H D^{1/2}, for three choices of D.

    depth blocks    D = ||W_block||_F^2, the same for all of a block: one block per weight matrix; on a network's
                    graph all edges from one depth to another. Unchanged by rescaling whole layers (all neurons of
                    one depth times c, what they feed divided by c; ReLU-like activations), not by rescaling
                    single neurons. The measure of Rangamani et al. (arXiv:1902.02434) as Caillon & Cerisara use it.
    edge            D = theta_e^2: unchanged by either.
    plain           D = 1: changed by both.

Biases are blocks of their own, and so are the scales and shifts of norms: inside a weight block they would break
the invariance, since in deeper layers a bias scales with all layers before it.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from irgrow.analysis.hessian import Hessian
from irgrow.growth.data import Data, Loss
from irgrow.ir.errors import UnknownName
from irgrow.ir.network import Bundle, Network
from irgrow.runtime.model import CompiledNetwork

MEASURES = ("depth blocks", "edge", "plain")


def flatness(
    model: nn.Module,
    data: Data,
    loss: Loss,
    *,
    measures: Iterable[str] = MEASURES,
    parameters: Iterable[str] | None = None,
    reduction: str = "mean",
    batch_size: int | None = None,
    seed: int = 0,
    tolerance: float | None = None,
) -> dict[str, float]:
    """The eigenvalue of largest modulus (with its sign) by measure; its modulus is the paper's spectral norm.

    Options as of `Hessian`. Large is sharp. UnknownName for a measure that does not exist.
    """
    wanted = tuple(measures)
    for name in wanted:
        if name not in MEASURES:
            raise UnknownName(f"flatness: measure {name!r}", expected=f"one of {', '.join(MEASURES)}")
    hessian = Hessian(model, data, loss, parameters=parameters, reduction=reduction, batch_size=batch_size)
    found = {}
    for name in wanted:
        [value] = hessian.eigenvalues(scale=scale(hessian, name), seed=seed, tolerance=tolerance)
        found[name] = value
    return found


def scale(hessian: Hessian, measure: str) -> Tensor | None:
    """The diagonal of D^{1/2} `[P]`, float64; None for `plain`."""
    if measure == "plain":
        return None
    held = dict(hessian.model.named_parameters())
    values = torch.cat([held[n].detach().double().reshape(-1) for n in hessian.names])
    if measure == "edge":
        return values.abs()
    of = blocks(hessian.model)
    block = torch.cat([of[n].reshape(-1) for n in hessian.names]).to(values.device)
    squares = torch.zeros(int(block.max()) + 1, dtype=torch.float64, device=values.device)
    return squares.index_add(0, block, values.square()).sqrt()[block]


def blocks(model: nn.Module) -> dict[str, Tensor]:
    """For every parameter the number of each entry's block `[*shape]`, int64.

    A parameter of a compiled network (also one inside another module) is cut by depth: edges by the depths they
    join, biases and norms by the depth of their group's neurons. Any other tensor is one block. A weight that
    several edges share belongs to the block of its first edge.
    """
    number: dict[object, int] = {}
    found: dict[str, Tensor] = {}

    def block(key: object) -> int:
        return number.setdefault(key, len(number))

    for prefix, module in model.named_modules():
        if isinstance(module, CompiledNetwork):
            network, lead = module.structure, f"{prefix}." if prefix else ""
            for bundle in network.bundles.values():
                pairs, which = _depths(network, bundle)
                ids = np.array([block((prefix, "weight", s, t)) for s, t in pairs], np.int64)
                found[lead + bundle.tensor] = torch.from_numpy(ids[which]).reshape(bundle.weight.shape)
            for group in network.groups.values():
                level = network.levels[group.name][:: group.positions]
                for name, tensor in group.tensors():
                    kind = name.partition(".")[0]
                    ids = np.array([block((prefix, kind, int(d))) for d in level], np.int64)
                    found[lead + name] = torch.from_numpy(ids).reshape(tensor.shape)
    for name, parameter in model.named_parameters():
        if name not in found:
            found[name] = torch.full(tuple(parameter.shape), block(name), dtype=torch.int64)
    return {name: found[name] for name, _ in model.named_parameters()}


def _depths(network: Network, bundle: Bundle) -> tuple[list[tuple[int, int]], np.ndarray]:
    """The pairs (depth of source, depth of target) among a bundle's edges, and which pair each weight has."""
    source, target = (network.levels[name].astype(np.int64) for name in (bundle.source, bundle.target))
    if source.min() == source.max() and target.min() == target.max():
        return [(int(source[0]), int(target[0]))], np.zeros(bundle.weight.numel(), np.int64)
    width = int(max(source.max(), target.max())) + 1
    code = np.zeros(bundle.weight.numel(), np.int64)  # entries without an edge stay zero: their block is of no account
    for s, t, w in reversed(list(bundle.pattern.edges(*network.shapes(bundle)))):
        code[w[::-1]] = (source[s] * width + target[t])[::-1]  # of the edges that share a weight the first counts
    present, which = np.unique(code, return_inverse=True)
    return [divmod(int(c), width) for c in present], which.reshape(-1)
