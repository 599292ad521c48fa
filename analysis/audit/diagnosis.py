"""The evidence of an audit beyond the gap of its data, for the verdicts and for the figures of the report.

Each part is skipped, with a reason, where it does not apply or the budget has ended:

* `prior_sbc`: regime S, the guide on data simulated from the model, whose true z is known
* `posterior_sbc`: regime R, the guide on the audited data, against certified draws of their posteriors
* `information`: rate and distortion, mutual information, aggregate posterior, active and collapsed latents
* `checks`: whether the model generates data like these
* `simulated`, and each of the other data (such as `train`, `validation`): the table of their gaps
* `verdicts`: the judgement, see `verdict.rules`
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
import xarray as xr

from elbowroom.analysis.verdict import judgement, rules
from elbowroom.errors import UnsupportedProgram
from elbowroom.inference.posterior import Posterior
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.inference.target.simulate import simulate_for_guide
from elbowroom.system.stages import stage

log = logging.getLogger("elbowroom")

SEED_STEP = 15_485_863  # between the parts, so that they share no random numbers
SIMULATED = 100  # data of the audit of simulated data, at most, and of those of other splits
Auditor = Callable[[LogJoint, int], xr.Dataset]


@stage("judgement")
def diagnose(
    log_joint: LogJoint,
    table: xr.Dataset,
    posteriors: Sequence[Posterior],
    beside: Mapping[str, LogJoint],
    audit: Auditor,
    *,
    seed: int,
    entries: int | None = None,
    until: float = math.inf,
    say: Callable[[str], None] = lambda sentence: None,
) -> xr.DataTree:
    """Compute the evidence for the verdicts, and the verdicts.

    Args:
        log_joint: the model and guide of the audited data.
        table: their audit.
        posteriors: their references.
        beside: log joints of other data of the same model and guide, by name.
        audit: audits a log joint with the same references, given a seed, and returns its table.
        seed: random seed.
        entries: entries of one datum, where the data are discrete.
        until: value of `time.monotonic()` after which no part is started.
        say: called with a description of each part before it starts.

    Returns:
        One child per part (see the module); the attribute `missing` lists, one per line, the parts left out and the reasons.
    """
    from elbowroom.analysis.checks import calibration, criticism
    from elbowroom.analysis.latents.information import information

    best = max(posteriors, key=lambda p: int(p.trusted.sum()), default=None)
    found: dict[str, xr.Dataset | xr.DataTree] = {}
    missing: list[str] = []

    def no_reference() -> xr.Dataset:
        raise UnsupportedProgram("no reference certified any datum")

    certified = best if best is not None and bool(best.trusted.any()) else None
    parts: dict[str, Callable[[int], xr.Dataset | xr.DataTree]] = {
        "information": lambda s: information(log_joint, reference=certified, seed=s, entries=entries),
        "prior_sbc": lambda s: calibration.simulated(log_joint, seed=s),
        "posterior_sbc": lambda s: no_reference() if certified is None else calibration.observed(log_joint, certified, seed=s),
        "checks": lambda s: no_reference() if certified is None else criticism.criticise(log_joint, certified, seed=s),
        "simulated": lambda s: audit(simulate_for_guide(_some(log_joint), s)[0], s),
        **{name: partial(audit, other) for name, other in beside.items()},
    }
    for number, (name, part) in enumerate(parts.items(), start=1):
        if time.monotonic() > until:
            missing.append(f"{name}: the budget ended before it")
            continue
        say(WORDS.get(name, f"gaps of {name} data"))
        try:
            with stage(name):
                found[name] = part(seed + SEED_STEP * number)
        except UnsupportedProgram as reason:
            missing.append(f"{name}: {reason}")
            log.info("%s: not available, %s", name, reason)
    flat = {name: part for name, part in found.items() if isinstance(part, xr.Dataset)}
    if (checks := found.pop("checks", None)) is not None:  # ArviZ expects predictive groups at the root
        groups = {name: child.to_dataset() for name, child in checks.children.items()}
        flat["checks"] = groups.pop("statistics", xr.Dataset()).assign_attrs(checks.attrs)
        found |= groups | {"checks": flat["checks"]}
    found["verdicts"] = judgement.as_dataset(rules.judge(table, flat))
    tree = xr.DataTree.from_dict({f"/{name}": part for name, part in found.items()})
    tree.attrs["missing"] = "\n".join(missing)
    return tree


WORDS = {
    "information": "what the latents carry",
    "prior_sbc": "calibration on simulated data",
    "posterior_sbc": "calibration on these data",
    "checks": "whether the model makes such data",
    "simulated": "gaps of simulated data",
}


def _some(log_joint: LogJoint) -> LogJoint:
    """Return the log joint of at most `SIMULATED` of the data, evenly spread; all where they cannot be subset."""
    rows = np.linspace(0, log_joint.n_obs - 1, min(SIMULATED, log_joint.n_obs)).round().astype(int)
    return log_joint.some(torch.as_tensor(rows, device=log_joint.device))[0]
