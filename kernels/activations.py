"""The activation functions: one table for the interpreter, the compiler, the kernels and the growth methods.

Each activation is elementwise. `code` is the number by which compiled kernels know it and never changes.
`at_zero` and `slope` are sigma(0) and sigma'(0) as used right after growth (ReLU-like functions take the
right-hand slope, GradMax section 2). Sources of the constants: torch's documentation of each function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LEAKY_SLOPE = 0.01


@dataclass(frozen=True)
class Activation:
    """One elementwise function and the facts about it that passes and growth methods rely on."""

    name: str
    code: int
    function: Callable[[Tensor], Tensor]
    at_zero: float = 0.0  # sigma(0)
    slope: float = 1.0  # sigma'(0); the right-hand one where they differ
    smooth: bool = True  # differentiable everywhere
    homogeneous: bool = False  # sigma(c z) = c sigma(z) for c > 0
    idempotent: bool = False  # sigma(sigma(z)) = sigma(z): a layer of it can be added as identity

    def __call__(self, z: Tensor) -> Tensor:
        return self.function(z)


def _identity(z: Tensor) -> Tensor:
    return z


def _leaky_relu(z: Tensor) -> Tensor:
    return F.leaky_relu(z, LEAKY_SLOPE)


def _gaussian(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z * z)


_SELU_SLOPE = 1.0507009873554804934193349852946

ACTIVATIONS: dict[str, Activation] = {
    a.name: a
    for a in (
        Activation("identity", 0, _identity, homogeneous=True, idempotent=True),
        Activation("relu", 1, torch.relu, smooth=False, homogeneous=True, idempotent=True),
        Activation("leaky_relu", 2, _leaky_relu, smooth=False, homogeneous=True),
        Activation("tanh", 3, torch.tanh),
        Activation("sigmoid", 4, torch.sigmoid, at_zero=0.5, slope=0.25),
        Activation("gelu", 5, F.gelu, slope=0.5),
        Activation("silu", 6, F.silu, slope=0.5),
        Activation("selu", 7, F.selu, slope=_SELU_SLOPE, smooth=False),
        Activation("elu", 8, F.elu),
        Activation("softplus", 9, F.softplus, at_zero=0.6931471805599453, slope=0.5),
        Activation("sin", 10, torch.sin),
        Activation("gaussian", 11, _gaussian, at_zero=1.0, slope=0.0),
        Activation("abs", 12, torch.abs, smooth=False, homogeneous=True, idempotent=True),
        Activation("square", 13, torch.square, slope=0.0),
    )
}
