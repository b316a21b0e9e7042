"""`show(path)`: what is in a file, for a terminal."""

from __future__ import annotations

import os
import sys
from typing import TextIO

import torch
from torch import Tensor

from irgrow.io.checkpoint import Checkpoint, load_checkpoint
from irgrow.ir.network import Network

BARS, PLAIN_BARS = " ▁▂▃▄▅▆▇█", " .:-=+*#%"
BINS = 15


def show(path: str | os.PathLike[str], *, svg: str | os.PathLike[str] | None = None, to: TextIO | None = None) -> None:
    """Prints the network in a file, its weights in a line each, and what is known of its training.

    With `svg` the network is drawn to that file as well. Raises BadFile for a file that cannot be read or written.
    """
    checkpoint = load_checkpoint(path)
    out = to or sys.stdout
    print(summary(checkpoint, bars=_bars(out)), file=out)
    if svg is not None:
        from irgrow.viz.drawing import save_svg

        save_svg(checkpoint.network, svg, title=os.path.basename(os.fspath(path)))
        print(f"drawn to {os.fspath(svg)}", file=out)


def summary(checkpoint: Checkpoint, *, bars: str = BARS) -> str:
    """A network file as text for people."""
    return "\n".join([str(checkpoint.network), "", *_weights(checkpoint.network, bars), *_training(checkpoint)])


def _weights(network: Network, bars: str) -> list[str]:
    """One line per tensor: its size, spread and a histogram of its values."""
    rows = []
    for name, tensor in network.tensors().items():
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        values = tensor.detach().double().flatten()
        if values.numel() < 2:
            rows.append((name, shape, f"{values.item():.3g}" if values.numel() else "", "", ""))
            continue
        largest = float(values.abs().max())
        rows.append((name, shape, f"{float(values.std()):.3g}", f"{largest:.3g}", _histogram(values, largest, bars)))
    if not rows:
        return []
    head = ("tensor", "shape", "std", "largest", "values, from -largest to largest")
    wide = [max(len(row[n]) for row in [head, *rows]) for n in range(4)]
    return [
        f"{a:<{wide[0]}}  {b:>{wide[1]}}  {c:>{wide[2]}}  {d:>{wide[3]}}  {e}".rstrip()
        for a, b, c, d, e in [head, *rows]
    ]


def _histogram(values: Tensor, largest: float, bars: str) -> str:
    if largest == 0.0:
        return ""
    counts = torch.histc(values, BINS, -largest, largest)
    steps = (counts / counts.max() * (len(bars) - 1)).ceil().int().tolist()
    return f"|{''.join(bars[n] for n in steps)}|"


def _training(checkpoint: Checkpoint) -> list[str]:
    lines = []
    if checkpoint.optimizer is not None:
        options = [f"lr {float(o['lr']):g}" for o in checkpoint.optimizer.options if "lr" in o]
        held, state = sum(map(len, checkpoint.optimizer.members)), len(checkpoint.optimizer.state)
        lines.append(
            f"optimizer: {checkpoint.optimizer.kind}, {', '.join(options)}, state of {state} of {held} parameters"
        )
    if checkpoint.random is not None:
        lines.append("random state: saved")
    for name, data in (("progress", checkpoint.progress), ("extra", checkpoint.extra)):
        if data:
            lines.append(f"{name}: " + ", ".join(f"{key} = {_short(value)}" for key, value in data.items()))
    if checkpoint.ledger:
        lines.append(f"growths: {len(checkpoint.ledger)}")
        shown = list(checkpoint.ledger)[-8:]
        if len(shown) < len(checkpoint.ledger):
            lines.append(f"  ... {len(checkpoint.ledger) - len(shown)} earlier ones")
        lines += [f"  {entry.by}" for entry in shown]
    return ["", *lines] if lines else []


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _bars(out: TextIO) -> str:
    """Characters that the terminal can show."""
    try:
        BARS.encode(getattr(out, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return PLAIN_BARS
    return BARS
