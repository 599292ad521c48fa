"""A library that is missing, or fails when it is imported, costs what is made with it, one line, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from support.report.run_folder import FIGURES, Page, write_run

from elbowroom import parts
from elbowroom.analysis.plots.drawing import NotDrawn, attempt, drawn
from elbowroom.errors import RunFolderError

RAISED = {
    "AttributeError": "AttributeError(\"module 'x' has no attribute 'core'\\nand more\")",
    "ImportError": "ImportError('libx.so: cannot open shared object file')",
    "OSError": "OSError('no such library')",
    "RuntimeError": "RuntimeError()",
}
WITH_SEABORN = {"gaps", "trust", "comparison", "latent_space", "plane"}
DISTRIBUTION = {"arviz_plots": "arviz-plots", "PIL": "pillow"}
LOST = {"arviz_plots": {"intervals"}, "seaborn": WITH_SEABORN, "matplotlib": FIGURES, "PIL": FIGURES}
"""What draws, and the figures of the report that are lost with it."""

CHOSEN = [("arviz_plots", "AttributeError"), ("seaborn", "ImportError"), ("matplotlib", "OSError"), ("PIL", "RuntimeError")]
EVERY = [(part, error) for part in LOST for error in RAISED if (part, error) not in CHOSEN]
NEEDED = (
    "torch",
    "pyro",
    "zuko",
    "sklearn",
    "scipy",
    "h5netcdf",
    "arviz_base",
    "xarray",
    "pandas",
    "rich",
    "yaml",
    "typer",
    "packaging",
)


def with_broken(folder: Path, part: str, error: str, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Call the command line where importing a library raises an error."""
    broken = folder / "broken" / part
    broken.mkdir(parents=True, exist_ok=True)
    (broken / "__init__.py").write_text(f"raise {RAISED[error]}\n")
    path = os.pathsep.join([str(broken.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    kept = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    call = [sys.executable, "-c", "from elbowroom.cli import main; main()", *command]
    return subprocess.run(call, cwd=folder, env=kept, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.parametrize(
    ("part", "error"), [*CHOSEN, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in EVERY)], ids=lambda one: one
)
def test_a_report_lacks_what_cannot_be_drawn(tmp_path: Path, part: str, error: str) -> None:
    folder = write_run(tmp_path / "run", n=12)
    done = with_broken(tmp_path, part, error, "report", str(folder), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["report"] == str(folder / "report.html")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"elbowroom: note: {folder}/report.html lacks the figure")
    distribution = DISTRIBUTION.get(part, part)
    assert f"{distribution} {metadata.version(distribution)} cannot be imported ({error}: " in done.stderr
    assert "mend it with: pip install " in done.stderr
    page = Page((folder / "report.html").read_text("utf-8"))
    assert {path.stem for path in (folder / "figures").glob("*")} == FIGURES - LOST[part]
    assert f"Not drawn: {distribution}" in page.text
    assert "First sentence." in page.text
    assert page.open == []


@pytest.mark.parametrize(
    ("part", "error"),
    [("arviz_plots", "AttributeError"), pytest.param("seaborn", "ImportError", marks=pytest.mark.slow)],
)
def test_a_run_keeps_its_fit_and_audit(here: Path, part: str, error: str) -> None:
    done = with_broken(here, part, error, "run", "s.yaml", "--set", "audit.diagnose=false")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    (note,) = [line for line in done.stderr.splitlines() if line.startswith("elbowroom: note: ")]
    assert "report.html lacks the figure" in note
    assert {"weights.pt", "audit.nc", "report.html"} <= {path.name for path in (here / "runs" / "s").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("error", RAISED)
@pytest.mark.parametrize("part", NEEDED)
def test_without_what_is_needed_a_run_ends_in_one_line_before_it_starts(here: Path, part: str, error: str) -> None:
    done = with_broken(here, part, error, "run", "s.yaml")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "cannot be imported" in done.stderr
    assert not (here / "runs").exists()


@pytest.mark.slow
def test_an_audit_is_kept_where_no_page_can_be_written(here: Path) -> None:
    done = with_broken(here, "jinja2", "ImportError", "run", "s.yaml", "--set", "audit.diagnose=false")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("elbowroom: jinja2 ")
    assert (here / "runs" / "s" / "audit.nc").is_file()


@pytest.mark.parametrize("error", ["ImportError", pytest.param("AttributeError", marks=pytest.mark.slow)])
def test_parquet_without_pyarrow_is_one_line(here: Path, error: str) -> None:
    (here / "x.parquet").write_bytes(b"PAR1")
    done = with_broken(here, "pyarrow", error, "run", "s.yaml", "--set", "data.path=x.parquet")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert "pyarrow" in done.stderr
    assert "pip install" in done.stderr
    assert not (here / "runs").exists()


@pytest.mark.slow
def test_a_backend_of_a_notebook_is_not_needed(tmp_path: Path) -> None:
    """A command called in a notebook inherits the notebook's MPLBACKEND, which is not installed everywhere."""
    folder = write_run(tmp_path / "run", n=12)
    done = with_broken(tmp_path, "nothing", "OSError", "report", str(folder), MPLBACKEND="module://matplotlib_inline.nowhere")
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.stem for path in (folder / "figures").glob("*")} == FIGURES


@pytest.mark.slow
@pytest.mark.parametrize("part", ["matplotlib", "seaborn"])
def test_an_answer_is_kept_without_its_figures(here: Path, part: str) -> None:
    assert with_broken(here, "nothing", "OSError", "fit", "s.yaml").returncode == 0
    for question in (("explain",), ("sample",), ("encode", "x.npy")):
        done = with_broken(here, part, "AttributeError", question[0], "runs/s", *question[1:])
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert list((here / "runs" / "s" / "answers").glob(f"{question[0]}*.nc"))


def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **files: str) -> BaseException:
    """Import the first of some modules and return its error."""
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Exception) as caught:
        __import__(next(iter(files)))
    return caught.value


def test_the_last_library_that_was_being_imported_is_to_blame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = failing(tmp_path, monkeypatch, outer_one="import inner_one", inner_one="1 / 0")
    assert parts.culprit(error) == "inner_one"
    assert parts.trouble(error) == (
        "inner-one cannot be imported (ZeroDivisionError: division by zero); "
        "mend it with: pip install --upgrade --force-reinstall 'inner-one'"
    )


def test_what_is_not_there_is_to_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = failing(tmp_path, monkeypatch, outer_two="import not_anywhere")
    assert parts.trouble(error) == "not-anywhere is not installed; install it with: pip install 'not-anywhere'"


def test_a_version_that_elbowroom_does_not_take_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    true = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: "1.9" if name == "seaborn" else "0.1" if name == "zuko" else true(name)
    )
    told = parts.trouble(ImportError("no", name="seaborn"))
    assert told == "seaborn 1.9 cannot be imported (ImportError: no); mend it with: pip install 'zuko>=1.3'"


def test_other_errors_are_no_ones_fault() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        _ = 1 / 0
    assert parts.trouble(caught.value) is None
    assert parts.trouble(ImportError("cannot import name", name="elbowroom.run")) is None


def test_errors_in_drawing_cost_the_figure_and_those_of_the_user_go_on() -> None:
    lost = drawn("gaps", "audit.gaps", None, None)
    assert isinstance(lost, NotDrawn)
    assert lost.reason.startswith("Not drawn: drawing failed (")

    def refuse() -> None:
        raise RunFolderError("no")

    with pytest.raises(RunFolderError):
        attempt("gaps", refuse)
