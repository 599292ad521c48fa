"""Likelihoods of continuous entries: normal, heavy tails, positive numbers, proportions.

Decoders work in the data's own scale: if the decoder's output is 0, each column has the location and spread of its training
data. Exponentials of the output use `scales.bounded`, so that no outlier z overflows.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pyro.distributions as dist
import torch
from annotated_types import Gt
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import softplus

from elbowroom.models.likelihoods.base import Likelihood, refusal
from elbowroom.models.likelihoods.scales import UNIT, Positive, Source, bounded, moments, standard_units


class LocationScale(Likelihood):
    """Entries with a location m = loc + unit * output and a scale s; `floor` bounds s below, in units of the data's spread."""

    def __init__(
        self, event_shape: tuple[int, ...], *, scale: Source = "per_dimension", floor: Annotated[float, Gt(0)] = 1e-3
    ) -> None:
        super().__init__(event_shape)
        self.noise = Positive(self.event_shape, scale, floor)
        self.param_dim = self.width * (1 + self.noise.outputs)
        self.loc: Tensor
        self.unit: Tensor
        self.register_buffer("loc", torch.zeros(self.event_shape))
        self.register_buffer("unit", torch.ones(self.event_shape))

    def location_scale(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return m and s of decoder outputs (..., param_dim), broadcastable to (..., *event_shape)."""
        parts = self._parts(params)
        s = self.noise(parts)
        return self.loc + self.unit * parts[0], s

    def set_units(self, loc: Tensor, unit: Tensor) -> None:
        """Set the location of each entry and the unit of its location and scale."""
        self.loc, self.unit = loc.to(self.loc), unit.to(self.unit)
        self.noise.adapt(unit)

    def problem(self, x: Tensor) -> str | None:
        """Accept every real number."""
        return None


def _about_the_median(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return median, standard deviation (see `standard_units`) and absolute deviations of the columns of x with NaN."""
    loc, unit = standard_units(x)
    middle = x.double().nanmedian(0).values
    middle = torch.where(middle.isnan(), loc, middle)
    return middle, unit, (x.double() - middle).abs()


class Laplace(LocationScale):
    """Independent entries with exponential tails: p(x|z) = exp(-|x - m| / s) / (2 s), x real.

    m = loc + unit * output; loc and unit are the median and the mean absolute deviation from it in the training data
    (Laplace 1774; https://en.wikipedia.org/wiki/Laplace_distribution).

    Args:
        event_shape: shape of one datum (a fact).
        scale: `shared` (one learned scale), `per_dimension` (one per entry), or `decoder` (from z, by the decoder).
        floor: smallest scale, as a fraction of the data's mean absolute deviation.
    """

    def adapt(self, x: Tensor) -> None:
        """Set median and mean absolute deviation of each column."""
        middle, unit, off = _about_the_median(x)
        mean_off = off.nanmean(0).nan_to_num(0.0)
        self.set_units(middle, torch.where(mean_off > 1e-3 * unit, mean_off, unit))

    def forward(self, params: Tensor) -> TorchDistribution:
        """Return Laplace(m, s)."""
        m, s = self.location_scale(params)
        return dist.Laplace(m, s, validate_args=False).to_event(len(self.event_shape))


class StudentT(LocationScale):
    """Independent entries with the tails of a power law: Student's t with v degrees of freedom, x real.

    p(x|z) = C (1 + t^2 / v)^(-(v + 1) / 2) / s with t = (x - m) / s, C = Gamma((v + 1) / 2) / (Gamma(v / 2) sqrt(pi v)).
    m = loc + unit * output; loc and unit are the median of the training data and 1.48 times the median distance from it,
    which outliers do not move (Lange, Little and Taylor 1989, https://doi.org/10.1080/01621459.1989.10478852).

    Args:
        event_shape: shape of one datum (a fact).
        scale: `shared` (one learned scale), `per_dimension` (one per entry), or `decoder` (from z, by the decoder).
        df: the degrees of freedom, a number > 2, or `learned` (one per entry, > 2, from 5 on).
        floor: smallest scale, as a fraction of the data's spread.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        *,
        scale: Source = "per_dimension",
        df: Annotated[float, Gt(2)] | Literal["learned"] = 4.0,
        floor: Annotated[float, Gt(0)] = 1e-3,
    ) -> None:
        super().__init__(event_shape, scale=scale, floor=floor)
        self.df = df
        if df == "learned":
            self.raw_df = nn.Parameter(torch.zeros(self.event_shape))

    def adapt(self, x: Tensor) -> None:
        """Set the median of each column and the median distance from it."""
        middle, unit, off = _about_the_median(x)
        near = off.nanmedian(0).values.nan_to_num(0.0) / 0.6745
        self.set_units(middle, torch.where(near > 1e-3 * unit, near, unit))

    def forward(self, params: Tensor) -> TorchDistribution:
        """Return StudentT(v, m, s)."""
        m, s = self.location_scale(params)
        v = torch.full_like(self.loc, float(self.df)) if self.df != "learned" else 2.01 + 2.99 * softplus(self.raw_df + UNIT)
        return dist.StudentT(v, m, s, validate_args=False).to_event(len(self.event_shape))


class LogNormal(LocationScale):
    """Independent positive entries with a normal logarithm: log x ~ N(m, s^2), x > 0.

    m = loc + unit * output in log x; loc and unit are mean and standard deviation of log x in the training data
    (Limpert, Stahel and Abbt 2001, https://doi.org/10.1641/0006-3568(2001)051[0341:LNDATS]2.0.CO;2).

    Args:
        event_shape: shape of one datum (a fact).
        scale: `shared` (one learned scale of log x), `per_dimension` (one per entry), or `decoder` (from z, by the decoder).
        floor: smallest scale, as a fraction of the standard deviation of log x.
    """

    inside = 1.0

    def adapt(self, x: Tensor) -> None:
        """Set mean and standard deviation of the logarithm of each column."""
        self.set_units(*standard_units(x.double().log().to(x.dtype)))

    def forward(self, params: Tensor) -> TorchDistribution:
        """Return LogNormal(m, s)."""
        parts = self._parts(params)
        s = self.noise(parts)
        m = self.loc + self.unit * bounded(parts[0])
        return dist.LogNormal(m, s, validate_args=False).to_event(len(self.event_shape))

    def problem(self, x: Tensor) -> str | None:
        """Refuse entries that are not positive."""
        return refusal("log_normal", "values > 0", x, x <= 0)

    def features(self, x: Tensor) -> Tensor:
        """Return log x."""
        return x.log()


class Gamma(Likelihood):
    """Independent positive entries with a constant coefficient of variation: gamma with mean m and shape a, x > 0.

    p(x|z) = (a / m)^a x^(a - 1) exp(-a x / m) / Gamma(a), variance m^2 / a. m = mean * exp(output), a = a0 / spread, with mean
    and a0 = mean^2 / variance of the training data (McCullagh and Nelder 1989, ch. 8,
    https://doi.org/10.1007/978-1-4899-3242-6).

    Args:
        event_shape: shape of one datum (a fact).
        shape: `shared` (one learned shape), `per_dimension` (one per entry), or `decoder` (from z, by the decoder).
        floor: smallest squared coefficient of variation 1 / a, as a fraction of that of the data.
    """

    inside = 1.0

    def __init__(
        self, event_shape: tuple[int, ...], *, shape: Source = "per_dimension", floor: Annotated[float, Gt(0)] = 1e-3
    ) -> None:
        super().__init__(event_shape)
        self.variation = Positive(self.event_shape, shape, floor)
        self.param_dim = self.width * (1 + self.variation.outputs)
        self.log_mean: Tensor
        self.register_buffer("log_mean", torch.zeros(self.event_shape))

    def adapt(self, x: Tensor) -> None:
        """Set mean and coefficient of variation of each column; a constant column gets a coefficient of 0.1."""
        n, mean, variance = moments(x)
        mean = torch.where(mean > 0, mean, 1.0)
        self.log_mean = mean.log().to(self.log_mean)
        ratio = (variance.sqrt() / mean).square()
        self.variation.adapt(torch.where((n > 1) & (ratio > 1e-10), ratio, 0.01))

    def forward(self, params: Tensor) -> TorchDistribution:
        """Return Gamma(a, a / m)."""
        parts = self._parts(params)
        a = self.variation(parts).reciprocal()
        m = (self.log_mean + bounded(parts[0])).exp()
        return dist.Gamma(a, a / m, validate_args=False).to_event(len(self.event_shape))

    def problem(self, x: Tensor) -> str | None:
        """Refuse entries that are not positive."""
        return refusal("gamma", "values > 0", x, x <= 0)

    def features(self, x: Tensor) -> Tensor:
        """Return log x."""
        return x.log()


class OpenBeta(dist.Beta):
    """A beta distribution with draws that never round to 0 or 1, not even in single precision."""

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw x in the open interval."""
        x = super().rsample(torch.Size(sample_shape))
        edge = torch.finfo(torch.float32)
        return x.clamp(edge.tiny, 1 - edge.eps)


class Beta(Likelihood):
    """Independent proportions: beta with mean m and concentration k, 0 < x < 1.

    p(x|z) = x^(m k - 1) (1 - x)^((1 - m) k - 1) / B(m k, (1 - m) k), variance m (1 - m) / (1 + k). logit m = logit mean +
    output, k = k0 / spread, with mean and k0 = mean (1 - mean) / variance - 1 of the training data (Ferrari and Cribari-Neto
    2004, https://doi.org/10.1080/0266476042000214501).

    Args:
        event_shape: shape of one datum (a fact).
        concentration: `shared` (one learned k), `per_dimension` (one per entry), or `decoder` (from z, by the decoder).
        floor: smallest 1 / k, as a fraction of that of the data.
    """

    inside = 0.5

    def __init__(
        self, event_shape: tuple[int, ...], *, concentration: Source = "per_dimension", floor: Annotated[float, Gt(0)] = 1e-3
    ) -> None:
        super().__init__(event_shape)
        self.variation = Positive(self.event_shape, concentration, floor)
        self.variation.adapt(torch.full(self.event_shape, 0.1))  # k = 10 until data are given, not a flat density
        self.param_dim = self.width * (1 + self.variation.outputs)
        self.logit_mean: Tensor
        self.register_buffer("logit_mean", torch.zeros(self.event_shape))

    def adapt(self, x: Tensor) -> None:
        """Set mean and concentration of each column; a constant column gets k = 100."""
        n, mean, variance = moments(x)
        mean = torch.where(n > 0, mean, 0.5).clamp(1e-12, 1 - 1e-12)
        self.logit_mean = mean.logit().to(self.logit_mean)
        ratio = variance / (mean * (1 - mean))  # 1 / (1 + k)
        k = (1 / ratio.clamp_min(1e-12) - 1).clamp(0.1, 1e6)
        self.variation.adapt(torch.where((n > 1) & (ratio > 1e-10), k, 100.0).reciprocal())

    def forward(self, params: Tensor) -> TorchDistribution:
        """Return Beta(m k, (1 - m) k)."""
        return OpenBeta(*self.inner(self._parts(params)), validate_args=False).to_event(len(self.event_shape))

    def inner(self, parts: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return m k and (1 - m) k, (..., *event) each."""
        k = self.variation(parts).reciprocal()
        logit = bounded(self.logit_mean + parts[0])
        return torch.sigmoid(logit) * k, torch.sigmoid(-logit) * k

    def problem(self, x: Tensor) -> str | None:
        """Refuse entries that do not lie strictly between 0 and 1."""
        return refusal("beta", "values strictly between 0 and 1", x, (x <= 0) | (x >= 1))


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
        """Set the location and unit of each column from training data; a constant column gets the overall unit."""
        if len(x) < 2:
            return
        loc, unit = standard_units(x)
        self.loc, self.unit = loc.to(x.dtype), unit.to(x.dtype)

    def noise_scale(self, raw: Tensor | None = None) -> Tensor:
        """Return s in the data's units, broadcastable to the event shape; `raw` is the decoder's output for s, if any."""
        if isinstance(self.scale, int | float):
            return torch.full_like(self.loc, float(self.scale))
        if self.scale == "shared":
            largest = self.unit.max()  # the square of 1e30 overflows in float32
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
        """Accept every real number."""
        return None
