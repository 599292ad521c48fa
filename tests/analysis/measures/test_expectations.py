"""E_q f against E_p f: closed forms of a linear-Gaussian model, errors that cover, and what is not finite counted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import xarray as xr
from support.cases.vaes import linear_vae, set_guide

from elbowroom.analysis.datatree import to_datatree
from elbowroom.analysis.measures.expectations import expectations
from elbowroom.inference.posterior import Posterior
from elbowroom.inference.references.closed_form import ClosedForm
from elbowroom.inference.references.importance.guide import amortized
from elbowroom.inference.target.log_joint import LogJoint

F64 = torch.float64


def first(sites: xr.Dataset) -> xr.DataArray:
    return sites["z"].isel(latent=0, drop=True)


def trees(n: int = 60, seed: int = 0, keep: int = 1000) -> tuple[xr.DataTree, xr.DataTree, torch.Tensor, torch.Tensor]:
    """Of the best diagonal guide and the closed form; posterior means and covariance."""
    vae, x, oracle = linear_vae(2, 5, n=n, seed=seed)
    set_guide(vae, oracle)
    log_joint = LogJoint(vae.model, vae.guide, x)
    guide = amortized(log_joint, draws=keep, keep=keep, seed=seed + 1)
    exact = ClosedForm()(log_joint, keep=keep, seed=seed + 2)
    q, p = (to_datatree(posterior, obs_id=range(n)) for posterior in (guide, exact))
    return q, p, *oracle.posterior(x)


def tree_of(z: torch.Tensor, method: str, obs_id: range | None = None, lp: torch.Tensor | None = None) -> xr.DataTree:
    """A posterior of draws (chain, draw, N)."""
    n = z.shape[2]
    stats = {} if lp is None else {"lp": lp}
    posterior = Posterior(method, z[..., None], {"z": z[..., None]}, ["certified"] * n, [""] * n, sample_stats=stats)
    return to_datatree(posterior, obs_id=obs_id or range(n))


@pytest.mark.parametrize("seed", range(3))
def test_means_agree_and_squares_do_not(seed):
    """The best diagonal guide has the right mean, and a variance of 1 / M_jj in the place of (M^-1)_jj."""
    q, p, mean, covariance = trees(seed=seed)
    found = expectations(first, q, p)
    assert found.attrs == {"guide": "guide", "reference": "closed_form"}
    assert abs(found["z"].values).max() < 4.5
    assert abs((found["reference"].values - mean[:, 0].numpy()) / found["reference_se"].values).max() < 4.5
    assert float(found["mean_difference"]) == pytest.approx(float(found["difference"].mean()))
    assert abs(float(found["mean_difference"])) < 4.5 * float(found["mean_difference_se"])
    square = expectations(lambda s: (first(s) - xr.DataArray(mean[:, 0].numpy(), dims="obs_id")) ** 2, q, p)
    missing = 1 / torch.linalg.inv(covariance)[0, 0] - covariance[0, 0]
    z = (square["difference"] - float(missing)) / square["difference_se"]
    assert abs(z.values).max() < 5
    assert float(square["mean_difference"]) == pytest.approx(float(missing), abs=4.5 * float(square["mean_difference_se"]))
    assert abs(float(missing)) > 10 * float(square["mean_difference_se"])


def test_errors_cover():
    """The difference in its standard errors is standard normal: independent draws, and the two are independent."""
    q, p, *_ = trees(n=800, keep=400)
    z = expectations(first, q, p)["z"].values
    assert abs(z.mean()) < 4.5 / math.sqrt(800)
    assert abs(z.std() - 1) < 4.5 / math.sqrt(1600)


def test_errors_of_chains_are_those_of_their_effective_draws():
    """AR(1) with phi = 0.9: an ESS of a nineteenth; as independent draws the error would be 4.4 times too small."""
    noise = torch.randn(4, 1000, 300, dtype=F64)
    z = noise.clone()
    for t in range(1, 1000):
        z[:, t] = 0.9 * z[:, t - 1] + math.sqrt(1 - 0.81) * noise[:, t]
    guide = tree_of(torch.randn(4, 1000, 300, dtype=F64), "guide")
    found = expectations(first, guide, tree_of(z, "hmc"))
    assert float(found["reference_se"].mean()) == pytest.approx(math.sqrt(19 / 4000), rel=0.1)
    assert abs(found["z"].values.std() - 1) < 4.5 / math.sqrt(600) + 0.05
    alike = expectations(first, guide, tree_of(z, "grid"))
    assert float(alike["reference_se"].mean()) == pytest.approx(1 / math.sqrt(4000), rel=0.05)


@pytest.mark.parametrize("f", [first, lambda s: first(s) > 0.3], ids=["mean", "probability"])
def test_errors_of_resampled_draws_know_of_repeats(f):
    """50 particles of equal weight, drawn 800 times: the error is that of 50, also of a function that has two values."""
    particles = torch.randn(50, 400, dtype=F64)
    index = torch.randint(50, (800, 400))
    z, lp = (t.gather(0, index).reshape(4, 200, 400) for t in (particles, particles.cos()))
    found = expectations(f, tree_of(torch.randn(4, 1000, 400, dtype=F64), "guide"), tree_of(z, "importance", lp=lp))
    assert abs(found["z"].values.std() - 1) < 4.5 / math.sqrt(800) + 0.05
    assert abs(found["z"].values.mean()) < 4.5 / math.sqrt(400)


def test_further_dimensions_and_coordinates_stay():
    q, p, *_ = trees(n=10)
    found = expectations(lambda s: s["z"].assign_coords(latent=["a", "b"]), q, p)
    assert found["difference"].dims == ("obs_id", "latent")
    assert found["mean_difference"].dims == ("latent",)
    assert list(found["latent"].values) == ["a", "b"]
    assert found["difference"].attrs["long_name"] == "E_q f(z) - E_p f(z)"


def test_data_are_matched_by_their_labels():
    z = torch.arange(5, dtype=F64).expand(4, 10, 5) + 0.1 * torch.randn(4, 10, 5, dtype=F64)
    q, p = tree_of(z, "guide", range(5)), tree_of(z.flip(2)[..., :3], "grid", range(4, 1, -1))
    found = expectations(first, q, p)
    assert sorted(found["obs_id"].values) == [2, 3, 4]
    assert abs(found["difference"].values).max() < 0.3
    with pytest.raises(ValueError, match="no datum in common"):
        expectations(first, q, tree_of(z, "grid", range(10, 15)))


def test_what_is_not_finite_is_counted_not_averaged():
    z = torch.randn(4, 50, 6, dtype=F64)
    z[0, 3, 1] = torch.inf
    z[1, :2, 2] = torch.nan
    found = expectations(first, tree_of(z, "guide"), tree_of(torch.randn(4, 50, 6, dtype=F64), "grid"))
    assert found["guide_lost"].values.tolist() == [0, 1, 2, 0, 0, 0]
    assert found["reference_lost"].values.tolist() == [0] * 6
    assert np.isnan(found["difference"].values[1:3]).all()
    assert np.isnan(found["difference_se"].values[1:3]).all()
    assert int(found["lost"]) == 2
    assert float(found["mean_difference"]) == pytest.approx(found["difference"].values[[0, 3, 4, 5]].mean())
    nothing = expectations(first, tree_of(z * torch.nan, "guide"), tree_of(z, "grid"))
    assert np.isnan(float(nothing["mean_difference"]))
    assert int(nothing["lost"]) == 6


def test_a_constant_has_no_error():
    q, p, *_ = trees(n=4)
    found = expectations(lambda s: 0 * first(s) + 3, q, p)
    assert (found["guide"] == 3).all()
    assert (found["difference_se"] == 0).all()
    chains = expectations(lambda s: 0 * first(s), q, tree_of(torch.randn(4, 250, 4, dtype=F64), "hmc"))
    assert (chains["reference_se"] == 0).all()


def test_f_must_keep_the_draws():
    q, p, *_ = trees(n=4)
    with pytest.raises(ValueError, match="f must keep the dimensions chain, draw and obs_id; its result lacks chain, draw"):
        expectations(lambda s: first(s).mean(("chain", "draw")), q, p)
