"""The alarm `mode missed by the guide`: named where it is true, silent where the guide is merely bad."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from support.problems.catalogue import PROBLEMS
from support.problems.truth import F64, mode_shares

from elbowroom.analysis.audit.auditor import audit, audit_log_joint
from elbowroom.analysis.measures.missed_modes import missed_mass
from elbowroom.analysis.measures.table import MISSED
from elbowroom.inference.posterior import Posterior, in_chains
from elbowroom.inference.references.grid.grid import Grid
from elbowroom.inference.references.importance.guide import amortized
from elbowroom.inference.target.log_joint import LogJoint


def squares(y: torch.Tensor, idle: int = 0, share: float = 0.0, width: float = 0.15) -> LogJoint:
    """y = z_1^2 + noise; the guide puts `share` of its mass on the negative root."""
    d = 1 + idle
    prior = torch.tensor([2.0] + [1.0] * idle, dtype=F64)

    def model(y):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(d, dtype=F64), prior).to_event(1))
            pyro.sample("y", dist.Normal(z[..., 0].square(), 0.3), obs=y)

    def guide(y):
        root = y.sqrt()[..., None]
        loc = torch.cat([root, torch.zeros(*y.shape, idle, dtype=F64)], -1)
        scale = torch.cat([width / root, torch.ones(*y.shape, idle, dtype=F64)], -1)
        flip = torch.ones(d, dtype=F64)
        flip[0] = -1
        parts = dist.Normal(torch.stack([loc, loc * flip], -2), torch.stack([scale, scale], -2)).to_event(1)
        weight = torch.tensor([1 - share, share], dtype=F64).expand(*y.shape, 2)
        with pyro.plate("rows", len(y)):
            if share:
                pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(weight), parts))
            else:
                pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return LogJoint(model, guide, y)


def exactly(draws: torch.Tensor) -> Posterior:
    n = draws.shape[1]
    return Posterior("oracle", in_chains(draws), {}, ["exact"] * n, ["by construction"] * n)


def from_roots(y: torch.Tensor, idle: int, seed: int, n_draws: int = 2000, negative: float = 0.5) -> torch.Tensor:
    """Draws near the two roots, `negative` of them on the negative one: what a perfect sampler gives, nearly."""
    g = torch.Generator().manual_seed(seed)
    root = y.sqrt() + 0.15 / y.sqrt() * torch.randn(n_draws, len(y), generator=g, dtype=F64)
    sign = torch.where(torch.rand(n_draws, len(y), generator=g, dtype=F64) < negative, -1.0, 1.0)
    return torch.cat([(sign * root)[..., None], torch.randn(n_draws, len(y), idle, generator=g, dtype=F64)], -1)


@pytest.mark.parametrize("idle", [0, 20, pytest.param(6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("negative", [0.15, pytest.param(0.5, marks=pytest.mark.slow)])
def test_a_mode_of_known_mass_is_found_with_its_mass(idle: int, negative: float) -> None:
    y = torch.linspace(2, 20, 30, dtype=F64)
    log_joint = squares(y, idle)
    guide = amortized(log_joint, draws=1000, keep=1000, seed=1)
    mass = missed_mass(log_joint, guide, exactly(from_roots(y, idle, 2, negative=negative)))
    error = (negative * (1 - negative) / 200) ** 0.5
    assert ((mass - negative).abs() < 4.5 * error).all()


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_a_guide_on_both_modes_misses_none(share: float) -> None:
    y = torch.linspace(2, 20, 30, dtype=F64)
    log_joint = squares(y, share=share)
    guide = amortized(log_joint, draws=1000, keep=1000, seed=1)
    assert (missed_mass(log_joint, guide, exactly(from_roots(y, 0, 2))) <= MISSED).all()


@pytest.mark.parametrize(
    ("dim", "share"), [(8, 0.3), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((1, 0.3), (2, 0.5)))]
)
def test_a_mode_six_standard_deviations_away_is_seen(dim: int, share: float) -> None:
    """A draw of the guide that lies past the saddle, one in a thousand, must not make a way to the other mode."""
    n, weight = 30, torch.tensor([1 - share, share], dtype=F64)
    loc = torch.zeros(2, dim, dtype=F64)
    loc[1, 0] = 6.0
    posterior = dist.MixtureSameFamily(dist.Categorical(weight), dist.Normal(loc, torch.ones(2, dim, dtype=F64)).to_event(1))

    def model(y):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", posterior.expand([len(y)]))
            pyro.sample("y", dist.Normal(0 * z[..., 0], 1.0), obs=y)

    def guide(y):
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(torch.zeros(len(y), dim, dtype=F64), 1.0).to_event(1))

    log_joint = LogJoint(model, guide, torch.zeros(n, dtype=F64))
    torch.manual_seed(dim)
    mass = missed_mass(log_joint, amortized(log_joint, draws=1000, keep=1000, seed=2), exactly(posterior.sample((1000, n))))
    assert (mass > MISSED).double().mean() >= 0.9
    error = (share * (1 - share) / 200 / n) ** 0.5
    assert abs(mass[mass > 0].mean() - share) < 4.5 * error + 0.01


@pytest.mark.parametrize("width", [0.015, 0.6])
def test_a_guide_that_is_too_narrow_or_too_wide_misses_no_mode_but_its_mirror(width: float) -> None:
    y = torch.linspace(8, 20, 20, dtype=F64)
    log_joint = squares(y, width=width)
    guide = amortized(log_joint, draws=1000, keep=1000, seed=1)
    assert (missed_mass(log_joint, guide, exactly(from_roots(y, 0, 2, negative=0.0))) == 0).all()


@pytest.mark.parametrize(
    "name",
    [
        "heavy_tails_d1",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("banana", "funnel", "correlated", "mlp_gaussian", "simplex_d2", "positive", "hierarchy")
        ),
    ],
)
def test_no_false_alarm_where_there_is_one_mode(name: str) -> None:
    """Bent, correlated and heavy-tailed posteriors, with guides that are narrow, off centre and short."""
    problem = PROBLEMS[name](40, 29)
    log_joint = problem.log_joint
    grid = Grid()(log_joint, keep=1000, seed=3)
    guide = amortized(log_joint, draws=1000, keep=1000, seed=4)
    mass = missed_mass(log_joint, guide, grid)[problem.unimodal & grid.trusted]
    assert len(mass) > 20
    assert (mass <= MISSED).all()


@pytest.mark.parametrize("dim", [2, 20])
def test_a_shifted_guide_of_a_normal_posterior_misses_no_mode(dim: int) -> None:
    """Five posterior sd off centre and half as wide: the posterior lies where q has nothing, and no valley lies between."""
    y = torch.randn(20, dim, generator=torch.Generator().manual_seed(5), dtype=F64)

    def model(y):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(dim, dtype=F64), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)

    def guide(y):
        shift = torch.zeros(dim, dtype=F64)
        shift[0] = 5 * 0.5**0.5
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(y / 2 + shift, torch.full((dim,), 0.35, dtype=F64)).to_event(1))

    log_joint = LogJoint(model, guide, y)
    noise = torch.randn(1000, 20, dim, generator=torch.Generator().manual_seed(6), dtype=F64)
    found = amortized(log_joint, draws=1000, keep=1000, seed=7)
    assert (missed_mass(log_joint, found, exactly(y / 2 + 0.5**0.5 * noise)) == 0).all()


@pytest.mark.parametrize("name", ["bimodal_unequal_d1", pytest.param("bimodal_unequal_d2", marks=pytest.mark.slow)])
def test_the_smaller_mode_is_named_where_it_is_large_and_far(name: str) -> None:
    problem = PROBLEMS[name](42, 31)
    log_joint = problem.log_joint
    grid = Grid()(log_joint, keep=1000, seed=3)
    guide = amortized(log_joint, draws=1000, keep=1000, seed=4)
    mass = missed_mass(log_joint, guide, grid)
    held = mode_shares(problem, guide.draws)
    truth = torch.where(held == 0, problem.masses, 0).sum(-1)  # of the modes that no draw of the guide is in
    large = grid.trusted & (truth > 0.15)
    assert large.sum() > 10
    found = (mass > MISSED)[large].double().mean()
    assert found > 0.9
    assert (mass[grid.trusted & (truth == 0)] <= MISSED).all()


def test_uncertified_references_tell_nothing() -> None:
    y = torch.linspace(2, 20, 4, dtype=F64)
    log_joint = squares(y)
    reference = exactly(from_roots(y, 0, 2))
    reference.status[1] = "uncertified"  # type: ignore[index]
    mass = missed_mass(log_joint, amortized(log_joint, draws=1000, keep=1000, seed=1), reference)
    assert mass.isnan().tolist() == [False, True, False, False]


@pytest.mark.slow
def test_the_audit_names_the_data_and_the_mass() -> None:
    y = torch.tensor([4.0, 9.0, 16.0], dtype=F64)
    one = squares(y)
    found = audit(one.model, one.guide, y, references=["grid"])
    assert (abs(found.table["missed_mass"] - 0.5) < 0.16).all()
    assert "The guide misses a mode at 3 of 3 data (obs " in found.verdict
    assert "of the posterior there)" in found.verdict
    both = squares(y, share=0.5)
    assert "misses a mode" not in audit(both.model, both.guide, y, references=["grid"]).verdict


@pytest.mark.slow
def test_the_audit_names_it_with_idle_dimensions() -> None:
    """No grid in seven dimensions: HMC knows both modes, and the guide's good weights are not believed."""
    problem = PROBLEMS["square_idle"](12, 17)
    found = audit_log_joint(problem.log_joint, references=["hmc", "importance", "ais"], draws=4000, seed=3)
    far = (problem.log_joint.args[0] > 2).numpy() & (found.table["status"].sel(reference="hmc") == "certified").values
    assert far.sum() > 3
    assert (found.table["missed_mass"].values[far] > 0.3).all()
    assert "The guide misses a mode at" in found.verdict
    assert found.table["log_evidence"].isnull().values[far].all()
