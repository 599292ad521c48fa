"""Semi-amortized inference: the encoder's parameters, improved for each datum by a few steps up its own ELBO.

With fixed noise e_1 .. e_S, the same for every datum, quasi-random, antithetic (e and -e) and of covariance I, the ELBO of
datum n is a function of the parameters alone, and exact if log p(x, z) is quadratic in z,

    L_n(lambda) = (1/S) sum_s log p(x_n, z_s) - log q(z_s; lambda),    z_s = mu + L e_s

so lambda_n = refined(encoder(x_n)) is a deterministic function of x_n, and q(z|x) has an ordinary density.

Each step goes from the best parameters so far along P g, the gradient in the family's own units (so that narrow and wide
posteriors need the same step size), by at most one standard deviation. It is accepted if it raises the ELBO on a second set of
fixed noise, which the gradient does not use (`judges`): overfitting the few points of the first set is no gain. After a
rejected step the datum stays where it is and tries a smaller one. Thus no step makes the ELBO worse.

Kim et al. 2018, https://arxiv.org/abs/1802.02550. They take plain gradient steps on fresh draws and always accept them.
"""

from __future__ import annotations

from typing import Annotated, Literal

import pyro
import torch
from annotated_types import Ge, Gt, Le
from pyro.distributions import TorchDistribution
from torch import Tensor

from elbowroom.models.guides.base import Family, LogDensity
from elbowroom.models.guides.normal import DiagonalNormal, FullRankNormal, LowRankNormal, NormalFamily

GROW, SHRINK = 1.5, 0.3  # factors of a datum's step size after a step that raised its ELBO, and after one that did not


class SemiAmortized(Family):
    """q(z|x) = a normal with the encoder's parameters, improved by gradient steps on the datum's own ELBO.

    Training differentiates through the accepted steps: the encoder learns a good start, and the decoder is trained for the
    refined posterior. Every use of the guide takes the steps, so it costs about 5 `steps` x `draws` decodings. The encoder
    without the steps is not a good guide, because it only learns where to start.

    Args:
        latent_dim: width of z (a fact).
        family: the normal family.
        steps: number k of steps; 0 is the encoder alone.
        step_size: of the first step, in the family's own units (1 is a Newton step in the mean where q fits already).
        draws: number of fixed draws that a datum's ELBO is measured with; at least twice the width of the noise (about
            2 `latent_dim`) are taken, for a direction that no draw sees has an ELBO that only grows with its variance.
        through: differentiate through the steps when training; else the encoder gets the gradient at the refined
            parameters as if it had put them out (cheaper, first-order).
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        family: Literal["diagonal_normal", "full_rank_normal", "low_rank_normal"] = "diagonal_normal",
        steps: Annotated[int, Ge(0), Le(1000)] = 5,
        step_size: Annotated[float, Gt(0)] = 0.5,
        draws: Annotated[int, Ge(2), Le(1000)] = 8,
        through: bool = True,
    ) -> None:
        super().__init__()
        families: dict[str, type[NormalFamily]] = {
            "diagonal_normal": DiagonalNormal,
            "full_rank_normal": FullRankNormal,
            "low_rank_normal": LowRankNormal,
        }
        self.base = families[family](latent_dim)
        self.latent_dim, self.param_dim = latent_dim, self.base.param_dim
        self.steps, self.step_size, self.through = steps, step_size, through
        self.noise: Tensor
        self.judges: Tensor
        self.register_buffer("noise", _noise(draws, self.base.noise_dim, seed=0), persistent=False)
        self.register_buffer("judges", _noise(2 * draws, self.base.noise_dim, seed=1), persistent=False)

    def forward(self, params: Tensor) -> TorchDistribution:
        """Turn parameters into the normal; see `refined` for the steps."""
        return self.base(params)

    def elbo(self, params: Tensor, log_joint: LogDensity) -> Tensor:
        """Return each datum's ELBO on the judges' noise, (N,), in nats; `refined` never lowers it."""
        return self._elbo(params, log_joint, self.judges)

    def _elbo(self, params: Tensor, log_joint: LogDensity, noise: Tensor) -> Tensor:
        z = self.base.place(params, noise)
        return (log_joint(z) - self.base(params).log_prob(z)).mean(0)

    def refined(self, params: Tensor, log_joint: LogDensity) -> Tensor:
        """Return the best of the iterates for each datum, including the encoder's own; (N, param_dim)."""
        # a long step may reach non-finite densities; it is rejected, not an error
        with pyro.validation_enabled(False):
            if self.through and torch.is_grad_enabled():
                return self._climbed(params, log_joint)
            with torch.no_grad():
                best = self._climbed(params, log_joint)
        return params + (best - params).detach()

    def _climbed(self, params: Tensor, log_joint: LogDensity) -> Tensor:
        slope = torch.func.grad(lambda candidate: self._elbo(candidate, log_joint, self.noise).sum())
        best = params
        with torch.no_grad():
            value = self.elbo(best, log_joint).nan_to_num(nan=-torch.inf)  # any finite ELBO is better
        size = params.new_full((*params.shape[:-1], 1), self.step_size)
        for _ in range(self.steps):
            gradient = slope(best)
            direction = self.base.uphill(best, gradient)
            square = (gradient * direction).sum(-1, keepdim=True)  # g' P g, squared length in standard deviations
            far = size * square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()
            trial = best + size / far.clamp_min(1) * direction
            with torch.no_grad():
                judged = self.elbo(trial, log_joint)
                better = (judged > value)[..., None]  # false for NaN
                value = torch.where(better[..., 0], judged, value)
                size = torch.where(better, GROW, SHRINK) * size
            best = torch.where(better, trial, best)
        return best


def _noise(draws: int, width: int, seed: int) -> Tensor:
    """Return at least `draws` and 2 `width` points e, -e of covariance I, (S, 1, width), whatever the caller's seed."""
    count = max((draws + 1) // 2, width)
    uniform = torch.quasirandom.SobolEngine(width, scramble=True, seed=seed).draw(count, dtype=torch.float64)
    uniform = uniform.clamp(1e-6, 1 - 1e-6)
    uniform[:, 0] /= 2  # half of the space; the mirror images fill the other half
    half = torch.special.ndtri(uniform)
    values, vectors = torch.linalg.eigh(half.T @ half / count)
    half = half @ (vectors * values.clamp_min(1e-6).rsqrt()) @ vectors.T  # the nearest points of covariance I
    return torch.cat([half, -half])[:, None].float()
