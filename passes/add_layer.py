"""Adding a layer that begins as the identity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from irgrow.ir.edit import Edit
from irgrow.ir.errors import Refused, UnknownName
from irgrow.ir.network import Network
from irgrow.ir.pattern import Conv2d, Dense
from irgrow.kernels.activations import ACTIVATIONS
from irgrow.passes.base import Pass, register

NON_NEGATIVE = ("relu", "sigmoid", "softplus", "gaussian", "abs", "square")  # their values are >= 0 ...
KEEPS_NON_NEGATIVE = ("relu", "abs", "leaky_relu", "elu")  # ... and these leave such values as they are


@register
@dataclass(frozen=True)
class AddLayer(Pass):
    """Behind the group stands a new one of the same shape that repeats it; every output stays the same.

        g --v--> b     becomes     g --I--> deeper --v--> b

    Flat groups get a dense identity matrix, images a `kernel` x `kernel` convolution with 1 at the centre
    tap, both trainable. `activation` (default: the group's own) must leave the group's values as they are:
    identity always does, ReLU-like ones on non-negative values.

    Refused: an output, a group in a loop of groups, an activation that would change the values.
    Source: Net2DeeperNet, arXiv:1511.05641, section 2.3.
    """

    group: str
    activation: str | None = None
    kernel: int = 3
    bias: bool = True
    reference: ClassVar[str] = "Net2Net, arXiv:1511.05641, section 2.3"

    @classmethod
    def places(cls, network: Network) -> Iterator[AddLayer]:
        for name in network.groups:
            for activation in (None, "identity"):
                candidate = cls(name, activation)
                try:
                    candidate.requires(network)
                except Refused:
                    continue
                yield candidate
                break

    def requires(self, network: Network) -> None:
        group, who = network.group(self.group), f"AddLayer: group {self.group!r}"
        if self.group in network.outputs:
            raise Refused(who, "an output", "a group that others read", do="add the layer in front of the output")
        if not network.leaving(self.group):
            raise Refused(who, "nothing leaves it", "a group that others read")
        if any(cyclic and self.group in names for names, cyclic in network.components):
            raise Refused(who, "it lies in a loop of groups", "a group outside loops", do="use InsertNeuron there")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise Refused(who, f"kernel {self.kernel}", "an odd kernel, which has a centre tap")
        if len(group.shape) not in (1, 3):
            raise Refused(who, f"shape {group.shape}", "a flat group or an image")
        new = self.activation or group.activation
        if new not in ACTIVATIONS:
            raise UnknownName(f"activation {new!r}", expected=f"one of {', '.join(ACTIVATIONS)}")
        same = new == group.activation and ACTIVATIONS[new].idempotent
        kept = group.activation in NON_NEGATIVE and new in KEEPS_NON_NEGATIVE
        if not (new == "identity" or same or kept):
            raise Refused(
                who,
                f"activation {new!r} on values of {group.activation!r}",
                "an activation that leaves these values as they are",
                do="use activation='identity'",
            )

    def rewrite(self, edit: Edit) -> None:
        group, dtype = edit.groups[self.group], edit.before.dtype
        name = edit.free_name(f"{self.group}_deeper")
        bias = torch.zeros(group.units, dtype=dtype) if self.bias else None
        edit.add_group(name, group.shape, activation=self.activation or group.activation, bias=bias)
        for bundle in edit.before.leaving(self.group):
            edit.redirect(bundle.name, source=name)
        eye = torch.eye(group.units, dtype=dtype)
        if len(group.shape) == 1:
            edit.add_bundle(edit.free_name(f"{self.group}_{name}"), self.group, name, Dense(), eye)
        else:
            half = self.kernel // 2
            weight = torch.zeros(group.units, group.units, self.kernel, self.kernel, dtype=dtype)
            weight[:, :, half, half] = eye
            pattern = Conv2d((self.kernel, self.kernel), padding=(half, half))
            edit.add_bundle(edit.free_name(f"{self.group}_{name}"), self.group, name, pattern, weight)
