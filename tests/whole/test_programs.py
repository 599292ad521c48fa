"""The programs of docs/programs.md: each is audited or refused as its entry says."""

import importlib
import re
from pathlib import Path

import pytest

from elbowroom.errors import UnsupportedProgram
from elbowroom.inference.target.log_joint import LogJoint
from examples.programs.__main__ import MODULES, row_of
from examples.programs.catalogue import ENTRIES, Entry, fresh

ROOT = Path(__file__).parents[2]
for module in MODULES:
    importlib.import_module(f"examples.programs.{module}")
QUICK = ("rates of batters", "latent Dirichlet allocation", "item response, crossed", "a coin")


def test_the_list_is_long_and_few_are_refused() -> None:
    names = [entry.name for entry in ENTRIES]
    assert len(names) == len(set(names)) >= 40
    assert sum(entry.refused is None for entry in ENTRIES) >= 0.85 * len(ENTRIES)


def test_the_page_has_every_program() -> None:
    page = (ROOT / "docs" / "programs.md").read_text(encoding="utf-8")
    assert [entry.name for entry in ENTRIES if f"| {entry.name} |" not in page] == []
    assert "Not right: none." in page


@pytest.mark.parametrize(
    "entry",
    [pytest.param(e, id=e.name, marks=() if e.name.startswith(QUICK) else pytest.mark.slow) for e in ENTRIES],
)
def test_a_program_is_taken_or_refused_as_its_entry_says(entry: Entry) -> None:
    fresh()
    pair = entry.make()
    options = dict(pair.options)
    if entry.refused is None:
        LogJoint(pair.model, pair.guide, *pair.args, **options)
        return
    with pytest.raises(UnsupportedProgram) as caught:
        LogJoint(pair.model, pair.guide, *pair.args, **options)
    assert re.search(entry.refused, str(caught.value))
    if entry.cure is not None:
        fresh()
        cure = entry.cure()
        LogJoint(cure.model, cure.guide, *cure.args, **cure.options)


def test_a_row_is_wrong_where_the_evidence_is() -> None:
    """The page can fail: a program whose evidence by hand is off by .05 nats is marked."""
    entry = next(e for e in ENTRIES if e.name.startswith("rates of batters"))

    def off():
        pair = entry.make()
        return type(pair)(pair.model, pair.guide, pair.args, pair.options, lambda: pair.evidence() + 0.05)

    assert row_of(entry).right
    assert not row_of(Entry(entry.name, entry.source, off)).right
