"""The alarm for modes: it hears of every mode that a run ended in, also where the runs' weights say little, and of no other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.problems.catalogue import PROBLEMS
from support.problems.truth import F64, Problem, mode_shares
from torch import Tensor

from elbowroom.inference.mcmc.leapfrog import State
from elbowroom.inference.references.hmc.certificate import certify
from elbowroom.inference.references.hmc.warmup import warmed_up
from elbowroom.inference.search.sampler import Chains, Sampler
from elbowroom.inference.search.scout import scout
from elbowroom.inference.search.unseen import Unseen, unseen

CHAINS, DRAWS = 8, 300
LEAST = 0.02  # mass of a mode that must be heard of


def _looked(problem: Problem, sampler: Sampler) -> tuple[Chains, Unseen]:
    rows = torch.arange(problem.log_joint.n_obs)
    chains = sampler.run(rows, DRAWS)
    modes = scout(problem.log_joint).modes
    return chains, unseen(problem.log_joint, modes, chains.draws, chains.lp, *sampler.metric(rows), sampler.generator)


def _from_the_guide(problem: Problem) -> Sampler:
    """Return chains that all start from q*, which sits on one mode."""
    joint, generator = problem.log_joint, torch.Generator().manual_seed(4)
    q = scout(joint).refit.q
    step = torch.full((joint.n_obs,), 0.6 * joint.dim**-0.25, dtype=F64)
    sampler = Sampler(joint, State.at(joint.grad, q.sample(CHAINS, generator)), q.root, step, generator)
    sampler.run(torch.arange(joint.n_obs), 100)
    return sampler


def _runs(problem: Problem) -> Tensor:
    """Return how many of the annealed runs ended in each mode, (N, K)."""
    label = problem.mode_of(scout(problem.log_joint).modes.end.double())
    return torch.stack([(label == k).sum(0) for k in range(problem.masses.shape[1])], -1)


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        ("bimodal_unequal_d1", 1),
        ("bimodal_unequal_d7", 1),
        *(pytest.param(n, 2, marks=pytest.mark.slow) for n in ("bimodal_unequal_d1", "bimodal_unequal_d7", "square_idle")),
    ],
)
def test_a_mode_that_a_run_ended_in_is_heard_of(name: str, seed: int) -> None:
    """Modes of 3 to 50 %: with two runs in it, the weights of a mode of 3 % can be a hundred times too small."""
    problem = PROBLEMS[name](70, seed)
    chains, found = _looked(problem, _from_the_guide(problem))
    lacking = (mode_shares(problem, chains.draws) == 0) & (problem.masses >= LEAST) & (_runs(problem) > 0)
    missed = lacking.any(-1)
    assert missed.sum() >= 15
    assert found.matters[missed].double().mean() >= 0.95  # two modes that exchange are one


def test_two_runs_of_tiny_weight_are_heard() -> None:
    """Two runs end in a mode, and their weights are a thousand times too small: the height of the mode speaks for it."""
    problem = PROBLEMS["bimodal_unequal_d1"](70, 1)
    sampler, rows = _from_the_guide(problem), torch.arange(70)
    chains, modes = sampler.run(rows, DRAWS), scout(problem.log_joint).modes
    end, log_weight = modes.end.clone(), modes.log_weight.clone()
    label, shares = problem.mode_of(end.double()), mode_shares(problem, chains.draws)
    planted = torch.zeros(70, dtype=torch.bool)
    for n in ((shares == 0) & (problem.masses >= LEAST)).any(-1).nonzero()[:, 0].tolist():
        lacking = label[:, n] == int(shares[n].argmin())
        there, elsewhere = lacking.nonzero()[:, 0], (~lacking).nonzero()[:, 0]
        if len(there) < 2 or not len(elsewhere):
            continue
        end[there[2:], n], log_weight[there[2:], n] = end[elsewhere[0], n], log_weight[elsewhere[0], n]
        log_weight[there[:2], n] = log_weight[elsewhere, n].logsumexp(0) - 10.0
        planted[n] = True
    modes = replace(modes, end=end, log_weight=log_weight)
    found = unseen(problem.log_joint, modes, chains.draws, chains.lp, *sampler.metric(rows), sampler.generator)
    assert planted.sum() >= 15
    assert found.matters[planted].double().mean() >= 0.95


@pytest.mark.parametrize("name", ["linear_gaussian_d20", "mlp_bernoulli"])
def test_one_mode_raises_no_alarm(name: str) -> None:
    problem = PROBLEMS[name](40, 3)
    known, generator = scout(problem.log_joint), torch.Generator().manual_seed(5)
    chains, found = _looked(problem, warmed_up(problem.log_joint, known, CHAINS, generator))
    fine = certify(chains, known.modes).holds & problem.unimodal
    assert fine.sum() >= 20
    assert not found.matters[fine].any()
