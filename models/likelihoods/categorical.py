"""Entries with finitely many values: categories, ordered categories, quantised numbers."""

from __future__ import annotations

from typing import Annotated, Any

import pyro.distributions as dist
import torch
from annotated_types import Ge, Gt
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from elbowroom.models.likelihoods.base import Likelihood, refusal
from elbowroom.models.likelihoods.continuous import LocationScale
from elbowroom.models.likelihoods.counts import more
from elbowroom.models.likelihoods.scales import UNIT, Source, standard_units


def not_a_code(x: Tensor, levels: int) -> Tensor:
    """Return True where x is none of 0, 1, ..., levels - 1."""
    return (x < 0) | (x >= levels) | (x != x.round())


def number_of_levels(option: str, chosen: int | None, levels: int | None, least: int = 2) -> int:
    """Return the number of levels that the user chose, or that of the data.

    Raises:
        ValueError: neither is known.
    """
    if chosen is None and levels is None:
        raise ValueError(f"{option}: the data are not whole numbers 0, 1, ... that would tell it; give the number")
    return max(least, levels or 0) if chosen is None else chosen


def frequencies(x: Tensor, levels: int) -> Tensor:
    """Return the share of each code among the observed entries, (levels, *event), with half a count added to each."""
    counts = torch.stack([(x == k).sum(0) for k in range(levels)]).double() + 0.5
    return counts / counts.sum(0)


class Codes(dist.Categorical):
    """A categorical distribution over the codes 0, 1, ..., K - 1 as floating-point numbers."""

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw codes."""
        return super().sample(torch.Size(sample_shape)).to(self.logits.dtype)

    def _power(self, n: int) -> Tensor:
        codes = torch.arange(self.logits.shape[-1], dtype=self.logits.dtype, device=self.logits.device)
        return (self.probs * codes**n).sum(-1)

    @property
    def mean(self) -> Tensor:
        """Mean code."""
        return self._power(1)

    @property
    def variance(self) -> Tensor:
        """Variance of the code."""
        return self._power(2) - self._power(1).square()


class Categorical(Likelihood):
    """Independent unordered categories: p(x = k|z) = exp(l_k) / sum_j exp(l_j), x one of the codes 0, ..., K - 1.

    l = log frequency in the training data + output, K outputs per entry (Nazabal et al. 2020,
    https://arxiv.org/abs/1807.03653). An encoder sees one-hot codes: those of a vector (D,) side by side,
    (D * K,); those of an image as channels, (K, H, W) or (C * K, H, W); those of a sequence (T, 1) step by step, (T, K).

    Args:
        event_shape: shape of one datum (a fact).
        levels: 1 + the largest whole number in the data (a fact).
        categories: K; null takes 1 + the largest code in the data.
    """

    def __init__(
        self, event_shape: tuple[int, ...], levels: int | None, *, categories: Annotated[int, Ge(2)] | None = None
    ) -> None:
        super().__init__(event_shape)
        self.categories = number_of_levels("categories", categories, levels)
        self.param_dim = self.width * self.categories
        self.log_frequency: Tensor
        self.register_buffer("log_frequency", torch.zeros(self.categories, *self.event_shape))

    def adapt(self, x: Tensor) -> None:
        """Store the frequencies of the codes of each column."""
        self.log_frequency = frequencies(x, self.categories).log().to(self.log_frequency)

    def forward(self, params: Tensor) -> TorchDistribution:
        """Return Categorical(logits = l)."""
        n = len(self.event_shape)
        l = self.log_frequency + params.reshape(*params.shape[:-1], self.categories, *self.event_shape)
        return Codes(logits=l.movedim(-1 - n, -1), validate_args=False).to_event(n)

    def problem(self, x: Tensor) -> str | None:
        """Refuse entries that are not codes."""
        bad = not_a_code(x, self.categories)
        return refusal("categorical", f"codes from 0 to {self.categories - 1}", x, bad, more(x, "categories", 1))

    def centre(self, p: TorchDistribution) -> Tensor:
        """Return the most likely code."""
        return p.base_dist.logits.argmax(-1).to(p.base_dist.logits.dtype) if self.event_shape else p.logits.argmax(-1)

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """Shape of the one-hot codes."""
        if len(self.event_shape) == 2:
            steps, width = self.event_shape
            return (steps, self.categories) if width == 1 else (self.categories, steps, width)
        return (self.event_shape[0] * self.categories, *self.event_shape[1:]) if self.event_shape else (self.categories,)

    def features(self, x: Tensor) -> Tensor:
        """Return one-hot codes, NaN where an entry is missing."""
        one_hot = torch.stack([x == k for k in range(self.categories)], 1).to(x.dtype)
        one_hot = torch.where(x.isnan()[:, None], torch.nan, one_hot)
        steps = len(self.event_shape) == 2 and self.event_shape[1] == 1
        return (one_hot.movedim(1, -1) if steps else one_hot).reshape(len(x), *self.feature_shape)


class Ordinal(Likelihood):
    """Independent ordered categories by cutpoints: p(x <= k|z) = sigmoid(c_k - output), x one of the codes 0, ..., K - 1.

    The cutpoints c_0 < ... < c_(K-2) of each entry are learned: the first is free, the gaps between them are positive. They
    start where the training data put them (McCullagh 1980, https://doi.org/10.1111/j.2517-6161.1980.tb01109.x).

    Args:
        event_shape: shape of one datum (a fact).
        levels: 1 + the largest whole number in the data (a fact).
        categories: K; null takes 1 + the largest code in the data.
    """

    def __init__(
        self, event_shape: tuple[int, ...], levels: int | None, *, categories: Annotated[int, Ge(2)] | None = None
    ) -> None:
        super().__init__(event_shape)
        self.categories = number_of_levels("categories", categories, levels)
        self.raw_first = nn.Parameter(torch.zeros(*self.event_shape, 1))
        self.raw_gaps = nn.Parameter(torch.zeros(*self.event_shape, self.categories - 2))
        self.first: Tensor
        self.gaps: Tensor
        self.register_buffer("first", torch.zeros(*self.event_shape, 1))
        self.register_buffer("gaps", torch.ones(*self.event_shape, self.categories - 2))

    def adapt(self, x: Tensor) -> None:
        """Set the cutpoints to those that give the frequencies of each column at output 0."""
        below = frequencies(x, self.categories).cumsum(0)[:-1].clamp(1e-9, 1 - 1e-9).logit().movedim(0, -1)
        self.first = below[..., :1].to(self.first)
        self.gaps = below.diff(dim=-1).clamp_min(1e-3).to(self.gaps)

    def cutpoints(self) -> Tensor:
        """Return c, (*event_shape, K - 1), increasing."""
        first = self.first + self.raw_first
        return torch.cat([first, first + (self.gaps * (softplus(self.raw_gaps + UNIT) + 1e-3)).cumsum(-1)], -1)

    def forward(self, params: Tensor) -> TorchDistribution:
        """Return the categorical distribution with p(k) = sigmoid(b) - sigmoid(a), where a and b are the cutpoints around k.

        log p(k) = log sigmoid(b) + log sigmoid(-a) + log(1 - exp(a - b)), which neither cancels nor underflows.
        """
        c = self.cutpoints()
        t = c - self._shaped(params)[..., None]
        zero = torch.zeros_like(t[..., :1])
        gap = (-torch.expm1(c[..., :-1] - c[..., 1:])).log().expand(*t.shape[:-1], -1)
        log_p = torch.cat([logsigmoid(t), zero], -1) + torch.cat([zero, logsigmoid(-t)], -1)
        log_p = log_p + torch.cat([zero, gap, zero], -1)
        return Codes(logits=log_p, validate_args=False).to_event(len(self.event_shape))

    def problem(self, x: Tensor) -> str | None:
        """Refuse entries that are not codes."""
        bad = not_a_code(x, self.categories)
        return refusal("ordinal", f"codes from 0 to {self.categories - 1}", x, bad, more(x, "categories", 1))

    def centre(self, p: TorchDistribution) -> Tensor:
        """Return the median code."""
        probs = (p.base_dist if self.event_shape else p).probs
        return (probs.cumsum(-1)[..., :-1] < 0.5).sum(-1).to(probs.dtype)


class Quantised(TorchDistribution):
    """A logistic distribution (loc m, scale s) rounded to 0, 1, ..., levels - 1; the outermost two values get its tails."""

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}

    def __init__(self, loc: Tensor, scale: Tensor, levels: int) -> None:
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        self.levels = levels
        super().__init__(self.loc.shape, validate_args=False)

    @property
    def support(self) -> Any:
        """Whole numbers from 0 to levels - 1."""
        return constraints.integer_interval(0, self.levels - 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Quantised:
        """Return the distribution with another batch shape."""
        return Quantised(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.levels)

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log(sigmoid(b) - sigmoid(a)) = log sigmoid(b) + log sigmoid(-a) + log(1 - exp(a - b)), edges open."""
        below = torch.where(x > 0, logsigmoid((self.loc - x + 0.5) / self.scale), 0.0)
        above = torch.where(x < self.levels - 1, logsigmoid((x + 0.5 - self.loc) / self.scale), 0.0)
        gap = (-torch.expm1(-self.scale.reciprocal())).log()
        return below + above + torch.where((x > 0) & (x < self.levels - 1), gap, 0.0)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw by the inverse of the logistic distribution function."""
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            u = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device)
            tiny = torch.finfo(u.dtype).tiny
            logistic = u.clamp_min(tiny).log() - (-u).log1p().clamp_min(-1e4)
            return (self.loc + self.scale * logistic).round().clamp(0, self.levels - 1)

    def _tails(self, power: int) -> Tensor:
        """Return E[x^power] = sum_k (k^power - (k - 1)^power) p(x >= k)."""
        total = torch.zeros_like(self.loc)
        for k in range(1, self.levels):  # not stacked, because 256 levels of an image would fill the memory
            total = total + (k**power - (k - 1) ** power) * torch.sigmoid((self.loc - k + 0.5) / self.scale)
        return total

    @property
    def mean(self) -> Tensor:
        """Mean."""
        return self._tails(1)

    @property
    def variance(self) -> Tensor:
        """Variance."""
        return self._tails(2) - self.mean.square()


class DiscretizedLogistic(LocationScale):
    """Independent quantised numbers, e.g. grey levels: a logistic density over bins of width 1, x = 0, ..., L - 1.

    p(x|z) = sigmoid((x + 1/2 - m) / s) - sigmoid((x - 1/2 - m) / s), the first and last bin open to the outside;
    m = loc + unit * output and s start at the mean and standard deviation of the training data (Kingma et al. 2016,
    https://arxiv.org/abs/1606.04934; Salimans et al. 2017, https://arxiv.org/abs/1701.05517).

    Args:
        event_shape: shape of one datum (a fact).
        levels: 1 + the largest whole number in the data (a fact).
        values: L; null takes 1 + the largest number in the data.
        scale: `shared` (one learned scale), `per_dimension` (one per entry), or `decoder` (from z, by the decoder).
        floor: smallest scale, as a fraction of that of the data.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        levels: int | None,
        *,
        values: Annotated[int, Ge(2)] | None = None,
        scale: Source = "per_dimension",
        floor: Annotated[float, Gt(0)] = 1e-3,
    ) -> None:
        super().__init__(event_shape, scale=scale, floor=floor)
        self.values = number_of_levels("values", values, levels)

    def adapt(self, x: Tensor) -> None:
        """Set mean and scale of each column; a logistic density has standard deviation 1.81 s."""
        loc, unit = standard_units(x)
        self.set_units(loc, (unit * 0.5513).clamp_min(0.05))

    def forward(self, params: Tensor) -> TorchDistribution:
        """Return the quantised logistic distribution."""
        return Quantised(*self.location_scale(params), self.values).to_event(len(self.event_shape))

    def problem(self, x: Tensor) -> str | None:
        """Refuse entries other than whole numbers from 0 to L - 1."""
        bad = not_a_code(x, self.values)
        return refusal("discretized_logistic", f"whole numbers from 0 to {self.values - 1}", x, bad, more(x, "values", 1))
