"""`Family`: the networks that passes make from a few tensors, as one differentiable function of these tensors.

Growth methods that train their proposals need the loss as a function of the proposal. Passes only copy,
share and place numbers, so every entry of every tensor they make is

    base + factor * (one entry of the given tensors)

and which one is found by giving the passes numbers instead of weights. Nothing about patterns, ties or
lineages has to be known here, and what is trained is exactly what the passes will make.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from irgrow.ir.network import Network
from irgrow.ir.pattern import Shape
from irgrow.runtime.model import CompiledNetwork

Build = Callable[[Network, Mapping[str, Tensor]], Network]


class Family:
    """`build(network, values)` for tensors `values` of these shapes, compiled once.

    `build` must be affine in its values, each entry of its tensors in at most one entry of them, and its
    structure must not depend on them. `outputs(values, inputs)` is differentiable, any number of times.
    """

    def __init__(self, build: Build, model: CompiledNetwork, shapes: Mapping[str, Shape]) -> None:
        network = model.network()
        self.shapes = dict(shapes)
        self.device, self.dtype = next(iter(network.tensors().values())).device, network.dtype
        self._build = build
        self._network = network
        base = build(network, self.zeros())
        self.compiled = CompiledNetwork(base, backend=model.backend, device=self.device).eval()
        self._base = {name: tensor.detach() for name, tensor in self.compiled.tensors().items()}
        self._places = self._found(network, base)

    def _found(self, network: Network, base: Network) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Per tensor: the places (flat) that depend on the values, on which entry, and times what."""
        blank = network.with_tensors(
            {n: torch.zeros_like(t, dtype=torch.float64) for n, t in network.tensors().items()}
        )
        count = sum(math.prod(shape) for shape in self.shapes.values())
        numbered = torch.arange(1.0, count + 1, dtype=torch.float64, device=self.device)
        numbers, factors, blank_base = (
            self._build(blank, self.split(flat)).tensors()
            for flat in (numbered, torch.ones_like(numbered), torch.zeros_like(numbered))
        )
        found = {}
        for name in base.tensors():
            factor = (factors[name] - blank_base[name]).flatten()
            number = (numbers[name] - blank_base[name]).flatten()
            at = torch.nonzero(factor).flatten()
            if at.numel():
                index = (number[at] / factor[at]).round().long() - 1
                found[name] = (at, index, factor[at].to(self.dtype))
        return found

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """One flat tensor as tensors by name."""
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        parts = torch.split(flat, sizes) if sizes else ()
        return {name: part.reshape(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def tensors(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every tensor of the network with these values."""
        flat = torch.cat([values[name].reshape(-1) for name in self.shapes]).to(self.dtype)
        found = dict(self._base)
        for name, (at, index, factor) in self._places.items():
            base = self._base[name]
            found[name] = base.flatten().index_add(0, at, factor * flat[index]).reshape(base.shape)
        return found

    def outputs(self, values: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> Any:
        """What the network with these values says, in eval mode, as the model itself would."""
        outputs, _ = self.compiled.program.run(self.tensors(values), inputs)
        return outputs[0] if len(outputs) == 1 else outputs

    def zeros(self) -> dict[str, Tensor]:
        """The values at which the network is the base."""
        return {n: torch.zeros(s, dtype=self.dtype, device=self.device) for n, s in self.shapes.items()}

    def network(self, values: Mapping[str, Tensor]) -> Network:
        """The network with these values, by the passes themselves."""
        return self._build(self._network, {name: value.detach() for name, value in values.items()})
