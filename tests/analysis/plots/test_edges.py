"""No figure is cut at its edges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from support.report.run_folder import write_run

from elbowroom.analysis.plots import style
from elbowroom.analysis.report.report import write_report


def cut(path: Path) -> bool:
    """Say whether something is drawn in the outermost pixels at the left or right."""
    grey = np.asarray(Image.open(path).convert("L")).astype(int)
    return bool((np.concatenate([grey[:, :2], grey[:, -2:]], 1) < 250).any())


@style.styled
def crowded(top: float, entries: int) -> Figure:
    """A panel above a long legend: with the room that this leaves, its ticks have more digits than without."""
    figure = style.canvas(style.WIDE, 4.3, "title")
    left, _ = figure.subplots(1, 2, width_ratios=(1.5, 1))
    for i in range(entries):
        left.plot([0, 1], [-top, top], label=f"line {i}")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    left.set(xlabel="x", ylabel="label")
    return figure


def test_ticks_that_the_layout_changes_find_room(tmp_path: Path) -> None:
    was_cut = 0
    for top in (0.06, 0.08, 0.09, 0.1, 0.11):
        crowded(top, 10).savefig(tmp_path / "once.png", dpi=style.DPI)
        was_cut += cut(tmp_path / "once.png")
        style.Plot("name", crowded(top, 10), "alt", "caption").write(tmp_path / "twice.png")
        assert not cut(tmp_path / "twice.png"), top
    assert was_cut  # else this would show nothing


def test_no_figure_of_a_report_is_cut(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "toy")
    write_report(folder)
    figures = sorted((folder / "figures").glob("*.png"))
    assert len(figures) > 8
    assert [path.name for path in figures if cut(path)] == []
