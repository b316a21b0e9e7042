"""The activations of activations.py inside Triton: values, slopes, and gradients through them.

A tile holds rows of different activations. `present` has bit `code` set for each one among them, so that only those
are computed; a row then takes the result of its own. Everything is written from exp, log, erf, sin and cos, which
exist for float32 and float64, on GPUs and in the interpreter. NaN stays NaN.

Which activations keep their slope, and the gradient from y = sigma(z) of the others: as in activations_numba.py.
"""

# mypy: ignore-errors
# (Triton infers the types of what is compiled)

from __future__ import annotations

import triton
import triton.language as tl

from irgrow.kernels.activations import ACTIVATIONS, LEAKY_SLOPE

_CODE = {name: activation.code for name, activation in ACTIVATIONS.items()}

RELU = tl.constexpr(_CODE["relu"])
LEAKY_RELU = tl.constexpr(_CODE["leaky_relu"])
TANH = tl.constexpr(_CODE["tanh"])
SIGMOID = tl.constexpr(_CODE["sigmoid"])
GELU = tl.constexpr(_CODE["gelu"])
SILU = tl.constexpr(_CODE["silu"])
SELU = tl.constexpr(_CODE["selu"])
ELU = tl.constexpr(_CODE["elu"])
SOFTPLUS = tl.constexpr(_CODE["softplus"])
SIN = tl.constexpr(_CODE["sin"])
GAUSSIAN = tl.constexpr(_CODE["gaussian"])
ABS = tl.constexpr(_CODE["abs"])
SQUARE = tl.constexpr(_CODE["square"])
BENT = tl.constexpr(~(1 << _CODE["identity"] | 1 << _CODE["relu"]))  # all but the two most frequent ones

LEAK = tl.constexpr(LEAKY_SLOPE)
SELU_SCALE = tl.constexpr(1.0507009873554804934)
SELU_BELOW = tl.constexpr(1.0507009873554804934 * 1.6732632423543772848)
SOFTPLUS_LINEAR = tl.constexpr(20.0)  # torch: softplus(z) = z above this
SOFTPLUS_AT_LINEAR = tl.constexpr(20.0000000020611608)  # softplus of it, and two roundings more
ROOT_HALF = tl.constexpr(0.70710678118654752440)
BELL_SCALE = tl.constexpr(0.39894228040143267794)  # 1 / sqrt(2 pi)


# --- elementary functions -------------------------------------------------------------------------------------


@triton.jit
def _exp_minus_one(x):
    """exp(x) - 1 for x <= 0, without cancellation: (u - 1) x / log(u) hardly depends on the rounding of u = exp(x)."""
    u, far = tl.exp(x), x < -40.0
    near = (u - 1.0) * (x / tl.log(tl.where((u == 1.0) | far, 2.0, u)))
    return tl.where(far, u - 1.0, tl.where(u == 1.0, x, near))


@triton.jit
def _log_one_plus(u):
    """log(1 + u) for 0 <= u <= 1, likewise."""
    w = 1.0 + u
    return tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def _positive_part(z):
    return tl.where(z < 0.0, 0.0, z)


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _tanh(z):
    e = _exp_minus_one(-2.0 * tl.abs(z))
    t = e / (e + 2.0)
    return tl.where(z < 0.0, t, -t)


@triton.jit
def _softplus(z):
    bent = _log_one_plus(tl.exp(-tl.abs(z))) + _positive_part(z)
    return tl.where(z > SOFTPLUS_LINEAR, z, bent)


@triton.jit
def _normal_below(z):
    """P(N < z) for a standard normal N."""
    return 0.5 + 0.5 * tl.erf(z * ROOT_HALF)


@triton.jit
def _bell(z):
    return tl.exp(-0.5 * z * z)


# --- tiles ----------------------------------------------------------------------------------------------------


@triton.jit
def activate(z, code, present):
    """sigma(z) of a tile z [R, C] with activations code [R, 1]."""
    y = z
    if ((present >> RELU) & 1) != 0:
        y = tl.where(code == RELU, _positive_part(z), y)
    if (present & BENT) != 0:
        below = tl.where(z > 0.0, 0.0, z)
        if ((present >> LEAKY_RELU) & 1) != 0:
            y = tl.where(code == LEAKY_RELU, tl.where(z > 0.0, z, z * LEAK), y)
        if ((present >> TANH) & 1) != 0:
            y = tl.where(code == TANH, _tanh(z), y)
        if ((present >> SIGMOID) & 1) != 0:
            y = tl.where(code == SIGMOID, _sigmoid(z), y)
        if ((present >> GELU) & 1) != 0:
            y = tl.where(code == GELU, z * _normal_below(z), y)
        if ((present >> SILU) & 1) != 0:
            y = tl.where(code == SILU, z * _sigmoid(z), y)
        if ((present >> SELU) & 1) != 0:
            bent = tl.where(z > 0.0, SELU_SCALE * z, SELU_BELOW * _exp_minus_one(below))
            y = tl.where(code == SELU, bent, y)
        if ((present >> ELU) & 1) != 0:
            y = tl.where(code == ELU, tl.where(z > 0.0, z, _exp_minus_one(below)), y)
        if ((present >> SOFTPLUS) & 1) != 0:
            y = tl.where(code == SOFTPLUS, _softplus(z), y)
        if ((present >> SIN) & 1) != 0:
            y = tl.where(code == SIN, tl.sin(z), y)
        if ((present >> GAUSSIAN) & 1) != 0:
            y = tl.where(code == GAUSSIAN, _bell(z), y)
        if ((present >> ABS) & 1) != 0:
            y = tl.where(code == ABS, tl.abs(z), y)
        if ((present >> SQUARE) & 1) != 0:
            y = tl.where(code == SQUARE, z * z, y)
    return y


@triton.jit
def slope_of(z, code, present):
    """sigma'(z) of a tile, for the activations whose value does not determine it; anything for the others."""
    s = z
    if ((present >> GELU) & 1) != 0:
        s = tl.where(code == GELU, _normal_below(z) + z * _bell(z) * BELL_SCALE, s)
    if ((present >> SILU) & 1) != 0:
        p = _sigmoid(z)
        s = tl.where(code == SILU, p * (1.0 + z * (1.0 - p)), s)
    if ((present >> SIN) & 1) != 0:
        s = tl.where(code == SIN, tl.cos(z), s)
    if ((present >> GAUSSIAN) & 1) != 0:
        s = tl.where(code == GAUSSIAN, -z * _bell(z), s)
    if ((present >> ABS) & 1) != 0:
        sign = tl.where(z > 0.0, 1.0, tl.where(z < 0.0, -1.0, z))  # 0 at 0, NaN at NaN
        s = tl.where(code == ABS, sign, s)
    if ((present >> SQUARE) & 1) != 0:
        s = tl.where(code == SQUARE, z + z, s)
    return s


@triton.jit
def chain(g, y, code, present):
    """g sigma'(z) of a tile, from y = sigma(z); g where the slope is kept instead.

    Numbers are compared with 0: Triton rounds one that is compared with another to float32.
    """
    d = g
    if ((present >> RELU) & 1) != 0:
        d = tl.where(code == RELU, tl.where(y <= 0.0, 0.0, g), d)
    if (present & BENT) != 0:
        if ((present >> LEAKY_RELU) & 1) != 0:
            d = tl.where(code == LEAKY_RELU, tl.where(y > 0.0, g, g * LEAK), d)
        if ((present >> TANH) & 1) != 0:
            d = tl.where(code == TANH, g * (1.0 - y * y), d)
        if ((present >> SIGMOID) & 1) != 0:
            d = tl.where(code == SIGMOID, g * (y * (1.0 - y)), d)
        if ((present >> SELU) & 1) != 0:
            d = tl.where(code == SELU, g * tl.where(y > 0.0, SELU_SCALE, y + SELU_BELOW), d)
        if ((present >> ELU) & 1) != 0:
            d = tl.where(code == ELU, tl.where(y > 0.0, g, g * (y + 1.0)), d)
        if ((present >> SOFTPLUS) & 1) != 0:
            bent = -g * _exp_minus_one(-_positive_part(y))
            d = tl.where(code == SOFTPLUS, tl.where(y - SOFTPLUS_AT_LINEAR > 0.0, g, bent), d)
    return d
