"""The kind of evidence for log p(x) of a datum; this module alone decides it, for any method.

| kind           | `log_evidence`                                                                                  |
|----------------|-------------------------------------------------------------------------------------------------|
| `exact`        | a value, up to its numerical error                                                              |
| `estimate`     | a value with its standard error                                                                 |
| `contradicted` | a value below the ELBO by more than 5 standard errors, which cannot be: one of the two is wrong |
| `bound`        | none: only bounds are known                                                                     |
| `none`         | none: the model cannot be evaluated at the datum                                                |

Audits and answers store method and reason of each datum in words. `evidence_of` takes these words from this module, and the
kind is inferred from them here. A method's name does not show its kind, since users can name their own references freely.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import xarray as xr

from elbowroom.analysis.measures.table import column

EXACT, ESTIMATE, CONTRADICTED, BOUND, NONE = "exact", "estimate", "contradicted", "bound", "none"
VALUES = {EXACT: "exact", ESTIMATE: "estimated", CONTRADICTED: "contradicted"}  # kinds with a value, as in: log p(x) is ...
ERRORS, ROUNDING = 5.0, 1e-6  # standard errors, and nats, that log p(x) may lie below the ELBO
OF_EXACT = "exact up to its numerical error"  # reasons for which there is a value
OF_GUIDE = "the guide's weights can be trusted where it puts mass"
OF_REFIT = "the weights of q* can be trusted"
WEIGHTS, REFIT = "importance sampling", "importance sampling from q*"  # methods that estimate: from the guide, from q*
ENDING = " estimate"  # ending of the method of an estimate


def kinds(table: xr.Dataset) -> np.ndarray:
    """Return the kind of every datum of an audit or an answer, (N,)."""
    error = np.hypot(column(table, "elbo_se"), np.nan_to_num(column(table, "log_evidence_se")))
    below = has_value(table) & (column(table, "gap_total") < -ERRORS * error - ROUNDING)
    kind = kind_of(column(table, "log_evidence"), _words(table, "evidence_method"), _words(table, "evidence_reason"))
    return np.where(below, CONTRADICTED, kind)


def kind_of(value: np.ndarray | float, method: np.ndarray | str, reason: np.ndarray | str) -> np.ndarray:
    """Return the kind by value, method and reason; without a reason, an estimate is recognised by the ending of its method."""
    exact = np.where(np.equal(reason, ""), ~np.strings.endswith(method, ENDING), np.equal(reason, OF_EXACT))
    no_value = np.where(np.equal(method, NONE), NONE, BOUND)
    return np.where(np.isfinite(value), np.where(exact, EXACT, ESTIMATE), no_value)


def counts(table: xr.Dataset) -> Counter[str]:
    """Return how many data are of each kind."""
    return Counter(kinds(table).tolist())


def has_value(table: xr.Dataset) -> np.ndarray:
    """Return which data have a value of log p(x), (N,); the others have bounds at most."""
    return np.isfinite(column(table, "log_evidence"))


def of_guide(table: xr.Dataset) -> np.ndarray:
    """Return where log p(x) is estimated by draws of the guide, which may miss a mode, (N,)."""
    if "evidence_reason" in table:
        return np.equal(_words(table, "evidence_reason"), OF_GUIDE)
    return np.equal(_words(table, "evidence_method"), WEIGHTS + ENDING)


def methods(table: xr.Dataset, *of: str) -> dict[str, int]:
    """Return the number of data per evidence method, the most frequent first, for data of the given kinds, or all."""
    names = _words(table, "evidence_method")[np.isin(kinds(table), of) if of else slice(None)]
    return dict(Counter(sorted(names[names != ""].tolist())).most_common())


def estimated(table: xr.Dataset) -> tuple[str, str, str]:
    """Return in words what the estimates are ("an ..."), their methods, and the reason to accept them ("because ...")."""
    names = [name.removesuffix(ENDING) for name in methods(table, ESTIMATE)]
    by = " and ".join(names)
    if all(name.startswith(WEIGHTS) for name in names):
        return "importance-sampling estimate", by, "its weights are well behaved"
    return f"estimate by {by}", by, "its method says that it can be trusted"


def _words(table: xr.Dataset, name: str) -> np.ndarray:
    return table[name].values.astype(str) if name in table else np.full(table.sizes["obs_id"], "")
