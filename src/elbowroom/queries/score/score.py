r"""Score: log p(x) of each row with its kind and error, and whether the row resembles the rows of the fit.

Rows are compared with calibration rows, by default the run's validation split, whose scores come from the same estimator; see
`analysis.queries.novelty` for what the comparison guarantees. Scores of the calibration rows and of rows simulated from the
model are kept in `RUN/answers/`, in files named by a hash of everything that they depend on.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from elbowroom.analysis import idata
from elbowroom.analysis.audit.requested import Methods
from elbowroom.analysis.measures import gaps
from elbowroom.analysis.measures.evidence_kinds import NONE
from elbowroom.analysis.measures.table import GOOD_K
from elbowroom.analysis.queries.best_posterior import read
from elbowroom.analysis.queries.novelty import enough, judge, outside
from elbowroom.errors import DataError, SpecError, UnsupportedProgram, nearest
from elbowroom.inference.target.simulate import simulate
from elbowroom.models import measure
from elbowroom.queries import stream as streaming
from elbowroom.queries.answer import Answer, Form
from elbowroom.queries.score.conclusions import conclude
from elbowroom.runs.rows import given_rows, own_rows, provenance, query_rows
from elbowroom.spec import run_folder
from elbowroom.system.files import refuse_links, sha256

if TYPE_CHECKING:
    from elbowroom.analysis.plots.style import Absent, Plot
    from elbowroom.inference.posterior import Reference
    from elbowroom.inference.target.log_joint import LogJoint
    from elbowroom.models.vae import VAE, Batch
    from elbowroom.queries.stream import Chunk, Report
    from elbowroom.runs.fitted import FittedModel
    from elbowroom.runs.rows import QueryRows

KEEP = 400  # draws per row with which references check themselves
CALIBRATION_STEP, SIMULATION_STEP = 49_979_687, 67_867_967  # between seeds, so that compared rows do not share noise
KINDS = {"pattern": "pattern", "count": "observed"}
WORDS: dict[str, tuple[str, str]] = {
    "log_evidence": ("nats", "log p(x) of the cells that are there, NaN where only a bound is known"),
    "log_evidence_se": ("nats", "numerical or standard error of log_evidence"),
    "log_evidence_lower": ("nats", "lower end of what log p(x) may be"),
    "log_evidence_upper": ("nats", "upper end, NaN where there is none"),
    "evidence_method": ("", "which kind of number log_evidence is"),
    "evidence_reason": ("", "why this kind"),
    "bits_per_dimension": ("bits", "-log2 p(x) / cells, of discrete data without holes"),
    "bits_per_dimension_se": ("bits", "numerical or standard error of bits_per_dimension"),
    "elbo": ("nats", "ELBO of the encoder"),
    "elbo_se": ("nats", "standard error of elbo over its draws"),
    "rate": ("nats", "KL(q(z|x) || p(z))"),
    "distortion": ("nats", "-E_q log p(x|z), the reconstruction error"),
    "pareto_k": ("1", f"k-hat of the guide's importance weights; above {GOOD_K} they cannot correct it"),
    "gap_total": ("nats", "log_evidence - elbo"),
    "gap_total_se": ("nats", "error of gap_total"),
    "gap_amortization": ("nats", "L[q*] - elbo: what the encoder misses of its own family"),
    "gap_amortization_se": ("nats", "standard error of gap_amortization"),
    "observed": ("1", "cells that are there"),
    "pattern": ("", "the same number for rows with the same holes; 0 without"),
}


def ask(
    run: FittedModel,
    data: Any,
    *,
    references: Methods,
    band: str | Sequence[float],
    fdr: float,
    calibration: Any,
    most: int,
    simulated: int,
    holes: Literal["pattern", "count"],
    gaps: bool,
    draws: int,
    seed: int | None,
    device: str | None,
    report: Report | None,
    out: Path | None,
    resume: bool,
    budget: float | str | None,
    dry_run: bool,
) -> Answer:
    """Score rows; arguments and errors as `Run.score`."""
    given, form = Form.of(data)
    ends = band_of(band)
    check_options(fdr, most, simulated, holes)
    valid = calibration_rows(run, Form.of(calibration)[0], most)
    check_enough(valid, ends)
    until = streaming.ending(budget)
    rows, place = query_rows(run, given), streaming.place_of(run, device)
    methods = streaming.references_for(run, rows, references, place)
    if dry_run:
        counts = {"to score": len(rows), "to compare with": len(valid), "simulated": min(simulated, len(valid))}
        return Answer(*streaming.foreseen(run, rows, methods, draws=draws, counts=counts, device=place), form)
    found = screened(
        run, rows, methods, calibration=valid, simulated=simulated, band=ends,
        fdr=fdr, holes=holes, refit=gaps, draws=draws, seed=run.experiment.spec.seed if seed is None else seed,
        stream={"device": place, "out": out, "resume": resume, "report": report, "until": until},
    )  # fmt: skip
    return Answer(found, conclude(found), form, [drawing(found)])


def band_of(text: str | Sequence[float], where: str = "band") -> tuple[float, float]:
    """Return the two percentiles of a text such as `2.5-97.5`; a SpecError for other texts."""
    try:
        ends = [float(part) for part in (text.split("-") if isinstance(text, str) else text)]
    except ValueError:
        ends = []
    if len(ends) != 2 or not 0 <= ends[0] < ends[1] <= 100 or ends[1] - ends[0] == 100:
        raise SpecError(f"{where}: {text} is no band of percentiles; write it as 2.5-97.5")
    return ends[0], ends[1]


def scorer(
    vae: VAE, methods: Sequence[Reference], *, draws: int, refit: bool = False, simulated: bool = False
) -> Callable[[Chunk], xr.Dataset]:
    """Return a function that scores one chunk of rows.

    Args:
        vae: the VAE, on the device.
        methods: references, best first.
        draws: draws per row for the guide's estimates and importance weights.
        refit: refit the guide's family to each row, for the amortization gap.
        simulated: score rows simulated from the model in place of the chunk's, with the same covariates and missing cells.
    """
    mass = measure.kind(vae) == measure.MASS

    def answer(chunk: Chunk) -> xr.Dataset:
        log_joint = simulate(chunk.log_joint, chunk.seed + 1)[0] if simulated else chunk.log_joint
        columns = _scores(log_joint, methods, draws, chunk.seed, chunk.until)
        if refit:
            found = gaps.refitted(log_joint)
            columns |= {f"gap_{name}": found[name].cpu().numpy() for name in ("amortization", "amortization_se")}
        columns |= _holes(chunk.batch["x"])
        if mass:
            cells = int(np.prod(chunk.batch["x"].shape[1:]))
            whole = np.where(columns["observed"] == cells, cells * np.log(2), np.nan)
            columns["bits_per_dimension"] = -columns["log_evidence"] / whole
            columns["bits_per_dimension_se"] = columns["log_evidence_se"] / whole
        about = {name: {"units": WORDS[name][0], "long_name": WORDS[name][1]} for name in WORDS}
        return xr.Dataset({name: ("obs_id", columns[name], about[name]) for name in WORDS if name in columns})

    return answer


def _scores(log_joint: LogJoint, methods: Sequence[Reference], draws: int, seed: int, until: float) -> dict[str, np.ndarray]:
    """Return the guide's estimates and the evidence of each row."""
    found = read(log_joint, methods, draws=draws, keep=KEEP, seed=seed, until=until)
    evidence = found.evidence
    guide = {
        name: found.guide.stats[name].double().cpu().numpy() for name in ("elbo", "elbo_se", "rate", "distortion", "pareto_k")
    }
    return {
        "log_evidence": evidence.value,
        "log_evidence_se": evidence.error,
        "log_evidence_lower": evidence.lower,
        "log_evidence_upper": evidence.upper,
        "evidence_method": _once(evidence.method),
        "evidence_reason": _once(evidence.reason),
        **guide,
        "gap_total": evidence.value - guide["elbo"],
        "gap_total_se": np.hypot(evidence.error, guide["elbo_se"]),
    }


def unable(vae: VAE, *, refit: bool) -> Callable[[Batch, str], xr.Dataset]:
    """Return a function that makes the answer for a row at which the model cannot be evaluated: unknown log p(x), and why."""
    left_out = set() if measure.kind(vae) == measure.MASS else {"bits_per_dimension", "bits_per_dimension_se"}
    left_out |= set() if refit else {"gap_amortization", "gap_amortization_se"}

    def answer(batch: Batch, reason: str) -> xr.Dataset:
        columns: dict[str, np.ndarray] = {name: np.array([np.nan]) for name in WORDS if name not in left_out}
        columns |= {"log_evidence_lower": np.array([-np.inf]), **_holes(batch["x"])}
        columns |= {"evidence_method": np.array([NONE], dtype=object), "evidence_reason": np.array([reason], dtype=object)}
        return xr.Dataset({name: ("obs_id", value) for name, value in columns.items()})

    return answer


def _once(texts: np.ndarray) -> np.ndarray:
    """Return the same texts as objects, each text stored once in memory."""
    different, place = np.unique(texts, return_inverse=True)
    found: np.ndarray = different.astype(object)[place]
    return found


def _holes(x: Tensor) -> dict[str, np.ndarray]:
    """Return the number of observed cells of each row, and a number that identifies its pattern of missing cells."""
    missing = x.isnan().flatten(1).cpu().numpy() if x.is_floating_point() else np.zeros((len(x), x[0].numel()), dtype=bool)
    number = lambda row: int.from_bytes(bytes.fromhex(sha256(np.packbits(row).tobytes())[:14]), "big") if row.any() else 0
    pattern = np.array([number(row) for row in missing], dtype=np.int64)
    return {"observed": (~missing).sum(1).astype(np.int64), "pattern": pattern}


def calibration_rows(run: FittedModel, data: Any, most: int) -> QueryRows:
    """Return the first `most` rows of the validation split or of the user's rows; a UserError if there are none."""
    found = own_rows(run, "validation") if data is None else given_rows(run, data)
    if not len(found):
        raise SpecError(
            f"{run.path}: the run has no validation rows to compare with; fit with a part of data.split for them, or name rows "
            "that the model has not seen with --calibration"
        )
    return replace(found, index=np.sort(found.index[:most]))


def check_options(fdr: float, most: int, simulated: int, holes: str) -> None:
    """Raise a SpecError for options outside their range."""
    if not 0 < fdr < 1:
        raise SpecError(f"fdr: {fdr:g} is no rate; use one between 0 and 1, such as 0.1")
    for name, number, least in (("most", most, 1), ("simulated", simulated, 0)):
        if number < least:
            raise SpecError(f"{name}: {number} rows; use {least} or more")
    if holes not in KINDS:
        raise SpecError(f"holes: unknown {holes!r}{nearest(holes, KINDS)}; one of {', '.join(KINDS)}")


def check_enough(rows: QueryRows, band: tuple[float, float]) -> None:
    """Raise a DataError if so few calibration rows cannot give p-values outside the band."""
    n, level = len(rows), outside(band)
    if n < enough(level):
        raise DataError(
            f"{rows.dataset.name}: {n} calibration rows give two-sided p-values of {2 / (n + 1):.3g} at least, and the band "
            f"leaves {level:.3g} outside, which needs {enough(level)} rows; use a narrower --band, or more rows (--calibration)"
        )


def kept(
    run: FittedModel,
    rows: QueryRows,
    compute: Callable[[Chunk], xr.Dataset],
    *,
    question: str,
    options: Mapping[str, Any],
    seed: int,
    device: torch.device,
    report: Report | None,
    until: float = math.inf,
) -> xr.Dataset:
    """Return scores of comparison rows from `RUN/answers/`; compute and store them there if they are missing.

    Args:
        run: the run; if its folder is not writable, nothing is stored.
        rows: the rows.
        compute: returns the scores of one chunk.
        question: kind of the scores, the beginning of the file's name.
        options: everything that the scores depend on, apart from weights and data.
        seed: random seed.
        device: where to compute.
        report: as in `queries.stream.stream`.
        until: likewise; what a budget cut short is not stored.
    """
    facts = {name: value for name, value in provenance(run, rows.dataset).items() if name not in ("experiment", "data")}
    identity = {**facts, **options, "seed": seed, "device": device.type, "torch": metadata.version("torch")}
    name = f"{question}-{streaming.key_of([identity], rows)}.nc"
    path = run.path / run_folder.ANSWERS / name if os.access(run.path, os.W_OK) else None
    if path is not None:
        refuse_links(run.path)
    if (there := streaming.kept(path)) is not None:
        return there
    found = streaming.stream(
        run, rows, compute, question=question, options=options, seed=seed, device=device, out=path, resume=True, report=report,
        until=until,
    )  # fmt: skip
    if path is not None and streaming.CUT not in found.attrs:
        idata.write(found, path)
        streaming.finish(path)
    return found


def screened(
    run: FittedModel,
    rows: QueryRows,
    methods: Sequence[Reference],
    *,
    calibration: QueryRows,
    simulated: int,
    band: tuple[float, float],
    fdr: float,
    holes: str,
    refit: bool,
    draws: int,
    seed: int,
    stream: Mapping[str, Any],
) -> xr.Dataset:
    """Score rows and their comparison rows in the same way; return both, with p-values and decisions.

    Args:
        run: the run.
        rows: the rows.
        methods: references, best first.
        calibration: the rows to compare with.
        simulated: number of rows to simulate, with the covariates and missing cells of calibration rows; at most as many.
        band: percentiles.
        fdr: false-discovery rate.
        holes: compare rows with the same missing cells (`pattern`), or with as many (`count`).
        refit: see `scorer`.
        draws: see `scorer`.
        seed: random seed.
        stream: device, out, resume and report, as in `queries.stream.stream`.
    """
    options = {"references": streaming.described(methods), "draws": draws, "keep": KEEP}
    made = replace(calibration, index=_spread(calibration.index, simulated))
    total = len(calibration) + len(made) + len(rows)
    report, place, until = stream.get("report"), stream["device"], stream.get("until", math.inf)
    began = time.monotonic()
    part = lambda n: until if math.isinf(until) else began + (until - began) * n / total  # each has its share of the time
    after = lambda before: None if report is None else lambda done, _: report(before + done, total)
    calibrated = kept(
        run, calibration, scorer(run.vae, methods, draws=draws),
        question="calibration", options=options, seed=seed + CALIBRATION_STEP, device=place, report=after(0),
        until=part(len(calibration)),
    )  # fmt: skip
    simulations, why = None, ""
    if len(made):
        try:
            simulations = kept(
                run, made, scorer(run.vae, methods, draws=draws, simulated=True),
                question="simulated", options=options, seed=seed + SIMULATION_STEP, device=place,
                report=after(len(calibration)), until=part(len(calibration) + len(made)),
            )  # fmt: skip
        except UnsupportedProgram as error:
            why = str(error)
    found = streaming.stream(
        run, rows, scorer(run.vae, methods, draws=draws, refit=refit), question="score", options={**options, "refit": refit},
        seed=seed, unable=unable(run.vae, refit=refit), **{**stream, "report": after(len(calibration) + len(made))},
    )  # fmt: skip
    judged = judge(found, calibrated, simulations, band=band, fdr=fdr, kind=KINDS[holes])
    judged["compared_with"].attrs["long_name"] = (
        f"calibration rows with {'the same holes' if holes == 'pattern' else 'as many cells that are there'}"
    )
    joined = found.merge(judged, combine_attrs="override")
    for name, others in (("calibration", calibrated), ("simulated", simulations)):
        if others is not None:
            attrs = {"units": "nats", "long_name": f"log p(x) of the {name} rows"}
            joined[f"{name}_log_evidence"] = (f"{name}_row", others["log_evidence"].values, attrs)
    return joined.assign_attrs(
        answers="score", band=list(band), fdr=fdr, holes=holes,
        calibration=calibration.dataset.name, calibration_rows=len(calibration),
        calibration_mixed=int(len(np.unique(calibrated[KINDS[holes]].values)) > 1),
        not_simulated=why,
    )  # fmt: skip


def _spread(index: np.ndarray, number: int) -> np.ndarray:
    """Return at most `number` of the rows, evenly spaced."""
    return index[np.linspace(0, len(index) - 1, min(number, len(index))).round().astype(int)]


def drawing(dataset: xr.Dataset) -> Callable[[], Plot | Absent]:
    """Return a function that draws the answer's figure."""

    def draw() -> Plot | Absent:
        from elbowroom.analysis.plots.queries.novelty import screening

        return screening(dataset)

    return draw
