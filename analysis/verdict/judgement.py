"""A verdict, and its storage in files: the group `verdicts` of `diagnosis.nc`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import xarray as xr

from elbowroom.analysis import idata
from elbowroom.errors import RunFolderError


@dataclass(frozen=True)
class Judgement:
    """A verdict, its number, the rule, and the advice.

    Attributes:
        verdict: `sound`, or one of those in `verdict.rules`.
        number: the quantity that the rule uses.
        low: lower end of its 95 % interval, NaN for a count.
        high: upper end.
        units: of these three.
        rests_on: the evidence in words.
        rule: the rule, with its threshold.
        advice: what to do about it.
    """

    verdict: str
    number: float
    low: float
    high: float
    units: str
    rests_on: str
    rule: str
    advice: str

    def __str__(self) -> str:
        return f"Verdict: {self.verdict}: {self.rests_on}. {self.advice} [Rule: {self.rule}.]"


def as_dataset(verdicts: list[Judgement]) -> xr.Dataset:
    """Convert judgements to a table over `verdict`, for files."""
    rows = [asdict(judgement) for judgement in verdicts]
    columns = {name: ("verdict", np.array([row[name] for row in rows])) for name in rows[0] if name != "verdict"}
    return xr.Dataset(columns, coords={"verdict": np.array([row["verdict"] for row in rows])})


def from_dataset(dataset: xr.Dataset) -> list[Judgement]:
    """Return the judgements stored by `as_dataset`."""

    def number(name: str, i: int) -> float:
        return float(dataset[name].values[i])

    def text(name: str, i: int) -> str:
        return str(dataset[name].values[i])

    return [
        Judgement(
            verdict=text("verdict", i),
            number=number("number", i),
            low=number("low", i),
            high=number("high", i),
            units=text("units", i),
            rests_on=text("rests_on", i),
            rule=text("rule", i),
            advice=text("advice", i),
        )
        for i in range(dataset.sizes["verdict"])
    ]


def read(path: Path) -> xr.DataTree:
    """Read `diagnosis.nc`, which must have readable verdicts.

    Raises:
        RunFolderError: it is damaged, or holds no verdicts.
    """
    tree = idata.read(path)
    cure = "audit again, or remove it"
    if "verdicts" not in tree.children or "verdict" not in tree["verdicts"].coords:
        raise RunFolderError(f"{path}: holds no verdicts (group 'verdicts'); {cure}")
    try:
        found = from_dataset(tree["verdicts"].to_dataset())
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise RunFolderError(f"{path}: its verdicts cannot be read ({str(error).splitlines()[0]}); {cure}") from error
    if not found:
        raise RunFolderError(f"{path}: its list of verdicts (group 'verdicts') is empty; {cure}")
    return tree
