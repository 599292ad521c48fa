"""An audit that dies goes on where it was, and ends bit for bit as if nothing had happened."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from elbowroom.analysis.audit import auditor as audit_module
from elbowroom.analysis.audit import cost as pilot
from elbowroom.analysis.audit.auditor import Audit
from elbowroom.analysis.audit.cost import Cost
from elbowroom.analysis.audit.parts import Store
from elbowroom.cli import app as cli
from elbowroom.inference.posterior import Posterior
from elbowroom.inference.references.grid.grid import Grid
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.run import Run, fit
from elbowroom.spec import document

SPEC = {
    "data": {"name": "file", "path": "x.npy"},
    "model": {"latent_dim": 1, "likelihood": "bernoulli", "decoder": {"name": "mlp", "hidden": [5]}},
    "guide": {"encoder": {"name": "mlp", "hidden": [5]}},
    "fit": {"epochs": 2, "batch_size": 16, "device": "cpu"},
    "audit": {"draws": 200, "keep": 100, "references": ["grid"], "budget": "none"},  # so that blocks come in their order
}
called: list[tuple[int, int]] = []
die_at: list[int] = []


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with 12 data to audit, in blocks of 4."""
    home = tmp_path_factory.mktemp("fitted")
    x = np.random.default_rng(0).random((60, 6)) < np.random.default_rng(1).random((60, 1))
    np.save(home / "x.npy", x.astype(np.float32))
    (home / "s.yaml").write_text(document.write(SPEC))
    fit(home / "s.yaml", home / "run")
    return home / "run"


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch, fitted: Path, tmp_path: Path) -> Path:
    """Three blocks of four data; the grid counts its calls, and dies when it is told to. Returns where to write."""
    monkeypatch.setattr(audit_module, "ARRAY", 200 * 4)
    whole = Grid.__call__

    def grid(self: Grid, log_joint: LogJoint, *, keep: int, seed: int, until: float = math.inf) -> Posterior:
        called.append((seed, log_joint.n_obs))
        if len(called) in die_at:
            raise KeyboardInterrupt
        return whole(self, log_joint, keep=keep, seed=seed, until=until)

    monkeypatch.setattr(Grid, "__call__", grid)
    called.clear()
    die_at.clear()
    return tmp_path / "out"


def killed(run: Run, out: Path, at: int, **options) -> None:
    die_at[:] = [at]
    with pytest.raises(KeyboardInterrupt):
        run.audit(out=out, **options)
    die_at.clear()
    called.clear()


def same(one: Audit, other: Audit) -> None:
    assert one.table.identical(other.table)
    assert set(one.posteriors) == set(other.posteriors)
    for name, tree in one.trees.items():
        for group in tree.groups:  # their attributes hold the time at which they were made
            assert tree[group].to_dataset().equals(other.trees[name][group].to_dataset())


def test_it_goes_on_bit_for_bit(blocks: Path, fitted: Path) -> None:
    run = Run.load(fitted)
    undisturbed = run.audit(out=blocks.with_name("undisturbed"))
    assert [n for _, n in called] == [4, 4, 4]
    called.clear()
    killed(run, blocks, 3)
    parts = list((blocks / "parts").glob("*.pt"))
    assert len(parts) == 1 + 3 + 2  # the plan, the guide three times, the grid twice
    assert not (blocks / "audit.nc").exists()
    said: list[str] = []
    found = run.audit(out=blocks, resume=True, progress=said.append)
    assert len(called) == 1
    assert said[:3] == ["plan", "found for data 0..3 of 12", "found for data 4..7 of 12"]
    same(undisturbed, found)
    assert sorted(p.name for p in blocks.iterdir()) == ["audit.csv", "audit.nc", "diagnosis.nc", "latent.nc", "posteriors"]
    called.clear()
    same(Audit.load(blocks), run.audit(out=blocks, resume=True))
    assert called == [], "a whole audit is kept"


def test_without_resume_it_starts_anew(blocks: Path, fitted: Path) -> None:
    run = Run.load(fitted)
    killed(run, blocks, 3)
    run.audit(out=blocks)
    assert len(called) == 3


def test_a_damaged_part_is_computed_again_and_it_is_said(blocks: Path, fitted: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run.load(fitted)
    undisturbed = run.audit(out=blocks.with_name("undisturbed"))
    called.clear()
    killed(run, blocks, 3)
    for path in (blocks / "parts").glob("*.pt"):
        raw = path.read_bytes()
        path.write_bytes(raw[: len(raw) // 2])
    with caplog.at_level(logging.WARNING, "elbowroom"):
        found = run.audit(out=blocks, resume=True)
    assert caplog.text.count("this part is computed again") == 6
    assert len(called) == 3
    same(undisturbed, found)


@pytest.mark.slow
def test_a_part_in_anothers_name_is_not_used(tmp_path: Path, blocks: Path, fitted: Path) -> None:
    run = Run.load(fitted)
    killed(run, blocks, 3)
    parts = sorted((blocks / "parts").glob("*.pt"), key=lambda path: path.stat().st_size)
    for path in parts[:-1]:
        path.write_bytes(parts[-1].read_bytes())
    assert run.audit(out=blocks, resume=True).table["reference"].values.tolist() == ["grid"]
    assert len(called) == 3


@pytest.mark.parametrize(
    "change",
    [
        "audit.references=[{name: grid, tolerance: 1e-3}]",
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("audit.keep=104", "audit.draws=199")),
    ],
)
def test_parts_of_another_audit_are_not_used(blocks: Path, fitted: Path, change: str) -> None:
    killed(Run.load(fitted), blocks, 3)
    Run.load(fitted, set=[change]).audit(out=blocks, resume=True)
    assert len(called) == 3


@pytest.mark.slow
def test_parts_of_other_data_are_not_used(blocks: Path, fitted: Path) -> None:
    run = Run.load(fitted)
    killed(run, blocks, 3)
    run.audit(1 - np.array(run.data.x[:12]), out=blocks, resume=True)
    assert len(called) == 3


def test_the_plan_of_the_audit_that_died_stays(blocks: Path, fitted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timed again, `auto` might choose otherwise: half of the data would have other references."""
    run = Run.load(fitted, set=["audit.references=auto"])
    killed(run, blocks, 2)
    monkeypatch.setattr(pilot.Pilot, "reference", lambda self, method, before: Cost(0.0, 1e9 if method.name == "grid" else 1.0))
    found = run.audit(out=blocks, resume=True)
    assert found.table["reference"].values.tolist() == ["grid"]


@pytest.mark.slow
def test_what_a_budget_cut_short_is_not_kept(blocks: Path, fitted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.load(fitted)
    monkeypatch.setattr(pilot.Pilot, "reference", lambda self, method, before: Cost(0.0, 100.0))
    found = run.audit(out=blocks, budget=1.0)
    assert called == []
    assert all("budget of 1.0 s ended" in str(reason) for reason in found.table["reason"].values[:, 0])
    assert json.loads(found.table.attrs["audit"])["budget"] == "1s"
    run.audit(out=blocks, resume=True, budget=1.0)
    assert called == [], "the same budget: the same audit"
    monkeypatch.setattr(pilot.Pilot, "reference", lambda self, method, before: Cost(0.0, 1e-6))
    found = run.audit(out=blocks, resume=True)
    assert len(called) == 3, "without one there is more to do"
    assert (found.table["status"].values == "exact").all()


def test_a_store_never_follows_a_link(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.pt").write_text("x")
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / "parts").symlink_to(precious)
    Store(tmp_path / "audit", {})
    assert (precious / "thesis.pt").exists()
    assert not (tmp_path / "audit" / "parts").exists()


def test_a_pickle_is_never_run(blocks: Path, fitted: Path, tmp_path: Path) -> None:
    class Bad:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    run = Run.load(fitted)
    killed(run, blocks, 3)
    for path in (blocks / "parts").glob("*.pt"):
        torch.save({"key": path.stem, "posterior": Bad(), "comparison": None}, path)
    run.audit(out=blocks, resume=True)
    assert len(called) == 3
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_the_command_line_takes_budget_and_resume(fitted: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def call(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            cli.main(["audit", str(fitted), "--out", str(tmp_path / "cli"), *arguments])
        assert stop.value.code == 0
        return capsys.readouterr().out

    plan = json.loads(call("--budget", "1h", "--json"))["audit"]["plan"]
    assert plan["budget"] == 3600
    assert [r["name"] for r in plan["references"]] == ["grid"]
    assert "plan" not in json.loads(call("--budget", "1h", "--resume", "--json"))["audit"]
    assert "about" in call("--dry-run")
    assert json.loads(call("--dry-run", "--json"))["plan"]["data"] == 12
    assert "data audited" in call("--budget", "10m", "--resume")


KILLED = """
import sys
from elbowroom.analysis.audit import auditor
auditor.ARRAY = 200 * 2
from elbowroom.cli import main
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_process_goes_on(fitted: Path, tmp_path: Path) -> None:
    """Killed with -9 again and again, whenever another part has appeared."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(out: Path) -> subprocess.Popen[bytes]:
        words = ["audit", str(fitted), "--out", str(out), "--resume", "--set", "audit.references=importance"]
        return subprocess.Popen([sys.executable, "-c", KILLED, *words], env=environment, stdout=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    out, kills = tmp_path / "killed", 0
    for wanted in (3, 6, 9):
        process = start(out)
        while process.poll() is None and len(list(out.glob("parts/*.pt"))) < wanted:
            time.sleep(0.02)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kills == 3
    assert start(out).wait() == 0
    same(Audit.load(tmp_path / "whole"), Audit.load(out))
    assert not (out / "parts").exists()
