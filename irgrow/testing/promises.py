"""`assert_promise(pass_, network)`: everything a pass owes its users, tested on one network.

1. It gives two verified networks and keeps its promise (`Morphism.verify`).
2. It changes nothing of the network before, and does the same when applied again.
3. Its text reads back as the same pass.
4. Its lineage fits: every new tensor has one, sources, shapes and indices exist, and it reproduces `after`.
5. Gradients obey the lineage: where a gradient factor is defined, the new gradient is factor * old gradient.
   (Under `FirstOrder` at scale 0, where the function is the same.)
6. On other weights the lineage does what the pass does there, or, for a pass that says `reads_weights`,
   still keeps the function wherever the pass promises so.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from irgrow.ir.errors import IrgrowError
from irgrow.ir.interpreter import interpret
from irgrow.ir.morphism import Changes, FirstOrder, Morphism, SameFunction
from irgrow.ir.network import Network
from irgrow.ir.proposal import Proposal
from irgrow.passes.base import Pass, Sequence, registered
from irgrow.testing.recipe import inputs_for

GRADIENT = 1e-10  # relative to the largest gradient, in float64
VALUE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def assert_promise(pass_: Pass, network: Network, *, seed: int = 0, batch: int = 4) -> Morphism:
    """The pass's morphism, if the pass keeps everything it owes on this network; else AssertionError or PromiseBroken.

    Inputs, cotangents and the other weights are drawn from `seed`.
    """
    was = fingerprint(network)
    morphism = pass_(network)
    assert fingerprint(network) == was, f"{pass_}: the network before was changed in place"
    assert morphism.before is network, f"{pass_}: `before` is not the network it was applied to"
    morphism.verify(seed=seed)
    assert_deterministic(pass_, morphism)
    assert_text(pass_)
    assert_lineage(morphism)
    assert_gradients(morphism, seed=seed, batch=batch)
    assert_other_weights(pass_, morphism, seed=seed, batch=batch)
    assert fingerprint(network) == was, f"{pass_}: its lineage changed the network before in place"
    return morphism


def fingerprint(network: Network) -> str:
    """A hash of structure and values, computed anew (a network's own `structure` is computed once)."""
    fresh = dataclasses.replace(network)
    digest = hashlib.sha256(fresh.structure.encode())
    for name, tensor in fresh.tensors().items():
        digest.update(f"{name}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().double().numpy().tobytes())  # float64 holds every smaller dtype exactly
    return digest.hexdigest()


def assert_deterministic(pass_: Pass, morphism: Morphism) -> None:
    """Applied again, the pass gives an equal network by an equal lineage."""
    again = pass_(morphism.before)
    assert again.after == morphism.after, f"{pass_}: applied twice to one network, it gives two different ones"
    assert (again.promise, again.by) == (morphism.promise, morphism.by), f"{pass_}: another promise the second time"
    for name, gathers in morphism.lineage.gathers.items():
        others = again.lineage.gathers[name]
        same = len(gathers) == len(others) and all(
            a.source == b.source and _equal(a.flat().index, b.flat().index) and _equal(a.factor(), b.factor())
            for a, b in zip(gathers, others, strict=True)
        )
        assert same, f"{pass_}: another lineage of {name!r} the second time"


def assert_text(pass_: Pass) -> None:
    """The pass's text reads back as an equal pass (registered passes only: others cannot be found by name)."""
    steps = pass_.steps if isinstance(pass_, Sequence) else (pass_,)
    if any(registered().get(type(step).__name__) is not type(step) for step in steps):
        return
    proposals = {
        value.hash: value
        for step in steps
        for field in dataclasses.fields(step)  # type: ignore[arg-type]
        if isinstance(value := getattr(step, field.name), Proposal)
    }
    back = Pass.from_text(str(pass_), proposals)
    assert back == pass_, f"{pass_}: its text reads back as {back}"


def assert_lineage(morphism: Morphism) -> None:
    """Every new tensor has gathers that fit, and from the old tensors they reproduce the new ones."""
    old, new, by = morphism.before.tensors(), morphism.after.tensors(), morphism.by
    gathers = morphism.lineage.gathers
    assert gathers.keys() == new.keys(), f"{by}: a lineage of {sorted(gathers)} for tensors {sorted(new)}"
    for name, tensor in new.items():
        for g in gathers[name]:
            assert g.source in old, f"{by}: {name!r} comes from {g.source!r}, which is no old tensor"
            assert tuple(g.old_shape) == tuple(old[g.source].shape), f"{by}: {name!r}: old shape {g.old_shape}"
            assert tuple(g.shape) == tuple(tensor.shape), f"{by}: {name!r}: gathers {g.shape} for {tensor.shape}"
            index = g.flat().index
            inside = (index >= -1) & (index < max(1, old[g.source].numel()))
            assert index.numel() == tensor.numel() and bool(inside.all()), f"{by}: {name!r}: index out of range"
    assert_close(morphism.tensors(old), new, by, "its lineage does not reproduce its own result")


def assert_gradients(morphism: Morphism, *, seed: int = 0, batch: int = 4) -> None:
    """Where a factor is defined, new gradient = factor * old gradient, for a random cotangent."""
    before, after = morphism.before, morphism.after
    if isinstance(morphism.promise, FirstOrder):
        after = after.with_tensors(morphism.tensors(before.tensors(), scale=0.0))
    elif not isinstance(morphism.promise, SameFunction):
        return
    inputs = inputs_for(before, batch, seed=seed, dtype=torch.float64)
    old, new = gradients(before, inputs, seed=seed), gradients(after, inputs, seed=seed)
    largest = max((float(g.abs().max()) for g in old.values() if g.numel()), default=0.0)
    limit = max(GRADIENT, 1e-2 * VALUE[before.dtype]) if before.dtype != torch.float64 else GRADIENT
    for name, gradient in new.items():
        for gather in morphism.lineage.gathers[name]:
            if gather.source not in old:
                continue  # not trained before
            factor = gather.factor()
            factor = torch.ones_like(gradient) if factor is None else factor
            defined = ~factor.isnan()
            wanted = factor * gather.pick(old[gather.source])
            error = (gradient - wanted)[defined].abs()
            if error.numel() == 0:
                continue
            assert float(error.max()) <= limit * max(largest, 1e-3), (
                f"{morphism.by}: the gradient of {name!r} is off by {float(error.max()):.2e} from factor * old "
                f"gradient of {gather.source!r} (largest gradient {largest:.2e})"
            )


def gradients(network: Network, inputs: list[Tensor], *, seed: int = 0) -> dict[str, Tensor]:
    """The gradients (float64) of all trained tensors for a fixed random cotangent, by the interpreter."""
    names = set(network.trainable())
    held = {n: t.detach().double().requires_grad_() for n, t in network.tensors().items() if n in names}
    out = interpret(network, *inputs, tensors=held)
    outputs = (out,) if isinstance(out, Tensor) else out
    draw = torch.Generator().manual_seed(seed + 1)
    loss = sum((y * torch.randn(y.shape, generator=draw, dtype=y.dtype)).sum() for y in outputs)
    if not held or not isinstance(loss, Tensor) or not loss.requires_grad:
        return {name: torch.zeros_like(t) for name, t in held.items()}
    found = torch.autograd.grad(loss, list(held.values()), allow_unused=True)
    return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(held.items(), found, strict=True)}


def assert_other_weights(pass_: Pass, morphism: Morphism, *, seed: int = 0, batch: int = 4) -> None:
    """The lineage is as good on other weights as on those the pass was applied to."""
    there = network_with_other_weights(morphism.before, seed=seed)
    current = there.tensors()
    carried = morphism.after.with_tensors(morphism.tensors(current)).verify()
    if not pass_.reads_weights:
        wanted = pass_(there).after
        assert wanted.structure == carried.structure, f"{pass_}: another structure on other weights"
        text = (
            "on other weights its lineage does not give what the pass gives; does it depend on weights (reads_weights)?"
        )
        assert_close(carried.tensors(), wanted.tensors(), str(pass_), text)
    try:
        pass_.requires(there)
        promise = pass_.promise(there)
    except IrgrowError:
        promise = Changes("it does not apply there")
    if isinstance(promise, SameFunction):
        inputs = inputs_for(there, batch, seed=seed)
        change = largest_change(there, carried, inputs)
        limit = VALUE[there.dtype]
        assert change <= limit, f"{pass_}: with other weights, its lineage changes outputs by {change:.2e} (relative)"


def network_with_other_weights(network: Network, *, seed: int = 0, amount: float = 0.3) -> Network:
    """The same structure with its trained tensors moved at random; zeros stay zero."""
    draw = torch.Generator().manual_seed(seed + 2)
    moved = {}
    for name in network.trainable():
        tensor = network.tensors()[name].detach()
        noise = torch.randn(tensor.shape, generator=draw, dtype=torch.float64).to(tensor)
        moved[name] = tensor + amount * noise * (tensor != 0)
    return network.with_tensors(moved)


def largest_change(before: Network, after: Network, inputs: list[Tensor]) -> float:
    """The largest max|a - b| / max|a| over the outputs of two networks; infinite where values are not finite."""
    worst = 0.0
    for a, b in zip(_outputs(before, inputs), _outputs(after, inputs), strict=True):
        if a.shape != b.shape or not bool(torch.isfinite(b).all()):
            return float("inf")
        worst = max(worst, float((a - b).abs().max()) / (float(a.abs().max()) or 1.0))
    return worst


def assert_close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], who: str, text: str) -> None:
    """The same names, and values within the tolerance of their dtype relative to the largest entry."""
    assert found.keys() == wanted.keys(), f"{who}: {text}: tensors {sorted(found)} for {sorted(wanted)}"
    for name, tensor in wanted.items():
        other = found[name]
        assert (other.shape, other.dtype) == (tensor.shape, tensor.dtype), f"{who}: {text} ({name!r}: shape or dtype)"
        if tensor.numel():
            error = float((other - tensor).abs().max())
            limit = VALUE[tensor.dtype] * max(1.0, float(tensor.abs().max()))
            assert error <= limit, f"{who}: {text} ({name!r} is off by {error:.2e})"


def _outputs(network: Network, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    out = interpret(network, *inputs)
    return (out,) if isinstance(out, Tensor) else out


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
