"""Every way in which a network can be broken, each with the error that `verify` owes for it.

for corruption in CORRUPTIONS:
    broken = corruption(random_network(seed), seed)      # None: no place for it in that network
    with pytest.raises(corruption.error, match=corruption.says): broken.verify()
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from irgrow.ir.errors import (
    BadName,
    BadProperty,
    BadSerial,
    BadShape,
    CyclicNetwork,
    DanglingEdge,
    DuplicateEdge,
    InvalidNetwork,
    NonFinite,
    Unreachable,
    WeightSize,
)
from irgrow.ir.network import Bundle, Group, Network, Norm
from irgrow.ir.pattern import Conv2d, Dense, Identity, Local2d, Pattern, Pool2d, Sparse

Breaker = Callable[[Network, random.Random], Network | None]


@dataclass(frozen=True)
class Corruption:
    """One way to break a network; `says` is a regular expression that the error's text matches."""

    name: str
    error: type[InvalidNetwork]
    says: str
    breaks: Breaker

    def __call__(self, network: Network, seed: int = 0) -> Network | None:
        """The network broken at a place drawn from `seed` (a new value); None where there is no such place."""
        return self.breaks(network, random.Random(seed))

    def __repr__(self) -> str:
        return f"<Corruption {self.name}>"


CORRUPTIONS: list[Corruption] = []


def _corruption(error: type[InvalidNetwork], says: str) -> Callable[[Breaker], Breaker]:
    def add(breaks: Breaker) -> Breaker:
        CORRUPTIONS.append(Corruption(breaks.__name__.strip("_"), error, says, breaks))
        return breaks

    return add


# ---- how a network is put together again, without a check ---------------------------------------------------


def _group(network: Network, group: Group, **changes: Any) -> Network:
    groups = dict(network.groups) | {group.name: replace(group, **changes)}
    return Network(groups, network.bundles, network.inputs, network.outputs, network.next_serial)


def _bundle(network: Network, bundle: Bundle, **changes: Any) -> Network:
    bundles = dict(network.bundles) | {bundle.name: replace(bundle, **changes)}
    return Network(network.groups, bundles, network.inputs, network.outputs, network.next_serial)


def _more(network: Network, bundle: Bundle) -> Network:
    bundles = dict(network.bundles) | {bundle.name: bundle}
    return Network(network.groups, bundles, network.inputs, network.outputs, network.next_serial)


def _with(network: Network, name: str, tensor: Any) -> Network:
    """Any tensor in place of the one of that name."""
    kind, owner = name.split(".")
    if kind == "weight":
        return _bundle(network, network.bundles[owner], weight=tensor)
    group = network.groups[owner]
    if kind == "bias":
        return _group(network, group, bias=tensor)
    assert group.norm is not None
    return _group(network, group, norm=replace(group.norm, **{kind: tensor}))


def _a_group(network: Network, draw: random.Random, fit: Callable[[Group], bool]) -> Group | None:
    found = [group for group in network.groups.values() if fit(group)]
    return draw.choice(found) if found else None


def _a_bundle(network: Network, draw: random.Random, kind: type[Pattern]) -> Bundle | None:
    found = [bundle for bundle in network.bundles.values() if isinstance(bundle.pattern, kind)]
    return draw.choice(found) if found else None


def _some_edges(network: Network, draw: random.Random) -> tuple[Bundle, Sparse] | None:
    bundle = _a_bundle(network, draw, Sparse)
    if bundle is None:
        return None
    assert isinstance(bundle.pattern, Sparse)
    return bundle, bundle.pattern


# ---- names and roles ------------------------------------------------------------------------------------------


@_corruption(BadName, r"group 'a\.b': found a name that is no identifier, expected letters, digits and _, no dots")
def _a_name_with_a_dot(network: Network, draw: random.Random) -> Network:
    group = draw.choice(list(network.groups.values()))
    groups = {"a.b" if name == group.name else name: g for name, g in network.groups.items()}
    return Network(groups, network.bundles, network.inputs, network.outputs, network.next_serial)


@_corruption(BadName, r"bundle '': found a name that is no identifier")
def _an_empty_name(network: Network, draw: random.Random) -> Network:
    bundle = draw.choice(list(network.bundles.values()))
    return _more(network, replace(bundle, name=""))


@_corruption(BadName, r"group '\w+': found stored under another name than its own, 'other'")
def _a_group_under_another_name(network: Network, draw: random.Random) -> Network:
    group = draw.choice(list(network.groups.values()))
    groups = dict(network.groups) | {group.name: replace(group, name="other")}
    return Network(groups, network.bundles, network.inputs, network.outputs, network.next_serial)


@_corruption(BadName, r"bundle '\w+': source: found 'nowhere', expected one of \w+")
def _an_unknown_source(network: Network, draw: random.Random) -> Network:
    return _bundle(network, draw.choice(list(network.bundles.values())), source="nowhere")


@_corruption(BadName, r"bundle '\w+': target: found 'nowhere', expected one of \w+")
def _an_unknown_target(network: Network, draw: random.Random) -> Network:
    return _bundle(network, draw.choice(list(network.bundles.values())), target="nowhere")


@_corruption(BadName, r"network: inputs: found none, expected at least one group among the inputs")
def _no_inputs(network: Network, draw: random.Random) -> Network:
    return replace(network, inputs=())


@_corruption(BadName, r"network: outputs: found none, expected at least one group among the outputs")
def _no_outputs(network: Network, draw: random.Random) -> Network:
    return replace(network, outputs=())


@_corruption(BadName, r"network: outputs: found 'nowhere', expected one of \w+")
def _an_unknown_output(network: Network, draw: random.Random) -> Network:
    return replace(network, outputs=(*network.outputs, "nowhere"))


@_corruption(BadName, r"network: inputs: found \('\w+', .*\), expected no name twice")
def _an_input_twice(network: Network, draw: random.Random) -> Network:
    return replace(network, inputs=(*network.inputs, draw.choice(network.inputs)))


@_corruption(BadProperty, r"bundle 'wrong': found it feeds the input '\w+', expected inputs have no parents")
def _a_bundle_into_an_input(network: Network, draw: random.Random) -> Network:
    name = draw.choice(network.inputs)
    return _more(network, _dense(network, "wrong", draw.choice(network.outputs), name))


def _dense(network: Network, name: str, source: str, target: str) -> Bundle:
    columns, rows = network.groups[source].neurons, network.groups[target].neurons
    return Bundle(name, source, target, Dense(), torch.zeros(rows, columns, dtype=network.dtype))


# ---- properties of groups -------------------------------------------------------------------------------------


@_corruption(BadProperty, r"group '\w+': activation: found 'swosh', expected one of identity, relu")
def _an_unknown_activation(network: Network, draw: random.Random) -> Network:
    return _group(network, draw.choice(list(network.groups.values())), activation="swosh")


@_corruption(BadProperty, r"group '\w+': aggregation: found 'mean', expected sum or max")
def _an_unknown_aggregation(network: Network, draw: random.Random) -> Network:
    return _group(network, draw.choice(list(network.groups.values())), aggregation="mean")


@_corruption(BadProperty, r"group '\w+': dropout: found (1\.0|-0\.1|nan), expected a probability in \[0, 1\)")
def _a_dropout_of_one(network: Network, draw: random.Random) -> Network:
    value = draw.choice((1.0, -0.1, float("nan")))
    return _group(network, draw.choice(list(network.groups.values())), dropout=value)


@_corruption(BadProperty, r"group '\w+': found an input with bias, norm or activation, expected a plain input group")
def _an_input_with_bias(network: Network, draw: random.Random) -> Network:
    group = network.groups[draw.choice(network.inputs)]
    return _group(network, group, bias=torch.zeros(group.units, dtype=network.dtype))


def _hidden(network: Network) -> Callable[[Group], bool]:
    return lambda group: group.name not in network.inputs


def _norm(group: Group, kind: str, dtype: torch.dtype) -> Norm:
    ones = torch.ones(group.units, dtype=dtype)
    running = (0 * ones, ones.clone()) if kind == "batch" else (None, None)
    return Norm(kind, ones, 0 * ones, *running)


@_corruption(BadProperty, r"group '\w+': norm: found 'instance', expected batch, layer or group")
def _an_unknown_norm(network: Network, draw: random.Random) -> Network | None:
    group = _a_group(network, draw, _hidden(network))
    return (
        None
        if group is None
        else _group(network, group, norm=replace(_norm(group, "layer", network.dtype), kind="instance"))
    )


@_corruption(BadProperty, r"group '\w+': batch norm: found running statistics missing or out of place")
def _a_batch_norm_without_statistics(network: Network, draw: random.Random) -> Network | None:
    group = _a_group(network, draw, _hidden(network))
    return (
        None
        if group is None
        else _group(network, group, norm=replace(_norm(group, "batch", network.dtype), variance=None))
    )


@_corruption(BadProperty, r"group '\w+': layer norm: found running statistics missing or out of place")
def _a_layer_norm_with_statistics(network: Network, draw: random.Random) -> Network | None:
    group = _a_group(network, draw, _hidden(network))
    return (
        None
        if group is None
        else _group(network, group, norm=replace(_norm(group, "batch", network.dtype), kind="layer"))
    )


@_corruption(BadProperty, r"group '\w+': norm variance of unit \d+: found -\d\S*, expected at least 0")
def _a_negative_variance(network: Network, draw: random.Random) -> Network | None:
    group = _a_group(network, draw, _hidden(network))
    if group is None:
        return None
    norm = _norm(group, "batch", network.dtype)
    assert norm.variance is not None
    norm.variance[draw.randrange(group.units)] = -0.5
    return _group(network, group, norm=norm)


@_corruption(BadProperty, r"group '\w+': norm eps: found (nan|-1), expected a finite number, at least 0")
def _a_bad_eps(network: Network, draw: random.Random) -> Network | None:
    group = _a_group(network, draw, _hidden(network))
    eps = draw.choice((float("nan"), -1))
    return (
        None if group is None else _group(network, group, norm=replace(_norm(group, "layer", network.dtype), eps=eps))
    )


@_corruption(BadShape, r"group '\w+': group norm: found \d+ groups of \d+ units, expected a divisor of the units")
def _norm_groups_that_do_not_divide(network: Network, draw: random.Random) -> Network | None:
    group = _a_group(network, draw, _hidden(network))
    if group is None:
        return None
    return _group(network, group, norm=replace(_norm(group, "group", network.dtype), groups=group.units + 1))


@_corruption(BadProperty, r"group '\w+': found a normalisation in a part of the group graph that holds a loop")
def _a_norm_in_a_loop(network: Network, draw: random.Random) -> Network | None:
    looped = {name for names, cyclic in network.components if cyclic for name in names}
    group = _a_group(network, draw, lambda g: g.name in looped)
    return None if group is None else _group(network, group, norm=_norm(group, "batch", network.dtype))


# ---- frozen entries -------------------------------------------------------------------------------------------


@_corruption(BadName, r"frozen entries of 'weight\.nowhere': found no such tensor, expected a weight, bias, scale or")
def _a_mask_of_no_tensor(network: Network, draw: random.Random) -> Network:
    return replace(network, frozen={**network.frozen, "weight.nowhere": torch.ones(2, dtype=torch.bool)})


@_corruption(WeightSize, r"frozen entries of '\w+\.\w+': found torch\.(bool|uint8), shape .*, expected a mask \(bool,")
def _a_mask_of_another_shape_or_dtype(network: Network, draw: random.Random) -> Network:
    name = draw.choice(network.trainable() or list(network.tensors()))
    shape = tuple(network.tensors()[name].shape)
    mask = draw.choice((torch.ones(*shape, 2, dtype=torch.bool), torch.ones(shape, dtype=torch.uint8)))
    return replace(network, frozen={**network.frozen, name: mask})


# ---- shapes ---------------------------------------------------------------------------------------------------


@_corruption(BadShape, r"group '\w+': shape: found \((0,)?\), expected \(units, \*positions\), each at least 1")
def _a_group_without_units(network: Network, draw: random.Random) -> Network:
    return _group(network, draw.choice(list(network.groups.values())), shape=draw.choice(((), (0,))))


@_corruption(BadProperty, r"bundle '\w+': pattern: found str, expected a Pattern")
def _a_pattern_that_is_none(network: Network, draw: random.Random) -> Network:
    return _bundle(network, draw.choice(list(network.bundles.values())), pattern="dense")


@_corruption(BadShape, r"bundle '\w+' from '\w+' to '\w+': .*: found target positions \(.*\), expected \(\d+, \d+\)")
def _a_window_that_does_not_fit(network: Network, draw: random.Random) -> Network | None:
    bundle = _a_bundle(network, draw, Conv2d)
    if bundle is None:
        return None
    pattern: Any = bundle.pattern
    wider = replace(pattern, padding=(pattern.padding[0] + pattern.stride[0], pattern.padding[1]))
    return _bundle(network, bundle, pattern=wider)


@_corruption(BadShape, r"bundle '\w+' from .*: \w+ with \d+ channel groups: found \d+ input and \d+ output channels")
def _channel_groups_that_do_not_divide(network: Network, draw: random.Random) -> Network | None:
    bundle = _a_bundle(network, draw, Conv2d)
    if bundle is None:
        return None
    pattern: Any = bundle.pattern
    return _bundle(network, bundle, pattern=replace(pattern, channel_groups=bundle.weight.shape[0] + 1))


@_corruption(BadShape, r"Identity from \(.*\) into units \d+ to \d+ of \(.*\): expected equal positions and at least")
def _an_identity_out_of_range(network: Network, draw: random.Random) -> Network | None:
    bundle = _a_bundle(network, draw, Identity)
    return None if bundle is None else _bundle(network, bundle, pattern=Identity(network.groups[bundle.target].units))


@_corruption(BadShape, r"Pool2d: found \d+ input and \d+ output channels, expected as many")
def _a_pool_between_different_channels(network: Network, draw: random.Random) -> Network | None:
    for bundle in network.bundles.values():
        pattern: Any = bundle.pattern
        (source, target) = network.shapes(bundle)
        if isinstance(pattern, Conv2d) and source[0] != target[0]:
            window = Pool2d(pattern.kernel, pattern.stride, pattern.padding, pattern.dilation)
            return _bundle(network, bundle, pattern=window, weight=torch.ones((), dtype=network.dtype))
    return None


# ---- tensors --------------------------------------------------------------------------------------------------


def _a_tensor(network: Network, draw: random.Random, *kinds: str) -> tuple[str, Tensor] | None:
    found = [(n, t) for n, t in network.tensors().items() if t.numel() and (not kinds or n.split(".")[0] in kinds)]
    return draw.choice(found) if found else None


@_corruption(WeightSize, r"bundle '\w+': weight: found shape \(.*\), expected \(.*\)")
def _a_weight_of_the_wrong_shape(network: Network, draw: random.Random) -> Network:
    bundle = draw.choice(list(network.bundles.values()))
    return _bundle(network, bundle, weight=torch.zeros(*bundle.weight.shape, 2, dtype=network.dtype))


@_corruption(WeightSize, r"group '\w+': (bias|norm \w+): found shape \(\d+,\), expected \(\d+,\)")
def _a_bias_or_norm_of_the_wrong_length(network: Network, draw: random.Random) -> Network | None:
    found = _a_tensor(network, draw, "bias", "scale", "shift", "mean", "variance")
    return found and _with(network, found[0], torch.ones(found[1].numel() + 1, dtype=network.dtype))


@_corruption(WeightSize, r"tensor '[\w.]+': found torch.float16, expected torch\.\w+, the dtype of the first bundle")
def _two_dtypes(network: Network, draw: random.Random) -> Network | None:
    later = list(network.tensors().items())[1:]
    if not later:
        return None
    name, tensor = draw.choice(later)
    return _with(network, name, tensor.half())


@_corruption(WeightSize, r"tensor '[\w.]+': found device meta, expected cpu, as the first bundle")
def _two_devices(network: Network, draw: random.Random) -> Network | None:
    later = [(n, t) for n, t in list(network.tensors().items())[1:] if n.startswith(("bias", "scale", "shift"))]
    if not later:
        return None
    name, tensor = draw.choice(later)
    return _with(network, name, tensor.to("meta"))


@_corruption(WeightSize, r"tensor '[\w.]+': found torch.int64, expected a floating tensor")
def _whole_numbers(network: Network, draw: random.Random) -> Network | None:
    found = _a_tensor(network, draw, "weight", "bias")
    return found and _with(network, found[0], torch.ones_like(found[1], dtype=torch.long))


@_corruption(WeightSize, r"tensor '[\w.]+': found float\d\d, expected a floating tensor")
def _an_array_for_a_tensor(network: Network, draw: random.Random) -> Network | None:
    found = _a_tensor(network, draw, "weight", "bias")
    return found and _with(network, found[0], found[1].numpy())


def _spoiled(network: Network, draw: random.Random, value: float, *kinds: str) -> Network | None:
    found = _a_tensor(network, draw, *kinds)
    if found is None:
        return None
    name, tensor = found
    if name.startswith("weight.") and isinstance(network.bundles[name.split(".")[1]].pattern, Local2d):
        return None  # an entry without an edge is another mistake
    tensor = tensor.clone()
    tensor.view(-1)[draw.randrange(tensor.numel())] = value
    return _with(network, name, tensor)


@_corruption(NonFinite, r"tensor 'weight\.\w+' at \[.*\] \(an edge into group '\w+', neuron \d+\): found nan")
def _a_weight_that_is_nan(network: Network, draw: random.Random) -> Network | None:
    return _spoiled(network, draw, float("nan"), "weight")


@_corruption(NonFinite, r"tensor '\w+\.\w+' at \[\d+\] \(group '\w+', neuron \d+\): found -?inf, expected a finite")
def _a_bias_or_norm_that_is_infinite(network: Network, draw: random.Random) -> Network | None:
    return _spoiled(network, draw, draw.choice((float("inf"), float("-inf"))), "bias", "scale", "shift", "mean")


@_corruption(DanglingEdge, r"bundle '\w+': weight: found an entry that is not 0 and reaches into the padding")
def _a_weight_without_an_edge(network: Network, draw: random.Random) -> Network | None:
    for bundle in network.bundles.values():
        if isinstance(bundle.pattern, Local2d):
            idle = ~torch.from_numpy(bundle.pattern.used(network.groups[bundle.source].shape))
            if bool(idle.any()):
                return _bundle(network, bundle, weight=bundle.weight + idle.to(bundle.weight))
    return None


# ---- edges ----------------------------------------------------------------------------------------------------


def _edited(pattern: Sparse, draw: random.Random, **values: int) -> Sparse:
    """One edge with other numbers."""
    edge, changes = draw.randrange(pattern.source.size), {}
    for name, value in values.items():
        changes[name] = getattr(pattern, name).copy()
        changes[name][edge] = value
    return replace(pattern, **changes)


@_corruption(
    DanglingEdge, r"bundle '\w+' from .*: Sparse: source of edge \d+: found neuron (\d+|-1), expected 0 to \d+"
)
def _an_edge_from_nowhere(network: Network, draw: random.Random) -> Network | None:
    found = _some_edges(network, draw)
    if found is None:
        return None
    wrong = draw.choice((-1, network.groups[found[0].source].neurons))
    return _bundle(network, found[0], pattern=_edited(found[1], draw, source=wrong))


@_corruption(
    DanglingEdge, r"bundle '\w+' from .*: Sparse: target of edge \d+: found neuron (\d+|-1), expected 0 to \d+"
)
def _an_edge_to_nowhere(network: Network, draw: random.Random) -> Network | None:
    found = _some_edges(network, draw)
    if found is None:
        return None
    wrong = draw.choice((-1, network.groups[found[0].target].neurons))
    return _bundle(network, found[0], pattern=_edited(found[1], draw, target=wrong))


@_corruption(WeightSize, r"bundle '\w+' from .*: Sparse: weight_index: found \S+ to \d+, expected 0 to \d+")
def _a_weight_index_out_of_range(network: Network, draw: random.Random) -> Network | None:
    found = _some_edges(network, draw)
    if found is None:
        return None
    tied = replace(found[1], weight_index=found[1].index.copy())
    return _bundle(network, found[0], pattern=_edited(tied, draw, weight_index=found[1].weights))


@_corruption(DuplicateEdge, r"bundle '\w+': edge \d+: found \w+ neuron \d+ -> \w+ neuron \d+ again, expected each edge")
def _an_edge_twice(network: Network, draw: random.Random) -> Network | None:
    found = _some_edges(network, draw)
    if found is None:
        return None
    bundle, old = found
    edge = draw.randrange(old.source.size)
    tied = old.weight_index is not None
    pattern = Sparse(
        np.append(old.source, old.source[edge]),
        np.append(old.target, old.target[edge]),
        np.append(old.index, old.index[edge]) if tied else None,
        old.weights if tied else -1,
    )
    weight = bundle.weight if tied else torch.cat([bundle.weight, bundle.weight[:1]])
    return _bundle(network, bundle, pattern=pattern, weight=weight)


@_corruption(
    CyclicNetwork, r"network: neurons that feed themselves: found (\w+) neuron (\d+) -> \1 neuron \2, expected no"
)
def _a_neuron_that_feeds_itself(network: Network, draw: random.Random) -> Network | None:
    looped = {name for names, cyclic in network.components if cyclic for name in names}
    group = _a_group(network, draw, lambda g: _hidden(network)(g) and g.norm is None and g.name not in looped)
    if group is None:
        return None
    at = draw.randrange(group.neurons)
    return _more(network, Bundle("self", group.name, group.name, Sparse([at], [at]), _ones(network, 1)))  # type: ignore[arg-type]


@_corruption(
    CyclicNetwork, r"network: neurons that feed themselves: found .*neuron \d+ -> .*, expected no path from a n"
)
def _a_long_cycle(network: Network, draw: random.Random) -> Network | None:
    """From some hidden neuron back to one of its parents."""
    for bundle in draw.sample(list(network.bundles.values()), len(network.bundles)):
        ends = network.groups[bundle.source], network.groups[bundle.target]
        if bundle.source in network.inputs or bundle.source == bundle.target or any(g.norm for g in ends):
            continue
        if any(g.norm for g in network.groups.values()):
            continue  # one of them might lie in the new loop
        s, t, _ = bundle.pattern.all_edges(*network.shapes(bundle))
        if s.size == 0:
            continue
        edge = draw.randrange(s.size)
        back = Sparse(t[edge : edge + 1], s[edge : edge + 1])
        return _more(network, Bundle("back", bundle.target, bundle.source, back, _ones(network, 1)))
    return None


def _ones(network: Network, count: int) -> Tensor:
    return torch.ones(count, dtype=network.dtype)


@_corruption(Unreachable, r"output '\w+': found neuron \d+ \(\d+ in all\) that no input reaches, expected a path from")
def _an_output_that_nothing_feeds(network: Network, draw: random.Random) -> Network:
    cut = draw.choice(network.outputs)
    bundles = {name: b for name, b in network.bundles.items() if b.target != cut}
    return Network(network.groups, bundles, network.inputs, network.outputs, network.next_serial)


# ---- serials --------------------------------------------------------------------------------------------------


@_corruption(BadSerial, r"group .\w+.: found serial \d+ of unit \d+, which is taken or below 0, expected serials")
def _a_serial_twice(network: Network, draw: random.Random) -> Network | None:
    first, second = draw.sample(list(network.groups.values()), 2)
    serials = second.serials.copy()
    serials[draw.randrange(second.units)] = first.serials[draw.randrange(first.units)]
    return _group(network, second, serials=serials)


@_corruption(BadSerial, r"group .\w+.: found serial -\d+ of unit \d+, which is taken or below 0, expected serials")
def _a_negative_serial(network: Network, draw: random.Random) -> Network:
    group = draw.choice(list(network.groups.values()))
    serials = group.serials.copy()
    serials[draw.randrange(group.units)] = -group.positions
    return _group(network, group, serials=serials)


@_corruption(BadSerial, r"network: next serial: found \d+, expected at least \d+")
def _a_next_serial_that_is_taken(network: Network, draw: random.Random) -> Network:
    return replace(network, next_serial=network.next_serial - 1)


@_corruption(BadSerial, r"group '\w+': serials: found .*, expected \d+ integers, one per unit")
def _serials_that_are_missing(network: Network, draw: random.Random) -> Network:
    group = draw.choice(list(network.groups.values()))
    return _group(network, group, serials=draw.choice((None, group.serials[1:], group.serials.astype(float))))
