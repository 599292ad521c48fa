"""Log densities of every datum at the same latent points, by one matrix product where the likelihood allows it.

For an exponential family, log p(x|z) = <T(x), eta(z)> - A(z) + h(x): with G points and N data this is a (G, k) by (k, N)
product instead of G x N evaluations. Where entries are missing their statistics are left out, and so are their parts of A:

    log p(x_seen|z) = <m T(x), eta(z)> - <m, A(z)> + <m, h(x)>,  m = 1 where an entry is there, else 0

It needs parameters that do not depend on the datum; Pyro's plates expand them as views, so a zero stride along the data
dimension shows that they do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from elbowroom.models.categories import Codes
from elbowroom.models.compositions import Composition
from elbowroom.models.continuous import OpenBeta
from elbowroom.models.incomplete import Incomplete
from elbowroom.models.likelihoods import Grey
from elbowroom.models.mixed import Columns

EXACT = 50.0  # beyond which softplus(x) is x in double precision

Terms = tuple[Tensor, Tensor, Tensor, Tensor]  # eta (G, k), A (G, D), T (N, k), h (N, ...); T and h are NaN where x is


@dataclass(frozen=True)
class Family:
    """An exponential family, in the parameters of its distribution.

    Attributes:
        terms: data (N, D), NaN where missing, and parameters (G, D, ...) to eta, A, T, h.
        parameters: names of the parameters.
        fixed: those of them that may not depend on z; they come as (1, D).
        trailing: dimensions of a parameter beside those of the data.
    """

    terms: Callable[..., Terms]
    parameters: tuple[str, ...]
    fixed: tuple[str, ...] = ()
    trailing: int = 0


def _bernoulli(x: Tensor, logits: Tensor) -> Terms:
    return logits, softplus(logits, threshold=EXACT), x, x.new_zeros(len(x), 1)


def _continuous_bernoulli(x: Tensor, logits: Tensor) -> Terms:
    at_zero = Grey(logits=logits, validate_args=False).log_prob(torch.zeros_like(logits))
    return logits, -at_zero, x, x.new_zeros(len(x), 1)


def _normal(x: Tensor, loc: Tensor, scale: Tensor) -> Terms:
    centre = x.nanmean(0).nan_to_num(0.0)  # keeps the two large terms of the quadratic from cancelling
    x, loc = x - centre, loc - centre
    precision = scale.square().reciprocal()
    normalizer = 0.5 * loc.square() * precision + scale.log() + 0.5 * math.log(2 * math.pi)
    return (
        torch.cat([loc * precision, -0.5 * precision], -1),
        normalizer,
        torch.cat([x, x.square()], -1),
        x.new_zeros(len(x), 1),
    )


def _log_normal(x: Tensor, loc: Tensor, scale: Tensor) -> Terms:
    eta, normalizer, statistics, _ = _normal(x.log(), loc, scale)
    return eta, normalizer, statistics, -x.log()


def _gamma(x: Tensor, concentration: Tensor, rate: Tensor) -> Terms:
    normalizer = concentration.lgamma() - concentration * rate.log()
    return torch.cat([concentration, -rate], -1), normalizer, torch.cat([x.log(), x], -1), -x.log()


def _beta(x: Tensor, concentration1: Tensor, concentration0: Tensor) -> Terms:
    normalizer = concentration1.lgamma() + concentration0.lgamma() - (concentration1 + concentration0).lgamma()
    both = torch.cat([x.log(), (-x).log1p()], -1)
    return torch.cat([concentration1, concentration0], -1), normalizer, both, -both


def _poisson(x: Tensor, rate: Tensor) -> Terms:
    eta = rate.log().clamp_min(torch.finfo(rate.dtype).min)  # 0 x log 0 is 0
    return eta, rate, x, -(x + 1).lgamma()


def _binomial(x: Tensor, total_count: Tensor, logits: Tensor) -> Terms:
    ways = (total_count + 1).lgamma() - (x + 1).lgamma() - (total_count - x + 1).lgamma()
    return logits, total_count * softplus(logits, threshold=EXACT), x, ways


def _negative_binomial(x: Tensor, total_count: Tensor, logits: Tensor) -> Terms:
    ways = (total_count + x).lgamma() - (x + 1).lgamma() - total_count.lgamma()
    return logsigmoid(logits), -total_count * logsigmoid(-logits), x, ways


def _codes(x: Tensor, logits: Tensor) -> Terms:
    one_hot = (x[..., None] == torch.arange(logits.shape[-1], device=x.device)).to(x.dtype)  # zero where x is NaN
    return logits.flatten(1), torch.zeros_like(logits[..., 0]), one_hot.flatten(1), x.new_zeros(len(x), 1)


def _composition(x: Tensor, logits: Tensor) -> Terms:
    ways = torch.cat([(x.sum(-1, keepdim=True) + 1).lgamma(), -(x + 1).lgamma()], -1)
    return logits.log_softmax(-1), torch.zeros_like(logits), x, ways


FAMILIES: dict[type, Family] = {
    dist.Bernoulli: Family(_bernoulli, ("logits",)),
    Grey: Family(_continuous_bernoulli, ("logits",)),
    dist.Normal: Family(_normal, ("loc", "scale")),
    dist.LogNormal: Family(_log_normal, ("loc", "scale")),
    dist.Gamma: Family(_gamma, ("concentration", "rate")),
    OpenBeta: Family(_beta, ("concentration1", "concentration0")),
    dist.Poisson: Family(_poisson, ("rate",)),
    dist.Binomial: Family(_binomial, ("total_count", "logits"), fixed=("total_count",)),
    dist.NegativeBinomial: Family(_negative_binomial, ("total_count", "logits"), fixed=("total_count",)),
    Codes: Family(_codes, ("logits",), trailing=1),
    Composition: Family(_composition, ("logits",)),
}


def log_prob(fn: TorchDistribution, value: Tensor) -> Tensor:
    """Return fn.log_prob(value), by the shorter of two equal formulas where torch's own is slow under vmap or fails there."""
    base = fn
    while isinstance(base, dist.Independent):
        base = base.base_dist
    if type(base) is dist.Multinomial:  # torch's own indexes by a mask, and takes log x! anew for every draw of z
        logits = base.logits.clamp_min(torch.finfo(base.logits.dtype).min)  # 0 x log 0 is 0
        terms = (value.sum(-1) + 1).lgamma() - (value + 1).lgamma().sum(-1) + (value * logits).sum(-1)
        return terms.flatten(terms.dim() - (fn.event_dim - 1)).sum(-1) if fn.event_dim > 1 else terms
    if type(base) is not dist.Bernoulli or "logits" not in base.__dict__:
        return fn.log_prob(value)
    terms = value * base.logits - softplus(base.logits, threshold=EXACT)
    return terms.flatten(terms.dim() - fn.event_dim).sum(-1) if fn.event_dim else terms


def shared_log_prob(fn: TorchDistribution, value: Tensor) -> Tensor:
    """Return fn.log_prob(value) with batch shape broadcastable to (G, N).

    Args:
        fn: distribution with batch shape (G, N), (G, 1) or (N,), whose parameters may be expanded views.
        value: latent values (G, 1, *event) or data (N, *event).
    """
    base, event_dim = fn, fn.event_dim
    missing = inside = None
    if isinstance(fn, Incomplete):
        base, missing, inside = fn.base, fn.missing, fn.inside
    if isinstance(base, Columns):
        return _columns(base, value, missing, inside)
    while isinstance(base, dist.Independent):
        base = base.base_dist
    family = FAMILIES.get(type(base))
    if family is None or getattr(base, "missing", None) is not None:
        return fn.log_prob(value)
    dims = event_dim + family.trailing
    parameters = {name: _narrow(getattr(base, name), dims) for name in family.parameters}
    points = max(p.shape[0] for p in parameters.values())
    per_point = all(p.dim() == dims + 2 and p.shape[1] == 1 for p in parameters.values())
    constant = all(parameters[name].shape[0] == 1 for name in family.fixed)
    if value.dim() == event_dim + 1 and per_point and constant and points > 1:
        event = value.shape[1:]
        x = value if missing is None else torch.where(missing, torch.nan, value)
        x = x.reshape(len(value), -1)
        flat = []
        for name, p in parameters.items():
            rows = 1 if name in family.fixed else points
            p = p[:, 0].expand(rows, *event, *p.shape[2 + event_dim :])
            flat.append(p.reshape(rows, x.shape[1], *p.shape[1 + event_dim :]))
        eta, normalizer, statistics, base_measure = family.terms(x, *flat)
        if missing is None:
            return eta @ statistics.T - normalizer.sum(-1)[:, None] + base_measure.sum(-1)
        seen = (~x.isnan()).to(x.dtype)
        statistics = torch.where(statistics.isnan(), 0.0, statistics)
        return eta @ statistics.T - normalizer @ seen.T + base_measure.nansum(-1)
    if missing is not None or base.event_dim:
        return fn.log_prob(value)
    narrow = type(base)(**parameters, validate_args=False)
    log_prob = narrow.log_prob(value)
    return log_prob.flatten(log_prob.dim() - event_dim).sum(-1) if event_dim else log_prob


def _columns(fn: Columns, value: Tensor, missing: Tensor | None, inside: float | Tensor | None) -> Tensor:
    """Return the sum over the groups of columns, each by its own formula."""
    total: Tensor | float = 0.0
    for index, p in fn.parts:
        if missing is not None:
            p = Incomplete(p, missing[..., index], inside[index] if isinstance(inside, Tensor) else inside or 0.0)
        total = total + shared_log_prob(p, value[..., index])
    assert isinstance(total, Tensor)  # there is at least one column
    return total


def _narrow(parameter: Tensor, event_dim: int) -> Tensor:
    """Undo the expansion of a parameter along its batch dimensions (zero strides), and make it (G or 1, N or 1, *event)."""
    batch = parameter.dim() - event_dim
    for dim in range(batch):
        if parameter.stride(dim) == 0 and parameter.shape[dim] > 1:
            parameter = parameter.narrow(dim, 0, 1)
    return parameter[(None,) * (2 - batch)] if batch < 2 else parameter
