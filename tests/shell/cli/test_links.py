"""A link in a run folder is never followed: what it leads to stays as it is, and the command says so in one line."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.command import SPEC, call

from elbowroom.cli.app import main
from elbowroom.spec import document

FAST = ["--references", "none", "--draws", "100"]
WRITING = [
    ["fit", "s.yaml", "--out", "r", "--resume"],
    ["audit", "r"],
    ["audit", "r", "--resume"],
    ["report", "r"],
    ["encode", "r", *FAST],
    ["audit", "r", "--profile"],
]
OTHERS = [
    ["fit", "s.yaml", "--out", "r", "--overwrite"],
    ["run", "s.yaml", "--out", "r", "--resume"],
    ["audit", "r", "--data", "x.npy"],
    ["score", "r", "x.npy", "--calibration", "x.npy", *FAST],
    ["impute", "r", "--hide", "20%", *FAST],
    ["sample", "r", "--no-test"],
    ["explain", "r", "--draws", "50"],
    ["encode", "r", "--overwrite", *FAST],
]
READING = [["encode", "r", "--out", "e.nc", *FAST], ["compare", "r", "r2"], ["improve", "r", "--out", "i", "--dry-run"]]
INSIDE = ["posteriors/guide.nc", "audits/x", "answers/encode.nc.parts", "profile/audit"]


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """A folder with everything that commands write into a run folder."""
    folder = tmp_path_factory.mktemp("audited")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        rng = np.random.default_rng(0)
        np.save("x.npy", (rng.random((40, 6)) < rng.random((40, 1))).astype(np.float32))
        Path("s.yaml").write_text(document.write(SPEC))
        lines = ["run s.yaml --out r", "audit r --data x.npy", "encode r", "audit r --profile --resume"]
        for line in lines:
            with pytest.raises(SystemExit) as stop:
                main(line.split())
            assert stop.value.code == 0, line
        for name in ("parts", "answers/encode.nc.parts"):
            Path("r", name).mkdir()
            Path("r", name, "one.nc").write_text("kept")
        shutil.copytree("r", "r2")
    return folder


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "r").iterdir())


def state(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def linked(audited: Path, tmp_path: Path, name: str, lines: list[list[str]], capsys, *, refused: bool) -> None:
    """Replace an entry by a link to a copy with a sentinel outside, and run commands."""
    for line in lines:
        here, outside = tmp_path / "here", tmp_path / "outside"
        shutil.rmtree(here, ignore_errors=True)
        shutil.rmtree(outside, ignore_errors=True)
        shutil.copytree(audited, here)
        outside.mkdir()
        os.chdir(here)
        entry, target = Path("r", name), outside / Path(name).name
        entry.rename(target)
        entry.symlink_to(target)
        if target.is_dir():
            for sentinel in ("mine.nc", "mine.csv", ".mine.4194999.tmp.nc", "mine.png", "stages.csv"):
                (target / sentinel).write_text("mine")
        theirs, ours = state(outside), {k: v for k, v in state(here).items() if "i/" not in k}
        capsys.readouterr()
        code = call(*line)
        err = capsys.readouterr().err
        assert state(outside) == theirs, line
        if refused:
            assert code == 2, line
            assert err.count("\n") == 1, (line, err)
            assert f"elbowroom: r/{name}: is a link (to {target})" in err, (line, err)
            assert state(here) == ours, line


NAMES = [
    *("spec.yaml", "split.npz", "weights.pt", "checkpoint.pt", "history.csv", "report.html", "figures", "posteriors"),
    *("audit.nc", "audit.csv", "latent.nc", "parts", "answers", "audits", "profile"),
]


@pytest.mark.usefixtures("no_figures", "no_report")
@pytest.mark.parametrize("name", ["posteriors", "answers", "parts", "weights.pt", *INSIDE])
def test_a_link_in_a_run_folder_is_not_followed(audited, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    linked(audited, tmp_path, name, [["audit", "r"], ["encode", "r", "--resume", *FAST]], capsys, refused=True)


@pytest.mark.slow
@pytest.mark.usefixtures("no_figures", "no_report")
@pytest.mark.parametrize("name", [*NAMES, *INSIDE])
def test_no_command_follows_a_link(audited, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert {*entries(audited)} <= {*NAMES, "figures", "precision.json", "diagnosis.nc"}
    linked(audited, tmp_path, name, [*WRITING, *OTHERS], capsys, refused=True)
    linked(audited, tmp_path, name, READING, capsys, refused=False)


@pytest.mark.usefixtures("no_figures", "no_report")
def test_the_parts_of_an_answer_are_no_link(audited, tmp_path, capsys, monkeypatch):
    shutil.copytree(audited, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine.nc").write_text("mine")
    Path("e.nc.parts").symlink_to(outside)
    for more in ([], ["--resume"]):
        capsys.readouterr()
        assert call("encode", "r", "--out", "e.nc", *FAST, *more) == 2
        assert capsys.readouterr().err.startswith(f"elbowroom: e.nc.parts: is a link (to {outside})")
        assert state(outside) == {str(outside / "mine.nc"): b"mine"}
    assert not Path("e.nc").exists()
