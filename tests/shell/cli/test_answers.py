"""Answers on disk: --resume keeps a whole one, completes a half-written one and takes no other; one process at a time."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from support import killing
from support.command import call, listing

from elbowroom.queries import stream

QUESTIONS = {
    "encode": ["encode", "runs/s", "x.npy", "--references", "none", "--draws", "100", "--keep", "100"],
    "score": [
        *("score", "runs/s", "x.npy", "--calibration", "x.npy", "--simulated", "0"),
        *("--references", "none", "--draws", "100", "--band", "10-90"),
    ],
    "impute": ["impute", "runs/s", "x.npy", "--hide", "20%", "--references", "none", "--draws", "100", "--keep", "100"],
    "sample": ["sample", "runs/s", "--no-test"],
    "explain": ["explain", "runs/s", "--points", "3", "--steps", "3", "--draws", "50"],
    "integrate": ["integrate", "runs/s", "--samples", "100", "--repeats", "5", "--temperatures", "3"],
}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A folder with data and a fitted run."""
    from support.command import SPEC

    from elbowroom.run import fit
    from elbowroom.spec import document

    folder = tmp_path_factory.mktemp("fitted")
    rng = np.random.default_rng(0)
    np.save(folder / "x.npy", (rng.random((40, 6)) < rng.random((40, 1))).astype(np.float32))
    (folder / "s.yaml").write_text(document.write(SPEC))
    fit(folder / "s.yaml", out=folder / "runs/s")
    return folder


@pytest.fixture
def place(fitted, tmp_path, monkeypatch):
    """A copy of it, as the working folder."""
    shutil.copytree(fitted, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setitem(stream.stream.__kwdefaults__, "size", 15)
    return tmp_path / "here"


def stamps() -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in Path("runs").rglob("*") if path.is_file()}


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_whole_answer_is_kept_and_said_in_one_line(place, capsys, question):
    line = QUESTIONS[question]
    assert call(*line, "--json") == 0
    told, before = json.loads(capsys.readouterr().out), stamps()
    assert call(*line) == 2
    assert "is there already; use --overwrite" in capsys.readouterr().err
    assert call(*line, "--resume") == 0
    out, err = capsys.readouterr()
    assert out == f"{told['files'][0]}: is whole and answers the same question about the same data and weights; kept as it is\n"
    assert err == ""
    assert call(*line, "--resume", "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert {**told, "kept": again["kept"]} == again
    assert stamps() == before


@pytest.mark.parametrize("question", QUESTIONS)
def test_another_answer_is_never_taken_for_this_one(place, capsys, question):
    line = QUESTIONS[question]
    assert call(*line) == 0
    before, name = stamps(), {"impute": "impute-x", "encode": "encode-x", "score": "score-x"}.get(question, question)
    file = f"runs/s/answers/{name}.nc"
    capsys.readouterr()
    assert call(*line, "--seed", "9", "--resume") == 2
    wanted = f"elbowroom: {file}: is another answer (seed is 0 there, 9 here); use --overwrite, or another --out\n"
    assert capsys.readouterr().err == wanted
    if "x.npy" in line:
        np.save("x.npy", 1 - np.load("x.npy"))
        assert call(*line, "--resume") == 2
        err = capsys.readouterr().err
        assert err.startswith(f"elbowroom: {file}: is another answer (")
        assert err.count("\n") == 1
    assert stamps() == before


@pytest.mark.usefixtures("place")
def test_what_does_not_say_what_it_answers_is_not_kept(capsys):
    line = QUESTIONS["encode"]
    assert call(*line, "--out", "a.csv") == 0
    shutil.copy("runs/s/split.npz", "b.npz")
    capsys.readouterr()
    for name in ("a.csv", "b.npz"):
        text = Path(name).read_bytes()
        assert call(*line, "--out", name, "--resume") == 2
        wanted = f"elbowroom: {name}: is there already, and only .nc says what it answers; use --overwrite, or another --out\n"
        assert capsys.readouterr().err == wanted
        assert Path(name).read_bytes() == text


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("impute", "explain")]


@pytest.mark.parametrize("question", ["encode", *SLOW])
def test_killed_at_every_rename_an_answer_is_completed(place, monkeypatch, question):
    line, real = [*QUESTIONS[question], "--resume"], Path.replace
    assert call(*line) == 0
    wanted = killing.contents(Path("runs/s"))
    number, computed = 0, []
    compute = stream._computed
    monkeypatch.setattr(stream, "_computed", lambda *given: computed.append(given[2]) or compute(*given))
    while True:
        shutil.rmtree("runs/s/answers")
        number, count = number + 1, 0

        def replace(self, target, last=number):
            nonlocal count
            count += 1
            if count == last:
                raise Killed
            return real(self, target)

        monkeypatch.setattr(Path, "replace", replace)
        try:
            call(*line)
        except Killed:
            pass
        else:
            break
        finally:
            monkeypatch.setattr(Path, "replace", real)
        there = len(list(Path("runs/s/answers").glob("*.parts/*.nc")))
        computed.clear()
        assert call(*line) == 0
        assert killing.contents(Path("runs/s")) == wanted
        if question == "encode":
            assert len(computed) == 3 - there  # what was there was not computed again
    assert number > 4


@pytest.mark.usefixtures("place")
def test_a_failed_overwrite_leaves_the_old_answer(monkeypatch, capsys):
    from elbowroom.queries.answer import Answer

    line = QUESTIONS["encode"]
    assert call(*line) == 0
    before = stamps()

    def full(self, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Answer, "save_figures", full)
    capsys.readouterr()
    assert call(*line, "--overwrite", "--seed", "4") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert {name: value for name, value in stamps().items() if ".parts" not in name} == before


@pytest.mark.usefixtures("place")
def test_of_two_processes_the_second_is_told(capsys):
    """Whatever writes a file or a folder: the lock of another process is respected, by name, and nothing is written."""
    shutil.copytree("runs/s", "runs/t")
    lines = {**QUESTIONS, "compare": ["compare", "runs/s", "runs/t", "--out", "c.csv"]}
    targets = {"encode": "encode-x", "score": "score-x", "impute": "impute-x"}
    Path("runs/s/answers").mkdir()
    for name, line in lines.items():
        target = Path("c.csv") if name == "compare" else Path(f"runs/s/answers/{targets.get(name, name)}.nc")
        lock = target.with_name(f".{target.name}.lock")
        handle = os.open(lock, os.O_RDWR | os.O_CREAT)
        fcntl.flock(handle, fcntl.LOCK_EX)
        os.write(handle, b"4242\n")
        before = listing(Path.cwd())
        for more in ([], ["--overwrite"], ["--resume"]) if name != "compare" else ([],):
            capsys.readouterr()
            assert call(*line, *more) == 2
            wanted = f"elbowroom: {target}: another elbowroom (process 4242) is writing this file; wait until it has ended, "
            assert capsys.readouterr().err == f"{wanted}or name another with --out\n"
        assert listing(Path.cwd()) == before
        os.close(handle)
        lock.unlink()
