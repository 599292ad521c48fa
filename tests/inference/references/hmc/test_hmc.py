"""Batched HMC: its certificates are neither fooled nor silent, and what one datum does touches no other."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import Any

import arviz_stats
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from support.problems.catalogue import PROBLEMS
from support.problems.truth import F64, mode_shares
from torch import Tensor

from elbowroom.analysis import idata
from elbowroom.analysis.datatree import to_datatree
from elbowroom.inference.mcmc import diagnostics
from elbowroom.inference.mcmc.leapfrog import State
from elbowroom.inference.posterior import Posterior
from elbowroom.inference.references.hmc import hmc
from elbowroom.inference.references.hmc.hmc import HMC
from elbowroom.inference.search.sampler import Sampler
from elbowroom.inference.search.scout import scout
from elbowroom.inference.search.single_precision import in_precision
from elbowroom.inference.target.log_joint import LogJoint

KEEP = 2000
QUICK = HMC(tempering=False)
SHORT = HMC(chains=4, draws=100, max_draws=100, tempering=False)


def conjugate(y: Tensor, *, scale: float = 1.0, slope: float = 1.0, shift: float = 0.0) -> LogJoint:
    """z ~ N(0, 1), y ~ N(shift + slope z, scale); the second argument is added to log p(x, z)."""

    def model(y: Tensor, broken: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=y.dtype), 1.0))
            pyro.sample("y", dist.Normal(shift + slope * z, scale), obs=y)
            pyro.factor("broken", broken)

    def guide(y: Tensor, broken: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            width = (1 + (slope / scale) ** 2) ** -0.5
            pyro.sample("z", dist.Normal(slope * (y - shift) / scale**2 * width**2, 1.2 * width))

    return LogJoint(model, guide, y, torch.zeros_like(y))


@cache
def _mlp(n: int = 6) -> LogJoint:
    return PROBLEMS["mlp_gaussian"](n, 21).log_joint


@cache
def _short() -> Posterior:
    return SHORT(_mlp(), keep=400, seed=3)


@cache
def _found(seed: int = 3) -> Posterior:
    return QUICK(_mlp(), keep=KEEP, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["square", "square_idle"])
def test_the_naive_recipe_is_fooled_and_the_reference_is_not(name: str) -> None:
    """All chains from q*: R-hat below 1.01 and half of the mass missing. Chains and runs from the prior tell of the mode."""
    problem = PROBLEMS[name](6, 22)
    log_joint, generator = problem.log_joint, torch.Generator().manual_seed(4)
    q = scout(log_joint).refit.q
    step = torch.full((6,), 0.6 * log_joint.dim**-0.25, dtype=F64)
    sampler = Sampler(log_joint, State.at(log_joint.grad, q.sample(8, generator)), q.root, step, generator)
    sampler.run(torch.arange(6), 100)
    chains = sampler.run(torch.arange(6), 250)
    fooled = (diagnostics.rhat(chains.draws) < 1.01).all(-1) & (mode_shares(problem, chains.draws).amin(-1) == 0)
    assert fooled.sum() >= 4  # data whose y is near zero have modes that touch
    found = HMC(tempering=False, max_draws=250)(log_joint, keep=KEEP, seed=5)
    assert not (found.trusted & fooled).any()
    for i in fooled.nonzero()[:, 0].tolist():
        assert "annealed runs from the prior found a mode" in found.reason[i] or "R-hat" in found.reason[i]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["square", "square_idle"])
def test_tempering_gives_both_modes_their_mass(name: str) -> None:
    problem = PROBLEMS[name](6, 22)
    found = HMC()(problem.log_joint, keep=KEEP, seed=5)
    share = mode_shares(problem, found.draws)[found.trusted]
    assert len(share) >= 4
    assert ((share - 0.5).abs() < 0.15).all()
    assert any("parallel tempering" in reason for reason in found.reason)


def test_every_datum_has_a_status_and_a_reason() -> None:
    found = _found()
    assert len(found.status) == len(found.reason) == 6
    assert int(found.trusted.sum()) == found.status.count("certified")
    assert found.status.count("certified") + found.status.count("uncertified") == 6
    assert found.status.count("certified") >= 5
    for status, reason in zip(found.status, found.reason, strict=True):
        assert reason.startswith("hmc: R-hat") == (status == "certified")
    assert all(value.shape == (6,) and value.isfinite().all() for value in found.stats.values())


def test_a_sentence_for_chains_that_were_cut_short() -> None:
    found = _short()
    assert set(found.status) == {"uncertified"}
    assert all("bulk ESS" in reason or "R-hat" in reason or "found a mode" in reason for reason in found.reason)
    assert (found.stats["ess_bulk_min"] < 1000).all()
    assert found.draws.isfinite().all()  # what there is is kept


def test_a_budget_in_the_past_certifies_nothing_that_does_not_hold() -> None:
    short = HMC(chains=4, draws=100)
    found = short(_mlp(), keep=400, seed=3, until=time.monotonic() - 1)
    assert set(found.status) == {"uncertified"}
    assert all(reason.endswith("the budget ended") for reason in found.reason)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_draws() -> None:
    once, again, other = _short(), SHORT(_mlp(), keep=400, seed=3), SHORT(_mlp(), keep=400, seed=4)
    assert torch.equal(again.draws, once.draws)
    assert again.reason == once.reason
    assert torch.isclose(other.draws, once.draws).double().mean() < 0.01


@pytest.mark.slow
def test_a_datum_without_a_density_does_not_touch_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hmc, "HALVINGS", 0)  # of the steps of a datum that no step helps
    y = torch.linspace(-2, 2, 6, dtype=F64)
    bad = torch.arange(6) == 2
    log_joint = conjugate(y)  # which is refused with such a datum: it turns up afterwards
    log_joint.args = (y, torch.where(bad, -torch.inf, 0.0).to(y))
    found = HMC(tempering=False, max_draws=250)(log_joint, keep=KEEP, seed=6)
    assert found.status[2] == "uncertified"
    assert [status for i, status in enumerate(found.status) if i != 2] == ["certified"] * 5
    mean, sd = found.moments()
    error = diagnostics.mcse_mean(found.draws)
    assert (((mean[:, 0] - y / 2).abs() / error[:, 0])[~bad] < 4.5).all()
    assert ((sd[:, 0] - 0.5**0.5).abs()[~bad] < 0.05).all()


@pytest.mark.slow
def test_blocks_are_each_of_their_own_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    y = torch.zeros(7, dtype=F64)  # equal data: equal random numbers would show
    log_joint = conjugate(y)
    monkeypatch.setattr(hmc, "LARGE_ARRAY", 8 * 250 * 3)
    found = QUICK(log_joint, keep=KEEP, seed=7)
    assert found.draws.shape == (8, 250, 7, 1)
    assert found.status == ["certified"] * 7
    error = diagnostics.mcse_mean(found.draws)
    assert (found.draws.mean((0, 1)).abs() < 4.5 * error).all()
    flat = found.draws.flatten(0, 1)[..., 0]
    same = torch.corrcoef(flat.T) - torch.eye(7, dtype=F64)
    assert same.abs().max() < 0.15
    assert all(value.shape == (7,) for value in found.stats.values())


@pytest.mark.slow
def test_all_data_may_go_on_to_tempering_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    run = HMC._run

    def first_certifies_none(self: HMC, engine: Any, names: Tensor, *rest: Any) -> Tensor:
        return names[torch.tensor([3, 0, 4, 2, 1])] if isinstance(engine, Sampler) else run(self, engine, names, *rest)

    monkeypatch.setattr(HMC, "_run", first_certifies_none)
    y = torch.tensor([-8.0, -3.0, 0.0, 2.0, 9.0], dtype=F64)
    found = HMC()(conjugate(y), keep=KEEP, seed=9)
    assert found.status == ["certified"] * 5
    error = diagnostics.mcse_mean(found.draws)[:, 0]
    assert ((found.draws.mean((0, 1))[:, 0] - y / 2).abs() < 4.5 * error).all()


def test_a_program_whose_data_cannot_be_taken_apart() -> None:
    y = torch.linspace(-2, 2, 5, dtype=F64)

    def model() -> None:
        with pyro.plate("rows", 5):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            pyro.sample("y", dist.Normal(z, torch.tensor([0.1, 1.0, 0.5, 2.0, 0.02], dtype=F64)), obs=y)

    def guide() -> None:
        with pyro.plate("rows", 5):
            pyro.sample("z", dist.Normal(0.5 * y, 0.7))

    log_joint = LogJoint(model, guide)
    assert not log_joint.separable()
    found = QUICK(log_joint, keep=KEEP, seed=8)
    assert found.status == ["certified"] * 5
    precision = 1 + torch.tensor([0.1, 1.0, 0.5, 2.0, 0.02], dtype=F64) ** -2
    error = diagnostics.mcse_mean(found.draws)[:, 0]
    assert ((found.draws.mean((0, 1))[:, 0] - y * (precision - 1) / precision).abs() < 4.5 * error).all()


@pytest.mark.parametrize(("options", "single"), [({}, True), ({"scale": 1e-5, "slope": 1e-5, "shift": 1.0}, False)])
def test_single_precision_only_where_its_rounding_is_small(options: dict[str, Any], single: bool) -> None:
    """y ~ N(1 + 1e-5 z, 1e-5): in single precision 1 + 1e-5 z has a thousandth of z's digits."""
    y = options.get("shift", 0.0) + options.get("slope", 1.0) * torch.linspace(-2, 2, 5, dtype=F64)
    log_joint = conjugate(y, **options)
    chosen = in_precision(log_joint, scout(log_joint).refit.q, "auto", torch.Generator().manual_seed(9))
    assert (chosen.probe_points.dtype == torch.float32) == single
    found = QUICK(log_joint, keep=KEEP, seed=9)
    assert found.draws.dtype == F64
    error = diagnostics.mcse_mean(found.draws)[:, 0]
    z = torch.linspace(-2, 2, 5, dtype=F64)
    assert ((found.draws.mean((0, 1))[:, 0] - z / 2).abs() < 4.5 * error)[found.trusted].all()
    assert found.trusted.all()


@pytest.mark.slow
def test_arviz_finds_the_same_in_the_written_file(tmp_path: Path) -> None:
    """The draws of one round are all kept: R-hat and ESS of the file are those of the certificate."""
    found = HMC(max_draws=250, tempering=False)(_mlp(), keep=KEEP, seed=3)
    idata.write(to_datatree(found, obs_id=range(6)), tmp_path / "hmc.nc")
    tree = idata.read(tmp_path / "hmc.nc")
    draws = tree["posterior"].dataset["z"]
    lp = tree["sample_stats"].dataset["lp"]
    for i in range(6):
        of_z = [draws.isel(obs_id=i).values[..., j] for j in range(2)]
        rhat = max(float(arviz_stats.base.array_stats.rhat(x)) for x in (*of_z, lp.isel(obs_id=i).values))
        bulk = min(float(arviz_stats.base.array_stats.ess(x, method="bulk")) for x in of_z)
        np.testing.assert_allclose(rhat, float(found.stats["rhat_max"][i]), atol=2e-3)
        np.testing.assert_allclose(bulk, float(found.stats["ess_bulk_min"][i]), rtol=2e-2)
