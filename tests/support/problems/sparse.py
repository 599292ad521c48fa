"""Sparse proportions with counts, whose posterior and evidence are known: Beta and Dirichlet priors, conjugate likelihoods.

    z ~ Dirichlet(alpha, ..., alpha),  x | z ~ Multinomial(m, z)   ->   z | x ~ Dirichlet(alpha + x)
    log p(x) = log m! - sum log x_k! + log B(alpha + x) - log B(alpha)

The sticks of a Dirichlet are independent Betas, and a Beta's log odds have mean psi(a) - psi(b) and variance psi'(a) + psi'(b):
the moments of the unconstrained coordinates. `parts` = 1 stands for a Beta, whose likelihood is a binomial.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import SigmoidTransform, StickBreakingTransform

from elbowroom.inference.target.log_joint import LogJoint

F64 = torch.float64


@dataclass(frozen=True)
class Sparse:
    """A log joint with the truth about every datum: mean and sd (N, d) in unconstrained coordinates, log evidence (N,)."""

    log_joint: LogJoint
    mean: Tensor
    sd: Tensor
    log_evidence: Tensor


def sparse(
    parts: int,
    alpha: float,
    *,
    n: int = 8,
    counts: int = 3,
    seed: int = 0,
    guide: str = "exact",
    dtype: torch.dtype = F64,
    **options: Any,
) -> Sparse:
    """Return N data of the model.

    Args:
        parts: K of the Dirichlet; 1 for a Beta.
        alpha: of the prior.
        n: number of data.
        counts: observations per datum; 1 makes the likelihoods Bernoulli and categorical.
        seed: of the data.
        guide: exact; near, a Dirichlet whose prior part is a fifth too large; normal, a logistic normal with the right moments.
        dtype: of the program.
        **options: of the log joint.
    """
    beta, k = parts == 1, max(parts, 2)
    prior = torch.full((k,), alpha, dtype=F64)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        theta = torch.distributions.Dirichlet(prior).sample(torch.Size((n,)))
        x = torch.distributions.Multinomial(counts, probs=theta).sample()
    after = prior + x
    log_beta = lambda a: a.lgamma().sum(-1) - a.sum(-1).lgamma()
    log_evidence = log_beta(after) - log_beta(prior) + math.lgamma(counts + 1) - (x + 1).lgamma().sum(-1)
    stick, rest = after[:, :-1], after.flip(-1).cumsum(-1).flip(-1)[:, 1:]
    offset = torch.zeros(1, dtype=F64) if beta else torch.arange(k - 1, 0, -1, dtype=F64).log()
    mean = stick.digamma() - rest.digamma() + offset
    sd = (torch.polygamma(1, stick) + torch.polygamma(1, rest)).sqrt()
    own, data, loc, scale = prior.to(dtype), x.to(dtype), mean.to(dtype), sd.to(dtype)
    index = torch.arange(n)

    def model(x: Tensor, rows: Tensor) -> None:
        with pyro.plate("data", len(x)):
            if beta:
                z = pyro.sample("z", dist.Beta(own[0], own[1]))
                likelihood = dist.Bernoulli(z) if counts == 1 else dist.Binomial(counts, probs=z)
                pyro.sample("x", likelihood, obs=x[:, 0])
            else:
                z = pyro.sample("z", dist.Dirichlet(own))
                if counts == 1:
                    pyro.sample("x", dist.Categorical(z), obs=x.argmax(-1))
                else:
                    pyro.sample("x", dist.Multinomial(counts, probs=z), obs=x)

    def amortized(x: Tensor, rows: Tensor) -> None:
        with pyro.plate("data", len(x)):
            if guide == "normal":
                base = dist.Normal(loc[rows], scale[rows])
                onto = (
                    dist.TransformedDistribution(dist.Normal(loc[rows, 0], scale[rows, 0]), [SigmoidTransform()])
                    if beta
                    else dist.TransformedDistribution(base.to_event(1), [StickBreakingTransform()])
                )
                pyro.sample("z", onto)
                return
            a = own * (1.2 if guide == "near" else 1.0) + x
            pyro.sample("z", dist.Beta(a[:, 0], a[:, 1]) if beta else dist.Dirichlet(a))

    return Sparse(LogJoint(model, amortized, data, index, **options), mean, sd, log_evidence)
