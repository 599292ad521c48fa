"""Latents on the sphere S^(d-1) = {z in R^d: |z| = 1}: the map onto it, and two distributions. Densities are per area.

The map takes u in R^m, m = d - 1, to the point at the angle theta from the last axis in the direction of u:

    z = (sin theta u / |u|, cos theta),   tan^2(theta / 2) = c (e^y - 1),   y = |u|^2 / m

It is smooth; u = 0 is the last axis, and the opposite point alone is left out. c puts the equator at the median of |u| under
N(0, I_m). The uniform distribution of z is then nearly N(0, I_m) of u (KL below 0.02 nats up to d = 64; exactly N(0, I_2) for
d = 3), so that quadrature meets light tails, and Hamiltonian Monte Carlo unit scales. With t = e^-y, f = (1 - t) / y and
D = t + c (1 - t):

    z_j = 2 u_j sqrt(c f t / m) / D,   z_d = (t - c (1 - t)) / D
    log |dz / du| = m log 2 + m/2 log(c / m) + (m - 2)/2 log f - |u|^2 / 2 - m log D
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import scipy.special
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions import Transform
from torch.distributions.constraints import independent, real

NODES = 200  # of the von Mises-Fisher normaliser
MOST_CONCENTRATED = 1000.0  # largest concentration for which they suffice
_SERIES = 0.05  # below it (1 - e^-y) / y and log(1 + x) / x are computed by their series


class OntoSphere(Transform):
    """The smooth map from R^m onto the sphere in R^(m + 1) without one point; the module gives the formula."""

    domain = independent(real, 1)
    codomain = constraints.sphere
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OntoSphere)

    def with_cache(self, cache_size: int = 1) -> OntoSphere:
        """Return the map with a cache of its latest value."""
        return self if self._cache_size == cache_size else OntoSphere(cache_size=cache_size)

    def _call(self, x: Tensor) -> Tensor:
        m = x.shape[-1]
        y, t, f = self._parts(x)
        c = equator(m)
        rest = c * y * f  # c (1 - t)
        head = 2 * math.sqrt(c / m) * (f.sqrt() * (-y / 2).exp() / (t + rest)) * x
        return torch.cat([head, (t - rest) / (t + rest)], -1)

    def _inverse(self, y: Tensor) -> Tensor:
        head, last = y[..., :-1], y[..., -1:]
        m = head.shape[-1]
        c, north = equator(m), last > 0
        least = torch.finfo(y.dtype).tiny
        # at the point that is left out the direction is lost, and the first axis is taken
        first = (torch.arange(m, device=y.device) == 0).to(head) * least
        head = torch.where(~north & (head.abs().amax(-1, keepdim=True) < least), first, head)
        # tan(theta / 2) = |head| / (1 + last) = (1 - last) / |head|
        x = head.square().sum(-1, keepdim=True) / torch.where(north, 1 + last, 1.0).square() / c
        near = (m / c * _log1p_ratio(torch.where(north, x, 1.0))).sqrt() / torch.where(north, 1 + last, 1.0)
        far = torch.where(north, 1.0, head)
        top = far.detach().abs().amax(-1, keepdim=True)  # divided out: the square of a small number is 0
        length = top * torch.linalg.vector_norm(far / top, dim=-1, keepdim=True)
        log_x = 2 * (torch.where(north, 0.0, -last).log1p() - length.log()) - math.log(c)
        y = torch.nn.functional.softplus(log_x, threshold=40)  # log(1 + x)
        return torch.where(north, head * near, far / length * (m * y).sqrt())

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the log of the area at z per volume at u."""
        m = x.shape[-1]
        c = equator(m)
        scaled, t, f = self._parts(x)
        each = (m - 2) / 2 * f.log() - m * ((t + c * scaled * f).log() + scaled / 2)
        return each.squeeze(-1) + m * math.log(2) + m / 2 * math.log(c / m)

    @staticmethod
    def _parts(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return y = |u|^2 / m, t = e^-y and f = (1 - t) / y, each (..., 1)."""
        y = u.square().mean(-1, keepdim=True)
        return y, (-y).exp(), _expm1_ratio(y)

    def forward_shape(self, shape: Any) -> torch.Size:
        """Return the shape of z for u of a shape."""
        return torch.Size(shape[:-1]) + (shape[-1] + 1,)

    def inverse_shape(self, shape: Any) -> torch.Size:
        """Return the shape of u for z of a shape."""
        return torch.Size(shape[:-1]) + (shape[-1] - 1,)


@cache
def equator(m: int) -> float:
    """Return c, with which the median of |u| under N(0, I_m) is mapped to the equator."""
    return 1 / math.expm1(2 * float(scipy.special.gammaincinv(m / 2, 0.5)) / m)


def _expm1_ratio(y: Tensor) -> Tensor:
    """Return (1 - e^-y) / y for y >= 0, with all derivatives."""
    small, large = y.clamp_max(_SERIES), torch.where(y > _SERIES, y, 1.0)
    series = torch.ones_like(small)
    for k in range(8, 1, -1):
        series = 1 - small / k * series
    return torch.where(y > _SERIES, -torch.expm1(-large) / large, series)


def _log1p_ratio(x: Tensor) -> Tensor:
    """Return log(1 + x) / x for x >= 0, with all derivatives."""
    small, large = x.clamp_max(_SERIES), torch.where(x > _SERIES, x, 1.0)
    series = torch.full_like(small, 1 / 12)
    for k in range(11, 0, -1):
        series = 1 / k - small * series
    return torch.where(x > _SERIES, torch.log1p(large) / large, series)


def log_area(d: int) -> float:
    """Return the log area of the sphere in R^d, log 2 pi^(d/2) / Gamma(d/2)."""
    return math.log(2) + d / 2 * math.log(math.pi) - math.lgamma(d / 2)


def unit(x: Tensor) -> Tensor:
    """Return x / |x| (..., d), the last axis where x is 0."""
    last = (torch.arange(x.shape[-1], device=x.device) == x.shape[-1] - 1).to(x)
    largest = x.abs().amax(-1, keepdim=True).detach()  # divided out first: the square of a small number is 0
    x = torch.where(largest > 0, x / torch.where(largest > 0, largest, 1.0), last)
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def great_circle(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Return points (T, d) on the shorter arc from the direction of a (d,) to that of b, at shares t (T,) of its length."""
    a, b = unit(a), unit(b)
    across = b - (a * b).sum() * a
    first = torch.zeros_like(a).index_fill(0, a.abs().argmin(), 1.0)  # opposite points: any half circle will do
    across = across if float(across.norm()) > 1e-6 else first - (a * first).sum() * a
    angle = t[:, None] * torch.atan2((b - (a * b).sum() * a).norm(), (a * b).sum())
    return unit(angle.cos() * a + angle.sin() * unit(across))


def at_least_two(latent_dim: int) -> None:
    """Raise a ValueError where there is no sphere."""
    if latent_dim < 2:
        raise ValueError(f"latent_dim: a point of the sphere has at least 2 coordinates, got {latent_dim}; use 2 or more")


class VonMisesFisher(TorchDistribution):
    """p(z) = exp(eta'z) / C(|eta|): mean direction eta / |eta|, concentration |eta|, at most 1000; uniform at eta = 0.

    log C(k) = log |S^(d-2)| + log int_-1^1 exp(k t) (1 - t^2)^((d-3)/2) dt, by Gauss-Jacobi quadrature. Its closed form,
    (2 pi)^(d/2) I_(d/2-1)(k) / k^(d/2-1), needs a Bessel function that torch lacks. Draws are by rejection from a transformed
    beta distribution (Wood 1994, https://doi.org/10.1080/03610919408813161), without a gradient.
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.sphere
    has_rsample = False

    def __init__(self, eta: Tensor) -> None:
        self.eta = eta
        super().__init__(eta.shape[:-1], eta.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> VonMisesFisher:
        """Return the distribution with another batch shape."""
        return VonMisesFisher(self.eta.expand(*batch_shape, self.eta.shape[-1]))

    @property
    def concentration(self) -> Tensor:
        """|eta|, whose gradient at 0 is 0."""
        return self.eta.square().sum(-1).clamp_min(torch.finfo(self.eta.dtype).tiny).sqrt()

    @property
    def mean(self) -> Tensor:
        """E z."""
        t, log_weight = (part.to(self.eta) for part in _nodes(self.eta.shape[-1]))
        share = (log_weight + self.concentration[..., None] * t).softmax(-1)
        return (share * t).sum(-1, keepdim=True) * unit(self.eta)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return eta'z - log C(|eta|)."""
        return (self.eta * value).sum(-1) - log_von_mises_fisher(self.concentration, self.eta.shape[-1])

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw z."""
        shape, m = torch.Size(sample_shape) + self.eta.shape, self.eta.shape[-1] - 1
        with torch.no_grad():
            kappa = self.concentration.expand(shape[:-1])
            b = m / (2 * kappa + (4 * kappa.square() + m * m).sqrt())
            peak = (1 - b) / (1 + b)
            least = kappa * peak + m * (1 - peak.square()).log()
            half = torch.full_like(kappa, m / 2)
            beta = torch.distributions.Beta(half, half, validate_args=False)
            t, left = torch.zeros_like(kappa), torch.ones_like(kappa, dtype=torch.bool)
            while bool(left.any()):  # at least every third proposal is accepted
                drawn = beta.sample()
                proposed = (1 - (1 + b) * drawn) / (1 - (1 - b) * drawn)
                excess = kappa * proposed + m * torch.log1p(-peak * proposed) - least
                accepted = left & (excess >= torch.rand_like(excess).log())
                t, left = torch.where(accepted, proposed, t), left & ~accepted
            mu = unit(self.eta).expand(shape)
            across = torch.randn_like(mu)
            across = across - (across * mu).sum(-1, keepdim=True) * mu
            t = t[..., None]
            return unit(t * mu + (1 - t.square()).clamp_min(0).sqrt() * unit(across))


@cache
def _nodes(d: int) -> tuple[Tensor, Tensor]:
    """Return nodes t and log weights, (NODES,) each, for integrals over the sphere in R^d of functions of one coordinate."""
    nodes, weights = scipy.special.roots_jacobi(NODES, (d - 3) / 2, (d - 3) / 2)
    with np.errstate(divide="ignore"):
        return torch.from_numpy(nodes), torch.from_numpy(np.log(weights)) + log_area(d - 1)


def log_von_mises_fisher(concentration: Tensor, d: int) -> Tensor:
    """Return log C(k), the log of the integral of exp(k t) over the sphere in R^d, t one of the coordinates; k <= 1000."""
    t, log_weight = (part.to(concentration) for part in _nodes(d))
    return concentration + torch.logsumexp(log_weight + concentration[..., None] * (t - 1), -1)


class PowerSpherical(TorchDistribution):
    """q(z) = (1 + mu'z)^k / N, log N = (a + b) log 2 + b log pi + log Gamma(a) - log Gamma(a + b), b = (d - 1)/2, a = b + k.

    De Cao and Aziz 2020, https://arxiv.org/abs/2006.04437. (1 + mu'z) / 2 ~ Beta(a, b). A draw takes n ~ N(0, I_(d-1)) and
    g ~ Gamma(a, 1): with h = |n|^2 / 2, z = ((g - h) mu + sqrt(2 g) n) / (g + h), n being turned into the space across mu by
    a Householder reflection. It is differentiable in mu and k.
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.sphere
    has_rsample = True

    def __init__(self, loc: Tensor, concentration: Tensor) -> None:
        batch = torch.broadcast_shapes(loc.shape[:-1], concentration.shape)
        self.loc, self.concentration = loc.expand(*batch, -1), concentration.expand(batch)
        super().__init__(batch, loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> PowerSpherical:
        """Return the distribution with another batch shape."""
        batch = torch.Size(batch_shape)
        return PowerSpherical(self.loc.expand(*batch, self.loc.shape[-1]), self.concentration.expand(batch))

    @property
    def _shapes(self) -> tuple[Tensor, float]:
        """Return a and b of the beta distribution of (1 + mu'z) / 2."""
        b = (self.loc.shape[-1] - 1) / 2
        return self.concentration + b, b

    @property
    def mean(self) -> Tensor:
        """E z = mu (a - b) / (a + b)."""
        a, b = self._shapes
        return (self.concentration / (a + b))[..., None] * self.loc

    @property
    def variance(self) -> Tensor:
        """Var z_j, (..., d)."""
        a, b = self._shapes
        along = (4 * a * b / ((a + b).square() * (a + b + 1)))[..., None]
        across = (2 * a / ((a + b) * (a + b + 1)))[..., None]  # E(1 - t^2) / (d - 1)
        return along * self.loc.square() + across * (1 - self.loc.square()).clamp_min(0)

    def entropy(self) -> Tensor:
        """Return log N - k (log 2 + digamma(a) - digamma(a + b))."""
        a, b = self._shapes
        return -self._at_mode() - self.concentration * (a.digamma() - (a + b).digamma())

    def _at_mode(self) -> Tensor:
        """Return log q(mu) = k log 2 - log N, without the difference of large numbers."""
        a, b = self._shapes
        return log_gamma_ratio(a, self.loc.shape[-1] - 1) - b * math.log(4 * math.pi)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return k log(1 + mu'z) - log N, with 1 + mu'z from |z - mu| or |z + mu|, whichever loses no digits."""
        numbers = torch.finfo(value.dtype)
        near = (value - self.loc).square().sum(-1) / 4
        far = ((value + self.loc).square().sum(-1) / 4).clamp_min(numbers.tiny)
        log_half = torch.where(near < 0.5, torch.log1p(-near.clamp_max(0.5)), far.clamp_max(1.0).log())
        return self.concentration * log_half + self._at_mode()

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw z, differentiable in loc and concentration."""
        shape = torch.Size(sample_shape) + self.loc.shape
        a, _ = self._shapes
        normal = torch.randn(*shape[:-1], shape[-1] - 1, dtype=self.loc.dtype, device=self.loc.device)
        g = torch.distributions.Gamma(a, torch.ones_like(a), validate_args=False).rsample(torch.Size(sample_shape))[..., None]
        h = normal.square().sum(-1, keepdim=True) / 2
        t = (g - h) / (g + h)
        return t * self.loc + self._turned((2 * g).sqrt() / (g + h) * normal)

    def _turned(self, v: Tensor) -> Tensor:
        """Reflect (v, 0) in the hyperplane that swaps the last axis and mu, or minus mu: the result is orthogonal to mu."""
        sign = torch.where(self.loc[..., -1:] > 0, -1.0, 1.0)  # away from mu: no digits are lost
        axis = torch.cat([sign * self.loc[..., :-1], sign * self.loc[..., -1:] - 1], -1)
        inner = (v * axis[..., :-1]).sum(-1, keepdim=True)
        flat = torch.cat([v, torch.zeros_like(inner)], -1)
        return flat - 2 * inner / axis.square().sum(-1, keepdim=True) * axis


def log_gamma_ratio(a: Tensor, n: int) -> Tensor:
    """Return log Gamma(a + n / 2) - log Gamma(a) for a >= 1/2, also where a is so large that the terms lose all digits."""
    half, whole = n % 2, n // 2
    out = torch.zeros_like(a)
    if half:  # Stirling's series of the ratio, ten steps further up
        x = a + 10
        inverse = x.reciprocal()
        square = inverse.square()
        series = (-1 / 8 + square * (1 / 192 + square * (-1 / 640 + square * (17 / 14336 - square * 31 / 18432)))) * inverse
        out = x.log() / 2 + series - sum(torch.log1p(0.5 / (a + j)) for j in range(10))
    return out + sum((a + half / 2 + j).log() for j in range(whole))
