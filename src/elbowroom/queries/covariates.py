"""Covariates and exposures for a conditional model: by name, from a file, or from training rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from elbowroom.data.columns import Layout
from elbowroom.data.file import read_like
from elbowroom.data.frames import csv_frame
from elbowroom.errors import DataError, SpecError, nearest
from elbowroom.runs.rows import layout_of, own_rows

if TYPE_CHECKING:
    import pandas as pd

    from elbowroom.runs.fitted import FittedModel

TRAINING = "training"
Beside = dict[str, np.ndarray]


def conditional(run: FittedModel) -> bool:
    """Say whether the model takes covariates or an exposure."""
    facts = run.experiment.facts
    return bool(facts.covariates) or facts.exposure


def needed(run: FittedModel) -> list[str]:
    """Return the names of the required columns in the user's data: covariates first, then the exposure."""
    facts, layout = run.experiment.facts, layout_of(run)
    if layout is None or layout.x is None:
        exposure = (layout.exposure if layout is not None else None) or "exposure"
        return [*facts.covariates, *([exposure] if facts.exposure else [])]
    return [*layout.covariates, *([layout.exposure] if layout.exposure is not None else [])]


def read(run: FittedModel, covariates: Any = None, given: Mapping[str, Any] | None = None, *, seed: int = 0) -> Beside | None:
    """Return covariates (m, C) and exposure (m,), in their own units; None for a model without them.

    Args:
        run: the run.
        covariates: a file (.csv, .tsv, .parquet) or a frame with their columns, an array (m, C), or `training` for those of the
            training rows in random order.
        given: name -> value, the same for all rows; for all columns or those that `covariates` lacks.
        seed: seed of the order of the training rows.

    Raises:
        UserError: a column is missing or unknown, a level did not occur in the fit, or the model has no covariates.
    """
    names, values = needed(run), dict(given or {})
    for name in values:
        if name not in names:
            what = nearest(name, names) if names else "; this model is not conditional"
            raise SpecError(f"given: there is no covariate {name!r}{what}")
    if not conditional(run):
        if covariates is not None:
            raise SpecError("covariates: this model is not conditional, it takes none; leave them out")
        return None
    if isinstance(covariates, str) and covariates == TRAINING:
        if values:
            raise SpecError(f"given: {min(values)!r} is given twice, covariates: {TRAINING} has all of them")
        rows = own_rows(run, "train")
        index = np.random.default_rng(seed).permutation(rows.index)
        return {name: value.numpy() for name, value in rows.experiment.beside(index).items()}
    if covariates is None and len(values) < len(names):
        lacking = [name for name in names if name not in values]
        raise SpecError(
            f"this model is conditional: it needs {', '.join(map(repr, lacking))}; give values (--given {lacking[0]}=...), a "
            f"file (--covariates FILE), or those of random training rows (--covariates {TRAINING})"
        )
    return _checked(run, _arrays(run, covariates, values, names), "covariates")


def _arrays(run: FittedModel, covariates: Any, values: Mapping[str, Any], names: list[str]) -> Beside:
    facts, layout = run.experiment.facts, layout_of(run)
    if isinstance(covariates, np.ndarray):
        c = covariates.astype(np.float64).reshape(len(covariates), -1)
        width = len(facts.covariates)
        if c.shape[1] != width:
            raise DataError(f"covariates: the model has {width}, {', '.join(facts.covariates)}; the array has {c.shape[1]}")
        found: Beside = {"covariates": c}
        if facts.exposure:
            name = names[-1]
            if name not in values:
                raise SpecError(f"this model needs the exposure too: given={{{name!r}: ...}}")
            found["exposure"] = np.full(len(c), float(values[name]))
        return found
    frame = _frame(covariates, values, names, {} if layout is None else layout.levels)
    if layout is None or layout.x is None:
        lacking = [name for name in names if name not in frame]
        if lacking:
            raise DataError(
                f"covariates: there is no column {lacking[0]!r}{nearest(lacking[0], list(map(str, frame.columns)))}"
            )
        numbers = {name: _numbers(frame[name], name) for name in names}
        found = {"covariates": np.stack([numbers[name] for name in facts.covariates], 1)} if facts.covariates else {}
        return found | ({"exposure": numbers[names[-1]]} if facts.exposure else {})
    kinds = {name: kind for name, kind in layout.kinds.items() if name in names}
    alone = Layout(x=tuple(names), kinds=kinds, levels={n: v for n, v in layout.levels.items() if n in names}, fitted=True)
    dataset = replace(read_like(frame, alone, Path.cwd()), name="covariates")
    columns = dict(zip(names, np.asarray(dataset.x, dtype=np.float64).T, strict=True))
    for name, column in columns.items():
        if np.isnan(column).any():
            raise DataError(f"covariates: {name!r} is missing at row {int(np.isnan(column).argmax())}; fill it in")
    parts = [_one_hot(columns[name], layout.levels.get(name)) for name in layout.covariates]
    found = {"covariates": np.concatenate(parts, 1)} if parts else {}
    return found | ({"exposure": columns[layout.exposure]} if layout.exposure is not None else {})


def _frame(covariates: Any, values: Mapping[str, Any], names: list[str], levels: Mapping[str, tuple[str, ...]]) -> pd.DataFrame:
    """Return covariates and constant values as one frame with the named columns."""
    import pandas as pd

    if covariates is None:
        return pd.DataFrame({name: [values[name]] for name in names})
    if isinstance(covariates, str | Path):
        path = Path(covariates)
        cells = lambda path: csv_frame(path, path.name, Layout(levels=levels))
        readers: dict[str, Any] = {".csv": cells, ".tsv": cells, ".parquet": pd.read_parquet}
        if path.suffix.lower() not in readers:
            raise DataError(
                f"{path}: covariates are read from a table (.csv, .tsv, .parquet), or `{TRAINING}` for those of training rows"
            )
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        try:
            frame = readers[path.suffix.lower()](path)
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{path}: cannot be read: {str(error).splitlines()[0][:100]}") from None
    else:
        frame = pd.DataFrame(covariates)
    if not len(frame):
        raise DataError("covariates: there are no rows")
    return frame.assign(**values)


def _numbers(column: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(column, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError(f"covariates: {name!r} holds text, such as {str(column.iloc[0])!r}; give it numbers") from None


def _one_hot(codes: np.ndarray, levels: tuple[str, ...] | None) -> np.ndarray:
    return codes[:, None] if levels is None else (codes[:, None] == np.arange(len(levels))).astype(np.float64)


def _checked(run: FittedModel, found: Beside, label: str) -> Beside:
    """Refuse covariates that are not numbers, and exposures that are not positive."""
    for name, values in found.items():
        bad = ~np.isfinite(values) if name == "covariates" else ~((values > 0) & np.isfinite(values))
        if bad.any():
            row = int(np.argwhere(bad)[0][0])
            wanted = "finite numbers" if name == "covariates" else "above 0"
            raise DataError(f"{label}: {name} must be {wanted}; found {values[tuple(np.argwhere(bad)[0])]:g} at row {row}")
    return found
