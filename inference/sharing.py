"""Log densities of every datum at the same latent points, by one matrix product where the likelihood allows it.

For an exponential family, log p(x|z) = <T(x), eta(z)> - A(z) + h(x): with G points and N data this is a (G, k) by (k, N)
product instead of G x N evaluations. It needs parameters that do not depend on the datum; Pyro's plates expand them as
views, so a zero stride along the data dimension shows that they do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.nn.functional import softplus

EXACT = 50.0  # beyond which softplus(x) is x in double precision

Terms = tuple[Tensor, Tensor, Tensor, Tensor]  # eta (G, k), A (G,), T (N, k), h (N,)

PARAMETERS: dict[type, tuple[str, ...]] = {dist.Bernoulli: ("logits",), dist.Normal: ("loc", "scale")}


def _bernoulli(x: Tensor, logits: Tensor) -> Terms:
    return logits, softplus(logits, threshold=EXACT).sum(-1), x, x.new_zeros(len(x))


def _normal(x: Tensor, loc: Tensor, scale: Tensor) -> Terms:
    centre = x.mean(0)  # keeps the two large terms of the quadratic from cancelling
    x, loc = x - centre, loc - centre
    precision = scale.square().reciprocal()
    eta = torch.cat([loc * precision, -0.5 * precision], -1)
    normalizer = (0.5 * loc.square() * precision + scale.log() + 0.5 * math.log(2 * math.pi)).sum(-1)
    return eta, normalizer, torch.cat([x, x.square()], -1), x.new_zeros(len(x))


FAMILIES: dict[type, Callable[..., Terms]] = {dist.Bernoulli: _bernoulli, dist.Normal: _normal}


def log_prob(fn: TorchDistribution, value: Tensor) -> Tensor:
    """Return fn.log_prob(value), by the shorter of two equal formulas where torch's own is slow under vmap."""
    base = fn
    while isinstance(base, dist.Independent):
        base = base.base_dist
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
    while isinstance(base, dist.Independent):
        base = base.base_dist
    names = PARAMETERS.get(type(base))
    if names is None or base.event_dim != 0:
        return fn.log_prob(value)
    parameters = [_narrow(getattr(base, name), event_dim) for name in names]
    data_only = value.dim() == event_dim + 1
    per_point = all(p.dim() == event_dim + 2 and p.shape[1] == 1 for p in parameters)
    if data_only and per_point and any(p.shape[0] > 1 for p in parameters):
        x = value.reshape(len(value), -1)
        points = max(p.shape[0] for p in parameters)
        flat = [p[:, 0].expand(points, *value.shape[1:]).reshape(points, -1) for p in parameters]
        eta, normalizer, statistics, base_measure = FAMILIES[type(base)](x, *flat)
        return eta @ statistics.T - normalizer[:, None] + base_measure
    narrow = type(base)(**dict(zip(names, parameters, strict=True)), validate_args=False)
    log_prob = narrow.log_prob(value)
    return log_prob.flatten(log_prob.dim() - event_dim).sum(-1) if event_dim else log_prob


def _narrow(parameter: Tensor, event_dim: int) -> Tensor:
    """Undo the expansion of a parameter along its batch dimensions (zero strides), and make it (G or 1, N or 1, *event)."""
    batch = parameter.dim() - event_dim
    for dim in range(batch):
        if parameter.stride(dim) == 0 and parameter.shape[dim] > 1:
            parameter = parameter.narrow(dim, 0, 1)
    return parameter[(None,) * (2 - batch)] if batch < 2 else parameter
