"""The answer to `impute`: the completed table, the long table of cells, and scores of cells that were hidden."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from elbowroom.analysis.latents.entries import coded
from elbowroom.analysis.measures.table import GOOD_K, TRUSTED
from elbowroom.analysis.queries.imputation import errors, losses, share
from elbowroom.data import delimited
from elbowroom.data.file import read_like
from elbowroom.data.frames import AS_IT_IS
from elbowroom.errors import DataError, UserError
from elbowroom.models.columns import Column
from elbowroom.queries.answer import Answer
from elbowroom.system.files import atomic

if TYPE_CHECKING:
    import pandas as pd

    from elbowroom.data.dataset import Dataset
    from elbowroom.queries.impute.cells import Entries

NUMBERS = ("mean", "mean_error", "sd", "median", "low", "high")
ERRORS = {"number": "RMSE / range", "count": "RMSE / range", "ordinal": "mean |code off| / levels"}
BINS = 10  # of predicted probabilities


@dataclass(frozen=True, eq=False, repr=False)
class Imputed(Answer):
    """Imputed cells: `completed()`, `frame()` (one line per cell), `scores()`, and variables such as `answer["mean"]`.

    Attributes:
        entries: names, kinds and levels of the entries.
        original: the data before imputation; hidden cells have their true values.
        given: the input of the query: a path, an array, a frame, or None for the run's own data.
        rows: numbers of all rows of the query, with or without missing cells.
    """

    entries: Entries = field(kw_only=True, repr=False)
    original: Dataset = field(kw_only=True, repr=False)
    given: Any = field(kw_only=True, repr=False)
    rows: np.ndarray = field(kw_only=True, repr=False)

    @property
    def missing(self) -> np.ndarray:
        """Which cells were imputed, (n, D), over the rows of the answer; each datum is flattened."""
        return ~np.isnan(self._flat("point"))

    def _flat(self, name: str) -> np.ndarray:
        values = self.dataset[name].values.astype(np.float64)
        return values.reshape(*values.shape[: values.ndim - len(self.entries.shape)], -1)

    def _text(self, j: int, value: float) -> Any:
        """Return a value as in the user's data: text for codes, whole numbers for counts, None for text that stays missing."""
        entries = self.entries
        if j in entries.texts:
            return None if np.isnan(value) else entries.text(j, value)
        return int(value) if entries.kinds[j] != "number" and float(value).is_integer() else float(value)

    def frame(self) -> pd.DataFrame:
        """Return one line per imputed cell: obs_id, column, point, mean, low, high, ..., and the same by the guide."""
        import pandas as pd

        entries, (rows, columns) = self.entries, self.missing.nonzero()
        obs = self.dataset["obs_id"].values[rows]
        labels = obs if self.form.index is None else np.asarray(self.form.index)[rows]
        table: dict[str, Any] = {"obs_id": labels, "column": np.array(entries.names)[columns]}
        for way in ("", "_guide"):
            point = self._flat("point" + way)[rows, columns]
            table["point" + way] = [self._text(j, v) for j, v in zip(columns.tolist(), point.tolist(), strict=True)]
            for name in NUMBERS:
                table[name + way] = self._flat(name + way)[rows, columns].astype(self.dataset[name + way].dtype)
            if entries.coded:
                table["probability" + way] = self._of_likeliest(way)[rows, columns]
        table["status"] = self.dataset["status"].values[rows]
        if "truth" in self.dataset:
            truth = self._flat("truth")[rows, columns]
            table["truth"] = [self._text(j, v) for j, v in zip(columns.tolist(), truth.tolist(), strict=True)]
            for name in ("log_density", "log_density_guide"):
                table[name] = self._flat(name)[rows, columns].astype(self.dataset[name].dtype)
        empty = [name for name, value in table.items() if isinstance(value, np.ndarray) and _nowhere(value)]
        return pd.DataFrame({name: value for name, value in table.items() if name not in empty}).set_index("obs_id")

    def _of_likeliest(self, way: str) -> np.ndarray:
        """Return the probability of the most likely level, (n, D), NaN for numbers."""
        out = np.full(self.missing.shape, np.nan)
        if "probability" + way in self.dataset:
            values = self.dataset["probability" + way].values
            for j, at in self.entries.starts().items():
                out[:, j] = values[:, at : at + self.entries.coded[j]].max(1)
        return out

    def values(self, sample: int | None = None) -> np.ndarray:
        """Return all rows of the query with their missing cells filled, (n, *event), text as codes.

        Args:
            sample: number of the draw to fill in; by default `point`.

        Raises:
            UserError: the answer does not contain this draw.
        """
        have = self.dataset.sizes.get("sample", 0)
        if sample is not None and not 0 <= sample < have:
            raise UserError(f"completed: there is no sample {sample}, the answer holds {have}; ask for more with samples=")
        fill = self.dataset["point"].values if sample is None else self.dataset["samples"].values[sample]
        x = np.array(self.original.x[self.rows], dtype=np.float64)
        at = np.searchsorted(self.rows, self.dataset["obs_id"].values)
        x[at] = np.where(np.isnan(self.dataset["point"].values), x[at], fill)
        return x

    def completed(self, sample: int | None = None) -> Any:
        """Return the completed data in the type of the input: a table with text as text, an array, or a tensor.

        If cells were hidden, only these are filled; other missing cells stay missing.

        Args:
            sample: number of a draw, for multiple imputation; by default each cell's `point`: the mean of numbers, the median
                of counts, the most likely level.

        Raises:
            UserError: the answer does not contain this draw.
        """
        x, given = self.values(sample), self.given
        if isinstance(given, torch.Tensor):
            return torch.as_tensor(x, dtype=given.dtype if given.is_floating_point() else None).reshape(given.shape)
        if hasattr(given, "iloc") and hasattr(given, "columns"):
            return self._filled(given, x)
        if isinstance(given, str | Path) and Path(given).suffix.lower() == ".parquet":
            import pandas as pd

            return self._filled(pd.read_parquet(given), x)
        if isinstance(given, str | Path) and Path(given).suffix.lower() in (".csv", ".tsv"):
            return self._filled_cells(Path(given), x)
        if self.entries.table and given is None:
            import pandas as pd

            columns = {name: [self._text(j, v) for v in x[:, j]] for j, name in enumerate(self.entries.names)}
            return pd.DataFrame(columns, index=pd.Index(self.rows, name="obs_id"))
        return x if not isinstance(given, np.ndarray) else x.reshape(given.shape)

    def save_completed(self, path: Path) -> Path:
        """Write the completed data beside `path`: `<stem>-completed.csv` for tables, else `.npz` with the array `x`."""
        done = self.completed()
        table = hasattr(done, "to_csv")
        target = path.with_name(f"{path.stem}-completed{'.csv' if table else '.npz'}")
        with atomic(target) as temporary:
            if table:
                done.to_csv(temporary, index=not isinstance(self.given, str | Path))
            else:
                np.savez_compressed(temporary, allow_pickle=False, x=np.asarray(done))
        return target

    def _holes(self, j: int) -> np.ndarray:
        """Return the positions, among the rows of the query, of those in which an entry was filled."""
        rows = self.missing[:, j].nonzero()[0]
        return np.searchsorted(self.rows, self.dataset["obs_id"].values[rows])

    def _filled(self, frame: pd.DataFrame, x: np.ndarray) -> pd.DataFrame:
        """Fill the missing cells of a frame; a column keeps its type if that type can hold the values."""
        import pandas as pd

        frame, names = frame.copy(), [str(name) for name in frame.columns]
        for j, name in enumerate(self.entries.names):
            at = self._holes(j)
            if not len(at):
                continue
            place = names.index(name)
            column = frame.iloc[:, place]
            new: list[Any] = [self._text(j, v) for v in x[at, j]]
            if isinstance(column.dtype, pd.CategoricalDtype):
                by_text = {str(v): v for v in column.dtype.categories}
                new = [by_text.get(str(v), v) for v in new]
            elif pd.api.types.is_numeric_dtype(column.dtype):
                new = [float(v) for v in new]
                if not isinstance(column.dtype, np.dtype):
                    column = column.astype("Float64" if any(not v.is_integer() for v in new) else column.dtype)
                elif column.dtype.kind != "f":  # whole numbers without missing cells: values of a reconstruction
                    column = column.astype(np.float64)
            elif self.entries.kinds[j] == "binary" and all(isinstance(v, bool) for v in column.dropna()):
                new = [bool(v) for v in new]
            column = column.copy()
            column.iloc[at] = new
            frame.isetitem(place, column.array)
        return frame

    def _filled_cells(self, path: Path, x: np.ndarray) -> pd.DataFrame:
        """Fill the missing cells of a CSV file; all other cells keep their text.

        Raises:
            DataError: the file is not the one whose cells were imputed: it was changed since.
        """
        import pandas as pd

        layout = self.original.layout or AS_IT_IS
        again = read_like(path, layout, path.parent).x
        if again.shape != self.original.x.shape or not np.array_equal(again, self.original.x, equal_nan=True):
            raise DataError(f"{path.name}: it was changed while its cells were imputed; impute it again")
        table = delimited.read(path, path.name, layout)
        cells, _ = table.rows()
        head = list(table.names or self.entries.names)
        for j, name in enumerate(self.entries.names):
            for at in self._holes(j):
                value = self._text(j, x[at, j])
                cells[self.rows[at]][head.index(name)] = f"{value:.6g}" if isinstance(value, float) else str(value)
        return pd.DataFrame([cells[row] for row in self.rows], columns=head)

    def scores(self) -> pd.DataFrame:
        """Return how well hidden cells were imputed: one line per column of a table, one for all cells of other data.

        `error`: root mean squared error over the range of the column (numbers, counts), the share of wrong levels (binary,
        categorical), or mean |code - guess| / levels (ordinal). `coverage`: share of the cells inside their interval.
        `coverage_rank`: share whose randomised rank lies within the level; it equals the level if the model is right, also for
        whole numbers. `brier`: mean squared error of probabilities, next to its expected value if they are right.
        `calibration_gap`: mean |observed share - stated probability| over ten bins. `log_density`: mean log p of a cell, nats.
        Standard errors (`_se`) treat rows, not cells, as independent. `_guide`: the same with the encoder's own draws.

        Raises:
            UserError: no cells were hidden.
        """
        import pandas as pd

        if "truth" not in self.dataset:
            raise UserError("scores: no cells were hidden; ask with hide=...")
        entries, every = self.entries, np.flatnonzero(self.missing.any(0))
        groups = [(entries.names[j], [int(j)]) for j in every] if entries.table else [("all cells", every.tolist())]
        return pd.DataFrame([{"column": name, **self._score(group)} for name, group in groups])

    def _score(self, group: list[int]) -> dict[str, Any]:
        entries, level = self.entries, float(self.dataset.attrs["level"])
        kind = entries.kinds[group[0]]
        there = self.missing[:, group]
        pick = lambda name: np.where(there, self._flat(name)[:, group], np.nan)
        truth, asked = pick("truth"), np.asarray(self.original.x[self.rows], dtype=np.float64).reshape(len(self.rows), -1)
        span = float(np.nanmax(asked[:, group]) - np.nanmin(asked[:, group]))
        column = Column("", "real" if kind == "number" else kind, max(2, entries.coded.get(group[0], 2)))
        out: dict[str, Any] = {"kind": kind, "cells": int(there.sum()), "error_is": ERRORS.get(kind, "share wrong")}
        for way in ("", "_guide"):
            guess = pick(("mean" if kind == "count" else "point") + way)
            loss = losses(truth.reshape(-1, 1), guess.reshape(-1, 1), [column], np.array([span or 1.0]))
            out["error" + way] = float(errors(loss, [column])[0])
        if not coded(column):
            out["rmse"] = out["error"] * (span or 1.0)
        for way in ("", "_guide"):
            if kind in ("number", "count", "ordinal"):
                low, high, rank = (pick(name + way) for name in ("low", "high", "rank"))
                held = np.where(there, (low <= truth) & (truth <= high), np.nan)
                inside = np.where(there, np.abs(rank - 0.5) <= level / 2, np.nan)
                out["coverage" + way], out[f"coverage{way}_se"] = share(held)
                out["coverage_rank" + way], out[f"coverage_rank{way}_se"] = share(inside)
                out["width" + way] = float(np.nanmean(high - low))
            if kind in ("binary", "categorical", "ordinal"):
                out |= self._calibration(group, truth, there, way)
            density = pick("log_density" + way)
            out["log_density" + way], out[f"log_density{way}_se"] = share(density)
        out["log_density_gain"], out["log_density_gain_se"] = share(pick("log_density") - pick("log_density_guide"))
        return out

    def _calibration(self, group: list[int], truth: np.ndarray, there: np.ndarray, way: str) -> dict[str, float]:
        """Return the Brier score of probabilities, its expected value if they are right, and the calibration gap."""
        if self.entries.kinds[group[0]] == "binary":
            p = np.where(there, self._flat("mean" + way)[:, group], np.nan)
            right = truth
            brier, expected = np.nanmean((p - truth) ** 2), np.nanmean(p * (1 - p))
        elif group[0] in self.entries.coded and len(group) == 1:
            at = self.entries.starts()[group[0]]
            levels = self.dataset["probability" + way].values[:, at : at + self.entries.coded[group[0]]][there[:, 0]]
            code = truth[there[:, 0], 0].astype(int)
            brier = np.mean(np.square(levels - np.eye(levels.shape[1])[code]).sum(1))
            expected = np.mean(1 - np.square(levels).sum(1))
            p, right = levels.max(1), (levels.argmax(1) == code).astype(float)
        else:
            return {}
        p, right = p[~np.isnan(p)], right[~np.isnan(right)]
        bins = np.minimum((p * BINS).astype(int), BINS - 1)
        gap = sum(abs(float((right - p)[bins == b].sum())) for b in range(BINS)) / len(p)
        return {f"brier{way}": float(brier), f"brier{way}_if_right": float(expected), f"calibration_gap{way}": float(gap)}


def _any(values: np.ndarray) -> bool:
    return bool(np.isfinite(values).any())


def _nowhere(values: np.ndarray) -> bool:
    return values.dtype.kind == "f" and len(values) > 0 and bool(np.isnan(values).all())


def conclude(answer: Imputed, *, marks: bool, padded: bool) -> list[str]:
    """Say in sentences what was imputed, how reliable it is, and what imputation cannot show.

    `marks`: whether the encoder gets a mask of the missing entries; `padded`: whether data are sequences.
    """
    data, missing = answer.dataset, answer.missing
    status = data["status"].values
    sources = ", ".join(f"{name} at {n:,}" for name, n in Counter(data["source"].values.tolist()).most_common())
    good, left = int(np.isin(status, TRUSTED).sum()), int((status == "amortized").sum())
    kinds = {answer.entries.kinds[j] for j in np.flatnonzero(missing.any(0))}
    hidden = "truth" in data
    many = lambda n, noun: f"{n:,} {noun}{'s' * (n != 1)}"
    cells, rows = many(int(missing.sum()), f"{'hidden' if hidden else 'missing'} cell"), many(len(missing), "row")
    said = [
        f"{cells} in {rows}; draws of p(z|x_obs): {sources}. {many(good, 'row')} exact or certified, "
        f"{len(missing) - good - left:,} by reweighted draws of the encoder, {left:,} by its own draws (k-hat above {GOOD_K})."
    ]
    asked = answer.original.x[data["obs_id"].values]
    seen = ~np.isnan(np.asarray(asked, dtype=np.float64)).reshape(missing.shape) & ~missing
    if empty := int((~seen.any(1)).sum()):
        said.append(f"Nothing is observed of {many(empty, 'row')}: the cells follow the marginal of the model, p(x).")
    with np.errstate(divide="ignore", invalid="ignore"):
        sd = answer._flat("sd")
        off = np.abs(answer._flat("mean_guide") - answer._flat("mean")) / sd
        wide = (answer._flat("high_guide") - answer._flat("low_guide")) / (answer._flat("high") - answer._flat("low"))
        wide[~np.isfinite(wide)] = np.nan
        noise = answer._flat("mean_error") / sd
    if np.isfinite(off).any():
        numbers = wide[:, [kind not in ("binary", "categorical") for kind in answer.entries.kinds]]
        widths = f", its intervals are {np.nanmedian(numbers):.2f} times as wide in the median" if _any(numbers) else ""
        said.append(
            f"The encoder's own draws would put the mean of a cell off by {np.nanmedian(off):.2f} sd in the median and by "
            f"{np.nanquantile(off, 0.95):.2f} or more at 5 % of the cells{widths}; the Monte Carlo error of a mean is "
            f"{np.nanquantile(noise, 0.95):.3f} sd or less at 95 % of them."
        )
    if not marks:
        said.append("The encoder was trained without holes and takes a missing entry for an average one.")
    if kinds & {"count", "ordinal"}:
        said.append("Intervals of counts and codes end at whole numbers and hold at least their level.")
    if padded:
        said.append("Steps after the last one with anything observed are padding and were not imputed.")
    if hidden:
        said += _scored(answer)
    else:
        said.append(
            "All of this is by the model, and takes cells to be missing for reasons that the seen ones tell; hide known cells "
            "(--hide) to see how far that holds."
        )
    return said


def _scored(answer: Imputed) -> list[str]:
    """Say how well the hidden cells were imputed."""
    level, said = float(answer.dataset.attrs["level"]), []
    for row in answer.scores().to_dict("records"):
        parts = [
            f"{row['column']} ({row['cells']:,} cells): {row['error_is']} {row['error']:.3f} (guide {row['error_guide']:.3f})"
        ]
        if not np.isnan(row.get("coverage", np.nan)):
            of = f"{level:.0%} intervals hold {row['coverage']:.1%} ± {row['coverage_se']:.1%}, width {row['width']:.3g}"
            parts.append(f"{of} (guide {row['coverage_guide']:.1%} ± {row['coverage_guide_se']:.1%}, {row['width_guide']:.3g})")
            if row["kind"] != "number":
                parts.append(f"randomised {row['coverage_rank']:.1%} (guide {row['coverage_rank_guide']:.1%})")
        if not np.isnan(row.get("brier", np.nan)):
            parts.append(
                f"Brier score {row['brier']:.3f} where its own probabilities say {row['brier_if_right']:.3f} "
                f"(guide {row['brier_guide']:.3f}, {row['brier_guide_if_right']:.3f})"
            )
        parts.append(
            f"log p of a cell {row['log_density_gain']:+.3f} ± {row['log_density_gain_se']:.3f} nats above the guide's"
        )
        said.append("; ".join(parts) + ".")
    return said
