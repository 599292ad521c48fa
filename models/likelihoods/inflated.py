"""The likelihood of proportions that may be exactly 0 or 1."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from annotated_types import Gt
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from elbowroom.models.likelihoods.base import Likelihood, refusal
from elbowroom.models.likelihoods.continuous import Beta, OpenBeta
from elbowroom.models.likelihoods.scales import Free, Source


class InflatedBeta(TorchDistribution):
    """Mass at 0 and 1 and a beta density between; the measure is counting at 0 and 1, and Lebesgue's between.

    Args:
        log_w: (..., 3), log weights of 0, of 1, and of the beta distribution, normalised.
        a, b: parameters of the beta distribution, (...).
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.unit_interval

    def __init__(self, log_w: Tensor, a: Tensor, b: Tensor) -> None:
        shape = torch.broadcast_shapes(log_w.shape[:-1], a.shape, b.shape)
        self.log_w, self.a, self.b = log_w.expand(*shape, 3), a.expand(shape), b.expand(shape)
        super().__init__(shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> InflatedBeta:
        """Return the distribution with another batch shape."""
        shape = torch.Size(batch_shape)
        return InflatedBeta(self.log_w.expand(*shape, 3), self.a.expand(shape), self.b.expand(shape))

    @property
    def between(self) -> TorchDistribution:
        """The beta distribution of the values between 0 and 1."""
        return OpenBeta(self.a, self.b, validate_args=False)

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log mass of 0 and 1, and the log density of what lies between."""
        edge = (x <= 0) | (x >= 1)
        density = self.log_w[..., 2] + self.between.log_prob(torch.where(edge, 0.5, x))  # no infinite gradient at the edges
        return torch.where(x <= 0, self.log_w[..., 0], torch.where(x >= 1, self.log_w[..., 1], density))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw which of the three, and then the value."""
        with torch.no_grad():
            inner = self.between.sample(torch.Size(sample_shape))
            u = torch.rand(inner.shape, dtype=inner.dtype, device=inner.device)
            zero, one, _ = self.log_w.exp().unbind(-1)
            return torch.where(u < zero, 0.0, torch.where(u < zero + one, 1.0, inner))

    @property
    def mean(self) -> Tensor:
        """w_1 + w_2 m, where m is the mean of the beta distribution."""
        return self.log_w[..., 1].exp() + self.log_w[..., 2].exp() * self.between.mean

    @property
    def variance(self) -> Tensor:
        """Variance."""
        inner = self.between
        second = self.log_w[..., 1].exp() + self.log_w[..., 2].exp() * (inner.variance + inner.mean.square())
        return second - self.mean.square()


class ZeroOneInflatedBeta(Beta):
    """Independent proportions that may be exactly 0 or 1, 0 <= x <= 1.

    p(x|z) = w_0 [x = 0] + w_1 [x = 1] + w_2 Beta(x; m k, (1 - m) k) [0 < x < 1], with (w_0, w_1, w_2) =
    softmax(l_0 + g_0, l_1 + g_1, 0), where l are the log odds of 0 and 1 in the training data; m and k as in `beta`, by the
    data between. A mass at 0 and 1, a density between: log p(x) of data with and without zeros have different units (Ospina
    and Ferrari 2010, https://doi.org/10.1007/s00362-008-0125-4).

    Args:
        event_shape: shape of one datum (a fact).
        concentration: `shared` (one learned k), `per_dimension` (one per entry), or `decoder` (from z, by the decoder).
        gate: where g_0 and g_1 come from, one of the same.
        floor: smallest 1 / k, as a fraction of that of the data.
    """

    atoms = (0.0, 1.0)

    def __init__(
        self,
        event_shape: tuple[int, ...],
        *,
        concentration: Source = "per_dimension",
        gate: Source = "decoder",
        floor: Annotated[float, Gt(0)] = 1e-3,
    ) -> None:
        super().__init__(event_shape, concentration=concentration, floor=floor)
        self.zero, self.one = Free(self.event_shape, gate), Free(self.event_shape, gate)
        self.param_dim += self.width * (self.zero.outputs + self.one.outputs)
        self.log_odds: Tensor
        self.register_buffer("log_odds", torch.zeros(*self.event_shape, 2))

    def adapt(self, x: Tensor) -> None:
        """Set the odds of 0 and 1 (half a value is added to each of the three), and mean and concentration of the others."""
        inner = torch.where((x <= 0) | (x >= 1), torch.nan, x)
        super().adapt(inner)
        count = lambda which: which.sum(0).double() + 0.5
        between = count(~inner.isnan())
        self.log_odds = torch.stack([(count(x == 0) / between).log(), (count(x == 1) / between).log()], -1).to(self.log_odds)

    def forward(self, params: Tensor) -> TorchDistribution:
        """Return the inflated beta distribution."""
        parts = self._parts(params)
        one, zero = self.log_odds[..., 1] + self.one(parts), self.log_odds[..., 0] + self.zero(parts)
        inner = self.inner(parts)
        zero, one = torch.broadcast_tensors(zero, one)
        log_w = torch.stack([zero, one, torch.zeros_like(zero)], -1).log_softmax(-1)
        return InflatedBeta(log_w, *inner).to_event(len(self.event_shape))

    def problem(self, x: Tensor) -> str | None:
        """Refuse entries that do not lie between 0 and 1."""
        return refusal("zero_one_inflated_beta", "values from 0 to 1", x, (x < 0) | (x > 1))

    def centre(self, p: TorchDistribution) -> Tensor:
        """Return E[x|z]."""
        return Likelihood.centre(self, p)
