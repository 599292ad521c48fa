"""Swapping by name, from data in a file to the report: conditional VAEs, exposure, holes, mixed columns, discrete latents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import elbowroom as er
from elbowroom.cli.app import app
from elbowroom.errors import UserError
from elbowroom.inference.target.of_vae import log_joint_of

QUICK = {"epochs": 3, "batch_size": 16, "learning_rate": 1e-2, "device": "cpu"}
NET = {"name": "mlp", "hidden": [8]}


def tree(data, prior="normal", likelihood="gaussian", family="diagonal_normal", d=1, objective="elbo", **fit):
    return {
        "data": data,
        "model": {"latent_dim": d, "prior": prior, "likelihood": likelihood, "decoder": NET},
        "guide": {"family": family, "encoder": NET},
        "fit": {**QUICK, "objective": objective, **fit},
        "audit": {"observations": 5, "draws": 500, "keep": 200},
    }


def counts(n: int = 60) -> pd.DataFrame:
    """Counts of three genes with a batch, an age, a depth, a label and a few holes."""
    rng = np.random.default_rng(5)
    batch, age, depth = rng.choice(["lab", "field"], n), rng.normal(40, 10, n), rng.uniform(0.5, 4, n)
    z = rng.normal(size=n)
    rate = np.exp(0.3 * z[:, None] + np.array([0.2, 1.0, 1.5]) + 0.4 * (batch == "lab")[:, None]) * depth[:, None]
    genes = pd.DataFrame(rng.poisson(rate), columns=["g1", "g2", "g3"]).astype("Int64")
    genes.loc[3, "g2"] = pd.NA
    return genes.assign(batch=batch, age=age, depth=depth, sort=np.where(z > 0, "up", "down"))


ROLES = {"x": ["g1", "g2", "g3"], "covariates": ["batch", "age"], "exposure": "depth", "labels": "sort"}


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conditional")
    counts().to_csv(folder / "cells.csv", index=False)
    data = {"name": "file", "path": str(folder / "cells.csv"), **ROLES}
    spec = tree(data, prior={"name": "normal", "covariates": True}, likelihood="negative_binomial")
    run = er.fit(er.Experiment.from_dict(spec), out=folder / "run")
    return folder, run, run.audit()


@pytest.mark.usefixtures("no_figures")
def test_a_conditional_vae_of_counts_with_exposure_and_holes_is_audited_exactly(conditional):
    folder, run, audit = conditional
    assert set(audit.table["status"].values.ravel()) == {"exact"}
    assert (audit.table["gap_total"].values > -1e-6).all()
    page = run.report().read_text(encoding="utf-8")
    assert "Traceback" not in page
    loaded = er.Run.load(folder / "run")
    assert loaded.experiment.facts.covariates == ("batch=field", "batch=lab", "age")
    assert loaded.experiment.facts.missing
    assert loaded.experiment.facts.exposure


def test_its_evidence_is_the_integral_written_out_by_hand(conditional):
    _, run, audit = conditional
    data, vae = run.data, run.vae.double()
    rows = audit.table["obs_id"].values
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    c = (torch.as_tensor(data.covariates[rows]) - vae.covariate_loc) / vae.covariate_scale
    for i, n in enumerate(rows):
        with torch.no_grad():
            center = vae.prior.distribution(c[i : i + 1]).mean
            at = torch.cat([z[:, None], c[i].expand(len(z), -1)], -1)
            p = vae.likelihood(vae.decoder(at), torch.as_tensor(data.exposure[n : n + 1]))
            x = torch.as_tensor(data.x[n].astype(float))
            seen = ~x.isnan()
            entries = p.base_dist.log_prob(x.nan_to_num())[:, seen].sum(-1)
            prior = torch.distributions.Normal(center[0], 1.0).log_prob(z[:, None])[:, 0]
            by_hand = torch.logsumexp(entries + prior, 0) + (z[1] - z[0]).log()
        assert float(audit.table["log_evidence"].values[i]) == pytest.approx(float(by_hand), abs=2e-4)
    run.vae.float()


def test_covariates_move_the_prior_and_the_exposure_the_counts(conditional):
    _, run, _ = conditional
    vae, batch = run.vae, run.experiment.batch(np.arange(4))
    with torch.no_grad():
        twice = vae.decode(torch.zeros(4, 1), batch["covariates"], 2 * batch["exposure"]).mean
        once = vae.decode(torch.zeros(4, 1), batch["covariates"], batch["exposure"]).mean
        torch.testing.assert_close(twice, 2 * once)
    with pytest.raises(UserError, match="needs covariates"):
        vae.model(batch["x"])


def test_other_rows_are_read_as_those_of_the_fit(conditional, tmp_path):
    folder, _, audit = conditional
    run = er.Run.load(folder / "run")
    rows = audit.table["obs_id"].values
    other = counts().iloc[rows][["age", "g3", "depth", "g2", "batch", "g1"]]  # another order, no labels
    other.to_csv(tmp_path / "other.csv", index=False)
    found = run.audit(tmp_path / "other.csv", out=tmp_path / "other")
    np.testing.assert_allclose(found.table["log_evidence"], audit.table["log_evidence"], atol=2e-4)
    other.assign(batch="moon").to_csv(tmp_path / "moon.csv", index=False)
    with pytest.raises(UserError, match="moon"):
        run.audit(tmp_path / "moon.csv", out=tmp_path / "moon")


@pytest.mark.usefixtures("no_figures")
def test_a_frame_with_holes_in_mixed_columns_under_a_discrete_prior(tmp_path):
    rng = np.random.default_rng(2)
    kind = rng.integers(0, 2, 80)
    frame = pd.DataFrame(
        {
            "score": rng.normal(10 * kind, 5),
            "smokes": pd.array(rng.random(80) < 0.2 + 0.6 * kind, dtype="boolean"),
            "city": rng.choice(["Bern", "Oslo", "Rome"], 80),
            "income": rng.lognormal(3 + kind, 0.3),
            "children": rng.poisson(1 + kind),
        }
    )
    frame.loc[4, "smokes"] = pd.NA
    frame.loc[7, "city"] = None
    spec = tree({"name": "memory"}, "categorical", "mixed", "categorical", d=2, objective="trace_enum", epochs=20)
    run = er.fit(er.Experiment.from_dict(spec, data=frame), out=tmp_path / "run")
    assert [column.kind for column in run.experiment.facts.columns] == [
        "real",
        "binary",
        "categorical",
        "positive",
        "count",
    ]
    audit = run.audit()
    assert set(audit.table["status"].values.ravel()) == {"exact"}
    assert set(audit.table["evidence_method"].values) == {"enumeration"}
    # the sum over both states, by hand
    log_joint = log_joint_of(run.vae, run.experiment.batch(audit.table["obs_id"].values))
    with log_joint.frozen_weights():
        replays = [log_joint.run("model", a) for a in log_joint.program.assignments]
    both = torch.stack([replay.log_likelihood + replay.log_prior for replay in replays])
    np.testing.assert_allclose(audit.table["log_evidence"], torch.logsumexp(both, 0).detach(), atol=1e-3)
    assert "total variation" in run.report().read_text(encoding="utf-8")


def test_text_under_a_likelihood_of_numbers_is_refused(tmp_path):
    frame = pd.DataFrame({"a": np.arange(40.0), "city": ["Bern", "Oslo"] * 20})
    with pytest.raises(UserError, match="column 'city' holds text, which gaussian cannot model; use model.likelihood = mixed"):
        er.fit(er.Experiment.from_dict(tree({"name": "memory"}), data=frame), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("prior", "family", "objective", "message"),
    [
        ("categorical", "diagonal_normal", "elbo", "prior categorical on one of d categories; use categorical"),
        ("normal", "log_normal", "elbo", "lives on positive numbers, prior normal on the real line; use diagonal_normal"),
        ("hierarchical", "diagonal_normal", "elbo", "use hierarchical"),
        ("normal", "hierarchical", "elbo", "or model.prior = hierarchical"),
        ("categorical", "categorical", "iwae", "trace_enum"),
        ("normal", "diagonal_normal", "trace_enum", "trace_enum needs discrete latents"),
        ("vamp", "diagonal_normal", "wake_sleep", "prior vamp is made of the guide; use elbo"),
        ("normal", "semi_amortized", "wake_sleep", "guide semi_amortized reads the model; use elbo"),
    ],
)
def test_pairs_that_do_not_go_together_are_refused_with_the_remedy(prior, family, objective, message):
    with pytest.raises(UserError) as caught:
        er.Experiment.from_dict(tree("digits", prior, "gaussian", family, 2, objective))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_transform_that_was_inserted_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(er_text(), encoding="utf-8")
    done = CliRunner().invoke(app, ["fit", "s.yaml", "--set", "model.prior=gamma", "--dry-run"])
    assert done.exit_code == 0
    assert "diagonal_normal is carried onto positive numbers, where prior gamma lives, by exp" in " ".join(done.output.split())


def er_text() -> str:
    return (
        "data: {name: digits, binarize: 8}\nmodel: {latent_dim: 2, likelihood: bernoulli}\nguide: {family: diagonal_normal}\n"
    )


def test_draws_of_the_posterior_are_where_the_prior_lives(tmp_path):
    x = np.random.default_rng(0).gamma(2.0, size=(40, 3))
    for prior, d in (("gamma", 2), ("dirichlet", 3)):
        run = er.fit(er.Experiment.from_dict(tree({"name": "memory"}, prior, "gamma", d=d), data=x), out=tmp_path / prior)
        audit = run.audit()
        z = audit.posteriors["grid"]["posterior"]["z"]
        assert float(z.min()) >= 0
        assert z.sizes["latent"] == d
        if prior == "dirichlet":
            np.testing.assert_allclose(z.sum("latent"), 1.0, atol=1e-5)
