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

from irgrow.ir.lineage import Lineage

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
    sources = [g.source for g in lineage.gathers.get(name, ()) if states.get(g.source)]
    if not sources:
        return {}
    known = lineage.defined(name, new)
    if not bool(known.any()):
        return {}
    out: dict[str, Any] = {}
    for key, value in states[sources[0]].items():
        if isinstance(value, Tensor) and key in (*FIRST, *SECOND):
            table = {source: states[source][key] for source in sources if states[source].get(key) is not None}
            power = 1 if key in FIRST else 2
            moment = lineage.carry(table, name, new.detach().to(value.dtype), power)
            if power == 2 and not bool(known.all()):
                start = options.get("initial_accumulator_value", 0.0) if key == "sum" else moment[known].mean()
                moment = torch.where(known, moment, torch.as_tensor(start).to(moment))
            out[key] = moment
        elif isinstance(value, Tensor) and value.dim():
            continue  # a tensor this optimizer keeps that we do not know: it starts fresh
        else:
            out[key] = value.clone() if isinstance(value, Tensor) else value
    return out
