"""Likelihoods of a whole row of counts given its total: multinomial, and with shares that vary (Dirichlet-multinomial)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import pyro.distributions as dist
import torch
from annotated_types import Gt
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from elbowroom.models.likelihoods.base import Likelihood, refusal
from elbowroom.models.likelihoods.scales import Positive, bounded

NEVER = -1e30  # the logit of a missing entry


class Composition(TorchDistribution):
    """p(x | sum x) of a row of counts: multinomial over the observed entries.

    Args:
        logits: (..., *event), not normalised.
        total: the total of a draw, ().
        event_dim: number of dimensions of the event.
        missing: True where an entry is missing, broadcastable to (..., *event); None for none.
    """

    arg_constraints = {"logits": constraints.real}

    def __init__(self, logits: Tensor, total: Tensor, event_dim: int, missing: Tensor | None = None) -> None:
        self.logits, self.total, self.missing = logits, total, missing
        super().__init__(
            logits.shape[: logits.dim() - event_dim], logits.shape[logits.dim() - event_dim :], validate_args=False
        )

    @property
    def support(self) -> Any:
        """Rows of whole numbers."""
        return constraints.independent(constraints.nonnegative_integer, self.event_dim)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Composition:
        """Return the distribution with another batch shape."""
        logits = self.logits.expand(torch.Size(batch_shape) + self.event_shape)
        return Composition(logits, self.total, self.event_dim, self.missing)

    def log_shares(self) -> Tensor:
        """Return the log probabilities of the observed entries, flat: (..., width)."""
        logits = self.logits if self.missing is None else torch.where(self.missing, NEVER, self.logits)
        return logits.flatten(logits.dim() - self.event_dim).log_softmax(-1)

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log n! - sum_i log x_i! + sum_i x_i log p_i over the observed entries; n is their total."""
        x = x if self.missing is None else torch.where(self.missing, 0.0, x)
        x = x.flatten(x.dim() - self.event_dim)
        return (x.sum(-1) + 1).lgamma() - (x + 1).lgamma().sum(-1) + (x * self.log_shares()).sum(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw rows with the total `total`, NaN where an entry is missing."""
        logits = self.logits.flatten(self.logits.dim() - self.event_dim)
        counts = dist.Multinomial(max(1, int(self.total.round())), logits=logits, validate_args=False)
        x = counts.sample(torch.Size(sample_shape)).reshape(*sample_shape, *self.logits.shape)
        return x if self.missing is None else torch.where(self.missing, torch.nan, x)

    @property
    def mean(self) -> Tensor:
        """Mean of a row with the total `total`."""
        flat = self.logits.flatten(self.logits.dim() - self.event_dim)
        return (self.total * flat.softmax(-1)).reshape(self.logits.shape)

    @property
    def variance(self) -> Tensor:
        """Variance of each entry of a row with the total `total`."""
        return self.mean * (1 - self.mean / self.total)


class Multinomial(Likelihood):
    """A whole row of counts given its total n: p(x|z, n) = n! / (x_1! ... x_D!) q_1^x_1 ... q_D^x_D.

    q = softmax(log share in the training data + output), over all entries of a datum of any shape. The total carries no
    information about z. If entries are missing, the others are multinomial given their own total, with q renormalised over
    them. Draws and means use the mean total of the training data (Liang et al. 2018, https://arxiv.org/abs/1802.05814).
    """

    name: ClassVar[str] = "multinomial"

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__(event_shape)
        self.log_share: Tensor
        self.total: Tensor
        self.register_buffer("log_share", torch.zeros(self.event_shape))
        self.register_buffer("total", torch.tensor(float(self.width)))

    def adapt(self, x: Tensor) -> None:
        """Set the share of each entry, with half a count added to its total, and the mean total of a row.

        A column with missing entries contributes its mean.
        """
        wide = x.double()
        n = (~wide.isnan()).sum(0).clamp_min(1)
        mean = wide.nansum(0) / n
        self.log_share = ((wide.nansum(0) + 0.5) / n).log().to(self.log_share)
        self.total = mean.sum().round().clamp_min(1).to(self.total)

    def forward(self, params: Tensor) -> TorchDistribution:
        """Return the multinomial distribution."""
        return Composition(self.log_share + self._shaped(params), self.total, len(self.event_shape))

    def incomplete(self, p: TorchDistribution, missing: Tensor) -> TorchDistribution:
        """Return the multinomial distribution of the observed entries, given their own total."""
        return Composition(p.logits, p.total, p.event_dim, missing)

    def problem(self, x: Tensor) -> str | None:
        """Refuse entries other than whole numbers >= 0."""
        return refusal(self.name, "whole numbers >= 0", x, (x < 0) | (x != x.round()))

    def features(self, x: Tensor) -> Tensor:
        """Return log(1 + x)."""
        return x.log1p()


class VaryingComposition(Composition):
    """p(x | sum x) of a row of counts: Dirichlet-multinomial over the observed entries.

    Args:
        logits: (..., *event), not normalised.
        concentration: k, the sum of the Dirichlet's parameters over all entries, (...).
        total: the total of a draw, ().
        event_dim: number of dimensions of the event.
        missing: True where an entry is missing, broadcastable to (..., *event); None for none.
    """

    def __init__(
        self, logits: Tensor, concentration: Tensor, total: Tensor, event_dim: int, missing: Tensor | None = None
    ) -> None:
        super().__init__(logits, total, event_dim, missing)
        self.concentration = concentration

    def expand(self, batch_shape: Any, _instance: Any = None) -> VaryingComposition:
        """Return the distribution with another batch shape."""
        logits = self.logits.expand(torch.Size(batch_shape) + self.event_shape)
        k = self.concentration.expand(torch.Size(batch_shape))
        return VaryingComposition(logits, k, self.total, self.event_dim, self.missing)

    def _alpha(self) -> Tensor:
        """Return the Dirichlet's parameters of all entries, flat: (..., width)."""
        share = self.logits.flatten(self.logits.dim() - self.event_dim).softmax(-1)
        return self.concentration[..., None] * share.clamp_min(1e-30)

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log density of the observed entries given their own total n, with A the sum of their parameters a_i.

        log n! + lgamma(A) - lgamma(n + A) + sum_i lgamma(x_i + a_i) - lgamma(a_i) - log x_i!
        """
        alpha = self._alpha()
        term = lambda x: (x + alpha).lgamma() - alpha.lgamma() - (x + 1).lgamma()
        if self.missing is None:
            x = x.flatten(x.dim() - self.event_dim)
            whole, parts = alpha.sum(-1), term(x)
        else:
            hidden = self.missing.flatten(self.missing.dim() - self.event_dim)
            x = torch.where(self.missing, 0.0, x).flatten(x.dim() - self.event_dim)
            seen = torch.where(hidden, 0.0, alpha).sum(-1)
            whole = torch.where(hidden.all(-1), 1.0, seen)  # no entry: log density 0
            parts = torch.where(hidden, 0.0, term(x))
        n = x.sum(-1)
        return (n + 1).lgamma() + whole.lgamma() - (n + whole).lgamma() + parts.sum(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw shares and then rows with the total `total`, NaN where an entry is missing."""
        with torch.no_grad():
            share = dist.Dirichlet(self._alpha(), validate_args=False).sample(torch.Size(sample_shape))
            counts = dist.Multinomial(max(1, int(self.total.round())), probs=share, validate_args=False).sample()
            x = counts.reshape(*sample_shape, *self.logits.shape)
            return x if self.missing is None else torch.where(self.missing, torch.nan, x)

    @property
    def variance(self) -> Tensor:
        """Variance of each entry of a row with the total `total`."""
        k = self.concentration.reshape(*self.concentration.shape, *[1] * self.event_dim)
        return super().variance * (self.total + k) / (1 + k)


class DirichletMultinomial(Multinomial):
    """A row of counts given its total n, with shares that vary more than a multinomial's: q ~ Dirichlet(a).

    p(x|z, n) = n! Gamma(k) / Gamma(n + k) prod_i Gamma(x_i + a_i) / (Gamma(a_i) x_i!), a = k softmax(log share in the training
    data + output), k = k0 / spread with k0 by the variance of the training data. If entries are missing, the others are
    Dirichlet-multinomial given their own total, with their own a_i. Draws and means use the mean total of the training data
    (Mosimann 1962, https://doi.org/10.1093/biomet/49.1-2.65).

    Args:
        event_shape: shape of one datum (a fact).
        concentration: `shared` (one learned k) or `decoder` (one per datum from z, by the decoder).
        floor: smallest 1 / k, as a fraction of that of the data.
    """

    name: ClassVar[str] = "dirichlet_multinomial"

    def __init__(
        self,
        event_shape: tuple[int, ...],
        *,
        concentration: Literal["shared", "decoder"] = "shared",
        floor: Annotated[float, Gt(0)] = 1e-3,
    ) -> None:
        super().__init__(event_shape)
        self.variation = Positive((), concentration, floor)
        self.variation.adapt(torch.tensor(0.1))
        self.param_dim = self.width * (1 + self.variation.outputs)

    def adapt(self, x: Tensor) -> None:
        """Set shares, mean total, and the concentration by the rows without holes: 1 / (1 + k), clipped to 0.001 .. 0.9."""
        super().adapt(x)
        wide = x.double().flatten(1)
        wide = wide[~wide.isnan().any(1)]
        n = wide.sum(1)
        if len(wide) < 2 or not bool((n > 1).any()) or self.width < 2:
            return
        share = (wide.sum(0) + 0.5) / (wide + 0.5 / len(wide)).sum()
        spread = (share * (1 - share)).sum()
        excess = (wide - n[:, None] * share).square().sum() * len(wide) / (len(wide) - 1) - n.sum() * spread
        rho = (excess / ((n * (n - 1)).sum() * spread)).clamp(1e-3, 0.9)
        self.variation.adapt(rho / (1 - rho))

    def forward(self, params: Tensor) -> TorchDistribution:
        """Return the Dirichlet-multinomial distribution; the decoder's k is the mean of its last `width` outputs."""
        parts = self._parts(params)
        if self.variation.outputs:
            parts[-1] = parts[-1].flatten(parts[-1].dim() - len(self.event_shape)).mean(-1)
        k = self.variation(parts).reciprocal()
        logits = self.log_share + bounded(parts[0])
        k = k.expand(logits.shape[: logits.dim() - len(self.event_shape)])
        return VaryingComposition(logits, k, self.total, len(self.event_shape))

    def incomplete(self, p: TorchDistribution, missing: Tensor) -> TorchDistribution:
        """Return the Dirichlet-multinomial distribution of the observed entries, given their own total."""
        return VaryingComposition(p.logits, p.concentration, p.total, p.event_dim, missing)
