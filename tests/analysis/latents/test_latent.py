"""latent.nc: densities, moments and pictures that the report draws, against the closed form."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from support.cases.vaes import linear_vae, mlp_vae, set_guide

from elbowroom.analysis.audit.auditor import audit_log_joint
from elbowroom.analysis.latents.summary import describe, spread
from elbowroom.analysis.plots.report import latent as plots_latent
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.models.guides.normal import FullRankNormal


def audited(vae, x, **options):
    return audit_log_joint(LogJoint(vae.model, vae.guide, x), draws=400, keep=100, **options).table


@pytest.mark.parametrize("dim", [1, 2])
def test_the_densities_are_normalised_and_exact(dim):
    vae, x, oracle = linear_vae(dim, 6, n=12)
    table = audited(vae, x, obs_id=range(5, 17))
    tree = describe(vae, x, table)
    data = tree["density"].to_dataset()
    assert list(data["case"].values) == ["best", "typical", "worst"]
    assert data["gap"].values[0] == table["gap_total"].values.min()
    assert data["gap"].values[2] == table["gap_total"].values.max()
    rows = data["obs_id"].values - 5
    torch.testing.assert_close(torch.as_tensor(data["log_evidence"].values), oracle.log_evidence(x)[rows], atol=1e-4, rtol=0)
    m, C = oracle.posterior(x)
    exact = torch.distributions.MultivariateNormal(m, C)
    q = vae.posterior(x)
    for c, n in enumerate(rows):
        case = data.isel(case=c)
        axes = [case["z_column"].values] + ([case["z_row"].values] if dim == 2 else [])
        z = np.stack(np.meshgrid(*axes, indexing="xy"), -1) if dim == 2 else axes[0][:, None]
        cell = np.prod([a[1] - a[0] for a in axes])
        for name, density in (("log_posterior", exact), ("log_guide", q)):
            values = case[name].values
            assert np.exp(values).sum() * cell == pytest.approx(1, abs=2e-3), name
            with torch.no_grad():
                z_all = torch.as_tensor(z)[..., None, :].expand(*z.shape[:-1], len(x), dim)
                wanted = density.log_prob(z_all)[..., n].numpy()
            inside = wanted > wanted.max() - 6
            np.testing.assert_allclose(values[inside], wanted[inside], atol=2e-3)


def test_the_moments_are_those_of_the_guide_and_the_rates_add_up():
    vae, x, _ = linear_vae(3, 6, n=9)
    table = audited(vae, x)
    encoding = describe(vae, x, table, labels=np.arange(9))["encoding"]
    q = vae.posterior(x)
    np.testing.assert_allclose(encoding["loc"].values, q.mean.detach().numpy())
    np.testing.assert_allclose(encoding["scale"].values, q.stddev.detach().numpy())
    kl = torch.distributions.kl_divergence(q.base_dist, torch.distributions.Normal(0.0, 1.0)).sum(-1).mean().detach()
    assert float(encoding["rate"].sum()) == pytest.approx(float(kl), rel=1e-6)
    assert encoding["label"].values.tolist() == list(range(9))


def test_a_full_rank_guide_and_three_latents_have_no_density():
    vae, x, oracle = linear_vae(3, 6, family=FullRankNormal, n=9)
    set_guide(vae, oracle)
    tree = describe(vae, x, audited(vae, x), image_shape=(2, 3))
    assert set(tree.children) == {"encoding", "plane", "prior", "reconstruction"}
    np.testing.assert_allclose(tree["encoding"]["loc"].values, oracle.posterior(x)[0], atol=1e-6)
    assert list(tree.attrs["image_shape"]) == [2, 3]


def test_the_plane_runs_over_the_latents_with_the_highest_rate():
    vae, x, _ = linear_vae(4, 6, n=9)
    with torch.no_grad():  # latents 1 and 3 carry the information, 0 and 2 are the prior
        vae.posterior.encoder.body.weight[:4] *= torch.tensor([0.0, 3.0, 0.0, 3.0]).double()[:, None]
        vae.posterior.encoder.body.weight[4:] = 0
        vae.posterior.encoder.body.bias.zero_()
    plane = describe(vae, x, audited(vae, x), plane_points=5)["plane"].to_dataset()
    assert list(plane.attrs["latents"]) == [1, 3]
    np.testing.assert_allclose(plane["z_row"].values, torch.special.ndtri(torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])), atol=1e-6)
    z = torch.zeros(4, dtype=torch.float64)
    z[1], z[3] = plane["z_column"].values[4], plane["z_row"].values[0]
    np.testing.assert_allclose(plane["expected_x"].values[0, 4], vae.decode(z).mean.detach().numpy(), atol=1e-6)


def test_nothing_is_changed_and_the_seed_decides():
    vae, x = mlp_vae(2), (torch.rand(10, 12) < 0.5).float()
    table = audited(vae, x)
    weights = {name: value.clone() for name, value in vae.state_dict().items()}
    state = torch.get_rng_state()
    first, second, third = describe(vae, x, table), describe(vae, x, table), describe(vae, x, table, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in vae.state_dict().items())
    assert first.identical(second)
    assert not first["prior"].equals(third["prior"])
    assert set(np.unique(first["prior"]["x"].values)) == {0.0, 1.0}


def test_a_table_of_other_data_is_refused():
    vae, x, _ = linear_vae(2, 6, n=9)
    table = audited(vae, x)
    with pytest.raises(ValueError, match=r"one row for each datum: x 8, table 9"):
        describe(vae, x[:8], table)
    with pytest.raises(ValueError, match=r"labels 3"):
        describe(vae, x, table, labels=np.arange(3))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_data(n):
    vae, x, _ = linear_vae(2, 6, n=n)
    tree = describe(vae, x, audited(vae, x))
    assert tree["density"].sizes["case"] == n
    assert tree["density"]["case"].values[-1] == "worst"


def test_spread_takes_even_ranks_of_what_is_known():
    values = np.array([3.0, np.nan, 1.0, 2.0, 5.0, 4.0])
    assert spread(values, 3).tolist() == [2, 0, 4]
    assert spread(values, 9).tolist() == [2, 3, 0, 5, 4]


@pytest.mark.parametrize(
    ("sd", "words"),
    [(1.0, "cannot be told from the prior by this"), (1.3, "is wider than the prior"), (0.6, "is narrower than the prior")],
)
def test_the_aggregate_beside_the_prior_has_an_error(sd: float, words: str) -> None:
    """The share of draws of q in the prior's 90 % region, in closed form 1 - 10^(-1/v) for N(0, v I_2)."""
    loc = np.sqrt(sd**2 - 0.1) * np.random.default_rng(0).standard_normal((400, 2))
    caption = plots_latent._latent_caption(loc, np.full((400, 2), 0.1**0.5), np.ones(2), [0, 1], False, True)
    found = re.search(
        r"([0-9.]+)% of the draws .* \(95% interval over data: ([0-9.]+)% to ([0-9.]+)%\): as a whole, q (.*?)\.", caption
    )
    assert found is not None
    share, low, high = (float(part) for part in found.groups()[:3])
    assert low - 1 < 100 * (1 - 10 ** (-1 / sd**2)) < high + 1
    assert low < share < high
    assert high - low < 10
    assert found.group(4) == words
