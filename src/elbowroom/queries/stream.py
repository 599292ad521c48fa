"""Many rows, a few at a time: memory is bounded, progress is told, and a command that was killed goes on where it stopped.

The rows go through one chunk at a time. With a file to write to, each finished chunk lies beside it in `<file>.parts/`, named
by the hash of all that it depends on, until all are joined; what a chunk gives depends on its place, not on the others.
"""

from __future__ import annotations

import json
import re
import shutil
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
from elbowroom.analysis.queries.best_posterior import Methods, methods_for
from elbowroom.errors import RunFolderError, UnsupportedProgram
from elbowroom.inference.compiled.policies import expecting
from elbowroom.inference.fit.plan import resolve_device
from elbowroom.inference.target.of_vae import log_joint_of
from elbowroom.runs.rows import provenance
from elbowroom.system import memory
from elbowroom.system.files import locked, sha256
from elbowroom.system.stages import stage

if TYPE_CHECKING:
    from elbowroom.inference.posterior import Reference
    from elbowroom.inference.target.log_joint import LogJoint
    from elbowroom.models.vae import VAE, Batch
    from elbowroom.runs.fitted import FittedModel
    from elbowroom.runs.rows import QueryRows

SIZE = 500  # rows
DATUM = re.compile(r"\bdatum (\d+)\b")
SEED_STEP = 104_711  # between chunks: shared noise would hide in the error of means
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Chunk:
    """Some rows, on the device.

    Attributes:
        log_joint: the log joint of model, guide and these rows.
        batch: the arguments of model and guide: `x` (n, *event), NaN where missing, and `covariates`, `exposure`.
        rows: their numbers in the data, (n,).
        seed: random seed, this chunk's own.
    """

    log_joint: LogJoint
    batch: Batch
    rows: np.ndarray
    seed: int


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
    unable: Callable[[Batch, str], xr.Dataset] | None = None,
) -> xr.Dataset:
    """Put rows through `compute`, chunk by chunk, and join what it returns along `obs_id`.

    Args:
        run: the fitted run.
        rows: the data, and which rows of them.
        compute: one chunk's answer, over `obs_id` (labels are put on here).
        question: what is computed: part of the identity of chunks that are kept.
        options: all else that it depends on.
        seed: random seed.
        device: where to compute.
        out: the file that the answer will be written to, by the caller; chunks are kept beside it.
        resume: use chunks that are there; else they are removed.
        report: called as report(rows done, rows in all) before the first chunk and after each.
        size: rows in a chunk.
        unable: given a row at which the model cannot be evaluated and the reason, returns what stands for it; by default such
            a row ends the answer.

    Returns:
        The joined dataset, whose attributes name run, data and weights.

    Raises:
        RunFolderError: another process is at it.
        UnsupportedProgram: the model cannot be evaluated at a row, which is named.
    """
    attributes = provenance(run, rows.dataset)
    identity = {**attributes, **options, "seed": seed, "size": size, "device": device.type, "torch": metadata.version("torch")}
    key = key_of([question, identity], rows)
    say, total, found = report or (lambda done, total: None), len(rows.index), []
    folder = None if out is None else out.with_name(f"{out.name}.parts")
    vae = run.vae.to(device)
    with ExitStack() as stack:
        if folder is not None:
            if folder.exists() and not resume:
                shutil.rmtree(folder)
            stack.enter_context(locked(folder))
        stack.enter_context(expecting(total))
        say(0, total)
        for number, place in enumerate(memory.slices(total, size)):
            some = rows.index[place]
            path = None if folder is None else folder / f"{key}-{place.start:09d}.nc"
            part = kept(path)
            if part is None:
                batch = {name: value.to(device) for name, value in rows.experiment.batch(some).items()}
                part = _computed(vae, batch, some, seed + SEED_STEP * number, compute, unable).sel(obs_id=some)
                if path is not None:
                    with stage("parts kept"):
                        idata.write(part, path)
            found.append(part)
            memory.trim()
            say(place.stop, total)
    joined = _joined(found)
    return joined.assign_attrs({**attributes, "question": question, "options": json.dumps(dict(options), default=str)})


def _computed(
    vae: VAE,
    batch: Batch,
    some: np.ndarray,
    seed: int,
    compute: Callable[[Chunk], xr.Dataset],
    unable: Callable[[Batch, str], xr.Dataset] | None,
) -> xr.Dataset:
    """Compute one chunk; a row at which the model cannot be evaluated is left out of it where something stands for it."""
    try:
        with stage("rows"):
            return compute(Chunk(log_joint_of(vae, batch), batch, some, seed)).assign_coords(obs_id=some)
    except UnsupportedProgram as error:  # which counts the data of the chunk
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
    return _joined([_computed(vae, left, some[others.numpy()], seed, compute, unable), instead])


def place_of(run: FittedModel, device: str | None) -> torch.device:
    """Return the device that is asked for, by default that of the spec.

    Raises:
        UserError: there is no such device.
    """
    return resolve_device(device or run.experiment.spec.fit.device)


def references_for(run: FittedModel, rows: QueryRows, references: Methods, device: torch.device) -> list[Reference]:
    """Return the references to read posteriors off, chosen by a look at a few rows.

    Raises:
        UserError: an unknown name, or one that cannot be used on this model.
    """
    few = {name: value.to(device) for name, value in rows.experiment.batch(rows.index[:2]).items()}
    return methods_for(log_joint_of(run.vae.to(device), few), references)


def finish(out: Path) -> None:
    """Remove the chunks of an answer that is written."""
    shutil.rmtree(out.with_name(f"{out.name}.parts"), ignore_errors=True)


def key_of(facts: Sequence[Any], rows: QueryRows) -> str:
    """Return what the files of an answer are named by: a hash of all that it depends on, and of which rows it is about."""
    return sha256(json.dumps([*facts, sha256(rows.index.tobytes())], sort_keys=True, default=repr).encode())[:16]


def kept(path: Path | None) -> xr.Dataset | None:
    """Return an answer that is there, whole; a damaged one is computed again."""
    if path is None or not path.is_file():
        return None
    try:
        return idata.read_table(path)
    except RunFolderError:
        return None


def _joined(parts: list[xr.Dataset]) -> xr.Dataset:
    """Join the chunks' answers along `obs_id`; what is not over it is the same in all."""
    if len(parts) == 1:
        return parts[0]
    together: dict[str, Any] = {"data_vars": "minimal", "coords": "minimal", "compat": "override", "combine_attrs": "override"}
    return xr.concat(parts, "obs_id", join="override", **together)
