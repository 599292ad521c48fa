"""A pairwise covering array over everything a spec can name: each two words that go together stand in some combination.

The words are read from the registry, what goes with what from `compatibility.clash` and what networks and likelihoods need of
the data. Rows come greedily: one for each prior and likelihood (no array can be smaller than these two), its other words those
that cover most pairs that are left; then rows for what is still left.
"""

from __future__ import annotations

import functools
import itertools
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from elbowroom.components import compatibility, registry

KINDS = {"prior": "prior", "likelihood": "likelihood", "guide": "guide", "network": "network", "objective": "objective"}
WORDS: dict[str, list[str]] = {factor: registry.names(kind) for factor, kind in KINDS.items()}
WORDS |= {"covariates": ["none", "given", "conditional"], "exposure": ["none", "given"], "holes": ["none", "some"]}
FACTORS = tuple(WORDS)
ISSUE = tuple(KINDS)
"""The factors that the demand is about; the others are what the data bring."""

EVENT = {"conv": (6, 6), "gru": (5, 3), "stepwise": (2, 3)}
"""Shape of a datum by network; a table of four columns where there is none."""
TABLES = ("mixed",)
"""Likelihoods of tables alone."""


PAGE = Path(__file__).parents[3] / "docs" / "matrix.md"


class Combination(NamedTuple):
    """One row of the array."""

    prior: str
    likelihood: str
    guide: str
    network: str
    objective: str
    covariates: str
    exposure: str
    holes: str


@functools.cache
def clash(prior: str, guide: str, objective: str) -> str | None:
    """Return the reason for which the three do not go together."""
    block = lambda kind, name: registry.options_model(kind, name)(name=name)
    return compatibility.clash(block("prior", prior), block("guide", guide), block("objective", objective))


def _fits(first: str, second: str, a: str, b: str) -> bool:
    """Say whether two words go together, for the pairs that no rule of a spec is about."""
    if (first, second) == ("likelihood", "network"):
        return not (a in TABLES and b in EVENT)
    if (first, second) == ("prior", "covariates"):
        return b != "conditional" or any(o.name == "covariates" for o in registry.component("prior", a).options)
    if (first, second) == ("likelihood", "exposure"):
        cls: Any = registry.component("likelihood", a).cls
        return b == "none" or cls.takes_exposure
    return True


@functools.cache
def mask() -> np.ndarray:
    """Say which combinations are valid, an array with one axis per factor."""
    shape = [len(words) for words in WORDS.values()]
    allowed = np.ones(shape, dtype=bool)
    for (i, first), (j, second) in itertools.combinations(enumerate(FACTORS), 2):
        table = [[_fits(first, second, a, b) for b in WORDS[second]] for a in WORDS[first]]
        allowed &= _spread(np.array(table), (i, j), len(shape))
    axes = tuple(FACTORS.index(factor) for factor in ("prior", "guide", "objective"))
    together = np.array(
        [[[clash(p, g, o) is None for o in WORDS["objective"]] for g in WORDS["guide"]] for p in WORDS["prior"]]
    )
    return allowed & _spread(together, axes, len(shape))


def _spread(table: np.ndarray, axes: tuple[int, ...], n: int) -> np.ndarray:
    """Give a table the axes of the whole array, in rising order."""
    return table.reshape([table.shape[axes.index(i)] if i in axes else 1 for i in range(n)])


def valid_pairs() -> dict[tuple[int, int], np.ndarray]:
    """Return, for each two factors, which words stand together in some valid combination."""
    n = len(FACTORS)
    return {
        (i, j): mask().any(axis=tuple(k for k in range(n) if k not in (i, j))) for i, j in itertools.combinations(range(n), 2)
    }


def refused_pairs() -> list[tuple[str, str, str, str]]:
    """Return (factor, word, factor, word) of each pair of the issue's words that no combination holds."""
    found = []
    for (i, j), table in valid_pairs().items():
        if FACTORS[i] in ISSUE and FACTORS[j] in ISSUE:
            for a, b in np.argwhere(~table):
                found.append((FACTORS[i], WORDS[FACTORS[i]][a], FACTORS[j], WORDS[FACTORS[j]][b]))
    return found


def lines_of(page: str) -> dict[int, str]:
    """Return the lines of the table of docs/matrix.md by the number of the row."""
    return {int(number): line for line, number in re.findall(r"^(\| (\d+) \| .* \|)$", page, flags=re.MULTILINE)}


def kept(page: str) -> list[Combination]:
    """Read the combinations of docs/matrix.md, in their order, without those that are no longer valid."""
    found = []
    for line in lines_of(page).values():
        *words, data = (cell.strip() for cell in line.split(" | ")[1:7])
        covariates = "conditional" if "c*" in data else "given" if "c" in data else "none"
        row = Combination(*words, covariates, "given" if "e" in data else "none", "some" if "h" in data else "none")
        known = all(word in WORDS[factor] for factor, word in zip(FACTORS, row, strict=True))
        if known and mask()[tuple(WORDS[factor].index(word) for factor, word in zip(FACTORS, row, strict=True))]:
            found.append(row)
    return found


@functools.cache
def array() -> tuple[Combination, ...]:
    """Return the covering array; it is the same whenever the registry and the page are."""
    allowed, n = mask(), len(FACTORS)
    left = {key: table.copy() for key, table in valid_pairs().items()}
    # a pair that few combinations could still cover is worth more than one that nearly all could
    rare = {key: 1.0 + 1e5 / np.maximum(1, _count(allowed, key)) for key in left}
    used = [np.zeros(len(words)) for words in WORDS.values()]
    rows: list[tuple[int, ...]] = []

    def add(row: tuple[int, ...]) -> None:
        rows.append(row)
        for axis, word in enumerate(row):
            used[axis][word] += 1
        for (i, j), table in left.items():
            table[row[i], row[j]] = False

    def take(fixed: dict[int, int]) -> None:
        index = tuple(fixed.get(axis, slice(None)) for axis in range(n))
        free = [axis for axis in range(n) if axis not in fixed]
        gain: Any = np.zeros([len(WORDS[FACTORS[axis]]) for axis in free])
        for (i, j), table in left.items():
            worth = table * rare[i, j]
            part = worth[index[i], index[j]]
            kept = tuple(free.index(axis) for axis in (i, j) if axis in free)
            gain = gain + (_spread(part, kept, len(free)) if kept else part)
        for place, axis in enumerate(free):  # where nothing is left to cover, the words that were used least
            gain = gain - 1e-6 * _spread(used[axis], (place,), len(free))
        gain = np.where(allowed[index], gain, -np.inf)
        best = np.unravel_index(int(gain.argmax()), gain.shape)
        row = [0] * n
        for axis in range(n):
            row[axis] = fixed[axis] if axis in fixed else int(best[free.index(axis)])
        add(tuple(row))

    for row in kept(PAGE.read_text()) if PAGE.is_file() else ():
        add(tuple(WORDS[factor].index(word) for factor, word in zip(FACTORS, row, strict=True)))
    for p, x in np.argwhere(left[0, 1]):
        if left[0, 1][p, x]:
            take({0: int(p), 1: int(x)})
    while any(table.any() for table in left.values()):
        (i, j), table = next((key, table) for key, table in left.items() if table.any())
        a, b = np.argwhere(table)[0]
        take({i: int(a), j: int(b)})
    return tuple(Combination(*(WORDS[factor][word] for factor, word in zip(FACTORS, row, strict=True))) for row in rows)


def _count(allowed: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    return allowed.sum(axis=tuple(k for k in range(allowed.ndim) if k not in key))
