"""Fuzz of every command: whatever its options, its run folder and its rows are, it ends with code 0 or 2 and one line.

The options are read from the command line itself, so that a new one is tried by being there. `make test` tries a few; the
full thousand is behind the marker `slow`.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from support import killing
from whole.fuzz.test_fuzz import FEW, GOOD, call, judge, mangle

from elbowroom.cli.app import app
from elbowroom.run import fit
from elbowroom.spec import document

SECONDS = 600
"""That no command may take on forty rows of six columns: one that hangs is a failure."""

GROUP = typer.main.get_command(app).commands
COMMANDS = {(name,): command for name, command in GROUP.items() if not hasattr(command, "commands")}
COMMANDS |= {(name, inner): command for name in GROUP for inner, command in getattr(GROUP[name], "commands", {}).items()}
CHEAP = {
    "encode": ["--draws", "100", "--keep", "100"], "impute": ["--draws", "100", "--keep", "100"],
    "score": ["--draws", "100", "--simulated", "5", "--most", "20"], "sample": ["--draws", "100", "--keep", "100", "--n", "20"],
    "integrate": ["--samples", "50", "--repeats", "5", "--temperatures", "3"],
    "explain": ["--points", "3", "--steps", "3", "--draws", "20"], "improve": ["--set", "fit.epochs=2"],
    "fit": ["--set", "fit.epochs=2"], "run": ["--set", "fit.epochs=2"],
}  # fmt: skip
UNTRIED = {"profile", "profile_functions", "help", "check"}
"""Profilers are slow, and so is a check of all components; help ends the command."""

NUMBERS = ["0", "1", "2", "3", "5", "-1", "0.5", "1.5", "99", "1e3", "1e-9", "1e400", "nan", "inf", "-inf", "", "x", "١", "0x1"]
HUGE = ["1000000000000", "9223372036854775807", "18446744073709551616", "1e18"]
PATHS = [
    "x.npy", "x.csv", "x.npz", "s.yaml", "run", "run/spec.yaml", "run/audit.nc", "missing.npy", ".", "..", "/dev/null",
    "a" * 300, "x.npy/y", "ü.csv", "new.nc", "new.csv", "new.parquet", "new.npz", "new.txt", "new", "no/new.nc", "train",
    "test",
    "empty.csv", "validation", "-", "--", "'", "http://x/y.csv", "~", "*", "copy", "copy/audit.csv", "copy/spec.yaml",
]  # fmt: skip
WORDS = [
    "grid", "hmc", "importance", "auto", "none", "grid,hmc", "nuts", "prior", "aggregate", "cpu", "cuda:9", "pattern", "count",
    "10m", "0s", "-5s", "10-90", "90-10", "a-b", "20%", "200%", "left", "c0,c1", "fit.epochs=1", "fit.epochs", "model.prior=x",
    "audit.draws=100", "=", "seed=-1", "model.latent_dim=1e9", "data.path=no.npy", "x=1", "mlp", "prior,encoder", ",", "normal",
]  # fmt: skip
TEXTS = st.one_of(
    st.sampled_from(NUMBERS), st.sampled_from(PATHS), st.sampled_from(WORDS), st.sampled_from(HUGE), st.text(max_size=6)
)


@st.composite
def commands(draw) -> tuple[list[str], list[tuple[str, float, bytes]]]:
    """The words of a command with odd options, and what is done to the file of its rows."""
    name = draw(st.sampled_from(sorted(COMMANDS)))
    words = [*name]
    sound = draw(st.booleans())  # the run and the rows are good in half of the cases: then the options are what is tried
    for parameter in COMMANDS[name].params:
        if parameter.param_type_name != "argument":
            continue
        if parameter.required or draw(st.booleans()):
            words.append(_sound(parameter.name) if sound or draw(st.booleans()) else draw(TEXTS))
    words += CHEAP.get(name[0], [])
    options = [p for p in COMMANDS[name].params if p.param_type_name == "option" and p.name not in UNTRIED]
    for _ in range(draw(st.integers(0, 3)) if options else 0):
        option = draw(st.sampled_from(options))
        words.append(draw(st.sampled_from([*option.opts, *option.secondary_opts])))
        if not option.is_flag:
            words += [draw(TEXTS) for _ in range(option.nargs)]
    if draw(st.integers(0, 9)) == 0:
        words.insert(draw(st.integers(1, len(words))), draw(TEXTS))
    one = st.tuples(
        st.sampled_from(["flip", "cut", "overwrite", "insert", "remove", "random"]),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=20),
    )
    return words, [] if sound else draw(st.lists(one, max_size=2))


def _sound(argument: str) -> str:
    return {"run": "copy", "runs": "copy", "spec": "s.yaml", "data": "x.npy"}.get(argument, "x")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder with a whole run and rows to ask about; every example works on a copy."""
    folder = tmp_path_factory.mktemp("commands")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        rng = np.random.default_rng(0)
        x = (rng.random((40, 6)) < rng.random((40, 1))).astype(np.float32)
        np.save("x.npy", x)
        np.savez("x.npz", x=x)
        np.savetxt("x.csv", x, delimiter=",", header="c0,c1,c2,c3,c4,c5", comments="")
        Path("empty.csv").write_text("")
        Path("s.yaml").write_text(document.write(GOOD))
        fit("s.yaml", out="run").audit()
    return folder


def too_long(*_: object) -> None:
    raise AssertionError(f"the command takes more than {SECONDS} s")


def try_command(kept: Path, words: list[str], changes: list[tuple[str, float, bytes]]) -> None:
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        os.chdir(folder)
        for source in kept.iterdir():
            (shutil.copytree if source.is_dir() else shutil.copy)(source, source.name)
        shutil.copytree("run", "copy")
        if changes:
            for name in ("x.npy", "x.csv", "x.npz"):
                Path(name).write_bytes(mangle(Path(name).read_bytes(), changes))
        mangled = {str(Path(name)) for name in ("x.npy", "x.csv", "x.npz") if changes}
        before = signal.signal(signal.SIGALRM, too_long)
        signal.alarm(SECONDS)
        try:
            code, err = call(*words)
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        judge(code, err[-2000:] if code not in (0, 2) else err)
        torn = [line for line in killing.unreadable(Path()) if line.partition(":")[0] not in mangled | {"s.yaml", "empty.csv"}]
        torn = [line for line in torn if "AssertionError a file of an unknown kind" not in line]
        assert torn == []
        assert (kept / "run" / "audit.nc").read_bytes() == Path("run/audit.nc").read_bytes(), "a run was changed unasked"
        os.chdir(kept)


@settings(FEW, max_examples=8)
@given(case=commands())
@pytest.mark.usefixtures("no_figures")
def test_a_few_odd_commands(kept, case):
    try_command(kept, *case)


@pytest.mark.slow
@settings(FEW, max_examples=1000)
@given(case=commands())
@pytest.mark.usefixtures("no_figures")
def test_a_thousand_odd_commands(kept, case):
    try_command(kept, *case)
