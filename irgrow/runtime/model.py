"""`CompiledNetwork`: a network as an `nn.Module` that runs, trains and grows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from irgrow.compiler.lower import lower
from irgrow.compiler.program import Program
from irgrow.ir.errors import BadData
from irgrow.ir.interpreter import check_inputs
from irgrow.ir.morphism import Morphism
from irgrow.ir.network import Network
from irgrow.runtime.frozen import hold_still
from irgrow.runtime.grow import Carried, grow
from irgrow.runtime.ledger import Ledger
from irgrow.runtime.undo import Snapshot, restore, snapshot


def compile(network: Network, *, backend: str = "auto", device: torch.device | str | None = None) -> CompiledNetwork:
    """The network as an `nn.Module` with its own copy of the weights; verified first.

    backend: `auto`, or one by name (`torch`, `numba`), which then runs or raises BackendError.
    """
    return CompiledNetwork(network, backend=backend, device=device)


class Tensors(nn.Module):
    """Parameters and buffers of one kind by owner; holds names that nn.Module would refuse as attributes."""

    def put(self, owner: str, tensor: Tensor, trainable: bool) -> None:
        table: dict[str, Any] = self._parameters if trainable else self._buffers
        other: dict[str, Any] = self._buffers if trainable else self._parameters
        other.pop(owner, None)
        table[owner] = tensor

    def drop(self, owner: str) -> None:
        self._parameters.pop(owner, None)
        self._buffers.pop(owner, None)


KINDS = ("weight", "bias", "scale", "shift", "mean", "variance")


class CompiledNetwork(nn.Module):
    """A network that runs. Its parameters are ordinary `nn.Parameter`s named `<kind>.<owner>`, as in `Network`.

        model = irgrow.compile(network)
        y = model(x)                        # x [B, *shape] per input group; several outputs give a tuple
        model.grow(morphism, optimizer)     # same module, same optimizer

    `print(model.program)` shows the steps, `model.explain()` also why each runs the way it does.
    """

    def __init__(self, network: Network, *, backend: str = "auto", device: torch.device | str | None = None) -> None:
        super().__init__()
        network.verify()
        self.backend = backend
        self.ledger = Ledger()  # what this model grew by
        for kind in KINDS:
            self.add_module(kind, Tensors())
        trainable = set(network.trainable())
        for name, tensor in network.tensors().items():
            copy = tensor.detach().clone()
            if device is not None:
                copy = copy.to(device)
            self._put(name, nn.Parameter(copy) if name in trainable else copy, name in trainable)
        self._adopt(network, None)

    # ---- the network --------------------------------------------------------------------------------------

    @property
    def structure(self) -> Network:
        """The network as it is now. Its tensors are the live ones (detached); clone before you keep them."""
        return self._structure

    def network(self) -> Network:
        """A copy of the network with its current values."""
        return self._structure.clone()

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter and buffer by its network name."""
        return dict(self._tensors)

    @property
    def program(self) -> Program:
        """The steps that compute it."""
        return self._program

    def explain(self) -> str:
        """Which kernel each step got, and why."""
        return self._program.explain()

    # ---- running ------------------------------------------------------------------------------------------

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The outputs `[B, *shape]`; raises BadData for inputs of the wrong shape or dtype."""
        self._check(inputs)
        outputs, _ = self._program.run(self._live(), inputs, train=self.training)
        return outputs[0] if len(outputs) == 1 else outputs

    def record(
        self, *inputs: Tensor, values: Collection[str] = (), shifts: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor | tuple[Tensor, ...], dict[str, Tensor]]:
        """The outputs, and the activations `[B, *shape]` of the groups named in `values`.

        `shifts[g]` `[B, *shape]` is added to the pre-activations of group g (before its normalisation), so a
        zero shift that requires a gradient receives dL/dz, also inside irregular regions.
        """
        self._check(inputs)
        for name in (*values, *(shifts or {})):
            self._structure.group(name)
        outputs, recorded = self._program.run(self._live(), inputs, train=self.training, values=values, shifts=shifts)
        return (outputs[0] if len(outputs) == 1 else outputs), recorded

    def _check(self, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs) == 1 == len(self._shapes) and self._fits(inputs[0]):
            return  # the usual case, in a microsecond
        check_inputs(self._structure, inputs)
        for name, x in zip(self._structure.inputs, inputs, strict=True):
            if x.dtype != self._dtype:
                raise BadData(f"input {name!r}", x.dtype, f"{self._dtype}, as the model", do=f"use x.to({self._dtype})")
            if x.device != self._device:
                raise BadData(f"input {name!r}", f"device {x.device}", self._device, do="move it with .to(...)")

    def _fits(self, x: Tensor) -> bool:
        """Whether this may be the only input."""
        if type(x) is not Tensor or x.dtype is not self._dtype or x.device != self._device:
            return False
        return x.dim() > 0 and x.shape[1:] == self._shapes[0]

    # ---- growing ------------------------------------------------------------------------------------------

    def grow(
        self,
        morphism: Morphism,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        extra: Iterable[CompiledNetwork] = (),
    ) -> Carried:
        """The module computes `morphism.after`, with its lineage applied to the current weights.

        Same module, same optimizer object: parameters that stay keep their identity, state follows the
        lineage, new parameters join an existing parameter group. `extra` models (an EMA) of the same
        structure grow along. If anything fails, module and optimizer are as before. Returns what was
        carried, and names the parameters whose optimizer state had to start fresh.
        """
        models = [self, *extra]
        _ = morphism.after.structure  # hashed once, here: the models take it along with the structure
        carried = grow(models, morphism, optimizer)
        for model in models:
            model.ledger = model.ledger.and_then(morphism)
        return carried

    def snapshot(self, optimizer: torch.optim.Optimizer | None = None) -> Snapshot:
        """This point, to come back to with `restore`."""
        return snapshot(self, optimizer)

    def restore(self, to: Snapshot, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Structure, values, ledger and optimizer state of a snapshot; same module, same optimizer object."""
        restore(self, to, optimizer)

    # ---- inside -------------------------------------------------------------------------------------------

    def _put(self, name: str, tensor: Tensor, trainable: bool) -> None:
        kind, owner = name.split(".")
        holder: Any = getattr(self, kind)
        holder.put(owner, tensor, trainable)

    def _drop(self, name: str) -> None:
        kind, owner = name.split(".")
        holder: Any = getattr(self, kind)
        holder.drop(owner)

    def _adopt(self, network: Network, program: Program | None) -> None:
        """From now on this is the network; its tensors are those held here."""
        held: dict[str, Tensor] = {}
        for kind in KINDS:
            holder: Any = getattr(self, kind)
            for table in (holder._parameters, holder._buffers):
                held |= {f"{kind}.{owner}": tensor for owner, tensor in table.items()}
        self._tensors = {name: held[name] for name in network.tensors()}
        first = next(iter(self._tensors.values()), torch.empty(0))
        self._dtype, self._device = first.dtype, first.device
        self._structure = network.with_tensors({name: tensor.data for name, tensor in self._tensors.items()})
        self._shapes = [network.groups[name].shape for name in network.inputs]
        self._program = program or lower(self._structure, device=self._device, backend=self.backend)
        self._frozen = {n: m.to(self._device) for n, m in network.frozen.items() if isinstance(held[n], nn.Parameter)}
        if self._frozen:
            hold_still(self)

    def _live(self) -> Mapping[str, Tensor]:
        """The tensors to run with: no gradient reaches frozen entries."""
        tensors = self._tensors
        if not self._frozen:
            return tensors
        return {**tensors, **{n: torch.where(m, tensors[n].detach(), tensors[n]) for n, m in self._frozen.items()}}

    def _apply(self, fn: Any, recurse: bool = True) -> CompiledNetwork:
        """`.to()`, `.double()`, ...: tensors may be replaced, index tensors must follow to the device."""
        super()._apply(fn, recurse)
        before = self._device
        self._adopt(self._structure, self._program)
        if self._device != before:
            self._adopt(self._structure, None)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copy.deepcopy and pickle: the program is made again."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_tensors", "_program")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._adopt(self._structure, None)

    def extra_repr(self) -> str:
        return str(self._structure)
