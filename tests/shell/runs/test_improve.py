"""A fit that starts at another run's weights, and `improve`: the model kept or retrained, before and after paired."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from elbowroom.analysis.audit.auditor import Audit
from elbowroom.analysis.measures.population import PROXIES
from elbowroom.cli import app as cli
from elbowroom.errors import DataError, RunFolderError, SpecError
from elbowroom.inference.fit.plan import Session
from elbowroom.inference.fit.rows import Rows
from elbowroom.inference.fit.svi import fit as svi_fit
from elbowroom.inference.fit.warm_start import MODEL, Start
from elbowroom.run import Run, fit
from elbowroom.runs import advice
from elbowroom.runs.advice import propose
from elbowroom.runs.improve import Improvement
from elbowroom.spec import document
from elbowroom.spec.experiment import Experiment

SPEC = {
    "data": {"name": "file", "path": "x.npy"},
    "model": {"latent_dim": 1, "likelihood": "bernoulli", "decoder": {"name": "mlp", "hidden": [5], "dropout": 0.1}},
    "guide": {"encoder": {"name": "mlp", "hidden": [5]}},
    "fit": {"epochs": 3, "batch_size": 16, "device": "cpu"},
    "audit": {"draws": 200, "keep": 100, "references": ["grid"]},
}


def changed(**blocks: dict) -> dict:
    return {key: {**value, **blocks.get(key, {})} if isinstance(value, dict) else value for key, value in SPEC.items()} | {
        key: value for key, value in blocks.items() if key not in SPEC
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An audited run and the spec and data it came from."""
    home = tmp_path_factory.mktemp("home")
    x = np.random.default_rng(0).random((60, 6)) < np.random.default_rng(1).random((60, 1))
    np.save(home / "x.npy", x.astype(np.float32))
    (home / "s.yaml").write_text(document.write(SPEC))
    fit(home / "s.yaml", home / "run").audit()
    return home


def starting(home: Path, name: str, start: dict, **blocks: dict) -> Path:
    tree = changed(**blocks)
    tree["fit"] = {**tree["fit"], "start": start}
    path = home / f"{name}.yaml"
    path.write_text(document.write(tree))
    return path


def parts(run: Run, *, guide: bool) -> dict[str, torch.Tensor]:
    return {name: value for name, value in run.vae.state_dict().items() if name.startswith("posterior.") == guide}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -- fit.start --------------------------------------------------------------------------------------------------------------


def test_a_frozen_model_stays_as_it_is_bit_for_bit_whatever_the_seed(home: Path, tmp_path: Path) -> None:
    old = Run.load(home / "run")
    spec = starting(home, "frozen", {"run": "run", "simulated": 0.5}, seed=3)
    new = fit(spec, tmp_path / "new")
    assert equal(parts(new, guide=False), parts(old, guide=False))
    assert not equal(parts(new, guide=True), parts(old, guide=True))
    assert all(parameter.requires_grad for parameter in new.vae.parameters())
    rows = [np.load(path / "split.npz") for path in (home / "run", tmp_path / "new")]
    assert all(np.array_equal(rows[0][part], rows[1][part]) for part in ("train", "validation", "test"))
    record = document.read(tmp_path / "new" / "spec.yaml")["record"]
    assert record["start_sha256"] == xr.open_dataset(home / "run" / "audit.nc").attrs["weights_sha256"]
    assert equal(Run.load(tmp_path / "new").vae.state_dict(), new.vae.state_dict())


def test_without_freeze_the_weights_are_where_it_starts(home: Path, tmp_path: Path) -> None:
    spec = starting(home, "free", {"run": "run", "freeze": False}, fit={"epochs": 1, "learning_rate": 1e-7})
    old, new = Run.load(home / "run"), fit(spec, tmp_path / "new")
    for name, value in old.vae.state_dict().items():  # the guide too, whose words are the same
        torch.testing.assert_close(new.vae.state_dict()[name], value, atol=1e-5, rtol=0)
    assert not equal(parts(new, guide=False), parts(old, guide=False))


def test_another_guide_starts_anew(home: Path, tmp_path: Path) -> None:
    spec = starting(home, "wide", {"run": "run"}, guide={"encoder": {"name": "mlp", "hidden": [7]}}, fit={"epochs": 1})
    new = fit(spec, tmp_path / "new")
    assert equal(parts(new, guide=False), parts(Run.load(home / "run"), guide=False))


def test_a_fit_on_simulated_data_resumes_bit_for_bit(home: Path, tmp_path: Path) -> None:
    spec = starting(home, "resumed", {"run": "run", "simulated": 0.5}, fit={"epochs": 4})
    whole = fit(spec, tmp_path / "whole")
    folder = tmp_path / "part"

    def killed(_plan: object, row: object) -> None:
        if row.epoch == 1:  # its checkpoint is written: the first always is
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(spec, folder, report=killed)
    assert equal(fit(spec, folder, resume=True).vae.state_dict(), whole.vae.state_dict())


@pytest.mark.slow
def test_resume_refuses_other_weights(home: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    fit(home / "s.yaml", base)
    spec = starting(home, "moved", {"run": str(base)})
    fit(spec, tmp_path / "new")
    fit(spec, tmp_path / "new", resume=True)
    weights = torch.load(base / "weights.pt", weights_only=True)
    weights["decoder.body.0.bias"] += 1
    torch.save(weights, base / "weights.pt")
    with pytest.raises(RunFolderError, match="belongs to another experiment"):
        fit(spec, tmp_path / "new", resume=True)
    os.rename(base, tmp_path / "elsewhere")  # a fitted run does not need the one it started at
    Run.load(tmp_path / "new").audit()


REFUSED = [
    ({"run": "nowhere"}, {}, "no such run folder"),
    ({"run": "s.yaml"}, {}, "no such run folder"),
    ({"run": "~nobody-here/run"}, {}, "no such run folder"),
    ({"run": "damaged"}, {}, "damaged"),
    ({"run": "edited"}, {}, "was changed after the fit"),
    ({"run": "run"}, {"model": {"latent_dim": 2}}, "model.latent_dim is 1 there, 2 here"),
    ({"run": "run"}, {"model": {"decoder": {"name": "mlp", "hidden": [6], "dropout": 0.1}}}, r"hidden is \[5\] there, \[6\]"),
    ({"run": "run"}, {"model": {"prior": "laplace"}}, "model.prior.name is 'normal' there, 'laplace' here"),
    ({"run": "run"}, {"model": {"prior": "vamp"}}, "prior vamp is made of the guide"),
    ({"run": "run"}, {"data": {"split": [0.5, 0.2, 0.3]}}, "data.split is"),
    ({"run": "run"}, {"data": {"path": "y.npy"}}, "fitted to other data"),
    ({"run": "run", "freeze": False, "simulated": 0.5}, {}, "fit.start.simulated: a model that is still trained"),
    ({"run": "run", "simulated": 1.5}, {}, "must be at most 1"),
    ({"run": "run", "frezze": True}, {}, "did you mean 'freeze'"),
]


@pytest.mark.parametrize(("start", "blocks", "told"), REFUSED, ids=[told for _, _, told in REFUSED])
def test_another_model_or_other_data_are_one_line(home, tmp_path, capsys, start, blocks, told) -> None:
    np.save(home / "y.npy", 1 - np.load(home / "x.npy"))
    for name in ("damaged", "edited"):
        shutil.copytree(home / "run", home / name, dirs_exist_ok=True)
    (home / "damaged" / "weights.pt").write_bytes((home / "run" / "weights.pt").read_bytes()[:500])
    text = (home / "run" / "spec.yaml").read_text()
    (home / "edited" / "spec.yaml").write_text(text.replace("seed: 0", "seed: 2020-01-01"))
    spec = starting(home, "refused", start, **blocks)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["fit", str(spec), "--out", str(tmp_path / "new")])
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert err.count("\n") == 1
    assert "fit.start" in err
    with pytest.raises((SpecError, DataError), match=told):
        fit(spec, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_run_it_starts_at_is_not_written_over(home: Path) -> None:
    with pytest.raises(SpecError, match="is the folder that the new run goes to"):
        fit(starting(home, "itself", {"run": "run"}), home / "run", overwrite=True)


def test_a_spec_without_a_start_is_the_fit_it_was() -> None:
    from elbowroom.spec.identity import identity

    tree = {"data": {"name": "digits"}, "fit": {"epochs": 3}, "seed": 0}
    assert identity(tree, "x") == identity({**tree, "fit": {"epochs": 3, "start": None}}, "x")
    here, there = ({**tree, "fit": {"epochs": 3, "start": {"run": where, "freeze": True}}} for where in ("a", "b"))
    assert identity(here, "x", "w") == identity(there, "x", "w") != identity(here, "x", "v")


def test_simulated_rows_have_the_models_law_and_the_holes_of_the_data(home: Path) -> None:
    vae = Run.load(home / "run").vae
    x = torch.full((4000, 6), 0.5)
    x[:2000, 0] = torch.nan
    start = Start(vae.state_dict(), "", simulated=0.75)
    torch.manual_seed(0)
    batch, drawn = start.mixed(vae, {"x": x})
    assert drawn.tolist() == [True] * 3000 + [False] * 1000
    assert torch.equal(batch["x"].isnan(), x.isnan())
    assert bool((batch["x"][3000:] == 0.5).all())
    z = torch.randn(40_000, 1)
    with torch.no_grad():
        truth = vae.decode(z).mean.mean(0)
    error = (0.25 / 3000 + 0.25 / 40_000) ** 0.5
    assert bool((batch["x"][:3000].nanmean(0) - truth).abs().le(4.5 * (2**0.5) * error).all())


def test_simulated_rows_keep_what_stands_beside_them() -> None:
    """Counts with covariates and an exposure: a hundred times the exposure is a hundred times the counts."""
    generator = np.random.default_rng(0)
    frame = pd.DataFrame({f"x{i}": generator.poisson(2.0, 60).astype(float) for i in range(3)})
    frame["c"], frame["e"] = generator.normal(size=60), np.where(np.arange(60) < 30, 1.0, 100.0)
    tree = {
        "data": {"covariates": ["c"], "exposure": "e"},
        "model": {"latent_dim": 1, "likelihood": "poisson", "prior": {"name": "normal", "covariates": True}},
    }
    experiment = Experiment.from_dict(tree, data=frame)
    vae, batch = experiment.build(), experiment.batch(np.arange(60))
    seen, drawn = Start(vae.state_dict(), "", simulated=1.0).mixed(vae, batch)
    assert bool(drawn.all())
    assert all(torch.equal(seen[name], batch[name]) for name in ("covariates", "exposure"))
    assert float(seen["x"][30:].mean()) > 30 * float(seen["x"][:30].mean())


@pytest.mark.parametrize(
    ("family", "objective"), [("semi_amortized", "elbo"), ("flow", "iwae"), ("full_rank_normal", "wake_sleep")]
)
def test_other_guides_and_objectives_train_beside_a_kept_model(home: Path, tmp_path: Path, family: str, objective: str) -> None:
    blocks = {"guide": {"family": family}, "fit": {"objective": objective, "epochs": 1, "dtype": "float64"}}
    new = fit(starting(home, f"beside_{family}", {"run": "run", "simulated": 0.5}, **blocks), tmp_path / "new")
    kept, old = parts(new, guide=False), parts(Run.load(home / "run"), guide=False)
    assert all(torch.equal(kept[name], value.double()) for name, value in old.items())


def test_the_frozen_model_is_out_of_training_mode() -> None:
    """Batch statistics of a frozen decoder must not move."""
    tree = changed(model={"decoder": {"name": "mlp", "hidden": [5], "norm": "batch"}})
    tree["data"] = {}
    x = (np.random.default_rng(0).random((40, 6)) < 0.5).astype(np.float32)
    experiment = Experiment.from_dict(tree, data=x)
    vae, other = experiment.build(), experiment.build()
    rows = Rows.of(torch.from_numpy(x))
    svi_fit(vae, rows, rows, epochs=1, batch_size=20)
    start = Start(vae.state_dict(), "", simulated=0.5)
    svi_fit(other, rows, rows, Session(start=start), epochs=1, batch_size=20)
    for name in (name for name in vae.state_dict() if name.split(".")[0] in MODEL):
        assert torch.equal(vae.state_dict()[name], other.state_dict()[name]), name


# -- what is changed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "part", "lost", "better"),
    [
        ("diagonal_normal", (0.2, 0.15, 0.03, 0.02), 0.0, "full_rank_normal"),
        ("diagonal_normal", (0.2, 0.2, 0.0, 0.0), 0.0, None),
        ("diagonal_normal", (0.2, 0.02, 0.03, 0.15), 0.0, "flow"),
        ("full_rank_normal", (0.2, 0.02, 0.0, 0.18), 0.0, "flow"),
        ("full_rank_normal", (0.2, 0.18, 0.0, 0.02), 0.0, None),
        ("diagonal_normal", (0.7, 0.0, 0.0, 0.7), 0.3, "mixture"),
        ("mixture", (0.7, np.nan, np.nan, 0.7), 0.3, None),
        ("diagonal_normal", (np.nan,) * 4, 0.0, "full_rank_normal"),
        ("flow", (0.3, np.nan, np.nan, 0.3), 0.0, None),
    ],
)
def test_the_family_follows_from_the_parts_of_the_gap(family, part, lost, better) -> None:
    names = ("total", "amortization", "covariance", "shape")
    assert advice._family(family, dict(zip(names, part, strict=True)), lost)[0] == better


def test_a_family_that_does_not_go_with_the_prior_is_not_proposed() -> None:
    tree = {"model": {"prior": {"name": "categorical"}}, "fit": {"objective": {"name": "elbo"}}}
    assert not advice._goes(tree, "flow")
    assert advice._goes({**tree, "model": {"prior": {"name": "normal"}}}, "flow")


def test_what_the_user_sets_wins(home: Path) -> None:
    run = Run.load(home / "run")
    own = propose(run).experiment.spec
    assert own.guide.encoder.hidden == (10, 10)
    assert own.fit.epochs == 9
    assert own.fit.start.simulated == 0.5
    changes = ["guide.encoder.hidden=[4]", "guide.family=flow", "fit.epochs=2", "fit.start.simulated=0.25"]
    spec = propose(run, set=changes).experiment.spec
    assert spec.guide.encoder.hidden == (4,)
    assert spec.guide.family.name == "flow"
    assert spec.fit.epochs == 2
    assert spec.fit.start.simulated == 0.25
    assert propose(run, retrain=True).experiment.spec.fit.start is None
    assert propose(run, budget="10m").experiment.spec.audit.budget == "10m"


# -- improve ----------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_report")
def test_improve_keeps_the_old_run_and_log_p(home: Path, tmp_path: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in (home / "run").iterdir()}
    found = Run.load(home / "run").improve(out=tmp_path / "new", set=["fit.epochs=30"])
    assert {path.name: path.stat().st_mtime_ns for path in (home / "run").iterdir()} == before
    assert {"audit.nc", "report.html", "weights.pt"} <= {path.name for path in (tmp_path / "new").iterdir()}
    assert found.same_model
    mean, error, n = found.difference()
    assert abs(mean) < 1e-6
    assert (error < 1e-6, n) == (True, 12)
    assert found.removed() > 0
    text = repr(found)
    assert "as it must be" in text
    assert "a better q for the same p" in text
    assert json.loads(json.dumps(found.tree(), allow_nan=False))["same_model"] is True
    # the median's interval, and the gaps, are those of the audits
    gap = xr.open_dataset(tmp_path / "new" / "audit.nc")["gap_total"].values
    assert found.tree()["gaps"]["gap_total"]["after"]["median"] == pytest.approx(np.median(gap))


def test_audits_of_different_data_are_compared_on_those_of_both(home: Path) -> None:
    run = Run.load(home / "run")
    table = advice.audited(run)
    k = np.where(np.arange(12) < 3, 2.0, 0.1)
    before, after = (table.assign(pareto_k=("obs_id", k)), table.isel(obs_id=slice(4, None)))
    found = Improvement(
        run, run, before, after.assign(pareto_k=("obs_id", k[4:] + np.where(np.arange(8) < 1, 2.0, 0))), propose(run)
    )
    rows = {name: values for name, *values in found.lines()}
    assert rows["k-hat > 0.7"] == ["0 of 8", "1 of 8"]
    assert rows["exact or certified"] == ["8 of 8", "8 of 8"]
    assert found.verdict()[0] == "Compared are the 8 data of both audits (12 before, 8 after)."
    assert "k-hat exceeds 0.7 at 1 data, 0 before" in found.verdict()[-1]
    assert "Compared are" not in repr(Improvement(run, run, before, before, propose(run)))


@pytest.mark.usefixtures("no_report")
@pytest.mark.slow
def test_retraining_is_another_model_and_says_so(home: Path, tmp_path: Path) -> None:
    found = Run.load(home / "run").improve(retrain=True, out=tmp_path / "new")
    assert not found.same_model
    assert "another p" in repr(found)
    mean, error, n = found.difference()
    d = found.after["log_evidence"].values - found.before["log_evidence"].values
    assert (mean, error, n) == (pytest.approx(d.mean()), pytest.approx(d.std(ddof=1) / 12**0.5), 12)
    fallen = found.after.copy()
    fallen["log_evidence"] = found.before["log_evidence"] - 1 - 0.1 * np.arange(12) / 12
    assert "it FELL" in repr(type(found)(found.old, found.run, found.before, fallen, found.proposal))


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    return int(stopped.value.code or 0)


@pytest.mark.usefixtures("no_report")
@pytest.mark.slow
def test_the_command_line(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "new")
    assert call("improve", str(home / "run"), "--out", out, "--dry-run") == 0
    assert "guide.encoder.hidden: [5] -> [10, 10]" in capsys.readouterr().out
    assert not Path(out).exists()
    assert call("improve", str(home / "run"), "--out", out, "--set", "fit.epochs=1", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["improved"] == out
    assert call("improve", str(home / "run"), "--out", out, "--set", "fit.epochs=1", "--resume") == 0
    assert "as it must be" in " ".join(capsys.readouterr().out.split())


BAD = [
    (["nowhere"], "no such run folder"),
    (["bare"], "is not audited; run `elbowroom audit"),
    (["run", "--out", "run", "--overwrite"], "is the run that is to be improved, run, which is kept"),
    (["run", "--out", "run/better"], "lies in the run that is to be improved"),
    (["run", "--out", "run/posteriors"], "lies in the run that is to be improved"),
    (["run", "--out", "."], "holds the run that is to be improved"),
    (["run", "--out", "bare"], "holds a run already"),
    (["run", "--set", "model.latent_dim=2"], "the model is kept; change it with --retrain"),
    (["run", "--set", "data.split=[.5,.2,.3]"], "on the same data"),
    (["run", "--set", "fit.start.freeze=false"], "`improve` sets it itself"),
    (["run", "--retrain", "--set", "fit.start.simulated=.5"], "`improve` sets it itself"),
    (["run", "--retrain", "--set", "seed=1"], "it also splits the data"),
    (["run", "--set", "fit.epoch=2"], "did you mean 'epochs'"),
    (["run", "--budget", "soon"], "--budget"),
    (["run", "--overwrite", "--resume"], "contradict"),
]


@pytest.mark.parametrize(("line", "told"), BAD, ids=[" ".join(line) for line, _ in BAD])
def test_bad_input_is_one_line_and_nothing_is_written(home, monkeypatch, capsys, line, told) -> None:
    monkeypatch.chdir(home)
    if not (home / "bare").exists():
        fit(home / "s.yaml", home / "bare")
    before = sorted(home.rglob("*"))
    assert call("improve", *line) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert told in captured.err
    assert not captured.out
    assert sorted(home.rglob("*")) == before


@pytest.mark.slow
def test_half_of_the_gap_of_the_digits_is_gone_and_log_p_is_unchanged(tmp_path: Path) -> None:
    """The 2-D digits: the guide alone is trained, without refinement at use; see docs/improve.md for other seeds."""
    spec = Path(__file__).parents[3] / "experiments" / "digits.yaml"
    run = fit(spec, tmp_path / "digits")
    run.audit()
    found = run.improve()
    assert found.removed() >= 0.5
    mean, _, n = found.difference()
    assert abs(mean) < 1e-4
    assert n >= 0.99 * run.data.x.shape[0] * 0.2 - 1
    retrained = run.improve(retrain=True)
    mean, error, _ = retrained.difference()
    assert mean > -2 * error


def test_random_samples_are_compared_and_all_data_are_estimated(home: Path) -> None:
    run = Run.load(home / "run")
    before = Audit.load(home / "run").table
    n = before.sizes["obs_id"]
    inside = ("obs_id", (np.arange(n) < n - 2).astype(float))
    proxies = dict.fromkeys(PROXIES, ("obs_id", before["gap_total"].values))
    before = before.assign(in_sample=inside, **proxies)
    after = before.assign(elbo=before["elbo"] + 0.01, gap_total=before["gap_total"] - 0.01)
    found = Improvement(run, run, before, after, propose(run))
    rows = {row[0]: row[1:] for row in found.lines()}
    assert rows["exact or certified"] == (f"{n - 2} of {n - 2}",) * 2
    old, new = (float(text.split()[0]) for text in rows["mean gap of all data [nats], 95 %"])
    assert old - new == pytest.approx(0.01, abs=2e-3)
