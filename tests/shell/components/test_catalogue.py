"""The list of components: what a newcomer reads in a terminal of 80 columns, and docs/components.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from elbowroom.cli.app import main
from elbowroom.components import registry
from elbowroom.conformance import catalogue

ROOT = Path(__file__).parents[3]
ALL = [(kind, name) for kind in registry.kinds() for name in registry.own_names(kind)]


@pytest.fixture
def printed(capsys, monkeypatch):
    """Return what `elbowroom components ...` prints in 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["components", *arguments])
        assert stop.value.code == 0
        return capsys.readouterr().out

    return call


def test_the_committed_page_is_the_generated_one():
    page = (ROOT / "docs" / "components.md").read_text(encoding="utf-8")
    assert page == catalogue.markdown(), "run `make docs/components.md`"


def test_the_page_holds_every_component_and_option():
    page = catalogue.markdown()
    for kind, name in ALL:
        section = page.split(f"### {kind}: {name}\n")[1].split("\n##")[0]
        for option in registry.component(kind, name).options:
            assert f"| `{option.name}` | " in section
    for line in page.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 5, line
    for anchor in re.findall(r"\]\(#(\w+)\)", page):
        assert f"\n## {anchor}\n" in page


def test_the_list_fits_80_columns_and_names_everything(printed):
    lines = printed().splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) < 280
    for _, name in ALL:
        assert any(line.startswith(f"  {name}") for line in lines), name
    assert "in a spec: model.prior" in [line.strip() for line in lines]


def test_a_kind_shows_options_and_partners(printed):
    out = printed("prior")
    assert max(map(len, out.splitlines())) <= 80
    text = " ".join(out.split())
    assert "e.g. prior: {name: student_t, df: 3}" in text
    assert "z lives on: a simplex guides: diagonal_normal, flow, full_rank_normal, logistic_normal" in text
    assert "Log density: log p(z) = sum_j (a - 1) log z_j - z_j - log Gamma(a)." in text
    assert "* df: number > 0; default 5.0. degrees of freedom" in text
    assert "z lives on: one of d categories priors: categorical" in " ".join(printed("guide", "categorical").split())
    assert "latents: continuous" in printed("objective", "dreg")


def test_json_says_the_same(printed):
    (found,) = json.loads(printed("prior", "student_t", "--json"))
    assert found["z_lives_on"] == "the real line"
    assert "full_rank_normal" in found["guides"]
    assert found["options"][0] == {
        "name": "df",
        "type": "number > 0",
        "required": False,
        "default": 5.0,
        "doc": "degrees of freedom; 1 is the Cauchy distribution, the variance is finite above 2.",
    }


@pytest.mark.parametrize(("kind", "example"), [(kind, catalogue._example(kind)) for kind in registry.kinds()])
def test_the_examples_are_valid(kind, example):
    from elbowroom.spec import document, spec

    tree = {"data": "digits", "model": {"latent_dim": 1, "likelihood": "gaussian"}}
    where = catalogue.HEADINGS[kind][0].split(", ")[0]
    parent, _, key = where.rpartition(".")
    given = document.parse(example, "example")
    assert list(given) == [key]
    (tree.setdefault(parent, {}) if parent else tree).update(given)
    spec.validate(tree)
