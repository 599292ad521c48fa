"""Names are printed as they are, whatever characters they have: no markup, no format, no controls of the terminal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support.command import SPEC, call

from elbowroom.cli.terminal import CONTROLS, conclude, named, print_table, screen, visible
from elbowroom.spec import document

NAMES = [
    "[bold]a[/bold]",
    "[/]",
    ":smile:",
    "{x} %s %(y)d {0}",
    'it\'s "q"',
    "two\nlines",
    "\x1b[31mred\x07",
    "\u202eltr",
    "\u05d0\u05d1",
    "\U0001f600",
    "n" * 150,
    "bad\udcff",
]


@pytest.mark.parametrize("name", NAMES)
def test_tables_and_sentences_leave_a_name_as_it_is(capsys, name):
    print_table((name, "b"), [(name, "1")], [f"Of {name}."], title=None)
    conclude([f"{name} is said."])
    out = capsys.readouterr().out
    for line in visible(name).split("\n"):
        assert out.count(line) >= 4
    assert not CONTROLS.search(out)


@pytest.mark.usefixtures("no_figures", "no_report")
@pytest.mark.parametrize("name", NAMES)
def test_commands_print_the_names_of_files_as_they_are(here, capsys, name):
    name = name.replace("/", "|")
    Path("s.yaml").rename(here / f"{name}.yaml")
    run = f"run {name}"
    assert call("fit", f"{name}.yaml", "--dry-run", "--out", run) == 0
    out = capsys.readouterr().out
    assert f"\n{named(name)}.yaml: everything was checked, nothing was written; the run would go to " in out
    assert f" would go to {named(run)} (new)" in out
    assert call("fit", f"{name}.yaml", "--out", run, "--set", "fit.epochs=1") == 0
    assert f"wrote {named(run)}/ (" in capsys.readouterr().out
    assert call("encode", run, "--out", f"{name}.nc", "--references", "none", "--draws", "100") == 0
    assert f"wrote {named(name)}.nc" in capsys.readouterr().out
    for line in (["encode", run, "--out", f"{name}.nc"], ["sample", "no " + name], ["encode", run, f"{name}.npy"]):
        assert call(*line) == 2
        out, err = capsys.readouterr()
        assert err.count("\n") == 1, err
        assert not CONTROLS.search(err)
        if "\n" not in name and "  " not in name:  # a UserError is one line: white space in it is one space
            assert named(name) in err or " ... " in err, err  # long lines are shortened


@pytest.mark.parametrize("name", [name for name in NAMES if "\n" not in name and "\udcff" not in name and "\x1b" not in name])
def test_the_names_of_columns_and_levels_stand_as_they_are(tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({name: rng.normal(size=60), "b": rng.normal(size=60), "c": rng.choice([name, "other"], 60)})
    frame.loc[3, name] = np.nan
    frame.to_csv("t.csv", index=False)
    model = {"latent_dim": 1, "likelihood": "mixed", "decoder": {"name": "mlp", "hidden": [5]}}
    Path("t.yaml").write_text(document.write({**SPEC, "data": {"name": "file", "path": "t.csv"}, "model": model}))
    code = call("fit", "t.yaml", "--out", "r", "--set", "fit.epochs=1")
    assert code == 0, capsys.readouterr().err
    capsys.readouterr()
    assert call("explain", "r", "--draws", "20", "--points", "3", "--steps", "3") == 0
    assert named(name) in capsys.readouterr().out
    assert call("impute", "r", "--hide", "nowhere") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert not screen()._markup
