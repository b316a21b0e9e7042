"""`print(network)`: one line per group with what enters it, and the counts."""

from __future__ import annotations

from irgrow.ir.network import Bundle, Group, Network
from irgrow.ir.pattern import Dense, Identity, Sparse


def network_text(network: Network) -> str:
    """The network as text, groups in topological order."""
    c = network.counts
    lines = [
        f"network: {len(network.groups)} groups, {c.neurons:,} neurons, {c.edges:,} edges, "
        f"{c.parameters:,} parameters, {c.multiply_adds:,} multiply-adds, {str(network.dtype).split('.')[1]}"
    ]
    width = max(len(name) for name in network.groups)
    shapes = {name: "x".join(map(str, g.shape)) for name, g in network.groups.items()}
    wide = max(map(len, shapes.values()))
    for names, cyclic in network.components:
        for name in names:
            group = network.groups[name]
            enters = [_bundle_text(b) + _frozen(network, b.tensor) for b in network.entering(name)]
            loop = "  (in a loop of groups)" if cyclic and len(names) > 1 else ""
            what = f"{_role(network, group)}{loop}"
            lines.append(f"  {name:<{width}}  {shapes[name]:>{wide}}  {what}")
            lines += [f"  {'':<{width}}  {'':>{wide}}    <- {text}" for text in enters]
    return "\n".join(lines)


def _role(network: Network, group: Group) -> str:
    if group.name in network.inputs:
        return "input"
    parts = ["output"] if group.name in network.outputs else []
    if group.aggregation != "sum":
        parts.append(group.aggregation)
    if group.bias is not None:
        parts.append("bias" + _frozen(network, f"bias.{group.name}"))
    if group.norm is not None:
        parts.append(f"{group.norm.kind} norm")
    if group.activation != "identity":
        parts.append(group.activation)
    if group.dropout:
        parts.append(f"dropout {group.dropout:g}")
    return ", ".join(parts) or "sum"


def _frozen(network: Network, tensor: str) -> str:
    mask = network.frozen.get(tensor)
    return "" if mask is None else f" ({int(mask.sum()):,} of {mask.numel():,} frozen)"


def _bundle_text(bundle: Bundle) -> str:
    pattern = bundle.pattern
    if isinstance(pattern, Dense):
        text = "dense"
    elif isinstance(pattern, Identity):
        text = "identity" if pattern.start == 0 else f"identity into units from {pattern.start}"
    elif isinstance(pattern, Sparse):
        text = f"sparse, {pattern.source.size:,} edges"
        if pattern.weight_index is not None:
            text += f", {pattern.weights:,} shared weights"
    else:
        text = str(pattern)
    if not bundle.trainable:
        fixed = bundle.weight
        text += f", fixed weight {fixed.item():g}" if fixed.dim() == 0 and fixed.item() != 1 else ""
        text += ", fixed weights" if fixed.dim() else ""
    elif bundle.weight.dim() == 0:
        text += ", one trained weight"
    return f"{bundle.source}  {text}  [{bundle.name}]"
