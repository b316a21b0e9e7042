"""GroMo, used as its tutorials use it: the opponent of `digits` and `growth_step`. Imported lazily.

A growth is: statistics over the data (loss summed, eval mode), solve, a line search of the amplitude with the
extended forward, apply. After it the optimizer is made anew, because GroMo replaces the parameters that grew.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.suite import Missing

Batches = Iterable[tuple[Tensor, Tensor]]
Summed = Callable[[Tensor, Tensor], Tensor]
# The tutorial's amplitudes, without 0: units of amplitude 0 would have no gradient, and never one again.
AMPLITUDES = (0.1, 0.25, 0.5, 1.0)
# The options that GroMo's documentation names for each paper.
OPTIONS: dict[str, dict[str, Any]] = {
    "tiny": {"compute_delta": False},
    "tiny + dW": {"compute_delta": True},
    "gradmax": {
        "compute_delta": False,
        "use_covariance": False,
        "alpha_zero": True,
        "use_projection": False,
        "ignore_singular_values": True,
    },
}


def require() -> Any:
    """The module; Missing, saying what to install, where it is not there."""
    try:
        import gromo
    except ModuleNotFoundError as problem:
        raise Missing(f"needs {problem.name}: pip install gromo") from None
    return gromo


def mlp(widths: Sequence[int], method: str) -> Any:
    """A growing MLP with relu (for GradMax GroMo's relu whose derivative at 0 is 1)."""
    require()
    from gromo.containers.growing_mlp import GrowingMLP
    from gromo.utils.utils import activation_fn, set_device

    set_device("cpu")  # every layer of today is on the CPU
    activation = activation_fn("relu_derivative_one_at_zero" if method == "gradmax" else "relu")
    hidden = set(widths[1:-1])
    if len(hidden) != 1:
        raise ValueError(f"GroMo's MLP has hidden layers of one width, found {widths}")
    return GrowingMLP(widths[0], widths[-1], hidden.pop(), len(widths) - 2, activation=activation)


def cnn(channels: Sequence[int], size: int, stride: int, kernel: str, method: str) -> Any:
    """Two 3x3 convolutions of this stride, padding 1, a relu between; `kernel`: full or restricted growth.

    Returns a container whose `layers` are the convolutions; the second one grows.
    """
    require()
    from gromo.containers.sequential_growing_container import SequentialGrowingModel
    from gromo.modules import conv2d_growing_module as convolutions
    from gromo.utils.utils import activation_fn, set_device

    set_device("cpu")
    activation = activation_fn("relu_derivative_one_at_zero" if method == "gradmax" else "relu")
    growing = {
        "full": convolutions.FullConv2dGrowingModule,
        "restricted": convolutions.RestrictedConv2dGrowingModule,
    }[kernel]

    inner = (size - 1) // stride + 1

    class TwoConvolutions(SequentialGrowingModel):
        def __init__(self) -> None:
            super().__init__(in_features=channels[0], out_features=channels[-1])
            first = growing(
                channels[0],
                channels[1],
                3,
                stride=stride,
                padding=1,
                input_size=(size, size),
                post_layer_function=activation,
                name="first",
            )
            second = growing(
                channels[1],
                channels[2],
                3,
                stride=stride,
                padding=1,
                input_size=(inner, inner),
                previous_module=first,
                allow_growing=True,
                name="second",
            )
            self.layers = nn.ModuleList([first, second])
            self._growable_layers = [second]
            self.set_growing_layers(scheduling_method="all")

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

        def extended_forward(self, x: Tensor, mask: dict[str, Any] | None = None) -> Tensor:
            extension = None
            layer: Any
            for layer in self.layers:
                x, extension = layer.extended_forward(x, extension)
            return x

    return TwoConvolutions()


def grow(
    model: Any,
    layer: int,
    batches: Batches,
    search: Batches | None,
    loss: Summed,
    *,
    units: int,
    method: str,
    keep: list[Tensor] | None = None,
) -> float:
    """`units` neurons have been added in front of growable layer `layer`; returns the amplitude that was chosen.

    `loss(outputs, targets)` is summed over samples. GradMax does not change outputs, so it needs no line search:
    its fan-out gets the mean norm of the existing ones. Without data to `search` on the amplitude is 1.
    `keep`: an empty list receives the matrix N (the desired move that is left, against the new fan-in).
    """
    model.eval()
    model.set_growing_layers(index=layer)
    model.init_computation()
    for x, y in batches:
        model.zero_grad()
        loss(model(x), y).backward()
        model.update_computation()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "using the pseudo-inverse"
        # Threshold at 0: as many units as asked for, also where their singular values are small.
        model.compute_optimal_updates(maximum_added_neurons=units, statistical_threshold=0.0, **OPTIONS[method])
    if keep is not None and not keep:
        [grown] = model._growing_layers
        keep.append(grown.tensor_n.detach().clone())
    model.reset_computation()
    model.dummy_select_update()
    best = 1.0
    if method == "gradmax":
        model.currently_updated_layer.normalize_optimal_updates(normalization_type="gradmax_normalization")
    elif search is not None:
        found = []
        for amplitude in AMPLITUDES:
            model.set_scaling_factor(amplitude)
            with torch.no_grad():
                found.append((float(sum(loss(model.extended_forward(x), y) for x, y in search)), amplitude))
        best = min(found)[1]
    model.set_scaling_factor(best)
    model.apply_change()
    model.zero_grad()
    model.train()
    return best


def copy_weights(model: Any, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    """The layers hold copies of these weights and biases."""
    with torch.no_grad():
        for layer, weight, bias in zip(model.layers, weights, biases, strict=True):
            layer.layer.weight.copy_(weight)
            layer.layer.bias.copy_(bias)


def cross_entropy(label_smoothing: float = 0.0) -> Summed:
    """Cross entropy, summed over samples: what GroMo's statistics expect."""
    return lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="sum", label_smoothing=label_smoothing)
