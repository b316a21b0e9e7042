"""The Hessian of a loss over a data set, as an operator that is never written down.

    g = d L / d theta        H v = d (g . v) / d theta         L = mean (or sum) of the loss over the data

Parameters stand one after the other in one vector theta `[P]`, in the order of `named_parameters()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from irgrow.growth.data import Data, Loss, batches
from irgrow.growth.probe import REDUCTIONS, evaluating
from irgrow.ir.errors import BadData, BadShape, UnknownName

Product = Callable[[Tensor], Tensor]
SMALL = 64  # parameters up to which eigenvalues come from the whole matrix: a Krylov space is not smaller


class Hessian:
    """The second derivative of the loss of any `nn.Module`, at the values its parameters have when it is asked.

        hessian = ig.analysis.Hessian(model, (x, y), F.cross_entropy)
        hessian @ v                     # H v, v [P]
        hessian.eigenvalues(3)          # the three of largest modulus

    `loss(outputs, targets)` is the `reduction` (`mean` or `sum`) over a batch; batches of `batch_size` (default:
    as they come) are weighted so that their sizes do not matter. The model runs in eval mode and keeps its
    mode, its values and its `.grad`. `parameters` names those to differentiate by (default: all that require a
    gradient). Products are in the model's dtype and summed over batches in float64; eigenvalues of a float32
    model are good to about 1e-3: use `model.double()` where they matter.

    Raises UnknownName for parameters that do not exist, BadData for empty data, nothing to differentiate by, or
    a loss that is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        loss: Loss,
        *,
        parameters: Iterable[str] | None = None,
        reduction: str = "mean",
        batch_size: int | None = None,
    ) -> None:
        if reduction not in REDUCTIONS:
            raise UnknownName(f"Hessian: reduction {reduction!r}", expected=f"one of {', '.join(REDUCTIONS)}")
        self.model, self.loss, self.reduction = model, loss, reduction
        self.names = _names(model, parameters)
        self.shapes = [tuple(p.shape) for p in self._parameters()]
        self.size = sum(p.numel() for p in self._parameters())
        first = self._parameters()[0]
        self.dtype, self.device = first.dtype, first.device
        self._batches = list(batches(data, batch_size, "Hessian"))
        self.samples = sum(len(targets) for _, targets in self._batches)
        if not self.samples:
            raise BadData("Hessian: data", "no samples", "at least one")

    def __matmul__(self, vector: Tensor) -> Tensor:
        """H v `[P]`, float64."""
        return self._product()(vector)

    def loss_value(self) -> float:
        """L, summed in float64."""
        with evaluating(self.model), torch.no_grad():
            return float(sum(share * self._loss(x, y).double() for share, x, y in self._shares()))

    def gradient(self) -> Tensor:
        """g `[P]`, float64."""
        total = torch.zeros(self.size, dtype=torch.float64, device=self.device)
        with evaluating(self.model), torch.enable_grad():
            for share, x, y in self._shares():
                total += share * _joined(self._gradients(x, y, create_graph=False)).double()
        return total

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector `[P]` as one tensor per parameter, by name."""
        self._fits(vector)
        parts = vector.split([int(np.prod(s)) for s in self.shapes])
        return {n: p.reshape(s) for n, p, s in zip(self.names, parts, self.shapes, strict=True)}

    def matrix(self, scale: Tensor | None = None) -> Tensor:
        """H `[P, P]` in float64, or S H S with S = diag(scale); P products, for small models."""
        product = self._product(scale)
        eye = torch.eye(self.size, dtype=torch.float64, device=self.device)
        whole = torch.stack([product(row) for row in eye])
        return (whole + whole.mT) / 2

    def eigenvalues(
        self, count: int = 1, *, scale: Tensor | None = None, seed: int = 0, tolerance: float | None = None
    ) -> list[float]:
        """The `count` eigenvalues of largest modulus, with their signs, of H or of S H S, S = diag(scale).

        By implicitly restarted Lanczos (ARPACK), which a negative dominant eigenvalue does not disturb; `seed`
        draws its start. Raises BadData where it does not converge to `tolerance` (relative; default 1e-9, in
        float32 1e-4), UnknownName for a count that is not between 1 and P.
        """
        if not 1 <= count <= self.size:
            raise UnknownName(f"Hessian: {count} eigenvalues", expected=f"1 to {self.size}, the number of parameters")
        if self.size <= max(SMALL, 2 * count + 1):
            found = torch.linalg.eigvalsh(self.matrix(scale)).tolist()
            return sorted(found, key=abs, reverse=True)[:count]
        from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

        product = self._product(scale)

        def apply(v: NDArray[np.float64]) -> NDArray[np.float64]:
            given = torch.from_numpy(np.array(v, np.float64)).reshape(-1)
            return product(given.to(self.device)).cpu().numpy()

        start = np.random.default_rng(seed).standard_normal(self.size)
        if not np.any(apply(start)):
            return [0.0] * count
        limit = tolerance if tolerance is not None else 1e-9 if self.dtype == torch.float64 else 1e-4
        operator = LinearOperator((self.size, self.size), matvec=apply, dtype=np.float64)
        try:
            values = eigsh(operator, count, which="LM", v0=start, tol=limit, return_eigenvectors=False)
        except ArpackNoConvergence as error:
            found_few = f"{len(error.eigenvalues)} of {count} eigenvalues converged"
            raise BadData("Hessian: eigenvalues", found_few, f"{count} to {limit:g}", do="raise `tolerance`") from None
        return sorted((float(v) for v in values), key=abs, reverse=True)

    # ---- inside -------------------------------------------------------------------------------------------

    def _parameters(self) -> list[nn.Parameter]:
        held = dict(self.model.named_parameters())
        return [held[name] for name in self.names]

    def _shares(self) -> Iterable[tuple[float, tuple[Tensor, ...], Tensor]]:
        for x, y in self._batches:
            share = len(y) / self.samples if self.reduction == "mean" else 1.0
            yield share, tuple(t.to(self.device) for t in x), y.to(self.device)

    def _loss(self, x: tuple[Tensor, ...], y: Tensor) -> Tensor:
        value = self.loss(self.model(*x), y)
        if not bool(torch.isfinite(value.detach()).all()):
            raise BadData("Hessian: loss", "NaN or infinity", "a finite value", do="check the data and the weights")
        return value

    def _gradients(self, x: tuple[Tensor, ...], y: Tensor, *, create_graph: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            self._loss(x, y), self._parameters(), create_graph=create_graph, allow_unused=True, materialize_grads=True
        )

    def _product(self, scale: Tensor | None = None) -> Product:
        """v -> S H S v. One batch is differentiated once and its graph kept; more are run again for every v."""
        if scale is not None:
            self._fits(scale)
        kept: list[tuple[float, tuple[Tensor, ...]]] = []
        if len(self._batches) == 1:
            with evaluating(self.model), torch.enable_grad():
                kept = [(share, self._gradients(x, y, create_graph=True)) for share, x, y in self._shares()]

        def product(vector: Tensor) -> Tensor:
            self._fits(vector)
            v = vector.detach().to(self.device, torch.float64)
            v = v if scale is None else v * scale.to(v)
            total = torch.zeros_like(v)
            with evaluating(self.model), torch.enable_grad():
                again = ((s, self._gradients(x, y, create_graph=True)) for s, x, y in self._shares())
                for share, gradients in kept or again:
                    total += share * self._derivative(gradients, v, keep=bool(kept))
            return total if scale is None else total * scale.to(total)

        return product

    def _derivative(self, gradients: Sequence[Tensor], v: Tensor, *, keep: bool) -> Tensor:
        """d (g . v) / d theta; gradients that do not depend on theta (a linear loss) have none."""
        directions = self.split(v).values()
        pairs = [(g, d.to(g.dtype)) for g, d in zip(gradients, directions, strict=True) if g.requires_grad]
        if not pairs:
            return torch.zeros_like(v)
        outputs, along = zip(*pairs, strict=True)
        found = torch.autograd.grad(
            outputs, self._parameters(), along, retain_graph=keep, allow_unused=True, materialize_grads=True
        )
        return _joined(found).double()

    def _fits(self, vector: Tensor) -> None:
        if tuple(vector.shape) != (self.size,):
            raise BadShape("Hessian: vector", tuple(vector.shape), f"({self.size},), one entry per parameter")


def gradient_norms(model: nn.Module, data: Data, loss: Loss, **options: Any) -> Mapping[str, float]:
    """||dL/d theta|| of every parameter by name, and of all of them under `all`; `options` as of Hessian."""
    hessian = Hessian(model, data, loss, **options)
    gradient = hessian.gradient()
    norms = {name: float(part.norm()) for name, part in hessian.split(gradient).items()}
    return {"all": float(gradient.norm()), **norms}


def _names(model: nn.Module, wanted: Iterable[str] | None) -> tuple[str, ...]:
    held = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names = tuple(held if wanted is None else wanted)
    for name in names:
        if name not in held:
            raise UnknownName(f"Hessian: parameter {name!r}", expected=f"one of {', '.join(held) or 'none there are'}")
    if not names:
        raise BadData("Hessian: model", "no parameters that require a gradient", "at least one")
    return names


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])
