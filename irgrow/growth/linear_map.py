"""LiGO-like growth (Wang et al., 2023): new units are learned linear combinations of the existing ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from irgrow.growth.data import Data, Loss
from irgrow.growth.entries import Entrance
from irgrow.growth.methods.base import require_units
from irgrow.growth.methods.draws import normal
from irgrow.growth.methods.with_model import Bindable
from irgrow.growth.optimised import NewUnits
from irgrow.ir.errors import BadData, Refused
from irgrow.ir.pattern import Sparse
from irgrow.ir.proposal import Proposal
from irgrow.ir.statistics import Statistics
from irgrow.runtime.model import CompiledNetwork


@dataclass(frozen=True)
class LinearMap(Bindable):
    """Fan-in R W and fan-out V Q: the existing units' weights W and V, mixed by maps R and Q learned on the loss.

    R `[units, m]` and Q `[m, units]` (m existing units) begin normal, of variance `scale`^2 / m, and take `steps`
    steps of Adam on batches of `data`; so 2 m numbers are learned for a unit, however wide its layer is. Q begins at
    0 with `silent=True`, and the first step of Q is then what makes it speak. `measured_gain` is the fall of the
    loss on the first batch. The existing weights stay (LiGO maps them as well: its maps have an identity block here).

    Refused: sites entered at several groups, concatenations, sparse bundles that leave the site.
    Source: Wang et al., Learning to Grow Pretrained Models, arXiv:2303.00980 (width expansion).
    """

    units: int = 1
    steps: int = 100
    rate: float = 0.01
    scale: float = 0.5
    silent: bool = False
    seed: int = 0
    batch_size: int = 1024
    taps: str = "full"

    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        require_units(self)
        if self.steps < 0 or not self.rate > 0 or not self.scale > 0:
            found = f"steps={self.steps}, rate={self.rate}, scale={self.scale}"
            raise Refused("LinearMap", found, "0 or more steps, a positive rate and scale")

    def propose_with(
        self, statistics: Statistics, model: CompiledNetwork, data: Data | None = None, loss: Loss | None = None
    ) -> Proposal:
        """The units with the maps learned, on copies of the model."""
        new = NewUnits(self, self.units, statistics, model, data, loss, self.batch_size)
        entrance = Entrance(new.who, model.structure, statistics.site, statistics.bias)
        W = entrance.weights.to(new.device, new.dtype)
        V = {name: held.to(new.device, new.dtype) for name, held in self._fan_outs(new.who, entrance).items()}
        draw = torch.Generator().manual_seed(self.seed + statistics.units)
        size = self.scale / math.sqrt(W.shape[0])
        R = (size * normal(draw, self.units, W.shape[0])).to(new.device, new.dtype).requires_grad_()
        Q = (size * normal(draw, W.shape[0], self.units)).to(new.device, new.dtype)
        Q = (torch.zeros_like(Q) if self.silent else Q).requires_grad_()
        optimizer = torch.optim.Adam([R, Q], lr=self.rate)
        with torch.enable_grad():
            for step in range(self.steps):
                batch = new.first if step == 0 else new.next_batch()
                gradients = torch.autograd.grad(new.loss(self._values(new, W, V, R, Q), batch), [R, Q])
                for tensor, gradient in zip((R, Q), gradients, strict=True):
                    if not bool(torch.isfinite(gradient).all()):
                        raise BadData(f"{new.who}: gradient", "NaN or infinity", "finite values", do="check the loss")
                    tensor.grad = gradient
                optimizer.step()
        with torch.no_grad():
            values = self._values(new, W, V, R, Q)
            fall = float(new.loss(new.family.zeros(), new.first)) - float(new.loss(values, new.first))
        note = f"{2 * W.shape[0] * self.units} numbers learned: combinations of {W.shape[0]} units"
        return replace(new.proposal(values, measured_gain=fall), notes=(note,))

    def _fan_outs(self, who: str, entrance: Entrance) -> dict[str, Tensor]:
        """Per leaving bundle the existing fan-out `[out, m, taps]`."""
        network, m = entrance.network, entrance.group.units
        found = {}
        for way in entrance.geometry.exits:
            bundle = network.bundles[way.block.name.removeprefix("weight.")]
            if isinstance(bundle.pattern, Sparse):
                raise Refused(
                    who, f"sparse edges ({bundle.name!r}) that leave the site", "dense bundles or convolutions"
                )
            if network.groups[way.group].units != m:
                raise Refused(who, f"a concatenation ({way.group!r})", "groups of one size")
            found[bundle.name] = bundle.weight.detach().reshape(bundle.weight.shape[0], m, -1)
        return found

    def _values(self, new: NewUnits, W: Tensor, V: dict[str, Tensor], R: Tensor, Q: Tensor) -> dict[str, Tensor]:
        """The new weights of these maps, by the names that NewUnits has for them."""
        alpha, at = R @ W, 0
        values = {}
        for name, shape in new.incoming.items():
            width = math.prod(shape[1:])
            values[name] = alpha[:, at : at + width].reshape(shape)
            at += width
        for name, shape in new.outgoing.items():
            values[name] = torch.einsum("omt,mk->okt", V[name.removeprefix("out.")], Q).reshape(shape)
        return values
