r"""Impute: missing cells by p(x_mis | x_obs), with draws of the best posterior p(z | x_obs) and, to compare, of the encoder.

Given z the entries are independent, so that observed cells inform missing ones only through z: an error of the encoder is an
error of each imputed cell. The formulas are in `analysis.queries.imputation`, the posterior in
`analysis.queries.best_posterior`.
Variables called `*_guide` are computed with draws of q(z | x), uncorrected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from elbowroom.analysis.audit.requested import Methods
from elbowroom.analysis.idata import narrowed
from elbowroom.analysis.queries.best_posterior import Reading, read
from elbowroom.analysis.queries.imputation import Predicted, predict_cells, worth
from elbowroom.errors import DataError, SpecError, UserError, nearest
from elbowroom.queries.answer import Form
from elbowroom.queries.impute.answer import Imputed, conclude
from elbowroom.queries.impute.cells import Entries, asked_holes, holes, named_entries, sequential
from elbowroom.queries.stream import described, ending, foreseen, place_of, references_for, stream
from elbowroom.runs.rows import layout_of, query_rows
from elbowroom.system.files import sha256

if TYPE_CHECKING:
    from elbowroom.analysis.plots.style import Absent, Plot
    from elbowroom.inference.posterior import Reference
    from elbowroom.queries.stream import Chunk, Report
    from elbowroom.runs.fitted import FittedModel

CELLS = 2**23  # draws of missing cells in memory at once
SEED_STEP = 49_979_687  # between the seeds of draws of z and of x
UNITS = "units of the data"
WORDS: dict[str, tuple[str, str]] = {
    "point": (UNITS, "what a completed row has: the mean of numbers, the median of counts, the likeliest code"),
    "mean": (UNITS, "E[x|x_obs]; the probability of 1 where values are 0 and 1; none of categories"),
    "mean_error": (UNITS, "Monte Carlo standard error of mean"),
    "sd": (UNITS, "standard deviation of p(x|x_obs)"),
    "median": (UNITS, "median of p(x|x_obs)"),
    "low": (UNITS, "lower end of the central interval of p(x|x_obs)"),
    "high": (UNITS, "upper end of the central interval of p(x|x_obs)"),
    "likeliest": ("", "the likeliest code; none of numbers"),
    "probability": ("1", "probability of each level of the missing cells of coded columns"),
    "probability_error": ("1", "Monte Carlo standard error of probability"),
    "rank": ("1", "randomised rank of the hidden value among draws; uniform where p(x|x_obs) is right"),
    "log_density": ("nats", "log p of the hidden value given x_obs, of each cell alone"),
    "log_density_joint": ("nats", "estimate of the log density of all hidden values of the row given x_obs"),
    "truth": (UNITS, "the value that was hidden"),
    "samples": (UNITS, "completed rows: draws of the missing cells together, what was seen as it was"),
    "cells": ("", "missing cells of the row"),
    "pareto_k": ("1", "k-hat of the guide's importance weights given what was seen"),
    "source": ("", "where the draws of p(z|x_obs) come from"),
    "status": ("", "of these draws: exact, certified, uncertified, or amortized: the guide as it is"),
    "reason": ("", "why"),
}
PER_CELL = ("mean", "mean_error", "sd", "median", "low", "high", "likeliest")
SCORED = ("rank", "log_density")


def imputer(
    run: FittedModel,
    entries: Entries,
    methods: Sequence[Reference],
    *,
    level: float,
    draws: int,
    keep: int,
    samples: int = 0,
    truth: np.ndarray | None = None,
    wanted: np.ndarray | None = None,
    replicate: bool = False,
) -> Callable[[Chunk], xr.Dataset]:
    """Return a function that imputes one chunk of rows.

    Args:
        run: the run.
        entries: entries of its data.
        methods: references, best first.
        level: level of the intervals.
        draws: draws per row for the guide's estimates and importance weights.
        keep: draws per row of the posterior, with one draw of x for each.
        samples: completed draws that the answer contains.
        truth: (N, *event) values of hidden cells, NaN elsewhere; the answer scores these.
        wanted: (*event), entries to impute; all by default.
        replicate: nothing was hidden: predict a new draw of every observed cell given z.
    """
    vae = run.vae
    dtype = run.experiment.dtype

    def answer(chunk: Chunk) -> xr.Dataset:
        found = read(chunk.log_joint, methods, draws=draws, keep=keep, seed=chunk.seed, until=chunk.until)
        x = chunk.batch["x"]
        known = x if replicate else None if truth is None else torch.from_numpy(truth[chunk.rows]).to(x)
        missing = holes(x, padded=sequential(run)) if known is None else ~known.isnan()
        out = _Columns(entries, len(x), scored=known is not None, samples=samples, dtype=x.cpu().numpy().dtype)
        flat = missing.flatten(1)
        if wanted is not None:
            flat = flat & torch.from_numpy(wanted.ravel()).to(flat.device)
        for way, (z, repeats) in _ways(found).items():
            for number, part in enumerate(_parts(flat, len(z))):
                beside: dict[str, Any] = {name: v[part] for name, v in chunk.batch.items() if name != "x"}
                filled = None
                if known is not None:
                    inside = torch.as_tensor(vae.likelihood.inside, dtype=x.dtype, device=x.device)
                    filled = torch.where(known[part].isnan(), inside, known[part]).flatten(1)
                predicted = predict_cells(
                    lambda z, beside=beside: vae.decode(z, **beside),  # type: ignore[misc]
                    z[:, part].to(x.device, dtype),
                    flat[part],
                    entries.kinds,
                    level=level,
                    seed=chunk.seed + SEED_STEP + number,
                    repeats=repeats[:, part],
                    truth=filled,
                    keep=samples if way == "" else 0,
                )
                out.put(way, part.cpu().numpy(), flat[part].cpu().numpy(), predicted, x[part].flatten(1).cpu().numpy())
        return out.dataset(found, flat.sum(1).cpu().numpy(), None if known is None else known.cpu().numpy())

    return answer


def _ways(found: Reading) -> dict[str, tuple[Tensor, Tensor]]:
    """Return draws of z (S, n, d) by the best posterior and by the guide, each with its repetitions; see `worth`."""
    best, guide = found.posterior, found.guide
    ones = torch.ones(guide.draws.flatten(0, 1).shape[:2], dtype=torch.float64)
    return {
        "": (best.sites["z"].flatten(0, 1), worth(best, found.references, found.source)),
        "_guide": (guide.sites["z"].flatten(0, 1), ones),
    }


def _parts(missing: Tensor, s: int) -> Iterator[Tensor]:
    """Yield groups of rows whose draws of missing cells stay within `CELLS`."""
    size = (missing.sum(1) * s).cumsum(0) // CELLS
    for number in size.unique().tolist():
        yield (size == number).nonzero()[:, 0]


class _Columns:
    """The arrays of an answer, (n, D), NaN where nothing was imputed."""

    def __init__(self, entries: Entries, n: int, *, scored: bool, samples: int, dtype: np.dtype[Any]) -> None:
        self.entries, self.n, self.scored, self.dtype = entries, n, scored, dtype  # the model's: float32 would add rounding
        width, labels = len(entries.names), len(entries.labels())
        names = [*PER_CELL, *(SCORED if scored else ())]
        blank = lambda *shape: np.full(shape, np.nan, dtype=np.float64)
        self.cells = {name + way: blank(n, width) for way in ("", "_guide") for name in names}
        self.levels = {
            name + way: blank(n, labels) for way in ("", "_guide") for name in ("probability", "probability_error") if labels
        }
        self.rows = {"log_density_joint" + way: blank(n) for way in ("", "_guide") if scored}
        self.samples = np.full((samples, n, width), np.nan, dtype=dtype) if samples else None

    def put(self, way: str, part: np.ndarray, missing: np.ndarray, found: Predicted, x: np.ndarray) -> None:
        """Store the results of some rows."""
        rows, columns = missing.nonzero()
        numpy = lambda tensor: tensor.cpu().numpy()
        for name in [*PER_CELL, *(SCORED if self.scored else ())]:
            self.cells[name + way][part[rows], columns] = numpy(getattr(found, name))
        if self.scored:
            self.rows["log_density_joint" + way][part] = numpy(found.log_density_joint)
        starts = self.entries.starts()
        for of in found.levels:
            cells = numpy(of.cells)
            for j in np.unique(columns[cells]):
                if int(j) in starts:
                    mine = columns[cells] == j
                    at = starts[int(j)]
                    span = slice(at, at + of.probability.shape[1])
                    self.levels["probability" + way][part[rows[cells[mine]]], span] = numpy(of.probability)[mine]
                    self.levels["probability_error" + way][part[rows[cells[mine]]], span] = numpy(of.error)[mine]
        for j, at in starts.items():  # binary columns with texts: their mean is the probability of the second level
            mine = columns == j
            if self.entries.kinds[j] == "binary" and mine.any():
                p, error = numpy(found.mean)[mine], numpy(found.mean_error)[mine]
                self.levels["probability" + way][part[rows[mine]], at : at + 2] = np.stack([1 - p, p], 1)
                self.levels["probability_error" + way][part[rows[mine]], at : at + 2] = error[:, None]
        if self.samples is not None and way == "":
            self.samples[:, part] = np.where(missing, numpy(found.draws), x)

    def dataset(self, found: Reading, count: np.ndarray, truth: np.ndarray | None) -> xr.Dataset:
        """Return the answer as a dataset."""
        entries, n = self.entries, self.n
        dims, shaped = entries.dims, lambda value: value.reshape(*value.shape[:-1], *entries.shape)
        kinds = np.array(entries.kinds)
        for way in ("", "_guide"):
            c = self.cells
            number = np.where(np.isfinite(c["mean" + way]), c["mean" + way], c["median" + way])
            point = np.where(kinds == "number", number, np.where(kinds == "count", c["median" + way], c["likeliest" + way]))
            self.cells["point" + way] = point
        about = lambda name: dict(zip(("units", "long_name"), WORDS[name.removesuffix("_guide")], strict=True))
        words = lambda name: about(name) if not name.endswith("_guide") else _by_guide(about(name))
        data: dict[str, Any] = {
            name: (("obs_id", *dims), narrowed(shaped(value), self.dtype), words(name)) for name, value in self.cells.items()
        }
        data |= {name: (("obs_id", "level"), value.astype(np.float32), words(name)) for name, value in self.levels.items()}
        data |= {name: ("obs_id", value, words(name)) for name, value in self.rows.items()}
        if truth is not None:
            data["truth"] = (("obs_id", *dims), narrowed(truth.reshape(n, *entries.shape), self.dtype), about("truth"))
        if self.samples is not None:
            data["samples"] = (("sample", "obs_id", *dims), shaped(self.samples), about("samples"))
        rows = {
            "cells": count,
            "pareto_k": found.guide.stats["pareto_k"].cpu().numpy(),
            "source": np.array(found.source),
            "status": np.array(found.posterior.status),
            "reason": np.array(found.posterior.reason),
        }
        data |= {name: ("obs_id", value, about(name)) for name, value in rows.items()}
        coords: dict[str, Any] = {"column": list(entries.names)} if dims == ("column",) else {}
        return xr.Dataset(data, coords={**coords, **({"level": entries.labels()} if self.levels else {})})


def _by_guide(about: Mapping[str, str]) -> dict[str, str]:
    return {**about, "long_name": f"{about['long_name']}; by the encoder's own draws, uncorrected"}


def ask(
    run: FittedModel,
    data: Any,
    *,
    hidden: Any = None,
    of: Sequence[str] | None = None,
    references: Methods = "auto",
    level: float = 0.9,
    samples: int = 0,
    draws: int = 1_000,
    keep: int = 1_000,
    seed: int | None = None,
    device: str | None = None,
    report: Report | None = None,
    out: Path | None = None,
    resume: bool = False,
    budget: float | str | None = None,
    dry_run: bool = False,
) -> Imputed:
    """Impute; arguments and errors as `Run.impute`."""
    check_level(level, keep)
    (plain, form), until = Form.of(data), ending(budget)
    rows, place = query_rows(run, plain), place_of(run, device)
    seed = run.experiment.spec.seed if seed is None else seed
    entries, padded = Entries.of(run, rows), sequential(run)
    wanted = None if of is None else named_entries(of, entries)
    holed, truth, numbers = asked_holes(rows, run, hidden, wanted, seed, entries)
    methods = references_for(run, holed, references, place)
    if dry_run:
        counts = {"with missing cells": len(holed)}
        dataset, plan = foreseen(run, holed, methods, draws=draws, counts=counts, device=place)
        return Imputed(dataset, plan, form, entries=entries, original=rows.dataset, given=data, rows=rows.index)
    options = {
        "references": described(methods), "level": level, "samples": samples, "draws": draws, "keep": keep,
        "of": None if of is None else list(of), "hide": None if truth is None else sha256(np.isnan(truth).tobytes()),
    }  # fmt: skip
    compute = imputer(
        run, entries, methods, level=level, draws=draws, keep=max(keep, samples), samples=samples, truth=truth, wanted=wanted
    )
    found = stream(
        run, holed, compute, question="impute", options=options, seed=seed, device=place, out=out, resume=resume, report=report,
        until=until,
    )  # fmt: skip
    found = found.assign_coords(obs_id=numbers).assign_attrs(answers="impute", level=level)
    if form.index is not None:
        form = replace(form, index=form.index[numbers])
    answer = Imputed(found, (), form, entries=entries, original=rows.dataset, given=data, rows=rows.index)
    said = conclude(answer, marks=run.vae.posterior.marks, padded=padded)
    return replace(answer, said=said, drawings=drawings(answer))


def check_level(level: float, keep: int) -> None:
    """Raise a SpecError if an interval of this level cannot be estimated from so many draws."""
    if not 0 < level < 1:
        raise SpecError(f"level: must be between 0 and 1, such as 0.9, got {level:g}")
    least = math.ceil(2 / (1 - level))
    if keep < least:
        raise SpecError(f"keep: intervals of {level:g} need {least:,} draws at least, got {keep:,}")


def condition(run: FittedModel, known: Mapping[str, Any], of: Sequence[str] | None = None, **options: Any) -> Imputed:
    """Impute one row of which only some columns are known; arguments and errors as `Run.condition`."""
    import pandas as pd

    layout = layout_of(run)
    given = {str(name): value for name, value in known.items()}
    if layout is None or layout.x is None:
        width = run.vae.likelihood.width
        if len(run.vae.likelihood.event_shape) != 1:
            raise UserError("condition: is for tables; for images and sequences use impute, with NaN where a cell is missing")
        _known_names(given, [str(i) for i in range(width)])
        x = np.full((1, width), np.nan)
        for name, value in given.items():
            x[0, int(name)] = np.nan if value is None else float(value)
        return ask(run, x, of=of, **options)
    beside = [name for option, name in layout.others() if option != "data.labels"]
    _known_names(given, [*layout.x, *beside])
    for name in beside:
        if name not in given:
            raise DataError(f"condition: {name!r} stands beside x in this model and must be known; give it a value")
    row = {name: [given.get(name)] for name in [*layout.x, *beside]}
    return ask(run, pd.DataFrame(row), of=of, **options)


def _known_names(given: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in given:
        if name not in names:
            raise DataError(f"condition: there is no column {name!r}{nearest(name, names)}")


def drawings(answer: Imputed) -> list[Callable[[], Plot | Absent]]:
    """Return functions that draw the figures: imputed images, and the coverage of intervals."""

    def images() -> Plot | Absent:
        from elbowroom.analysis.plots.queries import imputation as plots_imputation

        x = np.asarray(answer.original.x[answer.dataset["obs_id"].values], dtype=np.float64)
        return plots_imputation.images(answer.dataset, x, answer.entries.shape)

    def coverage() -> Plot | Absent:
        from elbowroom.analysis.plots.queries import imputation as plots_imputation

        return plots_imputation.coverage(answer.dataset)

    return [images, coverage]
