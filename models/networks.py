"""Networks: deterministic maps from a tensor of known shape to a vector of known width. They know no distributions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from annotated_types import Ge
from torch import Tensor, nn

Activation = Literal["silu", "tanh", "softplus", "relu"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "relu": nn.ReLU,
}


class Network(nn.Module):
    """A map (..., *in_shape) -> (..., out_dim), given by `self.body` on the flattened input.

    Attributes:
        in_shape: shape of one input.
        out_dim: width of one output.
        body: the layers, (..., prod(in_shape)) -> (..., out_dim).
    """

    def __init__(self, in_shape: tuple[int, ...], out_dim: int, body: nn.Module) -> None:
        super().__init__()
        self.in_shape = tuple(in_shape)
        self.out_dim = out_dim
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """Map x of shape (..., *in_shape) to (..., out_dim)."""
        return self.body(x.flatten(-len(self.in_shape)))


class Linear(Network):
    """One affine layer: y = A x + b."""

    def __init__(self, in_shape: tuple[int, ...], out_dim: int) -> None:
        super().__init__(in_shape, out_dim, nn.Linear(math.prod(in_shape), out_dim))


class MLP(Network):
    """A multilayer perceptron.

    Smooth activations (silu, tanh, softplus) let the grid reference converge exponentially; with relu the posterior
    density has kinks and the grid converges only algebraically.

    Args:
        in_shape: shape of one input (a fact).
        out_dim: width of one output (a fact).
        hidden: widths of the hidden layers.
        activation: the nonlinearity after each hidden layer.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_dim: int,
        *,
        hidden: Sequence[Annotated[int, Ge(1)]] = (128, 128),
        activation: Activation = "silu",
    ) -> None:
        if any(width < 1 for width in hidden):
            raise ValueError(f"hidden: every width must be at least 1, got {list(hidden)}")
        widths = [math.prod(in_shape), *hidden]
        layers: list[nn.Module] = []
        for n_in, n_out in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Linear(n_in, n_out), ACTIVATIONS[activation]()]
        super().__init__(in_shape, out_dim, nn.Sequential(*layers, nn.Linear(widths[-1], out_dim)))
