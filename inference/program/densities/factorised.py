"""Log densities of every datum at the same latent points, by one matrix product if the likelihood allows it.

For an exponential family, log p(x|z) = <T(x), eta(z)> - A(z) + h(x): with G points and N data this is a (G, k) by (k, N)
product instead of G x N evaluations. Where entries are missing, their statistics and their parts of A are left out:

    log p(x_seen|z) = <m T(x), eta(z)> - <m, A(z)> + <m, h(x)>,  m = 1 where an entry is present, else 0

The result is not yet multiplied out (`bilinear`), and T and h are reused if they are known.

The parameters must not depend on the datum. Pyro's plates expand such parameters as views, so that their stride along the
data dimension is zero; this is how they are recognised.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions.utils import clamp_probs, probs_to_logits
from torch.nn.functional import logsigmoid, softplus

from elbowroom.inference.program.densities.bilinear import Bilinear, Factor
from elbowroom.models.likelihoods.binary import Grey
from elbowroom.models.likelihoods.categorical import Codes
from elbowroom.models.likelihoods.continuous import OpenBeta
from elbowroom.models.likelihoods.missing import Incomplete
from elbowroom.models.likelihoods.mixed import Columns
from elbowroom.models.likelihoods.multinomial import Composition

EXACT = 50.0  # above this, softplus(x) is x in double precision
SOME = 1024  # a sample of this many data gives the mean

Statistics = Callable[[Tensor], tuple[Tensor, Tensor]]  # x (N, D) to T (N, k) and h (N, ...), NaN where x is NaN
Terms = tuple[Tensor, Tensor, Statistics]  # eta (G, k), A (G, D), and the function of the data


@dataclass(frozen=True)
class ExponentialFamily:
    """An exponential family, in the parameters of its distribution.

    Attributes:
        terms: from a sample of the data (n, D), NaN where missing, and parameters (G or 1, D, ...), makes eta, A, and the
            function x -> T, h. That function may depend on the sample and on parameters of one row.
        parameters: names of the parameters.
        fixed: the parameters that may not depend on z.
        trailing: dimensions of a parameter beyond those of the data.
    """

    terms: Callable[..., Terms]
    parameters: tuple[str, ...]
    fixed: tuple[str, ...] = ()
    trailing: int = 0


def _itself(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, x.new_zeros(len(x), 1)


def _bernoulli(some: Tensor, logits: Tensor) -> Terms:
    return logits, softplus(logits, threshold=EXACT), _itself


def _continuous_bernoulli(some: Tensor, logits: Tensor) -> Terms:
    at_zero = Grey(logits=logits, validate_args=False).log_prob(torch.zeros_like(logits))
    return logits, -at_zero, _itself


def _normal(some: Tensor, loc: Tensor, scale: Tensor) -> Terms:
    centre = some.nanmean(0).nan_to_num(0.0)  # avoids cancellation in the quadratic
    loc = loc - centre
    precision = scale.square().reciprocal()
    normalizer = 0.5 * loc.square() * precision + scale.log() + 0.5 * math.log(2 * math.pi)
    if len(precision) == 1:  # the square has no factor that depends on z
        return loc * precision, normalizer, lambda x: (x - centre, -0.5 * precision * (x - centre).square())
    eta = torch.cat([(loc * precision).expand_as(normalizer), -0.5 * precision], -1)
    return eta, normalizer, lambda x: (torch.cat([x - centre, (x - centre).square()], -1), x.new_zeros(len(x), 1))


def _log_normal(some: Tensor, loc: Tensor, scale: Tensor) -> Terms:
    eta, normalizer, of_log = _normal(some.log(), loc, scale)

    def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
        log = x.log()
        t, h = of_log(log)
        return t, h - log

    return eta, normalizer, statistics


def _gamma(some: Tensor, concentration: Tensor, rate: Tensor) -> Terms:
    normalizer = concentration.lgamma() - concentration * rate.log()
    if len(concentration) == 1:  # the logarithm has no factor that depends on z
        return -rate, normalizer, lambda x: (x, (concentration - 1) * x.log())
    eta = torch.cat([concentration, -rate.expand_as(normalizer)], -1)
    return eta, normalizer, lambda x: (torch.cat([x.log(), x], -1), -x.log())


def _beta(some: Tensor, concentration1: Tensor, concentration0: Tensor) -> Terms:
    normalizer = concentration1.lgamma() + concentration0.lgamma() - (concentration1 + concentration0).lgamma()

    def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([x.log(), (-x).log1p()], -1)
        return both, -both

    return torch.cat(torch.broadcast_tensors(concentration1, concentration0), -1), normalizer, statistics


def _poisson(some: Tensor, rate: Tensor) -> Terms:
    eta = rate.log().clamp_min(torch.finfo(rate.dtype).min)  # 0 x log 0 is 0
    return eta, rate, lambda x: (x, -(x + 1).lgamma())


def _binomial(some: Tensor, total_count: Tensor, logits: Tensor) -> Terms:
    def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
        return x, (total_count + 1).lgamma() - (x + 1).lgamma() - (total_count - x + 1).lgamma()

    return logits, total_count * softplus(logits, threshold=EXACT), statistics


def _negative_binomial(some: Tensor, total_count: Tensor, logits: Tensor) -> Terms:
    def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
        return x, (total_count + x).lgamma() - (x + 1).lgamma() - total_count.lgamma()

    return logsigmoid(logits), -total_count * logsigmoid(-logits), statistics


def _codes(some: Tensor, logits: Tensor) -> Terms:
    def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
        one_hot = (x[..., None] == torch.arange(logits.shape[-1], device=x.device)).to(x.dtype)  # zero where x is NaN
        return one_hot.flatten(1), x.new_zeros(len(x), 1)

    return logits.flatten(1), torch.zeros_like(logits[..., 0]), statistics


def _composition(some: Tensor, logits: Tensor) -> Terms:
    def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.cat([(x.sum(-1, keepdim=True) + 1).lgamma(), -(x + 1).lgamma()], -1)

    return logits.log_softmax(-1), torch.zeros_like(logits), statistics


FAMILIES: dict[type, ExponentialFamily] = {
    dist.Bernoulli: ExponentialFamily(_bernoulli, ("logits",)),
    Grey: ExponentialFamily(_continuous_bernoulli, ("logits",)),
    dist.Normal: ExponentialFamily(_normal, ("loc", "scale")),
    dist.LogNormal: ExponentialFamily(_log_normal, ("loc", "scale")),
    dist.Gamma: ExponentialFamily(_gamma, ("concentration", "rate")),
    OpenBeta: ExponentialFamily(_beta, ("concentration1", "concentration0")),
    dist.Poisson: ExponentialFamily(_poisson, ("rate",)),
    dist.Binomial: ExponentialFamily(_binomial, ("total_count", "logits"), fixed=("total_count",)),
    dist.NegativeBinomial: ExponentialFamily(_negative_binomial, ("total_count", "logits"), fixed=("total_count",)),
    Codes: ExponentialFamily(_codes, ("logits",), trailing=1),
    Composition: ExponentialFamily(_composition, ("logits",)),
}

BINARY = (dist.Bernoulli, dist.Binomial, dist.NegativeBinomial)  # probabilities of two outcomes


def log_prob(fn: TorchDistribution, value: Tensor) -> Tensor:
    """Return fn.log_prob(value), by an equal formula where torch's own is slow or fails under vmap."""
    base = fn
    while isinstance(base, dist.Independent):
        base = base.base_dist
    if type(base) is dist.Multinomial:  # torch's own indexes by a mask, and computes log x! again for every draw of z
        logits = base.logits.clamp_min(torch.finfo(base.logits.dtype).min)  # 0 x log 0 is 0
        terms = (value.sum(-1) + 1).lgamma() - (value + 1).lgamma().sum(-1) + (value * logits).sum(-1)
        return terms.flatten(terms.dim() - (fn.event_dim - 1)).sum(-1) if fn.event_dim > 1 else terms
    if type(base) is not dist.Bernoulli:
        return fn.log_prob(value)
    if "logits" in base.__dict__:
        terms = value * base.logits - softplus(base.logits, threshold=EXACT)
    else:  # torch's own makes logits of the probabilities, and then a cross entropy of these
        p = clamp_probs(base.probs)
        terms = value * p.log() + (1 - value) * (-p).log1p()
    return terms.flatten(terms.dim() - fn.event_dim).sum(-1) if fn.event_dim else terms


def shared_log_prob(fn: TorchDistribution, value: Tensor) -> Tensor | Bilinear:
    """Return fn.log_prob(value), broadcastable to (G, N); a `Bilinear` where it factorises.

    fn has batch shape (G, N), (G, 1) or (N,), and parameters that may be expanded views; value holds latent values
    (G, 1, *event) or data (N, *event).
    """
    if isinstance(fn, Incomplete):
        return _shared(fn, fn.base, value, fn.missing, (value, fn.missing))
    return _shared(fn, fn, value, None, (value,))


def _shared(
    fn: TorchDistribution, base: TorchDistribution, value: Tensor, missing: Tensor | None, sources: tuple[Any, ...]
) -> Tensor | Bilinear:
    if isinstance(base, Columns):
        return _columns(fn, base, value, missing, sources)
    event_dim = fn.event_dim
    while isinstance(base, dist.Independent):
        base = base.base_dist
    family = FAMILIES.get(type(base))
    if family is None or getattr(base, "missing", None) is not None:
        return fn.log_prob(value)
    dims = event_dim + family.trailing
    parameters = {name: _parameter(base, name, dims) for name in family.parameters}
    points = max(p.shape[0] for p in parameters.values())
    per_point = all(p.dim() == dims + 2 and p.shape[1] == 1 for p in parameters.values())
    constant = all(parameters[name].shape[0] == 1 for name in family.fixed)
    if value.dim() == event_dim + 1 and per_point and constant and points > 1:
        return _product(family, value, missing, list(parameters.values()), points, sources)
    if missing is not None or base.event_dim:
        return fn.log_prob(value)
    narrow = type(base)(**parameters, validate_args=False)
    log_prob = narrow.log_prob(value)
    return log_prob.flatten(log_prob.dim() - event_dim).sum(-1) if event_dim else log_prob


def _product(
    family: ExponentialFamily,
    value: Tensor,
    missing: Tensor | None,
    parameters: list[Tensor],
    points: int,
    sources: tuple[Any, ...],
) -> Bilinear:
    """Return <T(x), eta(z)> - A(z) + h(x) for data (N, *event) and parameters (G or 1, 1, *event, ...).

    `missing` is True where an entry is missing, broadcastable to the data; `sources` are the origins of data and mask.
    """
    event = value.shape[1:]

    def data(step: int) -> Tensor:
        x = value[::step].flatten(1) if event else value[::step, None]
        if missing is None:
            return x
        gone = missing.expand_as(value)[::step].reshape(x.shape)
        return torch.where(gone, torch.nan, x)

    flat = []
    for p in parameters:
        p = p[:, 0].expand(len(p), *event, *p.shape[2 + len(event) :])
        flat.append(p.flatten(1, len(event)) if event else p[:, None])
    eta, normalizer, statistics = family.terms(data(-(-len(value) // SOME)), *flat)
    eta, normalizer = eta.expand(points, -1), normalizer.expand(points, -1)
    sources = (family, *sources, *(p for p in flat if len(p) == 1))
    if missing is None:

        def complete() -> tuple[Tensor, Tensor]:
            t, h = statistics(data(1))
            return t, h.sum(-1)

        return Bilinear((Factor(eta, sources, complete),), point=-normalizer.sum(-1, keepdim=True))

    def seen() -> tuple[Tensor, Tensor]:
        x = data(1)
        t, h = statistics(x)
        return torch.cat([torch.where(t.isnan(), 0.0, t), (~x.isnan()).to(t.dtype)], 1), h.nansum(-1)

    return Bilinear((Factor(torch.cat([eta, -normalizer], 1), sources, seen),))


def _columns(fn: TorchDistribution, base: Columns, value: Tensor, missing: Tensor | None, sources: tuple[Any, ...]) -> Bilinear:
    """Return the sum over the groups of columns, each by its own formula."""
    inside = fn.inside if isinstance(fn, Incomplete) else 0.0
    total = Bilinear()
    for index, p in base.parts:
        of_part = None if missing is None else missing[..., index]
        part: TorchDistribution = p
        if of_part is not None:
            part = Incomplete(p, of_part, inside[index] if isinstance(inside, Tensor) else inside)
        total = total + _shared(part, p, value[..., index], of_part, (*sources, index))
    return total


def _parameter(base: Any, name: str, dims: int) -> Tensor:
    """Return a parameter, narrowed; logits of given probabilities are made after narrowing, not for every datum again."""
    if name == "logits" and type(base) in BINARY and name not in base.__dict__:
        logits: Tensor = probs_to_logits(_narrow(base.probs, dims), is_binary=True)
        return logits
    return _narrow(getattr(base, name), dims)


def _narrow(parameter: Tensor, event_dim: int) -> Tensor:
    """Undo the expansion of a parameter along its batch dimensions (zero strides), and make it (G or 1, N or 1, *event)."""
    batch = parameter.dim() - event_dim
    for dim in range(batch):
        if parameter.stride(dim) == 0 and parameter.shape[dim] > 1:
            parameter = parameter.narrow(dim, 0, 1)
    return parameter[(None,) * (2 - batch)] if batch < 2 else parameter
