"""A fitted model: an experiment in its run folder, with its weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from elbowroom.data.columns import Layout
from elbowroom.data.dataset import Dataset
from elbowroom.data.file import read_like
from elbowroom.errors import RunFolderError, SpecError
from elbowroom.models.vae import VAE
from elbowroom.spec import document, run_folder, spec
from elbowroom.spec.assembly import restore
from elbowroom.spec.experiment import Experiment
from elbowroom.spec.identity import identity
from elbowroom.system import durations
from elbowroom.system.archive import check_stored
from elbowroom.system.stages import stage

if TYPE_CHECKING:
    import pandas as pd


@dataclass(eq=False)
class FittedModel:
    """A fitted experiment in its folder.

    Attributes:
        path: the folder.
        experiment: the experiment.
        vae: the VAE with its best weights, in eval mode.
        summary: a sentence about the fit; empty for a run that was loaded.
    """

    path: Path
    experiment: Experiment
    vae: VAE
    summary: str = field(default="", repr=False)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    @classmethod
    @stage("open the run")
    def load(
        cls,
        path: str | Path,
        set: Iterable[str] = (),
        *,
        data: np.ndarray | pd.DataFrame | None = None,
        allow_python: bool = False,
    ) -> Self:
        """Open a run folder.

        Args:
            path: the folder.
            set: changes to the audit, `audit.x=y`; settings of the fit cannot be changed.
            data: the rows that it was fitted to, if they came from Python.
            allow_python: execute the files and modules that its spec names as `python:...`; else they are refused unread.

        Raises:
            RunFolderError: it is missing, not a run folder, not finished, or its files do not belong together.
        """
        path = Path(path)
        if not (path / run_folder.SPEC).is_file():
            what = "is not a run folder" if path.is_dir() else "no such run folder"
            raise RunFolderError(f"{path}: {what} (no {run_folder.SPEC}); make one with `elbowroom fit SPEC`")
        tree = document.read(path / run_folder.SPEC)
        changes = document.assignments(set)
        for key in changes:
            if key[0] != "audit":
                raise SpecError(f"--set {'.'.join(key)}: the run is fitted; only audit.* can be set for it")
        tree, _ = document.assign(tree, changes)
        label = str(path / run_folder.SPEC)
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
        _load_weights(vae, path / run_folder.WEIGHTS)
        return cls(path, experiment, vae.eval())

    @property
    def data(self) -> Dataset:
        """The data that the run was fitted to.

        Raises:
            RunFolderError: they have changed since the fit.
        """
        record, stamp = self.experiment.spec.record, self.experiment.data.stamp()
        untouched = record is not None and stamp is not None and stamp == record.data_stamp
        if record is not None and not untouched and self.experiment.data_sha256 != record.data_sha256:
            raise RunFolderError(f"{self.path}: {self.experiment.data.name} has changed since the fit; fit again")
        return self.experiment.data

    def with_budget(self, budget: float | str) -> Self:
        """Return the same run with another `audit.budget`."""
        seconds = durations.seconds(budget)
        tree = self.experiment.spec.model_copy(
            update={
                "audit": self.experiment.spec.audit.model_copy(
                    update={"budget": budget if isinstance(budget, str) else f"{seconds:g}s"}
                )
            }
        )
        experiment = Experiment(replace(self.experiment.loaded, spec=tree), self.experiment.given)
        known = ("data", "data_sha256")  # keep these cached values: data are read and hashed once
        experiment.__dict__.update({key: self.experiment.__dict__[key] for key in known if key in self.experiment.__dict__})
        return replace(self, experiment=experiment)


def _known(record: Any, label: str) -> None:
    """Refuse a record with unknown keys, which a newer version of Elbowroom has written."""
    unknown = [key for key in record if key not in spec.Record.model_fields] if isinstance(record, dict) else []
    if unknown:
        theirs, ours = record.get("elbowroom", "unknown"), metadata.version("elbowroom")
        raise RunFolderError(
            f"{label}: record.{unknown[0]}: unknown (written by elbowroom {theirs}, this is {ours}); upgrade elbowroom"
        )


def _check_types(vae: VAE, state: Any) -> None:
    """Raise a TypeError if weights are not tensors by name, of the kinds of numbers that the model has."""
    if not isinstance(state, dict):
        raise TypeError("it holds no weights by name")
    for name, own in vae.state_dict().items():
        value = state.get(name, own)
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} is no tensor")
        if value.is_complex() or value.is_floating_point() != own.is_floating_point():
            raise TypeError(
                f"{name} holds {str(value.dtype).removeprefix('torch.')}, not {str(own.dtype).removeprefix('torch.')}"
            )


def _load_weights(vae: VAE, path: Path) -> None:
    try:
        check_stored(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunFolderError(f"{path}: missing: the fit has not ended; go on with `elbowroom fit SPEC --resume`") from None
    except Exception as error:
        reason = str(error).split(". ")[0][:80]
        raise RunFolderError(f"{path}: damaged ({reason}); fit again with --overwrite") from None
    try:
        _check_types(vae, state)
        restore(vae, state)
        bad = [name for name, value in vae.state_dict().items() if not bool(value.isfinite().all())]
        if bad:
            raise TypeError(f"{bad[0]} is not finite")
    except (RuntimeError, TypeError, AttributeError) as error:
        raise RunFolderError(f"{path}: does not belong to this spec ({str(error).splitlines()[-1].strip()[:120]})") from None
