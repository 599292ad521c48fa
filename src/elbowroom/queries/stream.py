"""Queries on many rows in chunks: bounded memory, progress reports, and continuation of interrupted commands.

If the answer goes to a file, each finished chunk is kept beside it in `<file>.parts/`, named by a hash of everything that it
depends on, until all chunks are joined. The result of a chunk depends on its position, not on other chunks.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr

from elbowroom.analysis import idata
from elbowroom.analysis.audit.cost import Pilot
from elbowroom.analysis.audit.requested import Methods
from elbowroom.analysis.queries.best_posterior import methods_for
from elbowroom.errors import DataError, RunFolderError, UnsupportedProgram
from elbowroom.inference.compiled.policies import expecting
from elbowroom.inference.fit.plan import resolve_device
from elbowroom.inference.target.of_vae import log_joint_of
from elbowroom.runs.rows import provenance
from elbowroom.system import durations, memory
from elbowroom.system.files import claimed, refuse_link, sha256
from elbowroom.system.stages import stage

if TYPE_CHECKING:
    from elbowroom.inference.posterior import Reference
    from elbowroom.inference.target.log_joint import LogJoint
    from elbowroom.models.vae import VAE, Batch
    from elbowroom.runs.fitted import FittedModel
    from elbowroom.runs.rows import QueryRows

SIZE, FINER = 500, 100  # rows in a chunk, without and with a budget
CUT = "budget_ended"  # attribute of an answer that the budget cut short
PILOT = 64  # rows on which times are measured
FEW = 4  # rows at which is tried whether rows are coupled
DATUM = re.compile(r"\bdatum (\d+)\b")
SEED_STEP = 104_711  # between the seeds of chunks: with shared noise, standard errors of means would be too small
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Chunk:
    """Some rows, on the device.

    Attributes:
        log_joint: the log joint of model, guide and these rows.
        batch: the arguments of model and guide: `x` (n, *event), NaN where missing, and `covariates`, `exposure`.
        rows: their numbers in the data, (n,).
        seed: random seed of this chunk.
        until: value of `time.monotonic()` after which no reference starts.
    """

    log_joint: LogJoint
    batch: Batch
    rows: np.ndarray
    seed: int
    until: float = math.inf


def stream(
    run: FittedModel,
    rows: QueryRows,
    compute: Callable[[Chunk], xr.Dataset],
    *,
    question: str,
    options: Mapping[str, Any],
    seed: int,
    device: torch.device,
    out: Path | None = None,
    resume: bool = False,
    report: Report | None = None,
    size: int = SIZE,
    until: float = math.inf,
    unable: Callable[[Batch, str], xr.Dataset] | None = None,
) -> xr.Dataset:
    """Apply `compute` to rows chunk by chunk, and join the results along `obs_id`.

    Args:
        run: the fitted run.
        rows: the data and the selected rows.
        compute: returns the answer of one chunk, over `obs_id`; the labels are added here.
        question: name of the query, part of the identity of stored chunks.
        options: everything else that the result depends on.
        seed: random seed.
        device: where to compute.
        out: the file that the caller will write; chunks are stored beside it.
        resume: use stored chunks; else they are removed.
        report: called as report(rows done, rows in all) before the first chunk and after each.
        size: rows in a chunk; fewer where there is a budget, which is looked at between chunks.
        until: value of `time.monotonic()` at which the budget ends: later rows have the encoder's own numbers, and say so.
        unable: called with a row at which the model cannot be evaluated and the reason; returns the answer for this row. By
            default such a row is an error.

    Returns:
        The joined dataset, whose attributes name run, data and weights.

    Raises:
        RunFolderError: another process computes the same answer, or the folder of its chunks is a link.
        UnsupportedProgram: the model cannot be evaluated at a row; names the row.
        DataError: q(z|x) of a row depends on the rows beside it, and there are several chunks.
    """
    attributes, size = provenance(run, rows.dataset), size if math.isinf(until) else min(size, FINER)
    identity = {**attributes, **options, "seed": seed, "size": size, "device": device.type, "torch": metadata.version("torch")}
    key = key_of([question, identity], rows)
    say, total, found = report or (lambda done, total: None), len(rows.index), []
    folder = None if out is None else parts_of(out)
    late = False
    vae = run.vae.to(device)
    with ExitStack() as stack:
        if out is not None and folder is not None:
            stack.enter_context(claimed(out))
            refuse_link(folder)
            if folder.exists() and not resume:
                shutil.rmtree(folder)
        stack.enter_context(expecting(total))
        if total > size:
            _refuse_coupled(
                vae, {name: value.to(device) for name, value in rows.experiment.batch(rows.index[:FEW]).items()}, size
            )
        say(0, total)
        for number, place in enumerate(memory.slices(total, size)):
            some = rows.index[place]
            path = None if folder is None else folder / f"{key}-{place.start:09d}.nc"
            part = kept(path)
            if part is None:
                batch = {name: value.to(device) for name, value in rows.experiment.batch(some).items()}
                part = _computed(vae, batch, some, (seed + SEED_STEP * number, until), compute, unable).sel(obs_id=some)
                late = time.monotonic() > until
                if path is not None and not late:  # what the budget cut short is computed in full by --resume
                    with stage("parts kept"):
                        idata.write(part, path)
            found.append(part)
            memory.trim()
            say(place.stop, total)
    joined = _joined(found)
    about = {"question": question, "options": json.dumps(dict(options), default=str), **({CUT: 1} if late else {})}
    return joined.assign_attrs({**attributes, **about})


def _refuse_coupled(vae: VAE, few: Batch, size: int) -> None:
    """Refuse an encoder whose q(z|x) of a row depends on the rows beside it; tried at a few rows."""
    with contextlib.suppress(UnsupportedProgram):  # of one of these rows: said where its chunk is computed
        joint = log_joint_of(vae, few)
        if not joint.separable():
            why = joint.notes[-1].partition(";")[0] if joint.notes else "the model does not run on a part of the rows"
            raise DataError(f"answers would depend on how rows are divided into chunks: ask at most {size} at once ({why})")


def _computed(
    vae: VAE,
    batch: Batch,
    some: np.ndarray,
    seed_until: tuple[int, float],
    compute: Callable[[Chunk], xr.Dataset],
    unable: Callable[[Batch, str], xr.Dataset] | None,
) -> xr.Dataset:
    """Compute one chunk; a row at which the model cannot be evaluated gets the answer of `unable`, if there is one."""
    try:
        with stage("rows"):
            return compute(Chunk(log_joint_of(vae, batch), batch, some, *seed_until)).assign_coords(obs_id=some)
    except UnsupportedProgram as error:  # its message counts data from the start of the chunk
        found = DATUM.search(str(error))
        reason = DATUM.sub(lambda match: f"row {some[int(match[1])]}", str(error))
        if unable is None or found is None:
            raise UnsupportedProgram(reason) from error
        row = int(found[1])
    alone = {name: value[row : row + 1] for name, value in batch.items()}
    instead = unable(alone, reason).assign_coords(obs_id=some[row : row + 1])
    if len(some) == 1:
        return instead
    others = torch.arange(len(some)) != row
    left = {name: value[others.to(value.device)] for name, value in batch.items()}
    return _joined([_computed(vae, left, some[others.numpy()], seed_until, compute, unable), instead])


def place_of(run: FittedModel, device: str | None) -> torch.device:
    """Return the requested device, by default that of the spec; a UserError if it does not exist."""
    return resolve_device(device or run.experiment.spec.fit.device)


def ending(budget: float | str | None) -> float:
    """Return the value of `time.monotonic()` at which a budget ends; a UserError if it is not a time."""
    return time.monotonic() + durations.seconds(budget)


def references_for(run: FittedModel, rows: QueryRows, references: Methods, device: torch.device) -> list[Reference]:
    """Return the references for posteriors, chosen with the model at a few rows; a UserError if one cannot be used."""
    few = {name: value.to(device) for name, value in rows.experiment.batch(rows.index[:2]).items()}
    return methods_for(log_joint_of(run.vae.to(device), few), references)


def described(methods: Sequence[Reference]) -> dict[str, Any]:
    """Return names and options of references, as they enter the identity of an answer."""
    return {f"{number} {method.name}": vars(method) for number, method in enumerate(methods, start=1)}


def foreseen(
    run: FittedModel,
    rows: QueryRows,
    methods: Sequence[Reference],
    *,
    draws: int,
    counts: Mapping[str, int],
    device: torch.device,
) -> tuple[xr.Dataset, list[str]]:
    """Return what `--dry-run` says instead of an answer: the methods, the rows of each sort, and about how long they take."""
    few = rows.index[: min(len(rows), PILOT)]
    batch = {name: value.to(device) for name, value in rows.experiment.batch(few).items()}
    pilot = Pilot(log_joint_of(run.vae.to(device), batch), draws=draws, keep=draws)
    n = sum(counts.values())
    chunks, each = math.ceil(n / SIZE), min(n, SIZE)
    guide = pilot.guide().of(each) * chunks
    costs = [(method, pilot.reference(method, []).of(each) * chunks) for method in methods[:1]]
    said = [f"{n:,} rows ({', '.join(f'{count:,} {name}' for name, count in counts.items())})"]
    said += [f"the encoder's own numbers: about {durations.words(guide)}"]
    said += [f"{method.name}: about {durations.words(seconds)}" for method, seconds in costs]
    said += [f"then {method.name} at rows that are not certified yet" for method in methods[1:]]
    total = guide + sum(seconds for _, seconds in costs)
    return xr.Dataset(attrs={"dry_run": 1, "seconds": round(total, 1), "rows": n}), said


def parts_of(out: Path) -> Path:
    """Return the folder beside an answer's file in which its finished chunks are kept."""
    return out.with_name(f"{out.name}.parts")


def finish(out: Path) -> None:
    """Remove the stored chunks of a finished answer."""
    shutil.rmtree(parts_of(out), ignore_errors=True)


def key_of(facts: Sequence[Any], rows: QueryRows) -> str:
    """Return a hash that names the files of an answer: of everything that it depends on, and of the selected rows."""
    return sha256(json.dumps([*facts, sha256(rows.index.tobytes())], sort_keys=True, default=repr).encode())[:16]


def kept(path: Path | None) -> xr.Dataset | None:
    """Return a stored answer; None where it is missing or damaged."""
    if path is None or not path.is_file():
        return None
    try:
        return idata.read_table(path)
    except RunFolderError:
        return None


def _joined(parts: list[xr.Dataset]) -> xr.Dataset:
    """Join the chunks' answers along `obs_id`; variables without this dimension are the same in all chunks."""
    if len(parts) == 1:
        return parts[0]
    together: dict[str, Any] = {"data_vars": "minimal", "coords": "minimal", "compat": "override", "combine_attrs": "override"}
    return xr.concat(parts, "obs_id", join="override", **together)
