"""Sites whose names are words of the files: what was audited can be saved, opened by ArviZ, and read back."""

from __future__ import annotations

from pathlib import Path

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from elbowroom.analysis.audit.auditor import Audit, audit
from elbowroom.analysis.idata import file_names

Y = torch.tensor([-1.0, 0.3, 2.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "seen", "stored"),
    [
        ("net/z", "y", "net.z"),
        ("draw", "y", "draw_site"),
        ("obs_id", "chain", "obs_id_site"),
        pytest.param("chain", "obs_id", "chain_site", marks=pytest.mark.slow),
        pytest.param("mean", "draw", "mean", marks=pytest.mark.slow),
        pytest.param("z_dim_0", "y", "z_dim_0", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("diagnosed")
def test_a_site_may_have_the_name_of_a_dimension(name: str, seen: str, stored: str, tmp_path: Path) -> None:
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample(name, dist.Normal(torch.zeros_like(y), 1.0))
            pyro.sample(seen, dist.Normal(z, 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample(name, dist.Normal(y / 2, 0.7))

    found = audit(model, guide, Y, references=["grid"], diagnose=name == "chain")
    found.save(tmp_path)
    again = Audit.load(tmp_path)
    np.testing.assert_array_equal(again.table["elbo"].values, found.table["elbo"].values)
    tree = az.from_netcdf(tmp_path / "posteriors" / "grid.nc")
    draws = tree["posterior"][stored]
    assert draws.dims == ("chain", "draw", "obs_id")
    np.testing.assert_allclose(draws.mean(("chain", "draw")), Y.numpy() / 2, atol=0.15)
    assert len(az.summary(tree, kind="stats")) == 3


def test_every_site_has_a_name_of_its_own_in_files() -> None:
    assert file_names({"a/b": (), "a.b": (), "c": ()}) == {"a/b": "a.b_", "a.b": "a.b", "c": "c"}
    assert file_names({"z": (2,), "latent": ()}) == {"z": "z", "latent": "latent_site"}
    assert file_names({"w": (2, 3), "w_dim_1": (), "w_dim_1_site": ()}) == {
        "w": "w",
        "w_dim_1": "w_dim_1_site_",
        "w_dim_1_site": "w_dim_1_site",
    }
