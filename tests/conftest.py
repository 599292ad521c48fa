"""Fixtures for every test: a fixed seed, a clean parameter store, and a guard against changed global state."""

from __future__ import annotations

import base64
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread per pytest-xdist worker
os.environ["MPLBACKEND"] = "Agg"

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
import xarray as xr
from matplotlib.figure import Figure
from support.command import SPEC

from elbowroom.analysis.audit import auditor as auditing
from elbowroom.analysis.audit.diagnosis import diagnose
from elbowroom.analysis.report import report as reports
from elbowroom.analysis.verdict import judgement, rules
from elbowroom.spec import document

torch.set_num_threads(1)


def _globals() -> dict[str, object]:
    return {
        "torch default dtype": torch.get_default_dtype(),
        "torch threads": torch.get_num_threads(),
        "torch grad mode": torch.is_grad_enabled(),
        "torch deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "pyro.poutine validation": pyro.poutine.is_validation_enabled(),
        "pyro validation": pyro.infer.util.is_validation_enabled(),
        "distribution validation": torch.distributions.Distribution._validate_args,
        "pyro handler stack": len(pyro.poutine.runtime._PYRO_STACK),
    }


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def _isolated() -> Iterator[None]:
    """Seed, clear the parameter store, and fail a test that leaves a torch or Pyro global changed."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries may still use the global generator
    pyro.clear_param_store()
    before = _globals()
    yield
    after = _globals()
    pyro.clear_param_store()
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    assert not changed, f"the test left global state changed: {changed}"


@pytest.fixture(autouse=True)
def _every_figure_is_drawn(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail a test in which a figure could not be drawn: a report does without it, and says so in a line alone."""
    yield
    lost = [record.getMessage() for record in caplog.get_records("call") if record.name == "elbowroom.figures"]
    assert not lost, lost


@pytest.fixture(scope="session", autouse=True)
def _undiagnosed() -> Iterator[None]:
    """Let audits judge by their gaps alone: the rest takes seconds each. Tests of it ask for `diagnosed`."""

    def judged(log_joint: object, table: xr.Dataset, *_: object, **__: object) -> xr.DataTree:
        verdicts = judgement.as_dataset(rules.judge(table))
        return xr.DataTree.from_dict({"/verdicts": verdicts, "/": xr.Dataset(attrs={"missing": ""})})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auditing, "find_out", judged)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_power_cut() -> Iterator[None]:
    """Leave written files to the system's caches: to wait for the disk takes a fifth of a small audit's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture
def diagnosed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let audits find out all that verdicts rest on."""
    monkeypatch.setattr(auditing, "find_out", diagnose)


PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="  # the smallest PNG
)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let figures be made but not painted, which takes half of a report's time: each file is one pixel."""
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).write_bytes(PIXEL))


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put an empty page in the place of the report, which takes two seconds and has tests of its own."""

    def empty(folder: Path) -> Path:
        (Path(folder) / "report.html").write_text("<html></html>\n")
        return Path(folder) / "report.html"

    monkeypatch.setattr(reports, "write_report", empty)


@pytest.fixture
def tidy_store() -> Iterator[None]:
    """Fail a test that leaves a parameter in Pyro's store."""
    yield
    assert not pyro.get_param_store().keys(), "the test left parameters in Pyro's store"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a spec and its data, as the working folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    x = (rng.random((40, 6)) < rng.random((40, 1))).astype(np.float32)
    np.save("x.npy", x)
    Path("s.yaml").write_text(document.write(SPEC))
    return tmp_path
