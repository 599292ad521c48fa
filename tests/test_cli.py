"""The command line: bad input is one line and exit code 2 with nothing left behind; --help is quick; --json is JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from elbowroom import document
from elbowroom.cli import main

SPEC = {
    "data": {"name": "file", "path": "x.npy"},
    "model": {"latent_dim": 1, "likelihood": "bernoulli", "decoder": {"name": "mlp", "hidden": [5]}},
    "guide": {"encoder": {"name": "mlp", "hidden": [5]}},
    "fit": {"epochs": 2, "batch_size": 16, "device": "cpu"},
    "audit": {"draws": 200, "keep": 100},
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a spec and its data, as the working folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    x = (rng.random((40, 6)) < rng.random((40, 1))).astype(np.float32)
    np.save("x.npy", x)
    np.save("grey.npy", x / 2)
    np.save("nan.npy", np.where(np.arange(240).reshape(40, 6) == 14, np.nan, x))
    np.save("one.npy", x[:1])
    np.save("objects.npy", np.array([[None, 1]]), allow_pickle=True)
    Path("ragged.csv").write_text("a,b\n1,0\n1\n")
    Path("text.csv").write_text("a,b\n1,0\n1,high\n")
    Path("broken.yaml").write_text("data: [1,\n")
    Path("twice.yaml").write_text("seed: 1\nseed: 2\n")
    Path("s.yaml").write_text(document.write(SPEC))
    return tmp_path


def listing(path: Path) -> set[str]:
    return {str(p.relative_to(path)) for p in path.rglob("*")}


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code


BAD = {
    "run": "missing argument 'SPEC'; see `elbowroom run --help`",
    "rnu": "no such command 'rnu'; did you mean 'run'; see `elbowroom --help`",
    "run s.yaml --ot x": "no such option --ot; did you mean '--out'; see `elbowroom run --help`",
    "run s.yaml --set": "option '--set' requires an argument; see `elbowroom --help`",
    "run s.yaml extra": "got unexpected extra argument (extra); see `elbowroom run --help`",
    "run nowhere.yaml": "nowhere.yaml: no such spec; `elbowroom spec init` copies one of those that come with elbowroom",
    "run broken.yaml": "broken.yaml, line 2, column 1: expected the node content, but found '<stream end>'",
    "run twice.yaml": "twice.yaml, line 2, column 1: the key 'seed' appears twice",
    "run s.yaml --set model.latentdim=2": "--set model.latentdim: unknown; did you mean 'latent_dim'?",
    "run s.yaml --set model.likelihood=bernuli": "--set model.likelihood: unknown likelihood 'bernuli'; "
    "did you mean 'bernoulli'?",
    "run s.yaml --set fit.epochs=ten": "--set fit.epochs: must be a whole number, got 'ten'",
    "run s.yaml --set seed=1 --set seed=2": "--set seed: given twice",
    "run s.yaml --set fit.device=cpu --device cpu": "--set fit.device: given twice",
    "run s.yaml --device tpu": "s.yaml: fit.device: must be auto, cpu, cuda or cuda:NUMBER, got 'tpu'",
    "run s.yaml --set model.latent_dim=7 --set audit.references=grid": "s.yaml: audit.references: grid needs at most 3 "
    "latent dimensions, model.latent_dim is 7; use auto",
    "run s.yaml --set audit.references=closed_form": "s.yaml: audit.references: closed_form needs model.decoder = linear, "
    "it is mlp; use auto",
    "run s.yaml --set audit.observations=9": "s.yaml: audit.observations: the test split has 8 rows, not 9; use all",
    "run s.yaml --set model.decoder.hidden=8,-1": "s.yaml: model.decoder: hidden: every width must be at least 1, got [8, -1]",
    "run s.yaml --set data.path=y.npy": "y.npy: no such file (looked for {here}/y.npy); did you mean 'x.npy'?",
    "run s.yaml --set data.path=nan.npy": "nan.npy: NaN at row 2, column 2; remove or impute the rows that hold such values",
    "run s.yaml --set data.path=one.npy": "one.npy: 1 row; at least 3 are needed for train, validation and test",
    "run s.yaml --set data.path=objects.npy": "objects.npy: holds Python objects, which are never loaded; "
    "save numbers: np.save(file, x.astype(float))",
    "run s.yaml --set data.path=ragged.csv": "ragged.csv: line 3 has 1 cell, the lines before it have 2; "
    "every line needs the same",
    "run s.yaml --set data.path=text.csv": "text.csv: line 3, column 'b': the text 'high' is no number; "
    "remove the column or encode it",
    "run s.yaml --set data.path=grey.npy": "s.yaml: data: bernoulli needs 0 or 1, found 0.5 at row {grey}: binarize the data "
    "(data.binarize = a threshold), or use model.likelihood = continuous_bernoulli for values in [0, 1]",
    "run s.yaml --overwrite --resume": "--overwrite and --resume contradict each other: one starts anew, the other goes on",
    "run s.yaml --out x.npy": "x.npy: this is a file; name a folder with --out",
    "fit s.yaml --out .": ".: is not empty and not a run folder (it has no spec.yaml); name another with --out",
    "fit .": ".: this is a folder; name the spec file",
    "audit nowhere": "nowhere: no such run folder (no spec.yaml); make one with `elbowroom fit SPEC`",
    "audit .": ".: is not a run folder (no spec.yaml); make one with `elbowroom fit SPEC`",
    "report nowhere": None,
    "components likelihod": "unknown kind of component 'likelihod'; did you mean 'likelihood'?",
    "spec init digit": "there is no spec 'digit' in elbowroom; did you mean 'digits'?",
    "spec init digits --out s.yaml": "s.yaml: is there already; use --overwrite or another --out",
    "spec show s.yaml --set sed=1": "--set sed: unknown; did you mean 'seed'?",
    "spec shw": "no such command 'shw'; did you mean 'show'; see `elbowroom spec --help`",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line_and_leaves_nothing_behind(line, here, capsys):
    before = listing(here)
    assert call(*line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("elbowroom: ")
    assert err.count("\n") == 1, err
    if BAD[line] is not None:
        x = np.load("grey.npy")
        row, column = np.argwhere((x != 0) & (x != 1))[0]
        grey = f"{row}, column {column} ({int((x != 0).sum())} such entries)"
        assert err.removeprefix("elbowroom: ").strip() == BAD[line].format(here=here, grey=grey)
    assert listing(here) == before


def test_dry_run_writes_nothing(here, capsys):
    before = listing(here)
    assert call("run", "s.yaml", "--dry-run") == 0
    assert capsys.readouterr().out == (
        "s.yaml: everything was checked, nothing was written; the run would go to runs/s (new)\n"
    )
    assert listing(here) == before


def test_fit_then_audit(here, capsys):
    assert call("fit", "s.yaml") == 0
    out, _ = capsys.readouterr()
    assert "wrote runs/s/ (weights.pt, history.csv, spec.yaml, split.npz)\nnext: elbowroom audit runs/s\n" in out
    assert call("fit", "s.yaml") == 2
    assert "runs/s: holds a run already" in capsys.readouterr().err
    before = listing(here)
    assert call("audit", "runs/s", "--dry-run") == 0
    assert call("audit", "runs/s", "--set", "seed=3") == 2
    assert listing(here) == before
    capsys.readouterr()
    assert call("audit", "runs/s") == 0
    out, _ = capsys.readouterr()
    assert "data audited" in out
    assert "wrote runs/s/ (audit.nc, audit.csv, posteriors/guide.nc, posteriors/grid.nc)" in out
    assert call("audit", "runs/s", "--data", "x.npy") == 0
    assert (here / "runs/s/audits/x/audit.nc").is_file()


def test_json_is_all_that_is_printed(here, capsys):
    assert call("fit", "s.yaml", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["run"] == "runs/s"
    assert err == ""
    assert call("audit", "runs/s", "--json", "--set", "audit.observations=4") == 0
    out, err = capsys.readouterr()
    found = json.loads(out)["audit"]
    assert found["table"]["data audited"] == "4"
    assert found["verdict"]
    assert err == ""
    assert call("components", "likelihood", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert [c["name"] for c in listed] == ["bernoulli", "continuous_bernoulli", "gaussian"]
    assert call("spec", "schema") == 0
    assert json.loads(capsys.readouterr().out)["title"] == "spec"


def test_spec_commands(here, capsys):
    assert call("spec", "init", "digits") == 0
    assert call("spec", "show", "digits.yaml", "--set", "model.decoder=linear") == 0
    out, err = capsys.readouterr()
    assert "decoder:\n    name: linear\n" in out
    assert err == "elbowroom: note: --set model.decoder=linear: the options of mlp were reset (hidden)\n"
    assert call("spec", "init") == 0
    assert capsys.readouterr().out.split() == ["digits", "digits_gaussian", "linear_gaussian"]


def test_components_are_listed_with_options_and_docs(capsys):
    assert call("components", "network") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "mlp A multilayer perceptron." in out
    assert "hidden: list of whole numbers; default [128, 128]. widths of the hidden layers." in out


def test_version_and_bare_command(capsys):
    from importlib.metadata import version

    assert call("--version") == 0
    assert capsys.readouterr().out.strip() == version("elbowroom")
    assert call() == 0
    assert "components" in capsys.readouterr().out


def test_our_fault_is_not_hidden(here, monkeypatch):
    monkeypatch.setattr("elbowroom.spec.load", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["spec", "show", "s.yaml"])


PROBE = """
import sys
from elbowroom.cli import main
try:
    main(["--help"])
except SystemExit as stop:
    assert stop.code == 0, stop.code
import elbowroom
heavy = {"torch", "pyro", "pydantic", "pandas", "xarray", "sklearn", "matplotlib", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_imports_nothing_heavy_and_is_quick():
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    assert done.returncode == 0, done.stderr
    assert "How much room" in done.stdout
    assert seconds < 1.0  # 0.1 s on an idle machine; tests share theirs


def test_report_does_not_import_torch(here):
    code = "import sys, elbowroom.cli as c\ntry: c.main(['report', 'nowhere'])\nexcept SystemExit as s: assert s.code == 2\n"
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
