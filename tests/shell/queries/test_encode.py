"""encode: closed forms, forms of arrays, chunks that can be gone on with, files, the command."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

import elbowroom as er
from elbowroom.cli import app as cli
from elbowroom.errors import UserError
from elbowroom.queries import stream

TREE = {
    "schema": 1,
    "model": {"latent_dim": 2, "prior": "normal", "likelihood": "gaussian", "decoder": "linear"},
    "guide": {"family": "diagonal_normal", "encoder": {"name": "mlp", "hidden": [8]}},
    "fit": {"epochs": 4, "dtype": "float64"},
}


def rows(n=80, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 2)) @ rng.normal(size=(2, 5)) + 0.3 * rng.normal(size=(n, 5)) + 1.0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return er.fit(er.Experiment.from_dict(TREE, data=rows()), out=tmp_path_factory.mktemp("encode") / "run")


def test_the_corrected_posterior_is_the_closed_form(run):
    x = rows(12, seed=3)
    answer, oracle = run.encode(x), run.vae.linear_gaussian()
    mean, covariance = oracle.posterior(torch.as_tensor(x))
    assert np.allclose(answer["mean"], mean, atol=1e-8)
    assert np.allclose(answer["covariance"], covariance.expand(12, 2, 2), atol=1e-8)
    assert np.allclose(answer["sd"], covariance.diagonal().sqrt().expand(12, 2), atol=1e-8)
    assert np.allclose(answer["log_evidence"], oracle.log_evidence(torch.as_tensor(x)), atol=1e-8)
    assert set(answer["status"]) == {"exact"}
    assert set(answer["source"]) == {"closed_form"}
    middle = answer["quantile"][:, :, 1]  # of 400 draws
    assert np.abs((middle - mean.numpy()) / answer["sd"]).max() < 5 * 1.2533 / 20
    with torch.no_grad():
        q = run.vae.encode(torch.as_tensor(x))
    assert np.allclose(answer["mu"], q.mean)
    assert np.allclose(answer["sigma"], q.stddev)


def test_a_row_of_which_nothing_is_observed_has_the_prior_alone_and_in_company(run):
    x = np.full((2, 5), np.nan)
    x[1] = 1.0
    for rows_ in (x[:1], x):
        answer = run.encode(rows_)
        assert np.allclose(answer["mean"][0], 0)
        assert np.allclose(answer["sd"][0], 1)
        assert np.allclose(answer["log_evidence"][0], 0)


def test_the_encoders_own_draws_reweighted_say_what_they_are(run):
    x = rows(10, seed=4)
    answer, exact = run.encode(x, references=[], draws=4000), run.encode(x)
    status = answer["status"]
    assert set(status) <= {"uncertified", "amortized"}
    corrected = status == "uncertified"
    assert corrected.any()
    k = answer["pareto_k"][corrected]
    error = np.abs(answer["mean"][corrected] - exact["mean"][corrected]) / exact["sd"][corrected]
    assert (k < 0.8).all()
    assert np.median(error) < 0.1
    assert "none" not in answer.said[0]
    assert "0 are exact or certified" in answer.said[1]
    plain = answer["source"] == "guide"
    assert np.allclose(answer["mean"][plain], answer["mu"][plain], atol=0.3)


def test_what_comes_in_goes_out(run):
    x = rows(6, seed=5)
    of_numpy = run.encode(x)
    of_torch = run.encode(torch.as_tensor(x, dtype=torch.float32))
    frame = pd.DataFrame(x, index=list("abcdef"))
    of_pandas = run.encode(frame)
    assert isinstance(of_numpy["mean"], np.ndarray)
    assert of_torch["mean"].dtype == torch.float32
    assert run.encode(torch.as_tensor(x, dtype=torch.bfloat16))["mean"].dtype == torch.bfloat16
    assert list(of_pandas["mean"].index) == list("abcdef")
    assert np.allclose(of_torch["mean"], of_numpy["mean"], atol=1e-5)
    assert np.allclose(of_pandas["mean"], of_numpy["mean"])
    assert of_pandas["status"]["c"] == "exact"
    assert of_pandas.frame().loc["b", "mean[1]"] == of_numpy["mean"][1, 1]
    with pytest.raises(UserError, match=r"answer\['moan'\]: there is mu, sigma"):
        of_numpy["moan"]


@pytest.mark.slow
def test_a_killed_answer_goes_on_and_says_the_same(run, tmp_path, monkeypatch):
    x, done = rows(50, seed=6), []
    np.save(tmp_path / "x.npy", x)
    monkeypatch.setattr(stream.stream, "__kwdefaults__", {**stream.stream.__kwdefaults__, "size": 10})
    whole = run.encode(tmp_path / "x.npy", samples=3)

    def stop(rows_done, total):
        done.append(rows_done)
        if rows_done == 30:
            raise KeyboardInterrupt

    out = tmp_path / "x.nc"
    with pytest.raises(KeyboardInterrupt):
        run.encode(tmp_path / "x.npy", samples=3, out=out, report=stop)
    assert done == [0, 10, 20, 30]
    parts = sorted((tmp_path / "x.nc.parts").glob("*.nc"))
    assert len(parts) == 3
    parts[1].write_bytes(b"damaged")
    stamps = {part: part.stat().st_mtime_ns for part in parts}
    again = run.encode(tmp_path / "x.npy", samples=3, out=out, resume=True)
    assert parts[0].stat().st_mtime_ns == stamps[parts[0]]  # not computed again
    assert parts[1].stat().st_mtime_ns != stamps[parts[1]]
    xr.testing.assert_identical(whole.dataset, again.dataset)
    other = run.encode(tmp_path / "x.npy", samples=3, out=out, resume=True, seed=5)  # another seed: other chunks
    assert not np.array_equal(other["draws"], whole["draws"])
    run.encode(tmp_path / "x.npy", out=out)  # without resume what is there is removed
    assert len(list((tmp_path / "x.nc.parts").glob("*.nc"))) == 5
    stream.finish(out)
    assert not (tmp_path / "x.nc.parts").exists()


def test_a_row_that_cannot_be_computed_is_named_by_its_own_number(run):
    x = rows(700, seed=8)
    x[600] = 1e200
    with pytest.raises(UserError, match=r"log p\(x, z\) of row 600 is not finite"):
        run.encode(x, references=[])


def test_draws_are_of_the_posterior(run):
    x = rows(4, seed=7)
    answer = run.encode(x, samples=400)
    draws = answer["draws"]
    assert draws.shape == (400, 4, 2)
    error = (draws.mean(0) - answer["mean"]) / answer["sd"] * 20
    assert np.abs(error).max() < 4.5


def test_discrete_latents_have_probabilities(tmp_path):
    tree = {
        "schema": 1,
        "model": {"latent_dim": 3, "prior": "categorical", "likelihood": "gaussian", "decoder": {"name": "mlp", "hidden": [8]}},
        "guide": {"family": "categorical", "encoder": {"name": "mlp", "hidden": [8]}},
        "fit": {"epochs": 2, "objective": "trace_enum"},
    }
    run = er.fit(er.Experiment.from_dict(tree, data=rows()), out=tmp_path / "run")
    x = rows(5, seed=1)
    answer = run.encode(x, samples=1)
    states = torch.eye(3)  # p(z = k|x) by hand: a categorical z is told by its K zeros and ones
    with torch.no_grad():
        given = torch.as_tensor(x, dtype=torch.float32)
        log_likelihood = torch.stack([run.vae.decode(state.expand(5, 3)).log_prob(given) for state in states], -1)
        exact = (run.vae.prior.distribution().log_prob(states) + log_likelihood).softmax(-1)
        guide = run.vae.encode(given).probs
    assert np.allclose(answer["probability"][..., 1], exact, atol=1e-5)  # no shares of draws
    assert np.allclose(answer["guide_probability"][..., 1], guide, atol=1e-5)
    assert np.allclose(answer["probability"].sum(-1), 1, atol=1e-6)
    assert answer.frame().loc[2, "probability[1,1]"] == answer["probability"][2, 1, 1]
    assert set(answer["source"]) == {"enumeration"}
    assert "mu" not in answer.dataset


def test_files_of_every_kind_hold_the_same(run, tmp_path):
    answer = run.encode(rows(5, seed=2), samples=2)
    for suffix in (".nc", ".csv", ".parquet", ".npz"):
        answer.save(tmp_path / f"a{suffix}")
    with xr.open_dataset(tmp_path / "a.nc", engine="h5netcdf") as read:
        assert np.allclose(read["mean"], answer["mean"])
        assert read["mean"].attrs["units"] == "latent units"
        assert read.attrs["weights_sha256"] == answer.dataset.attrs["weights_sha256"]
    for frame in (pd.read_csv(tmp_path / "a.csv", index_col=0), pd.read_parquet(tmp_path / "a.parquet")):
        assert np.allclose(frame[["mean[0]", "mean[1]"]], answer["mean"])
        assert frame["status"].tolist() == ["exact"] * 5
    with np.load(tmp_path / "a.npz") as arrays:
        assert np.array_equal(arrays["draws"], answer["draws"])
        assert arrays["status"].tolist() == ["exact"] * 5
    with pytest.raises(UserError, match=r"a\.xls: cannot write \.xls; use \.nc, \.csv, \.parquet, \.npz"):
        answer.save(tmp_path / "a.xls")


def test_the_figure_says_how_far_off_the_encoder_is(run):
    plot = run.encode(rows(30, seed=8)).figures["encoding"]
    assert "more than 0.5 posterior sd" in plot.caption
    assert plot.figure.axes[0].get_ylabel() == "sigma / sd"
    absent = run.encode(rows(5), references=[]).figures["encoding"]
    assert "no row has an exact or certified posterior" in absent.reason


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as done:
        cli.main(list(map(str, arguments)))
    told = capsys.readouterr()
    return done.value.code, told.out, told.err


def test_the_command_end_to_end(run, tmp_path, capsys):
    np.save(tmp_path / "new.npy", rows(7, seed=9))
    code, out, _ = call(capsys, "encode", run.path, tmp_path / "new.npy", "--json")
    told = json.loads(out)
    assert code == 0
    assert [file.rsplit("/", 1)[1] for file in told["files"]] == ["encode-new.nc", "encode-new.csv", "encode-new.png"]
    assert "Are mu and sigma right?" in told["said"][-1]
    assert not list((run.path / "answers").glob("*.parts"))
    code, out, _ = call(
        capsys, "encode", run.path, tmp_path / "new.npy", "--out", tmp_path / "z.parquet", "--references", "none"
    )
    assert code == 0
    assert pd.read_parquet(tmp_path / "z.parquet").shape[0] == 7


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.npy"], "missing.npy: no such file"),
        (["wide.npy"], "wide.npy: each datum has shape (7,), the model expects (5,)"),
        (["x.npy", "--references", "gird"], "unknown reference 'gird'"),
        (["x.npy", "--references", "enumeration"], "enumeration"),
        (["x.npy", "--out", "a.txt"], "a.txt: cannot write .txt"),
        (["x.npy", "--overwrite", "--resume"], "contradict each other"),
        (["x.npy", "--device", "cuda:7"], "cuda"),
        (["x.npy", "--seed", "99999999999999999999"], "--seed"),
        (["inf.npy"], "inf.npy"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(run, tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", rows(4))
    np.save("wide.npy", np.zeros((4, 7)))
    np.save("inf.npy", np.full((4, 5), np.inf))
    before = {path for path in run.path.rglob("*") if path.is_file()}
    code, _, err = call(capsys, "encode", run.path, *arguments)
    assert code == 2
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1
    assert said in lines[0]
    assert {path for path in run.path.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inf.npy", "wide.npy", "x.npy"]


def test_an_encoder_that_reads_its_batch_is_not_asked_in_chunks(run):
    """By chunks of rows the answer of a row would depend on which rows stand in its chunk."""
    layer = next(part for part in run.vae.posterior.modules() if isinstance(part, torch.nn.Linear))
    hook = layer.register_forward_pre_hook(lambda part, given: (given[0] - given[0].mean(0), *given[1:]))
    try:
        with pytest.raises(UserError, match="ask at most 500 at once .guide: .* depends on the data beside it"):
            run.encode(rows(501))
        assert len(run.encode(rows(6))["mean"]) == 6
    finally:
        hook.remove()
