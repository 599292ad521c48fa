"""Which distributions of torch and scvi-tools become which of Pyro's.

A Pyro program samples from Pyro's distributions. Those of torch have the same names, arguments and densities there, so that
they are built again from their own parameters. scvi-tools has a negative binomial of its own, by mean mu and inverse dispersion
theta:

    NB(x | mu, theta) = Gamma(x + theta) / (x! Gamma(theta)) (theta / (theta + mu))^theta (mu / (theta + mu))^x

which is Pyro's with total_count = theta and logits = log mu - log theta, and the same with a gate of zeros. Its logarithms add
1e-8 to mu and theta, and so do ours (https://docs.scvi-tools.org, `scvi.distributions`).

pythae has no distributions: its losses are told in `adapt.peers.pythae`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from elbowroom.errors import UserError

EITHER = "probs or logits"
TORCH: dict[str, tuple[str, ...]] = {
    "Bernoulli": (EITHER,),
    "Beta": ("concentration1", "concentration0"),
    "Binomial": ("total_count", EITHER),
    "Categorical": (EITHER,),
    "Cauchy": ("loc", "scale"),
    "ContinuousBernoulli": (EITHER,),
    "Dirichlet": ("concentration",),
    "Exponential": ("rate",),
    "Gamma": ("concentration", "rate"),
    "Geometric": (EITHER,),
    "Gumbel": ("loc", "scale"),
    "HalfCauchy": ("scale",),
    "HalfNormal": ("scale",),
    "Laplace": ("loc", "scale"),
    "LogNormal": ("loc", "scale"),
    "LowRankMultivariateNormal": ("loc", "cov_factor", "cov_diag"),
    "MultivariateNormal": ("loc", "scale_tril"),
    "NegativeBinomial": ("total_count", EITHER),
    "Normal": ("loc", "scale"),
    "OneHotCategorical": (EITHER,),
    "Poisson": ("rate",),
    "StudentT": ("df", "loc", "scale"),
    "Uniform": ("low", "high"),
    "VonMises": ("loc", "concentration"),
    "Weibull": ("scale", "concentration"),
}
WRAPPERS = ("Independent", "MixtureSameFamily", "TransformedDistribution")
TINY = 1e-8  # what scvi-tools adds to the arguments of its logarithms


def in_pyro(d: Any, place: str) -> Any:
    """Return the distribution of Pyro that has the density of `d`.

    Args:
        d: a distribution of Pyro (returned as it is), torch or scvi-tools.
        place: who made it, for the message.

    Raises:
        UserError: it is no distribution, or of a class that is not in the tables, as one of the user's own.
    """
    if isinstance(d, dist.torch_distribution.TorchDistributionMixin):
        return d
    kind, library = type(d).__name__, type(d).__module__.split(".")[0]
    if library == "scvi" and kind in SCVI:
        return SCVI[kind](d)
    if type(d) is getattr(torch.distributions, kind, None):
        checked = vars(d).get("_validate_args")
        if kind == "Independent":
            return in_pyro(d.base_dist, place).to_event(d.reinterpreted_batch_ndims)
        if kind == "MixtureSameFamily":
            parts = in_pyro(d.mixture_distribution, place), in_pyro(d.component_distribution, place)
            return dist.MixtureSameFamily(*parts, validate_args=checked)
        if kind == "TransformedDistribution":
            return dist.TransformedDistribution(in_pyro(d.base_dist, place), d.transforms, validate_args=checked)
        if kind in TORCH:
            given = dict(_parameter(d, name) for name in TORCH[kind])
            return getattr(dist, kind)(**given, validate_args=checked)
    if not isinstance(d, torch.distributions.Distribution):
        raise UserError(f"{place}: it returned {_article(kind)}, where a distribution is needed")
    raise UserError(
        f"{place}: Pyro has no distribution for {type(d).__module__}.{kind}; return one of pyro.distributions, or of "
        f"torch.distributions: {', '.join(sorted([*TORCH, *WRAPPERS]))}"
    )


def _article(kind: str) -> str:
    return f"{'an' if kind[:1].lower() in 'aeiou' else 'a'} {kind}"


def _parameter(d: Any, name: str) -> tuple[str, Any]:
    """Return a parameter's name and value; of `probs` and `logits` the one that the distribution was made with."""
    if name != EITHER:
        return name, getattr(d, name)
    own = vars(d)
    both = "probs" in own and "logits" in own
    name = "logits" if ("logits" in own and not both) or (both and own.get("_param") is own["logits"]) else "probs"
    return name, getattr(d, name)


# -- scvi-tools --------------------------------------------------------------------------------------------------------------


def negative_binomial(mu: Tensor, theta: Tensor) -> Any:
    """Return NB(mu, theta), by mean and inverse dispersion, as Pyro's distribution."""
    return dist.NegativeBinomial(total_count=theta, logits=(mu + TINY).log() - (theta + TINY).log())


def _zero_inflated(d: Any) -> Any:
    logits = (d.mu + TINY).log() - (d.theta + TINY).log()
    return dist.ZeroInflatedNegativeBinomial(d.theta, logits=logits, gate_logits=d.zi_logits)


SCVI: dict[str, Callable[[Any], Any]] = {
    "NegativeBinomial": lambda d: negative_binomial(d.mu, d.theta),
    "Normal": lambda d: dist.Normal(d.loc, d.scale),
    "Poisson": lambda d: dist.Poisson(d.rate),
    "ZeroInflatedNegativeBinomial": _zero_inflated,
}
