"""An experiment (a checked spec with its data) and a run (a fitted experiment in a folder)."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from elbowroom import components, document, folder, spec
from elbowroom.analysis.audit import Audit, audit_log_joint, choose
from elbowroom.data import CHUNK, Dataset, File, Source, Split, split_rows
from elbowroom.errors import DataError, RunFolderError, SpecError
from elbowroom.files import sha256, write_text
from elbowroom.inference import svi
from elbowroom.inference.history import Row
from elbowroom.inference.posterior import Reference
from elbowroom.inference.schedule import Plan, plan
from elbowroom.inference.target import LogJoint
from elbowroom.models.guides import AmortizedGuide
from elbowroom.models.vae import VAE

VERSIONS_OF = ("torch", "pyro-ppl", "numpy", "xarray", "arviz-base", "scikit-learn")


@dataclass(frozen=True, eq=False)
class Experiment:
    """A spec that has been checked, with its data.

    Attributes:
        loaded: the resolved spec, its file's name, and where relative paths start.

    Example:
        >>> import elbowroom as er
        >>> experiment = er.Experiment.load("digits.yaml", set=["model.latent_dim=1"])  # doctest: +SKIP
    """

    loaded: spec.Loaded

    @classmethod
    def load(cls, path: str | Path, set: Iterable[str] = ()) -> Experiment:
        """Read a spec file and apply changes.

        Args:
            path: the file.
            set: changes `a.b=c`, as on the command line.

        Raises:
            SpecError: one line.
        """
        return cls(spec.load(path, set))

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any], base: str | Path = ".") -> Experiment:
        """Check a spec given as dictionaries; `base` is the folder that relative paths start from."""
        return cls(spec.validate(tree, folder=Path(base).resolve()))

    def __repr__(self) -> str:
        return f"Experiment({self.label!r})"

    @property
    def spec(self) -> spec.Spec:
        """The resolved spec."""
        return self.loaded.spec

    @property
    def label(self) -> str:
        """What messages call the spec."""
        return self.loaded.label

    @functools.cached_property
    def data(self) -> Dataset:
        """The data, read once.

        Raises:
            DataError: they are missing or cannot be used.
        """
        with self._labelled():
            dataset = self._source.load()
            dataset.check()
        return dataset

    @functools.cached_property
    def split(self) -> Split:
        """The rows that train, choose the best weights, and are audited."""
        with self._labelled():
            return split_rows(len(self.data), self._source.split, self.spec.seed, self.data.name)

    @functools.cached_property
    def identity(self) -> str:
        """SHA-256 of everything that the fit depends on: data, model, guide, fit (not its device) and seed."""
        tree = self.spec.tree()
        parts = {key: dict(tree[key]) for key in ("data", "model", "guide", "fit")}
        parts["fit"].pop("device", None)
        parts["data"].pop("path", None)
        text = json.dumps([parts, tree["seed"], self.data_sha256], sort_keys=True)
        return sha256(text.encode())

    @functools.cached_property
    def data_sha256(self) -> str:
        """SHA-256 of the data."""
        return self.data.fingerprint()

    @functools.cached_property
    def _source(self) -> Source:
        return cast(Source, components.build("data", self.spec.data, where="data", folder=self.loaded.folder))

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the fit."""
        return cast(torch.dtype, getattr(torch, self.spec.fit.dtype))

    def rows(self, index: np.ndarray) -> torch.Tensor:
        """Return data as a tensor in the precision of the fit.

        Args:
            index: row numbers, (n,).

        Returns:
            (n, *event).

        Raises:
            DataError: a number is too large for the precision.
        """
        part = np.array(self.data.x[index])
        with np.errstate(over="ignore"):
            x = torch.from_numpy(part.astype(np.float32 if self.dtype is torch.float32 else np.float64))
        if not bool(x.isfinite().all()):
            first = x.isfinite().logical_not().nonzero()[0].numpy()
            place = self.data.place(int(index[first[0]]), first[1:])
            value = part[tuple(first)]
            raise DataError(
                f"{self.label}: {self.data.name}: {value:g} at {place} is too large for {self.spec.fit.dtype}; "
                "rescale the data or use fit.dtype = float64"
            )
        return x

    def build(self, event_shape: Sequence[int] | None = None) -> VAE:
        """Build the VAE with fresh weights, which depend on the seed alone.

        Args:
            event_shape: shape of one datum; the data's by default.
        """
        shape = tuple(self.data.event_shape if event_shape is None else event_shape)
        model, guide, d = self.spec.model, self.spec.guide, self.spec.model.latent_dim
        with self._labelled(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.spec.seed)
            try:
                prior = components.build("prior", model.prior, where="model.prior", latent_dim=d)
                likelihood = components.build("likelihood", model.likelihood, where="model.likelihood", event_shape=shape)
                family = components.build("guide", guide.family, where="guide.family", latent_dim=d)
                decoder = components.build(
                    "network", model.decoder, where="model.decoder", in_shape=(d,), out_dim=likelihood.param_dim
                )
                encoder = components.build(
                    "network", guide.encoder, where="guide.encoder", in_shape=shape, out_dim=family.param_dim
                )
            except RuntimeError as error:
                if "memory" not in str(error):
                    raise
                raise SpecError("model: the networks are too large for this machine's memory") from error
            return VAE(prior, likelihood, decoder, AmortizedGuide(encoder, family)).to(self.dtype)

    def references(self) -> str | list[Reference]:
        """Return the references that the audit will use, built; `auto` as it is."""
        chosen = self.spec.audit.references
        if isinstance(chosen, str):
            return chosen
        with self._labelled():
            return [components.build("reference", r, where=f"audit.references.{i}") for i, r in enumerate(chosen)]

    def check(self) -> None:
        """Check everything that can be wrong before a fit: data, split, support, options, references. Writes nothing.

        Raises:
            UserError: one line.
        """
        options, observations, n_test = self.spec.fit, self.spec.audit.observations, len(self.split.test)
        with self._labelled():
            if observations != "all" and observations > n_test:
                raise SpecError(f"audit.observations: the test split has {n_test} rows, not {observations}; use all")
            svi.resolve_device(options.device)
            plan(len(self.split.train), **{name: getattr(options, name) for name in type(options).model_fields})
        vae = self.build()
        self.check_support(vae, self.data)
        references = self.references()
        if not isinstance(references, str):
            vae.adapt(self.rows(self.split.train[:100]))
            log_joint = LogJoint(vae.model, vae.guide, self.rows(self.split.test[:2]))
            for reference in references:
                refusal = reference.refusal(log_joint)
                if refusal is not None:
                    raise SpecError(f"{self.label}: audit.references: {refusal}; use auto")

    def check_support(self, vae: VAE, data: Dataset) -> None:
        """Check all data against the likelihood's support, a few million entries at a time.

        Raises:
            DataError: names the first place and the remedy.
        """
        step = max(1, CHUNK // max(1, int(np.prod(data.event_shape))))
        for start in range(0, len(data), step):
            part = data.x[start : start + step]
            try:
                vae.likelihood.check(torch.from_numpy(np.array(part, dtype=np.float64)))
            except DataError as error:
                raise DataError(f"{self.label}: {_shift_row(str(error), start)}") from None

    def tree(self) -> dict[str, Any]:
        """Return the resolved spec as a run folder records it: paths absolute, versions and hashes with it."""
        tree = self.spec.tree()
        if isinstance(self._source, File):
            tree["data"]["path"] = str(self._source.path)
        tree["record"] = {
            "elbowroom": metadata.version("elbowroom"),
            "versions": {name: metadata.version(name) for name in VERSIONS_OF},
            "data_sha256": self.data_sha256,
            "event_shape": list(self.data.event_shape),
            "experiment": self.identity,
        }
        return tree

    @contextmanager
    def _labelled(self) -> Iterator[None]:
        """Put the spec's name before messages that start with a dotted path."""
        try:
            yield
        except (SpecError, DataError) as error:
            text = str(error)
            if re.match(r"(data|model|guide|fit|audit|seed)\b[\w.]*:", text):
                raise type(error)(f"{self.label}: {text}") from error
            raise


def fit(
    experiment: Experiment | str | Path,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    report: Callable[[Plan, Row], None] | None = None,
) -> Run:
    """Fit an experiment into a run folder.

    Everything is checked before the folder is made: bad input leaves nothing behind.

    Args:
        experiment: the experiment, or the path of its spec.
        out: the folder; `runs/<name of the spec>` by default.
        overwrite: move a run that is there aside (to `<out>.1`).
        resume: go on with the run that is there; start where there is none.
        report: called as report(plan, row) after each epoch.

    Returns:
        The run.

    Raises:
        UserError: spec, data or folder cannot be used, or the loss is not finite.
    """
    if not isinstance(experiment, Experiment):
        experiment = Experiment.load(experiment)
    path, use = ready(experiment, out, overwrite=overwrite, resume=resume)
    train, validation = experiment.rows(experiment.split.train), experiment.rows(experiment.split.validation)
    tree = experiment.tree()
    if use == "replace":
        folder.set_aside(path)
    if use != "resume":
        write_text(path / folder.SPEC, document.write(tree))
    folder.write_split(path / folder.SPLIT, experiment.split)
    vae = experiment.build()
    options = {name: getattr(experiment.spec.fit, name) for name in type(experiment.spec.fit).model_fields}
    session = svi.Session(
        folder=path, resume=use == "resume", seed=experiment.spec.seed, fingerprint=experiment.identity, report=report
    )
    history = svi.fit(vae, train, validation, session, **options)
    return Run(path, experiment, vae.eval(), f"{history.plan}; {history.stopped_because}")


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
    return path, folder.check(path, experiment.identity, experiment.tree(), overwrite=overwrite, resume=resume)


def default_folder(experiment: Experiment) -> Path:
    """Return `runs/<the spec's stem>`; for the spec of a run folder, that folder's name."""
    stem = Path(experiment.label).stem
    if experiment.label == folder.SPEC:
        stem = experiment.loaded.folder.name
    return Path("runs") / stem


@dataclass(eq=False)
class Run:
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
    def load(cls, path: str | Path, set: Iterable[str] = ()) -> Run:
        """Open a run folder.

        Args:
            path: the folder.
            set: changes to the audit, `audit.x=y`; what was fitted cannot be changed.

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
        loaded = spec.validate(tree, label=label, folder=path.resolve(), assigned=changes)
        record = loaded.spec.record
        if record is None:
            raise RunFolderError(f"{label}: has no record of a run; this is a spec, fit it with `elbowroom fit`")
        experiment = Experiment(loaded)
        vae = experiment.build(record.event_shape)
        _load_weights(vae, path / folder.WEIGHTS)
        return cls(path, experiment, vae.eval())

    @property
    def data(self) -> Dataset:
        """The data that the run was fitted to.

        Raises:
            RunFolderError: they, or the spec, are not what they were when the run was fitted.
        """
        record = self.experiment.spec.record
        if record is not None:
            if self.experiment.data_sha256 != record.data_sha256:
                raise RunFolderError(f"{self.path}: {self.experiment.data.name} has changed since the fit; fit again")
            if self.experiment.identity != record.experiment:
                raise RunFolderError(f"{self.path / folder.SPEC}: was changed after the fit; fit again with --overwrite")
        return self.experiment.data

    def audit(
        self,
        data: str | Path | np.ndarray | None = None,
        *,
        out: str | Path | None = None,
        device: str | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> Audit:
        """Compare the guide with exact posteriors, datum by datum, and write what was found.

        Args:
            data: a file or an array (N, *event) to audit; by default the test split of the run.
            out: where the files go; by default the run folder, for other data `audits/<name>` in it.
            device: where to compute: auto, cpu, cuda; by default where the spec says.
            progress: called with a sentence at each step.

        Returns:
            The audit.

        Raises:
            UserError: the data do not fit the model, or a reference refuses it.
        """
        audit_spec, place = self.experiment.spec.audit, svi.resolve_device(device or self.experiment.spec.fit.device)
        target = self.audit_folder(data, out)
        dataset, obs_id = self._audited(data)
        on_data = Experiment(self.experiment.loaded)
        on_data.__dict__["data"] = dataset
        x = on_data.rows(obs_id).to(place)
        self.vae.to(place)
        log_joint = LogJoint(self.vae.model, self.vae.guide, x)
        result = audit_log_joint(
            log_joint,
            references=cast(Any, self.experiment.references()),
            draws=audit_spec.draws,
            keep=audit_spec.keep,
            seed=self.experiment.spec.seed,
            obs_id=obs_id.tolist(),
            attrs=self._attributes(dataset),
            progress=progress,
        )
        result.save(target)
        for stale in (target / folder.POSTERIORS).glob("*.nc"):
            if stale.stem not in result.posteriors:
                stale.unlink()
        from elbowroom.analysis import idata, latent

        labels = None if dataset.labels is None else dataset.labels[obs_id]
        described = latent.describe(self.vae, x, result.table, labels, seed=self.experiment.spec.seed)
        idata.write(described, target / folder.LATENT)
        return result

    def audit_folder(self, data: str | Path | np.ndarray | None = None, out: str | Path | None = None) -> Path:
        """Return the folder that `audit` writes to."""
        if out is not None:
            return Path(out)
        if data is None:
            return self.path
        return self.path / folder.AUDITS / (Path(data).stem if isinstance(data, str | Path) else "array")

    def check_audit(self, data: str | Path | np.ndarray | None = None) -> None:
        """Check that an audit could start, and write nothing (`--dry-run`).

        Raises:
            UserError: as `audit`.
        """
        dataset, obs_id = self._audited(data)
        two = torch.from_numpy(np.array(dataset.x[obs_id[:2]])).to(self.experiment.dtype)
        choose(cast(Any, self.experiment.references()), LogJoint(self.vae.model, self.vae.guide, two))

    def _audited(self, data: str | Path | np.ndarray | None) -> tuple[Dataset, np.ndarray]:
        """Return the data to audit and the rows of them, sorted."""
        observations = self.experiment.spec.audit.observations
        if data is None:
            dataset, obs_id = self.data, folder.read_split(self.path / folder.SPLIT).test
        else:
            dataset = self._foreign(data)
            obs_id = np.arange(len(dataset), dtype=np.int64)
        if observations != "all":
            if observations > len(obs_id):
                raise SpecError(f"audit.observations: there are {len(obs_id)} rows, not {observations}; use all")
            obs_id = obs_id[:observations]
        return dataset, np.sort(obs_id)

    def report(self) -> Path:
        """Write `report.html` and the figures from the files of the run; return the report's path."""
        from elbowroom.analysis.report import write_report

        return write_report(self.path)

    def _foreign(self, data: str | Path | np.ndarray) -> Dataset:
        """Read and check data that the run was not fitted to; flat rows take the model's shape."""
        if not isinstance(data, np.ndarray):
            dataset = File(Path.cwd(), path=Path(data)).load()
        else:
            dataset = Dataset(data, "data")
        dataset.check()
        shape = self.vae.likelihood.event_shape
        if dataset.event_shape != shape:
            if int(np.prod(dataset.event_shape)) != int(np.prod(shape)):
                raise DataError(f"{dataset.name}: each datum has shape {dataset.event_shape}, the model expects {shape}")
            dataset = Dataset(dataset.x.reshape(-1, *shape), dataset.name)
        try:
            Experiment.check_support(self.experiment, self.vae, dataset)
        except DataError as error:
            raise DataError(str(error).replace(f"{self.experiment.label}: data", dataset.name, 1)) from None
        return dataset

    def _attributes(self, dataset: Dataset) -> dict[str, str]:
        record = self.experiment.spec.record
        return {
            "experiment": self.path.name,
            "data": dataset.name,
            "spec_sha256": self.experiment.identity if record is None else record.experiment,
            "elbowroom": metadata.version("elbowroom"),
            "audit": json.dumps(self.experiment.spec.tree()["audit"]),
        }


def _shift_row(message: str, start: int) -> str:
    """Add the number of rows before a part of the data to the row that a message names."""
    return re.sub(r"\brow (\d+)", lambda match: f"row {int(match[1]) + start}", message)


def _load_weights(vae: VAE, path: Path) -> None:
    """Load a state dict; buffers take the shapes that the training data gave them."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunFolderError(f"{path}: missing: the fit has not ended; go on with `elbowroom fit SPEC --resume`") from None
    except Exception as error:
        reason = str(error).split(". ")[0][:80]
        raise RunFolderError(f"{path}: damaged ({reason}); fit again with --overwrite") from None
    try:
        for name, _ in list(vae.named_buffers()):
            owner, _, leaf = name.rpartition(".")
            if name in state:
                setattr(vae.get_submodule(owner), leaf, state[name].clone())
        vae.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise RunFolderError(f"{path}: does not belong to this spec ({str(error).splitlines()[-1].strip()[:120]})") from None
