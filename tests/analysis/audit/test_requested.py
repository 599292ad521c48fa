"""`references=` in Python and `--references` on the command line: one parser, and no text that silently means `auto`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import elbowroom as er
from elbowroom.analysis.audit.requested import ALONE, KNOWN, requested
from elbowroom.cli import main
from elbowroom.errors import UserError
from elbowroom.inference.references.grid.grid import Grid
from elbowroom.inference.references.importance.importance import ImportanceSampling

GRID = Grid(tolerance=1e-3)
SAME = [
    (["auto", " auto ", ["auto"], ("auto",)], "auto"),
    (["none", ["none"], [], ()], []),
    (["grid", ["grid"], " grid "], ["grid"]),
    (["grid,hmc", "grid, hmc", ["grid", "hmc"], ("grid", "hmc")], ["grid", "hmc"]),
    ([GRID, [GRID]], [GRID]),
    ([[GRID, "importance"]], [GRID, "importance"]),
]
WRONG = [
    ("banana", "unknown reference 'banana'; allowed: ais, auto, closed_form, enumeration, grid, hmc, importance, none"),
    ("gird", "unknown reference 'gird'; did you mean 'grid'?"),
    ("Auto", "unknown reference 'Auto'; did you mean 'auto'?"),
    (["grid", "importence"], "unknown reference 'importence'; did you mean 'importance'?"),
    ("", "unknown reference ''; allowed: "),
    ("grid,", "unknown reference ''; allowed: "),
    ("grid hmc", "unknown reference 'grid hmc'; did you mean 'grid'?"),
    ("grid,none", "none stands alone, got grid, none"),
    (["auto", "hmc"], "auto stands alone, got auto, hmc"),
    ("grid,grid", "grid is given twice"),
    (["grid", GRID], "grid is given twice"),
    (Grid, "auto, none, names or Reference objects are allowed, got the class Grid; write Grid()"),
    (None, "auto, none, names or Reference objects are allowed, got None"),
    ([3], "auto, none, names or Reference objects are allowed, got 3"),
]


def model(y: torch.Tensor) -> None:
    with pyro.plate("data", len(y)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
        pyro.sample("y", dist.Poisson(rate), obs=y)


def guide(y: torch.Tensor) -> None:
    with pyro.plate("data", len(y)):
        pyro.sample("rate", dist.LogNormal((y + 2).log() - 0.6, 0.5))


@pytest.mark.parametrize(("spellings", "expected"), SAME)
def test_spellings_of_the_same(spellings: list[Any], expected: Any) -> None:
    for spelling in spellings:
        assert requested(spelling) == expected


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_what_is_wrong_is_one_line(wrong: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        er.audit(model, guide, torch.tensor([0.0, 3.0]), references=wrong, diagnose=False)
    assert str(error.value).startswith(f"references: {message}")
    assert "\n" not in str(error.value)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=12))
def test_no_other_text_means_anything(text: str) -> None:
    if {name.strip() for name in text.split(",")} <= {*KNOWN, *ALONE}:
        return
    with pytest.raises(UserError, match=r"^references: unknown reference "):
        requested(text)


@pytest.mark.parametrize(
    ("references", "ran"),
    [("importance", ["importance"]), ("grid,importance", ["grid", "importance"]), ("none", []), (GRID, ["grid"])],
)
def test_an_audit_runs_what_was_named(references: Any, ran: list[str]) -> None:
    found = er.audit(model, guide, torch.tensor([0.0, 3.0]), references=references, diagnose=False)
    assert found.table["reference"].values.tolist() == ran
    assert list(found.posteriors) == ["guide", *ran]


# -- questions to a run --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> er.Run:
    chosen = ["fit.epochs=1", "data.n=200", "fit.device=cpu"]
    experiment = er.Experiment.load(Path(er.__file__).parent / "experiments" / "linear_gaussian.yaml", set=chosen)
    return er.fit(experiment, out=tmp_path_factory.mktemp("requested") / "run")


@pytest.fixture(scope="module")
def rows(run: er.Run) -> np.ndarray:
    return np.asarray(run.data.x[:4])


def test_none_in_python_is_none_of_the_command_line(run: er.Run, rows: np.ndarray) -> None:
    none, empty = run.encode(rows, references="none"), run.encode(rows, references=[])
    assert none.dataset.drop_attrs().identical(empty.dataset.drop_attrs())
    assert set(none["source"]) <= {"guide, importance-resampled", "guide"}
    by_name, listed = (run.encode(rows, references=given) for given in ("importance", [ImportanceSampling()]))
    assert by_name.dataset.drop_attrs().identical(listed.dataset.drop_attrs())
    assert set(by_name["source"]) == {"importance"}


@pytest.mark.parametrize("question", ["encode", "score", "impute", "sample", "explain", "integrate"])
def test_every_question_names_the_unknown(question: str, run: er.Run, capsys: pytest.CaptureFixture[str]) -> None:
    sentence = "references: unknown reference 'gird'; did you mean 'grid'?"
    for wrong in ("gird", ["gird"]):
        with pytest.raises(UserError) as error:
            getattr(run, question)(references=wrong)
        assert str(error.value) == sentence
    with pytest.raises(SystemExit) as ended:
        main([question, str(run.path), "--references", "gird"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.strip().endswith(sentence)
