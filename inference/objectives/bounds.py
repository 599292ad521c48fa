"""Objectives made of log weights: multi-sample bounds, gradients of low variance, and weighted KL parts.

With l_kn = log p(x_n|z_kn) + w [ log p(z_kn) - log q(z_kn|x_n) ] of K draws for each datum (`log_weights`),

    objective = (N / B) sum_{n in b} L(l_1n, ..., l_Kn)

and N / B stays outside L. (Pyro's RenyiELBO has it inside the log-sum-exp; its value is no bound.) At w = 1 every L here but
that of `beta` is a lower bound on log p(x_n), equal to it for every draw where q(z|x) = p(z|x).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from elbowroom.inference.objectives.elbo import Estimate, Objective, Program, Weight, checked
from elbowroom.inference.objectives.log_weights import LogWeights, log_weights

DIFFERENTIABLE = "needs a guide whose draws are differentiable in its parameters"


class Bound(Objective):
    """An objective that is a function of the log weights of K draws for each datum.

    Attributes:
        path: whether log q depends on the guide's parameters through z alone.
    """

    path: ClassVar[bool] = False

    @abstractmethod
    def total(self, weights: LogWeights, kl_weight: Weight) -> Tensor:
        """Return the objective for the batch, without N / B: a differentiable scalar, higher is better."""

    def __call__(self, model: Program, guide: Program, *args: Any, kl_weight: Weight = 1.0, **kwargs: Any) -> Estimate:
        """Estimate the objective and the unweighted ELBO with K draws of z per datum."""
        particles = getattr(self, "particles", 1)
        try:
            weights = log_weights(model, guide, args, kwargs, particles=particles, path=self.path)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        if self.reparametrized and weights.score is not None:
            raise ValueError(f"{self.name}: {self.needs}; use elbo")
        return finished(weights, self.total(weights, kl_weight))


class IWAE(Bound):
    """Importance-weighted bound, L = log mean_k exp(l_k): tighter than the ELBO, and the tighter the larger K.

    ELBO = L_1 <= L_K <= L_{K+1} -> log p(x). The guide's gradient becomes noisy as K grows (Rainforth et al. 2018); see `dreg`.
    Burda et al. 2016, https://arxiv.org/abs/1509.00519.

    Args:
        particles: draws K of z per datum.
    """

    name = "iwae"
    discrete = False
    reparametrized = True
    needs = DIFFERENTIABLE

    def __init__(self, *, particles: Annotated[int, Ge(1)] = 10) -> None:
        self.particles = particles

    def total(self, weights: LogWeights, kl_weight: Weight) -> Tensor:
        """Return sum_n log mean_k exp(l_kn)."""
        return log_mean_exp(weights.weighed(kl_weight)).sum()


class Renyi(Bound):
    """Renyi bound, L = log mean_k exp((1 - alpha) l_k) / (1 - alpha): `elbo` at alpha = 1, `iwae` at alpha = 0.

    Below 0 it may exceed log p(x); above 1 it lies below the ELBO. Li and Turner 2016, https://arxiv.org/abs/1602.02311.

    Args:
        alpha: order of the divergence; the smaller, the more of the posterior's mass the guide covers.
        particles: draws K of z per datum.
    """

    name = "renyi"
    discrete = False
    reparametrized = True
    needs = DIFFERENTIABLE

    def __init__(self, *, alpha: float = 0.5, particles: Annotated[int, Ge(1)] = 10) -> None:
        self.alpha = alpha
        self.particles = particles

    def total(self, weights: LogWeights, kl_weight: Weight) -> Tensor:
        """Return sum_n log mean_k exp((1 - alpha) l_kn) / (1 - alpha)."""
        log_w, order = weights.weighed(kl_weight), 1.0 - self.alpha
        if abs(order) < 1e-6:  # the limit alpha -> 1; the error is below the rounding of the weights
            return log_w.mean(0).sum()
        return log_mean_exp(order * log_w).sum() / order


class StickingTheLanding(Bound):
    """ELBO with a gradient for the guide that flows through z alone; it has no noise where the guide is the posterior.

    The omitted term, the gradient of log q(z|x) at fixed z, has mean zero.
    Roeder et al. 2017, https://arxiv.org/abs/1703.09194.
    """

    name = "sticking_the_landing"
    discrete = False
    reparametrized = True
    needs = DIFFERENTIABLE
    path = True

    def total(self, weights: LogWeights, kl_weight: Weight) -> Tensor:
        """Return sum_n l_n."""
        return weights.weighed(kl_weight).sum()


class DReG(Bound):
    """The bound of `iwae` with the doubly reparametrised gradient: less noise for the guide at every K.

    With v_k = exp(l_k) / sum_j exp(l_j), held constant, the gradient is

        model   sum_k v_k dl_k/dtheta                  guide   sum_k v_k [1 - w (1 - v_k)] (dl_k/dz_k) dz_k/dphi

    that is v_k^2 for the guide at KL weight w = 1. It is unbiased for the gradient of `iwae`, and without noise where the
    guide is the posterior. Tucker et al. 2018, https://arxiv.org/abs/1810.04152.

    Args:
        particles: draws K of z per datum.
    """

    name = "dreg"
    discrete = False
    reparametrized = True
    needs = DIFFERENTIABLE
    path = True

    def __init__(self, *, particles: Annotated[int, Ge(1)] = 10) -> None:
        self.particles = particles

    def total(self, weights: LogWeights, kl_weight: Weight) -> Tensor:
        """Return sum_n log mean_k exp(l_kn), with the doubly reparametrised gradient."""
        log_w = weights.weighed(kl_weight)
        v = log_w.detach().softmax(0)
        factor = (1.0 - kl_weight * (1.0 - v)).flatten()
        for z, dim in weights.values.values():
            if z.requires_grad:  # v_k comes from the surrogate; the hook adds the guide's further factor on the way through z
                shape = [len(factor) if i == dim % z.dim() else 1 for i in range(z.dim())]
                z.register_hook(partial(torch.mul, factor.to(z).reshape(shape)))
        return _valued(log_mean_exp(log_w.detach()).sum(), (v * log_w).sum())


class Beta(Bound):
    """The ELBO with another weight of the KL part, and with free bits: a floor below which a KL is not reduced further.

    sum_{n in b} log p(x_n|z_n) - w beta sum_sites B max( free_bits, mean_{n in b} [ log q(z_n|x_n) - log p(z_n) ] )

    The KL of a latent site is its mean over the batch, at the draws; below the floor it is a constant, without a gradient. At
    beta = 1 and free_bits = 0 this is `elbo`; for beta >= 1 it is a loose lower bound on log p(x). `fit.kl_warmup` sets w.
    Higgins et al. 2017, https://openreview.net/forum?id=Sy2fzU9gl; free bits: Kingma et al. 2016,
    https://arxiv.org/abs/1606.04934.

    Args:
        beta: weight of the KL part, once the warm-up is over.
        free_bits: floor of the KL of each latent site, in nats per datum; 0 for none.
    """

    name = "beta"

    def __init__(self, *, beta: Annotated[float, Ge(0)] = 4.0, free_bits: Annotated[float, Ge(0)] = 0.0) -> None:
        self.beta = beta
        self.free_bits = free_bits

    def total(self, weights: LogWeights, kl_weight: Weight) -> Tensor:
        """Return sum_n log p(x_n|z_n) - w beta sum_sites max(B free_bits, sum_n [log q - log p]_n)."""
        each, weight = weights.likelihood, kl_weight * self.beta
        floors: float | Tensor = 0.0
        for name, log_q in weights.guide.items():
            kl = log_q - weights.prior.get(name, 0.0)
            if self.free_bits > 0:
                low = kl.detach().mean() < self.free_bits
                floors = floors + weight * self.free_bits * kl.numel() * low.to(kl)
                kl = kl.where(~low, 0.0)
            each = each - weight * kl
        total = each.sum() - floors
        if weights.score is None:
            return total
        return _valued(total.detach(), total + (each.detach() * weights.score).sum())  # REINFORCE


def log_mean_exp(log_w: Tensor) -> Tensor:
    """Return log mean_k exp(l_k), (N,), for l of shape (K, N)."""
    return torch.logsumexp(log_w, 0) - math.log(len(log_w))


def finished(weights: LogWeights, total: Tensor, beside: Tensor | float = 0.0) -> Estimate:
    """Return the estimate for N data from the total of a batch, with the ELBO of the same draws.

    `total` is the objective for the batch (higher is better); `beside` is a term to add that does not depend on the weights.

    Raises:
        NonFiniteSite: a log weight or the total is not finite.
    """
    loss = -weights.scale * (total + beside)
    plain = weights.weighed().detach().mean(0).sum()
    return checked(Estimate(loss, loss.detach(), weights.scale * plain), *weights.traces, len(weights.likelihood))


def _valued(value: Tensor, surrogate: Tensor) -> Tensor:
    """Return a scalar with the value of `value` and the gradient of `surrogate`."""
    return surrogate - surrogate.detach() + value
