"""What a Triton kernel becomes on an H100 (sm_90), without one: registers, spills, shared memory, instructions.

    launches = recorded(monkeypatch, lambda: masked_matmul_triton.forward(...))   # what would have been launched
    for launch in launches: assert compiled(launch).spills == 0

A recorded launch is compiled as Triton's own launcher would compile it: types, alignment and constants are those of
the operands that were passed.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

SHARED_LIMIT = 227 * 1024  # bytes that one program may have on sm_90
TARGET = ("cuda", 90, 32)
_TYPES = {
    **{torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"},
    **{torch.int32: "i32", torch.int64: "i64", torch.bool: "i1"},
}


@dataclass(frozen=True)
class Launch:
    """One call of a kernel: operands by parameter, constants, warps and the like."""

    kernel: Any
    operands: Mapping[str, Any]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]

    @classmethod
    def of(cls, kernel: Any, operands: tuple[Any, ...], named: Mapping[str, Any]) -> Launch:
        names = [p.name for p in kernel.params]
        options = {name: value for name, value in named.items() if name not in names}
        constants = {p.name: named[p.name] for p in kernel.params if p.is_constexpr}
        return cls(kernel, dict(zip(names, operands, strict=False)), constants, options)


@dataclass(frozen=True)
class Compiled:
    """A kernel for sm_90."""

    name: str
    registers: int
    spills: int  # bytes that a thread stores because it has no register for them
    stack: int  # bytes of local memory of a thread: spills, and tables such as those of sin for huge arguments
    shared: int  # bytes of a program
    sass: str

    @cached_property
    def instructions(self) -> list[str]:
        """The names of all instructions, as often as they stand there: HMMA.1688.F32.TF32, LDG.E.128, ..."""
        return re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]+)", self.sass, re.MULTILINE)

    def count(self, pattern: str) -> int:
        return sum(re.match(pattern, name) is not None for name in self.instructions)

    @property
    def tensor_core(self) -> int:
        return self.count("[HQDI]G?MMA")

    def __str__(self) -> str:
        kinds = sorted({n for n in self.instructions if re.match("[HQDI]G?MMA", n)})
        return f"{self.name}: {self.registers} registers, {self.spills} B spilled, {self.shared} B shared, {kinds}"


def compiled(launch: Launch) -> Compiled:
    """The launch's kernel as it is built for sm_90."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attrs, constants = {}, {}, dict(launch.constants)
    for place, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
            continue
        value = launch.operands[name]
        signature[name], divisible = _type_of(parameter, value)
        if isinstance(value, int) and value == 1 and not parameter.do_not_specialize:
            signature[name], constants[name] = "constexpr", 1
        elif divisible:
            attrs[place,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attrs)
    built = triton.compile(source, target=GPUTarget(*TARGET), options=dict(launch.options))
    usage, sass, log = _inspected(built.asm["cubin"], built.asm["ptx"])
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))  # type: ignore[index]
    spills = sum(int(found) for found in re.findall(r"(\d+) bytes spill", log))
    return Compiled(launch.kernel.__name__, registers, spills, stack, built.metadata.shared, sass)


def recorded(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any]) -> list[Launch]:
    """The launches that `work` would have made through `gpu.launch`; nothing is launched."""
    from irgrow.kernels import gpu

    launches: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], like: torch.Tensor, *operands: Any, **named: Any) -> None:
        launches.append(Launch.of(kernel, operands, {**named, "enable_fp_fusion": True}))

    monkeypatch.setattr(gpu, "launch", record)
    work()
    return launches


def _type_of(parameter: Any, value: Any) -> tuple[str, bool]:
    """Type and whether it is known to be divisible by 16, by the launcher's rules."""
    if isinstance(value, torch.Tensor):
        known = not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
        return f"*{_TYPES[value.dtype]}", known and value.data_ptr() % 16 == 0
    known = not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment) and value % 16 == 0
    if parameter.annotation_type:
        return parameter.annotation_type, known and isinstance(value, int)
    if isinstance(value, float):
        return "fp32", False
    return "i32" if -(2**31) <= value < 2**31 else "i64", known


def _inspected(cubin: bytes, ptx: str) -> tuple[str, str, str]:
    """(what it uses, its instructions, what the assembler says of it), by the tools in Triton's wheel."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, sass = (
            subprocess.run([tools / tool, option, path], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
        source = path.with_suffix(".ptx")
        source.write_text(ptx)
        command = [tools / "ptxas", "-v", "--gpu-name=sm_90a", source, "-o", path]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "bytes spill stores" in log, log
    return usage, sass, log
