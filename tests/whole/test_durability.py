"""Killed at any moment: no file is ever half-written, the old run is never lost, and the end is bitwise the same."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support import killing

from elbowroom.cli.app import main
from elbowroom.errors import RunFolderError
from elbowroom.run import fit
from elbowroom.spec import document
from elbowroom.system import files

SERVER = Path(killing.__file__)


def kill(folder: Path, kills: int, seed: int, *words: str) -> dict:
    command = [sys.executable, str(SERVER), str(folder), str(kills), str(seed), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["problems"] == []
    assert found["kills"] == kills
    assert found["bitwise"] == found["runs"]
    return found


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a spec and its data, as the working folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.save("x.npy", (rng.random((40, 6)) < rng.random((40, 1))).astype(np.float32))
    Path("s.yaml").write_text(document.write({**killing.SPEC, "fit": {"epochs": 2, "device": "cpu"}}))
    return tmp_path


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> tuple[Path, dict]:
    """A few kills of either kind, and a race, by one process: to import takes most of the time."""
    folder = tmp_path_factory.mktemp("kills")
    return folder, kill(folder, 4, 0, "both", "quick")


def test_a_few_kills(few):
    assert few[1]["kills"] == 4


@pytest.mark.slow
def test_a_few_kills_of_an_answer(tmp_path):
    kill(tmp_path, 4, 0, "both", "answers", "encode")


@pytest.mark.slow
def test_two_hundred_kills_of_answers(tmp_path):
    found = kill(tmp_path, 200, 1, "both", "answers")
    assert {"encode", "score", "impute", "sample", "improve", "report"} <= {where.split(": ")[0] for where in found["struck"]}


@pytest.mark.slow
def test_interrupted_answers_say_what_they_keep_and_go_on(tmp_path):
    found = kill(tmp_path, 40, 2, "interrupts", "answers")
    assert any("go on with `elbowroom " in words for words in found["told"])


@pytest.mark.slow
def test_two_hundred_kills(tmp_path):
    found = kill(tmp_path, 200, 1)
    assert {"fit", "audit", "report"} <= {where.split(": ")[1] for where in found["struck"]}
    assert found["temporary"] > 0  # some struck while a file was being written


@pytest.mark.slow
def test_kills_just_before_and_after_every_rename(tmp_path):
    kill(tmp_path, 64, 2, "renames")


@pytest.mark.slow
def test_the_real_command_line_killed(here):
    """Ten kills of `python -m elbowroom`, imports and all, in one chain of resumes."""
    command = [sys.executable, "-m", "elbowroom", "run", "s.yaml", "--resume", "--out"]
    started = time.perf_counter()
    assert subprocess.run([*command, "whole"], capture_output=True, check=False).returncode == 0
    seconds, rng = time.perf_counter() - started, random.Random(0)
    for _ in range(10):
        process = subprocess.Popen([*command, "k"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.3, 1) * seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert killing.unreadable(Path("k")) == []
    assert subprocess.run([*command, "k"], capture_output=True, check=False).returncode == 0
    assert killing.outcome(Path("k")) == killing.outcome(Path("whole"))


# one process at a time


def hold(folder: Path) -> int:
    """Lock a folder as another process would."""
    handle = os.open(folder / files.LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    os.write(handle, b"4242\n")
    return handle


def test_the_second_process_is_told(here, capsys):
    assert call("fit", "s.yaml") == 0
    before = {p: p.stat().st_mtime_ns for p in Path("runs").rglob("*") if p.name != "s"}
    handle = hold(Path("runs/s"))
    wanted = (
        "elbowroom: runs/s: another elbowroom (process 4242) is writing to this folder; "
        "wait until it has ended, or use another folder\n"
    )
    lines = [
        "fit s.yaml --resume",
        "fit s.yaml --overwrite",
        "run s.yaml --resume",
        "audit runs/s",
        "audit runs/s --data x.npy",
    ]
    for line in lines:
        capsys.readouterr()
        assert call(*line.split()) == 2, line
        assert capsys.readouterr().err == wanted, line
    os.close(handle)
    (Path("runs/s") / files.LOCK).unlink()
    assert {p: p.stat().st_mtime_ns for p in Path("runs").rglob("*") if p.name != "s"} == before
    assert call("audit", "runs/s") == 0
    handle = hold(Path("runs/s"))
    capsys.readouterr()
    assert call("report", "runs/s") == 2
    assert capsys.readouterr().err == wanted
    os.close(handle)


def test_two_processes_at_once(few):
    """Of two processes on one new folder one wins and the other is told, whatever the timing."""
    folder, found = few
    assert [code for code, _ in found["raced"]] == [0, 2], found
    told = found["raced"][1][1]
    assert told.count("\n") == 1
    assert "is writing to this folder" in told or "holds a run already" in told
    assert killing.unreadable(folder / "both") == []


@pytest.mark.usefixtures("no_figures")
@pytest.mark.slow
def test_a_dead_process_leaves_neither_lock_nor_temporary_files(here):
    folder = Path("runs/s")
    folder.mkdir(parents=True)
    (folder / files.LOCK).write_text("1\n")
    (folder / ".spec.4194999.tmp.yaml").write_text("half")
    assert call("fit", "s.yaml") == 0  # such a folder is as good as new
    (folder / ".weights.4194999.tmp.pt").write_text("half")
    (folder / "figures").mkdir()
    (folder / "figures" / ".gaps.1.tmp.png").write_text("half")
    (folder / ".mine.txt").write_text("kept")
    assert call("audit", "runs/s") == 0
    assert call("report", "runs/s") == 0
    hidden = {p.name for p in folder.rglob(".*")}
    assert hidden == {".mine.txt"}


def test_claims_nest_and_an_unused_folder_goes_again(tmp_path):
    with files.locked(tmp_path / "a" / "b"), files.locked(tmp_path / "a" / "b"):
        assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == [files.LOCK]
    assert not (tmp_path / "a" / "b").exists()


def test_atomic_removes_only_what_the_dead_left(tmp_path):
    dead, alive, other = (tmp_path / f".x.{n}.tmp.txt" for n in ("4194999", "1", "99999999999"))
    for path in (dead, alive, other, tmp_path / ".y.4194999.tmp.txt"):
        path.write_text("")
    files.write_text(tmp_path / "x.txt", "text")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([alive.name, other.name, ".y.4194999.tmp.txt", "x.txt"])


# --overwrite


def test_overwrite_never_loses_the_old_run(here, monkeypatch):
    fit("s.yaml", out="run")
    weights = Path("run/weights.pt").read_bytes()
    real = Path.rename

    def dies(self, target):
        raise KeyboardInterrupt

    def moves_and_dies(self, target):
        real(self, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", dies)
    with pytest.raises(KeyboardInterrupt):
        fit("s.yaml", out="run", overwrite=True)
    assert Path("run/weights.pt").read_bytes() == weights
    monkeypatch.setattr(Path, "rename", moves_and_dies)
    with pytest.raises(KeyboardInterrupt):
        fit("s.yaml", out="run", overwrite=True)
    assert Path("run.1/weights.pt").read_bytes() == weights
    assert not Path("run").exists()
    monkeypatch.setattr(Path, "rename", real)
    fit("s.yaml", out="run", resume=True)
    assert killing.unreadable(Path("run")) == []


def test_aside_takes_the_first_free_name(tmp_path):
    for name in ("run", "run.1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)
    (tmp_path / "run.2").symlink_to("nowhere")
    with files.locked(tmp_path / "run"):
        assert files.move_aside(tmp_path / "run").name == "run.3"
        with pytest.raises(BlockingIOError):  # the claim goes on with the new folder
            fcntl.flock(os.open(tmp_path / "run" / files.LOCK, os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert (tmp_path / "run.3" / "a").read_text() == "run"
    assert list((tmp_path / "run").iterdir()) == []


# --resume


@pytest.mark.usefixtures("no_report")
@pytest.mark.slow
def test_a_whole_audit_is_kept_and_another_is_not(here):
    assert call("run", "s.yaml") == 0
    stamp = Path("runs/s/audit.nc").stat().st_mtime_ns
    table = Path("runs/s/audit.csv").read_bytes()
    for line in ("audit runs/s --resume", "run s.yaml --resume"):
        assert call(*line.split()) == 0
        assert Path("runs/s/audit.nc").stat().st_mtime_ns == stamp
    assert call("run", "s.yaml", "--resume", "--set", "audit.observations=4") == 0
    assert Path("runs/s/audit.nc").stat().st_mtime_ns != stamp
    assert "observations: 4" in Path("runs/s/spec.yaml").read_text()
    assert call("run", "s.yaml", "--resume") == 0
    assert Path("runs/s/audit.csv").read_bytes() == table
    Path("runs/s/posteriors/grid.nc").write_bytes(b"torn")
    assert call("audit", "runs/s", "--resume") == 0
    assert killing.unreadable(Path("runs/s")) == []


def test_an_audit_goes_to_no_other_run(here):
    run = fit("s.yaml", out="a")
    fit("s.yaml", out="b")
    with pytest.raises(RunFolderError, match=r"^b: is another run's folder; name another with --out$"):
        run.audit(out="b")
    assert not Path("b/audit.nc").exists()
