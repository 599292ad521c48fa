"""The fit of an experiment into a run folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from elbowroom.components.slots import build
from elbowroom.errors import RunFolderError, SpecError
from elbowroom.inference.fit import checkpoint, svi
from elbowroom.inference.fit.plan import CHECKPOINT, Schedule, Session
from elbowroom.inference.fit.record import Row
from elbowroom.runs.fitted import FittedModel
from elbowroom.spec import document, run_folder, warm_start
from elbowroom.spec.experiment import Experiment
from elbowroom.spec.identity import identity
from elbowroom.system.files import locked
from elbowroom.system.stages import into, stage


@stage("fit")
def fit(
    experiment: Experiment | str | Path,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    report: Callable[[Schedule, Row], None] | None = None,
    allow_python: bool = False,
) -> FittedModel:
    """Fit an experiment into a run folder; arguments and errors as `elbowroom.fit`."""
    if not isinstance(experiment, Experiment):
        experiment = Experiment.load(experiment, allow_python=allow_python)
    path, use = ready(experiment, out, overwrite=overwrite, resume=resume)
    train, validation = experiment.part(experiment.split.train, training=True), experiment.part(experiment.split.validation)
    tree = experiment.tree()
    vae = experiment.build()
    options = {name: getattr(experiment.spec.fit, name) for name in type(experiment.spec.fit).model_fields}
    options["objective"] = build("objective", options["objective"], where="fit.objective")
    del options["start"]
    with locked(path):  # check again: another process may have written to the folder meanwhile
        use = run_folder.check(path, experiment.identity, tree, overwrite=overwrite, resume=resume)
        run_folder.claim(path, tree, use)
        into(path)
        if use != "resume" or not (path / run_folder.SPLIT).exists():
            run_folder.write_split(path / run_folder.SPLIT, experiment.split)
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
    return FittedModel(path, experiment, vae.eval(), "; ".join(said))


def ready(
    experiment: Experiment, out: str | Path | None = None, *, overwrite: bool = False, resume: bool = False
) -> tuple[Path, run_folder.Use]:
    """Check everything that `fit` needs, also the folder, and write nothing (`--dry-run`).

    Returns:
        The run folder, and how it would be used: `new`, `resume` or `replace`.

    Raises:
        UserError: as `fit`.
    """
    path = Path(out) if out is not None else default_folder(experiment)
    if overwrite and resume:  # reported before the data are read
        raise SpecError("--overwrite and --resume contradict each other: one starts anew, the other goes on")
    experiment.check()
    if experiment.start is not None and warm_start.path_of(experiment.loaded).resolve() == path.resolve():
        raise SpecError(
            f"{experiment.label}: {warm_start.WHERE}: is the folder that the new run goes to; name another with --out"
        )
    use = run_folder.check(path, experiment.identity, experiment.tree(), overwrite=overwrite, resume=resume)
    if use == "resume":
        theirs = document.read(path / run_folder.SPEC)
        recorded = theirs["record"]
        if identity(theirs, recorded.get("data_sha256", ""), recorded.get("start_sha256")) != experiment.identity:
            raise RunFolderError(f"{path / run_folder.SPEC}: was changed after the fit; fit again with --overwrite")
        if (path / CHECKPOINT).exists():
            checkpoint.read(path / CHECKPOINT)
    return path, use


def default_folder(experiment: Experiment) -> Path:
    """Return `runs/<stem of the spec>`; for the spec in a run folder, `runs/<name of that folder>`."""
    label = Path(experiment.label)
    return Path("runs") / run_folder.name_for(experiment.loaded.folder.name if label.name == run_folder.SPEC else label)
