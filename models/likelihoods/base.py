"""Likelihoods p(x|z): from the decoder's output to a distribution over one datum.

A likelihood states `param_dim` (the decoder's output width), checks data against its support and says how to mend them,
and returns a Pyro distribution whose event is one datum.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Literal

import pyro.distributions as dist
import torch
from annotated_types import Gt
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import softplus

from elbowroom.errors import DataError
from elbowroom.models.likelihoods.missing import Incomplete
from elbowroom.models.likelihoods.scales import standard_units


def _first_bad(x: Tensor, bad: Tensor) -> str:
    """Describe the first offending entry: value, row and column, counted from 0."""
    index = bad.nonzero()[0].tolist()
    place = f"row {index[0]}" + (f", column {index[1] if len(index) == 2 else tuple(index[1:])}" if index[1:] else "")
    return f"{x[tuple(index)].item():g} at {place} ({int(bad.sum())} such entries)"


def suited(x: Tensor) -> str:
    """Name the likelihoods whose support holds the values of x, the likeliest first."""
    if bool(((x >= 0) & (x == x.round())).all()):
        return "bernoulli" if bool((x <= 1).all()) else "poisson or negative_binomial"
    if bool(((x >= 0) & (x <= 1)).all()):
        return "beta" if bool(((x > 0) & (x < 1)).all()) else "continuous_bernoulli"
    return "log_normal or gamma" if bool((x > 0).all()) else "gaussian or student_t"


def refusal(name: str, needs: str, x: Tensor, bad: Tensor, cure: str = "") -> str | None:
    """Say that `name` needs other values than the bad ones of x, and which likelihood would take them; None without any."""
    if not bool(bad.any()):
        return None
    return f"{name} needs {needs}, found {_first_bad(x, bad)}: {cure}use model.likelihood = {suited(x)}"


class Likelihood(nn.Module, ABC):
    """A map from decoder outputs (..., param_dim) to p(x|z) with event shape `event_shape`.

    Entries of x that are NaN are missing: their factors are left out.

    Attributes:
        event_shape: shape of one datum.
        width: number of entries of one datum.
        param_dim: the decoder's output width; a multiple k of `width`, laid out (k, *event_shape), unless entries differ.
        inside: a value of the support, a number or (*event_shape), that stands in for missing entries.
        takes_exposure: whether `forward` takes an exposure (N,), which multiplies the rate of counts.
    """

    event_shape: tuple[int, ...]
    param_dim: int
    inside: float | Tensor = 0.0
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
        """Say in one sentence why x, without holes, lies outside the support, and the remedy; None when it lies inside."""

    def check(self, x: Tensor) -> None:
        """Refuse data that this likelihood cannot have produced.

        Args:
            x: data, (N, *event_shape); NaN where an entry is missing.

        Raises:
            DataError: for a wrong shape, infinities, or values outside the support; names the first place.
        """
        if x.ndim == 0 or tuple(x.shape[1:]) != self.event_shape:
            raise DataError(f"data: each datum has shape {tuple(x.shape[1:])}, the model expects {self.event_shape}")
        if x.isinf().any():
            raise DataError(f"data: {_first_bad(x, x.isinf())}: remove it, or make it NaN to treat it as missing")
        missing = x.isnan()
        whole = (
            torch.where(missing, torch.as_tensor(self.inside, dtype=x.dtype, device=x.device), x) if bool(missing.any()) else x
        )
        problem = self.problem(whole)
        if problem is not None:
            raise DataError(f"data: {problem}")

    def incomplete(self, p: TorchDistribution, missing: Tensor) -> TorchDistribution:
        """Return p(x|z) of the entries that are there; `missing` (N, *event_shape) is True where one is not."""
        return Incomplete(p, missing, self.inside)

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """Shape of what an encoder sees of one datum."""
        return self.event_shape

    def features(self, x: Tensor) -> Tensor:
        """Return what an encoder sees of x (N, *event_shape): (N, *feature_shape), NaN where an entry is missing."""
        return x

    def centre(self, p: TorchDistribution) -> Tensor:
        """Return E[x|z] of p, (..., *event_shape); where x has no mean (categories, heavy tails), its mode or median."""
        return p.mean

    def adapt(self, x: Tensor) -> None:
        """Set data-dependent constants from training data (N, *event_shape), NaN where missing, before the first step."""

    def _shaped(self, params: Tensor) -> Tensor:
        return params.reshape(*params.shape[:-1], *self.event_shape)

    def _parts(self, params: Tensor) -> list[Tensor]:
        """Split (..., k * width) decoder outputs into k parts (..., *event_shape)."""
        k = self.param_dim // self.width
        return list(params.reshape(*params.shape[:-1], k, *self.event_shape).unbind(-1 - len(self.event_shape)))


class Bernoulli(Likelihood):
    """Independent binary entries: log p(x|z) = sum_i x_i l_i - softplus(l_i), l the decoder's logits."""

    def forward(self, params: Tensor) -> TorchDistribution:
        """Return Bernoulli(logits = params)."""
        return dist.Bernoulli(logits=self._shaped(params), validate_args=False).to_event(len(self.event_shape))

    def problem(self, x: Tensor) -> str | None:
        """Only 0 and 1 are allowed."""
        bad = (x != 0) & (x != 1)
        if not bad.any():
            return None
        return (
            f"bernoulli needs 0 or 1, found {_first_bad(x, bad)}: binarize the data "
            "(data.binarize = a threshold), or use model.likelihood = continuous_bernoulli for values in [0, 1]"
        )


class Grey(dist.ContinuousBernoulli):
    """A continuous Bernoulli that is exact at any logit l: torch's own stops at those whose probability rounds to 0 or 1."""

    def _apart(self) -> tuple[Tensor, Tensor]:
        """Return where l is too small for formulas that divide by it, and l with 1 there."""
        small = self.logits.abs() < 1e-2
        return small, torch.where(small, 1.0, self.logits)

    def _cont_bern_log_norm(self) -> Tensor:
        """Return log(l / tanh(l / 2)), what the density of a Bernoulli with grey x lacks."""
        small, l = self._apart()
        square = torch.where(small, self.logits, 0.0).square()
        series = math.log(2) + square / 12 - 7 * square.square() / 1440
        return torch.where(small, series, (l / torch.tanh(l / 2)).log())

    @property
    def mean(self) -> Tensor:
        """Return 1 / (1 - e^-l) - 1 / l."""
        small, l = self._apart()
        return torch.where(small, 0.5 + self.logits / 12, 0.5 + 0.5 / torch.tanh(l / 2) - 1 / l)

    @property
    def variance(self) -> Tensor:
        """Return 1 / l^2 - 1 / (4 sinh^2(l / 2))."""
        small, l = self._apart()
        a = l.abs()
        return torch.where(small, 1 / 12 - self.logits.square() / 240, a**-2 - (-a).exp() / torch.expm1(-a).square())

    def icdf(self, u: Tensor) -> Tensor:
        """Return log(1 + u (e^l - 1)) / l."""
        small, l = self._apart()
        a = l.abs()
        v = torch.where(l > 0, u, 1 - u)
        x = (1 + (v + (1 - v) * (-a).exp()).log() / a).clamp(0.0, 1.0)
        return torch.where(small, u, torch.where(l > 0, x, 1 - x))


class ContinuousBernoulli(Likelihood):
    """Independent entries in [0, 1] (grey pixels), with the normalising constant that a Bernoulli on grey data lacks.

    p(x|l) = C(l) exp(x l), C(l) = l / (e^l - 1) (Loaiza-Ganem and Cunningham 2019, https://arxiv.org/abs/1907.06845).
    """

    def forward(self, params: Tensor) -> TorchDistribution:
        """Return ContinuousBernoulli(logits = params)."""
        logits = self._shaped(params)
        return Grey(logits=logits, validate_args=False).to_event(len(self.event_shape))

    def problem(self, x: Tensor) -> str | None:
        """Entries must lie in [0, 1]."""
        bad = (x < 0) | (x > 1)
        if not bad.any():
            return None
        return (
            f"continuous_bernoulli needs values in [0, 1], found {_first_bad(x, bad)}: divide the data by their largest "
            "possible value (data.scale), or use model.likelihood = gaussian"
        )


class Gaussian(Likelihood):
    """Independent normal entries, x_i ~ N(m_i(z), s_i^2).

    The decoder works in standard units: m = loc + unit * output, where loc and unit are the mean and standard deviation of
    each column of the training data. Learned scales are unit * (softplus(raw) + floor).

    Args:
        event_shape: shape of one datum (a fact).
        scale: a number (fixed, in the data's own units), `shared` (one learned scale), `per_dimension` (one learned scale
            per entry), or `decoder` (from z, by the decoder).
        floor: smallest learned scale, as a fraction of the data's standard deviation.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        *,
        scale: Annotated[float, Gt(0)] | Literal["shared", "per_dimension", "decoder"] = "shared",
        floor: Annotated[float, Gt(0)] = 1e-3,
    ) -> None:
        super().__init__(event_shape)
        self.scale = scale
        self.floor = floor
        self.param_dim = self.width * (2 if scale == "decoder" else 1)
        self.loc: Tensor
        self.unit: Tensor
        self.register_buffer("loc", torch.zeros(self.event_shape))
        self.register_buffer("unit", torch.ones(self.event_shape))
        if scale == "shared":
            self.raw_scale = nn.Parameter(torch.zeros(()))
        elif scale == "per_dimension":
            self.raw_scale = nn.Parameter(torch.zeros(self.event_shape))

    def adapt(self, x: Tensor) -> None:
        """Take the location and unit of each column from training data; a constant column takes the overall unit."""
        if len(x) < 2:
            return
        loc, unit = standard_units(x)
        self.loc, self.unit = loc.to(x.dtype), unit.to(x.dtype)

    def noise_scale(self, raw: Tensor | None = None) -> Tensor:
        """Return s in the data's units, broadcastable to the event shape; `raw` is the decoder's half if it gives s."""
        if isinstance(self.scale, int | float):
            return torch.full_like(self.loc, float(self.scale))
        if self.scale == "shared":
            largest = self.unit.max()  # the square of 1e30 is no float32
            return largest * (self.unit / largest).square().mean().sqrt() * (softplus(self.raw_scale) + self.floor)
        return self.unit * (softplus(self.raw_scale if raw is None else raw) + self.floor)

    def forward(self, params: Tensor) -> TorchDistribution:
        """Return N(loc + unit * output, s^2)."""
        if self.scale == "decoder":
            output, raw = params.chunk(2, -1)
            noise = self.noise_scale(self._shaped(raw))
        else:
            output, noise = params, self.noise_scale()
        mean = self.loc + self.unit * self._shaped(output)
        return dist.Normal(mean, noise, validate_args=False).to_event(len(self.event_shape))

    def problem(self, x: Tensor) -> str | None:
        """Every real number is allowed."""
        return None
