"""The audit's table, its files, and the words that it may use."""

from __future__ import annotations

import math
from pathlib import Path

import arviz as az
import arviz_plots
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from support.cases.vaes import linear_vae, mlp_vae, set_guide

from elbowroom.analysis.audit.auditor import Audit, audit, audit_log_joint
from elbowroom.analysis.measures.distances import sliced_wasserstein
from elbowroom.analysis.measures.evidence import LOWER_BOUND
from elbowroom.analysis.measures.tabulate import VARIABLES
from elbowroom.analysis.verdict.summary import sentences
from elbowroom.errors import RunFolderError, UserError
from elbowroom.inference.references.grid.grid import Grid
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.models.guides.normal import FullRankNormal

F64 = torch.float64


@pytest.fixture(scope="module")
def small() -> Audit:
    vae = mlp_vae(2)
    x = torch.bernoulli(torch.full((9, 12), 0.5), generator=torch.Generator().manual_seed(0))
    return audit(vae.model, vae.guide, x, references=["grid"])


def test_the_gap_is_evidence_minus_elbo_with_an_interval(small: Audit) -> None:
    t = small.table
    np.testing.assert_allclose(t["gap_total"], t["log_evidence"] - t["elbo"])
    assert (t["gap_total_lower"] <= t["gap_total"]).all()
    assert (t["gap_total"] <= t["gap_total_upper"]).all()
    np.testing.assert_allclose(t["rate"] + t["distortion"], -t["elbo"], atol=1e-8)
    assert (t["gap_total"] > -3 * t["elbo_se"]).all()


def test_every_variable_has_units_and_a_long_name(small: Audit) -> None:
    for name in VARIABLES:
        assert small.table[name].attrs["units"]
        assert small.table[name].attrs["long_name"]


def test_gap_equals_the_kl_by_quadrature(small: Audit) -> None:
    """KL(q || p) integrated on a fine lattice over q's own support, with the evidence of the audit."""
    vae = mlp_vae(2).double()
    x = torch.tensor(small.posteriors["grid"].observed_data["x"].values, dtype=F64)
    log_joint = LogJoint(vae.model, vae.guide, x)
    q = vae.posterior(x)
    axis = torch.linspace(-6, 6, 121, dtype=F64)
    lattice = torch.cartesian_prod(axis, axis)
    z = (q.mean + lattice[:, None] * q.variance.sqrt()).detach()
    with torch.no_grad():
        log_q, log_p = log_joint.log_guide(z), log_joint(z)
    weight = torch.softmax(log_q, 0)
    kl = (weight * (log_q - log_p)).sum(0) + torch.tensor(small.table["log_evidence"].values)
    error = torch.tensor(small.table["gap_total"].values) - kl
    assert (error.abs() < 4.5 * torch.tensor(small.table["elbo_se"].values) + 1e-6).all()


def test_files_round_trip_and_open_in_arviz(small: Audit, tmp_path: Path) -> None:
    small.save(tmp_path)
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {
        "audit.nc",
        "audit.csv",
        "diagnosis.nc",
        "guide.nc",
        "grid.nc",
    }
    again = Audit.load(tmp_path)
    assert again.verdict == small.verdict
    assert again.table.identical(small.table)
    for method in ("guide", "grid"):
        tree = az.from_netcdf(tmp_path / "posteriors" / f"{method}.nc")
        summary = az.summary(tree, var_names=["z"])
        assert len(summary) == 18
        assert (summary["r_hat"] < 1.05).all()
        means = tree.posterior["z"].mean(("chain", "draw")).values
        moments = again.posteriors[method]["moments"]
        sd = np.sqrt(np.einsum("nii->ni", moments["covariance"].values))
        assert (abs(means - moments["mean"].values) < 4.5 * sd / 1000**0.5).all()
        forest = az.plot_forest(tree, var_names=["z"], coords={"obs_id": [0, 1]}, combined=True)
        if az.__version__.startswith("0."):
            (axes,) = forest
            assert len(axes.get_yticklabels()) == 4
        plt.close("all")
        plots = arviz_plots.plot_dist(again.posteriors[method], var_names=["z"], coords={"obs_id": [0, 1]})
        assert plots.viz is not None
        plt.close("all")
    text = (tmp_path / "audit.csv").read_text().splitlines()
    assert len(text) == 10
    assert "mean_error[grid]" in text[0]


def test_saving_over_another_audit_leaves_nothing_of_it(small: Audit, tmp_path: Path) -> None:
    small.save(tmp_path)
    (tmp_path / "posteriors" / "grid.nc").rename(tmp_path / "posteriors" / "hmc.nc")
    small.save(tmp_path)
    assert set(Audit.load(tmp_path).posteriors) == {"guide", "grid"}


def test_saving_to_a_file_says_so(small: Audit, tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(RunFolderError, match="this is a file; name a folder"):
        small.save(tmp_path / "x")


def test_dims_and_groups_are_arviz(small: Audit) -> None:
    tree = small.posteriors["guide"]
    assert tree.posterior["z"].dims == ("chain", "draw", "obs_id", "latent")
    assert tree.sample_stats["lp"].dims == ("chain", "draw", "obs_id")
    assert tree.observed_data["x"].dims == ("obs_id", "x_dim_0")
    assert tree.attrs["method"] == "guide"


def test_a_folder_without_an_audit_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"no audit.nc here; run `elbowroom audit"):
        Audit.load(tmp_path)


def test_beyond_the_grid_a_bad_guide_gets_a_bound_that_is_called_one() -> None:
    """d = 5, no closed form offered: k-hat is large, so there is no value of log p(x) and no gap, only a lower bound."""
    vae, x, oracle = linear_vae(5, 8, noise=0.05)
    set_guide(vae, oracle)
    log_joint = LogJoint(vae.model, vae.guide, x)
    result = audit_log_joint(log_joint, references=[], draws=2000)
    table = result.table
    bound = table["evidence_method"] == LOWER_BOUND
    assert bound.all()
    assert table["log_evidence"].isnull().all()
    assert table["gap_total"].isnull().all()
    assert table["log_evidence_upper"].isnull().all()
    exact = oracle.log_evidence(x).numpy()
    # Markov: a bound exceeds log p + b with probability at most exp(-b)
    assert ((table["log_evidence_lower"].values - exact) < 7).all()
    assert (table["log_evidence_lower"].values < exact).mean() > 0.5
    assert "lower bound" in result.verdict
    assert "is known: the latent space is too large for the references here" in result.verdict
    assert all("log p(x) [nats], 0 data" in name or "log p(x)" not in name for name, _ in result.lines())


def test_beyond_the_grid_a_good_guide_gets_an_estimate_with_its_error() -> None:
    vae, x, oracle = linear_vae(5, 8, family=FullRankNormal)
    set_guide(vae, oracle)
    with torch.no_grad():  # 10 % too wide: good weights, but not constant ones
        vae.posterior.encoder.body.bias[5:10] += 0.1
    result = audit_log_joint(LogJoint(vae.model, vae.guide, x), references=[], draws=4000)
    table = result.table
    assert set(table["evidence_method"].values) == {"importance sampling estimate"}
    error = table["log_evidence"].values - oracle.log_evidence(x).numpy()
    assert (abs(error) < 4.5 * table["log_evidence_se"].values).all()
    assert table.sizes["reference"] == 0


def test_the_csv_has_a_column_for_each_reference(tmp_path: Path) -> None:
    vae, x, oracle = linear_vae(2, 6, n=5)
    set_guide(vae, oracle)
    result = audit(vae.model, vae.guide, x, references=["closed_form", "grid"])
    result.to_csv(tmp_path / "audit.csv")
    header = (tmp_path / "audit.csv").read_text().splitlines()[0].split(",")
    assert len(header) == len(set(header))
    for name in ("mean_error", "status", "refinement_error"):
        assert f"{name}[closed_form]" in header
        assert f"{name}[grid]" in header


def test_auto_takes_the_closed_form_where_there_is_one() -> None:
    vae, x, oracle = linear_vae(4, 6, n=6)
    set_guide(vae, oracle)
    result = audit(vae.model, vae.guide, x)
    assert result.table["reference"].values.tolist() == ["closed_form"]


@pytest.mark.slow
def test_evidence_agrees_with_importance_sampling_where_k_is_small() -> None:
    vae = mlp_vae(2)
    x = torch.bernoulli(torch.full((30, 12), 0.5))
    log_joint = LogJoint(vae.model, vae.guide, x)
    grid = audit_log_joint(log_joint, references=["grid"]).table
    sampled = audit_log_joint(log_joint, references=[], seed=1).table
    good = (sampled["pareto_k"] < 0.5) & sampled["log_evidence"].notnull()
    assert good.sum() > 0
    z_score = (grid["log_evidence"] - sampled["log_evidence"])[good] / sampled["log_evidence_se"][good]
    assert (abs(z_score) < 4.5).all()


@pytest.mark.slow
def test_blocks_of_data_give_the_table_of_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, x, oracle = linear_vae(2, 6, n=10)
    log_joint = LogJoint(vae.model, vae.guide, x)
    whole = audit_log_joint(log_joint, references=["grid"], draws=400, keep=200).table
    monkeypatch.setattr("elbowroom.analysis.audit.auditor.ARRAY", 1600)
    said: list[str] = []
    blocks = audit_log_joint(log_joint, references=["grid"], draws=400, keep=200, progress=said.append).table
    assert "grid for data 4..7 of 10" in said
    np.testing.assert_allclose(whole["log_evidence"], blocks["log_evidence"], atol=1e-8)
    assert whole["obs_id"].equals(blocks["obs_id"])


def test_sliced_wasserstein_of_a_shift() -> None:
    """In one dimension W1 of a shift is the shift; sliced over a plane it shrinks by the mean |cosine|, 2/pi."""
    a = torch.randn(500, 3, 1, dtype=F64)
    torch.testing.assert_close(sliced_wasserstein(a, a + 0.7), torch.full((3,), 0.7, dtype=F64))
    b = torch.randn(500, 2, 2, dtype=F64)
    shifted = b + torch.tensor([0.6, 0.8], dtype=F64)
    distance = sliced_wasserstein(b, shifted, projections=4000)
    torch.testing.assert_close(distance, torch.full((2,), 2 / math.pi, dtype=F64), atol=0.02, rtol=0)
    with pytest.raises(ValueError, match="samples differ in shape"):
        sliced_wasserstein(a, b)


@pytest.mark.parametrize("reference", ["grid", "closed_form"])
def test_a_guide_equal_to_the_reference_lies_at_the_noise_floor(reference: str) -> None:
    """Below it the draws would share random numbers, above it the distance would be biased."""
    vae, x, oracle = linear_vae(2, 6, family=FullRankNormal)
    set_guide(vae, oracle)
    table = audit(vae.model, vae.guide, x, references=[reference]).table
    ratio = (table["sliced_wasserstein"] / table["noise_floor"]).values
    assert 0.8 < np.median(ratio) < 1.25


def test_a_missed_mode_is_not_called_close_to_the_true_posterior() -> None:
    """Sixteen mirror modes in four dimensions, the guide on one: importance sampling cannot see the others, and it is said."""
    y = torch.ones(4, 4, dtype=F64)

    def model(y):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4, dtype=F64), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z**2, 0.05).to_event(1), obs=y)

    def guide(y):
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(torch.ones(4, 4, dtype=F64), 0.03).to_event(1))

    verdict = audit(model, guide, y, references=[]).verdict
    assert "Where the guide puts mass" in verdict
    assert "a mode that the guide misses would be missing in it too" in verdict
    assert "close to the true one" not in verdict


def test_a_small_missed_mode_or_a_heavy_tail_of_gaps_is_not_called_close_everywhere() -> None:
    """A missed mode of 9 % costs 0.094 nats, which is a small gap."""
    x = torch.zeros(40, dtype=F64)

    def model(x):
        weight, loc = torch.tensor([0.91, 0.09], dtype=F64), torch.tensor([-4.0, 4.0], dtype=F64)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(weight.expand(len(x), 2)), dist.Normal(loc, 0.5)))
            pyro.sample("x", dist.Normal(torch.zeros(len(x), dtype=F64), 1.0), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(torch.full_like(x, -4.0), 0.5))

    found = audit(model, guide, x, references=["grid"], diagnose=False)
    assert found.verdicts[0].verdict == "mode missed"
    assert "not everywhere close to the true one" in found.verdict


def test_an_uncertified_grid_is_not_overruled_by_a_guide_on_one_mode() -> None:
    y = torch.tensor([1.0, 2.0], dtype=F64)

    def model(y):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=F64), 1.0).to_event(1))
            pyro.sample("y", dist.Laplace(z[..., 0].abs(), 0.1), obs=y)

    def guide(y):
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Laplace(y.unsqueeze(-1), 0.11).to_event(1))

    table = audit(model, guide, y, references=[Grid(tolerance=1e-12, max_points=60)]).table
    assert set(table["status"].values.flatten()) == {"uncertified"}
    assert set(table["evidence_method"].values) == {LOWER_BOUND}
    assert table["log_evidence"].isnull().all()


def test_contradicting_and_infinite_numbers_are_said(small: Audit) -> None:
    negative = small.table.assign(gap_total=small.table["gap_total"] - 30)
    assert sentences(negative)[0].startswith("The numbers contradict each other: for 9 of 9 data log p(x) lies below the ELBO")
    infinite = small.table.assign(gap_total=xr.full_like(small.table["gap_total"], np.inf))
    assert sentences(infinite)[0] == "The ELBO of 9 of 9 data is minus infinity: q puts mass where p(x, z) is zero."


def test_expectations_under_guide_and_reference_of_certified_data() -> None:
    """E[z_0] under a guide shifted by 0.3, and under the exact posterior."""
    vae, x, oracle = linear_vae(2, 6, n=20)
    set_guide(vae, oracle)
    with torch.no_grad():
        vae.posterior.encoder.body.bias[0] += 0.3
    found = audit(vae.model, vae.guide, x, references=["closed_form"])
    shift = found.expectations(lambda sites: sites["z"][..., 0])
    assert abs((shift["difference"] - 0.3) / shift["difference_se"]).max() < 4.5
    found.table["status"][3:] = "uncertified"
    assert found.expectations(lambda sites: sites["z"][..., 0]).sizes["obs_id"] == 3
    with pytest.raises(UserError, match="'hmc' is not exact or certified for any datum; the audit's references: closed_form"):
        found.expectations(lambda sites: sites["z"], "hmc")
