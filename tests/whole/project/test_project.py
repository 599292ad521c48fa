"""Packaging, and tools that must be seen to look."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_package_list_is_the_folders() -> None:
    setuptools = PROJECT["tool"]["setuptools"]
    folders = {"elbowroom": "src/elbowroom"}
    for top, base in (
        ("models", ROOT),
        ("inference", ROOT),
        ("analysis", ROOT),
        ("experiments", ROOT),
        ("", ROOT / "src/elbowroom"),
    ):
        for init in (base / top).rglob("__init__.py"):
            folder = init.parent.relative_to(base)
            folders[".".join(("elbowroom", *folder.parts))] = str(init.parent.relative_to(ROOT))
    assert setuptools["package-dir"] == folders
    assert sorted(setuptools["packages"]) == sorted(folders)


def test_domain_folders_are_linked_for_checkers_and_editors() -> None:
    for name in ("models", "inference", "analysis", "experiments"):
        link = ROOT / "src" / "elbowroom" / name
        assert link.is_symlink()
        assert link.resolve() == ROOT / name


@pytest.mark.slow
def test_the_type_checker_looks_into_the_domain_folders(tmp_path: Path) -> None:
    """A planted error must be found, or the checker checks nothing."""
    planted = tmp_path / "planted.py"
    planted.write_text(
        "from elbowroom.models.linear_gaussian import LinearGaussian as LG\ndef wrong(m: LG) -> str:\n    return m.W\n",
        encoding="utf-8",
    )
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        str(ROOT / "pyproject.toml"),
        str(planted),
    ]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert 'Incompatible return value type (got "Tensor", expected "str")' in found.stdout


def test_the_linter_forbids_bare_imports_of_the_domain_folders(tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text("import models\n\nprint(models)\n", encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--config",
        str(ROOT / "pyproject.toml"),
        "--select",
        "TID251",
        str(planted),
    ]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "a bare `models` makes a second copy" in found.stdout


def test_requirements_are_pinned_by_the_constraints() -> None:
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    for name in ("torch", "pyro-ppl", "numpy", "xarray", "matplotlib", "arviz-base"):
        assert name in pinned


def test_the_picture_of_the_layers_is_that_of_the_contracts() -> None:
    """`make docs/images/architecture.svg` brings it up to date."""
    spec = importlib.util.spec_from_file_location("architecture", ROOT / "docs" / "architecture.py")
    assert spec is not None
    assert spec.loader is not None
    architecture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(architecture)
    assert architecture.PICTURE.read_text(encoding="utf-8") == architecture.draw()


def test_every_folder_has_a_contract_in_which_every_file_stands() -> None:
    layered = [c for c in PROJECT["tool"]["importlinter"]["contracts"] if c["type"] == "layers"]
    folders = {name for name in PROJECT["tool"]["setuptools"]["packages"] if name != "elbowroom.experiments"}
    assert {c["containers"][0] for c in layered} == folders
    assert all(c["exhaustive"] for c in layered)
    assert not any("type_checking" in key and value for key, value in PROJECT["tool"]["importlinter"].items())


TOPS = ("models", "inference", "analysis", "experiments", "src", "tests")


def test_no_file_is_long() -> None:
    """Whoever opens a file reads it to its end: 400 lines of the program, 500 of a test."""
    files = [path for top in TOPS for path in (ROOT / top).rglob("*.py")]  # links are not followed
    assert len(files) > 250
    lines = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert not {str(path): n for path, n in lines.items() if n > (500 if path.parts[0] == "tests" else 400)}


def test_no_folder_is_full() -> None:
    """A folder is taken in at one glance: at most 11 entries, beside the `__init__.py` that every package has.

    The four domains are entries of the root: their links in `src/elbowroom` do not count, and it has 15 to itself.
    """
    entries: Counter[Path] = Counter()
    for top in TOPS:
        for path in (ROOT / top).rglob("*"):
            if (
                not {"__pycache__", "elbowroom.egg-info"} & set(path.parts)
                and path.name != "__init__.py"
                and not path.is_symlink()
            ):
                entries[path.parent.relative_to(ROOT)] += 1
    assert len(entries) > 50
    assert not {str(path): n for path, n in entries.items() if n > (15 if path == Path("src/elbowroom") else 11)}
