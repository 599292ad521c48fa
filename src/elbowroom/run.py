"""A run: a fitted experiment in its folder. `fit` makes one, `Run.load` opens one, `Run.audit` audits it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from elbowroom.analysis.audit.auditor import DIAGNOSIS, Audit, audit_log_joint
from elbowroom.analysis.audit.budget import Step
from elbowroom.analysis.audit.diagnosis import SIMULATED
from elbowroom.analysis.audit.parts import Store
from elbowroom.analysis.audit.plan import Plan as AuditPlan
from elbowroom.components.slots import build
from elbowroom.data.columns import Layout
from elbowroom.data.dataset import Dataset
from elbowroom.data.file import read_like
from elbowroom.errors import RunFolderError, SpecError
from elbowroom.inference.fit import checkpoint, svi
from elbowroom.inference.fit.plan import CHECKPOINT, Plan, Session, resolve_device
from elbowroom.inference.fit.record import Row
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.inference.target.of_vae import seam
from elbowroom.models import measure
from elbowroom.models.vae import VAE
from elbowroom.questions import Questions, as_specified
from elbowroom.runs import rows as asked
from elbowroom.spec import document, spec
from elbowroom.spec import run_folder as folder
from elbowroom.spec import warm_start as start
from elbowroom.spec.assembly import restore
from elbowroom.spec.experiment import Experiment
from elbowroom.spec.identity import identity
from elbowroom.system import durations as clock
from elbowroom.system.archive import check_stored
from elbowroom.system.files import locked, sha256
from elbowroom.system.stages import into, stage

if TYPE_CHECKING:
    import pandas as pd

    from elbowroom.runs.improve import Improvement


@stage("fit")
def fit(
    experiment: Experiment | str | Path,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    report: Callable[[Plan, Row], None] | None = None,
    allow_python: bool = False,
) -> Run:
    """Fit an experiment into a run folder.

    Everything is checked before the folder is made: bad input leaves nothing behind.

    Args:
        experiment: the experiment, or the path of its spec.
        out: the folder; `runs/<name of the spec>` by default.
        overwrite: move a run that is there aside (to `<out>.1`).
        resume: go on with the run that is there; start where there is none.
        report: called as report(plan, row) after each epoch.
        allow_python: as in `Experiment.load`, where the path of a spec is given.

    Returns:
        The run.

    Raises:
        UserError: spec, data or folder cannot be used, or the loss is not finite.
    """
    if not isinstance(experiment, Experiment):
        experiment = Experiment.load(experiment, allow_python=allow_python)
    path, use = ready(experiment, out, overwrite=overwrite, resume=resume)
    train, validation = experiment.part(experiment.split.train, training=True), experiment.part(experiment.split.validation)
    tree = experiment.tree()
    vae = experiment.build()
    options = {name: getattr(experiment.spec.fit, name) for name in type(experiment.spec.fit).model_fields}
    options["objective"] = build("objective", options["objective"], where="fit.objective")
    del options["start"]
    with locked(path):  # look again: another process may have been here first
        use = folder.check(path, experiment.identity, tree, overwrite=overwrite, resume=resume)
        folder.claim(path, tree, use)
        into(path)
        if use != "resume" or not (path / folder.SPLIT).exists():
            folder.write_split(path / folder.SPLIT, experiment.split)
        session = Session(
            folder=path,
            resume=use == "resume",
            seed=experiment.spec.seed,
            fingerprint=experiment.identity,
            report=report,
            start=experiment.start,
        )
        history = svi.fit(vae, train, validation, session, **options)
    said = [history.plan, history.stopped_because, *([] if history.effect is None else [str(history.effect)])]
    return Run(path, experiment, vae.eval(), "; ".join(said))


def ready(
    experiment: Experiment, out: str | Path | None = None, *, overwrite: bool = False, resume: bool = False
) -> tuple[Path, folder.Use]:
    """Check all that `fit` needs, the folder too, and write nothing (`--dry-run`).

    Returns:
        The run folder, and how it would be used: `new`, `resume` or `replace`.

    Raises:
        UserError: as `fit`.
    """
    path = Path(out) if out is not None else default_folder(experiment)
    if overwrite and resume:  # told first, before the data are read
        raise SpecError("--overwrite and --resume contradict each other: one starts anew, the other goes on")
    experiment.check()
    if experiment.start is not None and start.path_of(experiment).resolve() == path.resolve():
        raise SpecError(f"{experiment.label}: {start.WHERE}: is the folder that the new run goes to; name another with --out")
    use = folder.check(path, experiment.identity, experiment.tree(), overwrite=overwrite, resume=resume)
    if use == "resume":
        theirs = document.read(path / folder.SPEC)
        recorded = theirs["record"]
        if identity(theirs, recorded.get("data_sha256", ""), recorded.get("start_sha256")) != experiment.identity:
            raise RunFolderError(f"{path / folder.SPEC}: was changed after the fit; fit again with --overwrite")
        if (path / CHECKPOINT).exists():
            checkpoint.read(path / CHECKPOINT)
    return path, use


def default_folder(experiment: Experiment) -> Path:
    """Return `runs/<the spec's stem>`; for the spec of a run folder, that folder's name."""
    label = Path(experiment.label)
    return Path("runs") / folder.name_for(experiment.loaded.folder.name if label.name == folder.SPEC else label)


@dataclass(eq=False)
class Run(Questions):
    """A fitted experiment in its folder.

    Attributes:
        path: the folder.
        experiment: the experiment.
        vae: the VAE with its best weights, in eval mode.
        summary: what the fit did, in a sentence; empty for a run that was loaded.

    Example:
        >>> import elbowroom as er
        >>> run = er.Run.load("runs/digits")  # doctest: +SKIP
        >>> run.audit().verdict  # doctest: +SKIP
    """

    path: Path
    experiment: Experiment
    vae: VAE
    summary: str = field(default="", repr=False)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @classmethod
    @stage("open the run")
    def load(
        cls,
        path: str | Path,
        set: Iterable[str] = (),
        *,
        data: np.ndarray | pd.DataFrame | None = None,
        allow_python: bool = False,
    ) -> Run:
        """Open a run folder.

        Args:
            path: the folder.
            set: changes to the audit, `audit.x=y`; what was fitted cannot be changed.
            data: the rows that it was fitted to, where they came from Python.
            allow_python: execute the files and modules that its spec names as `python:...`; else they are refused, unread.

        Raises:
            RunFolderError: it is missing, no run folder, not finished, or its files do not belong together.
        """
        path = Path(path)
        if not (path / folder.SPEC).is_file():
            what = "is not a run folder" if path.is_dir() else "no such run folder"
            raise RunFolderError(f"{path}: {what} (no {folder.SPEC}); make one with `elbowroom fit SPEC`")
        tree = document.read(path / folder.SPEC)
        changes = document.assignments(set)
        for key in changes:
            if key[0] != "audit":
                raise SpecError(f"--set {'.'.join(key)}: the run is fitted; only audit.* can be set for it")
        tree, _ = document.assign(tree, changes)
        label = str(path / folder.SPEC)
        _known(tree.get("record"), label)
        loaded = spec.validate(tree, label=label, folder=path.resolve(), assigned=changes, allow_python=allow_python)
        record = loaded.spec.record
        if record is None:
            raise RunFolderError(f"{label}: has no record of a run; this is a spec, fit it with `elbowroom fit`")
        if identity(tree, record.data_sha256, record.start_sha256) != record.experiment:
            raise RunFolderError(f"{label}: was changed after the fit; fit again with --overwrite")
        layout = None if record.layout is None else Layout.of(record.layout)
        experiment = Experiment(loaded, None if data is None else read_like(data, layout, path))
        vae = experiment.build()
        _load_weights(vae, path / folder.WEIGHTS)
        return cls(path, experiment, vae.eval())

    @property
    def data(self) -> Dataset:
        """The data that the run was fitted to.

        Raises:
            RunFolderError: they are not what they were when the run was fitted.
        """
        record, stamp = self.experiment.spec.record, self.experiment.data.stamp()
        untouched = record is not None and stamp is not None and stamp == record.data_stamp
        if record is not None and not untouched and self.experiment.data_sha256 != record.data_sha256:
            raise RunFolderError(f"{self.path}: {self.experiment.data.name} has changed since the fit; fit again")
        return self.experiment.data

    @as_specified
    @stage("audit")
    def audit(
        self,
        data: str | Path | np.ndarray | pd.DataFrame | None = None,
        *,
        out: str | Path | None = None,
        device: str | None = None,
        progress: Callable[[Step], None] | None = None,
        budget: float | str | None = None,
        resume: bool = False,
    ) -> Audit:
        """Compare the guide with reference posteriors, datum by datum, and write what was found.

        Parts that are done are kept in `parts/` until the audit is: one that was killed goes on with `resume`.

        Args:
            data: a file, an array (N, *event) or a frame to audit; by default the test split of the run.
            out: where the files go; by default the run folder, for other data `audits/<name>` in it.
            device: where to compute: auto, cpu, cuda; by default where the spec says.
            progress: called before each piece of work with a `Step`: a sentence that also knows the seconds left and the plan.
            budget: seconds that the audit may take, or a text such as `10m`; by default the spec's `audit.budget`.
            resume: return the audit that is there, if it is whole and the same; else go on from the parts of one that was
                killed, with the same result bit for bit where there is no budget.

        Returns:
            The audit.

        Raises:
            UserError: the data do not fit the model, a reference refuses it, or the budget is no time.
        """
        if budget is not None:
            return self._with_budget(budget).audit(data, out=out, device=device, progress=progress, resume=resume)
        audit_spec, place = self.experiment.spec.audit, resolve_device(device or self.experiment.spec.fit.device)
        target = self.audit_folder(data, out)
        dataset, obs_id = self._audited(data)
        with self._claimed(target, data is not None):
            into(target)
            attributes = self._attributes(dataset)
            store = Store(target, self._identity(attributes, obs_id, place), resume=resume)
            if resume and (there := self.audited(data, out=out)) is not None:
                store.clear()
                return there
            batch = {name: value.to(place) for name, value in self.experiment.on(dataset).batch(obs_id).items()}
            log_joint = seam(self.vae.to(place), batch)
            result = audit_log_joint(
                log_joint,
                references=cast(Any, self.experiment.references()),
                draws=audit_spec.draws,
                keep=audit_spec.keep,
                seed=self.experiment.spec.seed,
                obs_id=obs_id.tolist(),
                attrs=attributes,
                progress=progress,
                budget=audit_spec.budget,
                store=store,
                beside=self._beside(place, data is None) if audit_spec.diagnose else None,
                entries=measure.entries(self.vae, batch["x"]),
            )
            from elbowroom.analysis import idata
            from elbowroom.analysis.latents import summary as latent

            labels = None if dataset.labels is None else dataset.labels[obs_id]
            columns = [column.name for column in self.experiment.facts.columns or ()]
            seed = self.experiment.spec.seed
            with stage("latent space"):
                described = latent.describe(self.vae, batch, result.table, labels, columns=columns, seed=seed)
            (target / folder.AUDIT).unlink(missing_ok=True)  # it is written last: where it is, the others belong to it
            for stale in (target / folder.POSTERIORS).glob("*.nc"):
                if stale.stem not in result.posteriors:
                    stale.unlink()
            with stage("files"):
                idata.write(described, target / folder.LATENT)
                result.save(target)
            store.clear()
        return result

    def improve(self, **options: Any) -> Improvement:
        """Carry out the audit's advice in a new run folder, audit the same data there, and compare; this run is kept.

        Args:
            **options: those of `runs.improve.improve`: retrain, out, set, overwrite, resume, budget, report, progress,
                allow_python.

        Returns:
            Before and after; print it.

        Raises:
            UserError: the run is not audited, or an option or the new folder cannot be used.
        """
        from elbowroom.runs.improve import improve

        return improve(self, **options)

    def _beside(self, place: torch.device, own: bool) -> dict[str, LogJoint]:
        """Return seams of some training and validation data, whose gaps stand beside those of the test data."""
        if not own:
            return {}
        split, found = folder.read_split(self.path / folder.SPLIT), {}
        for name in ("train", "validation"):
            rows = getattr(split, name)
            if len(rows):
                some = rows[np.linspace(0, len(rows) - 1, min(len(rows), SIMULATED)).round().astype(int)]
                batch = {key: value.to(place) for key, value in self.experiment.batch(np.sort(some)).items()}
                found[name] = seam(self.vae.to(place), batch)
        return found

    def _with_budget(self, budget: float | str) -> Run:
        """Return the same run with another `audit.budget`."""
        seconds = clock.seconds(budget)
        tree = self.experiment.spec.model_copy(
            update={
                "audit": self.experiment.spec.audit.model_copy(
                    update={"budget": budget if isinstance(budget, str) else f"{seconds:g}s"}
                )
            }
        )
        experiment = Experiment(replace(self.experiment.loaded, spec=tree), self.experiment.given)
        known = ("data", "data_sha256")  # read and hashed once
        experiment.__dict__.update({key: self.experiment.__dict__[key] for key in known if key in self.experiment.__dict__})
        return replace(self, experiment=experiment)

    @staticmethod
    def _identity(attributes: Mapping[str, str], obs_id: np.ndarray, place: torch.device) -> dict[str, Any]:
        """Return all that the parts of an audit depend on beside the references' own seeds; not its budget."""
        chosen = {key: value for key, value in json.loads(attributes["audit"]).items() if key != "budget"}
        rows = sha256(np.ascontiguousarray(obs_id, dtype=np.int64).tobytes())
        return {**attributes, "audit": chosen, "rows": rows, "device": place.type, "torch": metadata.version("torch")}

    def audited(
        self, data: str | Path | np.ndarray | pd.DataFrame | None = None, *, out: str | Path | None = None
    ) -> Audit | None:
        """Return the audit that is there, if it is whole and the one that `audit` would make; else None."""
        target = self.audit_folder(data, out)
        if not (target / folder.AUDIT).is_file() or not (target / folder.LATENT).is_file():
            return None
        dataset, obs_id = self._audited(data)
        try:
            found = Audit.load(target)
        except RunFolderError:
            return None
        wanted = self._attributes(dataset) | {"seed": str(self.experiment.spec.seed)}
        whole = {"guide", *found.table["reference"].values.astype(str)} <= set(found.posteriors)
        whole &= (target / DIAGNOSIS).is_file() or not self.experiment.spec.audit.diagnose
        same = all(found.table.attrs.get(key) == value for key, value in wanted.items() if key != "data")  # a mere name
        return found if whole and same and np.array_equal(found.table["obs_id"].values, obs_id) else None

    @contextmanager
    def _claimed(self, target: Path, foreign: bool) -> Iterator[None]:
        """Lock the folder that an audit goes to, and the run's own unless it cannot be written to."""
        if target.resolve() != self.path.resolve() and (target / folder.SPEC).exists():
            raise RunFolderError(f"{target}: is another run's folder; name another with --out")
        if target.exists() and not target.is_dir():
            raise RunFolderError(f"{target}: this is a file; name a folder with --out")
        if foreign and target.resolve() == self.path.resolve():
            raise RunFolderError(f"{target}: holds the audit of the run's own test data; name another with --out")
        with ExitStack() as stack:
            if os.access(self.path, os.W_OK):
                stack.enter_context(locked(self.path))
            stack.enter_context(locked(target))
            yield

    def audit_folder(self, data: str | Path | np.ndarray | pd.DataFrame | None = None, out: str | Path | None = None) -> Path:
        """Return the folder that `audit` writes to."""
        if out is not None:
            return Path(out)
        if data is None:
            return self.path
        return self.path / folder.AUDITS / (folder.name_for(data) if isinstance(data, str | Path) else "array")

    def plan(
        self, data: str | Path | np.ndarray | pd.DataFrame | None = None, *, budget: float | str | None = None
    ) -> AuditPlan:
        """Check that an audit could start, and say what it would do and how long it would take; write nothing (`--dry-run`).

        Args:
            data: as in `audit`.
            budget: as in `audit`.

        Returns:
            The plan; print it.

        Raises:
            UserError: as `audit`.
        """
        dataset, obs_id = self._audited(data)
        budget = clock.seconds(self.experiment.spec.audit.budget if budget is None else budget)
        return self.experiment.plan(self.vae, dataset, obs_id, budget)

    def _audited(self, data: str | Path | np.ndarray | pd.DataFrame | None) -> tuple[Dataset, np.ndarray]:
        """Return the data to audit and the rows of them, sorted."""
        observations = self.experiment.spec.audit.observations
        most = None if observations == "all" else observations
        found = asked.own(self) if data is None else asked.given(self, data, most)
        dataset, obs_id = found.dataset, found.index
        if observations != "all":
            if observations > len(obs_id):
                raise SpecError(f"audit.observations: there are {len(obs_id)} rows, not {observations}; use all")
            obs_id = obs_id[:observations]
        return dataset, np.sort(obs_id)

    def report(self) -> Path:
        """Write `report.html` and the figures from the files of the run; return the report's path."""
        from elbowroom.analysis.report.report import write_report

        with locked(self.path):
            return write_report(self.path)

    def _attributes(self, dataset: Dataset) -> dict[str, str]:
        return {**asked.attributes(self, dataset), "audit": json.dumps(self.experiment.spec.tree()["audit"])}


def _known(record: Any, label: str) -> None:
    """Refuse the record of a newer Elbowroom, which says more than this one understands."""
    unknown = [key for key in record if key not in spec.Record.model_fields] if isinstance(record, dict) else []
    if unknown:
        theirs, ours = record.get("elbowroom", "unknown"), metadata.version("elbowroom")
        raise RunFolderError(
            f"{label}: record.{unknown[0]}: unknown (written by elbowroom {theirs}, this is {ours}); upgrade elbowroom"
        )


def _load_weights(vae: VAE, path: Path) -> None:
    """Load the weights of a run folder."""
    try:
        check_stored(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunFolderError(f"{path}: missing: the fit has not ended; go on with `elbowroom fit SPEC --resume`") from None
    except Exception as error:
        reason = str(error).split(". ")[0][:80]
        raise RunFolderError(f"{path}: damaged ({reason}); fit again with --overwrite") from None
    try:
        restore(vae, state)
        bad = [name for name, value in vae.state_dict().items() if not bool(value.isfinite().all())]
        if bad:
            raise TypeError(f"{bad[0]} is not finite")
    except (RuntimeError, TypeError, AttributeError) as error:
        raise RunFolderError(f"{path}: does not belong to this spec ({str(error).splitlines()[-1].strip()[:120]})") from None
