"""Where Triton kernels can run: on a GPU, or, interpreted and slowly, on the CPU under TRITON_INTERPRET=1.

The variable is Triton's own. It decides when a kernel's file is imported, so it must be set when Python starts.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch

_INSTALLED = find_spec("triton") is not None
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # what the kernels compute on


def runs_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton kernels run on such tensors."""
    return dtype in DTYPES and why_not_triton(device) is None


def why_not_triton(device: torch.device) -> str | None:
    """What keeps Triton kernels from running on this device; None if nothing does."""
    if not _INSTALLED:
        return "triton is not installed"
    if device.type == "cuda" or (device.type == "cpu" and interpreted()):
        return None
    return f"tensors on {device.type}" + (" without TRITON_INTERPRET=1" if device.type == "cpu" else "")


def interpreted() -> bool:
    """Whether Triton kernels are interpreted, as Triton reads the variable."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def launch(kernel: Any, grid: tuple[int, ...], like: torch.Tensor, *operands: Any, **named: Any) -> None:
    """The kernel runs on the device of `like`; `named` are its constants, warps and stages. An empty grid is nothing.

    Contraction of a * b + c into one rounding is asked for by name: Triton's default is about to change.
    """
    if 0 not in grid:
        with torch.cuda.device_of(like):
            kernel[grid](*operands, **named, enable_fp_fusion=True)
