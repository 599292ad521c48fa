"""The shapes of posteriors: nothing exact beyond its error, and a value or two bounds nearly everywhere."""

from __future__ import annotations

import pytest
from benchmarks.shapes import SHAPES, judged


def test_there_are_forty_shapes_and_more() -> None:
    assert len(SHAPES) >= 40


@pytest.mark.parametrize("name", ["spike d=1 ratio=0.01 mass=0.5", "comb of 30 teeth, width 0.05", "half-line, gamma 0.3"])
def test_a_few_shapes_are_exact(name: str) -> None:
    score = judged(SHAPES[name], seeds=1)
    assert not score.wrong
    assert score.exact == score.known == score.n


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SHAPES))
def test_no_shape_is_exact_and_wrong(name: str) -> None:
    score = judged(SHAPES[name], seeds=1)  # `python -m benchmarks.shapes` takes three
    assert not score.wrong
    assert score.moments < 5.5  # of the largest of several means, in Monte Carlo standard errors
