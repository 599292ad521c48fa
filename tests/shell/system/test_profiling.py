"""`--profile`: stages nest and add up, unattributed time is shown, results are the same, nothing else is printed or left."""

from __future__ import annotations

import csv
import json
import pstats
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from support.command import call, listing

import elbowroom as er
from elbowroom.cli.app import app
from elbowroom.errors import UserError
from elbowroom.system import stages
from elbowroom.system.profiling import Profile
from elbowroom.system.stages import UNNAMED, Stages, stage

COMMANDS = ["run", "fit", "audit", "report", "improve", "encode", "score", "impute", "integrate", "sample", "explain"]


class Clock:
    """A clock that goes on when it is told to; a processor of which a half is busy; memory that is told."""

    def __init__(self) -> None:
        self.now, self.held = 0.0, 100

    def tree(self) -> Stages:
        return Stages("all", lambda: self.now, lambda: self.now / 2, lambda: self.held)


@pytest.fixture
def clock():
    """A fake clock, and a profile on it that is on."""
    clock = Clock()
    tree = clock.tree()
    token = stages.switch(tree)
    yield clock, tree
    stages.reset(token)


def flat(node: stages.Node) -> list[tuple[int, str, int, float]]:
    return [(depth, one.name, one.calls, one.wall) for depth, one in node.walk()]


def test_stages_nest_and_what_is_in_none_of_them_is_shown(clock):
    clock, tree = clock
    for _ in range(2):
        with stage("fit"):
            clock.now += 1
            with stage("validation"):
                clock.now += 2
    clock.now += 4
    with stage("audit"):
        clock.now += 8
    assert flat(tree.close()) == [
        (0, "all", 1, 18.0),
        (1, "fit", 2, 6.0),
        (2, "validation", 2, 4.0),
        (2, UNNAMED, 0, 2.0),
        (1, "audit", 1, 8.0),
        (1, UNNAMED, 0, 4.0),
    ]
    rows = {row["stage"]: row for row in Profile(tree.root).rows()}
    assert rows["all / fit / validation"]["share"] == pytest.approx(4 / 18, abs=1e-6)
    assert rows["all / fit"]["cpu_per_wall"] == 0.5
    assert rows[f"all / {UNNAMED}"]["wall_seconds"] == 4.0
    printed = str(Profile(tree.root)).splitlines()
    assert sum(UNNAMED in line for line in printed) == 2


def test_a_decorated_function_may_call_itself(clock):
    clock, tree = clock

    @stage("down")
    def down(n: int) -> int:
        clock.now += 1
        return n and down(n - 1)

    assert down(2) == 0
    assert [(name, calls, wall) for _, name, calls, wall in flat(tree.close()) if name == "down"] == [
        ("down", 1, 3.0),
        ("down", 1, 2.0),
        ("down", 1, 1.0),
    ]


def test_an_exception_ends_its_stages(clock):
    clock, tree = clock

    def fail() -> None:
        with stage("fit"), stage("step"):
            clock.now += 3
            raise ValueError

    pytest.raises(ValueError, fail)
    clock.now += 1
    with stage("audit"):
        clock.now += 1
    assert [row[1:] for row in flat(tree.close()) if row[2]] == [
        ("all", 1, 5.0),
        ("fit", 1, 3.0),
        ("step", 1, 3.0),
        ("audit", 1, 1.0),
    ]


def test_a_stage_that_is_left_late_counts_for_nothing_else(clock):
    clock, tree = clock

    def work():
        with stage("rows"):
            yield clock.now

    with stage("answer"):
        rows = work()
        next(rows)
        clock.now += 2
    clock.now += 5
    rows.close()  # its stage ended with the one around it
    with stage("files"):
        clock.now += 1
    assert {node.name: node.wall for _, node in tree.close().walk() if node.calls} == {
        "all": 8.0,
        "answer": 2.0,
        "rows": 2.0,
        "files": 1.0,
    }


def test_memory_is_the_stage_s_that_raised_it(clock):
    clock, tree = clock
    with stage("fit"):
        clock.now += 1
    with stage("audit"):
        clock.now, clock.held = clock.now + 1, 700
    root = tree.close()
    assert {node.name: (node.memory, node.raised) for node in root.children.values()} == {"fit": (100, 0), "audit": (700, 600)}
    assert (root.memory, root.raised) == (700, 600)


def test_nothing_is_recorded_without_a_profile_nor_by_other_threads():
    import threading

    with stage("nothing"):
        assert stages.current() is None
    with er.profile() as profile:
        thread = threading.Thread(target=lambda: stage("elsewhere").__enter__())
        thread.start()
        thread.join()
    assert profile.root.children == {}
    assert stages.current() is None
    assert 0 < profile.root.memory < 2**50


def test_a_gpu_is_waited_for_but_not_by_what_comes_often(clock, monkeypatch):
    clock, tree = clock
    waits = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(tree._open[-1].node.name))
    with stage("fit"):
        for _ in range(3):
            with stage("training step", often=True):
                clock.now += 1
    assert waits == ["all", "fit"]
    with monkeypatch.context() as patch:  # a graph that is being captured must not be waited for
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with stage("fit"):
            pass
    assert waits == ["all", "fit"]


def test_short_stages_share_a_line_and_add_up(clock):
    clock, tree = clock
    for n in range(30):
        with stage(f"figure {n}"):
            clock.now += 0.4
    with stage("fit"):
        clock.now += 88
    tree.close()
    lines = str(Profile(tree.root)).splitlines()
    assert any(line.split() == ["(30", "shorter)", "30", "12.00", "12.0%", "0.5", "100", "bytes"] for line in lines)
    assert not any("figure" in line for line in lines)
    assert len(Profile(tree.root).rows()) == 33


def test_profiles_do_not_nest_and_need_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="this is a file; name a folder for the profile"), er.profile(tmp_path / "file"):
        pass
    with er.profile(), pytest.raises(UserError, match="one is on already"), er.profile():
        pass
    assert stages.current() is None


def test_an_early_end_is_written_and_said(tmp_path):
    with pytest.raises(KeyboardInterrupt), er.profile(tmp_path / "p", functions=True), stage("fit"):
        raise KeyboardInterrupt
    assert "ended early by KeyboardInterrupt" in (tmp_path / "p/stages.txt").read_text()
    assert listing(tmp_path / "p") == {"stages.txt", "stages.csv", "functions.txt", "profile.prof"}


def test_functions_and_operators(tmp_path):
    x, seen = torch.ones(20, 20), []
    with er.profile(tmp_path, functions=True) as profile:
        for _ in range(6):
            with stage("training step", often=True):
                seen.append(torch.linalg.det(x.cosh()))
    assert len(seen) == 6
    assert list(profile.files) == ["stages.txt", "stages.csv", "functions.txt", "operators.txt", "profile.prof"]
    assert "slows Python" in (tmp_path / "functions.txt").read_text()
    assert pstats.Stats(str(tmp_path / "profile.prof")).total_calls > 0
    operators = (tmp_path / "operators.txt").read_text()
    assert operators.startswith("== training step: call 4 ==")
    cosh = next(line for line in operators.splitlines() if "aten::cosh" in line)
    assert cosh.split()[-1] == "1"  # one call of six was looked at
    with er.profile(tmp_path) as profile:  # those of an earlier profile go
        pass
    assert listing(tmp_path) == {"stages.txt", "stages.csv"}


def names(command: str) -> set[str]:
    found = typer.main.get_command(app)
    return {option for parameter in found.commands[command].params for option in parameter.opts}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_it(command, capsys):
    assert {"--profile", "--profile-functions"} <= names(command)
    assert call(command, "--help") == 0
    assert "--profile " in capsys.readouterr().out


def test_run_with_it_and_without_it(here, capsys):
    assert call("fit", "s.yaml", "--out", "plain") == 0
    assert call("fit", "s.yaml", "--out", "watched", "--profile") == 0
    out, err = capsys.readouterr()
    assert "elbowroom fit: " in err
    assert "elbowroom fit: " not in out
    assert "wrote watched/profile/fit/ (stages.txt, stages.csv)" in err
    weights = [torch.load(Path(name) / "weights.pt", weights_only=True) for name in ("plain", "watched")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    with Path("watched/profile/fit/stages.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert rows[0]["stage"] == "elbowroom fit"
    assert "elbowroom fit / fit" in [row["stage"] for row in rows]
    first = [float(row["wall_seconds"]) for row in rows if row["depth"] == "1"]
    assert sum(first) == pytest.approx(float(rows[0]["wall_seconds"]), rel=1e-3)

    # into a folder that exists, with JSON alone on stdout; the same audit
    assert call("audit", "watched", "--profile", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["run"] == "watched"
    assert "grid" in err
    assert call("audit", "plain", "--json") == 0
    capsys.readouterr()
    tables = [er.Audit.load(name).table for name in ("plain", "watched")]
    np.testing.assert_array_equal(tables[0]["gap_total"].values, tables[1]["gap_total"].values)
    assert {path.parent.name for path in Path("watched/profile").rglob("stages.csv")} == {"fit", "audit"}
    assert call("fit", "s.yaml", "--out", "watched", "--resume", "--profile") == 0

    capsys.readouterr()

    # a question: beside what it writes
    assert call("encode", "watched", "--out", "elsewhere/e.nc", "--references", "none", "--profile", "--json") == 0
    json.loads(capsys.readouterr().out)
    assert Path("elsewhere/profile/encode/stages.csv").is_file()
    assert call("encode", "watched", "--references", "none", "--profile") == 0
    assert Path("watched/profile/encode/stages.csv").is_file()


def test_a_dry_run_and_bad_input_write_no_profile(here, capsys):
    before = listing(here)
    assert call("run", "s.yaml", "--dry-run", "--profile") == 0
    assert "elbowroom run: " in capsys.readouterr().err
    assert call("run", "s.yaml", "--profile", "--set", "fit.epochs=0") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert call("fit", "missing.yaml", "--profile-functions") == 2
    assert listing(here) == before
    assert stages.current() is None
