"""The best member of any family for every datum at once: the variational parameters are optimised instead of encoded.

An amortized guide is q(z|x_n) = q(z; phi_n) with phi_n = encoder(x_n). Here phi_n (P numbers per datum) is a free variable,

    phi*_n = argmax_phi L_n(phi),   L_n(phi) = E_q(z; phi) [log p(x_n, z) - log q(z; phi)]

and parameters shared by the data (the weights of a flow) stay fixed: L[q*] - L[q] is the gap between the encoder and the best
member of its family.

Ascent is by natural gradients (Amari 1998, https://doi.org/10.1162/089976698300017746). With scores
s = d log q(z; phi) / d phi of draws of q, and log w = log p(x_n, z) - log q(z; phi),

    g = cov(s, log w) = grad L,    F = cov(s, s), the family's Fisher information,    step = F^-1 g

is the least-squares regression of log w on the scores (Salimans and Knowles 2013, https://arxiv.org/abs/1206.6679). It has no
noise where q is the posterior, is a Newton step of KL(q || p) near it, does not depend on the units of the parameters, and
needs neither gradients of the model nor differentiable draws (which carry almost no information about the weights of a
mixture with separated components). g and F are running means over steps; a step is at most `RADIUS` standard deviations long.

Starts: the encoder's output, its mean over the data, and, if the best normal is known, the encoder's output moved towards it by
the same steps up E_normal[log q(z; phi)], which do not evaluate the model. After a few steps from each, the best continues in
stages. Each stage ends with the mean of its later half; steps are halved once a stage gains little. Draws that no step has
used choose between the old parameters and the new; further draws score the choice and the encoder with common random numbers.
The shortfall is an estimate of what more stages would gain, extrapolated from the last two, plus the error of that gain. It is
no bound, and local to the optimum that was found. All values in nats, per datum.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from elbowroom.errors import first_line
from elbowroom.inference.mcmc.normals import Normals, apply
from elbowroom.inference.randomness import seeded
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.system.memory import ARRAY, fitting, sizes

Family = Callable[[Tensor], TorchDistribution]
Gradients = Callable[[Tensor], tuple[Tensor, Tensor]]

OFFER = "variational_parameters"
EXACT = 1e-6  # allowed relative difference of log densities
TESTED = 8  # draws at which the offered density must be the guide's
DRAWS = 64  # of a step
PILOT = 25  # steps from each start
STEPS = 50  # of a stage
SHAKEN = 0.1  # noise on the encoder's output: equal components, or directions of length 0, would never change
STAGES = 8
SIZE = 0.5  # of the natural gradient, halved after each stage that gained little
SLOWEST = 0.9  # largest ratio of successive gains in the extrapolation
RADIUS = 0.5  # length of a step in standard deviations: at most 1/8 nat of KL
MEMORY = 0.9  # of the running means
DAMPING = 0.01  # of the Fisher information's diagonal
FLOOR = 0.01  # information, in units of the encoder's output, below which a parameter hardly moves
MATRIX = 128  # up to this many parameters F is a matrix; beyond, its diagonal
ENOUGH = 0.01  # a stage that gains more (nats) is followed by another
CHOOSING, SCORING = 512, 1024  # draws
LIMIT = 600.0  # seconds
TIMED = 5  # steps after which the total time is predicted


@dataclass(frozen=True)
class OfferedFamily:
    """The parameters of each datum and the family of distributions that a guide offers.

    Attributes:
        params: phi, (N, P), the encoder's output.
        family: phi (..., N, P) -> distribution of the one latent site, batch shape (..., N).
        log_joint: the log joint with this site.
    """

    params: Tensor
    family: Family
    log_joint: LogJoint

    def constrained(self, u: Tensor) -> Tensor:
        """Map unconstrained u (S, N, d) to values of the site, (S, N, *event)."""
        (site,) = self.log_joint.sites
        assert site.transform is not None
        return site.transform(site.split(u))

    def free(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Map values of the site, (S, N, *event), to unconstrained u (S, N, d); and log |d value / d u|, (S, N)."""
        (site,) = self.log_joint.sites
        assert site.transform is not None
        u = site.transform.inv(value)
        log_det = site.transform.log_abs_det_jacobian(u, value)
        return u.reshape(*value.shape[:2], -1), log_det.reshape(*value.shape[:2], -1).sum(-1)

    def log_prob(self, u: Tensor, params: Tensor) -> Tensor:
        """Return log q(u; phi) in unconstrained coordinates, (S, N), for u (S, N, d) and phi (N, P)."""
        with self.log_joint.frozen_weights(), torch.no_grad():
            value = self.constrained(u)
            return self.family(params).log_prob(value) + self.free(value)[1]

    def sample(self, params: Tensor, n_draws: int, seed: int) -> Tensor:
        """Draw u ~ q(u; phi) in unconstrained coordinates, (S, N, d)."""
        with self.log_joint.frozen_weights(), torch.no_grad(), seeded(seed):
            return self.free(self.family(params).sample(torch.Size((n_draws,))))[0]

    def log_ratio(self, params: Tensor, value: Tensor) -> Tensor:
        """Return log p(x_n, z) - log q(z; phi) at values of the site, (S, N)."""
        with torch.no_grad():
            u, log_det = self.free(value)
            return self.log_joint(u).double() - (self.family(params).log_prob(value) + log_det).double()

    def log_weights(self, params: Tensor, n_draws: int, seed: int) -> Tensor:
        """Return log p(x_n, z) - log q(z; phi) at draws of q, (S, N); the seed determines the noise."""
        size = fitting(64 * len(params) * self.log_joint.dim, ARRAY)
        with self.log_joint.frozen_weights(), torch.no_grad(), seeded(seed):
            q = self.family(params)
            found = [self.log_ratio(params, q.sample(torch.Size((count,)))) for count in sizes(n_draws, size)]
        ratio = torch.cat(found)
        return torch.where(ratio.isfinite(), ratio, -torch.inf)


@dataclass(frozen=True)
class FamilyRefit:
    """The best member of the guide's own family for every datum, compared with the encoder's.

    Attributes:
        params: phi*, (N, P); the encoder's own where nothing better was found.
        elbo: L[q*], (N,), on fresh draws, not used in any choice; -inf where log p is not finite at one of them.
        elbo_se: its standard error.
        gain: L[q*] - L[q], by common random numbers.
        gain_se: its standard error.
        shortfall: estimated gain of further steps, >= 0: extrapolated from the last stages, plus its standard error.
    """

    params: Tensor
    elbo: Tensor
    elbo_se: Tensor
    gain: Tensor
    gain_se: Tensor
    shortfall: Tensor


class TooSlow(Exception):
    """The search would not end in time."""


def offered(log_joint: LogJoint) -> OfferedFamily | None:
    """Return the parameters and the family that the guide offers, if they give its density; else None.

    A guide offers them by a method or attribute `variational_parameters`, of its own or of the object that it is a bound method
    of. It takes the arguments of the program and returns None, or phi (N, P) and a function from phi (..., N, P) to the
    distribution of its one latent site with batch shape (..., N).
    """
    guide: Any = log_joint.guide
    offer = getattr(guide, OFFER, None) or getattr(getattr(guide, "__self__", None), OFFER, None)
    program = log_joint.program
    if offer is None or log_joint.dim == 0 or len(program.sites) != 1 or program.discrete or program.index:
        return None
    (site,) = program.sites
    if program.active is not None or site.transform is None or site.batch_ndim != 1:
        return None
    try:
        with log_joint.frozen_weights(), torch.no_grad(), seeded(0):
            answer = offer(*log_joint.args, **log_joint.kwargs)
            if answer is None:
                return None
            params, family = answer
            params = params.detach()
            if params.dim() != 2 or len(params) != log_joint.n_obs:
                raise ValueError(f"{OFFER} gave parameters of shape {tuple(params.shape)}, not ({log_joint.n_obs}, P)")
            shape = tuple(family(params.expand(2, -1, -1)).batch_shape)
            if shape != (2, log_joint.n_obs):
                raise ValueError(f"{OFFER} gave a family of batch shape {shape}, not {(2, log_joint.n_obs)}")
        found = OfferedFamily(params, family, log_joint)
        draws, log_q = log_joint.sample_guide(TESTED, 0)
        stated = found.log_prob(draws, params)
        if not bool(((stated - log_q).abs() <= EXACT * (1 + log_q.abs())).all()):
            raise ValueError(f"the density by {OFFER} is not the one that the guide draws from")
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
        log_joint.note(f"guide: its family is not refitted, {first_line(error)}")
        return None
    return found


def refit_family(
    offer: OfferedFamily, *, near: Normals | None = None, seed: int, until: float = math.inf
) -> FamilyRefit | None:
    """Find the best member of the guide's own family for every datum; None, with a note, if there is not enough time.

    Args:
        offer: the guide's parameters and family.
        near: normals in unconstrained coordinates that one start is moved towards.
        seed: random seed.
        until: deadline, on the monotonic clock.
    """
    log_joint = offer.log_joint
    width = offer.params.shape[-1]
    size = fitting(max(width, 64) * max(DRAWS, min(width, MATRIX)), ARRAY)
    until = min(until, time.monotonic() + LIMIT)
    blocks = log_joint.blocks(size)
    found = []
    try:
        for k, some in enumerate(blocks):
            share = (until - time.monotonic()) / (len(blocks) - k)
            part = OfferedFamily(offer.params[some], offer.family, log_joint.subset(some))
            with part.log_joint.frozen_weights():
                found.append(_Search(part, near and near.rows(some), seed, time.monotonic() + share).run())
    except TooSlow as error:
        log_joint.note(f"guide: its family is not refitted, {error}")
        return None
    return FamilyRefit(**{name: torch.cat([getattr(one, name) for one in found]) for name in vars(found[0])})


class _Search:
    def __init__(self, offer: OfferedFamily, near: Normals | None, seed: int, until: float) -> None:
        self.offer, self.near, self.seed, self.until = offer, near, seed, until
        self.joint, self.family = offer.log_joint, offer.family
        self.began, self.steps = time.monotonic(), 0
        scale = 1 + offer.params.abs()
        self.floor = FLOOR / scale.square()

    def run(self) -> FamilyRefit:
        encoder = self.offer.params
        with seeded(self.seed):
            shaken = [phi + SHAKEN * torch.randn_like(encoder) for phi in (encoder, encoder.mean(0))]
            starts = [encoder, shaken[1]]
            starts += [] if self.near is None else [self._ascend(shaken[0], PILOT, SIZE, self._towards)]
            pilots = [self._ascend(start, PILOT, SIZE) for start in starts]
        best, value = self._better(encoder, self._judged(encoder), pilots)[:2]
        rows = torch.arange(len(best), device=best.device)
        size, last = torch.full_like(value[0], SIZE), torch.full_like(value[0], torch.inf)
        shortfall = last.clone()
        for stage in range(STAGES):
            some, rows = self._of(rows)
            with seeded(self.seed + 2 + stage):
                found = some._ascend(best[rows], STEPS, size[rows, None])
            best[rows], value[:, rows], gain, error = some._better(best[rows], value[:, rows], [found])
            climbing = gain > (2 * error).clamp_min(ENOUGH)
            ratio = (gain / last[rows]).clamp(0.0, SLOWEST)
            shortfall[rows] = error + gain.clamp_min(0) * torch.where(climbing, ratio / (1 - ratio), 1.0)
            done = (gain.abs() <= ENOUGH) & (size[rows] < SIZE)
            last[rows], size[rows] = gain, torch.where(climbing, size[rows], size[rows] / 2)
            rows = rows[~done]
            if not len(rows):
                break
        before, after = (self.offer.log_weights(phi, SCORING, self.seed + 300) for phi in (encoder, best))
        gain, error = _mean(after - before)
        kept = ~(gain >= -error)  # keep the encoder's own where they are clearly better
        best, after = torch.where(kept[:, None], encoder, best), torch.where(kept, before, after)
        return FamilyRefit(best, *_mean(after), *_mean(after - before), shortfall)

    def _of(self, rows: Tensor) -> tuple[_Search, Tensor]:
        """Return the search for some of the data, or for all if they cannot be separated; and the rows that it holds."""
        part, rows, _ = self.joint.some(rows)
        some = copy.copy(self)
        some.offer, some.joint = OfferedFamily(self.offer.params[rows], self.family, part), part
        some.floor = self.floor[rows]
        return some, rows

    def _judged(self, params: Tensor) -> Tensor:
        """Return the log weights for choosing among parameters, always on the same draws, which no step uses."""
        return self.offer.log_weights(params, CHOOSING, self.seed + 1)

    def _better(self, old: Tensor, value: Tensor, new: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the best of several parameters of each datum, its log weights, and the gain of the last one with its error.

        A single new one is accepted unless it is clearly worse: ascent more often gains than loses what is too small to
        measure.
        """
        best, of_best = old.clone(), value.clone()
        gain, error = _mean(value - value)
        for phi in new:
            found = self._judged(phi)
            gain, error = _mean(found - of_best)
            better = gain > (0 if len(new) > 1 else -error)
            best[better], of_best[:, better] = phi[better], found[:, better]
        return best, of_best, gain, error

    def _ascend(self, params: Tensor, steps: int, size: float | Tensor, gradients: Gradients | None = None) -> Tensor:
        """Take natural-gradient steps up L, or up the objective of other `gradients`; return the mean of the later half."""
        gradients = gradients or self._gradients
        phi, total = params.clone(), torch.zeros_like(params)
        full = params.shape[-1] <= MATRIX
        slope: Tensor | float = 0.0
        information: Tensor | float = 0.0
        for step in range(steps):
            g, scores = gradients(phi)
            fisher = torch.einsum("snp,snq->npq", scores, scores) / len(scores) if full else scores.square().mean(0)
            slope = MEMORY * slope + (1 - MEMORY) * g
            information = MEMORY * information + (1 - MEMORY) * fisher
            direction = self._natural(slope, information)
            length = (slope * direction).sum(-1, keepdim=True).clamp_min(0).sqrt() / (1 - MEMORY ** (step + 1)) ** 0.5
            phi = phi + size * direction / (size * length / RADIUS).clamp_min(1.0)
            if step >= steps - steps // 2:
                total = total + phi
            self._watch()
        return total / (steps // 2)

    def _natural(self, slope: Tensor, information: Tensor) -> Tensor:
        """Return (F + damping)^-1 g; the start-up bias of both running means cancels."""
        if information.dim() == 2:
            return slope / ((1 + DAMPING) * information + self.floor)
        diagonal = DAMPING * information.diagonal(dim1=-2, dim2=-1) + self.floor
        factor, failed = torch.linalg.cholesky_ex(information + torch.diag_embed(diagonal))
        found = torch.cholesky_solve(slope[..., None], factor)[..., 0]
        return torch.where((failed == 0)[:, None], found, 0.0).nan_to_num(0.0, 0.0, 0.0)

    def _gradients(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient of L, (N, P), and the centred score of every draw, (S, N, P)."""
        value = self.family(params).sample(torch.Size((DRAWS,)))
        log_w = self.offer.log_ratio(params, value)
        known = log_w.isfinite()
        log_w = torch.where(known, log_w, 0.0)
        centred = torch.where(known, log_w - log_w.sum(0) / known.sum(0).clamp_min(1), 0.0)
        scores = self._scores(params, value)
        scores = scores - scores.mean(0)
        return (scores * centred[..., None]).mean(0), scores

    def _towards(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient of E[log q(z; phi)] over draws of the normals, (N, P), and the scores of draws of q."""
        assert self.near is not None
        noise = torch.randn(DRAWS, *self.near.loc.shape, dtype=self.near.loc.dtype, device=params.device)
        towards = self.offer.constrained(self.near.loc + apply(self.near.root, noise))
        own = self.family(params).sample(torch.Size((DRAWS,)))
        scores = [self._scores(params, value) for value in (towards, own)]
        return scores[0].mean(0), scores[1]

    def _scores(self, params: Tensor, value: Tensor) -> Tensor:
        """Return d log q(z_s; phi) / d phi, (S, N, P); 0 where it is not finite."""
        with torch.enable_grad():
            # with a copy of phi for every draw, one backward pass gives a gradient for each
            still = params.expand(len(value), *params.shape).clone().requires_grad_()
            (scores,) = torch.autograd.grad(self.family(still).log_prob(value).sum(), still, materialize_grads=True)
        return torch.where(scores.isfinite().all(-1, keepdim=True), scores, 0.0)

    def _watch(self) -> None:
        """Stop early if the time will foreseeably not suffice."""
        self.steps += 1
        spent = time.monotonic() - self.began
        if self.steps == TIMED:
            needed = spent / TIMED * (3 * PILOT + 3 * STEPS)
            if self.began + needed > self.until:
                raise TooSlow(f"that would take {needed:.0f} seconds, more than there are")
        elif time.monotonic() > self.until:
            raise TooSlow("the time for it ended")


def _mean(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean over draws, (N,), and its standard error."""
    return values.mean(0), (values.std(0) / math.sqrt(len(values))).nan_to_num(torch.inf, torch.inf)
