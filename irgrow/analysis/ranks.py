"""The effective rank of activations, of a compiled network's groups or of any module's submodules."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from irgrow.growth import effective_rank
from irgrow.growth.data import Data
from irgrow.ir.errors import BadShape, UnknownName
from irgrow.runtime.model import CompiledNetwork


def effective_ranks(model: nn.Module, data: Data, names: Iterable[str], **options: Any) -> dict[str, int]:
    """By name, how many singular values of the activations [samples, units] count (irgrow.growth.effective_rank).

    names: groups of a compiled network, or submodules (as in `named_modules()`) that return one tensor
    `[B, units, *positions]`. UnknownName, BadShape for other names and outputs; options and BadData as there.
    """
    if isinstance(model, CompiledNetwork):
        return effective_rank.effective_ranks(model, data, names, **options)
    return effective_rank.effective_ranks(_Hooked(model), data, names, **options)


class _Hooked(nn.Module):
    """A module that records what its submodules return, as `effective_ranks` asks of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def structure(self) -> Any:
        return self

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    def record(self, *inputs: Tensor, values: Collection[str] = (), shifts: Mapping[str, Tensor] | None = None) -> Any:
        found: dict[str, Tensor] = {}
        modules = dict(self.model.named_modules())
        for name in values:
            if name not in modules:
                raise UnknownName(
                    f"effective_ranks: module {name!r}", expected=f"one of {', '.join(filter(None, modules))}"
                )

        def keep(name: str) -> Any:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                if not isinstance(output, Tensor) or output.dim() < 2:
                    shown = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                    raise BadShape(f"effective_ranks: output of module {name!r}", shown, "one tensor [B, units, ...]")
                found[name] = output

            return hook

        hooks = [modules[name].register_forward_hook(keep(name)) for name in values]
        try:
            return self.model(*inputs), found
        finally:
            for hook in hooks:
                hook.remove()
