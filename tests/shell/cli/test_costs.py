"""Every whole number of the command line that sets a cost: as large as can be, it is one line, at once, or is answered."""

from __future__ import annotations

from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest

from elbowroom.cli.app import main
from elbowroom.cli.queries import QUESTIONS
from elbowroom.components.signatures import options
from elbowroom.queries.questions import Questions
from elbowroom.run import fit
from elbowroom.runs.costs import PLAIN
from elbowroom.spec import document

SPEC = {
    "data": {"name": "file", "path": "x.npy"},
    "model": {"latent_dim": 1, "likelihood": "gaussian", "decoder": {"name": "mlp", "hidden": [4]}},
    "guide": {"encoder": {"name": "mlp", "hidden": [4]}},
    "fit": {"epochs": 1, "device": "cpu"},
}
HUGE = 10**12
NO_COST = {"seed", "datum", "most", "simulated"}  # a row, or at most as many as there are
ROWS = {"explain": "", "integrate": "", "sample": "", "impute": "holes.npy"}


def whole_numbers() -> list[tuple[str, str]]:
    """Return (command, option) for every option of the questions that takes one whole number."""
    return [
        (question, option.name)
        for question in QUESTIONS
        for option in options(getattr(Questions, question), positional=True)
        if option.annotation in (int, int | None)
    ]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a run and rows with a hole."""
    folder = tmp_path_factory.mktemp("costs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        x = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
        np.save("x.npy", x)
        np.save("new.npy", x[:2])
        x[0, 1] = np.nan
        np.save("holes.npy", x[:1])
        Path("s.yaml").write_text(document.write(SPEC))
        fit("s.yaml", out="run")
    return folder


def test_every_whole_number_is_known():
    found = whole_numbers()
    assert len(found) >= 20
    assert {name for _, name in found} == {*PLAIN, "points", *NO_COST}


@pytest.mark.parametrize(("question", "name"), [one for one in whole_numbers() if one[1] not in NO_COST])
def test_a_cost_beyond_this_machine_is_one_line_with_the_largest_that_fits(question, name, home, monkeypatch):
    monkeypatch.chdir(home)
    option = f"--{name.replace('_', '-')}"
    err = StringIO()
    with redirect_stderr(err), redirect_stdout(StringIO()), pytest.raises(SystemExit) as stop:
        main([question, "run", *ROWS.get(question, "new.npy").split(), option, str(HUGE)])
    assert stop.value.code == 2, err.getvalue()
    assert err.getvalue().startswith(f"elbowroom: {name}: {HUGE:,} would take about ")
    assert err.getvalue().rstrip().endswith(" fit")
    assert err.getvalue().count("\n") == 1
