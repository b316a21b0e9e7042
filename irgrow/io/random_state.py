"""The state of everything random: torch, numpy, Python, and generators of the caller's."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from irgrow.ir.errors import BadData, BadFile

Generator = torch.Generator | np.random.Generator


def capture(generators: Mapping[str, Generator] | None = None) -> dict[str, Any]:
    """The state of the global generators (CUDA's only if CUDA is in use) and of these, as plain data and tensors."""
    version, internal, gauss = random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": np.random.get_state(legacy=False),
        "python": {"version": version, "internal": np.array(internal, np.uint32), "gauss": gauss},
        "generators": {name: _captured(name, g) for name, g in (generators or {}).items()},
    }


def restore(state: Mapping[str, Any], generators: Mapping[str, Generator] | None = None) -> None:
    """Everything random goes on from `state`; raises as `check_generators`, with nothing changed.

    CUDA's states are used if this machine has as many devices; otherwise those devices go on as they are.
    """
    check_generators(state, generators)
    for name, generator in (generators or {}).items():
        saved = state["generators"][name]
        if isinstance(generator, torch.Generator):
            generator.set_state(saved["torch"].clone())
        else:
            generator.bit_generator.state = saved["numpy"]
    torch.set_rng_state(state["torch"].clone())
    if state["cuda"] and torch.cuda.is_available() and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all([s.clone() for s in state["cuda"]])
    np.random.set_state(state["numpy"])
    random.setstate(_python(state))


def check_generators(state: Mapping[str, Any], generators: Mapping[str, Generator] | None) -> None:
    """Raises BadData if `generators` are not those that were saved, by name and kind."""
    generators = generators or {}
    if generators.keys() != state["generators"].keys():
        raise BadData(
            "restoring random state",
            f"the generators {', '.join(generators) or 'none'}",
            f"{', '.join(state['generators']) or 'none'}, as saved",
            do="pass generators={...}, or random=False",
        )
    for name, generator in generators.items():
        kind = "torch" if isinstance(generator, torch.Generator) else "numpy"
        if kind not in state["generators"][name]:
            raise BadData(f"restoring generator {name!r}", f"a {kind} generator", "the kind that was saved")


def check(state: Any, who: str) -> dict[str, Any]:
    """`state`, if every part of it can be restored (tried on generators made for this); else BadFile."""
    try:
        if state.keys() != {"torch", "cuda", "numpy", "python", "generators"}:
            raise ValueError("other parts than torch, cuda, numpy, python, generators")
        torch.Generator().set_state(state["torch"])
        if not all(s.dtype == torch.uint8 for s in state["cuda"]):
            raise ValueError("a state of CUDA that is no list of bytes")
        np.random.RandomState().set_state(state["numpy"])
        random.Random().setstate(_python(state))
        for saved in state["generators"].values():
            if saved.keys() == {"torch"}:
                if saved["torch"].dtype != torch.uint8:
                    raise ValueError("a generator's state that is no list of bytes")
            elif saved.keys() == {"numpy"}:
                _scratch(saved["numpy"]["bit_generator"]).state = saved["numpy"]
            else:
                raise ValueError("a generator of another kind than torch or numpy")
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise BadFile(who, f"a random state that does not fit ({error})", "one that irgrow saved") from None
    return dict(state)


def _captured(name: str, generator: Generator) -> dict[str, Any]:
    if isinstance(generator, torch.Generator):
        return {"torch": generator.get_state()}
    if isinstance(generator, np.random.Generator):
        return {"numpy": dict(generator.bit_generator.state)}
    raise BadData(f"saving generator {name!r}", type(generator).__name__, "a torch.Generator or numpy.random.Generator")


def _python(state: Mapping[str, Any]) -> tuple[int, tuple[int, ...], float | None]:
    saved = state["python"]
    return saved["version"], tuple(saved["internal"].tolist()), saved["gauss"]


def _scratch(kind: str) -> np.random.BitGenerator:
    kinds: dict[str, type[np.random.BitGenerator]] = {
        "PCG64": np.random.PCG64,
        "PCG64DXSM": np.random.PCG64DXSM,
        "MT19937": np.random.MT19937,
        "Philox": np.random.Philox,
        "SFC64": np.random.SFC64,
    }
    return kinds[kind]()
