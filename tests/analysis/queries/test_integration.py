"""p(x) integrated by several methods: closed forms, the order of costs, bounds, refusals, the command."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from support.cases.vaes import linear_vae, set_guide

import elbowroom as er
from elbowroom.analysis.plots.queries.integration import caption, integration
from elbowroom.analysis.queries.integration import CLOSE, integrate
from elbowroom.cli import app as cli
from elbowroom.errors import UserError
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.models.guides.normal import DiagonalNormal, FullRankNormal


def one(seed=0, *, family=FullRankNormal, noise=0.2, row=0):
    vae, x, oracle = linear_vae(2, 6, family=family, noise=noise, seed=seed)
    set_guide(vae, oracle)
    x = x[row : row + 1]
    return LogJoint(vae.model, vae.guide, x), float(oracle.log_evidence(x)[0]), vae, oracle, x


@pytest.mark.parametrize("seed", [0, 1])
def test_every_method_reaches_the_closed_form(seed):
    log_joint, truth, *_ = one(seed)
    found = integrate(log_joint, samples=2_000, repeats=20, temperatures=20, seed=seed)
    assert float(found["log_evidence"]) == pytest.approx(truth, abs=1e-8)
    assert found.attrs["exact"] == 1
    last = found.isel(size=-1)
    assert np.abs(last["estimate"].sel(estimator=["encoder", "refit"]).values - truth).max() < 0.02
    spread = float(last["high"].sel(estimator="ais") - last["low"].sel(estimator="ais"))
    assert abs(float(last["estimate"].sel(estimator="ais")) - truth) < max(0.1, spread)
    assert float(last["low"].sel(estimator="prior")) - 0.2 <= truth


def test_an_exact_encoder_needs_one_sample_and_the_prior_many():
    log_joint, truth, *_ = one()
    found = integrate(log_joint, samples=500, methods=("prior", "encoder"), seed=1)
    encoder, prior = (found.sel(estimator=name) for name in ("encoder", "prior"))
    assert np.abs(encoder["low"].values - truth).max() < 1e-4  # zero variance: every weight is p(x)
    assert float(encoder["needed"]) == 1
    assert not float(prior["needed"]) <= 20
    assert float(prior["mean"][0]) < float(prior["mean"][-1]) < truth + 0.3  # approached from below
    assert "the encoder 1" in caption(found)


def test_one_sample_gives_the_elbo_in_the_mean():
    log_joint, truth, vae, oracle, x = one(3, family=DiagonalNormal)
    found = integrate(log_joint, samples=400, repeats=40, methods=("encoder",), seed=2)
    first = found.sel(estimator="encoder").isel(size=0)
    gap = 0.5 * float(oracle.precision.diagonal().log().sum() - torch.logdet(oracle.precision))  # of the best diagonal normal
    assert gap > 0.1
    times = float(first["repetitions"])
    assert times == 400
    z, log_q = log_joint.sample_guide(4_000, 7)
    error = float((log_joint(z) - log_q).std()) * math.sqrt(1 / times)
    assert abs(float(first["mean"]) - (truth - gap)) < 4.5 * error


def test_what_a_band_is_made_of():
    found = integrate(one()[0], samples=50, repeats=6, temperatures=5, methods=("prior", "ais"), seed=4)
    prior, ais = (found.sel(estimator=name) for name in ("prior", "ais"))
    assert prior["samples"].values.tolist() == [1, 2, 5, 10, 20, 50]
    assert prior["repetitions"].values.tolist() == [300, 150, 60, 30, 15, 6]
    assert ais["evaluations"].values.tolist()[-1] == 50  # two chains of 25 evaluations
    assert np.isnan(ais["estimate"].values[:4]).all()
    ordered = (prior["low"] <= prior["estimate"]) & (prior["estimate"] <= prior["high"])
    assert bool(ordered.all())
    again = integrate(one()[0], samples=50, repeats=6, temperatures=5, methods=("prior", "ais"), seed=4)
    assert found.equals(again)


def test_needed_is_where_the_estimate_stays_close():
    from elbowroom.analysis.queries.integration import _needed

    def row(off):
        return {"off": np.array(off), "evaluations": np.arange(1.0, len(off) + 1)}

    assert _needed(row([1.0, CLOSE / 2, 1.0, CLOSE / 2, CLOSE / 3])) == 4
    assert math.isnan(_needed(row([CLOSE / 2, 1.0])))
    assert math.isnan(_needed(row([math.nan, math.nan])))
    assert _needed(row([math.nan, CLOSE / 2])) == 2


def test_where_only_bounds_are_known_no_line_is_drawn():
    found = integrate(one()[0], samples=50, repeats=6, methods=("encoder",), seed=0)
    for name in ("log_evidence", "log_evidence_se"):
        found[name] = found[name] * np.nan
    found["off"] = found["off"] * np.nan
    found["log_evidence_lower"] = found["log_evidence_lower"] - 1.0
    found = found.assign_attrs(exact=0, evidence_reason="no value: k-hat is 0.9")
    plot = integration(found)
    assert "only bounds (dotted)" in plot.caption
    assert "k-hat is 0.9" in plot.caption
    words = [text.get_text() for axes in plot.figure.axes for text in axes.texts]
    assert [word for word in words if "log p(x)" in word] == ["lower bound on log p(x)", "upper bound on log p(x)"]
    assert len(plot.figure.axes) == 1


def test_refusals_are_one_line():
    log_joint, *_ = one()
    with pytest.raises(UserError, match="unknown method 'naive'; allowed: prior, encoder, refit, ais"):
        integrate(log_joint, methods=("naive",))
    with pytest.raises(UserError, match="name at least one method of prior, encoder"):
        integrate(log_joint, methods=())
    vae, x, _ = linear_vae(1, 3)
    with pytest.raises(UserError, match="one datum is needed, got 40"):
        integrate(LogJoint(vae.model, vae.guide, x))


@pytest.mark.slow
def test_the_command_end_to_end(tmp_path, capsys):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 2)) @ rng.normal(size=(2, 5)) + 0.3 * rng.normal(size=(60, 5))
    tree = {
        "schema": 1,
        "model": {"latent_dim": 2, "prior": "normal", "likelihood": "gaussian", "decoder": "linear"},
        "guide": {"family": "diagonal_normal", "encoder": {"name": "mlp", "hidden": [8]}},
        "fit": {"epochs": 3, "dtype": "float64"},
    }
    run = er.fit(er.Experiment.from_dict(tree, data=x), out=tmp_path / "run")
    answer = run.integrate(x, 7, samples=100, repeats=5)
    truth = float(run.vae.linear_gaussian().log_evidence(torch.as_tensor(x[7:8]))[0])
    assert float(answer["log_evidence"]) == pytest.approx(truth, abs=1e-8)
    assert set(answer.figures) == {"integration"}
    np.save(tmp_path / "rows.npy", x)
    command = [
        "integrate",
        str(tmp_path / "run"),
        str(tmp_path / "rows.npy"),
        "--datum",
        "7",
        "--samples",
        "100",
        "--repeats",
        "5",
    ]
    with pytest.raises(SystemExit) as done:
        cli.main([*command, "--json"])
    assert done.value.code == 0
    told = json.loads(capsys.readouterr().out)
    names = [file.rsplit("/", 1)[1] for file in told["files"]]
    assert names == ["integrate-7-rows.nc", "integrate-7-rows.csv", "integrate-7-rows.png"]
    assert "estimator,size," in (tmp_path / "run" / "answers" / "integrate-7-rows.csv").read_text().splitlines()[0]
    for arguments, said in (
        ([], "is there already; use --overwrite"),
        (["--overwrite", "--datum", "99"], "datum: there is no row 99; rows.npy has rows 0 to 59, the nearest is 59"),
        (["--overwrite", "--methods", "ai"], "unknown method 'ai'"),
    ):
        with pytest.raises(SystemExit) as failed:
            cli.main([*command, *arguments])
        assert failed.value.code == 2
        error = capsys.readouterr().err.strip()
        assert said in error.replace(str(tmp_path), "").replace("/rows.npy", "rows.npy")
        assert "\n" not in error
