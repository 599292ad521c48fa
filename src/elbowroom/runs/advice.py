"""Settings to change after an audit, chosen by the medians of the gap and its parts.

| setting                | changed to                                                              | when                      |
|------------------------|-------------------------------------------------------------------------|---------------------------|
| `guide.family`         | `mixture`                                                               | modes missed at 5 %       |
| `guide.family`         | `flow`, from a normal                                                   | the shape part is large   |
| `guide.family`         | `full_rank_normal`, from a diagonal or low-rank one                     | covariance > 0.01 nats    |
| `guide.encoder.hidden` | twice as wide, and one layer more (`channels` of a convolution: wider)  | always                    |
| `fit.epochs`           | three times as many                                                     | always                    |
| `fit.batch_size`       | half, at least 32                                                       | the model is kept         |
| `fit.start`            | the run's own weights, frozen; half of each batch simulated from them   | the model is kept         |

Settings that the user gives take precedence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xarray as xr

from elbowroom.analysis.idata import read_table
from elbowroom.analysis.measures.table import FEW, MISSED, SMALL_GAP, column
from elbowroom.analysis.verdict.thresholds import CAUSE, known, median
from elbowroom.components import compatibility, registry
from elbowroom.errors import RunFolderError, SpecError, damaged
from elbowroom.spec import document, spec
from elbowroom.spec.experiment import Experiment
from elbowroom.spec.run_folder import AUDIT, SPLIT, read_split
from elbowroom.system import durations

if TYPE_CHECKING:
    from elbowroom.runs.fitted import FittedModel

EPOCHS = 3  # factor on the number of epochs
SMALLER = 2  # divisor of the batch size: more steps per epoch, and simulated data do not run out
LEAST_BATCH = 32
SIMULATED = 0.5
COVARIANCE = 0.01  # nats; a larger covariance part of the gap justifies a full covariance
WIDTHS = ("hidden", "channels")  # options of networks that are doubled
DEEPER = "hidden"  # option that lists layers, and gets one more


class Change(NamedTuple):
    """One changed setting, and the reason."""

    path: str
    old: Any
    new: Any
    why: str

    def __str__(self) -> str:
        return f"{self.path}: {_told(self.old)} -> {_told(self.new)} ({self.why})"


@dataclass(frozen=True)
class Changes:
    """The experiment that follows an audit's advice.

    Attributes:
        experiment: the new experiment.
        out: the folder of its run.
        changes: what is changed and why; the user's changes come last.
        retrain: whether the model is trained anew.
    """

    experiment: Experiment
    out: Path
    changes: tuple[Change, ...]
    retrain: bool

    def __str__(self) -> str:
        how = "everything is trained anew" if self.retrain else "prior, decoder and likelihood are kept, the guide is trained"
        return "\n".join([f"{self.out}: {how}", *(f"  {change}" for change in self.changes)])


def propose(
    run: FittedModel,
    *,
    retrain: bool = False,
    out: str | Path | None = None,
    set: Iterable[str] = (),
    budget: float | str | None = None,
    allow_python: bool = False,
) -> Changes:
    """Choose what to change after the audit of a run; nothing is written.

    Args:
        run: an audited run.
        retrain: train prior, decoder and likelihood anew too.
        out: the new folder; by default `<run>-improved` or `<run>-retrained`.
        set: the user's changes, `a.b=c`, which take precedence.
        budget: time that the audit may take; by default the budget of the old one.
        allow_python: as in `Experiment.load`.

    Raises:
        RunFolderError: the run has no audit.
        SpecError: a change cannot be used, or would change the test data.
    """
    table = audited(run)
    given = document.assignments(set)
    for key in given:
        _permit(key, retrain)
    tree = run.experiment.spec.tree()
    tree.pop("record", None)
    with damaged(run.path / AUDIT, "audit again"):
        tree["audit"] = json.loads(table.attrs["audit"])
    if budget is not None:
        tree["audit"]["budget"] = budget if isinstance(budget, str) else f"{durations.seconds(budget):g}s"
    with damaged(run.path / AUDIT, "audit again"):
        changes = _advised(tree, table, retrain)
    changes = [change for change in changes if not any(_covers(key, change.path) for key in given)]
    for change in changes:
        _put(tree, change.path, change.new)
    tree["fit"]["start"] = None
    if not retrain:
        tree["fit"]["start"] = {"run": str(run.path.resolve()), "freeze": True, "simulated": SIMULATED}
        if ("fit", "start", "simulated") not in given:
            why = "half of each batch is drawn from the kept model: data without end for the encoder"
            changes.append(Change("fit.start.simulated", 0.0, SIMULATED, why))
    for key, value in given.items():
        changes.append(Change(".".join(key), _at(tree, key), value, "--set"))
    tree, notes = document.assign(tree, given)
    del notes
    loaded = spec.validate(
        tree, label=run.experiment.label, folder=run.path.resolve(), assigned=given, allow_python=allow_python
    )
    experiment = Experiment(loaded, run.experiment.given)
    experiment.__dict__["data"] = run.data
    old, new = (_test_rows(one) for one in (run, experiment))
    if not np.array_equal(old, new):
        raise SpecError("--set seed: it also splits the data, so the retrained run would be tested on other rows")
    ending = "retrained" if retrain else "improved"
    place = Path(out) if out is not None else run.path.with_name(f"{run.path.resolve().name}-{ending}")
    return Changes(experiment, place, tuple(changes), retrain)


def _advised(tree: Mapping[str, Any], table: xr.Dataset, retrain: bool) -> list[Change]:
    """Return the changes that the audit's table suggests."""
    certain = known(table)
    part = {name: median(column(table, f"gap_{name}")[certain])[0] for name in ("total", "amortization", "covariance", "shape")}
    lost = column(table, "missed_mass")[certain] > MISSED
    changes: list[Change] = []
    family = tree["guide"]["family"]["name"]
    better, why = _family(family, part, float(lost.mean()) if lost.size else 0.0)
    if better is not None and _goes(tree, better):
        changes.append(Change("guide.family", family, {"name": better}, why))
    encoder = tree["guide"]["encoder"]
    missed = f"the encoder misses {part['amortization']:.3f} of {part['total']:.3f} nats (medians)"
    why = missed if math.isfinite(part["amortization"]) else "a larger encoder"
    for option in WIDTHS:
        if option in encoder:
            old = encoder[option]
            new = [2 * width for width in old] if isinstance(old, list | tuple) else 2 * old
            if option == DEEPER and isinstance(new, list):
                new = [*new, *new[-1:]]
            if new != old:
                changes.append(Change(f"guide.encoder.{option}", old, new, why))
    fit = tree["fit"]
    changes.append(Change("fit.epochs", fit["epochs"], EPOCHS * fit["epochs"], "longer; the best epoch is kept all the same"))
    smaller = max(min(LEAST_BATCH, fit["batch_size"]), fit["batch_size"] // SMALLER)
    if not retrain and smaller != fit["batch_size"]:
        changes.append(Change("fit.batch_size", fit["batch_size"], smaller, "more steps"))
    return changes


def _family(family: str, part: Mapping[str, float], lost: float) -> tuple[str | None, str]:
    """Return a richer guide family and the reason, if the parts of the gap suggest one.

    `part` are medians of the gap and its parts, NaN where unknown; `lost` is the share of data at which a mode is missed.
    """
    covariance, shape = part["covariance"], part["shape"]
    normals = ("diagonal_normal", "low_rank_normal", "full_rank_normal")
    if lost >= FEW and family != "mixture":
        return "mixture", f"a mode is missed at {lost:.0%} of the data"
    if family in normals and shape > max(SMALL_GAP / 2, CAUSE * part["total"]):
        return "flow", f"no normal reaches {shape:.3f} of {part['total']:.3f} nats (medians)"
    if family in normals[:2] and not covariance < COVARIANCE:
        gain = f"a full covariance closes {covariance:.3f} nats" if math.isfinite(covariance) else "a richer family"
        return "full_rank_normal", gain
    return None, ""


def _goes(tree: Mapping[str, Any], family: str) -> bool:
    """Say whether a guide family fits the prior and the objective."""

    class Named(NamedTuple):
        name: str

    blocks = (tree["model"]["prior"]["name"], family, tree["fit"]["objective"]["name"])
    return family in registry.names("guide") and compatibility.clash(*map(Named, blocks)) is None


def _permit(key: tuple[str, ...], retrain: bool) -> None:
    """Refuse changes that would make before and after incomparable."""
    told = f"--set {'.'.join(key)}"
    if key[0] == "data":
        raise SpecError(f"{told}: before and after are compared on the same data")
    if key[0] == "model" and not retrain:
        raise SpecError(f"{told}: the model is kept; change it with --retrain")
    if key[:2] == ("fit", "start") and (retrain or key[2:] != ("simulated",)):
        raise SpecError(f"{told}: `improve` sets it itself" + ("" if retrain else "; only fit.start.simulated may be changed"))


def _covers(key: tuple[str, ...], path: str) -> bool:
    """Say whether a change of the user's concerns this setting: the same path, a parent or a child."""
    other = tuple(path.split("."))
    n = min(len(key), len(other))
    return key[:n] == other[:n]


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *way, last = path.split(".")
    node: Any = tree
    for part in way:
        node = node[part]
    node[last] = value


def _at(tree: Any, path: Iterable[str]) -> Any:
    for part in path:
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree.get("name") if isinstance(tree, Mapping) and "name" in tree else tree


def audited(run: FittedModel) -> xr.Dataset:
    """Return the table of the run's audit of its own test data."""
    if not (run.path / AUDIT).is_file():
        raise RunFolderError(f"{run.path}: is not audited; run `elbowroom audit {run.path}` first")
    return read_table(run.path / AUDIT)


def _test_rows(one: FittedModel | Experiment) -> np.ndarray:
    if isinstance(one, Experiment):
        return np.sort(one.split.test)
    return np.sort(read_split(one.path / SPLIT).test)


def _told(value: Any) -> str:
    if isinstance(value, Mapping) and set(value) == {"name"}:
        return str(value["name"])
    return json.dumps(value) if isinstance(value, list | tuple | Mapping) else "none" if value is None else str(value)
