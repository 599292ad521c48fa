"""Bridge sampling: the value is log p(x), its error is honest, and where the draws do not allow a value there is none."""

from __future__ import annotations

import pytest
import torch
from support.problems.affine import Affine
from support.problems.catalogue import PROBLEMS
from support.problems.truth import F64
from torch import Tensor

from elbowroom.inference.references.hmc import bridge as module
from elbowroom.inference.references.hmc.bridge import Bridged, bridge
from elbowroom.inference.references.hmc.hmc import HMC
from elbowroom.inference.search.sampler import Chains


def chains(log_joint: Affine, draws: Tensor) -> Chains:
    lp = log_joint(draws.flatten(0, 1)).unflatten(0, draws.shape[:2])
    return Chains(draws, lp, None, torch.ones_like(lp), torch.zeros_like(lp, dtype=torch.bool))


def bridged(log_joint: Affine, draws: Tensor, seed: int = 2) -> Bridged:
    return bridge(log_joint, chains(log_joint, draws), torch.Generator().manual_seed(seed))  # type: ignore[arg-type]


def holds(found: Bridged, truth: Tensor) -> None:
    """95 % intervals hold at their level, to what so many of them allow, and errors have the size that is said."""
    z = (found.value - truth) / found.error
    n = len(z)
    assert z.isfinite().all()
    assert abs((z.abs() < 1.96).double().mean() - 0.95) < 3.5 * (0.95 * 0.05 / n) ** 0.5
    assert 0.85 < z.square().mean().sqrt() < 1.15 + 2 / n**0.5
    assert z.abs().max() < 5


@pytest.mark.parametrize(("d", "shape"), [(1, 2.0), (2, None), (5, 2.0), (20, None), (20, 5.0)])
def test_the_error_is_honest_with_independent_draws(d: int, shape: float | None) -> None:
    log_joint = Affine.made(200, d, shape, seed=1)
    holds(bridged(log_joint, log_joint.draws(8, 250)), log_joint.log_z)


@pytest.mark.parametrize("correlation", [0.8, -0.4])
def test_the_error_is_honest_with_correlated_draws(correlation: float) -> None:
    """Autoregressive chains of normal posteriors: positive as of slow chains, negative as of HMC."""
    log_joint = Affine.made(200, 5, None, seed=3)
    noise, z = log_joint.draws(8, 500), log_joint.draws(8, 1)[:, 0]
    draws = []
    for t in range(500):
        z = correlation * z + (1 - correlation**2) ** 0.5 * noise[:, t]
        draws.append(z)
    holds(bridged(log_joint, torch.stack(draws, 1)), log_joint.log_z)


def test_each_half_is_bridged_with_what_was_fitted_to_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proposal fitted to its own draws would make every value too large."""
    log_joint, fitted = Affine.made(3, 2, None, seed=5), []
    draws = log_joint.draws(8, 100)
    whole = module.Mixture.fitted
    monkeypatch.setattr(module.Mixture, "fitted", lambda z, *rest: (fitted.append(z), whole(z, *rest))[1])
    bridged(log_joint, draws)
    assert torch.equal(fitted[0], draws[::2].flatten(0, 1))
    assert torch.equal(fitted[1], draws[1::2].flatten(0, 1))


@pytest.mark.parametrize("fault", ["apart", "wide"])
def test_draws_that_are_off_give_no_value(fault: str) -> None:
    """Both halves err alike and agree; importance sampling by the proposals, which needs no draws, tells."""
    log_joint = Affine.made(20, 3, None, seed=6)
    draws = log_joint.draws(8, 250)
    if fault == "wide":
        draws = 2 * draws
    else:
        shift = torch.einsum("nde,e->nd", log_joint.matrix, torch.full((3,), 0.5, dtype=F64))
        draws[::2], draws[1::2] = draws[::2] + shift, draws[1::2] - shift
    found = bridged(log_joint, draws)
    assert found.value.isnan().all()
    assert "importance sampling by the proposals differs by" in found.words(0)


def test_a_proposal_that_hardly_overlaps_gives_no_value() -> None:
    """Draws of a normal in 20 dimensions, of a density that is a fiftieth as wide: nothing in common."""
    log_joint = Affine.made(5, 20, None, seed=7)
    narrow = Affine(0.02 * log_joint.matrix, log_joint.log_z, None)
    found = bridged(narrow, log_joint.draws(8, 250))
    assert found.value.isnan().all()
    assert found.words(0).startswith("no value, ")


def test_density_that_is_zero_in_places_does_no_harm() -> None:
    """A proposal that reaches beyond the support: z_1 > 0 has half of the mass."""
    whole = Affine.made(200, 3, None, seed=8)
    log_joint = Affine(torch.eye(3, dtype=F64).expand(200, 3, 3), whole.log_z, None)
    density = Affine.__call__
    half = type("Half", (Affine,), {"__call__": lambda self, z: torch.where(z[..., 0] > 0, density(self, z), -torch.inf)})
    positive = half(log_joint.matrix, log_joint.log_z, None)
    draws = log_joint.draws(8, 250)
    draws[..., 0] = draws[..., 0].abs()
    holds(bridged(positive, draws), log_joint.log_z + torch.tensor(0.5, dtype=F64).log())


@pytest.mark.parametrize("name", ["linear_gaussian_d5", "mlp_bernoulli", "simplex_d2"])
def test_hmc_gives_log_p_of_every_certified_datum(name: str) -> None:
    problem = PROBLEMS[name](12, 17)
    found = HMC()(problem.log_joint, keep=400, seed=5)
    assert found.trusted.all()
    assert found.evidence is not None
    assert found.evidence.kind == "estimate"
    error = torch.hypot(found.evidence.error, torch.as_tensor(problem.error))
    assert ((found.evidence.value - problem.evidence).abs() < 4.5 * error).all()
    assert (found.evidence.error < 0.05).all()
    assert all("log p(x) by bridge sampling: standard error" in reason for reason in found.reason)


@pytest.mark.slow  # two minutes; `test_oracle` holds hmc to this problem, too
def test_two_modes_are_bridged_by_a_mixture() -> None:
    """z^2 with six idle coordinates: log p(x) is right at every certified datum, whose chains go to both modes."""
    problem = PROBLEMS["square_idle"](6, 22)
    found = HMC()(problem.log_joint, keep=400, seed=5)
    assert found.evidence is not None
    known = found.trusted & found.evidence.value.isfinite()
    assert known.sum() >= 4
    assert ((found.evidence.value - problem.evidence)[known].abs() < 4.5 * found.evidence.error[known]).all()
    assert (found.evidence.error[known] < 0.15).all()
