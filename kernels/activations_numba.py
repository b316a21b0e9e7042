"""The activations of activations.py inside numba: values, slopes, and gradients through them.

All are written so that LLVM vectorises a loop over them: no calls, no branches. Accuracy against exact values,
relative to max|exact|: better than 1e-6 in float32 and 1e-13 in float64; NaN stays NaN. What is clamped
underflows to about 1e-38 (1e-308) rather than to 0.

The backward pass needs sigma'(z). For eight activations the stored value y = sigma(z) gives it (`chain`); for the
others (`stores_slope`) y does not determine z, and the forward pass keeps the slope itself.
"""

# mypy: ignore-errors
# (numba infers the types of what is compiled)

from __future__ import annotations

import math
from typing import Any

from numba import njit

from irgrow.kernels.activations import ACTIVATIONS, LEAKY_SLOPE
from irgrow.kernels.lanes import constant, either, horner, low_bits, nearest, power_of_two

IDENTITY, RELU, LEAKY_RELU, TANH, SIGMOID, GELU, SILU, SELU, ELU, SOFTPLUS, SIN, GAUSSIAN, ABS, SQUARE = (
    ACTIVATIONS[name].code
    for name in (
        *("identity", "relu", "leaky_relu", "tanh", "sigmoid", "gelu", "silu", "selu", "elu"),
        *("softplus", "sin", "gaussian", "abs", "square"),
    )
)
SELU_SCALE, SELU_ALPHA = 1.0507009873554804934, 1.6732632423543772848
SOFTPLUS_LINEAR = 20.0  # torch: softplus(z) = z above this
SOFTPLUS_AT_LINEAR = 20.0000000020611537  # softplus of it

# ln 2 and pi/2 in parts that leave room for an exact product with a small integer (Cody and Waite).
LN2_32 = (0.693359375, -2.12194440e-4)
LN2_64 = (0.693147180369123816490, 1.90821492927058770002e-10)
HALF_PI_32 = (1.5703125, 4.8351287841796875e-4, 3.1391647865048117e-7)
HALF_PI_64 = (1.570796326734125614166, 6.077100506303965976595e-11, 2.022266248795950631e-21)
SIN_LIMIT_32, SIN_LIMIT_64 = 8192.0, 1e6  # beyond, the parts above are too short: libm

# Taylor: (exp(r) - 1 - r) / r^2 for |r| <= ln(2)/2; the first term left out is below half an ulp.
EXP_32 = tuple(1 / math.factorial(k) for k in range(2, 8))
EXP_64 = tuple(1 / math.factorial(k) for k in range(2, 14))
# log(1 + u) = 2 artanh(s), s = u / (2 + u) <= 1/3: the series in s^2.
LOG_32 = tuple(2 / (2 * k + 1) for k in range(8))
LOG_64 = tuple(2 / (2 * k + 1) for k in range(16))
# sin(r)/r and cos(r) in r^2, |r| <= pi/4.
SIN_32 = tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(6))
SIN_64 = tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(10))
COS_32 = tuple((-1) ** k / math.factorial(2 * k) for k in range(6))
COS_64 = tuple((-1) ** k / math.factorial(2 * k) for k in range(10))
# (1 + 2x) exp(x^2) erfc(x) for x >= 0 as a polynomial in t = (x - 2.5) / (x + 2.5): the form of Shepherd and
# Laframboise, Math. Comp. 36 (1981) 249; our coefficients, from its Chebyshev series in 60 digits. Relative
# errors 6e-9 and 2e-16.
ERFC_32 = (
    *(1.26483818024, -0.122356800752, -0.0990242416581, 0.157630994362, -0.102970538356, 0.0327520525687),
    *(0.000946759630325, -0.00435049234049, 0.000463337520599, 0.000575734629341, -6.39178660442e-5),
    -6.19075309705e-5,
)
ERFC_64 = (
    *(1.264838184366861655, -0.12235676308240214489, -0.099024539573651214289, 0.15762991902299269945),
    *(-0.10296705603621854042, 0.032760893275661330115, 0.00093189277334686884314, -0.0043820784408475865882),
    *(0.00049186623888341346963, 0.00063212514641559490006, -0.000088481680299003395903),
    *(-0.00011352632492718973757, 6.2749300957095994477e-6, 0.000022712248592600015921),
    *(2.5875002384947697466e-6, -4.2446125265992909289e-6, -1.5509213278376790677e-6),
    *(5.6508978980072571989e-7, 4.9733114231240617341e-7, -2.5957897797325720799e-9),
    *(-1.0181458785967409374e-7, -1.9529757279629242567e-8, 1.0433272466723329685e-8),
    3.3505549185349607781e-9,
)

# Only called by compiled code: without their wrappers for Python they compile in half the time.
compiled: Any = njit(fastmath={"contract"}, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
inline: Any = njit(
    fastmath={"contract"}, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, forceinline=True
)


# --- elementary functions -------------------------------------------------------------------------------------


@inline
def _exp_parts(x):
    """(s, p) with exp(x) = s + s p and s a power of two; x is clamped to where neither s overflows."""
    low, high = either(-87.0, -708.0, x), either(88.0, 709.0, x)
    x = low if x < low else x
    x = high if x > high else x
    k, shifted = nearest(x * constant(1.4426950408889634, x))
    r = x - k * either(LN2_32[0], LN2_64[0], x)
    r = r - k * either(LN2_32[1], LN2_64[1], x)
    return power_of_two(shifted), r + r * r * horner(r, EXP_32, EXP_64)


@inline
def _exp(x):
    s, p = _exp_parts(x)
    return s + s * p


@inline
def _exp_minus_one(x):
    s, p = _exp_parts(x)
    return (s - constant(1.0, x)) + s * p


@inline
def _log_one_plus(u):
    """log(1 + u) for 0 <= u <= 1."""
    s = u / (constant(2.0, u) + u)
    return s * horner(s * s, LOG_32, LOG_64)


@inline
def _sine(x, quarters):
    """sin(x + quarters pi/2) for |x| up to SIN_LIMIT."""
    k, shifted = nearest(x * constant(0.6366197723675814, x))
    r = x - k * either(HALF_PI_32[0], HALF_PI_64[0], x)
    r = r - k * either(HALF_PI_32[1], HALF_PI_64[1], x)
    r = r - k * either(HALF_PI_32[2], HALF_PI_64[2], x)
    quadrant = low_bits(shifted) + quarters
    sine, cosine = r * horner(r * r, SIN_32, SIN_64), horner(r * r, COS_32, COS_64)
    y = cosine if quadrant & 1 else sine
    return -y if quadrant & 2 else y


@inline
def _normal_tail(z):
    """(P(N > |z|), exp(-z^2/2)) for a standard normal N."""
    x = abs(z) * constant(0.7071067811865476, z)
    x = constant(40.0, x) if x > constant(40.0, x) else x
    t = (x - constant(2.5, x)) / (x + constant(2.5, x))
    bell = _exp(-x * x)
    scaled = horner(t, ERFC_32, ERFC_64) / (constant(2.0, x) + constant(4.0, x) * x)
    return bell * scaled, bell


@inline
def _normal_below(z, tail):
    return tail if z < constant(0.0, z) else constant(1.0, z) - tail


@inline
def _sigmoid(z):
    return constant(1.0, z) / (constant(1.0, z) + _exp(-z))


# --- sigma(z) -------------------------------------------------------------------------------------------------


@inline
def _relu(z):
    return constant(0.0, z) if z < constant(0.0, z) else z


@inline
def _leaky_relu(z):
    return z if z > constant(0.0, z) else z * constant(LEAKY_SLOPE, z)


@inline
def _tanh(z):
    limit = constant(20.0, z)
    z = limit if z > limit else z
    e = _exp_minus_one(z + z)
    return e / (e + constant(2.0, z))


@inline
def _gelu(z):
    tail, _bell = _normal_tail(z)
    return z * _normal_below(z, tail)


@inline
def _silu(z):
    return z * _sigmoid(z)


@inline
def _selu(z):
    below = constant(SELU_SCALE * SELU_ALPHA, z) * _exp_minus_one(z)
    return constant(SELU_SCALE, z) * z if z > constant(0.0, z) else below


@inline
def _elu(z):
    below = _exp_minus_one(z)
    return z if z > constant(0.0, z) else below


@inline
def _softplus(z):
    bent = _log_one_plus(_exp(-abs(z))) + (z if z > constant(0.0, z) else constant(0.0, z))
    return z if z > constant(SOFTPLUS_LINEAR, z) else bent


@inline
def _gaussian(z):
    return _exp(constant(-0.5, z) * z * z)


@inline
def activate_one(code, z):
    """sigma(z), for a single number."""
    if code == RELU:
        return _relu(z)
    if code == IDENTITY:
        return z
    if code == TANH:
        return _tanh(z)
    if code == LEAKY_RELU:
        return _leaky_relu(z)
    if code == SIGMOID:
        return _sigmoid(z)
    if code == GELU:
        return _gelu(z)
    if code == SILU:
        return _silu(z)
    if code == SELU:
        return _selu(z)
    if code == ELU:
        return _elu(z)
    if code == SOFTPLUS:
        return _softplus(z)
    if code == SIN:
        return math.sin(z)
    if code == GAUSSIAN:
        return _gaussian(z)
    if code == ABS:
        return abs(z)
    return z * z


@compiled
def activate(code, v, start, stop):
    """v[start:stop] becomes sigma of itself."""
    if code == RELU:
        for l in range(start, stop):
            v[l] = _relu(v[l])
    elif code == TANH:
        for l in range(start, stop):
            v[l] = _tanh(v[l])
    elif code == LEAKY_RELU:
        for l in range(start, stop):
            v[l] = _leaky_relu(v[l])
    elif code == SIGMOID:
        for l in range(start, stop):
            v[l] = _sigmoid(v[l])
    elif code == GELU:
        for l in range(start, stop):
            v[l] = _gelu(v[l])
    elif code == SILU:
        for l in range(start, stop):
            v[l] = _silu(v[l])
    elif code == SELU:
        for l in range(start, stop):
            v[l] = _selu(v[l])
    elif code == ELU:
        for l in range(start, stop):
            v[l] = _elu(v[l])
    elif code == SOFTPLUS:
        for l in range(start, stop):
            v[l] = _softplus(v[l])
    elif code == SIN:
        if _is_small(v, start, stop):
            for l in range(start, stop):
                v[l] = _sine(v[l], 0)
        else:
            for l in range(start, stop):
                v[l] = math.sin(v[l])
    elif code == GAUSSIAN:
        for l in range(start, stop):
            v[l] = _gaussian(v[l])
    elif code == ABS:
        for l in range(start, stop):
            v[l] = abs(v[l])
    elif code == SQUARE:
        for l in range(start, stop):
            v[l] = v[l] * v[l]


@inline
def _is_small(v, start, stop):
    large = 0
    for l in range(start, stop):
        large += abs(v[l]) > either(SIN_LIMIT_32, SIN_LIMIT_64, v[l])
    return large == 0


# --- sigma'(z), stored by the forward pass --------------------------------------------------------------------


@inline
def stores_slope(code):
    return code in (GELU, SILU) or code >= SIN


@inline
def _gelu_slope(z):
    tail, bell = _normal_tail(z)
    return _normal_below(z, tail) + z * bell * constant(0.3989422804014327, z)


@inline
def _silu_slope(z):
    s = _sigmoid(z)
    return s * (constant(1.0, z) + z * (constant(1.0, z) - s))


@inline
def _gaussian_slope(z):
    return -z * _gaussian(z)


@inline
def _abs_slope(z):
    """The sign; 0 at 0, NaN at NaN."""
    sign = constant(1.0, z) if z > constant(0.0, z) else constant(-1.0, z)
    return sign if abs(z) > constant(0.0, z) else z


@inline
def slope_one(code, z):
    if code == GELU:
        return _gelu_slope(z)
    if code == SILU:
        return _silu_slope(z)
    if code == SIN:
        return math.cos(z)
    if code == GAUSSIAN:
        return _gaussian_slope(z)
    if code == ABS:
        return _abs_slope(z)
    return z + z


@compiled
def store_slopes(code, v, start, stop, slopes, place):
    """slopes[place + l - start] = sigma'(v[l]) for an activation that `stores_slope`."""
    shift = place - start
    if code == GELU:
        for l in range(start, stop):
            slopes[l + shift] = _gelu_slope(v[l])
    elif code == SILU:
        for l in range(start, stop):
            slopes[l + shift] = _silu_slope(v[l])
    elif code == SIN:
        if _is_small(v, start, stop):
            for l in range(start, stop):
                slopes[l + shift] = _sine(v[l], 1)
        else:
            for l in range(start, stop):
                slopes[l + shift] = math.cos(v[l])
    elif code == GAUSSIAN:
        for l in range(start, stop):
            slopes[l + shift] = _gaussian_slope(v[l])
    elif code == ABS:
        for l in range(start, stop):
            slopes[l + shift] = _abs_slope(v[l])
    elif code == SQUARE:
        for l in range(start, stop):
            slopes[l + shift] = v[l] + v[l]


# --- the gradient through sigma, from y -----------------------------------------------------------------------


@inline
def _chain_relu(g, y):
    return constant(0.0, g) if y <= constant(0.0, y) else g


@inline
def _chain_leaky_relu(g, y):
    return g if y > constant(0.0, y) else g * constant(LEAKY_SLOPE, g)


@inline
def _chain_tanh(g, y):
    return g * (constant(1.0, y) - y * y)


@inline
def _chain_sigmoid(g, y):
    return g * (y * (constant(1.0, y) - y))


@inline
def _chain_selu(g, y):
    above, below = constant(SELU_SCALE, y), y + constant(SELU_SCALE * SELU_ALPHA, y)
    return g * (above if y > constant(0.0, y) else below)


@inline
def _chain_elu(g, y):
    return g if y > constant(0.0, y) else g * (y + constant(1.0, y))


@inline
def _chain_softplus(g, y):
    bent = -g * _exp_minus_one(-y)
    return g if y > constant(SOFTPLUS_AT_LINEAR, y) else bent


@inline
def chain_one(code, g, y):
    """g sigma'(z) from y = sigma(z), for a single number and an activation that does not `stores_slope`."""
    if code == RELU:
        return _chain_relu(g, y)
    if code == TANH:
        return _chain_tanh(g, y)
    if code == LEAKY_RELU:
        return _chain_leaky_relu(g, y)
    if code == SIGMOID:
        return _chain_sigmoid(g, y)
    if code == SELU:
        return _chain_selu(g, y)
    if code == ELU:
        return _chain_elu(g, y)
    if code == SOFTPLUS:
        return _chain_softplus(g, y)
    return g


@compiled
def chain(code, g, v, start, stop):
    """g[start:stop] becomes g sigma'(z), from y in v[start:stop]."""
    if code == RELU:
        for l in range(start, stop):
            g[l] = _chain_relu(g[l], v[l])
    elif code == TANH:
        for l in range(start, stop):
            g[l] = _chain_tanh(g[l], v[l])
    elif code == LEAKY_RELU:
        for l in range(start, stop):
            g[l] = _chain_leaky_relu(g[l], v[l])
    elif code == SIGMOID:
        for l in range(start, stop):
            g[l] = _chain_sigmoid(g[l], v[l])
    elif code == SELU:
        for l in range(start, stop):
            g[l] = _chain_selu(g[l], v[l])
    elif code == ELU:
        for l in range(start, stop):
            g[l] = _chain_elu(g[l], v[l])
    elif code == SOFTPLUS:
        for l in range(start, stop):
            g[l] = _chain_softplus(g[l], v[l])
