"""Warm-up of batched HMC: starts from q* and from annealed draws of the prior, the metric, and the step sizes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from elbowroom.inference.mcmc.leapfrog import DualAveraging, State, transition
from elbowroom.inference.mcmc.normals import safe_cholesky
from elbowroom.inference.search.sampler import LENGTH, Sampler
from elbowroom.inference.search.scout import Scout
from elbowroom.inference.target.log_joint import LogJoint

ACCEPTANCE = 0.7  # target; rounding up to whole leapfrogs raises it above 0.9
WARMUP = (60, 50)  # trajectories before and after the metric is re-estimated
SMALLEST = 1e-9  # smallest step size; a chain that needs a smaller one cannot move
WARM_LEAPFROGS = 8
PRIOR_DRAWS_WORTH = 5  # weight of q*'s covariance, in draws per dimension


def warmed_up(log_joint: LogJoint, known: Scout, chains: int, generator: torch.Generator) -> Sampler:
    """Start half of the chains from q* and half from annealed draws of the prior, and adapt metric and step sizes."""
    half, dtype = chains // 2, log_joint.probe_points.dtype
    ends = known.modes.starts(known.refit.q, half)
    start = torch.cat([known.refit.q.sample(chains - half, generator), ends.to(known.refit.q.loc.dtype)]).to(dtype)
    root = known.refit.q.root.to(dtype)
    first = torch.full_like(root[:, 0, 0], root.shape[-1] ** -0.25)
    with log_joint.frozen_weights():
        state = State.at(log_joint.grad, start)
        state, step, draws = _adapt(log_joint, state, root, first, WARMUP[0], generator)
        root = _reestimated(root, draws[WARMUP[0] // 3 :])
        state, step, _ = _adapt(log_joint, state, root, first, WARMUP[1], generator)
    return Sampler(log_joint, state, root, step.clamp_min(SMALLEST), generator)


def _adapt(
    log_joint: LogJoint, state: State, root: Tensor, step: Tensor, length: int, generator: torch.Generator
) -> tuple[State, Tensor, Tensor]:
    """Run trajectories with dual averaging; return the state, final step sizes, and the draws (length, C, N, d)."""
    adaptation, draws = DualAveraging(step, ACCEPTANCE), []
    for _ in range(length):
        n_steps = min(max(1, math.ceil(LENGTH / float(adaptation.step.median()))), WARM_LEAPFROGS)
        move = transition(log_joint.grad, state, root, adaptation.step, n_steps, generator, log_joint.leap)
        state = move.state
        adaptation.update(move.accept.mean(0))
        draws.append(state.z)
    return state, adaptation.final(), torch.stack(draws)


def _reestimated(root: Tensor, draws: Tensor) -> Tensor:
    """Return roots of the covariance within chains, shrunk towards that of q*."""
    length, chains, _, d = draws.shape
    dtype, root, draws = root.dtype, root.double(), draws.double()
    centred = draws - draws.mean(0)
    within = torch.einsum("scnd,scne->nde", centred, centred) / ((length - 1) * chains)
    weight = length * chains / (length * chains + PRIOR_DRAWS_WORTH * d * 4)
    return safe_cholesky(weight * within + (1 - weight) * root @ root.mT).to(dtype)
