"""The best normal of a family for every datum at once: q* = argmax_q L[q], L[q] = E_q[log p(x, z)] + H[q].

With z = m + R e and noise e that is fixed, antithetic and variance-matched (mean e = 0, mean e e' = I exactly), the objective

    F(m, R) = mean_s log p(x, m + R e_s) + log|R|

has, with g_s = grad log p at z_s, the whitened gradient b = mean R' g_s in m and -(tril(C) - I) in R, where
C = -mean (R' g_s) e_s' estimates the whitened expected curvature R' E_q[-hess log p] R (Stein's identity; exact for a quadratic
under matched noise). A Newton step moves m by rho R C^-1 b and the whitened precision I to (1 - rho) I + rho C (its diagonal,
for the diagonal family): on a normal posterior one step ends at q*, whatever the correlation. rho is reduced per datum until F
rises. The decrement, the remaining gain by the same quadratic model,

    full:      1/2 b' C^-1 b + 1/2 (tr C - log|C| - d)
    diagonal:  1/2 b' C^-1 b + 1/2 sum_j (C_jj - log C_jj - 1)

is in nats of the objective. It stops the climb, and twice its value on fresh noise is the reported shortfall; the factor two
allows for the change of curvature with q, which the quadratic model ignores.

Starts: the encoder's moments, and normals narrower than the prior at prior draws. The encoder's climbs first, on a few draws;
beyond a few dimensions the means of the other starts then move alone, in its metric and on fewer draws, and starts that come
to the same place climb no further. Fresh draws choose one start per datum; more draws refine it, until the shortfall on unused
noise is small; other draws score it.

All values are in nats, per datum. Opper and Archambeau 2009, Neural Computation 21 (the fixed point); Khan and Rue 2023,
JMLR 24 (its damped form).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from elbowroom.inference.mcmc.normals import Family, Normals, Refit, joined_refits, whiten
from elbowroom.inference.search.modes import ascend
from elbowroom.inference.search.noise import default_draws, from_eigen, matched_noise
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.system.memory import LARGE_ARRAY, fitting

Target = Callable[[Tensor], tuple[Tensor, Tensor]]

CURVATURE_FLOOR = 0.01  # lower limit of the whitened curvature in a step: scales grow at most tenfold
CONCAVE = 0.1  # lower limit of the whitened curvature where log p is not concave on average
SMALLEST_STEP = 1e-5
ARMIJO = 0.05
NARROW = 0.3  # scale of a start at a prior draw, in prior standard deviations
LOOSE = 0.02  # decrement (nats) at which the starts are compared
TIE = 1e-3  # nats within which the earlier start wins
CHEAP = 8  # dimensions up to which every start climbs
APPROACH, PAIRS = 32, 4  # steps of the means alone, and antithetic pairs of draws in each
SAME, SHARE = 4.0, 0.25  # squared distance, in the encoder's metric, of means at one place: up to this, or a share of d
GROWTH, ROUNDS = 4, 2  # factor of further noise, and rounds, for data with a shortfall due to noise
HALVINGS = 30
SAFETY = 2.0  # the quadratic model understates the remaining gain if a posterior is not normal


def refit(
    log_joint: LogJoint,
    *,
    family: Family = "full",
    starts: int = 3,
    also: Sequence[Normals] = (),
    draws: int | None = None,
    score_draws: int | None = None,
    tolerance: float | None = None,
    max_iterations: int = 60,
    seed: int = 0,
) -> Refit:
    """Find the best normal of a family for every datum.

    Args:
        log_joint: model and guide.
        family: `diagonal` or `full` covariance.
        starts: prior draws to start from, besides the encoder.
        also: further starts, e.g. the diagonal solution for the full family.
        draws: noise draws S of the refinement; default max(64, 10 d), at least 2 d.
        score_draws: draws of the ELBO; default max(128, S).
        tolerance: shortfall, in nats, up to which a datum counts as converged; data above it get more noise. Default 0.04, or
            0.004 d beyond ten dimensions.
        max_iterations: evaluations of the objective per stage.
        seed: random seed.

    Raises:
        ValueError: unknown family, or no continuous latent.
    """
    if family not in ("diagonal", "full"):
        raise ValueError(f"family must be 'diagonal' or 'full', got {family!r}")
    d = log_joint.dim
    if d == 0:
        raise ValueError("refit needs a continuous latent, this model has none")
    tolerance = 0.004 * max(10, d) if tolerance is None else tolerance
    blocks = log_joint.blocks(fitting((1 + starts + len(also)) * d * d, LARGE_ARRAY))
    if len(blocks) > 1:
        some = partial(refit, family=family, starts=starts, draws=draws, score_draws=score_draws, tolerance=tolerance)
        some = partial(some, max_iterations=max_iterations, seed=seed)
        return joined_refits([some(log_joint.subset(rows), also=[q.rows(rows) for q in also]) for rows in blocks])
    with torch.no_grad():
        return _Search(log_joint, family, draws or default_draws(d), max_iterations, seed).run(
            starts, also, score_draws, tolerance
        )


@dataclass
class _Point:
    """Normals N(loc, root root') and the objective there: value (P,), b (P, d), C (P, d, d), decrement (P,)."""

    loc: Tensor
    root: Tensor
    value: Tensor
    slope: Tensor
    curvature: Tensor
    decrement: Tensor

    def rows(self, index: Tensor) -> _Point:
        return _Point(**{name: value[index] for name, value in vars(self).items()})

    def put(self, index: Tensor, other: _Point) -> None:
        for name, value in vars(other).items():
            vars(self)[name][index] = value


class _Search:
    def __init__(self, log_joint: LogJoint, family: Family, draws: int, max_iterations: int, seed: int) -> None:
        self.joint, self.family, self.max_iterations, self.seed = log_joint, family, max_iterations, seed
        self.n, self.d, self.device = log_joint.n_obs, log_joint.dim, log_joint.device
        self.draws = 2 * max(self.d, (draws + 1) // 2)
        self.generator = torch.Generator(device=self.device).manual_seed(seed)
        self.iterations = 0
        self.rounding = 8 * torch.finfo(log_joint.dtype or log_joint.own_dtype).eps
        self.everyone = torch.arange(self.n, device=self.device)

    def run(self, starts: int, also: Sequence[Normals], score_draws: int | None, tolerance: float) -> Refit:
        """Climb all starts, choose, refine, measure the shortfall, score."""
        encoder = self._encoder()
        begin = [encoder, *self._prior_starts(starts), *(self._in_family(q) for q in also)]
        climbed = self._climb_all(begin)
        # fresh noise for the choice: the climb has overfitted its own noise
        alone = not bool(climbed.value[self.n :].isfinite().any())
        scored = climbed.value if alone else self._values(climbed, self._noise(max(32, 4 * self.d)))
        value = scored.reshape(len(begin), self.n)
        start = (value >= value.amax(0) - TIE).int().argmax(0)
        chosen = start * self.n + self.everyone
        best = Normals(climbed.loc[chosen], climbed.root[chosen])
        decrement = tolerance / SAFETY
        q = self._climb_and_step(best, self.everyone, self._noise(self.draws), decrement)
        check = self._until_unseen_noise_agrees(q, decrement)
        dead = ~(check.value.isfinite() & check.loc.isfinite().all(-1) & check.root.isfinite().all(-1).all(-1))
        loc = torch.where(dead[:, None], encoder.loc, check.loc)
        root = torch.where(dead[:, None, None], encoder.root, check.root)
        check = _Point(loc, root, check.value, check.slope, check.curvature, check.decrement.masked_fill(dead, torch.inf))
        elbo, error = self._score(check, score_draws or max(128, self.draws))
        shortfall = (SAFETY * check.decrement).masked_fill(~elbo.isfinite(), torch.inf)
        start = start.masked_fill(dead, 0)
        converged = shortfall <= tolerance
        return Refit(self.family, Normals(loc, root), elbo, error, shortfall, converged, start, self.iterations)

    # -- starts ---------------------------------------------------------------------------------------------------------

    def _climb_all(self, begin: Sequence[Normals]) -> _Point:
        """Climb from every start of all data, one start after the other; the value of those that came to one place is -inf."""
        noise, owner = self._noise(max(8, 4 * self.d)), self.everyone.repeat(len(begin))
        q = Normals(torch.cat([b.loc for b in begin]), torch.cat([b.root for b in begin]))
        if self.d <= CHEAP:  # moving the means first would cost as much
            return self._climb(q, owner, noise, LOOSE)
        first = self._climb(begin[0], self.everyone, noise, LOOSE)
        out = first.rows(owner)
        out.value[self.n :] = -torch.inf
        apart = self._apart(first, q.loc[self.n :], owner[self.n :]).nonzero()[:, 0] + self.n
        if len(apart):
            out.put(apart, self._climb(q.rows(apart), owner[apart], noise, LOOSE))
        return out

    def _apart(self, first: _Point, loc: Tensor, owner: Tensor) -> Tensor:
        """Move means (P, d) alone, in the metric of the first start; return which come to another place, (P,)."""
        usable = first.value.isfinite() & first.root.isfinite().flatten(1).all(-1)
        root = torch.where(usable[:, None, None], first.root, torch.eye(self.d, dtype=loc.dtype, device=self.device))[owner]
        half = torch.randn(PAIRS, self.d, dtype=loc.dtype, device=self.device, generator=self.generator)
        noise, target = torch.einsum("sj,pij->spi", torch.cat([half, -half]), root), self._target(owner)

        def height(u: Tensor) -> tuple[Tensor, Tensor]:
            log_p, gradient = target(loc + torch.einsum("pij,opj->opi", root, u) + noise)
            return log_p.double().mean(0, keepdim=True), torch.einsum("pij,spi->spj", root, gradient.double()).mean(
                0, keepdim=True
            )

        u, value, _ = ascend(height, torch.zeros_like(loc)[None], torch.ones_like(loc[0]), APPROACH)
        distance = (u + whiten(root, (loc - first.loc[owner])[None])).square().sum(-1)[0]
        return ~(distance <= max(SAME, SHARE * self.d)) | ~usable[owner] | ~value[0].isfinite()

    def _in_family(self, q: Normals) -> Normals:
        """Keep only the variances of q if the family is diagonal."""
        loc, root = q.loc.double(), q.root.double()
        return Normals(loc, root if self.family == "full" else torch.diag_embed(root.square().sum(-1).sqrt()))

    def _encoder(self) -> Normals:
        """Return the encoder's moments; N(0, I) where too few of its draws are finite."""
        z = self.joint.draw("guide", max(64, 10 * self.d), self.seed).double()
        good = z.isfinite().all(-1, keepdim=True)
        z = torch.where(good, z, 0.0)
        count = good.sum(0)
        mean = z.sum(0) / count.clamp_min(1)
        centred = torch.where(good, z - mean, 0.0)
        covariance = torch.einsum("snd,sne->nde", centred, centred) / (count - 1).clamp_min(1)[..., None]
        eye = torch.eye(self.d, dtype=z.dtype, device=z.device)
        usable = (count[:, 0, None] > self.d + 1) & (covariance.diagonal(dim1=-2, dim2=-1) > 1e-20)
        covariance = torch.where(usable.all(-1)[:, None, None], covariance, eye)
        return self._in_family(Normals.from_moments(mean, covariance))

    def _prior_starts(self, count: int) -> list[Normals]:
        if count == 0:
            return []
        z = self.joint.sample_prior(max(16, count), self.seed + 1).double()
        z = torch.where(z.isfinite(), z, 0.0)
        scale = NARROW * z.std(0).clamp_min(1e-6)
        return [Normals(z[k], torch.diag_embed(scale)) for k in range(count)]

    # -- the objective --------------------------------------------------------------------------------------------------

    def _noise(self, n_draws: int) -> Tensor:
        return matched_noise(n_draws, self.d, self.generator)

    def _target(self, owner: Tensor) -> Target:
        """Return log p and its gradient at z (S, P, d); position p belongs to datum owner[p]."""
        if len(owner) == self.n and bool((owner == self.everyone).all()):
            return self.joint.grad
        if self.joint.separable():
            return self.joint.subset(owner).grad
        # evaluate all data, as often as the most frequent datum occurs; unused positions hold valid values
        order = torch.argsort(owner, stable=True)
        first = torch.searchsorted(owner[order], owner[order])
        turn = torch.empty_like(owner)
        turn[order] = torch.arange(len(owner), device=owner.device) - first
        times = int(turn.max()) + 1

        def spread(z: Tensor) -> tuple[Tensor, Tensor]:
            full = self.joint.probe_points[0].to(z.dtype).expand(len(z), times, -1, -1).clone()
            full[:, turn, owner] = z
            value, gradient = self.joint.grad(full.flatten(0, 1))
            return value.unflatten(0, (len(z), times))[:, turn, owner], gradient.unflatten(0, (len(z), times))[:, turn, owner]

        return spread

    def _measure(
        self, loc: Tensor, root: Tensor, owner: Tensor, noise: Tensor, seen: bool = True, target: Target | None = None
    ) -> _Point:
        """Evaluate the objective and its quadratic model; value -inf where log p is not finite at some draw.

        If `seen`, the curvature is the lower triangle of C, which is stationary where F is; else its symmetric part, with less
        noise.
        """
        target = target or self._target(owner)
        value, slope, outer = (torch.zeros(1, dtype=torch.float64, device=self.device) for _ in range(3))
        for e in noise.split(fitting(loc.numel(), LARGE_ARRAY)):
            log_p, gradient = target(loc + torch.einsum("sj,pij->spi", e, root))
            bad = ~(log_p.isfinite() & gradient.isfinite().all(-1))
            log_p, gradient = log_p.double().masked_fill(bad, -torch.inf), gradient.double().masked_fill(bad[..., None], 0.0)
            value = value + log_p.sum(0)
            slope = slope + gradient.sum(0)
            outer = outer + torch.einsum("spi,sj->pij", gradient, e)
        slope = torch.einsum("pij,pi->pj", root, slope) / len(noise)
        curvature = -(root.mT @ outer) / len(noise)
        if seen and self.family == "full":
            curvature = curvature.tril() + curvature.tril(-1).mT
        else:
            curvature = (curvature + curvature.mT) / 2
        value = value / len(noise) + root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return _Point(loc, root, value, slope, curvature, self._decrement(slope, curvature))

    def _values(self, point: _Point, noise: Tensor) -> Tensor:
        """Return F for several blocks of all data in sequence, (starts N,)."""
        blocks = zip(point.loc.split(self.n), point.root.split(self.n), strict=True)
        values = [
            torch.cat(
                [self.joint(loc + torch.einsum("sj,pij->spi", e, root)) for e in noise.split(fitting(loc.numel(), LARGE_ARRAY))]
            )
            .double()
            .mean(0)
            for loc, root in blocks
        ]
        value = torch.cat(values) + point.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return torch.where(value.isfinite() & point.value.isfinite(), value, -torch.inf)

    def _decrement(self, slope: Tensor, curvature: Tensor) -> Tensor:
        """Return the remaining gain by the quadratic model, (P,), inf where it has no maximum."""
        factor, info = torch.linalg.cholesky_ex(curvature)
        diagonal = curvature.diagonal(dim1=-2, dim2=-1)
        good = (info == 0) & (diagonal > 0).all(-1)
        eye = torch.eye(self.d, dtype=slope.dtype, device=slope.device)
        factor = torch.where(good[:, None, None], factor, eye)
        mean = 0.5 * torch.linalg.solve_triangular(factor, slope[..., None], upper=False).square().sum((-2, -1))
        pivots = factor.diagonal(dim1=-2, dim2=-1).square() if self.family == "full" else diagonal.clamp_min(1e-300)
        spread = 0.5 * (diagonal - 1 - pivots.log()).sum(-1)
        return torch.where(good, (mean + spread).clamp_min(0.0), torch.inf).nan_to_num(torch.inf, torch.inf)

    def _step(self, at: _Point, size: Tensor) -> tuple[Tensor, Tensor]:
        """Return loc and root after a Newton step of this size (P,)."""
        eye = torch.eye(self.d, dtype=at.slope.dtype, device=self.device)
        curvature, share = at.curvature, size[:, None, None]
        factor, info = torch.linalg.cholesky_ex(curvature)
        convex = (info > 0) | ~factor.isfinite().all(-1).all(-1)
        if bool(convex.any()):
            values, vectors = torch.linalg.eigh(curvature[convex].nan_to_num(0.0, 1e100, -1e100))
            factor[convex] = torch.linalg.cholesky(from_eigen(values.abs().clamp_min(CONCAVE), vectors))
        move = torch.cholesky_solve(at.slope[..., None], factor)
        loc = at.loc + size[:, None] * (at.root @ move)[..., 0]
        if self.family == "diagonal":
            precision = curvature.diagonal(dim1=-2, dim2=-1).clamp_min(CURVATURE_FLOOR)
            return loc, at.root / (1 - share + share * precision[:, None, :]).sqrt()
        flat = torch.linalg.cholesky_ex(curvature - CURVATURE_FLOOR * eye)[1] > 0
        if bool(flat.any()):
            values, vectors = torch.linalg.eigh(curvature[flat].nan_to_num(0.0, 1e100, -1e100))
            curvature = curvature.clone()
            curvature[flat] = from_eigen(values.clamp_min(CURVATURE_FLOOR), vectors)
        precision = (1 - share) * eye + share * curvature
        # root of the inverse: with J reversing the order, J chol(J P J)^-T J is lower triangular
        reverse = torch.linalg.cholesky_ex(precision.flip(-1, -2))[0]
        inverse = torch.linalg.solve_triangular(reverse, eye.expand_as(reverse), upper=False)
        return loc, at.root @ inverse.mT.flip(-1, -2)

    def _climb(self, q: Normals, owner: Tensor, noise: Tensor, enough: float) -> _Point:
        """Raise F by damped Newton steps, independently at each position, until its decrement is at most `enough`."""
        point = self._finite_start(q, owner, noise)
        size = torch.ones(len(owner), dtype=torch.float64, device=self.device)
        open_ = (point.decrement > enough) & point.value.isfinite()
        active = torch.arange(0, device=self.device)
        target: Target | None = None
        for _ in range(self.max_iterations):
            todo = open_.nonzero()[:, 0]
            if not len(todo):
                break
            if target is None or len(todo) < 0.6 * len(active):
                active, target = todo, self._target(owner[todo])
            self.iterations += 1
            at = point.rows(active)
            new = self._measure(*self._step(at, size[active]), owner[active], noise, target=target)
            gain = ARMIJO * size[active] * at.decrement.clamp_max(1.0) - self.rounding * (1 + at.value.abs())
            better = (new.value >= at.value + gain) & open_[active]
            moved = active[better]
            point.put(moved, new.rows(better.nonzero()[:, 0]))
            size[active] = torch.where(better, (2 * size[active]).clamp_max(1.0), size[active] / 3)
            open_[active] &= ~(point.decrement[active] <= enough) & (size[active] > SMALLEST_STEP)
        return point

    def _finite_start(self, q: Normals, owner: Tensor, noise: Tensor) -> _Point:
        """Narrow starts until log p is finite at all their draws."""
        point = self._measure(q.loc, q.root, owner, noise)
        for _ in range(HALVINGS):
            bad = (~point.value.isfinite()).nonzero()[:, 0]
            if not len(bad):
                break
            point.put(bad, self._measure(point.loc[bad], point.root[bad] / 4, owner[bad], noise))
        return point

    # -- the end --------------------------------------------------------------------------------------------------------

    def _climb_and_step(self, q: Normals, owner: Tensor, noise: Tensor, decrement: float) -> Normals:
        """Climb well below this decrement, then take the Newton step of the last evaluation, which is free."""
        enough = min(decrement / 20, LOOSE)
        point = self._climb(q, owner, noise, enough)
        near = point.decrement <= enough
        loc, root = self._step(point, near.double())  # to be judged on fresh noise
        near &= loc.isfinite().all(-1) & root.isfinite().all(-1).all(-1)
        return Normals(torch.where(near[:, None], loc, point.loc), torch.where(near[:, None, None], root, point.root))

    def _until_unseen_noise_agrees(self, q: Normals, decrement: float) -> _Point:
        """Measure the decrement on fresh noise; climb again on more noise where it exceeds this limit."""
        draws = max(self.draws, default_draws(self.d))
        check = self._measure(q.loc, q.root, self.everyone, self._noise(draws), seen=False)
        for _ in range(ROUNDS):
            todo = ((check.decrement > decrement) & check.value.isfinite()).nonzero()[:, 0]
            if not len(todo):
                break
            draws *= GROWTH
            start = Normals(check.loc[todo], check.root[todo])
            again = self._climb_and_step(start, todo, self._noise(draws), decrement)
            check.put(todo, self._measure(again.loc, again.root, todo, self._noise(draws), seen=False))
        return check

    def _score(self, point: _Point, n_draws: int) -> tuple[Tensor, Tensor]:
        """Return L[q] and its standard error, on plain antithetic draws.

        The quadratic model, which has a known expectation, is the control variate. It comes from other draws, so there is no
        bias.
        """
        half = torch.randn(n_draws // 2, self.d, dtype=torch.float64, device=self.device, generator=self.generator)
        curvature = point.curvature.nan_to_num(0.0, 0.0, 0.0)
        pairs = []
        for e in half.split(fitting(2 * point.loc.numel(), LARGE_ARRAY)):
            offset = torch.einsum("sj,pij->spi", e, point.root)
            both = self.joint(torch.cat([point.loc + offset, point.loc - offset])).double()
            quadratic = torch.einsum("sj,pjk,sk->sp", e, curvature, e) - curvature.diagonal(dim1=-2, dim2=-1).sum(-1)
            pairs.append(both.unflatten(0, (2, len(e))).mean(0) + 0.5 * quadratic)
        value = torch.cat(pairs)
        value = torch.where(value.isfinite(), value, -torch.inf)
        elbo = value.mean(0) + Normals(point.loc, point.root).entropy
        return elbo, (value.std(0) / math.sqrt(len(value))).nan_to_num(torch.inf, torch.inf)
