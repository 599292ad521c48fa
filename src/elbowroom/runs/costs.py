"""What the options of a question cost, and whether that fits into this machine's memory; nothing is computed before."""

from __future__ import annotations

import math
from collections.abc import Mapping
from inspect import Parameter
from typing import TYPE_CHECKING, Any

from elbowroom.errors import SpecError
from elbowroom.system.archive import SHARE, amount, memory

if TYPE_CHECKING:
    from elbowroom.runs.fitted import FittedModel

COPIES = 4  # of the numbers of a draw that are held at once
BYTES = 8
PLAIN = ("n", "steps", "draws", "keep", "samples", "repeats", "temperatures")
"""Options that cost a draw of (z, x) each."""


def check(model: FittedModel, given: Mapping[str, Any], usual: Mapping[str, Parameter]) -> None:
    """Refuse options whose results cannot be held in memory.

    Args:
        model: the model that is asked.
        given: option -> value of the question.
        usual: option -> the parameter with its default, which is not checked.

    Raises:
        SpecError: an option is too large; says what it would take, and the largest value that fits.
    """
    named = {name: given[name] for name in (*PLAIN, "points") if isinstance(given.get(name), int)}
    numbers = {name: value for name, value in named.items() if value != usual[name].default}
    if not numbers:
        return
    spec, facts = model.experiment.spec, model.experiment.facts
    each = COPIES * BYTES * (spec.model.latent_dim + math.prod(facts.event_shape))
    if given.get("data") is not None:
        numbers.pop("n", None)  # the first so many rows of these data
    for name, value in numbers.items():
        most = int(SHARE * memory() // each)
        size = value * each
        if name == "points":  # per side of a plane
            most, size = math.isqrt(most), value * size
        if value > most:
            raise SpecError(
                f"{name}: {value:,} would take about {amount(size)}, and this machine has {amount(memory())} of memory; "
                f"at most {most:,} fit"
            )
