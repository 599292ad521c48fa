"""The README's code runs, and what it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from elbowroom import Experiment

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


def test_the_python_way_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks(README, "python")
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "Audit of 3 data" in printed
    assert "log p(x) is exact" in printed


def test_the_spec_is_valid(tmp_path: Path) -> None:
    (text,) = blocks(README, "yaml")
    path = tmp_path / "digits.yaml"
    path.write_text(text, encoding="utf-8")
    experiment = Experiment.load(path, set=["guide.family=full_rank_normal"])
    assert experiment.spec.model.latent_dim == 2


@pytest.mark.parametrize("text", [README, CONTRIBUTING])
def test_every_linked_file_exists(text: str) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if not link.startswith("http"):
            assert (ROOT / link).exists(), link


def test_every_make_target_named_in_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make ([a-z][a-z-]*)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
