"""Likelihoods p(x|z): from the decoder's output to a distribution over one datum.

A likelihood sets `param_dim` (the decoder's output width), checks data against its support, suggests a remedy, and returns a
Pyro distribution with one datum as its event.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from elbowroom.errors import DataError
from elbowroom.models.likelihoods.missing import Incomplete


def first_bad(x: Tensor, bad: Tensor) -> str:
    """Describe the first offending entry: value, row and column, counted from 0."""
    index = bad.nonzero()[0].tolist()
    place = f"row {index[0]}" + (f", column {index[1] if len(index) == 2 else tuple(index[1:])}" if index[1:] else "")
    return f"{x[tuple(index)].item():g} at {place} ({int(bad.sum())} such entries)"


def suited(x: Tensor) -> str:
    """Name the likelihoods with a support that holds the values of x, the most likely first."""
    if bool(((x >= 0) & (x == x.round())).all()):
        return "bernoulli" if bool((x <= 1).all()) else "poisson or negative_binomial"
    if bool(((x >= 0) & (x <= 1)).all()):
        return "beta" if bool(((x > 0) & (x < 1)).all()) else "continuous_bernoulli"
    return "log_normal or gamma" if bool((x > 0).all()) else "gaussian or student_t"


def refusal(name: str, needs: str, x: Tensor, bad: Tensor, cure: str = "") -> str | None:
    """Say that `name` needs other values than the bad ones of x, and which likelihood accepts them; None if no value is bad."""
    if not bool(bad.any()):
        return None
    return f"{name} needs {needs}, found {first_bad(x, bad)}: {cure}use model.likelihood = {suited(x)}"


class Likelihood(nn.Module, ABC):
    """A map from decoder outputs (..., param_dim) to p(x|z) with event shape `event_shape`.

    Entries of x that are NaN are missing: their factors are left out.

    Attributes:
        event_shape: shape of one datum.
        width: number of entries of one datum.
        param_dim: the decoder's output width; a multiple k of `width`, arranged (k, *event_shape), unless entries differ.
        inside: a value of the support, a number or (*event_shape), used in place of missing entries.
        atoms: values with a mass of their own, in a support that is otherwise continuous.
        takes_exposure: whether `forward` takes an exposure (N,), which multiplies the rate of counts.
    """

    event_shape: tuple[int, ...]
    param_dim: int
    inside: float | Tensor = 0.0
    atoms: ClassVar[tuple[float, ...]] = ()
    takes_exposure: ClassVar[bool] = False

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.event_shape = tuple(event_shape)
        self.width = math.prod(event_shape)
        self.param_dim = self.width

    @abstractmethod
    def forward(self, params: Tensor) -> TorchDistribution:
        """Return p(x|z) for decoder outputs of shape (..., param_dim)."""

    @abstractmethod
    def problem(self, x: Tensor) -> str | None:
        """Say in one sentence why complete data x lie outside the support, and the remedy; None if they lie inside."""

    def check(self, x: Tensor) -> None:
        """Refuse data (N, *event_shape), NaN where missing, that this likelihood cannot have produced.

        Raises:
            DataError: for a wrong shape, infinities, or values outside the support; names the first place.
        """
        if x.ndim == 0 or tuple(x.shape[1:]) != self.event_shape:
            raise DataError(f"data: each datum has shape {tuple(x.shape[1:])}, the model expects {self.event_shape}")
        if x.isinf().any():
            raise DataError(f"data: {first_bad(x, x.isinf())}: remove it, or make it NaN to treat it as missing")
        missing = x.isnan()
        whole = (
            torch.where(missing, torch.as_tensor(self.inside, dtype=x.dtype, device=x.device), x) if bool(missing.any()) else x
        )
        problem = self.problem(whole)
        if problem is not None:
            raise DataError(f"data: {problem}")

    def incomplete(self, p: TorchDistribution, missing: Tensor) -> TorchDistribution:
        """Return p(x|z) of the observed entries; `missing` (N, *event_shape) is True where an entry is not observed."""
        return Incomplete(p, missing, self.inside)

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """Shape of the encoder's view of one datum."""
        return self.event_shape

    def features(self, x: Tensor) -> Tensor:
        """Return the encoder's view of x (N, *event_shape): (N, *feature_shape), NaN where an entry is missing."""
        return x

    def centre(self, p: TorchDistribution) -> Tensor:
        """Return E[x|z] of p, (..., *event_shape), or its mode or median if x has no mean (categories, heavy tails)."""
        return p.mean

    def adapt(self, x: Tensor) -> None:
        """Set data-dependent constants from training data (N, *event_shape), NaN where missing, before the first step."""

    def _shaped(self, params: Tensor) -> Tensor:
        return params.reshape(*params.shape[:-1], *self.event_shape)

    def _parts(self, params: Tensor) -> list[Tensor]:
        """Split (..., k * width) decoder outputs into k parts (..., *event_shape)."""
        k = self.param_dim // self.width
        return list(params.reshape(*params.shape[:-1], k, *self.event_shape).unbind(-1 - len(self.event_shape)))
