"""`Morphism`: one step from a network to the next, with the promise its pass made and a way to test it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from irgrow.ir.errors import PromiseBroken, StaleMorphism
from irgrow.ir.interpreter import interpret
from irgrow.ir.lineage import Lineage
from irgrow.ir.network import Network


@dataclass(frozen=True)
class Promise:
    """What a pass keeps, in eval mode."""

    def then(self, later: Promise) -> Promise:
        """What two passes in a row keep."""
        order = (SameFunction, FirstOrder, Changes)
        weaker = max((self, later), key=lambda p: order.index(type(p)))
        if isinstance(self, FirstOrder) and isinstance(later, FirstOrder):
            return FirstOrder(self.scale + later.scale)
        return weaker


@dataclass(frozen=True)
class SameFunction(Promise):
    """Every output stays the same, up to rounding."""


@dataclass(frozen=True)
class FirstOrder(Promise):
    """Outputs change by O(scale), where scale multiplies everything fresh: at scale 0 they stay the same."""

    scale: float = 1.0


@dataclass(frozen=True)
class Changes(Promise):
    """Outputs change; says why."""

    why: str


@dataclass(frozen=True, eq=False)
class Morphism:
    """`before` became `after` by passes (`by` is their text); `lineage` says where every tensor comes from."""

    before: Network
    after: Network
    lineage: Lineage
    promise: Promise
    by: str
    made_by: tuple[Any, ...] = ()  # the passes, in order

    def tensors(self, current: Mapping[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
        """The new tensors for the *current* old ones: gather(current) + scale * (after - gather(before)).

        `scale` multiplies what is trained, and what joins fixed weights; new fixed weights (an identity's 1) and
        running statistics are no amplitude. Where the current tensors still lie in the memory of the old ones
        nothing has changed: the new ones are copied.
        """
        old, found = self.before.tensors(), {}
        scaled: set[str] = set()
        if scale != 1.0:
            scaled |= {n for n in self.after.tensors() if n.startswith("weight.") and self.lineage.gathers.get(n)}
            scaled |= {*self.after.trainable()}
        for name, after in self.after.tensors().items():
            if self.lineage.unchanged(name) and after is old.get(name):
                found[name] = current[name]
                continue
            sources = {g.source for g in self.lineage.gathers.get(name, ())}
            if scale == 1.0 and all(current[source].is_set_to(old[source]) for source in sources):
                found[name] = after.detach().clone()
                continue
            gathered = self.lineage.gather(current, name, after).to(after.dtype)
            fresh = after.to(gathered.device) - self.lineage.gather(old, name, after).to(gathered)
            found[name] = gathered + (scale * fresh if name in scaled else fresh)
        return found

    def verify(
        self,
        run: Callable[..., Any] = interpret,
        *,
        inputs: tuple[Tensor, ...] | None = None,
        seed: int = 0,
        tolerance: float | None = None,
    ) -> Morphism:
        """This morphism, if both networks are well formed and the promise holds; else PromiseBroken.

        `run(network, *inputs)` gives outputs `[B, ...]`; default inputs are standard normal, B = 8. The
        default tolerance, relative to the largest output, is 1e-12 for float64 networks and 1e-5 for float32
        ones (a share of a float32 weight is rounded, whatever it is evaluated in).
        """
        self.before.verify()
        self.after.verify()
        if inputs is None:
            draw = torch.Generator().manual_seed(seed)
            shapes = [self.before.groups[name].shape for name in self.before.inputs]
            inputs = tuple(torch.randn(8, *shape, dtype=torch.float64, generator=draw) for shape in shapes)
        if run is not interpret:
            inputs = tuple(x.to(self.before.dtype) for x in inputs)
        limit = tolerance if tolerance is not None else _TOLERANCE.get(self.before.dtype, 1e-5)
        was = _outputs(run(self.before, *inputs))
        if isinstance(self.promise, SameFunction):
            change = _change(was, _outputs(run(self.after, *inputs)))
            if not change <= limit:
                raise PromiseBroken(self.by, f"outputs that change by {change:.2e}", f"at most {limit:.0e} (relative)")
        elif isinstance(self.promise, FirstOrder):
            at = {t: _change(was, _outputs(run(self._scaled(t), *inputs))) for t in (0.0, 1e-4, 1e-1)}
            if not at[0.0] <= limit:
                raise PromiseBroken(self.by, f"outputs that change by {at[0.0]:.2e} at scale 0", f"at most {limit:.0e}")
            if not at[1e-4] <= max(1e-2 * at[1e-1], limit):
                raise PromiseBroken(
                    self.by,
                    f"outputs that change by {at[1e-4]:.2e} at scale 1e-4 and {at[1e-1]:.2e} at 0.1",
                    "a change that shrinks with the scale",
                )
        return self

    def _scaled(self, scale: float) -> Network:
        return self.after.with_tensors(self.tensors(self.before.tensors(), scale))

    def __rshift__(self, later: Morphism) -> Morphism:
        """This step, then `later`, as one; raises StaleMorphism unless `later` begins where this one ends."""
        if later.before.structure != self.after.structure or later.before != self.after:
            raise StaleMorphism(f"{later.by} after {self.by}", "a morphism of another network", "one made from `after`")
        return Morphism(
            self.before,
            later.after,
            self.lineage.then(later.lineage),
            self.promise.then(later.promise),
            f"{self.by} >> {later.by}",
            (*self.made_by, *later.made_by),
        )

    def __repr__(self) -> str:
        return f"<Morphism {self.by}: {self.before!r} -> {self.after!r}, {self.promise}>"


_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def _outputs(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)


def _change(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> float:
    """The largest max|a - b| / max|a| over outputs; infinite if shapes differ or a value is not finite."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape or not bool(torch.isfinite(y).all()):
            return float("inf")
        scale = float(x.abs().max()) or 1.0
        worst = max(worst, float((x - y).abs().max()) / scale)
    return worst
