"""Calibration in both regimes: sound guides pass, planted faults are named; coverage, z-score, contraction are closed forms."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from support.cases.priors import DISCRETE, by_name, data_of, vae_of
from support.cases.vaes import linear_vae, set_guide
from torch import Tensor

from elbowroom.analysis import idata
from elbowroom.analysis.checks import ranks
from elbowroom.analysis.checks.calibration import LEVELS, observed, simulated
from elbowroom.errors import UnsupportedProgram
from elbowroom.inference.references.closed_form import ClosedForm
from elbowroom.inference.references.enumeration import Enumeration
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.models.guides.normal import FullRankNormal

F64 = torch.float64


def exact(n: int = 60, seed: int = 0, dim: int = 2) -> tuple[LogJoint, Tensor, Tensor, Tensor]:
    """A linear-Gaussian model whose full-rank guide is the posterior: the log joint, x, posterior means and covariance."""
    vae, x, oracle = linear_vae(dim, 5, family=FullRankNormal, n=n, seed=seed)
    set_guide(vae, oracle)
    return LogJoint(vae.model, vae.guide, x), x, *oracle.posterior(x)


def faulty(scale: float = 1.0, shift: float = 0.0, n: int = 60, seed: int = 0) -> LogJoint:
    """The same with the posterior's root scaled, and its mean moved along the first coordinate, in posterior sd."""
    vae, x, oracle = linear_vae(2, 5, n=n, seed=seed)
    root = scale * torch.linalg.cholesky(oracle.posterior(x)[1])
    move = torch.tensor([shift, 0.0], dtype=F64) * oracle.posterior(x)[1].diagonal().sqrt()

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(oracle.posterior(x)[0] + move, scale_tril=root))

    return LogJoint(vae.model, guide, x)


def blind(n: int = 60, seed: int = 0) -> LogJoint:
    """q(z|x) = p(z)."""
    vae, x, _ = linear_vae(2, 5, n=n, seed=seed)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))

    return LogJoint(vae.model, guide, x)


def ndtr(value: float) -> float:
    return 0.5 * math.erfc(-value / math.sqrt(2))


@pytest.mark.parametrize("seed", range(4))
def test_a_sound_guide_passes(seed):
    log_joint = exact(seed=seed)[0]
    found = simulated(log_joint, data=300, draws=63, seed=seed)
    assert list(found["quantity"].values) == [
        *("z[0]", "z[1]", "|z|", "projection[0]", "projection[1]", "projection[2]"),
        *("log p(z)", "log p(x|z)", "log p(x, z)"),
    ]
    assert found["p_holm"].min() > 1e-3
    assert ((found["direction"] == "") == (found["p_holm"] > 0.05)).all()
    assert found["effect"].max() < 2.2 / math.sqrt(300)  # the KS distance exceeds that with probability 1e-4
    assert found.attrs["regime"] == "simulated"
    assert found.attrs["summary"].startswith("300 simulated data, 63 guide draws each: ")
    if found["p_holm"].min() > 0.05:
        assert "none of 9 quantities deviates at a familywise level of 5 %" in found.attrs["summary"]


@pytest.mark.slow
@pytest.mark.parametrize("regime", ["simulated", "observed"])
def test_the_familywise_level_of_sound_guides(regime):
    """Holm on dependent quantities errs on the safe side: at most 5 % and 1 % of sound guides are called off."""
    p = []
    for seed in range(400):
        log_joint = exact(n=150, seed=seed % 20)[0]
        reference = ClosedForm()(log_joint, keep=8, seed=10_000 + seed)
        found = (
            simulated(log_joint, data=150, draws=63, seed=seed)
            if regime == "simulated"
            else observed(log_joint, reference, draws=63, seed=seed)
        )
        p.append(float(found["p_holm"].min()))
    for level in (0.05, 0.01):
        share = np.mean(np.array(p) <= level)
        print(f"{regime}: {share:.4f} at {level}")
        assert share <= level + 3 * math.sqrt(level * (1 - level) / 400)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_guide_that_ignores_x_passes_on_z_and_fails_on_the_likelihood(seed):
    found = simulated(blind(seed=seed), data=400, draws=127, seed=seed)
    p = found["p_holm"].to_series()
    alone = [name for name in p.index if "x" not in name]
    assert len(alone) == 7
    assert (p[alone] > 1e-3).all()
    assert (p[["log p(x|z)", "log p(x, z)"]] < 1e-6).all()
    assert found["direction"].sel(quantity="log p(x|z)") == "shifted down"
    assert found["effect"].sel(quantity="log p(x|z)") > 0.2
    assert abs(found["contraction"].mean()) < 0.02


@pytest.mark.parametrize(("scale", "word"), [(0.6, "too narrow"), (1.7, "too wide")])
@pytest.mark.parametrize("regime", ["simulated", "observed"])
def test_wrong_scales_are_named_and_cover_by_the_closed_form(scale, word, regime):
    """Coverage of a central interval of level c by draws of N(m, (s sd)^2) is 2 Phi(s Phi^-1((1 + c) / 2)) - 1."""
    log_joint = faulty(scale, n=500)
    if regime == "simulated":
        found = simulated(log_joint, data=500, draws=1023, seed=1)
    else:
        found = observed(log_joint, ClosedForm()(log_joint, keep=8, seed=5), draws=1023, seed=1)
    of_z = found.sel(quantity=["z[0]", "z[1]"])
    assert (of_z["direction"] == word).all()
    assert (of_z["p_holm"] < 1e-4).all()
    for level in LEVELS:
        expected = 2 * ndtr(scale * math.sqrt(2) * float(torch.erfinv(torch.tensor(level, dtype=F64)))) - 1
        share = found["coverage"].sel(level=level)
        assert (abs(share - expected) < 4 * found["coverage_se"].sel(level=level) + 0.003).all()


@pytest.mark.parametrize(("shift", "word"), [(0.5, "shifted up"), (-0.5, "shifted down")])
def test_a_biased_guide_is_called_shifted_where_it_is(shift, word):
    log_joint = faulty(shift=shift, n=400)
    for found in (
        simulated(log_joint, data=400, seed=2),
        observed(log_joint, ClosedForm()(log_joint, keep=8, seed=5), seed=2),
    ):
        assert found["direction"].sel(quantity="z[0]") == word
        assert found["p_holm"].sel(quantity="z[1]") > 1e-3
        # P(PIT <= u) of a shift by s sd is Phi(Phi^-1(u) + s), farthest from u in the middle
        assert float(found["effect"].sel(quantity="z[0]")) == pytest.approx(2 * ndtr(0.25) - 1, abs=0.09)
        assert "z[0]" in found.attrs["summary"]
        assert float(found["z_score"].sel(coordinate="z[0]").mean()) == pytest.approx(shift, abs=4 / 20)


@pytest.mark.parametrize("data", [25, 60, 500])
def test_z_score_and_contraction_are_the_closed_forms(data):
    """The z-score of the exact guide is N(0, 1 + 1/L) but for heavier tails, the contraction 1 - var(z_j | x)."""
    log_joint, _, _, covariance = exact()
    found = simulated(log_joint, data=data, draws=400, seed=3)
    assert found["pit"].shape == (9, data)
    z = found["z_score"].values
    assert abs(z.mean(0)).max() < 4.5 / math.sqrt(data)
    assert abs(z.std(0) - 1).max() < 4.5 / math.sqrt(2 * data) + 0.01
    right = 1 - covariance.diagonal().numpy()
    spread = (1 - right) * math.sqrt(2 / 400)
    assert (abs(found["contraction"].values - right) < 6 * spread + 0.03 * (1 - right)).all()
    assert (
        abs(found["contraction"].mean("simulation").values - right) < 4.5 * spread / math.sqrt(data) + 0.03 * (1 - right)
    ).all()


def test_a_prior_that_depends_on_covariates_contracts_datum_by_datum():
    """z ~ N(0, s_n), x ~ N(z, 1): the posterior's variance is s^2 / (1 + s^2), the contraction s^2 / (1 + s^2)."""
    scale = torch.tensor([0.5, 1.0, 3.0], dtype=F64).repeat(20)
    x = scale * torch.randn(60, dtype=F64)

    def model(x, s):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(s), s))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, s):
        gain = s.square() / (1 + s.square())
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(gain * x, gain.sqrt()))

    found = simulated(LogJoint(model, guide, x, scale), data=150, draws=500, seed=0)
    assert found["p_holm"].min() > 1e-3
    gain = (scale.square() / (1 + scale.square())).numpy()[found["obs_id"].values]
    assert (abs(found["contraction"].values[:, 0] - gain) < 0.4 * (1 - gain)).all()


def test_real_data_need_not_come_from_the_model():
    """Regime R at x that the model never makes: the exact guide is calibrated, one that a regime S check passes is not."""
    log_joint, x, *_ = exact(n=300)
    far = LogJoint(log_joint.model, log_joint.guide, 5 * x.abs() ** 1.5 - 3)
    reference = ClosedForm()(far, keep=40, seed=9)
    found = observed(far, reference, seed=1)
    assert found["p_holm"].min() > 1e-3
    assert found.attrs["regime"] == "observed"
    assert found.attrs["method"] == "closed_form"
    unaware = blind(n=300)  # the prior, as good on average over x of the model as it is wrong at these
    elsewhere = LogJoint(unaware.model, unaware.guide, far.data())
    wrong = observed(elsewhere, ClosedForm()(elsewhere, keep=40, seed=9), seed=1)
    assert (wrong["p_holm"].sel(quantity=["z[0]", "z[1]", "|z|", "log p(x|z)"]) < 1e-6).all()


def test_only_certified_data_count():
    """The draws of the uncertified are far off, or NaN, and change nothing."""
    log_joint = exact(n=300)[0]
    whole = ClosedForm()(log_joint, keep=8, seed=4)
    bad = torch.arange(300) % 3 == 0
    draws = torch.where(bad[:, None], torch.nan, whole.draws + 100 * bad[:, None])
    status = ["uncertified" if b else "certified" for b in bad.tolist()]
    found = observed(log_joint, dataclasses.replace(whole, draws=draws, status=status), seed=0)
    assert found.sizes["simulation"] == 200
    assert (found["obs_id"].values % 3 != 0).all()
    assert found.attrs["left_out"] == 100
    assert "200 of 300 data (100 are not certified and left out)" in found.attrs["summary"]
    assert found["p_holm"].min() > 1e-3
    assert (found["lost"] == 0).all()
    few = observed(log_joint, dataclasses.replace(whole, status=status), data=50, seed=0)
    assert few.sizes["simulation"] == 50
    assert (few["obs_id"].values % 3 != 0).all()


def test_without_a_certified_datum_there_is_nothing_to_say():
    log_joint = exact()[0]
    reference = dataclasses.replace(ClosedForm()(log_joint, keep=8, seed=4), status=["uncertified"] * 60)
    with pytest.raises(UnsupportedProgram, match="closed_form certified none of 60 data"):
        observed(log_joint, reference)
    with pytest.raises(ValueError, match="the reference is of 60 data, the model and guide of 30"):
        observed(exact(n=30)[0], reference)


def test_a_model_that_cannot_be_simulated_from_says_so():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=2 * x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(UnsupportedProgram, match="simulate: the values of observed site 'x' are not an argument"):
        simulated(LogJoint(model, guide, torch.randn(10, dtype=F64)), data=20)


def test_values_that_are_no_numbers_are_counted_and_said():
    """log p(x|z) is NaN where z > 2, minus infinity where z < -2: NaN leave a datum out, infinite values have ranks."""

    limit = [math.inf]  # while the pair is built and tested

    class Broken(dist.Normal):
        def log_prob(self, value: Tensor) -> Tensor:
            off = torch.where(self.loc > limit[0], torch.nan, torch.where(self.loc < -limit[0], -torch.inf, 0.0))
            return super().log_prob(value) + off

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", Broken(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))

    log_joint = LogJoint(model, guide, torch.randn(50, dtype=F64))
    limit[0] = 2.0
    found = simulated(log_joint, data=100, draws=40, seed=0)
    lost, infinite = found["lost"].to_series(), found["infinite"].to_series()
    expected = 1 - (1 - ndtr(-2)) ** 41
    assert lost["z[0]"] == lost["log p(z)"] == 0
    assert abs(lost["log p(x|z)"] / 100 - expected) < 0.2
    assert abs(infinite["log p(x|z)"] / 100 - expected) < 0.2
    assert int(found["pit"].sel(quantity="log p(x|z)").isnull().sum()) == lost["log p(x|z)"]
    assert found["pit"].sel(quantity="z[0]").notnull().all()
    assert "left out of a quantity, whose values are not numbers there" in found.attrs["summary"]
    assert "infinite values of a quantity, which are ranked" in found.attrs["summary"]
    assert np.isfinite(found["p_value"].sel(quantity="log p(x|z)"))


@pytest.mark.parametrize("case", **by_name(DISCRETE))
def test_discrete_latents_are_calibrated_with_random_ties(case):
    """With the exact posterior for a guide the PIT is uniform despite the ties; with the encoder it need not be."""
    vae, data = vae_of(case), data_of(case, 6)
    vae.adapt(**data)
    found = simulated(LogJoint(vae.model, vae.guide, **data), data=200, draws=31, seed=0)
    assert {"log p(z)", "log p(x|z)", "log p(x, z)"} <= set(found["quantity"].values)
    assert "coverage" not in found
    assert found["pit"].notnull().all()
    assert ((found["pit"] >= 0) & (found["pit"] <= 1)).all()


def mixture(error: float, n: int = 200) -> LogJoint:
    """Two components, c ~ Bernoulli(0.3), x ~ N(2 c, 1); the guide's log odds are off by `error`."""

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.3, dtype=F64)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(2 * c, 1.0), obs=x)

    def guide(x):
        logits = math.log(0.3 / 0.7) + 2 * x - 2 + error
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Bernoulli(logits=logits))

    return LogJoint(model, guide, torch.randn(n, dtype=F64, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("regime", ["simulated", "observed"])
def test_a_wrong_classifier_fails_and_the_right_one_passes(regime):
    def calibrated(log_joint):
        if regime == "simulated":
            return simulated(log_joint, data=500, draws=63, seed=1)
        return observed(log_joint, Enumeration()(log_joint, keep=100, seed=3), draws=63, seed=1)

    right, wrong = mixture(0.0, 500), mixture(1.5, 500)
    assert right.dim == 0
    found = calibrated(right)
    assert list(found["quantity"].values) == ["c", "log p(z)", "log p(x|z)", "log p(x, z)"]
    assert found["p_holm"].min() > 1e-3
    assert found["pit"].notnull().all()
    found = calibrated(wrong)
    assert found["p_holm"].sel(quantity="c") < 1e-2
    assert found["direction"].sel(quantity="c") == "shifted up"


def test_discrete_sites_beside_continuous_ones_are_calibrated_as_well():
    """c ~ Bernoulli, z ~ N(0, 1), x ~ N(z + 2 c, 1), y ~ N(2 c, 1) : the guide's c is exact or not, its z given c is exact."""

    def pair(error: float) -> LogJoint:
        def model(x, y):
            with pyro.plate("data", len(x)):
                c = pyro.sample("c", dist.Bernoulli(torch.full_like(x, 0.3)), infer={"enumerate": "parallel"})
                z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)
                pyro.sample("y", dist.Normal(2 * c, 1.0), obs=y)

        def guide(x, y):
            with pyro.plate("data", len(x)):
                pyro.sample("c", dist.Bernoulli(logits=math.log(0.3 / 0.7) + 2 * y - 2 + error))
                pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

        x, y = torch.randn(2, 100, dtype=F64, generator=torch.Generator().manual_seed(3))
        return LogJoint(model, guide, x, y)

    right, wrong = (simulated(pair(error), data=400, draws=63, seed=2) for error in (0.0, 1.5))
    assert "c" in right["quantity"].values
    assert right["p_holm"].min() > 1e-3
    assert wrong["direction"].sel(quantity="c") == "shifted up"
    assert (wrong["p_holm"].sel(quantity=["z[0]", "log p(x|z)"]) > 0.01).all()


def test_chunks_of_draws_change_nothing_but_the_random_numbers(monkeypatch):
    log_joint = exact()[0]
    monkeypatch.setattr(ranks, "ARRAY", 9 * 60 * 7)  # seven draws at a time
    sizes = []
    draw = LogJoint.draw
    monkeypatch.setattr(LogJoint, "draw", lambda self, which, n, seed: (sizes.append(n), draw(self, which, n, seed))[1])
    found = simulated(log_joint, data=60, draws=64, seed=0)
    assert max(sizes) <= 7 * 9 // 2  # of the prior's, which are two numbers each
    assert found["p_holm"].min() > 1e-3
    assert abs(found["z_score"].values.std() - 1) < 0.35
    assert (abs(found["contraction"].mean("simulation") - (1 - exact()[3].diagonal().numpy())) < 0.05).all()


@pytest.mark.parametrize("data", [40, 60, 150])
def test_where_arguments_cannot_be_taken_apart_all_data_are_simulated(data, monkeypatch):
    log_joint = exact()[0]
    monkeypatch.setattr(LogJoint, "separable", lambda self: False)
    found = simulated(log_joint, data=data, draws=31, seed=0)
    assert found["pit"].shape[1] == data
    counts = np.bincount(found["obs_id"].values, minlength=60)
    assert counts.max() - counts.min() <= 1
    assert found["p_holm"].min() > 1e-3
    values = found["pit"].sel(quantity="z[0]").values
    assert len(np.unique(values)) == data  # no simulation twice
    reference = dataclasses.replace(ClosedForm()(log_joint, keep=8, seed=4), status=["certified"] * 40 + ["uncertified"] * 20)
    part = observed(log_joint, reference, draws=31, seed=0)
    assert part.sizes["simulation"] == 40
    assert part["obs_id"].max() == 39


def test_the_same_seed_gives_the_same_numbers_and_another_does_not():
    log_joint = exact()[0]
    first, second, third = (simulated(log_joint, data=50, draws=31, seed=s) for s in (0, 0, 1))
    assert first.equals(second)
    assert not first["pit"].equals(third["pit"])


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_the_datasets_go_through_a_file(kind, tmp_path):
    log_joint, reference = (exact()[0], ClosedForm()) if kind == "continuous" else (mixture(0.0, 40), Enumeration())
    for found in (
        observed(log_joint, reference(log_joint, keep=8, seed=1), draws=31, seed=0),
        simulated(log_joint, data=40, draws=31, seed=0),
    ):
        idata.write(found, tmp_path / "found.nc")
        again = idata.read_table(tmp_path / "found.nc")
        assert set(again.data_vars) == set(found.data_vars)
        assert again.attrs == found.attrs
        np.testing.assert_array_equal(again["direction"].values, found["direction"].values)
        np.testing.assert_array_equal(again["pit"].values, found["pit"].values)


def test_many_latents_are_tested_ten_at_a_time_and_covered_all():
    found = simulated(exact(dim=12)[0], data=80, draws=31, seed=0)
    assert [name for name in found["quantity"].values if name.startswith("z[")] == [f"z[{j}]" for j in range(10)]
    assert found.sizes["coordinate"] == 12
    assert found["coverage"].shape == (4, 12)


def test_one_latent_has_no_projections():
    found = simulated(exact(dim=1)[0], data=80, draws=31, seed=0)
    assert list(found["quantity"].values) == ["z[0]", "|z|", "log p(z)", "log p(x|z)", "log p(x, z)"]
