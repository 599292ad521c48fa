"""Parallel tempering: every datum's own posterior, in whatever order the data are asked for."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from support.problems.catalogue import PROBLEMS

from elbowroom.inference.mcmc import diagnostics
from elbowroom.inference.references.hmc.tempering import Tempering
from elbowroom.inference.search.scout import scout


@pytest.mark.parametrize("rows", [[1], [2, 0], [3, 0, 2, 1]])
@pytest.mark.slow
def test_rows_in_any_order_get_their_own_posteriors(rows: list[int]) -> None:
    """Two modes of unequal mass, another place for every datum: mean and mode shares within 4.5 MCSE of the truth."""
    problem = PROBLEMS["bimodal_unequal_d2"](4, 1)
    known = scout(problem.log_joint)
    generator = torch.Generator().manual_seed(5)
    ensembles = Tempering(problem.log_joint, known.modes, known.refit.q, 8, generator, 6)
    index = torch.tensor(rows)
    ensembles.run(index, 100)
    chains = ensembles.run(index, 500)
    draws = chains.draws
    assert (diagnostics.rhat(draws) < 1.05).all()
    error = (draws.mean((0, 1)) - problem.mean[index]).abs() / diagnostics.mcse_mean(draws)
    assert (error < 4.5).all(), error
    lp = torch.stack([problem.log_joint(_spread(draws[:, -1, i], row, problem))[:, row] for i, row in enumerate(rows)], 1)
    torch.testing.assert_close(chains.lp[:, -1], lp)


@pytest.mark.slow
def test_autocorrelation_decreases_as_estimators_of_ess_take_for_granted() -> None:
    """Replicas that are carried up and down in step come back: pairs rho_2k + rho_2k+1 would rise again after a round trip."""
    problem = PROBLEMS["bimodal_unequal_d1"](12, 3)
    known = scout(problem.log_joint)
    ensembles = Tempering(problem.log_joint, known.modes, known.refit.q, 16, torch.Generator().manual_seed(5), 6)
    x = ensembles.run(torch.arange(12), 400).draws.double()[..., 0]
    x = (x - x.mean((0, 1))) / x.std((0, 1))
    pairs = [float((x[:, :-k] * x[:, k:]).mean() + (x[:, : -k - 1] * x[:, k + 1 :]).mean()) for k in range(2, 16, 2)]
    assert all(later < sooner + 0.03 for sooner, later in pairwise(pairs)), pairs
    assert pairs[0] > 0.3  # the modes are not left at once


def _spread(z: torch.Tensor, row: int, problem) -> torch.Tensor:
    """Put draws (C, d) of one datum beside the others' means: (C, N, d)."""
    out = problem.mean.expand(len(z), -1, -1).clone()
    out[:, row] = z
    return out
