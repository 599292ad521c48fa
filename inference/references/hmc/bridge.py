"""Bridge sampling: log p(x) as a value, from certified draws of the posterior.

With a normalised proposal g that was fitted to other draws, and l(z) = p(x, z) / g(z), Z = p(x) solves

    Z = [ mean_j  l_j / (s1 l_j + s2 Z) ] / [ mean_i  1 / (s1 l_i + s2 Z) ]        z_j ~ g,  z_i ~ p(z|x)

where n1 of the N1 posterior draws are effective and N2 are from g, s1 = n1 / (n1 + N2), s2 = 1 - s1 (Meng and Wong 1996,
Simulating ratios of normalizing constants via a simple identity, Statistica Sinica 6). g is fitted to one half of the chains
and bridged with the other, then the halves change places; the two values are averaged. Neither half knows of its own proposal,
so that the fit biases nothing.

The error is that of the delta method, with the autocorrelation of the chains (Fruehwirth-Schnatter 2004, Estimating marginal
likelihoods for mixture and Markov switching models using bridge sampling techniques, Econometrics Journal 7). The value is an
estimate, conditional on the draws being those of the posterior: a mode that no chain visited is missing from it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from elbowroom.inference.mcmc import diagnostics
from elbowroom.inference.references.hmc.mixtures import Mixture
from elbowroom.inference.search.sampler import Chains
from elbowroom.inference.target.log_joint import LogJoint

DRAWS, MORE = 500, 2000  # of each proposal, and of the best one where the error stays large
ROUNDS = 200  # of the iteration
TIGHT = 1e-8  # change of log Z at which it ends
LARGE = 0.06  # nats: beyond this error more components are tried, then more draws
COMPONENTS = (1, 2, 4)  # of the proposal, one after the other
AGREE = 4.5  # standard errors within which the halves must agree
WORTH = 100.0  # effective weights with which importance sampling by the proposal can contradict
OVERLAP = 50.0  # effective draws of the proposal, at least
LARGEST = 0.5  # nats: a larger error is no value; the delta method no longer holds


@dataclass(frozen=True)
class Bridged:
    """log p(x) by bridge sampling, (N,) each.

    Attributes:
        value: nats; NaN where there is none.
        error: its standard error.
        halves: distance between the values of the two halves, in standard errors.
        sampled: distance from importance sampling by the same draws of the proposals, in standard errors; 0 where its weights
            are worth too little. Importance sampling does not use the chains' draws, so that it can contradict them.
        overlap: effective draws of the proposal, the smaller of the two halves.
        components: of the proposal that was taken.
        evaluations: of the log joint, per datum.
    """

    value: Tensor
    error: Tensor
    halves: Tensor
    sampled: Tensor
    overlap: Tensor
    components: Tensor
    evaluations: Tensor

    def rows(self, index: Tensor) -> Bridged:
        """Return the values of some of the data."""
        return Bridged(*(getattr(self, f.name)[index] for f in fields(self)))

    def take(self, rows: Tensor, trial: Bridged) -> None:
        """Take the values of a trial at the data `rows` where its error is smaller, and count its evaluations."""
        self.evaluations[rows] += trial.evaluations
        better = trial.error < self.error[rows]
        for name in ("value", "error", "halves", "sampled", "overlap", "components"):
            getattr(self, name)[rows[better]] = getattr(trial, name)[better]

    def words(self, row: int) -> str:
        """Return why there is no value, or what it rests on."""
        halves, overlap, error = (float(values[row]) for values in (self.halves, self.overlap, self.error))
        if not overlap >= OVERLAP:
            return f"no value, proposal and posterior hardly overlap ({overlap:.0f} effective draws, need {OVERLAP:.0f})"
        if not halves <= AGREE:
            return f"no value, the halves of the chains differ by {halves:.1f} standard errors"
        if not (sampled := float(self.sampled[row])) <= AGREE:
            return f"no value, importance sampling by the proposals differs by {sampled:.1f} standard errors: the draws are off"
        if not error <= LARGEST:
            return f"no value, its standard error is {error:.2g} nats (must be at most {LARGEST:g})"
        return f"standard error {error:.2g} nats, the halves of the chains differ by {halves:.1f} standard errors"


def bridge(log_joint: LogJoint, chains: Chains, generator: torch.Generator) -> Bridged:
    """Estimate log p(x) of every datum from its chains, by proposals with more components where one does not suffice."""
    n, device = log_joint.n_obs, chains.lp.device
    new = lambda value: torch.full((n,), value, dtype=torch.float64, device=device)
    found = Bridged(new(torch.nan), new(torch.inf), new(torch.inf), new(0.0), new(0.0), new(0.0), new(0.0))
    for draws in (DRAWS, MORE):
        for components in COMPONENTS:
            tried = (found.components == components) if draws == MORE else torch.ones_like(found.value, dtype=torch.bool)
            rows = (tried & ~(found.error <= LARGE)).nonzero()[:, 0]
            if len(rows):
                part, used, at = log_joint.some(rows)
                found.take(rows, _halves(part, chains.rows(used), components, draws, generator).rows(at))
    good = (found.overlap >= OVERLAP) & (found.halves <= AGREE) & (found.sampled <= AGREE) & (found.error <= LARGEST)
    found.value[~good] = torch.nan
    return found


def _halves(log_joint: LogJoint, chains: Chains, components: int, count: int, generator: torch.Generator) -> Bridged:
    """Fit to every second chain, bridge with the others, and the other way round."""
    lp, shape = chains.lp.double(), chains.lp.shape[:2]
    draws = chains.draws.double().flatten(0, 1)
    member = torch.arange(len(draws), device=draws.device).reshape(shape)
    solutions, ratios = [], []
    for fitted, bridged in ((member[::2], member[1::2]), (member[1::2], member[::2])):
        proposal = Mixture.fitted(draws[fitted.flatten()], components, generator)
        z = proposal.sample(count, generator)
        of_proposal = log_joint(z.to(log_joint.probe_points.dtype)).double() - proposal.log_prob(z)
        ratio = lp - proposal.log_prob(draws).unflatten(0, shape)
        solutions.append(solved(ratio.flatten(0, 1)[bridged], of_proposal))
        ratios.append(ratio)
    one, other = solutions
    # what is structural in the misfit of the two proposals errs in each half by itself; what is noise of their fits errs in
    # both halves alike, as each half's draws enter the other's proposal
    noise = 1 - _correlation(*(s.weight(ratio).flatten(0, 1) for s, ratio in zip(solutions, ratios, strict=True))).clamp(0, 1)
    both = noise * (one.of_posterior * other.of_posterior).sqrt()
    variance = one.of_proposal + other.of_proposal + one.of_posterior + other.of_posterior
    return Bridged(
        value=(one.log_z + other.log_z) / 2,
        error=(variance + 2 * both).sqrt() / 2,
        halves=(one.log_z - other.log_z).abs() / (variance - 2 * both).sqrt(),
        sampled=torch.maximum(one.sampled, other.sampled),
        overlap=torch.minimum(one.overlap, other.overlap),
        components=torch.full_like(variance, components),
        evaluations=torch.full_like(variance, 2.0 * count),
    )


@dataclass(frozen=True)
class Solution:
    """The value of one half, (N,) each.

    Attributes:
        log_z: log p(x).
        of_proposal: variance of its error from the draws of the proposal.
        of_posterior: likewise from the draws of the posterior.
        sampled: distance from importance sampling by the proposal's draws, in standard errors; 0 where it says nothing.
        overlap: effective draws of the proposal.
        log_s1, log_s2: logs of the shares of posterior and proposal in the bridge.
    """

    log_z: Tensor
    of_proposal: Tensor
    of_posterior: Tensor
    sampled: Tensor
    overlap: Tensor
    log_s1: Tensor
    log_s2: Tensor

    def weight(self, log_ratio: Tensor) -> Tensor:
        """Return g / (s1 p + s2 g) where log p(x, z) / g is `log_ratio` (..., N)."""
        return (-torch.logaddexp(self.log_s1 + log_ratio - self.log_z, self.log_s2)).exp()


def solved(of_posterior: Tensor, of_proposal: Tensor) -> Solution:
    """Solve for log Z; log l of the posterior's draws (C, S, N), and of the proposal's (J, N)."""
    of_proposal = torch.where(of_proposal.isfinite(), of_proposal, -torch.inf)
    count = len(of_proposal)
    effective = diagnostics.ess_mean(of_posterior).clamp(1.0, of_posterior.shape[0] * of_posterior.shape[1])
    effective = effective.nan_to_num(nan=1.0)
    log_s1, log_s2 = (effective / (effective + count)).log(), (count / (effective + count)).log()
    flat = of_posterior.flatten(0, 1)
    log_z = flat.median(0).values
    for _ in range(ROUNDS):
        above = _mean(of_proposal - torch.logaddexp(log_s1 + of_proposal, log_s2 + log_z))
        below = _mean(-torch.logaddexp(log_s1 + flat, log_s2 + log_z))
        change = above - below - log_z
        log_z = log_z + change
        if not bool((change.abs() > TIGHT).any()):
            break
    # p / (s1 p + s2 g) at draws of g, and g / (s1 p + s2 g) at draws of p
    first = (of_proposal - log_z - torch.logaddexp(log_s1 + of_proposal - log_z, log_s2)).exp()
    second = (-torch.logaddexp(log_s1 + of_posterior - log_z, log_s2)).exp()
    ess = diagnostics.ess_mean(second).nan_to_num(nan=1.0).clamp_min(1.0)
    overlap = first.sum(0).square() / first.square().sum(0)
    weight = (of_proposal - of_proposal.amax(0)).exp()
    worth = weight.sum(0).square() / weight.square().sum(0)
    own = _relative(second.flatten(0, 1)) / ess
    off = (_mean(of_proposal) - log_z).abs() / (_relative(weight) / count + own).sqrt()
    sampled = torch.where(worth >= WORTH, off, 0.0)
    return Solution(log_z, _relative(first) / count, own, sampled, overlap.nan_to_num(nan=0.0), log_s1, log_s2)


def _relative(x: Tensor) -> Tensor:
    """Return the variance over the square of the mean, (N,)."""
    return x.var(0) / x.mean(0).square()


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).sum(0) / (a.square().sum(0) * b.square().sum(0)).sqrt()


def _mean(log_values: Tensor) -> Tensor:
    return torch.logsumexp(log_values, 0) - torch.tensor(float(len(log_values)), dtype=log_values.dtype).log()
