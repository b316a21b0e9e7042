"""Points on the straight line between two networks."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from irgrow.ir.errors import StaleMorphism
from irgrow.ir.network import Network

Either = TypeVar("Either", Network, nn.Module)


def interpolate(first: Either, second: Either, t: float) -> Either:
    """A new network (or module) with every value (1 - t) a + t b; t may lie outside [0, 1].

    Both need the same structure: for a CNN and a trained eFCN, embed the CNN first. Of a module, parameters and
    floating buffers (running statistics) are mixed; other buffers are those of `first`. At t = 0 and t = 1 the
    values are exactly those of the ends. Raises StaleMorphism for different structures or shapes.
    """
    if isinstance(first, Network) and isinstance(second, Network):
        if first.structure != second.structure:
            raise StaleMorphism("interpolate", "networks of different structures", "two of one structure")
        ends = first.tensors(), second.tensors()
        return first.with_tensors({n: _mix(a.detach(), ends[1][n].detach(), t) for n, a in ends[0].items()})
    if isinstance(first, nn.Module) and isinstance(second, nn.Module):
        a, b = first.state_dict(), second.state_dict()
        if {n: v.shape for n, v in a.items()} != {n: v.shape for n, v in b.items()}:
            raise StaleMorphism("interpolate", "modules with different names or shapes", "two of one kind")
        between = copy.deepcopy(first)
        between.load_state_dict({n: _mix(v, b[n], t) if v.is_floating_point() else v for n, v in a.items()})
        return between
    raise StaleMorphism("interpolate", f"{type(first).__name__} and {type(second).__name__}", "two of one kind")


def _mix(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    return torch.lerp(a, b.to(a), t) if t != 1 else b.to(a).clone()
