"""TINY: the bottleneck falls by what the singular values say; the joint form is the least-squares optimum."""

from __future__ import annotations

import pytest
import torch
from growth_nets import DOUBLE, drawn, forked, grown_loss, mlp, relative
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import irgrow as ig
from irgrow.growth.probe import probe
from irgrow.ir.errors import BadData, Refused, UnknownName
from irgrow.ir.interpreter import interpret_groups
from irgrow.ir.statistics import Block, Statistics

ALL = ("S", "M_prev", "S_in", "M", "C", "E")


def made(n: int = 30, b: int = 6, c: int = 4, g: int = 5, seed: int = 0, scale: float = 1.0):
    """Statistics of random rows with one flat target, and the rows (b, c, g)."""
    draw = torch.Generator().manual_seed(seed)
    B = torch.randn(n, b, generator=draw, dtype=DOUBLE)
    Cc = torch.randn(n, c, generator=draw, dtype=DOUBLE) + 0.5 * B[:, :1]
    G = torch.tanh(B @ torch.randn(b, g, generator=draw, dtype=DOUBLE)) + torch.randn(
        n, g, generator=draw, dtype=DOUBLE
    )
    G = G * scale
    moments = {"S": (B, B), "M_prev": (B, G), "S_in": (Cc, Cc), "M": (Cc, G), "C": (B, Cc), "E": (G, G)}
    s = Statistics(
        "h", "0", n, (Block("weight.a", (b,)),), (Block("weight.o", (g,), "y"),), (Block("weight.o", (c,), "y"),),
        **{k: x.mT @ y / n for k, (x, y) in moments.items()},
    )  # fmt: skip
    return s, B, Cc, G


def psi(v, c=None):
    """The mean squared norm of v, after the best linear fit by c."""
    if c is not None:
        v = v - c @ torch.linalg.lstsq(c, v).solution
    return v.square().sum() / len(v)


@given(st.integers(1, 5), st.integers(0, 10_000), st.floats(-6, 6))
def test_psi_falls_by_the_squares_of_the_singular_values(k: int, seed: int, size: float) -> None:
    s, B, C, G = made(seed=seed, scale=10**size)
    p = ig.Tiny(k).propose(s)
    v_perp = -G - C @ s.best_move.mT
    fall = psi(v_perp) - psi(v_perp - B @ p.alpha.mT @ p.omega.mT)
    assert relative(fall, p.singular_values.square().sum()) < 1e-10
    assert p.units == k  # whatever the scale of the loss
    # with dW refitted it falls by more
    assert psi(v_perp, C) - psi(-G - B @ p.alpha.mT @ p.omega.mT, C) >= fall * (1 - 1e-10)


@given(st.integers(1, 5), st.integers(0, 10_000))
def test_joint_is_the_least_squares_optimum(k: int, seed: int) -> None:
    """Against reduced-rank regression of v on the part of b that c does not explain."""
    s, B, C, G = made(seed=seed)
    p = ig.Tiny(k, joint=True, delta="apply").propose(s)
    # brute force: the best rank-k map from b beside a free map from c (Frisch-Waugh, then Eckart-Young)
    rest = B - C @ torch.linalg.lstsq(C, B).solution
    v = -G - C @ torch.linalg.lstsq(C, -G).solution
    q, r = torch.linalg.qr(rest)
    values = torch.linalg.svdvals(q.mT @ v)[:k]
    best = psi(v) - values.square().sum() / len(v)
    reached = psi(-G - B @ p.alpha.mT @ p.omega.mT - C @ p.delta["weight.o"].mT)
    assert relative(reached, best) < 1e-10
    assert relative(p.singular_values.square().sum(), psi(v) - best) < 1e-10
    plain = ig.Tiny(k).propose(s)
    assert reached <= psi(-G - B @ plain.alpha.mT @ plain.omega.mT, C) * (1 + 1e-10)


def test_joint_is_more_than_plain_somewhere() -> None:
    s, B, C, G = made(seed=3)
    joint, plain = ig.Tiny(1, joint=True).propose(s), ig.Tiny(1).propose(s)
    fall_joint, fall_plain = (psi(-G, C) - psi(-G - B @ p.alpha.mT @ p.omega.mT, C) for p in (joint, plain))
    assert fall_joint > fall_plain * 1.001


@given(st.integers(1, 5), st.integers(0, 10_000))
def test_alpha_is_proportional_to_S_inverse_N_v(k: int, seed: int) -> None:
    s, *_ = made(seed=seed)
    p = ig.Tiny(k).propose(s)
    direction = torch.linalg.pinv(s.S, hermitian=True) @ s.N @ p.omega
    for a, d in zip(p.alpha, direction.mT, strict=True):
        assert abs(float(F.cosine_similarity(a, d, dim=0))) > 1 - 1e-10


@given(st.integers(1, 5), st.integers(0, 10_000), st.booleans())
def test_alpha_and_omega_satisfy_their_equations(k: int, seed: int, projection: bool) -> None:
    """alpha_k = sqrt(lambda_k) S^{-1/2} u_k and omega_k = sqrt(lambda_k) v_k, up to the sign of each pair."""
    s, *_ = made(seed=seed)
    p = ig.Tiny(k, projection=projection).propose(s)
    values, vectors = torch.linalg.eigh(s.S)
    root = vectors @ torch.diag(values.rsqrt()) @ vectors.mT
    U, sizes, Vh = torch.linalg.svd(root @ (s.N if projection else -s.M_prev), full_matrices=False)
    assert relative(p.singular_values, sizes[:k]) < 1e-10
    for i in range(k):
        gap = min(abs(float(sizes[i] - other)) for j, other in enumerate(sizes) if j != i) / float(sizes[0])
        alpha, omega = sizes[i].sqrt() * root @ U[:, i], sizes[i].sqrt() * Vh[i]
        assert relative(torch.outer(p.omega[:, i], p.alpha[i]), torch.outer(omega, alpha)) < 1e-11 / gap


@given(st.integers(1, 4), st.integers(0, 10_000))
def test_without_S_and_projection_the_fan_out_is_gradmax(k: int, seed: int) -> None:
    s, *_ = made(seed=seed)
    tiny = ig.Tiny(k, projection=False, use_S=False, ignore_singular_values=True).propose(s)
    grad = ig.GradMax(k, scaling="fixed").propose(s)
    assert relative(tiny.omega @ tiny.omega.mT, grad.omega @ grad.omega.mT) < 1e-9


def test_fisher_gives_natural_gradients() -> None:
    """A linear change of the targets' coordinates changes nothing but the coordinates."""
    s, *_ = made()
    draw = torch.Generator().manual_seed(5)
    A = torch.randn(5, 5, generator=draw, dtype=DOUBLE) + 3 * torch.eye(5, dtype=DOUBLE)
    inverse = torch.linalg.inv(A)  # z' = A z, g' = A^{-T} g
    from dataclasses import replace

    other = replace(s, M_prev=s.M_prev @ inverse, M=s.M @ inverse, E=inverse.mT @ s.E @ inverse)
    a, b = (ig.Tiny(2, fisher=True, delta="apply").propose(x) for x in (s, other))
    assert relative(A @ a.omega @ a.alpha, b.omega @ b.alpha) < 1e-10
    assert relative(A @ a.delta["weight.o"], b.delta["weight.o"]) < 1e-10
    plain_a, plain_b = (ig.Tiny(2).propose(x) for x in (s, other))
    assert relative(A @ plain_a.omega @ plain_a.alpha, plain_b.omega @ plain_b.alpha) > 1e-3


def test_amplitude_and_singular_values() -> None:
    s, *_ = made()
    one, four = ig.Tiny(2, delta="apply").propose(s), ig.Tiny(2, delta="apply", amplitude=4.0).propose(s)
    assert relative(four.omega @ four.alpha, 4 * one.omega @ one.alpha) < 1e-12
    assert relative(four.delta["weight.o"], 4 * one.delta["weight.o"]) < 1e-12
    assert four.predicted_gain == pytest.approx(4 * one.predicted_gain)
    joint = [ig.Tiny(2, joint=True, delta="apply", amplitude=a).propose(s).delta["weight.o"] for a in (1.0, 4.0)]
    assert relative(joint[1], 4 * joint[0]) < 1e-12
    flat = ig.Tiny(2, ignore_singular_values=True).propose(s)
    assert relative(flat.omega.norm(dim=0), torch.ones(2, dtype=DOUBLE)) < 1e-12
    assert relative(one.omega.norm(dim=0), one.singular_values.sqrt()) < 1e-12


@pytest.mark.parametrize("activation", ["tanh", "silu", "gelu", "selu"])
@pytest.mark.parametrize("delta", ["skip", "apply"])
@pytest.mark.parametrize("network", ["chain", "fork"])
@pytest.mark.parametrize("projection", [True, False])
def test_predicted_gain_is_the_derivative(activation: str, delta: str, network: str, projection: bool) -> None:
    net = mlp(activation, (6, 5, 3)) if network == "chain" else forked(activation)
    data = drawn(net, 30)
    s = probe(ig.compile(net), data, F.cross_entropy)["hidden"]
    p = ig.Tiny(2, delta=delta, projection=projection, amplitude=1e-6).propose(s)
    if activation == "selu":
        assert p.predicted_gain is None and any("not predicted: selu" in note for note in p.notes)
        return
    inputs = data[0] if isinstance(data[0], tuple) else (data[0],)
    fall = float(F.cross_entropy(ig.interpret(net, *inputs), data[1])) - grown_loss(net, p, data)
    assert fall == pytest.approx(p.predicted_gain, rel=0.01)
    assert p.gain_unit == "loss"


def test_bottleneck_of_a_network_falls_as_predicted() -> None:
    """The whole way: the linearised units of a real site, with v_perp from the model's gradients."""
    network = mlp("identity", (6, 2, 3))
    data = drawn(network, 30)
    model = ig.compile(network)
    s = probe(model, data, F.cross_entropy)["hidden"]
    p = ig.Tiny(2).propose(s)
    shift = torch.zeros(30, 3, dtype=DOUBLE, requires_grad=True)
    outputs, values = model.record(data[0], values=["hidden"], shifts={"output": shift})
    (g,) = torch.autograd.grad(F.cross_entropy(outputs, data[1]) * 30, shift)
    c = torch.cat([values["hidden"].detach(), torch.ones(30, 1, dtype=DOUBLE)], 1)
    v_perp = -g - c @ s.best_move.mT
    after = ig.AddUnits(p)(network).after
    moved = interpret_groups(after, data[0])["output"] - outputs.detach()
    assert relative(psi(v_perp) - psi(v_perp - moved), p.singular_values.square().sum()) < 1e-10


def test_lower_rank_and_singular_S_are_noted() -> None:
    s, *_ = made(g=3)
    p = ig.Tiny(5).propose(s)
    assert p.units == 3 and any("3 units, not 5" in note for note in p.notes)
    network = mlp("tanh")
    data = drawn(network, 30)
    data[0][:, 2] = 0.0  # a dead pixel
    s = probe(ig.compile(network), data, F.cross_entropy)["hidden1"]
    p = ig.Tiny(2).propose(s)
    assert any("S is singular" in note for note in p.notes) and bool(torch.isfinite(p.alpha).all())
    assert relative(p.alpha[:, 2], torch.zeros(2, dtype=DOUBLE)) < 1e-12


def test_refusals() -> None:
    for activation, what in (("sigmoid", r"sigma\(0\) = 0.5"), ("square", r"sigma'\(0\) = 0")):
        network = mlp(activation)
        s = probe(ig.compile(network), drawn(network, 9), F.cross_entropy)["hidden1"]
        for how in (ig.Tiny(1), ig.GradMax(1)):
            with pytest.raises(
                Refused, match=f"{type(how).__name__}: site 'hidden1': found activation {activation} with {what}"
            ):
                how.propose(s)
        assert ig.Random(1).propose(s).units == 1
    with pytest.raises(UnknownName, match="Tiny: delta 'maybe': expected one of skip, apply"):
        ig.Tiny(delta="maybe")
    with pytest.raises(Refused, match="Tiny: units: found 0"):
        ig.Tiny(0)
    with pytest.raises(Refused, match="Tiny: joint"):
        ig.Tiny(joint=True, projection=False)
    s, B, C, G = made()
    from dataclasses import replace

    with pytest.raises(Refused, match="a gradient of zero"):
        ig.Tiny().propose(replace(s, M_prev=0 * s.M_prev, M=0 * s.M))
    with pytest.raises(Refused, match="nothing left of the desired move"):
        ig.Tiny().propose(replace(s, M_prev=s.C @ torch.linalg.solve(s.S_in, s.M)))
    with pytest.raises(BadData, match="statistics of site 'h': S: found NaN"):
        ig.Tiny().propose(replace(s, S=s.S * torch.nan))
