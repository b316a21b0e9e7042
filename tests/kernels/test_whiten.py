"""`whiten` and `pseudo_solve` against their definitions; singular and ill-conditioned matrices; refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from irgrow.kernels import whiten as module
from irgrow.kernels.whiten import (
    RTOL,
    Whitening,
    pseudo_solve,
    pseudo_solve_reference,
    whiten,
    whiten_reference,
)


def features(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram(b: Tensor) -> Tensor:
    return b.mT @ b / len(b)


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    Q = torch.linalg.qr(features(len(values), len(values), seed)).Q
    S = (Q * values) @ Q.T
    return (S + S.T) / 2


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-300))


def products(whitening: Whitening, N: Tensor) -> tuple[Tensor, Tensor]:
    """What every whitening agrees on: the singular values of W^T N, and W W^T N = S^+ N."""
    P = whitening.apply_inverse(N)
    return torch.linalg.svdvals(P), whitening.unapply(P)


def check_identity(whitening: Whitening, S: Tensor, tolerance: float = 1e-9) -> None:
    W = whitening.unapply(torch.eye(whitening.rank, dtype=torch.float64))
    identity = torch.eye(whitening.rank, dtype=torch.float64)
    assert (W.T @ S @ W - identity).abs().max() < tolerance


@pytest.mark.parametrize("d", [1, 2, 17, 255, 256, 257, 300, 401])
def test_well_conditioned_goes_by_cholesky(d):
    S, N = gram(features(3 * d + 5, d)), features(d, 7, seed=1)
    whitening, reference = whiten(S), whiten_reference(S)
    assert whitening.route == "cholesky" and whitening.rank == d and "well conditioned" in whitening.note
    check_identity(whitening, S)
    for ours, theirs in zip(products(whitening, N), products(reference, N), strict=True):
        k = min(len(ours), len(theirs))
        assert relative(ours[:k], theirs[:k]) < 1e-10
    exact = float(torch.linalg.cond(S))
    assert exact / 8 <= whitening.condition <= exact * (1 + 1e-6)


def test_singular_values_do_not_depend_on_the_route():
    S, N = with_spectrum(torch.logspace(0, -5, 60, dtype=torch.float64)), features(60, 9)
    fast, slow = whiten(S), whiten(S, rtol=5e-6)  # condition 1e5: safe, and too close to the threshold to be
    assert (fast.route, slow.route, fast.rank, slow.rank) == ("cholesky", "eigen", 60, 60)
    for one, other in zip(products(fast, N), products(slow, N), strict=True):
        assert relative(one, other) < 1e-10


@pytest.mark.parametrize("exponent", range(0, 18, 2))
@pytest.mark.parametrize("shape", ["geometric", "one small"])
def test_conditions_from_1_to_1e16(exponent, shape):
    d = 80
    values = torch.logspace(0, -exponent, d, dtype=torch.float64)
    if shape == "one small":
        values[:-1] = 1.0
    S, N = with_spectrum(values, seed=exponent), features(d, 5)
    whitening = whiten(S)
    expected = int((values > RTOL).sum())
    assert whitening.rank == expected
    if exponent <= 6:
        assert whitening.route == "cholesky"
    if exponent >= 8:
        assert whitening.route == "eigen"
    check_identity(whitening, S, 1e-6)
    assert relative(pseudo_solve(S, N).solution, pseudo_solve_reference(S, N).solution) < 1e-6


@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 40), st.integers(0, 5))
def test_dead_and_repeated_features_are_dropped(alive, dead, repeated, seed):
    b = features(3 * alive + 10, alive, seed)
    b = torch.cat([b, torch.zeros(len(b), dead, dtype=torch.float64), b[:, :repeated]], dim=1)
    b = b[:, torch.randperm(b.shape[1], generator=torch.Generator().manual_seed(seed))]
    S, M = gram(b), gram(torch.cat([b, features(len(b), 3, seed + 1)], 1))[: b.shape[1], b.shape[1] :]
    whitening, solution = whiten(S), pseudo_solve(S, M)
    assert whitening.rank == solution.rank == alive
    assert whitening.route == ("cholesky" if b.shape[1] == alive else "eigen")
    check_identity(whitening, S)
    assert relative(solution.solution, pseudo_solve_reference(S, M).solution) < 1e-8
    assert relative(S @ solution.solution, M) < 1e-9  # M lies in the range of S
    assert (solution.solution[S.diagonal() == 0].abs() < 1e-14).all()


def test_float32_noise_is_not_a_direction():
    """Features in a 10-dimensional subspace, products in float32: rank 10, not 64 (what exact zeros would hide)."""
    b = (features(4000, 10) @ features(10, 64, seed=1)).float()
    S = sum((chunk.T @ chunk).double() for chunk in b.split(500))
    assert whiten(S).rank == 10
    assert whiten(S, rtol=1e-16).rank > 10  # the control


@given(st.integers(1, 30), st.integers(0, 30), st.floats(-12, 12))
def test_scaling_keeps_the_directions(alive, dead, exponent):
    b = features(80, alive) * torch.logspace(0, -3, alive, dtype=torch.float64)
    S = gram(torch.cat([b, torch.zeros(80, dead, dtype=torch.float64)], 1))
    one, scaled = whiten(S), whiten(S * 10.0**exponent)
    assert (one.route, one.rank) == (scaled.route, scaled.rank)
    N = features(alive + dead, 3)
    assert relative(scaled.apply_inverse(N) * 10.0 ** (exponent / 2), one.apply_inverse(N)) < 1e-9


def test_zero_and_empty():
    zero = whiten(torch.zeros(5, 5, dtype=torch.float64))
    assert zero.route == "eigen" and zero.rank == 0 and "0 of 5" in zero.note
    assert zero.apply_inverse(torch.ones(5, 2)).shape == (0, 2)
    assert torch.equal(
        pseudo_solve(torch.zeros(5, 5), torch.ones(5, 2)).solution, torch.zeros(5, 2, dtype=torch.float64)
    )
    assert whiten(torch.zeros(0, 0)).rank == 0
    assert pseudo_solve(torch.zeros(0, 0), torch.zeros(0, 3)).solution.shape == (0, 3)
    assert pseudo_solve(torch.full((1, 1), 4.0), torch.ones(1, 1)).solution.item() == 0.25
    assert pseudo_solve(torch.eye(3), torch.zeros(3, 0)).solution.shape == (3, 0)


def test_batches():
    b = features(6 * 50, 12).reshape(6, 50, 12)
    S, N = b.mT @ b, features(6 * 12, 4).reshape(6, 12, 4)
    assert whiten(S).route == "cholesky" and whiten(S).ranks == (12,) * 6
    singular = S.clone()
    singular[2, 5:] = singular[2, :, 5:] = 0
    for matrices in (S, singular):
        batch = pseudo_solve(matrices, N)
        for k in range(6):
            assert relative(batch.solution[k], pseudo_solve(matrices[k], N[k]).solution) < 1e-10
    assert batch.route == "eigen" and batch.ranks == (12, 12, 5, 12, 12, 12)
    assert "5 of 12" in batch.note


def test_jitter_is_relative_to_the_mean_of_the_diagonal():
    S, B = gram(features(10, 20)), features(20, 3)
    ridge = S + 1e-3 * S.trace() / 20 * torch.eye(20, dtype=torch.float64)
    solution = pseudo_solve(S, B, jitter=1e-3)
    assert solution.route == "cholesky"
    assert relative(solution.solution, torch.linalg.solve(ridge, B)) < 1e-10
    assert relative(pseudo_solve_reference(S, B, jitter=1e-3).solution, solution.solution) < 1e-10


def test_float32_is_solved_in_float64_and_inputs_stay_as_they_are():
    S, B = gram(features(50, 9)).float(), features(9, 2).float()
    kept = S.clone(), B.clone()
    solution = pseudo_solve(S, B).solution
    assert solution.dtype == torch.float64
    assert relative(solution, torch.linalg.solve(S.double(), B.double())) < 1e-12
    assert torch.equal(S, kept[0]) and torch.equal(B, kept[1])
    big = gram(features(900, 300))
    before = big.clone()
    whiten(big)
    assert torch.equal(big, before)


def test_repeats_bit_for_bit():
    S, N = gram(features(900, 300)), features(300, 20)
    assert torch.equal(whiten(S).apply_inverse(N), whiten(S).apply_inverse(N))
    S[:, 7] = S[7] = 0
    assert torch.equal(whiten(S).apply_inverse(N), whiten(S).apply_inverse(N))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_entries_are_refused(bad):
    S, B = torch.eye(4), torch.ones(4, 2)
    S[1, 2] = S[2, 1] = B[3, 1] = bad
    with pytest.raises(ValueError, match="S has 2 entries that are NaN or infinite"):
        whiten(S)
    with pytest.raises(ValueError, match="1 entries that are NaN or infinite"):
        pseudo_solve(torch.eye(4), B)


@pytest.mark.parametrize("d", [2, 40, 300])
def test_matrices_that_are_no_gram_matrix_are_refused(d):
    S = gram(features(3 * d, d))
    for broken, text in (
        (S - 2 * S.trace() * torch.eye(d), "positive semi-definite"),
        (-S, "positive semi-definite"),
        (S + torch.triu(torch.ones(d, d), 1), "symmetric"),
        (S[:-1], "expected (..., d, d)"),
        (S[0], "expected (..., d, d)"),
    ):
        with pytest.raises(ValueError, match=text.replace("(", r"\(").replace(")", r"\)").replace(".", r"\.")):
            whiten(broken)
    one = S.clone()
    one[d - 1, 0] += 1e-3 * S.abs().max()  # a single entry off is found too
    with pytest.raises(ValueError, match="symmetric"):
        pseudo_solve(one, torch.ones(d, 1))


def test_rounding_is_not_refused():
    b = features(20, 60).float()
    S = (b.T @ b).double()  # rank 20; the other eigenvalues are about +-1e-7
    assert torch.linalg.eigvalsh(S)[0] < 0
    assert whiten(S).route == "eigen"


def test_other_mistakes():
    with pytest.raises(TypeError, match="int64"):
        whiten(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"B has shape \(3, 1\), expected \(\.\.\., 2, columns\)"):
        pseudo_solve(torch.eye(2), torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"N has shape \(3, 1\)"):
        whiten(torch.eye(2)).apply_inverse(torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"U has shape \(2,\)"):
        whiten(torch.eye(2)).unapply(torch.ones(2))
    with pytest.raises(ValueError, match=r"jitter is -1"):
        whiten(torch.eye(2), jitter=-1)


@pytest.mark.parametrize("d", [192, 193, 200, 257, 391])
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 50])
def test_triangular_systems_of_any_size(d: int, columns: int) -> None:
    """Around the compiled panels and groups of columns; the control: without compiled code, by LAPACK."""
    S, B = gram(features(d + 50, d)), features(d, columns, 1)
    L = module._cholesky(S)
    assert L is not None and relative(L.tril() @ L.tril().mT, S) < 1e-12
    assert relative(L.tril() @ module._solve(L, B), B) < 1e-12
    assert relative(L.tril().mT @ module._solve(L, B, transposed=True), B) < 1e-12
    lower = L.tril()
    strange = lower + torch.full_like(S, float("nan")).triu(1)  # what is above the diagonal is never read
    for transposed in (False, True):
        matrix = lower.mT if transposed else lower
        expected = torch.linalg.solve_triangular(matrix, B, upper=transposed)
        assert relative(module._solve(strange, B, transposed=transposed), expected) < 1e-12


def test_a_pivot_that_is_not_positive_is_seen_in_any_panel() -> None:
    for at in (0, 100, 299):
        S = torch.eye(300, dtype=torch.float64)
        S[at, at] = -1e-3
        assert module._cholesky(S) is None
