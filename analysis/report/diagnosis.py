"""The report's view of `diagnosis.nc`: the table of verdicts, the missing parts, and the figures.

A diagnosis, or a part of it, may be absent (audits with audit.diagnose=false, or of an older version): a sentence says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import xarray as xr

from elbowroom.analysis.plots.drawing import drawn
from elbowroom.analysis.plots.style import Absent, Plot, percent, say
from elbowroom.analysis.verdict import judgement, rules
from elbowroom.analysis.verdict.thresholds import EFFECT, SOUND, effect_in_words

NO_DIAGNOSIS = "the run folder has no diagnosis.nc; `elbowroom audit` with audit.diagnose=true writes it"
SPLITS = ("train", "validation", "simulated")
GROUPS = {  # group of diagnosis.nc -> its name in the report
    "information": "what the latents carry",
    "prior_sbc": "calibration on simulated data",
    "posterior_sbc": "calibration on these data",
    "checks": "checks of the model",
    "pit": "PIT of the data given z",
    "predictive": "predictive distributions beside the data",
    "train": "gaps of training data",
    "validation": "gaps of validation data",
    "simulated": "gaps of simulated data",
}


@dataclass(frozen=True)
class Line:
    """A line of the table of verdicts, ready to print.

    Attributes:
        verdict: its name.
        number: its evidence, with 95 % interval and units.
        rests_on: the same in words.
        rule: the rule, with its threshold.
        advice: what to do.
        good: whether it is `sound`.
    """

    verdict: str
    number: str
    rests_on: str
    rule: str
    advice: str
    good: bool


def lines(table: xr.Dataset, tree: xr.DataTree | None) -> list[Line]:
    """Return the verdicts, the most consequential first; without a diagnosis, from the audit's table alone."""
    stored = part(tree, "verdicts")
    verdicts = rules.judge(table) if stored is None else judgement.from_dataset(stored)
    return [
        Line(one.verdict, number(one), _sentence(one.rests_on), _sentence(one.rule), one.advice, one.verdict == SOUND)
        for one in verdicts
    ]


def _sentence(text: str) -> str:
    """Start with a capital, unless with a symbol, and end with a full stop."""
    first = text.partition(" ")[0]
    return f"{text if first in ('log', 'p') else text[:1].upper() + text[1:]}."


def number(one: judgement.Judgement) -> str:
    """Format a judgement's number with its interval and units."""
    share = one.units.startswith("share")
    write = percent if share else (lambda value: f"{value:g}" if one.units == "latents" else say(value))
    interval = f" [{write(one.low)}, {write(one.high)}]" if math.isfinite(one.low) and math.isfinite(one.high) else ""
    units = one.units.removeprefix("share ") if share else one.units
    if one.units == "latents" and one.number == 1:
        units = "latent"
    if one.units.startswith("effect"):
        return f"effect {effect_in_words(one.number, one.units.removeprefix(EFFECT))}"
    return f"{write(one.number)}{interval} {units}".strip()


def missing(tree: xr.DataTree | None) -> list[str]:
    """Return, as sentences, which parts are missing and why."""
    if tree is None:
        return [
            f"Judged by the gaps alone, because {NO_DIAGNOSIS}: overfitting, collapsed latents, calibration and misfit of the "
            "model were not looked for."
        ]
    return [f"Not known: {GROUPS.get(name, name)} ({reason})." for name, reason in reasons(tree).items()]


def reasons(tree: xr.DataTree) -> dict[str, str]:
    """Return why parts are missing, name -> reason."""
    found = (line.partition(": ") for line in str(tree.attrs.get("missing", "")).splitlines() if line.strip())
    return {name: (reason or "no reason was given").rstrip(".") for name, _, reason in found}


def part(tree: xr.DataTree | None, name: str) -> xr.Dataset | None:
    """Return a group of the diagnosis, None where it is missing."""
    return tree[name].to_dataset() if tree is not None and name in tree.children else None


def draw(table: xr.Dataset, tree: xr.DataTree | None, *, audited: str) -> list[Plot | Absent]:
    """Draw the figures of the diagnosis, or give the reason why there is none; `audited` names the data, such as `test`."""
    children = {} if tree is None else dict(tree.children)
    pits = {name: children[name].to_dataset() for name in children if name == "pit" or name.startswith("pit_")}
    figures: Mapping[str, tuple[str, str, tuple[Any, ...]]] = {
        "calibration_simulated": ("prior_sbc", "calibration.calibration", (part(tree, "prior_sbc"), "simulated")),
        "calibration_observed": ("posterior_sbc", "calibration.calibration", (part(tree, "posterior_sbc"), "observed")),
        "information": ("information", "information.information", (part(tree, "information"),)),
        "checks": ("checks", "criticism.checks", (part(tree, "checks"),)),
        "pit": ("pit", "criticism.pit", (pits,)),
        "predictive": ("predictive", "predictive.predictive", (tree,)),
    }
    tables = {audited: table} | {name: one for name in SPLITS if (one := part(tree, name)) is not None}
    found: list[Plot | Absent] = [drawn("parts", "gaps.parts", tables)]
    why = {} if tree is None else reasons(tree)
    for name, (group, drawer, given) in figures.items():
        if tree is None:
            found.append(Absent(name, f"No figure of {GROUPS[group]}: {NO_DIAGNOSIS}."))
            continue
        made = drawn(name, drawer, *given)
        reason = why.get(group) or (why.get("checks") if group in ("pit", "predictive") else None)
        found.append(Absent(name, f"No figure of {GROUPS[group]}: {reason}.") if isinstance(made, Absent) and reason else made)
    return found
