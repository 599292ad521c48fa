"""Which plate holds the data: the one named, the only one of the latents, or the only one that holds all that is observed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample

from elbowroom.errors import UnsupportedProgram, nearest
from elbowroom.inference.program.sites import frame_of


def data_plate(
    latents: Mapping[str, Mapping[str, Any]], trace: Trace, asked: str | None, hold: Sequence[str]
) -> tuple[str, list[str]]:
    """Return the name of the data plate, and notes about the choice.

    Args:
        latents: nodes of the latent sites.
        trace: of the model.
        asked: the name that the user gave, if any.
        hold: plates that are not the data's: their latents are held, as global ones are.

    Raises:
        UnsupportedProgram: no plate holds a latent, several could be meant, or a name is not that of a plate.
    """
    plates = sorted({f.name for node in trace.nodes.values() if node["type"] == "sample" for f in node["cond_indep_stack"]})
    if not latents:
        raise UnsupportedProgram("model: it has no latent sample site")
    for what, name in [("plate", asked), *(("hold", name) for name in ([hold] if isinstance(hold, str) else hold))]:
        if name is not None and name not in plates:
            raise UnsupportedProgram(f"{what}={name!r}: the model has no such plate; it has {plates}{nearest(name, plates)}")
    if asked is not None and asked in hold:
        raise UnsupportedProgram(f"hold={asked!r}: this is the data plate, by plate={asked!r}; hold another one")
    held = {hold} if isinstance(hold, str) else set(hold)
    stacks = {name: {f.name for f in node["cond_indep_stack"]} for name, node in latents.items()}
    if asked is not None:
        if not any(frame_of(node, asked) for node in latents.values()):
            raise UnsupportedProgram(f"plate={asked!r}: no latent site lies inside it")
        return asked, []
    if not any(stacks.values()):
        raise UnsupportedProgram(
            f"model: no plate holds a latent site ({', '.join(map(repr, latents))}); one datum cannot be told from the "
            "next. Open `with pyro.plate('data', len(x)):` around the latent and the observed site"
        )
    local = [stack - held for stack in stacks.values() if stack - held]
    if not local:
        raise UnsupportedProgram(f"hold={sorted(held)}: every latent lies in these plates, so none is left to be audited")
    common = set.intersection(*local)
    if len(common) == 1:
        return common.pop(), []
    return _holding_the_data(stacks, held, trace)


def _holding_the_data(stacks: Mapping[str, set[str]], held: set[str], trace: Trace) -> tuple[str, list[str]]:
    """Return the plate that holds a latent and every observed site; of several, the one with the latents of the others."""
    observed = [
        {frame.name for frame in node["cond_indep_stack"]}
        for node in trace.nodes.values()
        if node["type"] == "sample" and node["is_observed"] and not site_is_subsample(node)
        if not node["infer"].get("_deterministic") and node["cond_indep_stack"]
    ]
    every = set.union(*stacks.values())
    able = (set.intersection(*observed) if observed else every) - held
    inside = {plate: {name for name, stack in stacks.items() if plate in stack} for plate in sorted(able & every)}
    first = [p for p, names in inside.items() if all(names > others for q, others in inside.items() if q != p)]
    if len(first) == 1:
        others = sorted({name for name in stacks if name not in inside[first[0]]})
        rest = f"; {', '.join(map(repr, others))} lie outside it and are held" if others else ""
        return first[0], [
            f"the data plate is {first[0]!r}: no other has every observed site and these latents{rest} (plate=... says another)"
        ]
    listed = ", ".join(f"{name!r} in {sorted(stack) or 'no plate'}" for name, stack in stacks.items())
    if len(inside) > 1:
        one, other = list(inside)[:2]
        crossed = inside[one] - inside[other] and inside[other] - inside[one]
        cure = (
            f". Effects that are crossed are audited given each other, held at the guide's median: hold=[{other!r}], then "
            f"hold=[{one!r}]"
        )
        raise UnsupportedProgram(
            f"model: the data plate could be any of {list(inside)} ({listed}); say which holds the data, e.g. plate={one!r}"
            f"{cure if crossed else ''}"
        )
    raise UnsupportedProgram(
        f"model: its latent sites share no plate ({listed}), and none holds both a latent and every observed site; say which "
        "holds the data: plate=..."
    )
