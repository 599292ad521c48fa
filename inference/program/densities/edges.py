"""Latents near the edge of their support, where a constrained value rounds: densities and draws in unconstrained coordinates.

A sparse Beta or Dirichlet has much of its mass so near 0 or 1 that the value rounds: of Beta(.1, .1), 1.4 % on either side lie
beyond the last number below 1 in double precision, 20 % in single. The unconstrained coordinate u does not round there. So

    log p(z) + log |dz / du|      is computed from u where the family is known (`density`), not from z
    z = T(u) on the simplex       by sums of logarithms (`LogStickBreaking`): each part has all its digits, however small
    u of a draw                   is drawn by logarithms of gamma variates (`draw`), not found from a rounded z

All else in a program reads z. Where that still matters, `saturated` tells where a value has rounded, and `Replay` may be given
values moved by a step of rounding to see what changes (`moved`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, Transform, biject_to
from torch.distributions.transforms import (
    ComposeTransform,
    ExpTransform,
    IndependentTransform,
    SigmoidTransform,
    StickBreakingTransform,
)
from torch.nn.functional import logsigmoid, softplus

from elbowroom.inference.program.sites import Site, has_edge, is_identity, is_sphere
from elbowroom.models.sphere import OntoSphere

BETA = (dist.Beta, torch.distributions.Beta)
DIRICHLET = (dist.Dirichlet, torch.distributions.Dirichlet)
GAMMA = (dist.Gamma, torch.distributions.Gamma)
CARRIED = (dist.TransformedDistribution, torch.distributions.TransformedDistribution)
FAR = 30.0  # log(1 + e^-x) is e^-x from here on
LOST = 1e-3  # relative difference of u and T^-1(T(u)) from which on u counts as lost


class LogStickBreaking(StickBreakingTransform):
    """torch's map from R^(K - 1) to the simplex, computed from logarithms in both directions.

    torch's own rounds the last parts to multiples of the machine epsilon, and finds a stick as 1 minus the parts before it.
    """

    def _call(self, x: Tensor) -> Tensor:
        return self.log(x).exp().clamp_min(torch.finfo(x.dtype).tiny)

    def _inverse(self, y: Tensor) -> Tensor:
        y = y.clamp_min(torch.finfo(y.dtype).tiny)
        after = y.flip(-1).cumsum(-1).flip(-1)[..., 1:]
        return y[..., :-1].log() - after.log() + _offset(after)

    def log(self, x: Tensor) -> Tensor:
        """Return log y of the K parts."""
        x = x - _offset(x)
        rest = logsigmoid(-x).cumsum(-1)
        before = torch.cat([torch.zeros_like(x[..., :1]), rest[..., :-1]], -1)
        return torch.cat([logsigmoid(x) + before, rest[..., -1:]], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return sum_j log y_j + log (1 - v_j) over the K - 1 sticks v_j."""
        return self.log(x)[..., :-1].sum(-1) + logsigmoid(_offset(x) - x).sum(-1)


def _offset(x: Tensor) -> Tensor:
    """Return log (K - 1), ..., log 1: u = 0 gives equal parts."""
    return torch.arange(x.shape[-1], 0, -1, dtype=x.dtype, device=x.device).log()


def bijection(support: Any) -> Transform:
    """Return the map from unconstrained coordinates onto a support: torch's `biject_to`, with logarithms on the simplex.

    torch knows no map onto the sphere: it is ours, which leaves out one point.

    Raises:
        NotImplementedError: none is known.
    """
    if is_sphere(support):
        wrapped = support.event_dim - 1
        return IndependentTransform(OntoSphere(), wrapped) if wrapped else OntoSphere()
    found: Transform = biject_to(support)
    if type(found) is StickBreakingTransform:
        return LogStickBreaking()
    if isinstance(found, IndependentTransform) and type(found.base_transform) is StickBreakingTransform:
        return IndependentTransform(LogStickBreaking(), found.reinterpreted_batch_ndims)
    return found


def density(fn: TorchDistribution, transform: Transform, u: Tensor) -> Tensor | None:
    """Return log p(z) + log |dz / du| of z = T(u), computed from u; None for families whose density can only be had at z."""
    base, to = _inner(fn), _innermost(transform)
    found: Tensor
    if type(base) in BETA and isinstance(to, SigmoidTransform):
        a, b = base.concentration1, base.concentration0
        found = a * logsigmoid(u) + b * logsigmoid(-u) + (a + b).lgamma() - a.lgamma() - b.lgamma()
    elif type(base) in DIRICHLET and isinstance(to, LogStickBreaking):
        a = base.concentration
        found = (a * to.log(u)).sum(-1) + a.sum(-1).lgamma() - a.lgamma().sum(-1)  # the Jacobian is the product of all parts
    elif type(base) in GAMMA and isinstance(to, ExpTransform):
        a, rate = base.concentration, base.rate
        found = a * (u + rate.log()) - rate * u.exp() - a.lgamma()
    elif type(base) is dist.Kumaraswamy and isinstance(to, SigmoidTransform):
        a, b = base.concentration1, base.concentration0
        log_t = torch.where(u > FAR, -u, softplus(-u.clamp_max(FAR)).log())  # t = -log z
        found = a.log() + b.log() + a * logsigmoid(u) + (b - 1) * _log_less(a.log() + log_t) + logsigmoid(-u)
    else:
        before = _before(base, to)
        if before is None:
            return None
        found = before.log_prob(u)
    surplus = fn.event_dim - base.event_dim
    return found.flatten(found.dim() - surplus).sum(-1) if surplus else found


def draw(fn: TorchDistribution, transform: Transform, size: torch.Size | None = None) -> Tensor | None:
    """Draw z = T(u) from a distribution and return u, which z could round; None for families that can only be drawn as z."""
    base, to, shape = _inner(fn), _innermost(transform), size or torch.Size()
    if type(base) in BETA and isinstance(to, SigmoidTransform):
        return _log_gamma(base.concentration1, shape) - _log_gamma(base.concentration0, shape)
    if type(base) in DIRICHLET and isinstance(to, LogStickBreaking):
        parts = _log_gamma(base.concentration, shape)
        after = parts.flip(-1).logcumsumexp(-1).flip(-1)[..., 1:]
        return parts[..., :-1] - after + _offset(after)
    if type(base) in GAMMA and isinstance(to, ExpTransform):
        return _log_gamma(base.concentration, shape) - base.rate.log()
    if type(base) is dist.Kumaraswamy and isinstance(to, SigmoidTransform):  # z^a = 1 - e^(-E / b), with E exponential
        a, b = base.concentration1, base.concentration0
        late = torch.empty(shape + a.shape).to(a).exponential_() / b
        log_t = torch.where(late > FAR, -late, (-_log_less(late.clamp_max(FAR).log())).log()) - a.log()  # t = -log z
        return -log_t.exp() - _log_less(log_t)
    before = _before(base, to)
    return None if before is None else before.sample(shape)


def _log_gamma(a: Tensor, shape: torch.Size) -> Tensor:
    """Draw the logarithm of gamma variates: log G(a) = log G(a + 1) - E / a, with E exponential."""
    larger = torch.distributions.Gamma(a + 1, torch.ones_like(a), validate_args=False).sample(shape)
    return larger.log() - torch.empty_like(larger).exponential_() / a


def _log_less(log_t: Tensor) -> Tensor:
    """Return log(1 - e^-t)."""
    t = log_t.exp()
    close, far = (-(-t.clamp(1e-7, 1.0)).expm1()).log(), torch.log1p(-(-t.clamp_min(1.0)).exp())
    return torch.where(t < 1e-7, log_t - t / 2, torch.where(t < 1, close, far))


def _before(base: Any, to: Transform) -> Distribution | None:
    """Return the distribution of u, where z is made from u by the site's own last map onto an interval, simplex or sphere."""
    if type(base) not in CARRIED or not isinstance(to, SigmoidTransform | StickBreakingTransform | OntoSphere):
        return None
    parts = _flat(base.transforms)
    if not parts or _innermost(parts[-1]) != to:
        return None
    rest = parts[:-1]
    if rest and not all(part.bijective for part in rest):
        return None
    if not rest:
        inner: Distribution = base.base_dist
        return inner
    return torch.distributions.TransformedDistribution(base.base_dist, rest, validate_args=False)


def _flat(transforms: Sequence[Transform]) -> list[Transform]:
    """Return the transforms in order, compositions taken apart and identity maps left out."""
    out: list[Transform] = []
    for part in transforms:
        out += _flat(part.parts) if isinstance(part, ComposeTransform) else [] if is_identity(part) else [part]
    return out


def _inner(fn: Any) -> Any:
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return fn


def _innermost(transform: Transform) -> Transform:
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    parts = _flat([transform])
    return parts[0] if len(parts) == 1 else transform


# -- where values have rounded ------------------------------------------------------------------------------------------------


def saturated(sites: Sequence[Site], z: Tensor) -> dict[str, Tensor]:
    """Return (S, N) by site, True where a constrained value was rounded to the edge of its support, z being (S, N, d).

    Such a value is the last before the edge, or u cannot be found from it again. Sites on a line or a sphere have no edge.
    """
    found = {}
    for site in sites:
        if site.transform is None or not has_edge(site.support) or site.columns.stop == site.columns.start:
            continue
        u = site.split(z)
        value = site.transform(u)
        off = (site.transform.inv(value) - u).abs()
        lost = _by_datum(site, ~(off <= LOST * (1 + u.abs())), site.free_event_dim)
        found[site.name] = lost | _by_datum(site, _last(_innermost(site.transform), u, value), site.event_dim)
    return found


def _last(to: Transform, u: Tensor, value: Tensor) -> Tensor:
    """Return where a value is the last one before an edge."""
    numbers = torch.finfo(value.dtype)
    if isinstance(to, SigmoidTransform):
        return (value <= numbers.tiny) | (value >= 1 - numbers.eps)
    if isinstance(to, ExpTransform | StickBreakingTransform):
        return ~((value > numbers.tiny) & (value < numbers.max))
    if isinstance(to, ComposeTransform) and isinstance(to.parts[0], SigmoidTransform):
        return u.abs() >= -math.log(2 * numbers.eps)
    return torch.zeros_like(value, dtype=torch.bool)


def _by_datum(site: Site, flag: Tensor, event_dim: int) -> Tensor:
    flag = flag.movedim(site.plate_dim - event_dim, 1)
    return flag.reshape(*flag.shape[:2], -1).any(-1)


def inward(sites: Sequence[Site], z: Tensor) -> Tensor:
    """Return z (S, N, d) with the coordinates of sites on an interval or half-line moved to where their values do not round."""
    out, numbers = z.clone(), torch.finfo(z.dtype)
    for site in sites:
        to = None if site.transform is None else _innermost(site.transform)
        first = to.parts[0] if isinstance(to, ComposeTransform) else to
        at = -math.log(8 * numbers.eps) if isinstance(first, SigmoidTransform) else math.log(numbers.max) - 1
        low = -at if isinstance(to, ComposeTransform) else math.log(numbers.tiny) + 1
        if isinstance(first, SigmoidTransform | ExpTransform):
            out[..., site.columns] = out[..., site.columns].clamp(low, at)
    return out


def moved(site: Site, value: Tensor) -> Tensor:
    """Return a value moved by a step of rounding, away from the edge that it is next to."""
    numbers = torch.finfo(value.dtype)
    to = _innermost(site.transform) if site.transform is not None else None
    if isinstance(to, ComposeTransform):
        middle = (to(torch.full_like(value, -torch.inf)) + to(torch.full_like(value, torch.inf))) / 2
        return value + (middle - value).sign() * (numbers.eps * value.abs()).clamp_min(numbers.tiny)
    small = value.abs() < math.sqrt(numbers.tiny)
    return torch.where(small, value + numbers.tiny, value - numbers.eps * value)
