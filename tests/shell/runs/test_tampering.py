"""A run folder from elsewhere may hold anything: every command ends with code 0, or with code 2 and one line."""

from __future__ import annotations

import shutil
import warnings
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from support import tampering

from elbowroom.cli.app import main
from elbowroom.run import fit
from elbowroom.spec import document

SPEC = {
    "data": {"name": "file", "path": "x.csv"},
    "model": {"latent_dim": 1, "likelihood": "gaussian", "decoder": {"name": "mlp", "hidden": [4]}},
    "guide": {"encoder": {"name": "mlp", "hidden": [4]}},
    "fit": {"epochs": 2, "device": "cpu"},
    "audit": {"draws": 200, "keep": 100, "observations": 3},
}
COMMANDS = (
    "report bad",
    "audit bad --dry-run",
    "encode bad new.csv --references none",
    "score bad new.csv --references none --simulated 0 --most 50 --band 20-80",
    "sample bad --n 3 --no-test",
    "sample bad --from aggregate --n 3",
    "impute bad holes.csv --references none",
    "explain bad --references none",
    "compare bad run",
    "improve bad --dry-run",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with data, new rows and a whole run."""
    folder = tmp_path_factory.mktemp("tampering")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        rng = np.random.default_rng(0)
        x = rng.normal(size=(60, 1)) + 0.5 * rng.normal(size=(60, 5))
        np.savetxt("x.csv", x, delimiter=",", header="a,b,c,d,e", comments="")
        np.savetxt("new.csv", x[:4], delimiter=",", header="a,b,c,d,e", comments="")
        Path("holes.csv").write_text("a,b,c,d,e\n1,,0.5,0,1\n")
        Path("s.yaml").write_text(document.write(SPEC))
        fit("s.yaml", out="run").audit()
    return folder


def call(*arguments: str) -> tuple[int, str]:
    """Run a command in this process; return its code and what it said on stderr. A traceback is a failure."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            main(arguments)
        except SystemExit as stop:
            return int(stop.code or 0), err.getvalue()
    raise AssertionError("main returned")


def try_seed(seed: int) -> list[str]:
    """Tamper with a copy of the run and ask commands about it; return what went wrong."""
    shutil.rmtree("bad", ignore_errors=True)
    shutil.copytree("run", "bad")
    what, wrong = tampering.tamper(Path("bad"), seed), []
    for line in (
        COMMANDS[seed % len(COMMANDS)],
        COMMANDS[(seed // 11) % len(COMMANDS)],
        COMMANDS[(3 * seed + 1) % len(COMMANDS)],
    ):
        try:
            code, err = call(*line.split())
        except Exception as error:
            wrong.append(f"{seed}, {what}, {line}: {type(error).__name__}: {str(error)[:200]}")
            continue
        lines = [one for one in err.splitlines() if one.startswith("elbowroom: ") and ": note: " not in one]
        if code not in (0, 2) or "Traceback" in err or (code == 2 and len(lines) != 1):
            wrong.append(f"{seed}, {what}, {line}: code {code}: {err[-300:]}")
    return wrong


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("seed", range(8))
def test_a_few_tampered_runs(seed, home, monkeypatch, caplog):
    monkeypatch.chdir(home)
    assert try_seed(seed) == []
    caplog.clear()  # a report may do without the figure of a variable that was taken away, and says so


@pytest.mark.slow
@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("seed", range(200))
def test_two_hundred_tampered_runs(seed, home, monkeypatch, caplog):
    monkeypatch.chdir(home)
    assert try_seed(seed) == []
    caplog.clear()  # a report may do without the figure of a variable that was taken away, and says so
