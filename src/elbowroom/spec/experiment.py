"""An experiment: a checked spec with its data."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from elbowroom.components import slots
from elbowroom.data.chunks import CHUNK, forget, rows_of
from elbowroom.data.dataset import Dataset, Source, Split, split_rows
from elbowroom.data.file import File
from elbowroom.data.frames import Memory
from elbowroom.data.tables import constant, row_numbers
from elbowroom.errors import DataError, MissingFile, SpecError
from elbowroom.inference.fit.plan import plan, resolve_device
from elbowroom.inference.fit.rows import Rows
from elbowroom.inference.fit.warm_start import Start
from elbowroom.inference.posterior import Reference
from elbowroom.inference.target.of_vae import log_joint_of
from elbowroom.models.vae import VAE, Batch
from elbowroom.spec import spec, warm_start
from elbowroom.spec.assembly import Facts, assemble
from elbowroom.spec.identity import identity
from elbowroom.spec.run_folder import SPLIT, read_split
from elbowroom.spec.support import check_rounding, check_size, check_support
from elbowroom.system import durations
from elbowroom.system.memory import fitting, slices
from elbowroom.system.stages import stage

if TYPE_CHECKING:
    import pandas as pd

    from elbowroom.analysis.audit.plan import Plan as AuditPlan

MOST_COLUMNS = 100  # columns whose kinds are recorded if the likelihood does not need them
PILOT = 64  # data used to estimate the cost of an audit

VERSIONS_OF = ("torch", "pyro-ppl", "numpy", "xarray", "arviz-base", "scikit-learn")


@dataclass(frozen=True, eq=False)
class Experiment:
    """A checked spec with its data.

    Attributes:
        loaded: the resolved spec, the name of its file, and the folder that relative paths start from.
        given: data passed from Python, else None.

    Example:
        >>> import elbowroom as er
        >>> experiment = er.Experiment.load("digits.yaml", set=["model.latent_dim=1"])  # doctest: +SKIP
    """

    loaded: spec.Loaded
    given: Dataset | None = None

    @classmethod
    @stage("spec")
    def load(
        cls,
        path: str | Path,
        set: Iterable[str] = (),
        *,
        data: np.ndarray | pd.DataFrame | None = None,
        allow_python: bool = False,
    ) -> Experiment:
        """Read a spec file and apply changes.

        Args:
            path: the file.
            set: changes `a.b=c`, as on the command line.
            data: rows that replace the spec's data: an array (N, *event) or a frame. Of the spec's own `data` only the roles of
                columns and `split` are used then.
            allow_python: execute the files and modules that the spec names as `python:...`; else they are refused.

        Raises:
            SpecError: one line.
            DataError: `data` are not rows of numbers.
        """
        if data is None:
            return cls(spec.load(path, set, allow_python=allow_python))
        return cls._handed(spec.load(path, set, in_memory=True, allow_python=allow_python), data)

    @classmethod
    def from_dict(
        cls,
        tree: Mapping[str, Any],
        base: str | Path = ".",
        *,
        data: np.ndarray | pd.DataFrame | None = None,
        allow_python: bool = False,
    ) -> Experiment:
        """Check a spec given as dictionaries.

        Args:
            tree: the spec; with `data` it needs no data of its own.
            base: the folder that relative paths start from.
            data: as in `load`.
            allow_python: as in `load`.
        """
        folder = Path(base).resolve()
        if data is None:
            return cls(spec.validate(tree, folder=folder, allow_python=allow_python))
        return cls._handed(spec.validate(spec.of_memory(tree), folder=folder, allow_python=allow_python), data)

    @classmethod
    def _handed(cls, loaded: spec.Loaded, data: Any) -> Experiment:
        """Use rows from Python; the options of the spec's data give the roles of columns."""
        experiment = cls(loaded)
        with experiment._labelled():
            given = cast(Memory, experiment._source).hand_over(data)
            given.check(values=False)
            _ = given.described  # raises an error now if a declared kind does not fit
        return cls(loaded, given)

    def __repr__(self) -> str:
        return f"Experiment({self.label!r})"

    @property
    def spec(self) -> spec.Spec:
        """The resolved spec."""
        return self.loaded.spec

    @property
    def label(self) -> str:
        """Name of the spec in messages."""
        return self.loaded.label

    @functools.cached_property
    @stage("data")
    def data(self) -> Dataset:
        """The data, read once.

        Raises:
            DataError: they are missing or cannot be used.
        """
        with self._labelled():
            try:
                dataset = self._source.load() if self.given is None else self.given
            except MissingFile as error:
                if self.spec.record is None:
                    raise
                raise MissingFile(
                    f"{str(error).rstrip('?')}; the run was fitted to these rows: put them there, or from Python "
                    "er.Run.load(run, data=...); or name other rows: DATA, and --calibration FILE of score"
                ) from None
            dataset.check(values=not dataset.mapped)
        return dataset

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes of the spec and of the reading of the data, and on columns that hold a single value or count the rows."""
        notes = (*self.loaded.notes, *(f"data: {note}" for note in self.data.notes))
        for name in row_numbers(self.data):
            notes = (*notes, f"data: column {name!r} counts the rows; leave it out of data.x if it is no measurement")
        columns = constant(self.data)
        if not columns:
            return notes
        named = ", ".join(map(repr, columns[:10])) + (f" and {len(columns) - 10} more" if len(columns) > 10 else "")
        if self.data.event_shape == (len(columns),):
            return (*notes, f"data: every column of x is constant: {named}; there is nothing to learn")
        which, it = ("column of x is", "it") if len(columns) == 1 else ("columns of x are", "them")
        cure = f"there is nothing to learn in {it}, leave {it} out of data.x"
        return (*notes, f"data: {len(columns)} {which} constant: {named}; {cure}")

    @functools.cached_property
    @stage("split")
    def split(self) -> Split:
        """The rows for training, for choosing the best weights, and for the audit."""
        if self.data.split is not None:
            return self.data.split
        if self.spec.fit.start is not None:  # rows held out in that run stay held out, whatever the seed
            return read_split(warm_start.path_of(self.loaded) / SPLIT)
        with self._labelled():
            return split_rows(len(self.data), self._source.split, self.spec.seed, self.data.name)

    @functools.cached_property
    def identity(self) -> str:
        """SHA-256 of everything that the fit depends on: data, model, guide, fit (without its device) and seed."""
        return identity(self.spec.tree(), self.data_sha256, None if self.start is None else self.start.sha256)

    @functools.cached_property
    def start(self) -> Start | None:
        """The weights that the fit starts from; None for fresh weights.

        Raises:
            SpecError: `fit.start` is not a run, or a run with other data or another model.
        """
        if self.spec.fit.start is None:
            return None
        with self._labelled():
            return warm_start.read(self.loaded, lambda: self.data_sha256, self.build)

    @functools.cached_property
    @stage("hash of the data")
    def data_sha256(self) -> str:
        """SHA-256 of the data."""
        return self.data.fingerprint()

    @functools.cached_property
    def _source(self) -> Source:
        return cast(Source, slots.build("data", self.spec.data, where="data", folder=self.loaded.folder))

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the fit."""
        return cast(torch.dtype, getattr(torch, self.spec.fit.dtype))

    def rows(self, index: np.ndarray) -> torch.Tensor:
        """Return data as a tensor (n, *event) in the precision of the fit; `index` holds n row numbers.

        Raises:
            DataError: a number is too large for the precision.
        """
        x = torch.empty(len(index), *self.data.event_shape, dtype=self.dtype)
        for some in slices(len(index), fitting(math.prod(self.data.event_shape), CHUNK)):
            part = np.asarray(self.data.x[index[some]])
            forget(self.data.x)
            rows = x[some]
            with np.errstate(over="ignore"):
                rows.copy_(torch.from_numpy(part.astype(np.float32 if self.dtype is torch.float32 else np.float64)))
            if bool(rows.isinf().any()):
                first = rows.isinf().nonzero()[0].numpy()
                place = self.data.place(int(index[some][first[0]]), first[1:])
                value = part[tuple(first)]
                raise DataError(
                    f"{self.label}: {self.data.name}: {value:g} at {place} is too large for {self.spec.fit.dtype}; "
                    "rescale the data or use fit.dtype = float64"
                )
        return x

    def beside(self, index: np.ndarray) -> dict[str, torch.Tensor]:
        """Return the existing ones of `covariates` (n, C) and `exposure` (n,), which model and guide take together with x."""
        found = {"covariates": self.data.covariates, "exposure": self.data.exposure}
        return {name: torch.from_numpy(value[index]).to(self.dtype) for name, value in found.items() if value is not None}

    def batch(self, index: np.ndarray) -> Batch:
        """Return the arguments of model and guide for some rows: x (n, *event), covariates and exposure."""
        return {"x": self.rows(index), **self.beside(index)}

    def part(self, index: np.ndarray, *, training: bool = False) -> Rows:
        """Return rows for a fit: in memory, or read when needed if all data would take more than `data.chunks.BUDGET` bytes.

        Args:
            index: row numbers, (n,).
            training: draw the rows anew in each epoch, where the data are a draw from grey values.
        """
        shape, grey = (len(index), *self.data.event_shape), self.data.grey
        if self.data.large(max(self.dtype.itemsize, self.data.x.itemsize)) and grey is None:
            read = lambda rows: self.rows(index[rows.numpy()])
            return Rows(shape, read, beside=self.beside(index), dtype=self.dtype)
        return Rows.of(self.batch(index), torch.from_numpy(grey[index]) if training and grey is not None else None)

    @functools.cached_property
    def facts(self) -> Facts:
        """The facts that the VAE is built from: those of the data, or of the record of a run folder."""
        record = self.spec.record
        if record is not None:
            return Facts.recorded(record)
        facts = Facts.of(self.data)
        wide = facts.columns is not None and len(facts.columns) > MOST_COLUMNS
        return replace(facts, columns=None) if wide and self.spec.model.likelihood.name != "mixed" else facts

    def build(self) -> VAE:
        """Build the VAE with fresh weights, which depend only on the seed."""
        with self._labelled(), torch.random.fork_rng(devices=[]):
            build = lambda: assemble(self.spec, self.facts).to(self.dtype)
            check_size(build)
            torch.manual_seed(self.spec.seed)
            return build()

    def references(self) -> str | list[Reference]:
        """Build the references of the audit; `auto` is returned unchanged."""
        chosen = self.spec.audit.references
        if isinstance(chosen, str):
            return chosen
        with self._labelled():
            return [slots.build("reference", r, where=f"audit.references.{i}") for i, r in enumerate(chosen)]

    @stage("checks")
    def check(self) -> None:
        """Check everything that can be wrong before a fit: data, split, support, options, references. Nothing is written.

        Raises:
            UserError: one line.
        """
        options, observations = self.spec.fit, self.spec.audit.observations
        _ = self.start  # errors of the start are reported before its split is read
        n_test = len(self.split.test)
        with self._labelled():
            if observations != "all" and observations > n_test:
                raise SpecError(f"audit.observations: the test split has {n_test} rows, not {observations}; use all")
            resolve_device(options.device)
            plan(len(self.split.train), **{name: getattr(options, name) for name in type(options).model_fields})
        vae = self.build()
        check_support(vae, self.data, likelihood=self.spec.model.likelihood.name, label=self.label)
        for start, part in rows_of(self.data.x):  # finds numbers that are too large for the precision, before the fit
            self.rows(np.arange(start, start + len(part)))
        check_rounding(self.data, self.spec.fit.dtype, label=self.label)
        references = self.references()
        if not isinstance(references, str):
            vae.adapt(**self.batch(self.split.train[:100]))
            log_joint = log_joint_of(vae, self.batch(self.split.test[:2]))
            for reference in references:
                refusal = reference.refusal(log_joint)
                if refusal is not None:
                    raise SpecError(f"{self.label}: audit.references: {refusal}; use auto")

    def plan(self, vae: VAE, data: Dataset, obs_id: np.ndarray, budget: float = math.inf) -> AuditPlan:
        """Return what an audit would do and how long it would take.

        Args:
            vae: the fitted VAE, or one with fresh weights for a first estimate.
            data: the data.
            obs_id: numbers of the rows that are audited.
            budget: seconds that the audit may take.

        Raises:
            SpecError: a requested reference cannot be used on this model.
        """
        from elbowroom.analysis.audit.auditor import block_size
        from elbowroom.analysis.audit.plan import choose

        audit, on_data = self.spec.audit, self.on(data)
        log_joint = log_joint_of(vae, on_data.batch(obs_id[:PILOT]))
        size, n = block_size(log_joint, audit.draws), len(obs_id)
        references = cast(Any, self.references())
        others = 1 + sum(len(rows) > 0 for rows in (self.split.train, self.split.validation)) if audit.diagnose else 0
        return choose(
            references, log_joint, draws=audit.draws, keep=audit.keep, budget=budget, size=size, n_obs=n, others=others
        )

    def foreseen(self) -> AuditPlan:
        """Return the plan of the audit before the fit, estimated with fresh weights."""
        vae, obs_id = self.build(), self.split.test
        vae.adapt(**self.batch(self.split.train[:100]))
        if self.spec.audit.observations != "all":
            obs_id = obs_id[: self.spec.audit.observations]
        return self.plan(vae.eval(), self.data, np.sort(obs_id), durations.seconds(self.spec.audit.budget))

    def on(self, data: Dataset) -> Experiment:
        """Return the same experiment with other data of the same kind."""
        other = Experiment(self.loaded)
        other.__dict__.update({"data": data, "facts": self.facts})
        return other

    def tree(self) -> dict[str, Any]:
        """Return the resolved spec for the run folder, with absolute paths, versions and hashes."""
        tree = self.spec.tree()
        if isinstance(self._source, File):
            tree["data"]["path"] = str(self._source.path)
        if self.start is not None:
            tree["fit"]["start"]["run"] = str(warm_start.path_of(self.loaded))
        tree["record"] = {
            "elbowroom": metadata.version("elbowroom"),
            "versions": {name: metadata.version(name) for name in VERSIONS_OF},
            "data_sha256": self.data_sha256,
            **({} if (stamp := self.data.stamp()) is None else {"data_stamp": stamp}),
            **self.facts.tree(),
            **({} if self.data.layout is None else {"layout": self.data.layout.tree()}),
            **({} if self.start is None else {"start_sha256": self.start.sha256}),
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
