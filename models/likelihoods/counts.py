"""Likelihoods of counts. Their mean is exposure * exp(log mean of the training data + output).

An exposure e_n multiplies the mean of all counts of datum n: the depth of a sequencing run, the time under observation
(McCullagh and Nelder 1989, ch. 6, https://doi.org/10.1007/978-1-4899-3242-6). The output is bounded (`scales.bounded`), so that
no outlier z overflows.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, ClassVar

import pyro.distributions as dist
import torch
from annotated_types import Ge, Gt
from pyro.distributions import TorchDistribution
from torch import Tensor

from elbowroom.models.likelihoods.base import Likelihood, refusal
from elbowroom.models.likelihoods.scales import Free, Positive, Source, bounded, moments


class Counts(Likelihood):
    """Entries 0, 1, 2, ... with `outputs` decoder outputs each: a rate, and in some subclasses a dispersion and a gate."""

    takes_exposure: ClassVar[bool] = True
    name: ClassVar[str]

    def __init__(self, event_shape: tuple[int, ...], outputs: int) -> None:
        super().__init__(event_shape)
        self.param_dim = self.width * outputs
        self.log_mean: Tensor
        self.register_buffer("log_mean", torch.zeros(self.event_shape))

    @abstractmethod
    def forward(self, params: Tensor, exposure: Tensor | None = None) -> TorchDistribution:
        """Return p(x|z) for decoder outputs (..., param_dim) and exposure (N,)."""

    def log_rate(self, output: Tensor, exposure: Tensor | None) -> Tensor:
        """Return the logarithm of the rate, (..., *event_shape), for outputs of that shape and exposure (N,)."""
        log_rate = self.log_mean + bounded(output)
        return log_rate if exposure is None else log_rate + exposure.log().reshape(-1, *[1] * len(self.event_shape))

    def adapt(self, x: Tensor, exposure: Tensor | None = None) -> None:
        """Set the mean of each column per unit of exposure; a column without counts counts as half a count."""
        e = torch.ones_like(x) if exposure is None else exposure.reshape(-1, *[1] * (x.dim() - 1)).expand_as(x)
        wide, e = x.double(), torch.where(x.isnan(), torch.nan, e.double())
        base = e.nansum(0)
        mean = torch.where(base > 0, wide.nansum(0).clamp_min(0.5) / base.clamp_min(1e-30), 1.0)
        self.marginal(wide, e, mean)

    def marginal(self, x: Tensor, e: Tensor, mean: Tensor) -> None:
        """Set the constants from x and exposure (N, *event_shape), NaN where missing, and the mean per unit of exposure."""
        self.log_mean = mean.log().to(self.log_mean)

    def problem(self, x: Tensor) -> str | None:
        """Refuse entries other than whole numbers >= 0."""
        return refusal(self.name, "whole numbers >= 0", x, (x < 0) | (x != x.round()))

    def features(self, x: Tensor) -> Tensor:
        """Return log(1 + x)."""
        return x.log1p()


def _dispersion(x: Tensor, e: Tensor) -> Tensor:
    """Return (variance - mean E[1/e]) / mean^2 of the rates x / e, clipped to 0.01 .. 100; 0.1 if data are too few."""
    n, mean, variance = moments(x / e)
    excess = (variance - mean * e.reciprocal().nanmean(0)) / mean.square().clamp_min(1e-30)
    return torch.where((n > 1) & (mean > 0), excess.clamp(0.01, 100.0), 0.1)


class Poisson(Counts):
    """Independent counts with variance equal to the mean: p(x|z) = r^x e^(-r) / x!, x = 0, 1, 2, ...

    r = exposure * exp(log mean + output) (Poisson 1837; for VAEs, Gronbech et al. 2020,
    https://doi.org/10.1093/bioinformatics/btaa293).
    """

    name = "poisson"

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__(event_shape, 1)

    def forward(self, params: Tensor, exposure: Tensor | None = None) -> TorchDistribution:
        """Return Poisson(r)."""
        rate = self.log_rate(self._shaped(params), exposure).exp()
        return dist.Poisson(rate, validate_args=False).to_event(len(self.event_shape))


class NegativeBinomial(Counts):
    """Independent counts that vary more than their mean: a Poisson with a gamma distributed rate, x = 0, 1, 2, ...

    p(x|z) = Gamma(x + 1/a) / (Gamma(1/a) x!) (1 + a r)^(-1/a) (a r / (1 + a r))^x, mean r, variance r + a r^2, with
    r = exposure * exp(log mean + output) and the dispersion a (Lopez et al. 2018,
    https://doi.org/10.1038/s41592-018-0229-2).

    Args:
        event_shape: shape of one datum (a fact).
        dispersion: `shared` (one learned a), `per_dimension` (one per entry), or `decoder` (from z, by the decoder).
        floor: smallest dispersion, as a fraction of that of the data.
    """

    name = "negative_binomial"

    def __init__(
        self, event_shape: tuple[int, ...], *, dispersion: Source = "per_dimension", floor: Annotated[float, Gt(0)] = 1e-3
    ) -> None:
        super().__init__(event_shape, 1 + (dispersion == "decoder"))
        self.dispersion = Positive(self.event_shape, dispersion, floor)

    def marginal(self, x: Tensor, e: Tensor, mean: Tensor) -> None:
        """Set log mean and dispersion."""
        self.log_mean = mean.log().to(self.log_mean)
        self.dispersion.adapt(_dispersion(x, e))

    def forward(self, params: Tensor, exposure: Tensor | None = None) -> TorchDistribution:
        """Return NegativeBinomial(1 / a, logits = log(a r))."""
        parts = self._parts(params)
        a = self.dispersion(parts)
        logits = self.log_rate(parts[0], exposure) + a.log()
        return dist.NegativeBinomial(a.reciprocal(), logits=logits, validate_args=False).to_event(len(self.event_shape))


def _excess_zeros(x: Tensor, explained: Tensor) -> Tensor:
    """Return the share of zeros, (*event), beyond those with the given probabilities (N, *event), clipped to 0.02 .. 0.98."""
    n = (~x.isnan()).sum(0).clamp_min(1)
    zero = explained.nansum(0) / n
    return (((x == 0).sum(0) / n - zero) / (1 - zero).clamp_min(1e-12)).clamp(0.02, 0.98)


class ZeroInflatedPoisson(Counts):
    """Counts with more zeros than a Poisson: p(x|z) = g [x = 0] + (1 - g) Poisson(x; r), x = 0, 1, 2, ...

    r = exposure * exp(log mean + output), logit g = that of the excess zeros of the training data + output (Lambert 1992,
    https://doi.org/10.2307/1269547). An exposure multiplies r, hence the mean (1 - g) r.

    Args:
        event_shape: shape of one datum (a fact).
        gate: where g comes from: `shared` (one learned number), `per_dimension` (one per entry), or `decoder` (from z).
    """

    name = "zero_inflated_poisson"

    def __init__(self, event_shape: tuple[int, ...], *, gate: Source = "decoder") -> None:
        super().__init__(event_shape, 1 + (gate == "decoder"))
        self.gate = Free(self.event_shape, gate)
        self.gate_logit: Tensor
        self.register_buffer("gate_logit", torch.zeros(self.event_shape))

    def marginal(self, x: Tensor, e: Tensor, mean: Tensor) -> None:
        """Set log mean and gate."""
        gate = _excess_zeros(x, (-mean * e).exp())
        self.log_mean, self.gate_logit = (mean / (1 - gate)).log().to(self.log_mean), gate.logit().to(self.gate_logit)

    def forward(self, params: Tensor, exposure: Tensor | None = None) -> TorchDistribution:
        """Return ZeroInflatedPoisson(r, g)."""
        parts = self._parts(params)
        gate = self.gate_logit + self.gate(parts)
        rate = self.log_rate(parts[0], exposure).exp()
        p = dist.ZeroInflatedPoisson(rate, gate_logits=gate, validate_args=False)
        return p.to_event(len(self.event_shape))


class ZeroInflatedNegativeBinomial(Counts):
    """Overdispersed counts with further zeros: p(x|z) = g [x = 0] + (1 - g) NegativeBinomial(x; r, a), x = 0, 1, 2, ...

    Mean r and dispersion a as in `negative_binomial`, gate g as in `zero_inflated_poisson` (Lopez et al. 2018,
    https://doi.org/10.1038/s41592-018-0229-2).

    Args:
        event_shape: shape of one datum (a fact).
        dispersion: `shared` (one learned a), `per_dimension` (one per entry), or `decoder` (from z, by the decoder).
        gate: where g comes from, one of the same.
        floor: smallest dispersion, as a fraction of that of the data.
    """

    name = "zero_inflated_negative_binomial"

    def __init__(
        self,
        event_shape: tuple[int, ...],
        *,
        dispersion: Source = "per_dimension",
        gate: Source = "decoder",
        floor: Annotated[float, Gt(0)] = 1e-3,
    ) -> None:
        super().__init__(event_shape, 1 + (dispersion == "decoder") + (gate == "decoder"))
        self.dispersion = Positive(self.event_shape, dispersion, floor)
        self.gate = Free(self.event_shape, gate)
        self.gate_logit: Tensor
        self.register_buffer("gate_logit", torch.zeros(self.event_shape))

    def marginal(self, x: Tensor, e: Tensor, mean: Tensor) -> None:
        """Set log mean, dispersion (that of all counts, an upper bound of that without additional zeros) and gate."""
        a = _dispersion(x, e)
        gate = _excess_zeros(x, (-torch.log1p(a * mean * e) / a).exp())
        self.log_mean, self.gate_logit = (mean / (1 - gate)).log().to(self.log_mean), gate.logit().to(self.gate_logit)
        self.dispersion.adapt(a)

    def forward(self, params: Tensor, exposure: Tensor | None = None) -> TorchDistribution:
        """Return ZeroInflatedNegativeBinomial(1 / a, logits = log(a r), g)."""
        parts = self._parts(params)
        a = self.dispersion(parts)
        gate = self.gate_logit + self.gate(parts)
        logits = self.log_rate(parts[0], exposure) + a.log()
        p = dist.ZeroInflatedNegativeBinomial(a.reciprocal(), logits=logits, gate_logits=gate, validate_args=False)
        return p.to_event(len(self.event_shape))


class Binomial(Likelihood):
    """Independent counts of successes out of n: p(x|z) = C(n, x) q^x (1 - q)^(n - x), x = 0, ..., n.

    logit q = that of the training data's mean + output (McCullagh and Nelder 1989, ch. 4,
    https://doi.org/10.1007/978-1-4899-3242-6).

    Args:
        event_shape: shape of one datum (a fact).
        levels: 1 + the largest whole number in the data (a fact).
        total_count: n; null takes the largest number in the data.
    """

    name: ClassVar[str] = "binomial"

    def __init__(
        self, event_shape: tuple[int, ...], levels: int | None, *, total_count: Annotated[int, Ge(1)] | None = None
    ) -> None:
        super().__init__(event_shape)
        if total_count is None and levels is None:
            raise ValueError("total_count: the data are not whole numbers >= 0 that would tell it; give the number of trials")
        self.total_count = total_count or max(1, (levels or 0) - 1)
        self.logit: Tensor
        self.register_buffer("logit", torch.zeros(self.event_shape))

    def adapt(self, x: Tensor) -> None:
        """Set the share of successes of each column; half a success and half a failure are added."""
        n, mean, _ = moments(x)
        share = (n * mean + 0.5) / (n * self.total_count + 1)
        self.logit = share.clamp(1e-12, 1 - 1e-12).logit().to(self.logit)

    def forward(self, params: Tensor) -> TorchDistribution:
        """Return Binomial(n, logits)."""
        logits = self.logit + self._shaped(params)
        n = torch.full((), float(self.total_count), dtype=logits.dtype, device=logits.device)
        return dist.Binomial(n, logits=logits, validate_args=False).to_event(len(self.event_shape))

    def problem(self, x: Tensor) -> str | None:
        """Refuse entries other than whole numbers from 0 to n."""
        bad = (x < 0) | (x != x.round()) | (x > self.total_count)
        return refusal(
            self.name, f"whole numbers from 0 to total_count = {self.total_count}", x, bad, more(x, "total_count", 0)
        )


class BetaBinomial(Binomial):
    """Independent counts out of n that vary more than a binomial: its probability is beta distributed, x = 0, ..., n.

    p(x|z) = C(n, x) B(x + m k, n - x + (1 - m) k) / B(m k, (1 - m) k), mean n m, variance n m (1 - m) (n + k) / (1 + k).
    logit m = that of the training data's mean + output, k = k0 / spread with k0 by the variance of the training data
    (Skellam 1948, https://doi.org/10.1111/j.2517-6161.1948.tb00014.x).

    Args:
        event_shape: shape of one datum (a fact).
        levels: 1 + the largest whole number in the data (a fact).
        total_count: n; null takes the largest number in the data.
        concentration: `shared` (one learned k), `per_dimension` (one per entry), or `decoder` (from z, by the decoder).
        floor: smallest 1 / k, as a fraction of that of the data.
    """

    name: ClassVar[str] = "beta_binomial"

    def __init__(
        self,
        event_shape: tuple[int, ...],
        levels: int | None,
        *,
        total_count: Annotated[int, Ge(1)] | None = None,
        concentration: Source = "per_dimension",
        floor: Annotated[float, Gt(0)] = 1e-3,
    ) -> None:
        super().__init__(event_shape, levels, total_count=total_count)
        self.variation = Positive(self.event_shape, concentration, floor)
        self.variation.adapt(torch.full(self.event_shape, 0.1))
        self.param_dim = self.width * (1 + self.variation.outputs)

    def adapt(self, x: Tensor) -> None:
        """Set share and concentration of each column; the variance tells 1 / (1 + k), clipped to 0.001 .. 0.9."""
        super().adapt(x)
        n, mean, variance = moments(x)
        trials, share = self.total_count, mean / self.total_count
        ratio = variance / (trials * share * (1 - share)).clamp_min(1e-12)
        rho = ((ratio - 1) / max(trials - 1, 1)).clamp(1e-3, 0.9)
        told = (n > 1) & (share > 0) & (share < 1) & (trials > 1)
        self.variation.adapt(torch.where(told, rho / (1 - rho), 0.1))

    def forward(self, params: Tensor) -> TorchDistribution:
        """Return BetaBinomial(m k, (1 - m) k, n)."""
        parts = self._parts(params)
        k = self.variation(parts).reciprocal()
        logit = bounded(self.logit + parts[0])
        n = torch.full((), float(self.total_count), dtype=logit.dtype, device=logit.device)
        a, b = torch.sigmoid(logit) * k, torch.sigmoid(-logit) * k
        return dist.BetaBinomial(a, b, n, validate_args=False).to_event(len(self.event_shape))


def more(x: Tensor, option: str, above: int) -> str:
    """Suggest a value of an option that would accept the whole numbers x; "" if no value would."""
    whole = bool(((x >= 0) & (x == x.round())).all())
    return f"set model.likelihood.{option} = {int(x.max()) + above}, or " if whole else ""
