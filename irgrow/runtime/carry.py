"""Optimizer state through growth (ALGORITHMS, section 7).

First moments and momentum follow the gradient factor, second moments its square; where it is undefined the
state starts fresh. A fresh entry beside old ones shares their step counter, so with zero moments Adam's
first update of it would be about three times too large (0.1 / sqrt(0.001)): its second moment starts from
the mean of its tensor's carried ones instead. A tensor with no carried entry starts without state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from irgrow.ir.lineage import Axes, Lineage

FIRST = ("exp_avg", "momentum_buffer", "grad_avg")  # follow the gradient
SECOND = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")  # follow its square


def carried_state(
    lineage: Lineage,
    name: str,
    new: Tensor,
    states: Mapping[str, Mapping[str, Any]],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """The optimizer state of one new tensor, from the states of the old ones by name; empty: starts fresh.

    Works for SGD (momentum), Adam, AdamW (amsgrad too), RMSprop (centered, momentum) and Adagrad.
    """
    gathers = lineage.gathers.get(name, ())
    sources = [g.source for g in gathers if states.get(g.source)]
    if not sources:
        return {}
    out: dict[str, Any] = {}
    moments: list[str] = []
    for key, value in states[sources[0]].items():
        if isinstance(value, Tensor) and key in (*FIRST, *SECOND):
            moments.append(key)
        elif isinstance(value, Tensor) and value.dim():
            continue  # a tensor this optimizer keeps that we do not know: it starts fresh
        else:
            out[key] = value.clone() if isinstance(value, Tensor) else value
    only = gathers[0]
    if len(gathers) == 1 and isinstance(only, Axes) and only.appends:
        old = states[only.source]
        for key in moments:
            fill = _start(key, old[key], options) if key in SECOND and only.shape != only.old_shape else 0.0
            out[key] = only.padded(old[key], fill)
        return out
    tables = [{s: states[s][key] for s in sources if states[s].get(key) is not None} for key in moments]
    powers = [1 if key in FIRST else 2 for key in moments]
    carried, known = lineage.carry(tables, name, powers)
    if known is not None and not bool(known.any()):
        return {}
    for key, moment in zip(moments, carried, strict=True):
        if key in SECOND and known is not None:
            mask = known.to(moment.device)
            moment = torch.where(mask, moment, _start(key, moment, options, int(mask.sum())))
        out[key] = moment
    return out


def _start(key: str, carried: Tensor, options: Mapping[str, Any], count: int | None = None) -> float:
    """Where the second moment of a fresh entry starts: Adagrad's own initial value, else the carried ones' mean.

    `carried` holds 0 in all but `count` entries (None: all of them were carried).
    """
    if key == "sum":
        return float(options.get("initial_accumulator_value", 0.0))
    count = carried.numel() if count is None else count
    return carried.sum().item() / count if count else 0.0
