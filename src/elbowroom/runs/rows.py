"""The rows that a query is about: the run's own rows or the user's, read and checked like the data of the fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from elbowroom.data.columns import Layout
from elbowroom.data.file import read_like
from elbowroom.errors import DataError, SpecError, nearest
from elbowroom.spec import run_folder, warm_start
from elbowroom.spec.support import check_support

if TYPE_CHECKING:
    from elbowroom.data.dataset import Dataset
    from elbowroom.runs.fitted import FittedModel
    from elbowroom.spec.experiment import Experiment

Part = Literal["train", "validation", "test"]


@dataclass(frozen=True, eq=False)
class QueryRows:
    """Rows of data that fit a run's model.

    Attributes:
        dataset: the data.
        index: numbers of the selected rows, (n,).
        experiment: the run's experiment with these data.
    """

    dataset: Dataset
    index: np.ndarray
    experiment: Experiment

    def __len__(self) -> int:
        return len(self.index)


def own_rows(run: FittedModel, part: str = "test") -> QueryRows:
    """Return the rows of one part of the run's own split, in the random order of the split.

    Raises:
        UserError: there is no such part, or the data have changed since the fit.
    """
    if part not in get_args(Part):
        raise SpecError(
            f"part: unknown part of the data {part!r}{nearest(part, get_args(Part))}; one of {', '.join(get_args(Part))}"
        )
    split = run_folder.read_split(run.path / run_folder.SPLIT)  # before the data, which may be gone
    data = run.data
    run_folder.check_rows(run.path / run_folder.SPLIT, split, len(data))
    return QueryRows(data, getattr(split, part), run.experiment)


def given_rows(run: FittedModel, data: Any, most: int | None = None, *, label: str | None = None) -> QueryRows:
    """Read and check rows that the run was not fitted to; flat rows take the model's shape.

    Args:
        run: the run.
        data: a path, an array or a frame.
        most: read only the first rows, at most this many.
        label: name of an array or a frame in messages.

    Raises:
        DataError: the rows do not fit the model; names file, row and column.
    """
    experiment = run.experiment
    dataset = read_like(data, layout_of(run), Path.cwd())
    if label is not None and not isinstance(data, str | Path):
        dataset = replace(dataset, name=label)
    dataset.check(values=False)
    if most is not None:
        dataset = dataset.take(slice(most))  # the rest of a memory map is not read
    dataset.check(whole=False)
    shape = run.vae.likelihood.event_shape
    if dataset.event_shape != shape:
        if int(np.prod(dataset.event_shape)) != int(np.prod(shape)):
            raise DataError(f"{dataset.name}: each datum has shape {dataset.event_shape}, the model expects {shape}")
        dataset = replace(dataset, x=dataset.x.reshape(-1, *shape), columns=None)
    try:
        check_support(run.vae, dataset, likelihood=experiment.spec.model.likelihood.name, label=experiment.label)
    except DataError as error:
        raise DataError(str(error).replace(f"{experiment.label}: data", dataset.name, 1)) from None
    return QueryRows(dataset, np.arange(len(dataset), dtype=np.int64), experiment.on(dataset))


def layout_of(run: FittedModel) -> Layout | None:
    """Return the roles of the columns: from the record in the run folder, or of the data right after a fit."""
    record = run.experiment.spec.record
    if record is None:
        return run.experiment.data.layout
    return None if record.layout is None else Layout.of(record.layout)


def query_rows(run: FittedModel, data: Any = None, *, part: str = "test") -> QueryRows:
    """Return the user's rows; without any, a part of the run's own, sorted."""
    found = own_rows(run, part) if data is None else given_rows(run, data)
    return replace(found, index=np.sort(found.index))


def provenance(run: FittedModel, dataset: Dataset | None) -> Mapping[str, str]:
    """Return experiment, data (None: those of the fit, not read), weights and versions, as attributes for output files."""
    record = run.experiment.spec.record
    theirs = run.experiment.data_sha256 if record is None else record.data_sha256
    return {
        "experiment": _text(run.path.resolve().name),
        "data": "of the fit" if dataset is None else _text(dataset.name),
        "data_sha256": theirs if dataset in (None, run.experiment.__dict__.get("data")) else dataset.fingerprint(),
        "weights_sha256": warm_start.fingerprint(run.vae.state_dict()),
        "spec_sha256": run.experiment.identity if record is None else record.experiment,
        "elbowroom": metadata.version("elbowroom"),
    }


def _text(name: str) -> str:
    """Return a file's name as text that can be stored: bytes that are no UTF-8 are written out."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def check_row(row: int, rows: QueryRows, what: str) -> None:
    """Raise a DataError, with the nearest row, if a row is not among the rows of the query."""
    if row not in rows.index:
        near = min(rows.index.tolist(), key=lambda one: abs(one - row))  # of any size: NumPy's integers end
        whose = "the test split has rows" if len(rows) < len(rows.dataset) else f"{rows.dataset.name} has rows"
        raise DataError(f"{what}: there is no row {row}; {whose} {rows.index[0]} to {rows.index[-1]}, the nearest is {near}")
