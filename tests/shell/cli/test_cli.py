"""The command line: bad input is one line and exit code 2 with nothing left behind; --help is quick; --json is JSON."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import xarray as xr
from support.command import call, listing

from elbowroom.analysis.queries.best_posterior import LATE
from elbowroom.cli import app
from elbowroom.cli.app import main


def test_dry_run_writes_nothing(here, capsys):
    before = listing(here)
    assert call("run", "s.yaml", "--dry-run") == 0
    out = capsys.readouterr().out.splitlines()
    assert "│ 0           │ " in "\n".join(out)  # the columns of x come first
    out = out[out.index("s.yaml: everything was checked, nothing was written; the run would go to runs/s (new)") :]
    assert out[1].startswith("audit, plan for 8 data, about ")
    assert [line.split()[0] for line in out[2:5]] == ["guide", "grid", "others"]
    assert out[5:] == ["  for data that grid does not settle, and for no others: hmc, importance, ais"]
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
    assert "wrote runs/s/ (audit.nc, audit.csv, diagnosis.nc, posteriors/guide.nc, posteriors/grid.nc)" in out
    assert call("audit", "runs/s", "--data", "x.npy") == 0
    assert (here / "runs/s/audits/x/audit.nc").is_file()


def test_a_question_says_what_it_will_take_and_ends_in_time(here, capsys):
    assert call("fit", "s.yaml") == 0
    before = listing(here)
    capsys.readouterr()
    assert call("encode", "runs/s", "--dry-run") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "runs/s: everything was checked, nothing was written"
    assert out[1] == "8 rows (8 to encode)"
    assert out[2].startswith("the encoder's own numbers: about ")
    assert out[3].startswith("grid: about ")
    assert call("impute", "runs/s", "--hide", "0", "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["seconds"] > 0
    assert call("encode", "runs/s", "--budget", "soon") == 2
    assert "budget: must be a time above 0" in capsys.readouterr().err
    assert listing(here) == before
    assert call("encode", "runs/s", "--budget", "0.0001s") == 0
    with xr.open_dataset(here / "runs/s/answers/encode.nc", engine="h5netcdf") as answer:
        assert all(str(reason).endswith(LATE) for reason in answer["reason"].values)
        assert answer["mean"].notnull().all()


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
    assert {"bernoulli", "gaussian", "negative_binomial"} <= {c["name"] for c in listed}
    assert call("spec", "schema") == 0
    assert json.loads(capsys.readouterr().out)["title"] == "spec"


def test_spec_commands(here, capsys):
    assert call("spec", "init", "digits") == 0
    assert call("spec", "show", "digits.yaml", "--set", "model.decoder=linear") == 0
    out, err = capsys.readouterr()
    assert "decoder:\n    name: linear\n" in out
    assert err == "elbowroom: note: --set model.decoder=linear: the options of mlp were reset (hidden)\n"
    assert call("spec", "init") == 0
    assert {"digits", "digits_gaussian", "linear_gaussian"} <= set(capsys.readouterr().out.split())


def test_components_are_listed_with_options_and_docs(capsys):
    assert call("components", "network") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "mlp A multilayer perceptron." in out
    assert "hidden: list of whole numbers >= 1; default [128, 128]. widths of the hidden layers." in out


def test_version_and_bare_command(capsys):
    from importlib.metadata import version

    assert call("--version") == 0
    assert capsys.readouterr().out.strip() == version("elbowroom")
    assert call() == 0
    assert "components" in capsys.readouterr().out


def test_our_fault_is_not_hidden(here, monkeypatch):
    monkeypatch.setattr("elbowroom.spec.spec.load", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["spec", "show", "s.yaml"])


PROBE = """
import sys
from elbowroom.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    assert stop.code == 0, stop.code
import elbowroom
heavy = {"torch", "pyro", "pydantic", "pandas", "xarray", "sklearn", "matplotlib", "numpy"} & set(sys.modules)
if len(sys.argv) > 2:
    heavy -= {"pydantic"}  # typer reads the arguments of a command by it
assert not heavy, heavy
"""


@pytest.mark.parametrize(("command", "said"), [((), "How much room"), (("encode",), "what the encoder makes of each row")])
def test_help_imports_nothing_heavy(command, said):
    done = subprocess.run([sys.executable, "-c", PROBE, *command, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 7.3 TiB for an array with shape (1000000, 1000000)"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes\nframe #0"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
)
def test_running_out_of_memory_is_one_line(monkeypatch, capsys, error):
    def refused(*_, **__):
        raise error

    monkeypatch.setattr(app, "app", refused)
    assert call("run", "s.yaml") == 2
    said = capsys.readouterr().err
    assert said.startswith("elbowroom: not enough memory (")
    assert said.count("\n") == 1


def test_another_error_is_not_taken_for_it(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(app, "app", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        app.main(["run", "s.yaml"])
