"""Annealed importance sampling, forward and reverse, for every datum at once: bounds on log p(x) from both sides.

Along a path gamma_b = base + b slope (`paths`) with 0 = b_0 < ... < b_T = 1, chains start at an exact draw of gamma_0 and make
one Metropolis-corrected trajectory at each b_t:

    forward   log w = sum_t (b_t - b_{t-1}) slope(z_{t-1}),   E[w] = p(x),      lower = log mean_s w_s
    reverse   the same sum from an exact draw of p(z|x) down, E[1/w] = 1/p(x),  upper = -log mean_s 1/w_s

By Markov's inequality, P(lower > log p + c) <= exp(-c) and P(upper < log p - c) <= exp(-c), however badly the chains mix:
mixing only decides how far apart the bounds are. This requires kernels that do not depend on the chains they move, so step
sizes are tuned per (datum, bin of temperatures) in a pilot run with another seed, then fixed.

Neal 2001, https://doi.org/10.1023/A:1008923215028; schedule and reverse chains: Grosse, Ghahramani and Adams 2015,
https://arxiv.org/abs/1511.02543; Wu, Burda, Salakhutdinov and Grosse 2017, https://arxiv.org/abs/1611.04273.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elbowroom.inference.mcmc.leapfrog import State, transition
from elbowroom.inference.references.ais.paths import Path
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.system.memory import ARRAY, fitting
from elbowroom.system.stages import stage

RADIUS = 4.0  # of the sigmoid schedule
ACCEPT = 0.8  # aimed at
QUARTER = math.pi / 2  # trajectory, in whitened units, that forgets where it started
JITTER = 0.3  # relative noise of each step size, so that no orbit is periodic
BINS, TRIALS, FIRST_TRIALS = 12, 4, 12  # of the pilot: trajectories per bin, and in the first one
PILOT_CHAINS = 8
GAIN = 1.0
ROWS = {"cpu": 2**13, "cuda": 2**17}  # chains x data per block


def schedule(temperatures: int, radius: float = RADIUS) -> Tensor:
    """Return 0 = b_0 < ... < b_T = 1, (T + 1,): a rescaled sigmoid, slow at both ends (Grosse et al. 2015)."""
    b = torch.linspace(-radius, radius, temperatures + 1, dtype=torch.float64).sigmoid()
    return (b - b[0]) / (b[-1] - b[0])


@dataclass(frozen=True)
class Ladder:
    """The settings of a run, fixed before it starts.

    Attributes:
        b: inverse temperatures, (T + 1,), from 0 up.
        steps: step sizes in whitened units, (bins, N).
        bins: the bin of each element of b.
        leapfrogs: per trajectory.
    """

    b: Sequence[float]
    steps: Tensor
    bins: Sequence[int]
    leapfrogs: int

    def rows(self, index: Tensor) -> Ladder:
        """Return the plan of some of the data."""
        return Ladder(self.b, self.steps[:, index], self.bins, self.leapfrogs)


@dataclass(frozen=True)
class AnnealedBound:
    """A bound on log p(x) per datum, in nats, and its chains.

    Attributes:
        value: (N,).
        error: its standard error sqrt(1/ESS - 1/S), (N,), by the delta method; inf where no chain has any weight. It assumes
            independent chains and cannot include a mode that all of them missed.
        ess: effective number of the chains, (N,).
        z: ends of the chains, (S, N, d).
        log_weights: of the chains, (S, N): log w forward, -log w in reverse.
        failed: number of chains that met a density that is not finite, (N,); their weight is 0, so that the bound stays valid.
    """

    value: Tensor
    error: Tensor
    ess: Tensor
    z: Tensor
    log_weights: Tensor
    failed: Tensor

    def rows(self, index: Tensor) -> AnnealedBound:
        """Return the bounds of some of the data."""
        each = (self.value[index], self.error[index], self.ess[index])
        return AnnealedBound(*each, self.z[:, index], self.log_weights[:, index], self.failed[index])


class _Rung:
    """One density of a path as a target; keeps the slope of its last evaluation."""

    def __init__(self, path: Path, b: float) -> None:
        self.path, self.b = path, b
        self.slope = torch.empty(0)

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        base, self.slope, gradient = self.path.parts(z, self.b)
        return base + self.b * self.slope, gradient


def _jittered(step: Tensor, chains: int, generator: torch.Generator) -> Tensor:
    noise = torch.rand(chains, len(step), dtype=step.dtype, device=step.device, generator=generator)
    return step * (1 + JITTER * (2 * noise - 1))


def block_size(log_joint: LogJoint, chains: int) -> int:
    """Return how many data to anneal together: enough for the processor, few enough for memory and the time limit."""
    rows = ROWS.get(log_joint.device.type, ROWS["cpu"])
    return min(fitting(chains, rows), fitting(log_joint.dim * (chains + log_joint.dim), ARRAY))


def _blocks(path: Path, chains: int, seed: int, until: float) -> Iterator[tuple[Tensor, Path, torch.Generator]]:
    """Yield the data in blocks until the time is up, each with its path and its own random generator."""
    seeds = torch.Generator().manual_seed(seed)
    for rows in path.log_joint.blocks(block_size(path.log_joint, chains)):
        if time.monotonic() > until:
            return
        own = int(torch.randint(2**62, (), generator=seeds))
        yield rows, path.rows(rows), torch.Generator(device=rows.device).manual_seed(own)


# -- the pilot --------------------------------------------------------------------------------------------------------------


@stage("pilot")
def tune(path: Path, *, temperatures: int, leapfrogs: int, seed: int, until: float = math.inf) -> Ladder:
    """Tune step sizes in a pilot run with its own seed; its chains are discarded.

    A few chains climb the path and make several trajectories in the middle of each bin of temperatures. After each one the step
    is multiplied by exp(accept - 0.8); it stays below a quarter of a period of a normal with the metric's covariance. Data not
    reached before `until` get the largest step.
    """
    b = schedule(temperatures).tolist()
    n_bins = max(1, min(temperatures - 1, BINS))
    bins = [min(max(t - 1, 0) * n_bins // max(temperatures - 1, 1), n_bins - 1) for t in range(temperatures + 1)]
    first = path.metric.first
    steps = torch.full((n_bins, len(first)), QUARTER / leapfrogs, dtype=first.dtype, device=first.device)
    if temperatures > 1:
        middle = [(k + 0.5) * (temperatures - 1) / n_bins + 0.5 for k in range(n_bins)]
        at = [b[round(t)] for t in middle]
        for rows, part, generator in _blocks(path, PILOT_CHAINS, seed, until):
            steps[:, rows] = _pilot(part, at, leapfrogs, generator)
    return Ladder(b, steps, bins, leapfrogs)


def _pilot(path: Path, at: Sequence[float], leapfrogs: int, generator: torch.Generator) -> Tensor:
    z = path.sample(PILOT_CHAINS, generator)
    largest = QUARTER / leapfrogs
    step = torch.full_like(z[0, :, 0], largest)
    found = []
    for k, b in enumerate(at):
        rung, root = _Rung(path, b), path.metric.root(b)
        state = State.at(rung, z)
        trials = TRIALS if k else FIRST_TRIALS
        logs = []
        for _ in range(trials):
            alive = ~state.value.isneginf()
            move = transition(rung, state, root, _jittered(step, PILOT_CHAINS, generator), leapfrogs, generator)
            accept = (move.accept * alive).sum(0) / alive.sum(0).clamp_min(1)
            step = (step * (GAIN * (accept - ACCEPT)).exp()).clamp_max(largest)
            logs.append(step.log())
            state = move.state
        found.append(torch.stack(logs[trials // 2 :]).mean(0).exp())
        z = state.z
    return torch.stack(found)


# -- the scored runs ----------------------------------------------------------------------------------------------------------


@stage("forward")
def lower(path: Path, plan: Ladder, *, chains: int, seed: int, until: float = math.inf) -> AnnealedBound:
    """Return a probabilistic lower bound on log p(x) per datum: log mean_s w_s of forward chains.

    P(value > log p + c) <= exp(-c). The plan must be from `tune` with another seed. If its temperatures end at b < 1, the value
    is a bound on log Z_b instead. No block of data is begun after `until` (`time.monotonic()`); its data get NaN.
    """
    return _over_blocks(path, chains, until, lambda part, rows, g: _forward(part, plan.rows(rows), chains, g), seed)


@stage("reverse")
def upper(path: Path, plan: Ladder, draws: Tensor, *, seed: int, until: float = math.inf) -> AnnealedBound:
    """Return a probabilistic upper bound on log p(x) per datum: -log mean_s 1/w_s of reverse chains, from draws (S, N, d).

    It is valid only if the draws follow the posterior. Chains that start at the same draw share its error: their mean still
    satisfies P(value < log p - c) <= exp(-c), but `error` and `ess` then do not cover the start. Give one draw per chain if
    there are many. Plan and `until` are as in `lower`.
    """
    start = lambda part, rows, g: _reverse(part, plan.rows(rows), draws[:, rows], g)
    return _over_blocks(path, len(draws), until, start, seed)


def _over_blocks(
    path: Path, chains: int, until: float, run: Callable[[Path, Tensor, torch.Generator], AnnealedBound], seed: int
) -> AnnealedBound:
    first = path.metric.first
    n, d = first.shape
    nan = lambda *shape: torch.full(shape, torch.nan, dtype=first.dtype, device=first.device)
    out = AnnealedBound(nan(n), nan(n), nan(n), nan(chains, n, d), nan(chains, n), nan(n))
    for rows, part, generator in _blocks(path, chains, seed, until):
        found = run(part, rows, generator)
        out.value[rows], out.error[rows], out.ess[rows] = found.value, found.error, found.ess
        out.z[:, rows], out.log_weights[:, rows], out.failed[rows] = found.z, found.log_weights, found.failed
    return out


def _forward(path: Path, plan: Ladder, chains: int, generator: torch.Generator) -> AnnealedBound:
    last = len(plan.b) - 1
    z, log_w, bad = _walk(path, plan, path.sample(chains, generator), range(1, last + 1), +1, generator)
    rounded, _ = path.log_joint.rounded(z)  # what is left out keeps a lower bound valid
    return summarise(z, log_w.masked_fill(bad | rounded, -torch.inf), bad.sum(0))


def _reverse(path: Path, plan: Ladder, draws: Tensor, generator: torch.Generator) -> AnnealedBound:
    last = len(plan.b) - 1
    z, log_w, bad = _walk(path, plan, draws, range(last - 1, -1, -1), -1, generator)
    found = summarise(z, log_w.masked_fill(bad, -torch.inf), bad.sum(0))
    return AnnealedBound(-found.value, found.error, found.ess, z, found.log_weights, found.failed)


def _walk(
    path: Path, plan: Ladder, z: Tensor, rungs: range, sign: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Move chains along the rungs; return their ends, their log weights, and which of them met a density that is not finite."""
    log_w = torch.zeros(z.shape[:2], dtype=z.dtype, device=z.device)
    bad = torch.zeros(z.shape[:2], dtype=torch.bool, device=z.device)
    for t in rungs:
        rung = _Rung(path, plan.b[t])
        state = State.at(rung, z)
        slope = rung.slope
        bad |= ~slope.isfinite()
        log_w += (plan.b[t] - plan.b[t - sign]) * slope.masked_fill(~slope.isfinite(), 0.0)
        if t == rungs[-1]:
            break
        step = _jittered(plan.steps[plan.bins[t]], len(z), generator)
        z = transition(rung, state, path.metric.root(plan.b[t]), step, plan.leapfrogs, generator).state.z
    return z, log_w, bad


def summarise(z: Tensor, log_weights: Tensor, failed: Tensor) -> AnnealedBound:
    """Return log mean_s exp(log_weights) with its delta-method error, from log weights (S, N)."""
    chains = len(log_weights)
    value = torch.logsumexp(log_weights, 0) - math.log(chains)
    ess = (2 * torch.logsumexp(log_weights, 0) - torch.logsumexp(2 * log_weights, 0)).exp().nan_to_num(nan=0.0)
    error = torch.where(ess > 0, (1 / ess - 1 / chains).clamp_min(0).sqrt(), torch.inf)
    return AnnealedBound(value, error, ess, z, log_weights, failed.to(value.dtype))
