"""Positive parameters of likelihoods: scales, shapes, concentrations, dispersions; and an exponential that stays finite.

Each is one number for all entries (`shared`), one per entry (`per_dimension`), or an output of the decoder (`decoder`), in
units of its value in the training data, so that zero corresponds to a fit of the marginal distribution.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

Source = Literal["shared", "per_dimension", "decoder"]

UNIT = math.log(math.e - 1)  # softplus(UNIT) = 1
EDGE = 15.0  # e^15 = 3.3e6 times the typical value


def bounded(a: Tensor) -> Tensor:
    """Return a for |a| <= 15, and sign(a) (15 + log(1 + |a| - 15)) beyond, so that its exponential never overflows.

    It increases strictly and has a continuous derivative, so that an outlier z still has a gradient.
    """
    return a.clamp(-EDGE, EDGE) + a.sign() * torch.log1p((a.abs() - EDGE).clamp_min(0.0))


class Free(nn.Module):
    """A number per entry: a parameter (`shared`, `per_dimension`), or the last of the decoder's parts (`decoder`)."""

    def __init__(self, event_shape: tuple[int, ...], source: Source) -> None:
        super().__init__()
        self.source = source
        self.outputs = int(source == "decoder")  # how many outputs of the decoder it takes per entry
        if source != "decoder":
            self.raw = nn.Parameter(torch.zeros(event_shape if source == "per_dimension" else ()))

    def forward(self, parts: list[Tensor]) -> Tensor:
        """Return the number, broadcastable to (..., *event); if the decoder gives it, it is removed from the end of `parts`."""
        return parts.pop() if self.source == "decoder" else self.raw


class Positive(nn.Module):
    """A positive number per entry: typical * (softplus(raw + log(e - 1)) + floor), which is typical (1 + floor) at raw = 0."""

    def __init__(self, event_shape: tuple[int, ...], source: Source, floor: float) -> None:
        super().__init__()
        self.free = Free(event_shape, source)
        self.outputs = self.free.outputs
        self.floor = floor
        self.typical: Tensor
        self.register_buffer("typical", torch.ones(event_shape))

    def forward(self, parts: list[Tensor]) -> Tensor:
        """Return the number, broadcastable to (..., *event); see `Free`."""
        return self.typical * (softplus(self.free(parts) + UNIT) + self.floor)

    def adapt(self, typical: Tensor) -> None:
        """Set the typical values, (*event); a shared number takes the mean over the entries."""
        self.typical = (typical.mean().expand_as(typical) if self.free.source == "shared" else typical).to(self.typical).clone()


def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return number, mean and variance of the entries of each column of x (N, *event) that are not NaN, in float64.

    The mean of no entries is 0, and so is the variance of fewer than two.
    """
    wide = x.double()  # the square of 1e30 overflows in float32
    n = (~wide.isnan()).sum(0).double()
    mean = wide.nansum(0) / n.clamp_min(1)
    return n, mean, (wide - mean).square().nansum(0) / (n - 1).clamp_min(1)


def standard_units(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each column of x (N, *event) with NaN; a constant column gets the overall unit.

    A column is constant if its standard deviation is only rounding error.
    """
    _, loc, variance = moments(x)
    unit = variance.sqrt()
    varies = unit > 4 * torch.finfo(x.dtype).eps * loc.abs()
    overall = torch.where(varies, unit, 0.0).square().mean().sqrt()
    overall = torch.where(overall > torch.finfo(x.dtype).tiny, overall, torch.ones_like(overall))
    return loc, torch.where(varies & (unit > torch.finfo(x.dtype).tiny), unit, overall)
