"""The package as users get it: a wheel built from the sdist, installed outside the repository, and used there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
ANYWHERE = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "node_modules")


def left_out(folder: str, names: list[str]) -> set[str]:
    """Leave out what is made, and the run folders at the root (`src/elbowroom/runs` is code)."""
    return ANYWHERE(folder, names) | ({"runs"} if Path(folder) == ROOT else set())


def call(*command: str | Path, cwd: Path, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV_"))}
    found = subprocess.run(
        list(map(str, command)), cwd=cwd, env=kept | environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, f"{command}\n{found.stdout[-3000:]}\n{found.stderr[-3000:]}"
    return found.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build sdist -> wheel from a copy, so that nothing stale gets in and nothing is left behind."""
    source = tmp_path_factory.mktemp("source") / "elbowroom"
    shutil.copytree(ROOT, source, symlinks=True, ignore=left_out)
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", source / "dist", cwd=source)
    (made,) = (source / "dist").glob("*.whl")
    assert list((source / "dist").glob("*.tar.gz"))
    return made


@pytest.mark.slow
def test_the_wheel_holds_what_is_not_python(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert "elbowroom/py.typed" in inside
    for folder, here in (("analysis/report/templates", "analysis/report/templates"), ("experiments", "experiments")):
        files = {f"elbowroom/{folder}/{path.name}" for path in (ROOT / here).iterdir() if path.is_file()}
        assert files
        assert files <= inside
    modules = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src" / "elbowroom").rglob("*.py")}  # links not followed
    for name in ("models", "inference", "analysis"):
        modules |= {f"elbowroom/{path.relative_to(ROOT)}" for path in (ROOT / name).rglob("*.py")}
    assert {name for name in inside if name.endswith(".py") and "/experiments/" not in name} == modules
    assert not any(name.startswith(("tests", "benchmarks", "elbowroom/tests")) for name in inside)


@pytest.mark.slow
def test_the_wheel_works_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    call(sys.executable, "-m", "venv", "--without-pip", "fresh", cwd=tmp_path)
    python = tmp_path / "fresh" / "bin" / "python"
    install = ("install", "--quiet", "--no-deps", "--no-index", "--no-warn-script-location", wheel)
    call(sys.executable, "-m", "pip", "--python", python, *install, cwd=tmp_path)
    (packages,) = (tmp_path / "fresh" / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")  # torch and the rest, not elbowroom
    where = call(python, "-c", "import elbowroom.inference.references.grid.grid as m; print(m.__file__)", cwd=tmp_path)
    assert where.startswith(str(packages))
    elbowroom, work = tmp_path / "fresh" / "bin" / "elbowroom", tmp_path / "work"
    work.mkdir()
    assert call(elbowroom, "spec", "init", cwd=work).split() == sorted(p.stem for p in (ROOT / "experiments").glob("*.yaml"))
    call(elbowroom, "spec", "init", "digits", cwd=work)
    tiny = ["fit.epochs=1", "fit.device=cpu", "audit.observations=8", "audit.draws=200", "audit.keep=100"]
    changes = [word for change in tiny for word in ("--set", change)]
    said = call(elbowroom, "run", "digits.yaml", *changes, cwd=work, OMP_NUM_THREADS="1", MPLBACKEND="Agg")
    assert "report.html" in said
    made = {path.name for path in (work / "runs" / "digits").iterdir()}
    assert {"spec.yaml", "weights.pt", "audit.nc", "audit.csv", "report.html"} <= made
    assert not (work / "runs" / "digits" / "spec.yaml").read_text().count(str(ROOT))
