"""Criticism: exact levels where the model is right, and planted misfits found with their effects.

References are exact: the closed form of linear-Gaussian models, and enumeration of a discrete latent for counts and bits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from support.cases.vaes import linear_vae
from torch import Tensor

from elbowroom.analysis.checks import criticism
from elbowroom.analysis.checks.criticism import criticise
from elbowroom.analysis.checks.statistics import correlations, judge, kind_of, suited
from elbowroom.analysis.verdict.thresholds import EFFECTS
from elbowroom.inference.posterior import Posterior
from elbowroom.inference.references.closed_form import ClosedForm
from elbowroom.inference.references.enumeration import Enumeration
from elbowroom.inference.target.log_joint import LogJoint

F64 = torch.float64
RATES = torch.tensor([[1.0, 3.0, 5.0, 2.0], [6.0, 0.5, 5.0, 4.0]], dtype=F64)
SMALL = {"replicates": 99, "draws": 99}


def statistics(log_joint: LogJoint, reference: Posterior, **options) -> xr.Dataset:
    tree = criticise(log_joint, reference, **options)
    assert [tree.attrs[name] for name in ("joint", "residual", "predictive")] == ["", "", ""]
    return tree["statistics"].to_dataset()


def gaussian(x: Tensor, vae) -> tuple[LogJoint, Posterior]:
    log_joint = LogJoint(vae.model, vae.guide, x)
    return log_joint, ClosedForm()(log_joint, keep=8, seed=3)


def mixture(likelihood: Callable[[Tensor], dist.TorchDistribution], x: Tensor) -> tuple[LogJoint, Posterior]:
    """A discrete latent c in {0, 1} and independent entries of x given it; the posterior is enumerated."""

    def model(x):
        with pyro.plate("rows", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.5, 0.5], dtype=F64)))
            pyro.sample("x", likelihood(RATES[c]).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("c", dist.Categorical(torch.full((len(x), 2), 0.5, dtype=F64)))

    log_joint = LogJoint(model, guide, x)
    return log_joint, Enumeration()(log_joint, keep=8, seed=3)


def rates(n: int, seed: int) -> tuple[Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    return RATES[torch.randint(2, (n,), generator=generator)], generator


def counts(n: int, seed: int) -> Tensor:
    rate, generator = rates(n, seed)
    return torch.poisson(rate, generator=generator)


def smallest(found: xr.Dataset, group: str | None = None) -> float:
    part = found if group is None else found.isel(statistic=(found["group"].values == group))
    return float(part["p_adjusted"].min())


def level(make: Callable[[int], tuple[LogJoint, Posterior]], seeds: int) -> tuple[Tensor, Tensor]:
    """Assert that no statistic and no family exceeds a level more often than it may; return all p-values, and the family's."""
    found = [statistics(*make(seed), replicates=39, draws=39, seed=1000 * seed) for seed in range(seeds)]
    p_values = torch.tensor(np.stack([f["p_value"].values for f in found]))
    family = torch.tensor([smallest(f) for f in found])
    for alpha in (0.05, 0.1, 0.25, 0.5):
        slack = 4.5 * (alpha * (1 - alpha) / seeds) ** 0.5
        assert (p_values <= alpha + 1e-9).double().mean(0).max() < alpha + slack
        assert (family <= alpha + 1e-9).double().mean() < alpha + slack
    return p_values, family


def right_gaussian(seed: int) -> tuple[LogJoint, Posterior]:
    vae, _, oracle = linear_vae(2, 5, n=2)
    return gaussian(oracle.sample(60, torch.Generator().manual_seed(seed))[1], vae)


def right_counts(seed: int) -> tuple[LogJoint, Posterior]:
    return mixture(dist.Poisson, counts(60, seed))


def wrong_counts(seed: int) -> tuple[LogJoint, Posterior]:
    return mixture(dist.Poisson, counts(60, seed) * 3)


@pytest.mark.parametrize(("make", "longer"), [(right_counts, 99), (wrong_counts, 297)])
def test_a_p_value_near_the_level_is_computed_from_more(make: Callable[[int], tuple[LogJoint, Posterior]], longer: int) -> None:
    """The smallest p-value of 99 replicates is .01; here it counts as near, as that of 400 does in an audit."""
    tree = criticise(*make(1), **SMALL, seed=5)
    assert tree.attrs["replicates"] == tree.attrs["draws"] == str(longer)
    assert (smallest(tree["statistics"].to_dataset()) < 0.01) == (longer > 99)


@pytest.mark.slow
@pytest.mark.parametrize("make", [right_gaussian, right_counts])
def test_p_values_have_their_level_when_the_model_is_right(make: Callable[[int], tuple[LogJoint, Posterior]]) -> None:
    p_values, _ = level(make, 200)
    if make is right_gaussian:  # no ties: uniform on 1/40 .. 1, for which the largest |ECDF - u| has a known distribution
        ecdf = torch.stack([(p_values <= k / 40 + 1e-9).double().mean(0) - k / 40 for k in range(1, 41)])
        assert ecdf.abs().max() < 1.95 / 200**0.5  # Kolmogorov's p = .001


@pytest.mark.parametrize("make", [right_gaussian, right_counts])
@pytest.mark.slow
def test_a_few_seeds_of_the_level(make: Callable[[int], tuple[LogJoint, Posterior]]) -> None:
    level(make, 6)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_sound_model_is_left_alone(seed: int) -> None:
    vae, _, oracle = linear_vae(2, 5, n=2)
    found = statistics(*gaussian(oracle.sample(400, torch.Generator().manual_seed(seed))[1], vae), **SMALL)
    assert smallest(found) > 0.02
    assert abs(float(found["effect"].sel(statistic="residual_sd"))) < 0.06
    assert float(found["effect"].sel(statistic="pit")) < 0.02
    assert smallest(statistics(*mixture(dist.Poisson, counts(400, seed)), **SMALL)) > 0.02


def test_overdispersed_counts_under_a_poisson() -> None:
    """Negative binomial of the same means: var / mean is 1 + mean / 3 given c, and the residuals are too wide."""
    rate, generator = rates(400, 1)
    x = torch.poisson(rate * torch._standard_gamma(torch.full_like(rate, 3.0), generator=generator) / 3, generator=generator)
    found = statistics(*mixture(dist.Poisson, x), **SMALL)
    chosen = found.sel(statistic=["dispersion", "residual_sd", "residual_tails"])
    assert float(chosen["p_adjusted"].max()) <= 0.02
    assert (chosen["effect"].values > [0.3, 0.2, 0.5]).all()
    assert (chosen["effect_kind"].values == "relative").all()


def test_zero_inflated_counts_under_a_poisson() -> None:
    x = counts(400, 2)
    hidden = torch.rand(x.shape, generator=torch.Generator().manual_seed(5)) < 0.2
    found = statistics(*mixture(dist.Poisson, torch.where(hidden, 0.0, x)), **SMALL)
    zeros = found.sel(statistic="zeros")
    assert float(zeros["p_adjusted"]) <= 0.02
    expected = 0.2 + 0.8 * RATES.neg().exp().mean().item()
    assert float(zeros["value"]) == pytest.approx(expected, abs=0.03)
    assert float(zeros["null_mean"]) == pytest.approx(RATES.neg().exp().mean().item(), abs=0.01)
    assert float(zeros["effect"]) == pytest.approx(float(zeros["value"] / zeros["null_mean"]) - 1)


def test_heavy_tails_under_gaussian_noise() -> None:
    """Student's t of 3 degrees of freedom and the same variance."""
    vae, _, oracle = linear_vae(2, 5, n=2)
    generator = torch.Generator().manual_seed(1)
    z, noise = (torch.randn(600, k, generator=generator, dtype=F64) for k in (2, 5))
    chi = torch._standard_gamma(torch.full((600, 5), 1.5, dtype=F64), generator=generator) * 2
    x = z @ oracle.W.T + oracle.mu + oracle.psi.sqrt() * noise / chi.sqrt()
    found = statistics(*gaussian(x, vae), **SMALL)
    assert smallest(found, "residual") <= 0.02
    assert smallest(found, "joint") <= 0.02
    assert float(found["effect"].sel(statistic="largest")) > 0.3  # of a logarithm


def test_correlated_noise_under_independent_noise() -> None:
    """Noise of correlation .6 between columns 0 and 1, of which each margin is right."""
    vae, _, oracle = linear_vae(1, 6, n=2)
    generator = torch.Generator().manual_seed(1)
    z, noise = (torch.randn(500, k, generator=generator, dtype=F64) for k in (1, 6))
    noise[:, 1] = 0.6 * noise[:, 0] + 0.8 * noise[:, 1]
    found = statistics(*gaussian(z @ oracle.W.T + oracle.mu + oracle.psi.sqrt() * noise, vae), **SMALL)
    chosen = found.sel(statistic="residual_correlations")
    assert float(chosen["p_adjusted"]) <= 0.02
    # one pair of 15, less what z makes up for
    assert 0.4 * 0.6 / 15**0.5 < float(chosen["effect"]) < 1.2 * 0.6 / 15**0.5
    assert float(found["effect"].sel(statistic="pit")) < 0.05


def test_correlated_bits_under_independent_ones() -> None:
    """Two columns that are equal, of right margins."""
    rate, generator = rates(300, 3)
    x = (torch.rand(300, 4, generator=generator, dtype=F64) < rate / 7).double()
    sound = statistics(*mixture(lambda r: dist.Bernoulli(r / 7), x), **SMALL)
    assert smallest(sound) > 0.02
    assert "ones" in sound["statistic"]
    x[:, 2] = (x[:, 2] + x[:, 3] > 0).double()
    assert smallest(statistics(*mixture(lambda r: dist.Bernoulli(r / 7), x), **SMALL)) <= 0.02


@pytest.mark.slow
def test_entries_that_are_missing_are_left_out() -> None:
    """Holes, of which one column is nearly made: the sound model stays sound, and wide noise is found in what is left."""
    vae, x, _ = linear_vae(2, 5, n=300)
    log_joint, reference = gaussian(x, vae)
    holes = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    holes[5:, 4] = True
    hidden = torch.where(holes, torch.nan, x)
    # the posterior of the whole rows is not that of the rows with holes, but given its z the rest of x is as the model says
    with_holes = LogJoint(vae.model, vae.guide, hidden)
    found = criticise(with_holes, reference, **SMALL)
    assert smallest(found["statistics"].to_dataset(), "residual") > 0.02
    assert found["pit"]["effect"].shape == (5,)
    assert bool(found["posterior_predictive"]["x"].isnull().any())
    wide = LogJoint(vae.model, vae.guide, torch.where(holes, torch.nan, x + torch.randn_like(x)))
    assert float(criticise(wide, reference, **SMALL)["statistics"]["p_adjusted"].sel(statistic="residual_sd")) <= 0.02


def test_the_groups_are_arvizs() -> None:
    vae, x, _ = linear_vae(2, 5, n=150)
    log_joint, reference = gaussian(x, vae)
    tree = criticise(log_joint, reference, replicates=20, draws=19)
    assert set(tree.children) == {
        "statistics", "pit", "posterior_predictive", "prior_predictive", "observed_data", "log_likelihood",
    }  # fmt: skip
    assert tree["posterior_predictive"]["x"].dims == ("chain", "draw", "obs_id", "x_dim_0")
    assert tree["posterior_predictive"]["x"].shape == (1, 8, 100, 5)
    assert tree["prior_predictive"]["x"].shape == (1, 20, 100, 5)
    labels = torch.tensor(tree["observed_data"]["obs_id"].values.copy())
    torch.testing.assert_close(torch.tensor(tree["observed_data"]["x"].values.copy()).double(), x[labels], rtol=1e-6, atol=1e-6)
    z = reference.draws.flatten(0, 1)
    expected = log_joint.terms(z)[1][:, labels].float()
    torch.testing.assert_close(torch.tensor(tree["log_likelihood"]["x"].values)[0], expected)
    found = tree["statistics"].to_dataset()
    assert found["null"].shape == (found.sizes["statistic"], 20)
    assert "no statistic speaks against" in tree.attrs["sentence"]


def test_of_very_many_data_some_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criticism, "LARGE", 5 * 40)
    vae, x, _ = linear_vae(2, 5, n=150)
    log_joint, reference = gaussian(x, vae)
    tree = criticise(log_joint, reference, replicates=39, draws=39)
    assert tree.attrs["data"] == "40"
    labels = torch.tensor(tree["observed_data"]["obs_id"].values.copy())
    assert len(labels) == 40
    assert int(labels.max()) >= 40
    torch.testing.assert_close(torch.tensor(tree["observed_data"]["x"].values.copy()).double(), x[labels], rtol=1e-6, atol=1e-6)
    assert smallest(tree["statistics"].to_dataset()) > 0.02


def test_data_without_a_certified_posterior_give_no_latents() -> None:
    vae, x, _ = linear_vae(2, 5, n=60)
    log_joint, reference = gaussian(x, vae)
    bad = reference.draws.clone()
    bad[:, :, 30:] = torch.nan
    sites = {"z": bad.clone()}
    half = Posterior("hmc", bad, sites, ["certified"] * 30 + ["uncertified"] * 30, [""] * 60)
    tree = criticise(log_joint, half, replicates=39, draws=39)
    assert tree.attrs["certified"] == "0.5000"
    assert int(tree["observed_data"]["obs_id"].max()) < 30
    assert bool(tree["statistics"].to_dataset()[["value", "p_value", "effect"]].notnull().all().to_array().all())
    none = Posterior("hmc", bad, sites, ["uncertified"] * 60, [""] * 60)
    tree = criticise(log_joint, none, replicates=9, draws=9)
    assert tree.attrs["residual"] == "not available: no datum has a certified posterior"
    assert "kurtosis" in tree["statistics"]["statistic"]
    assert "log_likelihood" not in tree["statistics"]["statistic"]


def test_two_observed_sites_are_told_apart() -> None:
    def model(x, y):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)
            pyro.sample("y", dist.Poisson(z.exp()), obs=y)

    def guide(x, y):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(0.8 * x, 0.45))

    generator = torch.Generator().manual_seed(0)
    z = torch.randn(100, generator=generator, dtype=F64)
    x = z + 0.5 * torch.randn(100, generator=generator, dtype=F64)
    y = torch.poisson(z.exp(), generator=generator)
    # the z that made the data is one exact draw of their posterior
    reference = Posterior("made", z[None, None, :, None], {"z": z[None, None]}, ["exact"] * 100, [""] * 100)
    tree = criticise(LogJoint(model, guide, x, y), reference, **SMALL)
    found = tree["statistics"].to_dataset()
    assert {"x: kurtosis", "y: zeros", "x: pit", "y: pit", "log_likelihood"} <= set(found["statistic"].values)
    assert {"pit_x", "pit_y"} <= set(tree.children)
    assert smallest(found) > 0.02


def test_a_model_that_cannot_be_simulated_gives_its_reason() -> None:
    def model(y):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(y), 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=2 * y + 1)

    def guide(y):
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(y, 0.5))

    y = torch.linspace(-1, 1, 30, dtype=F64)
    draws = torch.zeros(1, 4, 30, 1, dtype=F64)
    reference = Posterior("made", draws, {"z": draws[..., 0]}, ["exact"] * 30, [""] * 30)
    tree = criticise(LogJoint(model, guide, y), reference, replicates=9, draws=19)
    assert "not available: simulate: the values of observed site 'y'" in tree.attrs["joint"]
    assert tree.attrs["residual"] == ""  # draws at given latents need no argument to replace
    few = criticise(LogJoint(model, guide, y[:4]), reference, replicates=9, draws=9)
    assert "fewer than 10 data" in few.attrs["sentence"]
    assert not few.children


def test_the_family_of_statistics_has_its_level_and_sees_one_that_only_the_data_have() -> None:
    generator = torch.Generator().manual_seed(0)
    p_family = []
    for _ in range(300):
        values = {"a": torch.randn(100, generator=generator), "b": torch.randn(100, generator=generator).exp()}
        values["c"] = torch.randn(100, 4, generator=generator)
        p_family.append(min(one.p_family for one in judge(values).values()))
    for alpha in (0.05, 0.2):
        share = (torch.tensor(p_family) <= alpha + 1e-9).double().mean().item()
        assert abs(share - alpha) < 4.5 * (alpha * (1 - alpha) / 300) ** 0.5
    values["never"] = torch.zeros(100)
    values["only"] = torch.zeros(100).index_fill(0, torch.tensor(0), 0.3)
    found = judge(values)
    assert found["never"].p_value == found["never"].p_family == 1
    assert found["only"].p_family == pytest.approx(0.01)
    assert found["only"].effect == pytest.approx(0.3)


def test_correlations_of_pairs_use_what_both_have() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, generator=generator, dtype=F64)
    x[:, 1] += x[:, 0]
    torch.testing.assert_close(correlations(x), torch.corrcoef(x.T)[[0, 0, 1], [1, 2, 2]])
    x[:, 2] = 1.0
    assert correlations(x)[1:].tolist() == [0, 0]
    x[25:, 1] = torch.nan
    assert correlations(x).isfinite().all()
    assert [kind_of(t) for t in (torch.eye(2), 3 * torch.eye(2), x)] == ["binary", "counts", "real"]


@pytest.mark.parametrize("integers", [False, True])
def test_the_effect_of_column_means_knows_no_unit_of_measurement(integers: bool) -> None:
    rows = torch.randn(30, 50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[0] += 0.5
    rows = (20 + 4 * rows).round() if integers else rows
    found = []
    for unit in (1.0, 100.0):
        (one,) = [one for one in suited(unit * rows[0]) if one.name == "column_means"]
        found.append(judge({one.name: torch.stack([one.value(unit * x) for x in rows])})[one.name])
    assert found[0].effect == pytest.approx(found[1].effect)
    assert found[0].effect == pytest.approx(0.5, abs=0.15)
    assert found[0].p_value == found[1].p_value


@pytest.mark.parametrize(
    ("name", "shape", "kind", "small", "large"),
    [  # each in its own unit: what an effect of .05 is to one statistic is nothing to another
        ("kurtosis", lambda g, t: g.standard_t(t, (4000, 2)), "kurtosis", 30, 7),
        ("skewness", lambda g, t: g.gamma(t, size=(4000, 2)) / t, "skewness", 100, 4),
        ("largest", lambda g, t: t * g.standard_normal((4000, 2)), "largest", None, None),
        ("column_means", lambda g, t: t + g.standard_normal((4000, 2)), "sd", 0.07, 0.2),
    ],
)
def test_each_statistic_has_a_limit_in_its_own_unit(name, shape, kind, small, large) -> None:
    generator = np.random.default_rng(1)
    null = [torch.as_tensor(generator.standard_normal((4000, 2))) for _ in range(100)]
    (one,) = [one for one in suited(null[0]) if one.name == name]
    assert one.kind == kind

    def effect(x) -> float:
        rows = [one.value(torch.as_tensor(x)), *map(one.value, null)]
        return abs(judge({name: torch.stack(rows)}, kinds={name: one.kind})[name].effect)

    if name == "largest":  # of one entry, in sd: half as far again as any that the model makes is 50 % or so
        x = generator.standard_normal((4000, 2))
        x[0, 0] = 1.5 * np.abs(np.stack(null)).max(axis=(1, 2)).mean()
        assert effect(x) == pytest.approx(0.5, abs=0.06)  # its logarithm would be 0.41
        return
    assert 0.05 < effect(shape(generator, small)) < EFFECTS[kind] < effect(shape(generator, large))
