"""The base class of encoders and decoders."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


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
        """Return the `in_shape` of an encoder that reads x (*shape) with marks and `covariates` covariates."""
        return (math.prod(shape) * (1 + marks) + covariates,) if marks or covariates else tuple(shape)

    def join(self, x: Tensor, seen: Tensor | None, covariates: Tensor | None) -> Tensor:
        """Join the inputs of an encoder into one tensor (N, *in_shape).

        Args:
            x: (N, *shape), zero where an entry is missing.
            seen: (N, *shape), 1 where an entry is observed and 0 where it is missing; None for complete data.
            covariates: (N, C) or None.
        """
        parts = [x.flatten(1), *(() if seen is None else (seen.flatten(1),)), *(() if covariates is None else (covariates,))]
        return x if len(parts) == 1 else torch.cat(parts, -1)
