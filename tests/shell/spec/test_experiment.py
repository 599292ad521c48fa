"""Experiments and runs: what is checked before a fit, the run folder, and the way from a folder back to Python."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import elbowroom as er
from elbowroom.errors import DataError, RunFolderError, SpecError, UserError
from elbowroom.run import Run, fit
from elbowroom.runs.fitting import ready
from elbowroom.spec import document, run_folder
from elbowroom.spec.experiment import Experiment
from elbowroom.spec.spec import shipped_text

SPEC = {
    "schema": 1,
    "data": {"name": "file", "path": "x.npy"},
    "model": {"latent_dim": 1, "likelihood": "bernoulli", "decoder": {"name": "mlp", "hidden": [5]}},
    "guide": {"encoder": {"name": "mlp", "hidden": [5]}},
    "fit": {"epochs": 3, "batch_size": 16, "device": "cpu"},
    "audit": {"draws": 200, "keep": 100},
}


def write_spec(path: Path, **changes) -> Path:
    path.write_text(document.write({**SPEC, **changes}))
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with binary data and a spec, as the working folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.save("x.npy", (rng.random((60, 6)) < rng.random((60, 1))).astype(np.float32))
    write_spec(tmp_path / "toy.yaml")
    return tmp_path


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A fitted run that tests only read."""
    home = tmp_path_factory.mktemp("fitted")
    rng = np.random.default_rng(0)
    np.save(home / "x.npy", (rng.random((60, 6)) < rng.random((60, 1))).astype(np.float32))
    return fit(Experiment.load(write_spec(home / "toy.yaml")), out=home / "run")


def state(vae) -> dict:
    return {name: value.clone() for name, value in vae.state_dict().items()}


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def test_the_public_names_are_there():
    for name in er.__all__:
        assert getattr(er, name) is not None
    assert set(er.__all__) <= set(dir(er))
    with pytest.raises(AttributeError, match="has no attribute 'adit'"):
        _ = er.adit


def test_the_run_folder(fitted):
    names = {path.name for path in fitted.path.iterdir()}
    assert names == {"spec.yaml", "split.npz", "weights.pt", "checkpoint.pt", "history.csv"}
    record = yaml.safe_load((fitted.path / "spec.yaml").read_text())["record"]
    assert record["data_sha256"] == fitted.experiment.data.fingerprint()
    assert record["event_shape"] == [6]
    assert record["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]  # PyPI leaves out +cu130
    with np.load(fitted.path / "split.npz") as split:
        rows = np.concatenate([split[name] for name in ("train", "validation", "test")])
        assert {split[name].dtype for name in split} == {np.dtype(np.int64)}
    assert sorted(rows.tolist()) == list(range(60))


def test_load_gives_the_fitted_vae_back(fitted):
    run = Run.load(fitted.path)
    assert_same(state(run.vae), state(fitted.vae))
    assert not run.vae.training
    assert run.data.event_shape == (6,)
    assert repr(run) == f"Run('{fitted.path}')"


def test_the_spec_of_a_run_is_a_spec(fitted, tmp_path):
    again = fit(fitted.path / "spec.yaml", out=tmp_path / "again")
    assert_same(state(again.vae), state(fitted.vae))
    assert again.experiment.identity == fitted.experiment.identity


def test_a_run_can_be_opened_elsewhere_without_its_data(here):
    run = fit("toy.yaml")
    assert run.path == Path("runs/toy")
    (here / "elsewhere").mkdir()
    moved = run.path.rename(here / "elsewhere" / "toy")
    (here / "x.npy").unlink()
    opened = Run.load(moved)
    assert_same(state(opened.vae), state(run.vae))
    with pytest.raises(DataError, match="no such file"):
        _ = opened.data


def test_weights_depend_on_the_seed_alone(here):
    experiment = Experiment.load("toy.yaml")
    torch.manual_seed(5)
    first = state(experiment.build())
    torch.manual_seed(6)
    before = torch.get_rng_state()
    assert_same(first, state(experiment.build()))
    assert torch.equal(before, torch.get_rng_state())
    other = state(Experiment.load("toy.yaml", set=["seed=1"]).build())
    assert not torch.equal(first["decoder.body.0.weight"], other["decoder.body.0.weight"])


def test_float64_on_request(here):
    run = fit(Experiment.load("toy.yaml", set=["fit.dtype=float64", "fit.epochs=1"]), out="run64")
    assert {p.dtype for p in run.vae.parameters()} == {torch.float64}
    assert {p.dtype for p in Run.load("run64").vae.parameters()} == {torch.float64}


def test_resume_continues_and_ends_the_same(here):
    whole = fit("toy.yaml", out="whole")
    partial = fit("toy.yaml", out="partial", resume=True)  # nothing there yet: it starts
    (partial.path / "weights.pt").unlink()
    with pytest.raises(RunFolderError, match=r"weights.pt: missing: the fit has not ended; go on with .* --resume"):
        Run.load("partial")
    resumed = fit("toy.yaml", out="partial", resume=True)
    assert_same(state(resumed.vae), state(whole.vae))


def test_overwrite_moves_the_old_run_aside(here):
    fit("toy.yaml")
    Path("runs/toy/mine.txt").write_text("keep me")
    fit("toy.yaml", overwrite=True)
    fit("toy.yaml", overwrite=True)
    assert sorted(p.name for p in Path("runs").iterdir()) == ["toy", "toy.1", "toy.2"]
    assert Path("runs/toy.1/mine.txt").read_text() == "keep me"
    assert not Path("runs/toy/mine.txt").exists()


def test_folders_that_are_refused(here):
    run = fit("toy.yaml", out="run")
    before = state(run.vae)
    Path("other").mkdir()
    Path("other/notes.txt").write_text("mine")
    Path("file").write_text("")
    cases = [
        ("run", {}, "run: holds a run already; use --resume to go on, --overwrite to move it aside, or another --out"),
        ("other", {}, "other: is not empty and not a run folder (it has no spec.yaml); name another with --out"),
        (
            "other",
            {"overwrite": True},
            "other: is not empty and not a run folder (it has no spec.yaml); name another with --out",
        ),
        ("file", {}, "file: this is a file; name a folder with --out"),
        (
            "file/x",
            {},
            "file/x: cannot be written (" + str(here / "file") + " is not a writable folder); name another with --out",
        ),
        (
            "run",
            {"overwrite": True, "resume": True},
            "--overwrite and --resume contradict each other: one starts anew, the other goes on",
        ),
    ]
    for out, options, wanted in cases:
        with pytest.raises(UserError) as error:
            fit("toy.yaml", out=out, **options)
        assert str(error.value) == wanted
    changed = Experiment.load("toy.yaml", set=["model.latent_dim=2"])
    with pytest.raises(RunFolderError) as error:
        fit(changed, out="run", resume=True)
    assert str(error.value) == (
        "run: belongs to another experiment (model.latent_dim is 1 there, 2 here); "
        "use --overwrite to move it aside, or another --out"
    )
    np.save("x.npy", 1 - np.load("x.npy"))
    with pytest.raises(RunFolderError, match=r"run: belongs to another experiment \(other data\)"):
        fit("toy.yaml", out="run", resume=True)
    with pytest.raises(RunFolderError, match=r"x\.npy has changed since the fit; fit again"):
        _ = Run.load("run").data
    assert_same(before, state(Run.load("run").vae))


def test_another_device_or_audit_is_the_same_experiment(here):
    fit("toy.yaml", out="run")
    _, use = ready(Experiment.load("toy.yaml", set=["fit.device=auto", "audit.draws=300"]), "run", resume=True)
    assert use == "resume"


BROKEN = {
    "no folder": (lambda p: [f.unlink() for f in p.iterdir()] and p.rmdir(), "no such run folder (no spec.yaml)"),
    "no spec": (lambda p: (p / "spec.yaml").unlink(), "is not a run folder (no spec.yaml)"),
    "torn weights": (
        lambda p: (p / "weights.pt").write_bytes((p / "weights.pt").read_bytes()[:100]),
        "weights.pt: damaged (",
    ),
    "foreign weights": (lambda p: torch.save({"a": torch.zeros(2)}, p / "weights.pt"), "weights.pt: does not belong to this"),
    "pickled weights": (lambda p: torch.save(Path("x"), p / "weights.pt"), "weights.pt: damaged ("),
    "changed spec": (
        lambda p: (p / "spec.yaml").write_text((p / "spec.yaml").read_text().replace("hidden: [5]", "hidden: [6]")),
        "was changed after the fit; fit again with --overwrite",
    ),
    "newer spec": (
        lambda p: (p / "spec.yaml").write_text((p / "spec.yaml").read_text().replace("schema: 1", "schema: 9")),
        "schema: 9 is newer than this elbowroom, which reads 1",
    ),
    "a spec without a record": (
        lambda p: (p / "spec.yaml").write_text((p / "spec.yaml").read_text().split("record:")[0]),
        "has no record of a run; this is a spec",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_run_folders(how, fitted, tmp_path):
    import shutil

    path = tmp_path / "run"
    shutil.copytree(fitted.path, path)
    damage, wanted = BROKEN[how]
    damage(path)
    with pytest.raises(UserError) as error:
        Run.load(path)
    assert wanted in str(error.value)
    assert "\n" not in str(error.value)


def test_a_damaged_split_is_named(fitted, tmp_path):
    (tmp_path / "split.npz").write_bytes(b"no")
    with pytest.raises(RunFolderError, match=r"split\.npz: damaged"):
        run_folder.read_split(tmp_path / "split.npz")
    with pytest.raises(RunFolderError, match=r"nowhere\.npz: missing"):
        run_folder.read_split(tmp_path / "nowhere.npz")


def test_only_the_audit_of_a_run_can_be_set(fitted):
    with pytest.raises(SpecError, match=r"^--set model.latent_dim: the run is fitted; only audit\.\* can be set for it$"):
        Run.load(fitted.path, set=["model.latent_dim=3"])
    assert Run.load(fitted.path, set=["audit.observations=5"]).experiment.spec.audit.observations == 5


def test_audit_writes_its_files(fitted, tmp_path):
    run = Run.load(fitted.path, set=["audit.observations=5"])
    said: list[str] = []
    stale = tmp_path / "out" / "posteriors" / "old.nc"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    audit = run.audit(out=tmp_path / "out", progress=said.append)
    files = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert files == {"audit.nc", "audit.csv", "diagnosis.nc", "latent.nc", "posteriors/guide.nc", "posteriors/grid.nc"}
    assert audit.table["obs_id"].values.tolist() == sorted(run.experiment.split.test[:5].tolist())
    assert audit.table.attrs["spec_sha256"] == run.experiment.spec.record.experiment
    assert json.loads(audit.table.attrs["audit"])["observations"] == 5
    assert said
    assert er.Audit.load(tmp_path / "out").verdict == audit.verdict
    assert bool((audit.table["gap_total"] > -3 * audit.table["elbo_se"] - 1e-9).all())


def test_audit_of_other_data(fitted, tmp_path):
    rng = np.random.default_rng(1)
    x = (rng.random((4, 6)) < 0.5).astype(float)
    np.savetxt(tmp_path / "new.csv", x, delimiter=",")
    run = Run.load(fitted.path)
    from_file = run.audit(tmp_path / "new.csv", out=tmp_path / "a")
    from_array = run.audit(x, out=tmp_path / "b")
    np.testing.assert_array_equal(from_file.table["elbo"], from_array.table["elbo"])
    assert from_file.table["obs_id"].values.tolist() == [0, 1, 2, 3]
    assert run.audit_folder(tmp_path / "new.csv") == run.path / "audits" / "new"
    for bad, wanted in [
        (x[:, :5], "data: each datum has shape (5,), the model expects (6,)"),
        (x * 0.5, "data: bernoulli needs 0 or 1, found 0.5 at row "),
    ]:
        with pytest.raises(DataError) as error:
            run.audit(bad, out=tmp_path / "c")
        assert str(error.value).startswith(wanted)
    with pytest.raises(SpecError, match=r"audit.observations: there are 4 rows, not 9; use all"):
        Run.load(fitted.path, set=["audit.observations=9"]).audit(x, out=tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_linear_gaussian_agrees_with_the_closed_form(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("lg.yaml").write_text(shipped_text("linear_gaussian"))
    changes = ["data.n=100", "data.dim=4", "fit.epochs=5", "audit.draws=200", "audit.keep=100"]
    run = fit(Experiment.load("lg.yaml", set=changes))
    audit = run.audit()
    oracle = run.vae.linear_gaussian()
    x = run.experiment.rows(audit.table["obs_id"].values)
    exact = oracle.log_evidence(x).numpy()
    np.testing.assert_allclose(audit.table["log_evidence"], exact, atol=1e-8)
    assert set(audit.posteriors) == {"guide", "closed_form", "grid"}
    grid = audit.posteriors["grid"]
    assert grid is not None


def test_rows_that_overflow_are_named(here):
    x = np.load("x.npy").astype(np.float64)
    x[7, 2] = 1e300
    np.save("big.npy", x)
    write_spec(Path("big.yaml"), data={"name": "file", "path": "big.npy"}, model={"latent_dim": 1, "likelihood": "gaussian"})
    with pytest.raises(DataError, match=r"^big.yaml: big.npy: 1e\+300 at row 7, column 2 is too large for float32; rescale"):
        fit("big.yaml")
    Experiment.load("big.yaml", set=["fit.dtype=float64"]).rows(np.arange(60))


def test_support_is_checked_in_parts_with_the_right_row(here, monkeypatch):
    monkeypatch.setattr("elbowroom.spec.experiment.CHUNK", 12)
    x = np.load("x.npy")
    x[7, 2] = 0.25
    np.save("x.npy", x)
    with pytest.raises(DataError, match=r"^toy.yaml: data: bernoulli needs 0 or 1, found 0.25 at row 7, column 2 "):
        fit("toy.yaml")
    assert not Path("runs").exists()


def test_from_dict():
    experiment = Experiment.from_dict({"data": {"name": "digits", "binarize": 8}, "model": SPEC["model"]})
    assert experiment.data.event_shape == (8, 8)
    assert len(experiment.split.test) == 359
    with pytest.raises(SpecError, match=r"^spec: model: missing$"):
        Experiment.from_dict({"data": "digits"})
