"""Networks: deterministic maps from a tensor of known shape to a vector of known width. They know no distributions.

An encoder may read more than x: where entries are missing, marks that say which (1 seen, 0 missing), and covariates. How they
join x is the network's own affair: side by side in a vector (here), as further channels of an image, as features of every
step of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
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

    @classmethod
    def joined_shape(cls, shape: tuple[int, ...], *, marks: bool, covariates: int) -> tuple[int, ...]:
        """Return the `in_shape` of an encoder that reads x (*shape) with marks and so many covariates."""
        return (math.prod(shape) * (1 + marks) + covariates,) if marks or covariates else tuple(shape)

    def join(self, x: Tensor, seen: Tensor | None, covariates: Tensor | None) -> Tensor:
        """Lay out what an encoder reads as one tensor (N, *in_shape).

        Args:
            x: (N, *shape), zero where an entry is missing.
            seen: (N, *shape), 1 where an entry is there and 0 where it is missing; None for data without holes.
            covariates: (N, C) or None.
        """
        parts = [x.flatten(1), *(() if seen is None else (seen.flatten(1),)), *(() if covariates is None else (covariates,))]
        return x if len(parts) == 1 else torch.cat(parts, -1)


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
