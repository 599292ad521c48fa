"""Draws of the joint: closed forms on linear-Gaussian data, the test's level and power, tables, covariates, refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import binom, norm
from support.cases.vaes import linear_vae

import elbowroom as er
from elbowroom.analysis.checks import two_sample as twosample
from elbowroom.analysis.checks.two_sample import difference, tell_apart
from elbowroom.analysis.plots.style import Plot
from elbowroom.cli.app import main
from elbowroom.errors import UserError
from elbowroom.queries.sample.answer import conclude_test

SMALL = {"name": "mlp", "hidden": [8]}


def fit(model, rows, folder: Path, guide=None, epochs=3, **more) -> er.Run:
    options = {"epochs": epochs, "batch_size": 32, "learning_rate": 1e-2, "dtype": "float64", "device": "cpu"}
    spec = {"model": model, "guide": guide or {"encoder": SMALL}, "fit": options, **more}
    return er.fit(er.Experiment.from_dict(spec, data=rows), out=folder / "run")


@pytest.fixture(scope="module")
def linear(tmp_path_factory) -> er.Run:
    """A linear VAE of five columns, not far from its data."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=(300, 2)) @ rng.normal(size=(2, 5)) + 0.5 * rng.normal(size=(300, 5)) + 3
    model = {"latent_dim": 2, "likelihood": {"name": "gaussian", "scale": "per_dimension"}, "decoder": "linear"}
    frame = pd.DataFrame(x, columns=list("abcde"))
    return fit(model, frame, tmp_path_factory.mktemp("linear"), {"encoder": "linear"}, epochs=10)


@pytest.fixture(scope="module")
def people() -> pd.DataFrame:
    rng = np.random.default_rng(5)
    age = rng.normal(40, 10, 300)
    job = np.where(age + rng.normal(0, 3, 300) > 40, "clerk", "pupil")
    return pd.DataFrame({"age": age, "job": job, "visits": rng.poisson(np.exp((age - 40) / 10)), "wage": rng.gamma(3, 5, 300)})


@pytest.fixture(scope="module")
def conditional(people, tmp_path_factory) -> er.Run:
    """p(visits, wage | age, job)."""
    folder = tmp_path_factory.mktemp("conditional")
    data = {"name": "table", "covariates": ["age", "job"]}
    return fit({"latent_dim": 1, "likelihood": "mixed", "decoder": SMALL}, people, folder, data=data)


def test_draws_have_the_mean_and_covariance_of_the_closed_form(linear):
    law = linear.vae.linear_gaussian()
    n = 20_000
    answer = linear.sample(n, test=False, seed=1)
    assert np.allclose(answer["mean"], answer["z"] @ law.W.T.numpy() + law.mu.numpy(), atol=1e-9)
    covariance = (law.W @ law.W.T + torch.diag(law.psi)).numpy()
    x = answer["x"]
    sd = np.sqrt(np.diag(covariance))
    assert np.abs((x.mean(0) - law.mu.numpy()) / sd * math.sqrt(n)).max() < 4.5
    error = np.sqrt((np.outer(sd, sd) ** 2 + covariance**2) / n)
    assert np.abs((np.cov(x.T) - covariance) / error).max() < 4.5
    assert np.array_equal(x[:50], linear.sample(n, test=False, seed=1)["x"][:50])


def test_aggregate_draws_come_from_the_encoder_at_training_rows(linear):
    answer = linear.sample(180, source="aggregate", test=False)
    rows = answer["row"]
    assert sorted(rows) == sorted(er_train(linear))  # as many as there are: each once
    with torch.no_grad():
        q = linear.vae.encode(torch.as_tensor(linear.data.x[rows]))
    off = (answer["z"] - q.mean.numpy()) / q.stddev.numpy()
    assert abs(off.mean()) * math.sqrt(off.size) < 4
    assert abs(off.std() - 1) < 4 / math.sqrt(2 * off.size)


def er_train(run):
    with np.load(run.path / "split.npz") as split:
        return split["train"]


def test_interpolation_runs_between_exact_posterior_means(linear):
    law = linear.vae.linear_gaussian()
    x = linear.data.x[:3]
    answer = linear.sample(interpolate=(2, 0), data=pd.DataFrame(x, columns=list("abcde")), steps=5)
    ends = law.posterior(torch.as_tensor(x[[2, 0]]))[0].numpy()
    t = np.linspace(0, 1, 5)[:, None]
    assert np.allclose(answer["z"], (1 - t) * ends[0] + t * ends[1], atol=1e-8)
    assert np.allclose(answer["mean"], answer["z"] @ law.W.T.numpy() + law.mu.numpy(), atol=1e-8)
    assert isinstance(answer.figures["interpolation"], Plot)


def test_reconstructions_are_the_posterior_predictive(linear):
    law = linear.vae.linear_gaussian()
    rows = linear.data.x[:60].copy()
    rows[3, 1] = np.nan
    answer = linear.sample(data=pd.DataFrame(rows, columns=list("abcde")), keep=3_000)
    assert np.isnan(answer["mean"].to_numpy()[3, 1])  # a missing cell is for impute
    assert set(answer.dataset["status"].values) == {"exact"}
    m, v = law.posterior(torch.as_tensor(rows))
    mean = (m @ law.W.T + law.mu).numpy()
    sd = torch.sqrt((law.W @ v @ law.W.T).diagonal(dim1=1, dim2=2) + law.psi).numpy()
    there = ~np.isnan(rows)
    off = (answer["mean"].to_numpy() - mean)[there] / answer["mean_error"].to_numpy()[there]
    assert np.abs(off).max() < 5
    for name, z in (("low", norm.ppf(0.05)), ("high", norm.ppf(0.95))):
        assert np.abs((answer[name].to_numpy() - mean - z * sd) / sd)[there].max() < 0.2
    held = ((answer["low"].to_numpy() <= rows) & (rows <= answer["high"].to_numpy()))[there].mean()
    assert held > 0.9
    assert list(answer.completed().columns) == list("abcde")


def test_the_test_holds_its_level_and_sees_a_wrong_covariance(monkeypatch):
    monkeypatch.setattr(twosample, "TREES", 10)  # exact whatever the classifier
    vae, _, law = linear_vae(2, 5, noise=0.3)
    generator = torch.Generator().manual_seed(3)
    p, wrong = [], []
    for seed in range(30):
        data = law.sample(50, generator)[1].numpy()
        z = torch.randn(50, 2, dtype=torch.float64, generator=generator)
        with torch.no_grad():
            draws = vae.decode(z).sample().numpy()
        p.append(tell_apart(data, draws, seed=seed).p_value)
        if seed < 5:
            apart = np.stack([np.random.default_rng(seed + j).permutation(column) for j, column in enumerate(draws.T)], 1)
            wrong.append(tell_apart(data, apart, seed=seed))  # the same margins, but independent
    for level in (0.1, 0.2):
        assert (np.array(p) <= level).sum() <= binom.ppf(0.999, 30, level)
    assert max(one.p_value for one in wrong) < 0.01
    assert min(one.auc for one in wrong) > 0.75


def test_the_error_of_the_auc_and_of_a_difference(monkeypatch):
    monkeypatch.setattr(twosample, "TREES", 10)
    rng = np.random.default_rng(0)
    data = rng.normal(size=(20, 100, 2))
    same = [tell_apart(x, rng.normal(size=(100, 2)), seed=1) for x in data]
    spread, se = np.std([one.auc for one in same], ddof=1), np.mean([one.se for one in same])
    assert 0.5 < spread / se < 1.7
    far = tell_apart(data[0], rng.normal(size=(100, 2)) + 3, seed=1)
    gap, error = difference(far, same[0])
    assert gap == pytest.approx(far.auc - same[0].auc)
    assert gap > 6 * error
    with pytest.raises(ValueError, match="at least 20 rows"):
        tell_apart(data[0][:10], data[1][:10])


def test_holes_are_features_too(monkeypatch):
    monkeypatch.setattr(twosample, "TREES", 10)
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 200, 3))
    a[rng.random(a.shape) < 0.3] = np.nan
    assert tell_apart(a, b).p_value < 0.001
    b[rng.random(b.shape) < 0.3] = np.nan
    assert tell_apart(a, b).p_value > 0.01


def test_holes_of_the_prior_are_told_from_a_bad_decoder(linear):
    table = linear.sample(5).dataset
    assert table["tested"] == 60
    assert float(table["auc_difference"]) == pytest.approx(float(table["auc"][0] - table["auc"][1]))
    say = lambda prior, aggregate, gap, p: " ".join(
        conclude_test(
            table.assign(auc=("source", [prior, aggregate]), p_value=("source", p), auc_difference=gap, auc_difference_se=0.02)
        )
    )
    assert "(holes)" in say(0.9, 0.6, 0.3, [0.0, 0.2])
    assert "look to p(x|z)" in say(0.9, 0.9, 0.0, [0.0, 0.0])
    assert "proves none" in say(0.5, 0.5, 0.0, [0.4, 0.5])
    assert "too little to tell" in say(0.6, 0.58, 0.02, [0.01, 0.09])


def test_a_table_comes_back_as_a_table(people, tmp_path):
    run = fit({"latent_dim": 1, "likelihood": "mixed", "decoder": SMALL}, people, tmp_path)
    answer = run.sample(30)
    frame = answer.frame()
    assert list(frame.columns) == list(people.columns)
    assert set(frame["job"]) <= {"clerk", "pupil"}
    assert frame["visits"].dtype == np.int64
    assert isinstance(answer.figures["samples"], Plot)
    answer.save(tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as held:
        assert held["x"].shape == (30, 4)
    again = run.sample(data=people.iloc[:5])
    assert set(again.completed()["job"]) <= {"clerk", "pupil"}


def test_covariates_by_name_by_file_and_of_training_rows(conditional, people, tmp_path):
    answer = conditional.sample(7, given={"age": 50, "job": "pupil"}, test=False)
    assert np.allclose(answer["covariates"], [50, 0, 1])
    assert set(answer.frame()["job"]) == {"pupil"}
    people[["job", "age"]][:4].to_csv(tmp_path / "c.csv", index=False)
    answer = conditional.sample(covariates=tmp_path / "c.csv", test=False)
    assert np.allclose(answer["covariates"][:, 0], people["age"][:4], atol=1e-6)
    assert list(answer.frame()["job"]) == list(people["job"][:4])
    with torch.no_grad():
        z, c = (torch.as_tensor(answer[name]) for name in ("z", "covariates"))
        assert np.allclose(answer["mean"], conditional.vae.centre(z, c).numpy())
    answer = conditional.sample(40, covariates="training")
    assert np.isin(answer["covariates"][:, 0].round(6), people["age"].round(6)).all()
    assert answer.dataset["tested"] == 30  # half of the held-out rows lend their covariates to the draws


def test_refusals_are_one_line(linear, conditional):
    asks = [
        (linear, {"source": "aggregat"}, "from: unknown source 'aggregat'; did you mean 'aggregate'?"),
        (linear, {"n": 0}, "n: at least 1 draw is needed"),
        (linear, {"interpolate": (0, 9_999)}, "interpolate: there is no row"),
        (linear, {"interpolate": (0, 1), "n": 3}, "leave --n out"),
        (linear, {"given": {"age": 1}}, "there is no covariate 'age'; this model is not conditional"),
        (linear, {"covariates": "training"}, "this model is not conditional"),
        (linear, {"data": "test", "source": "aggregate"}, "leave --from out"),
        (linear, {"data": "test", "level": 1.0}, "level: must be between 0 and 1"),
        (conditional, {}, "this model is conditional: it needs 'age', 'job'; give values (--given age=...)"),
        (conditional, {"given": {"age": 3}}, "it needs 'job'"),
        (conditional, {"given": {"age": 3, "jub": "clerk"}}, "there is no covariate 'jub'; did you mean 'job'?"),
        (conditional, {"given": {"age": 3, "job": "king"}}, "'king' at row 0 was not in the data of the fit"),
        (conditional, {"given": {"age": float("nan"), "job": "clerk"}}, "'age' is missing at row 0"),
        (conditional, {"covariates": np.zeros((3, 2))}, "the model has 3, age, job=clerk, job=pupil; the array has 2"),
        (conditional, {"covariates": "none.csv"}, "none.csv: no such file"),
    ]
    for run, options, said in asks:
        with pytest.raises(UserError) as failed:
            run.sample(**options)
        assert said in str(failed.value)
        assert "\n" not in str(failed.value)


def test_the_command_end_to_end(conditional, capsys):
    command = ["sample", str(conditional.path), "--n", "12", "--no-test"]
    people = ["--given", "age=40", "--given", "job=clerk"]

    def call(*arguments):
        with pytest.raises(SystemExit) as done:
            main([*command, *arguments])
        return done.value.code, capsys.readouterr()

    code, told = call(*people, "--json")
    assert code == 0, told.err
    names = [Path(file).name for file in json.loads(told.out)["files"]]
    assert sorted(names) == ["sample.csv", "sample.nc", "sample.npz", "sample.png"]
    lines = (conditional.path / "answers" / "sample.csv").read_text().splitlines()
    assert lines[0] == "sample,visits,wage,age,job"
    assert len(lines) == 13
    for arguments, said in (
        (people, "is there already; use --overwrite"),
        (["--overwrite"], "this model is conditional"),
        (["--overwrite", "--given", "age"], "--given age: write NAME=VALUE"),
    ):
        code, told = call(*arguments)
        assert code == 2
        assert said in told.err
        assert told.err.strip().count("\n") == 0
