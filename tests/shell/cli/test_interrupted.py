"""Ctrl-C: each command says in one line what it keeps and how to go on; then --resume gives the undisturbed result."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support import killing
from support.command import call

from elbowroom.cli import app, interrupted, runs
from elbowroom.system import files

ELBOWROOM = [sys.executable, "-m", "elbowroom"]


def interrupt(arguments: list[str], there: str) -> tuple[int, str]:
    """Run a command, send SIGINT once a file that fits a pattern is there; return its exit code and its stderr."""
    process = subprocess.Popen([*ELBOWROOM, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    ends = time.monotonic() + 120
    while not list(Path().glob(there)) and process.poll() is None and time.monotonic() < ends:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    return process.returncode, err


def go_on(err: str, arguments: list[str]) -> None:
    """Check that the last line says how to go on, and do what it says."""
    last = err.splitlines()[-1]
    assert last.startswith("elbowroom: interrupted; "), err
    assert "Traceback" not in err
    assert "Exception" not in err
    line = last.partition("go on with `")[2].removesuffix("`")
    assert shlex.split(line) == ["elbowroom", *arguments, "--resume"]
    done = subprocess.run([*ELBOWROOM, *shlex.split(line)[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_fit_and_an_answer_go_on_after_ctrl_c(here):
    fit = ["fit", "s.yaml", "--set", "fit.epochs=60", "--set", "fit.patience=59"]
    code, err = interrupt([*fit, "--out", "r"], "r/checkpoint.pt")
    assert code == 130
    assert "r keeps the fit up to its last checkpoint; go on with" in err
    go_on(err, [*fit, "--out", "r"])
    assert call(*fit, "--out", "whole") == 0
    kept, whole = killing.contents(Path("r")), killing.contents(Path("whole"))
    assert {name: value for name, value in kept.items() if value} == {name: value for name, value in whole.items() if value}
    assert (Path("r/history.csv").read_text().count("\n")) == Path("whole/history.csv").read_text().count("\n")
    rng = np.random.default_rng(1)
    np.save("many.npy", (rng.random((6_000, 6)) < 0.5).astype(np.float32))
    asked = ["encode", "r", "many.npy", "--draws", "200", "--keep", "100"]
    code, err = interrupt([*asked, "--out", "a.nc"], "a.nc.parts/[!.]*.nc")
    assert code == 130
    assert "a.nc.parts keeps " in err
    go_on(err, [*asked, "--out", "a.nc"])
    assert call(*asked, "--out", "b.nc") == 0
    a, b = (killing.contents(Path())[f"{name}.nc mean"] for name in "ab")
    assert a == b


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.02, 0.1, 0.3, 1.0])
def test_ctrl_c_while_it_starts_is_one_line(here, seconds):
    process = subprocess.Popen([*ELBOWROOM, "fit", "s.yaml"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    time.sleep(0.05 + seconds)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    if "Traceback" not in err or "elbowroom" in err:  # before Python has come to us the line is Python's own
        assert err == "elbowroom: interrupted; nothing was written\n"
        assert process.returncode == 130
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "line",
    ["fit s.yaml", "run s.yaml", "audit r", "report r", "improve r", "compare r r", "encode r", "score r", "impute r",
     "sample r", "explain r", "integrate r", "components", "spec show s.yaml", "spec schema", "spec init digits"],
)  # fmt: skip
def test_each_command_says_that_nothing_was_written(here, capsys, monkeypatch, line):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for name in ("open", "exists", "is_file"):
        monkeypatch.setattr(Path, name, stop)
    monkeypatch.setattr("elbowroom.cli.specs.json.dumps", stop)
    monkeypatch.setattr("elbowroom.conformance.catalogue.collect", stop)
    assert call(*line.split()) == 130
    monkeypatch.undo()
    assert capsys.readouterr().err == "elbowroom: interrupted; nothing was written\n"


@pytest.mark.usefixtures("no_report")
def test_what_is_kept_is_counted(here, capsys, monkeypatch):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "_audit", stop)
        assert call("run", "s.yaml", "--out", "a b") == 130
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == "elbowroom: interrupted; a b keeps the fit; go on with `elbowroom run s.yaml --out 'a b' --resume`"
    with monkeypatch.context() as patch:
        patch.setattr("elbowroom.analysis.audit.auditor.Audit.save", stop)
        assert call("audit", "a b") == 130
    told = capsys.readouterr().err.splitlines()[-1]
    assert " finished parts of the audit; go on with `elbowroom audit 'a b' --resume`" in told
    assert call("audit", "a b", "--resume") == 0
    assert call("encode", "a b", "--out", "e.nc", "--references", "none") == 0
    before = Path("e.nc").read_bytes()
    os.utime("e.nc", (1, 1))
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr("elbowroom.cli.answers.done", stop)
        patch.setattr("elbowroom.cli.queries.done", stop)
        line = ["encode", "a b", "--out", "e.nc", "--overwrite", "--seed", "4"]
        assert call(*line) == 130
    told = capsys.readouterr().err.splitlines()[-1]
    assert (
        told
        == "elbowroom: interrupted; e.nc.parts keeps 1 finished chunk; go on with `" + shlex.join(["elbowroom", *line]) + "`"
    )
    assert Path("e.nc").read_bytes() == before


def test_the_line_is_the_same_words_before_the_options_end(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "claims", [tmp_path / "x.nc"])
    (tmp_path / "x.nc.parts").mkdir()
    (tmp_path / "x.nc.parts" / "a.nc").write_text("")
    said = interrupted.kept(["encode", "--resume", "--", "-r"], 0.0)
    assert said.endswith("; go on with `elbowroom encode --resume -- -r`")
    assert app.INTERRUPTED == 130
