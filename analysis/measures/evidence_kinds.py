"""What kind of number stands for log p(x) of a datum: decided here alone, whoever computed it.

| kind           | `log_evidence`                                                                                  |
|----------------|-------------------------------------------------------------------------------------------------|
| `exact`        | a value, up to its numerical error                                                              |
| `estimate`     | a value with its standard error                                                                 |
| `contradicted` | a value below the ELBO by more than 5 standard errors, which cannot be: one of the two is wrong |
| `bound`        | none: bounds are all that is known                                                              |
| `none`         | none: the model cannot be evaluated at the datum                                                |

Audits and answers state method and reason of each datum in words. `evidence_of` takes these words from here, and here the kind
is read off them again. A method's own name says nothing of its kind: references of others are named as they like.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import xarray as xr

from elbowroom.analysis.measures.table import column

EXACT, ESTIMATE, CONTRADICTED, BOUND, NONE = "exact", "estimate", "contradicted", "bound", "none"
VALUES = {EXACT: "exact", ESTIMATE: "estimated", CONTRADICTED: "contradicted"}  # kinds with a value, as in: log p(x) is ...
ERRORS, ROUNDING = 5.0, 1e-6  # standard errors, and nats, by which log p(x) may lie below the ELBO
OF_EXACT = "exact up to its numerical error"  # reasons for which there is a value
OF_GUIDE = "the guide's weights can be trusted where it puts mass"
OF_REFIT = "the weights of q* can be trusted"
WEIGHTS, REFIT = "importance sampling", "importance sampling from q*"  # methods that estimate: from the guide, from q*
ENDING = " estimate"  # of the method of an estimate


def kinds(table: xr.Dataset) -> np.ndarray:
    """Return the kind of every datum of an audit or an answer, (N,)."""
    error = np.hypot(column(table, "elbo_se"), np.nan_to_num(column(table, "log_evidence_se")))
    below = has_value(table) & (column(table, "gap_total") < -ERRORS * error - ROUNDING)
    kind = kind_of(column(table, "log_evidence"), _words(table, "evidence_method"), _words(table, "evidence_reason"))
    return np.where(below, CONTRADICTED, kind)


def kind_of(value: np.ndarray | float, method: np.ndarray | str, reason: np.ndarray | str) -> np.ndarray:
    """Return the kind by what is said of log p(x) itself; where no reason is, an estimate is known by its method's ending."""
    exact = np.where(np.equal(reason, ""), ~np.strings.endswith(method, ENDING), np.equal(reason, OF_EXACT))
    no_value = np.where(np.equal(method, NONE), NONE, BOUND)
    return np.where(np.isfinite(value), np.where(exact, EXACT, ESTIMATE), no_value)


def counts(table: xr.Dataset) -> Counter[str]:
    """Return how many data are of each kind."""
    return Counter(kinds(table).tolist())


def has_value(table: xr.Dataset) -> np.ndarray:
    """Return which data have a value of log p(x), (N,); of the others bounds are known at most."""
    return np.isfinite(column(table, "log_evidence"))


def of_guide(table: xr.Dataset) -> np.ndarray:
    """Return where log p(x) is estimated by the guide's own draws, which do not see a mode that it misses, (N,)."""
    if "evidence_reason" in table:
        return np.equal(_words(table, "evidence_reason"), OF_GUIDE)
    return np.equal(_words(table, "evidence_method"), WEIGHTS + ENDING)


def methods(table: xr.Dataset, *of: str) -> dict[str, int]:
    """Return how many data of these kinds, or of all, owe their evidence to each method, the most frequent first."""
    names = _words(table, "evidence_method")[np.isin(kinds(table), of) if of else slice(None)]
    return dict(Counter(sorted(names[names != ""].tolist())).most_common())


def estimated(table: xr.Dataset) -> tuple[str, str, str]:
    """Return in words what the estimates are, by what, and why they are accepted: log p(x) is an ..., by ..., because ..."""
    names = [name.removesuffix(ENDING) for name in methods(table, ESTIMATE)]
    by = " and ".join(names)
    if all(name.startswith(WEIGHTS) for name in names):
        return "importance-sampling estimate", by, "its weights are well behaved"
    return f"estimate by {by}", by, "its method says that it can be trusted"


def _words(table: xr.Dataset, name: str) -> np.ndarray:
    return table[name].values.astype(str) if name in table else np.full(table.sizes["obs_id"], "")
