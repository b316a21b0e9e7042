"""`top_singular` against the full SVD: energy, products and subspaces, on decaying and on flat spectra."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from irgrow.kernels import topk
from irgrow.kernels.topk import TopK, top_singular, top_singular_cost, top_singular_reference


def matrix(p: int, q: int, seed: int = 0) -> Tensor:
    return torch.randn(p, q, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_spectrum(p: int, q: int, s: Tensor) -> Tensor:
    U, V = torch.linalg.qr(matrix(p, len(s))).Q, torch.linalg.qr(matrix(q, len(s), 1)).Q
    return (U * s) @ V.T


def energy(found: TopK, P: Tensor) -> float:
    """What U captures of P, relative to the true top k."""
    best = torch.linalg.svdvals(P)[: found.U.shape[1]].square().sum()
    return float((found.U.T @ P).square().sum() / best)


def check(found: TopK, P: Tensor, tolerance: float) -> None:
    k = len(found.s)
    assert found.U.shape == (P.shape[0], k) and found.V.shape == (P.shape[1], k)
    identity = torch.eye(k, dtype=torch.float64)
    assert (found.U.T @ found.U - identity).abs().max() < 1e-9
    assert (found.V.T @ found.V - identity).abs().max() < 1e-9
    assert (found.s.diff() <= 1e-12 * found.s[0]).all() and (found.s >= 0).all()
    scale = float(found.s[0]) or 1.0
    assert (P @ found.V - found.U * found.s).abs().max() < tolerance * scale
    assert (P.T @ found.U - found.V * found.s).abs().max() < tolerance * scale
    exact = torch.linalg.svdvals(P)[:k]
    assert (found.s - exact).abs().max() < tolerance * scale


def index(n: int) -> Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64)


DECAYING = {
    "fast exponential": torch.exp(-index(300)),
    "exponential": torch.exp(-index(300) / 10),
    "slow exponential": torch.exp(-index(300) / 30),
    "harmonic": 1 / index(300),
    "square root": index(300).rsqrt(),
    "rank 5": (index(300) <= 5).double(),
    "gap after 8": torch.where(index(300) <= 8, 1.0, 0.01),
}


@pytest.mark.parametrize("shape", [(300, 300), (300, 450), (777, 301)])
@pytest.mark.parametrize("name", DECAYING)
def test_decaying_spectra_go_by_iteration(name, shape):
    P = with_spectrum(*shape, DECAYING[name])
    found = top_singular(P, 8)
    assert found.route == "subspace" and "residual" in found.note
    check(found, P, topk.TOLERANCE)
    assert energy(found, P) > 0.9999


@pytest.mark.parametrize("shape", [(300, 300), (260, 500), (500, 260)])
def test_flat_spectra_fall_back_and_say_so(shape):
    P = matrix(*shape)
    found = top_singular(P, 4)
    assert found.route == "gram" and "flat spectrum" in found.note and "Gram" in found.note
    check(found, P, 1e-9)
    assert energy(found, P) > 1 - 1e-9
    rough, residual = topk._by_iteration(P, 4, 16, 0, 1.0)  # the control: what one check would have let pass
    assert residual > topk.TOLERANCE and energy(rough, P) < 0.9999


@pytest.mark.parametrize("shape", [(785, 256), (140, 900)])
def test_thin_matrices_go_by_their_gram_matrix(shape):
    for P in (matrix(*shape), with_spectrum(*shape, index(min(shape)).rsqrt())):
        found = top_singular(P, 16)
        assert found.route == "gram" and "on the shorter side" in found.note
        check(found, P, 1e-9)
    steep = with_spectrum(*shape, torch.exp(-index(min(shape))))  # exp(-16): nothing is left of its square
    found = top_singular(steep, 16)
    assert found.route == "subspace"
    check(found, steep, topk.TOLERANCE)


def test_flat_with_a_cliff_goes_by_a_full_svd():
    s = torch.cat([torch.ones(1), 1e-5 * torch.linspace(1, 0.5, 299)]).double()
    P = with_spectrum(300, 300, s)
    found = top_singular(P, 4, tolerance=1e-9)
    assert found.route == "svd" and "span too much" in found.note
    check(found, P, 1e-9)


@given(p=st.integers(1, 40), q=st.integers(1, 40), seed=st.integers(0, 3), data=st.data())
def test_small_matrices_go_by_a_full_svd(p, q, seed, data):
    k = data.draw(st.integers(1, min(p, q)))
    P = matrix(p, q, seed)
    found, reference = top_singular(P, k), top_singular_reference(P, k)
    assert found.route == "svd"
    check(found, P, 1e-12)
    for ours, theirs in ((found.U, reference.U), (found.V, reference.V)):
        assert (ours @ ours.T - theirs @ theirs.T).abs().max() < 1e-10


def test_repeated_values_give_the_right_subspace():
    P = with_spectrum(300, 280, torch.tensor([3.0] * 3 + [2.0] * 4 + [0.1] * 100).double())
    found, reference = top_singular(P, 7), top_singular_reference(P, 7)
    assert found.route == "subspace"
    for ours, theirs in ((found.U, reference.U), (found.V, reference.V)):
        assert (ours[:, :3] @ ours[:, :3].T - theirs[:, :3] @ theirs[:, :3].T).abs().max() < 1e-9
        assert (ours @ ours.T - theirs @ theirs.T).abs().max() < 1e-9


def test_many_vectors_of_a_large_matrix():
    P = with_spectrum(200, 190, DECAYING["exponential"][:190])
    found = top_singular(P, 190)
    assert found.route == "svd"
    check(found, P, 1e-12)


@pytest.mark.parametrize("shape", [(4, 3), (200, 300)])
def test_zero_and_none(shape):
    zero = top_singular(torch.zeros(shape), 2)
    assert not zero.s.any()
    check(zero, torch.zeros(shape, dtype=torch.float64), 1e-12)
    none = top_singular(torch.ones(shape), 0)
    assert none.U.shape == (shape[0], 0) and none.V.shape == (shape[1], 0)
    assert top_singular(torch.zeros(0, 5), 0).s.shape == (0,)


@pytest.mark.parametrize("exponent", [-200, -20, 20, 200])
def test_scale_does_not_matter(exponent):
    P, scale = with_spectrum(200, 220, DECAYING["harmonic"][:200]), 10.0**exponent
    found, scaled = top_singular(P, 5), top_singular(P * scale, 5)
    assert scaled.route == "subspace"
    assert (scaled.s / scale - found.s).abs().max() < 1e-6
    assert (scaled.U @ scaled.U.T - found.U @ found.U.T).abs().max() < 1e-3


def test_repeats_bit_for_bit_and_leaves_its_input_alone():
    P = with_spectrum(300, 280, DECAYING["harmonic"][:280]).float()
    kept = P.clone()
    one, other = top_singular(P, 6), top_singular(P, 6)
    assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("U", "s", "V"))
    assert one.s.dtype == torch.float64 and torch.equal(P, kept)
    seeded = top_singular(P, 6, seed=7)
    assert (seeded.s - one.s).abs().max() < 1e-6


def test_costs_less_than_an_svd():
    assert 20 * top_singular_cost(1024, 1024, 8)[0] < 21 * 1024**3


def test_callers_mistakes():
    P = matrix(6, 4)
    with pytest.raises(ValueError, match=r"k is 5, expected 0\.\.4 for a 6x4 matrix"):
        top_singular(P, 5)
    with pytest.raises(ValueError, match="k is -1"):
        top_singular(P, -1)
    with pytest.raises(ValueError, match=r"P has shape \(6,\), expected \(p, q\)"):
        top_singular(P[:, 0], 1)
    with pytest.raises(TypeError, match=r"torch\.int64"):
        top_singular(P.long(), 1)
    for bad in (float("nan"), float("inf"), -float("inf")):
        P[2, 1] = bad
        with pytest.raises(ValueError, match="1 entries that are NaN or infinite"):
            top_singular(P, 1)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 41, 130, 200])
@pytest.mark.parametrize("kind", ["random", "diagonal", "equal", "low rank"])
def test_last_eigenvectors(n: int, kind: str) -> None:
    """Also where reflections have nothing to do, and for eigenvalues that are equal or zero."""
    made = {
        "random": lambda: matrix(n + 30, n),
        "diagonal": lambda: torch.diag(torch.arange(1.0, n + 1, dtype=torch.float64)),
        "equal": lambda: torch.linalg.qr(matrix(n, n)).Q * 3.0,
        "low rank": lambda: matrix(n + 5, 2) @ matrix(2, n, 1),
    }
    P, k = made[kind](), min(n, 5)
    values, vectors = topk._last_eigenvectors(P, k)
    G = P.T @ P
    size = float(torch.linalg.matrix_norm(G, 2)) if n else 1.0
    assert (values - torch.linalg.eigvalsh(G)[n - k :]).abs().max() < 1e-12 * size
    assert (G @ vectors - vectors * values).abs().max() < 1e-11 * size
    assert (vectors.T @ vectors - torch.eye(k, dtype=torch.float64)).abs().max() < 1e-10


def test_last_eigenvectors_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    P = matrix(90, 60)
    compiled = topk._last_eigenvectors(P, 4)
    monkeypatch.setattr(topk, "_tridiagonal", lambda: None)
    plain = topk._last_eigenvectors(P, 4)
    assert (compiled[0] - plain[0]).abs().max() < 1e-12 * plain[0][-1]
    assert ((compiled[1].T @ plain[1]).abs() - torch.eye(4, dtype=torch.float64)).abs().max() < 1e-10
