"""Optimizer state by parameter name: it fits whatever order a later process builds its parameters in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from irgrow.io import plain
from irgrow.io.container import Container
from irgrow.ir.errors import BadData, BadFile
from irgrow.runtime.carry import FIRST, SECOND


@dataclass(frozen=True, eq=False)
class OptimizerState:
    """What an optimizer knew: its class's name, its parameter groups, its state by parameter name."""

    kind: str
    members: tuple[tuple[str, ...], ...]  # the parameters of each parameter group
    options: tuple[dict[str, Any], ...]  # lr, betas, ... of each parameter group
    state: dict[str, dict[str, Any]]

    def check(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> None:
        """Raises BadData if class, number of parameter groups or parameters differ from those saved."""
        who = "restoring the optimizer"
        if type(optimizer).__name__ != self.kind:
            raise BadData(who, type(optimizer).__name__, self.kind)
        if len(optimizer.param_groups) != len(self.members):
            raise BadData(
                who,
                f"{len(optimizer.param_groups)} parameter groups",
                f"{len(self.members)}, as saved",
                do="build it with the same parameter groups",
            )
        names = [name for members in self.members for name in members]
        missing = [name for name in names if name not in parameters]
        if missing:
            raise BadData(who, f"no parameter {missing[0]!r} in the model", "the saved parameters")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        wanted = {id(parameters[name]) for name in names}
        if held != wanted:
            raise BadData(
                who,
                f"an optimizer with {len(held - wanted)} other parameters and {len(wanted - held)} missing ones",
                f"the {len(names)} saved parameters of this model",
                do="build it from model.parameters()",
            )

    def restore(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> None:
        """The optimizer is as it was when saved: options, parameter groups, state; raises as `check`, unchanged.

        `parameters` are the model's by name. Parameters move to the parameter group they were saved in.
        """
        self.check(optimizer, parameters)
        number = {name: n for n, name in enumerate(name for members in self.members for name in members)}
        before = [group["params"] for group in optimizer.param_groups]
        try:
            for group, members in zip(optimizer.param_groups, self.members, strict=True):
                group["params"] = [parameters[name] for name in members]
            optimizer.load_state_dict(
                {
                    "state": {number[name]: _clone(state) for name, state in self.state.items()},
                    "param_groups": [
                        {**_clone(options), "params": [number[name] for name in members]}
                        for options, members in zip(self.options, self.members, strict=True)
                    ],
                }
            )
        except BaseException:
            for group, params in zip(optimizer.param_groups, before, strict=True):
                group["params"] = params
            raise


def describe_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """The optimizer as JSON data; its tensors are added to `tensors`. Raises BadData for parameters without a name."""
    name = {id(tensor): n for n, tensor in parameters.items()}
    groups: list[dict[str, Any]] = []
    state: dict[str, Any] = {}
    for n, group in enumerate(optimizer.param_groups):
        strangers = [p for p in group["params"] if id(p) not in name]
        if strangers:
            raise BadData(
                f"saving the optimizer: parameter group {n}",
                f"{len(strangers)} parameters that are not the network's, one of shape {tuple(strangers[0].shape)}",
                "parameters of the network that is saved",
                do="save the rest of the model, and its optimizer, on its own",
            )
        options = {key: value for key, value in group.items() if key != "params"}
        groups.append(
            {
                "parameters": [name[id(p)] for p in group["params"]],
                "options": plain.encode(options, f"optimizer.{n}", tensors),
            }
        )
        for p in group["params"]:
            if optimizer.state.get(p):
                state[name[id(p)]] = plain.encode(dict(optimizer.state[p]), f"optimizer.{name[id(p)]}", tensors)
    return {"kind": type(optimizer).__name__, "groups": groups, "state": state}


def read_optimizer(file: Container, parameters: Mapping[str, Tensor]) -> OptimizerState | None:
    """The optimizer state of a file, if it has one; every name and shape fits `parameters`, or BadFile."""
    who = f"{file.path}: optimizer"
    if "optimizer" not in file.sections:
        return None
    data = file.sections["optimizer"]
    if not isinstance(data, dict) or data.keys() != {"kind", "groups", "state"} or not isinstance(data["kind"], str):
        raise BadFile(who, "other fields", "kind, groups, state")
    groups, states = data["groups"], data["state"]
    if not isinstance(groups, list) or not isinstance(states, dict):
        raise BadFile(who, "groups or state of another type", "a list and an object")
    members, options = [], []
    for n, group in enumerate(groups):
        if not isinstance(group, dict) or group.keys() != {"parameters", "options"}:
            raise BadFile(f"{who}.{n}", "other fields", "parameters, options")
        if not isinstance(group["parameters"], list):
            raise BadFile(f"{who}.{n}", "parameters of another type", "a list")
        members.append(tuple(group["parameters"]))
        options.append(_decoded(group["options"], f"{who}.{n}", file))
    names = [name for m in members for name in m]
    strangers = [name for name in names if not isinstance(name, str) or name not in parameters]
    if strangers or len(set(names)) != len(names) or not states.keys() <= set(names):
        raise BadFile(who, "parameters that are not the network's, or one twice", "parameters of the network")
    state = {name: _decoded(value, f"{who}: {name}", file) for name, value in states.items()}
    for name, values in state.items():
        for key in (*FIRST, *SECOND):
            value = values.get(key)
            if value is not None and (not isinstance(value, Tensor) or value.shape != parameters[name].shape):
                found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise BadFile(f"{who}: {key} of {name!r}", found, f"a tensor of shape {tuple(parameters[name].shape)}")
    return OptimizerState(data["kind"], tuple(members), tuple(options), state)


def _decoded(data: Any, who: str, file: Container) -> dict[str, Any]:
    value = plain.decode(data, who, file.tensor)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise BadFile(who, type(value).__name__, "an object")
    return value


def _clone(value: Any) -> Any:
    """The same data with tensors of its own: optimizers update theirs in place."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _clone(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_clone, value))
    return value
