"""Imputation: the conditional normal on linear-Gaussian data, in the kind that was given, scored where cells were hidden."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from support.cases.vaes import linear_vae

import elbowroom as er
from elbowroom.analysis.plots.queries import imputation as plots_imputation
from elbowroom.analysis.plots.style import Absent, Plot
from elbowroom.analysis.queries.imputation import predict_cells, share, worth
from elbowroom.cli.app import main
from elbowroom.errors import UserError
from elbowroom.inference.posterior import Posterior, resample
from elbowroom.models.likelihoods.categorical import Codes
from elbowroom.queries.impute.answer import Imputed
from elbowroom.queries.impute.cells import holes

SMALL = {"name": "mlp", "hidden": [8]}
SPECS = Path(__file__).parents[3] / "experiments"


def _conditional(W, mu, psi, x):
    """Mean and covariance of the missing entries of x (D,) given the others."""
    covariance = W @ W.T + torch.diag(psi)
    gone = x.isnan()
    gain = torch.linalg.solve(covariance[~gone][:, ~gone], covariance[~gone][:, gone]).T
    mean = mu[gone] + gain @ (x[~gone] - mu[~gone])
    return mean, covariance[gone][:, gone] - gain @ covariance[~gone][:, gone]


def _posterior_draws(W, mu, psi, x, s):
    """Draws of p(z|x_obs), (s, n, d), one row after the other."""
    rows = []
    for row in x:
        seen = ~row.isnan()
        precision = torch.eye(W.shape[1], dtype=W.dtype) + W[seen].T @ (W[seen] / psi[seen, None])
        mean = torch.linalg.solve(precision, W[seen].T @ ((row - mu)[seen] / psi[seen]))
        rows.append(dist.MultivariateNormal(mean, precision_matrix=precision).sample((s,)))
    return torch.stack(rows, 1)


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> er.Run:
    """A linear VAE of five columns."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=(300, 2)) @ rng.normal(size=(2, 5)) + 0.5 * rng.normal(size=(300, 5)) + 3
    spec = {
        "model": {"latent_dim": 2, "likelihood": {"name": "gaussian", "scale": "per_dimension"}, "decoder": "linear"},
        "guide": {"encoder": "linear"},
        "fit": {"epochs": 30, "batch_size": 32, "learning_rate": 2e-2, "dtype": "float64", "device": "cpu"},
    }
    frame = pd.DataFrame(x, columns=list("abcde"))
    return er.fit(er.Experiment.from_dict(spec, data=frame), out=tmp_path_factory.mktemp("linear") / "run")


@pytest.fixture(scope="module")
def people() -> pd.DataFrame:
    """A table of four kinds of columns, all of which follow `age`."""
    rng = np.random.default_rng(5)
    age = rng.normal(40, 10, 400)
    job = np.where(age + rng.normal(0, 3, 400) > 40, "clerk", "pupil")
    return pd.DataFrame(
        {
            "age": age,
            "job": job,
            "visits": rng.poisson(np.exp((age - 40) / 10)),
            "owner": (rng.random(400) < 0.1 + 0.8 * (age > 45)).astype(int),
        }
    )


@pytest.fixture(scope="module")
def table(people: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> er.Run:
    spec = {
        "model": {"latent_dim": 1, "likelihood": "mixed", "decoder": SMALL},
        "guide": {"encoder": SMALL},
        "fit": {"epochs": 30, "batch_size": 32, "learning_rate": 1e-2, "device": "cpu"},
    }
    return er.fit(er.Experiment.from_dict(spec, data=people), out=tmp_path_factory.mktemp("table") / "run")


# -- the arithmetic ---------------------------------------------------------------------------------------------------------


def test_cells_of_a_linear_model_have_their_closed_form() -> None:
    vae, x, oracle = linear_vae(2, 5, n=30)
    truth, generator = x.clone(), torch.Generator().manual_seed(1)
    x = torch.where(torch.rand(x.shape, generator=generator) < 0.4, torch.nan, x)
    x[0] = torch.nan
    s, gone = 4_000, x.isnan()
    z = _posterior_draws(oracle.W, oracle.mu, oracle.psi, x, s)
    filled = torch.where(gone, truth, 0.0)
    found = predict_cells(vae.decode, z, gone, ["number"] * 5, level=0.8, seed=2, truth=filled, keep=s)
    place, off = torch.full(gone.shape, -1), []
    place[gone] = torch.arange(int(gone.sum()))
    for i, row in enumerate(x):
        cells = place[i][gone[i]]
        if not len(cells):
            continue
        mean, covariance = _conditional(oracle.W, oracle.mu, oracle.psi, row)
        sd = covariance.diagonal().sqrt()
        assert ((found.mean[cells] - mean).abs() < 4.5 * found.mean_error[cells]).all()
        torch.testing.assert_close(found.sd[cells], sd, rtol=0.06, atol=0)
        assert ((found.median[cells] - mean).abs() < 5 * 1.2533 * sd / s**0.5).all()
        width = 2 * 1.2816 * sd
        torch.testing.assert_close((found.high - found.low)[cells], width, rtol=0.1, atol=0)
        error = ((covariance.diagonal()[:, None] * covariance.diagonal() + covariance.square()) / s).sqrt()
        assert ((found.draws[:, i][:, gone[i]].T.cov().reshape(covariance.shape) - covariance).abs() < 5 * error).all()
        expected = dist.Normal(mean, sd).log_prob(truth[i, gone[i]])
        off.append(found.log_density[cells] - expected)
    assert torch.cat(off).abs().mean() < 0.03
    assert torch.cat(off).abs().max() < 0.5  # the tail of a row of which nothing is seen
    assert found.mean_error.min() > 0
    assert torch.isfinite(found.log_density_joint).all()


def test_the_closed_form_knows_of_holes() -> None:
    _, x, oracle = linear_vae(2, 5, n=20)
    x = torch.where(torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.4, torch.nan, x)
    x[0] = torch.nan
    mean, covariance = oracle.posterior(x)
    marginal = oracle.W @ oracle.W.T + torch.diag(oracle.psi)
    for row, m, c, log_p in zip(x, mean, covariance, oracle.log_evidence(x), strict=True):
        seen = ~row.isnan()
        gain = torch.linalg.solve(marginal[seen][:, seen], oracle.W[seen]).T
        torch.testing.assert_close(m, gain @ (row - oracle.mu)[seen])
        torch.testing.assert_close(c, torch.eye(2, dtype=c.dtype) - gain @ oracle.W[seen])
        if seen.any():
            expected = dist.MultivariateNormal(oracle.mu[seen], marginal[seen][:, seen]).log_prob(row[seen])
            torch.testing.assert_close(log_p, expected)
    assert oracle.log_evidence(x)[0] == 0


def test_intervals_hold_their_level_whatever_the_draws_and_ranks_do_for_whole_numbers_too() -> None:
    """Truth and draws from one distribution, only 39 of them: 90 % of the intervals of numbers hold, not fewer."""
    n, s = 20_000, 39
    generator = torch.Generator().manual_seed(3)
    centre = torch.randn(n, 1, generator=generator)
    z = centre + torch.randn(s, n, 1, generator=generator)
    missing = torch.ones(n, 1, dtype=torch.bool)
    truth = centre + torch.randn(n, 1, generator=generator) + torch.randn(n, 1, generator=generator)
    found = predict_cells(lambda z: dist.Normal(z, 1.0).to_event(1), z, missing, ["number"], level=0.9, seed=1, truth=truth)
    held = ((found.low <= truth[:, 0]) & (truth[:, 0] <= found.high)).double().mean()
    assert abs(held - 0.9) < 4.5 * (0.09 / n) ** 0.5
    rate = torch.exp(centre / 3)
    counts = torch.poisson(rate, generator=generator)
    poisson = lambda z: dist.Poisson(torch.exp(centre / 3).expand(len(z), n, 1)).to_event(1)
    found = predict_cells(poisson, z, missing, ["count"], level=0.9, seed=1, truth=counts)
    assert (found.low == found.low.round()).all()
    held = ((found.low <= counts[:, 0]) & (counts[:, 0] <= found.high)).double().mean()
    assert held > 0.93  # of whole numbers more than the level
    assert abs(((found.rank - 0.5).abs() <= 0.45).double().mean() - 0.9) < 4.5 * (0.09 / n) ** 0.5
    assert abs(found.rank.mean() - 0.5) < 4.5 / (12 * n) ** 0.5


def test_errors_of_means_are_those_of_weighted_draws_where_heavy_weights_lie_in_the_tails() -> None:
    """Draws of N(0, 0.75^2) reweighted to N(0, 1): by their effective number alone errors are a third too small."""
    n, s, generator = 1_500, 1_000, torch.Generator().manual_seed(6)
    drawn = 0.75 * torch.randn(s, n, 1, generator=generator, dtype=torch.float64)
    weights = (0.5 * (drawn[..., 0] / 0.75).square() - 0.5 * drawn[..., 0].square()).softmax(0)
    z = resample(drawn, weights, s, generator)
    posterior = Posterior("guide, importance-resampled", z[None], {"z": z[None]}, ["uncertified"] * n, [""] * n)
    options = {"level": 0.9, "seed": 2, "repeats": worth(posterior, [], ["guide, importance-resampled"] * n)}
    found = predict_cells(lambda z: dist.Normal(z, 1.0).to_event(1), z, torch.ones(n, 1) > 0, ["number"], **options)
    assert 0.9 < (found.mean / found.mean_error).std() < 1.15


def test_codes_have_probabilities_and_categories_no_mean() -> None:
    logits = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]], dtype=torch.float64).log()
    z = torch.zeros(400, 2, 1, dtype=torch.float64)
    decode = lambda z: Codes(logits=logits[None, None].expand(len(z), 2, 2, 3)).to_event(1)
    missing = torch.tensor([[True, True], [False, True]])
    found = predict_cells(decode, z, missing, ["categorical", "ordinal"], level=0.5, seed=0)
    assert found.likeliest.tolist() == [1, 2, 2]
    assert found.mean.isnan().tolist() == [True, False, False]
    assert found.mean[1] == pytest.approx(1.7)
    (levels,) = found.levels
    torch.testing.assert_close(levels.probability, logits.exp()[[0, 1, 1]])
    assert levels.error.max() < 1e-7
    assert found.low[1] <= found.median[1] <= found.high[1]


def test_the_error_of_a_share_takes_rows_not_cells_to_be_independent() -> None:
    held = np.repeat(np.array([[1.0], [0.0]] * 50), 30, axis=1)
    mean, error = share(held)
    assert mean == 0.5
    assert error == pytest.approx(0.05, rel=0.02)  # of 100 rows, not of 3,000 cells
    assert share(np.ones((8, 3))) == (1.0, pytest.approx(0.0949, abs=1e-3))  # all of eight rows, and not surely all of all
    assert math.isnan(share(np.full((2, 2), np.nan))[0])


def test_padding_of_sequences_is_no_hole() -> None:
    x = np.ones((2, 4, 2))
    x[0, 1, 0] = x[0, 3] = x[1] = np.nan
    assert holes(x, padded=True).nonzero()[0].tolist() == [0]
    assert holes(x, padded=False).sum() == 1 + 2 + 8
    assert torch.equal(holes(torch.from_numpy(x), padded=True), torch.from_numpy(holes(x, padded=True)))


def test_probabilities_of_zeros_and_ones_are_held_against_what_came_true() -> None:
    """Half of the cells are 1 with probability 0.2, half with 0.8, and the guide says 0.5 of all."""
    rng = np.random.default_rng(2)
    p = np.repeat([[0.2, 0.8]], 300, axis=0)
    cells = {"mean": p, "mean_guide": np.full_like(p, 0.5), "truth": (rng.random(p.shape) < p).astype(float)}
    cells |= {"point": (p > 0.5) * 1.0, "likeliest": (p > 0.5) * 1.0, "high": np.ones_like(p)}
    answer = xr.Dataset({name: (("obs_id", "column"), value) for name, value in cells.items()}, attrs={"level": 0.9})
    plot = plots_imputation.coverage(answer)
    assert isinstance(plot, Plot)
    assert "encoder's own draws: Brier score 0.250, 0.250 if" in plot.caption
    best, guide = (float(word) for word in re.findall(r"Brier score ([\d.]+)", plot.caption))
    assert best == pytest.approx(0.16, abs=0.03)
    assert guide == 0.25
    assert isinstance(plots_imputation.coverage(answer.isel(obs_id=slice(3))), Absent)


# -- runs -------------------------------------------------------------------------------------------------------------------


def test_a_run_imputes_by_the_closed_form_in_the_kind_that_was_given(linear: er.Run) -> None:
    oracle = linear.vae.linear_gaussian()
    assert oracle is not None
    x = linear.experiment.data.x[:12].copy()
    x[:10, 1] = x[3, 2] = np.nan
    x[4] = np.nan
    answer = linear.impute(x, samples=2)
    assert isinstance(answer, Imputed)
    assert set(answer["status"]) == {"exact"}
    assert answer["mean"].shape == (10, 5)  # rows with holes
    for i in range(10):
        if i == 4:
            mean = oracle.mu
        else:
            mean, _ = _conditional(oracle.W, oracle.mu, oracle.psi, torch.from_numpy(x[i]))
        gone = np.isnan(x[i])
        assert (np.abs(answer["mean"][i, gone] - mean.numpy()) < 5 * answer["mean_error"][i, gone]).all()
    assert any("Nothing is observed of 1 row:" in sentence for sentence in answer.said)
    done = answer.completed()
    assert not np.isnan(done).any()
    assert np.array_equal(done[~np.isnan(x)], x[~np.isnan(x)])
    one = answer.completed(sample=1)
    assert not np.allclose(one[:10, 1], done[:10, 1])
    assert np.array_equal(one[~np.isnan(x)].astype(np.float32), x[~np.isnan(x)].astype(np.float32))
    with pytest.raises(UserError, match="no sample 2"):
        answer.completed(sample=2)
    tensor = linear.impute(torch.from_numpy(x), references=[])
    assert isinstance(tensor["mean"], torch.Tensor)
    assert isinstance(tensor.completed(), torch.Tensor)
    masked = linear.impute(np.ma.masked_invalid(x), references=[])
    assert np.array_equal(masked["mean"], tensor["mean"].numpy(), equal_nan=True)


def test_large_numbers_are_as_exact_as_the_model(tmp_path: Path) -> None:
    """A second of the year 2020 is 1.6e9, which float32 rounds to 128: a float64 model knows better."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 2)) @ rng.normal(size=(2, 4)) + 0.3 * rng.normal(size=(200, 4))
    x[:, 0] = 1.6e9 + x[:, 0]
    spec = {
        "model": {"latent_dim": 2, "likelihood": {"name": "gaussian", "scale": "per_dimension"}, "decoder": "linear"},
        "fit": {"epochs": 2, "dtype": "float64", "device": "cpu"},
    }
    run = er.fit(er.Experiment.from_dict(spec, data=x), tmp_path / "run")
    given = np.where(np.arange(4) == 0, np.nan, x[:5])
    answer, oracle = run.impute(given, samples=2), run.vae.linear_gaussian()
    mean = [_conditional(oracle.W, oracle.mu, oracle.psi, row)[0].item() for row in torch.as_tensor(given)]
    assert (np.abs(answer["mean"][:, 0] - mean) < 5 * answer["mean_error"][:, 0]).all()
    assert (np.abs(answer.frame()["mean"].values - mean) < 5 * answer["mean_error"][:, 0]).all()
    assert np.ptp(answer.completed(sample=1)[:, 0]) > 0


def test_hidden_cells_are_scored_and_their_intervals_hold(linear: er.Run) -> None:
    """Data drawn from the model itself: what its intervals promise must hold."""
    oracle = linear.vae.linear_gaussian()
    assert oracle is not None
    x = oracle.sample(150, torch.Generator().manual_seed(8))[1].numpy()
    answer = linear.impute(pd.DataFrame(x, columns=list("abcde")), hide="b, d", keep=200)
    assert answer.frame().shape[0] == 300
    for row in answer.scores().to_dict("records"):
        assert abs(row["coverage"] - 0.9) < 4.5 * row["coverage_se"]
        assert row["rmse"] == pytest.approx(float(np.nanmean(answer["sd"][row["column"]])), rel=0.15)
        assert row["log_density_gain"] > 0  # the linear encoder takes a hole for an average value
    assert isinstance(answer.figures["coverage"], Plot)
    assert isinstance(answer.figures["imputation"], Absent)
    again = linear.impute(pd.DataFrame(x, columns=list("abcde")), hide="b, d", keep=200)
    assert answer["low"].equals(again["low"])
    mask = np.zeros(5, dtype=bool)
    mask[[1, 3]] = True
    assert linear.impute(x, hide=mask, references=[]).missing.sum() == 300
    with pytest.raises(UserError, match="no cells were hidden"):
        linear.impute(np.where(mask, np.nan, x), references=[]).scores()


def test_half_an_image(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    x = rng.normal(size=(60, 1, 1)) * np.ones((6, 6)) + 0.3 * rng.normal(size=(60, 6, 6))
    spec = {"model": {"latent_dim": 1, "likelihood": "gaussian", "decoder": SMALL}, "guide": {"encoder": SMALL}}
    run = er.fit(er.Experiment.from_dict({**spec, "fit": {"epochs": 5, "device": "cpu"}}, data=x), out=tmp_path / "run")
    answer = run.impute(x[:10], hide="left", samples=2, references=[])
    assert answer["mean"].shape == (10, 6, 6)
    assert np.isfinite(answer["mean"][:, :, :3]).all()
    assert np.isnan(answer["mean"][:, :, 3:]).all()
    assert answer.frame()["column"].tolist()[:3] == ["0,0", "0,1", "0,2"]
    plot = answer.figures["imputation"]
    assert isinstance(plot, Plot)
    assert "6 images of 10" in plot.caption
    assert [label.get_text() for label in plot.figure.axes[0].get_xticklabels()][:2] == ["as it was", "seen"]
    path = answer.save(tmp_path / "a.nc")
    assert answer.save_completed(path) == tmp_path / "a-completed.npz"
    assert np.load(tmp_path / "a-completed.npz")["x"].shape == (10, 6, 6)


@pytest.mark.slow
def test_what_was_interrupted_goes_on_with_the_same_result(linear: er.Run, tmp_path: Path) -> None:
    x = np.random.default_rng(9).normal(3, 1, (520, 5))
    x[:, 0] = np.nan
    options = {"references": [], "keep": 100, "draws": 100, "out": tmp_path / "a.nc"}
    whole = linear.impute(x, **options)

    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        linear.impute(x, report=stop, **options)
    done: list[int] = []
    again = linear.impute(x, report=lambda n, total: done.append(n), resume=True, **options)
    assert done == [0, 500, 520]
    assert again.dataset.drop_attrs().identical(whole.dataset.drop_attrs())
    other = linear.impute(x, hide="b", resume=True, **options)
    assert np.isnan(other["mean"][:, 0]).all()  # other cells are another question


def test_a_table_comes_back_with_its_holes_filled(table: er.Run, people: pd.DataFrame, tmp_path: Path) -> None:
    given = people.head(8).copy()
    given["visits"] = given["visits"].astype("Int64")
    given["owner"] = given["owner"].astype(bool).astype(object)
    given.index = pd.Index([f"p{i}" for i in range(8)])
    given.loc["p1", "job"] = given.loc["p2", "age"] = given.loc["p3", "owner"] = None
    given.loc["p1", "visits"] = pd.NA
    answer = table.impute(given)
    done = answer.completed()
    assert list(done.columns) == list(given.columns)
    assert done["job"]["p1"] in ("clerk", "pupil")
    assert not done.isna().any().any()
    assert done["visits"].dtype == "Int64"
    assert isinstance(done["owner"]["p3"], bool)
    assert done.drop(index=["p1", "p2", "p3"]).equals(given.drop(index=["p1", "p2", "p3"]))
    assert given["job"].isna().sum() == 1  # hers is left alone
    frame = answer.frame()
    assert frame.index.tolist() == ["p1", "p1", "p2", "p3"]
    job = frame[frame["column"] == "job"].iloc[0]
    assert job["point"] == done["job"]["p1"]
    kept = pd.read_parquet(answer.save(tmp_path / "cells.parquet"))  # numbers and texts in one column: as text
    assert kept["point"].tolist() == frame["point"].map(str).tolist()
    assert 0.5 <= job["probability"] <= 1
    assert answer["probability"].loc["p1", ["job=clerk", "job=pupil"]].sum() == pytest.approx(1, abs=1e-5)
    given["owner"] = given["owner"].astype("Float64")
    given.to_csv(tmp_path / "people.csv", index_label="who")
    read = table.impute(tmp_path / "people.csv").completed()
    assert read["job"][1] == done["job"]["p1"]
    assert read["who"].tolist() == list(given.index)
    assert read["age"][0] == str(given["age"].iloc[0])


@pytest.mark.slow
def test_questions_about_one_row(table: er.Run) -> None:
    old, young = (table.condition({"age": age}, of=["job", "visits"]) for age in (60, 20))
    assert old.frame()["column"].tolist() == ["job", "visits"]
    assert old["probability"]["job=clerk"].item() > young["probability"]["job=clerk"].item() + 0.1
    assert old["mean"]["visits"].item() > young["mean"]["visits"].item() + 0.2
    known = table.condition({"job": "pupil"}, of=["age"])
    other = table.condition({"job": "clerk"}, of=["age"])
    assert known["mean"]["age"].item() < other["mean"]["age"].item()


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ({"agee": 40}, "there is no column 'agee'; did you mean 'age'?"),
        ({"job": "pilot"}, "'pilot' at row 0 was not in the data of the fit (there: clerk, pupil)"),
        ({"age": "old"}, "column 'age' holds text, such as 'old', where the fit had numbers"),
    ],
)
def test_questions_that_cannot_be_asked(table: er.Run, known: dict[str, object], said: str) -> None:
    with pytest.raises(UserError) as error:
        table.condition(known)
    assert said in str(error.value)


def test_other_holes_of_a_text_column_stay_holes(people: pd.DataFrame, tmp_path: Path) -> None:
    """Where cells were hidden, these are filled, and nothing else."""
    frame = people.head(80).copy()
    frame.loc[::3, "job"] = None
    spec = {
        "model": {"latent_dim": 1, "likelihood": "mixed", "decoder": SMALL},
        "guide": {"encoder": SMALL},
        "fit": {"epochs": 1, "device": "cpu"},
    }
    run = er.fit(er.Experiment.from_dict(spec, data=frame), out=tmp_path / "run")
    done = run.impute(hide="20%", references=[]).completed()
    assert done["job"].isna().sum() > 0
    assert set(done["job"].dropna()) <= {"clerk", "pupil"}


def test_bad_input_is_one_line(table: er.Run, people: pd.DataFrame) -> None:
    for options, said in (
        ({}, "no cell is missing, there is nothing to impute"),
        ({"hide": "agee"}, "hide: there is no column 'agee'; did you mean 'age'?"),
        ({"hide": "120%"}, "hide: '120%' is no share of the cells"),
        ({"hide": "left"}, "hide: 'left' is for images"),
        ({"hide": np.ones(3, dtype=bool)}, "hide: truth values of shape (4,) or (20, 4) are needed"),
        ({"hide": "age", "of": ["jobb"]}, "of: there is no column 'jobb'; did you mean 'job'?"),
        ({"hide": "age", "level": 1.0}, "level: must be between 0 and 1"),
        ({"hide": "age", "level": 0.999}, "keep: intervals of 0.999 need 2,000 draws"),
    ):
        with pytest.raises(UserError) as error:
            table.impute(people.head(20), **options)  # type: ignore[arg-type]
        assert said in str(error.value), str(error.value)


def test_the_command(table: er.Run, people: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "people.csv"
    given = people.head(10).copy()
    given.loc[2, "job"] = None
    given.to_csv(path, index=False)

    def call(*arguments: str) -> int:
        with pytest.raises(SystemExit) as stop:
            main(["impute", str(table.path), *arguments])
        return int(stop.value.code or 0)

    out = tmp_path / "found.nc"
    assert call(str(path), "--out", str(out), "--samples", "1") == 0
    said = capsys.readouterr().out
    assert "1 missing cell in 1 row;" in said
    done = pd.read_csv(tmp_path / "found-completed.csv")
    assert done["job"].notna().all()
    assert call(str(path), "--out", str(out)) == 2
    assert "is there already" in capsys.readouterr().err
    assert call(str(path), "--out", str(tmp_path / "b.csv"), "--hide", "owner,age", "--references", "none") == 0
    assert "Brier score" in capsys.readouterr().out
    assert set(pd.read_csv(tmp_path / "b.csv")["column"]) == {"age", "owner"}
    assert call(str(tmp_path / "absent.csv")) == 2
    assert "no such file" in capsys.readouterr().err


def test_a_frame_for_a_fit_to_codes_without_texts_holds_these_codes(tmp_path: Path) -> None:
    """Few rows show few of the codes: they had been numbered anew, by what was there."""
    rng = np.random.default_rng(3)
    code = rng.integers(0, 3, 120).astype(float)
    np.savez(tmp_path / "x.npz", x=np.stack([code, 5 * code + rng.normal(size=120)], 1))
    spec = {
        "data": {"name": "file", "path": "x.npz", "kinds": {"0": "categorical"}},
        "model": {"latent_dim": 1, "likelihood": "mixed", "decoder": SMALL},
        "guide": {"encoder": SMALL},
        "fit": {"epochs": 2, "device": "cpu"},
    }
    run = er.fit(er.Experiment.from_dict(spec, tmp_path), out=tmp_path / "run")
    frame = pd.DataFrame({"0": [2.0, 1.0], "1": [np.nan, np.nan]})
    answer = run.impute(frame, references=[])
    assert answer.original.x[:, 0].tolist() == [2, 1]
    assert answer.completed()["0"].tolist() == [2, 1]


@pytest.mark.slow
def test_intervals_of_half_hidden_digits_hold(tmp_path: Path) -> None:
    """Digits drawn from the model, and held-out ones: 90 +- 3 % of the hidden pixels, nearer than by the encoder's draws."""
    changes = ["model.likelihood.scale=per_dimension", "fit.device=cpu", "fit.epochs=100"]
    run = er.fit(er.Experiment.load(SPECS / "digits_gaussian.yaml", set=changes), out=tmp_path / "run")
    with torch.no_grad():
        drawn = run.vae.model(n=150).numpy()
    held_out = run.experiment.data.x[np.sort(run.experiment.split.test)[:150]].astype(float)
    for data, exact in ((drawn.reshape(held_out.shape), True), (held_out, False)):
        row = run.impute(data, hide="bottom").scores().iloc[0]
        assert abs(row["coverage"] - 0.9) < (4.5 * row["coverage_se"] if exact else 0.03)
        assert abs(row["coverage_guide"] - 0.9) > abs(row["coverage"] - 0.9)
        assert row["log_density_gain"] > 3 * row["log_density_gain_se"]
        assert row["width"] < 1.05 * row["width_guide"]
