"""The audit of a fitted model: rows to audit, output folder, and parts kept for `--resume`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from elbowroom.analysis.audit.auditor import DIAGNOSIS, Audit, audit_log_joint
from elbowroom.analysis.audit.budget import Progress
from elbowroom.analysis.audit.diagnosis import SIMULATED
from elbowroom.analysis.audit.parts import Store
from elbowroom.analysis.audit.plan import Plan as AuditPlan
from elbowroom.data.dataset import Dataset
from elbowroom.errors import RunFolderError, SpecError
from elbowroom.inference.fit.plan import resolve_device
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.inference.target.of_vae import log_joint_of
from elbowroom.models import measure
from elbowroom.runs.as_specified import as_specified
from elbowroom.runs.fitted import FittedModel
from elbowroom.runs.rows import given_rows, own_rows, provenance
from elbowroom.spec import run_folder
from elbowroom.system import durations
from elbowroom.system.files import locked, sha256
from elbowroom.system.stages import into, stage

if TYPE_CHECKING:
    import pandas as pd


@as_specified
@stage("audit")
def audit(
    run: FittedModel,
    data: str | Path | np.ndarray | pd.DataFrame | None = None,
    *,
    out: str | Path | None = None,
    device: str | None = None,
    progress: Callable[[Progress], None] | None = None,
    budget: float | str | None = None,
    resume: bool = False,
) -> Audit:
    """Audit a fitted model; arguments and errors as `Run.audit`."""
    if budget is not None:
        return audit(run.with_budget(budget), data, out=out, device=device, progress=progress, resume=resume)
    audit_spec, place = run.experiment.spec.audit, resolve_device(device or run.experiment.spec.fit.device)
    target = audit_folder(run, data, out)
    dataset, obs_id = _audited(run, data)
    with _claimed(run, target, data is not None):
        into(target)
        attributes = _attributes(run, dataset)
        store = Store(target, _identity(attributes, obs_id, place), resume=resume)
        if resume and (there := audited(run, data, out=out)) is not None:
            store.clear()
            return there
        batch = {name: value.to(place) for name, value in run.experiment.on(dataset).batch(obs_id).items()}
        log_joint = log_joint_of(run.vae.to(place), batch)
        result = audit_log_joint(
            log_joint,
            references=cast(Any, run.experiment.references()),
            draws=audit_spec.draws,
            keep=audit_spec.keep,
            seed=run.experiment.spec.seed,
            obs_id=obs_id.tolist(),
            attrs=attributes,
            progress=progress,
            budget=audit_spec.budget,
            store=store,
            beside=_beside(run, place, data is None) if audit_spec.diagnose else None,
            entries=measure.entries(run.vae, batch["x"]),
        )
        from elbowroom.analysis import idata
        from elbowroom.analysis.latents import summary

        labels = None if dataset.labels is None else dataset.labels[obs_id]
        columns = [column.name for column in run.experiment.facts.columns or ()]
        seed = run.experiment.spec.seed
        with stage("latent space"):
            described = summary.describe(run.vae, batch, result.table, labels, columns=columns, seed=seed)
        (target / run_folder.AUDIT).unlink(missing_ok=True)  # it is written last, as a sign that the other files belong to it
        with stage("files"):
            idata.write(described, target / run_folder.LATENT)
            result.save(target)
        store.clear()
    return result


def plan(
    run: FittedModel, data: str | Path | np.ndarray | pd.DataFrame | None = None, *, budget: float | str | None = None
) -> AuditPlan:
    """Plan an audit; arguments and errors as `Run.plan`."""
    dataset, obs_id = _audited(run, data)
    budget = durations.seconds(run.experiment.spec.audit.budget if budget is None else budget)
    return run.experiment.plan(run.vae, dataset, obs_id, budget)


def audited(
    run: FittedModel, data: str | Path | np.ndarray | pd.DataFrame | None = None, *, out: str | Path | None = None
) -> Audit | None:
    """Return the existing audit if it is complete and `audit` would make the same one; else None."""
    target = audit_folder(run, data, out)
    if not (target / run_folder.AUDIT).is_file() or not (target / run_folder.LATENT).is_file():
        return None
    dataset, obs_id = _audited(run, data)
    try:
        found = Audit.load(target)
    except RunFolderError:
        return None
    wanted = _attributes(run, dataset) | {"seed": str(run.experiment.spec.seed)}
    whole = {"guide", *found.table["reference"].values.astype(str)} <= set(found.posteriors)
    whole &= (target / DIAGNOSIS).is_file() or not run.experiment.spec.audit.diagnose
    same = all(found.table.attrs.get(key) == value for key, value in wanted.items() if key != "data")  # "data" is only a name
    return found if whole and same and np.array_equal(found.table["obs_id"].values, obs_id) else None


def audit_folder(
    run: FittedModel, data: str | Path | np.ndarray | pd.DataFrame | None = None, out: str | Path | None = None
) -> Path:
    """Return the folder that `audit` writes to."""
    if out is not None:
        return Path(out)
    if data is None:
        return run.path
    return run.path / run_folder.AUDITS / (run_folder.name_for(data) if isinstance(data, str | Path) else "array")


def report(run: FittedModel) -> Path:
    """Write `report.html` and the figures from the files of the run; return the path of the report."""
    from elbowroom.analysis.report.report import write_report

    with locked(run.path):
        return write_report(run.path)


def _audited(run: FittedModel, data: str | Path | np.ndarray | pd.DataFrame | None) -> tuple[Dataset, np.ndarray]:
    """Return the data to audit and their row numbers, sorted."""
    observations = run.experiment.spec.audit.observations
    most = None if observations == "all" else observations
    found = own_rows(run) if data is None else given_rows(run, data, most)
    dataset, obs_id = found.dataset, found.index
    if observations != "all":
        if observations > len(obs_id):
            raise SpecError(f"audit.observations: there are {len(obs_id)} rows, not {observations}; use all")
        obs_id = obs_id[:observations]
    return dataset, np.sort(obs_id)


@contextmanager
def _claimed(run: FittedModel, target: Path, foreign: bool) -> Iterator[None]:
    """Lock the output folder of an audit, and the run's own folder if it is writable."""
    if target.resolve() != run.path.resolve() and (target / run_folder.SPEC).exists():
        raise RunFolderError(f"{target}: is another run's folder; name another with --out")
    if target.exists() and not target.is_dir():
        raise RunFolderError(f"{target}: this is a file; name a folder with --out")
    if foreign and target.resolve() == run.path.resolve():
        raise RunFolderError(f"{target}: holds the audit of the run's own test data; name another with --out")
    with ExitStack() as stack:
        if os.access(run.path, os.W_OK):
            stack.enter_context(locked(run.path))
        stack.enter_context(locked(target))
        yield


def _beside(run: FittedModel, place: torch.device, own: bool) -> dict[str, LogJoint]:
    """Return log joints of some training and validation data, whose gaps are compared with those of the test data."""
    if not own:
        return {}
    split, found = run_folder.read_split(run.path / run_folder.SPLIT), {}
    for name in ("train", "validation"):
        rows = getattr(split, name)
        if len(rows):
            some = rows[np.linspace(0, len(rows) - 1, min(len(rows), SIMULATED)).round().astype(int)]
            batch = {key: value.to(place) for key, value in run.experiment.batch(np.sort(some)).items()}
            found[name] = log_joint_of(run.vae.to(place), batch)
    return found


def _identity(attributes: Mapping[str, str], obs_id: np.ndarray, place: torch.device) -> dict[str, Any]:
    """Return what the parts of an audit depend on, apart from the references' seeds; the budget is not part of it."""
    chosen = {key: value for key, value in json.loads(attributes["audit"]).items() if key != "budget"}
    rows = sha256(np.ascontiguousarray(obs_id, dtype=np.int64).tobytes())
    return {**attributes, "audit": chosen, "rows": rows, "device": place.type, "torch": metadata.version("torch")}


def _attributes(run: FittedModel, dataset: Dataset) -> dict[str, str]:
    return {**provenance(run, dataset), "audit": json.dumps(run.experiment.spec.tree()["audit"])}
