"""`python -m examples.programs`: audit every program of the list, compare with Pyro and with sums by hand, write the page.

For each program: the ELBO of the audit beside Pyro's own (`Trace_ELBO`, or `TraceEnum_ELBO` where discrete sites are summed
out), log p(x) beside a computation that shares nothing with Elbowroom, and where the program is refused, the cure that the
message names. The page is docs/programs.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO

import elbowroom as er
from elbowroom.errors import UnsupportedProgram
from elbowroom.inference.target.log_joint import LogJoint
from examples.programs.catalogue import ENTRIES, Entry, Pair, fresh

MODULES = ("autoguides", "gaussian", "discrete", "hierarchies", "vaes", "sequences")
PAGE = Path(__file__).parents[2] / "docs" / "programs.md"
BATCHES, PARTICLES = 20, 25  # of Pyro's ELBO
FAR = 4.0  # standard errors beyond which two numbers differ
SLACK = 2e-3  # nats of one datum: rounding of programs in single precision
TAKEN = """## What is taken, and how

- **The data plate** is the one plate that holds every observed site and a latent. Where several do, `plate="rows"` names it.
- **Global latents** are held at the guide's median, and the notes say so: all numbers are those at this value.
- **Crossed effects**: `er.audit(model, guide, y, hold=["items"])` holds the latents of that plate likewise and audits the
  persons given the items; then `hold=["persons"]` the other way round.
- **Automatic guides**: AutoNormal, AutoDiagonalNormal, AutoNormalMessenger, AutoHierarchicalNormalMessenger, EasyGuide and
  guides unpacked by hand, whose auxiliary site carries the coordinates of the model's own. AutoLaplaceApproximation is taken as
  its normal. A joint normal of all data is refused; AutoNormal is the way. AutoDelta is a point, no posterior.
- **One row of parameters per datum**: the verdict says that amortization is none by construction.
- **Sequences**: one site per step, ragged by `poutine.mask` or `.mask(...)`: masked steps are no coordinates.
- **Discrete latents** are listed with their joint values; in inner plates, and in chains of too many values, they are summed
  out by variable elimination, if the model runs with all values at once (count dimensions from the right; `Vindex`).
- **Factors and scales**: `pyro.factor` in the model is a likelihood, in the guide it is ignored; `poutine.scale` is ignored.
  Both are said.
- What no datum has of its own is refused with the reason and the nearest thing that works."""


@dataclass
class Row:
    """What was found of a program."""

    entry: Entry
    outcome: str
    reference: str = ""
    gap: str = ""
    elbo: str = ""
    evidence: str = ""
    seconds: float = 0.0
    right: bool = True


def main(arguments: list[str] | None = None) -> int:
    """Audit the programs; returns the number of those of which something is not right."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="part of a program's name: these alone, and no page")
    parser.add_argument("--found", type=Path, help="a file of rows found before, which are kept, and new ones added")
    args = parser.parse_args(arguments)
    for name in MODULES:
        importlib.import_module(f"examples.programs.{name}")
    known = {} if args.found is None or not args.found.exists() else read(args.found)
    rows = []
    for entry in ENTRIES:
        if args.only is None or args.only in entry.name:
            row = known[entry.name] if entry.name in known else row_of(entry)
            rows.append(row)
            print(as_text(row), flush=True)
            if args.found is not None and entry.name not in known:
                with args.found.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(row) | {"entry": entry.name}) + "\n")
    if args.only is None:
        PAGE.write_text(page(rows), encoding="utf-8")
    return sum(not row.right for row in rows)


def read(path: Path) -> dict[str, Row]:
    """Return the rows of a file, by the names of programs that are still on the list."""
    entries = {entry.name: entry for entry in ENTRIES}
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {one["entry"]: Row(**one | {"entry": entries[one["entry"]]}) for one in found if one["entry"] in entries}


def row_of(entry: Entry) -> Row:
    """Build and audit one program."""
    start = time.perf_counter()
    fresh()
    try:
        pair = entry.make()
        audit = audited(pair)
    except UnsupportedProgram as error:
        row = Row(entry, f"refused: {error}")
        row.right = entry.refused is not None and re.search(entry.refused, str(error)) is not None
        if entry.cure is not None:
            fresh()
            status = set(audited(entry.cure()).table["status"].values[:, -1].tolist())
            row.right &= status <= {"exact", "certified"}
            row.reference = f"the cure is {' and '.join(sorted(status))}"
        row.seconds = time.perf_counter() - start
        return row
    except Exception as error:  # a fault of ours, or of the program: the page says so, and the others go on
        said = str(error).splitlines() or [""]
        return Row(entry, f"{type(error).__name__}: {said[0]}", seconds=time.perf_counter() - start, right=False)
    table = audit.table
    settled = set(last(table)) <= {"exact", "certified"} and bool(np.isfinite(table["log_evidence"].values).all())
    kinds = sorted({f"{method} ({status})" for method, status in zip(best(table), last(table), strict=True)})
    row = Row(entry, "audited", ", ".join(kinds), f"{np.median(table['gap_total'].values):.3f}")
    row.right = entry.refused is None and settled == entry.certified
    compare_elbo(pair, table, row)
    compare_evidence(pair, table, row)
    row.seconds = time.perf_counter() - start
    return row


def audited(pair: Pair) -> Any:
    """Audit a pair with the default references."""
    return er.audit(pair.model, pair.guide, *pair.args, **pair.options, diagnose=False, seed=1)


def last(table: Any) -> list[str]:
    """Return the status of each datum under the best reference."""
    return [str(s) for s in table["status"].values.reshape(len(table["obs_id"]), -1)[:, -1]]


def best(table: Any) -> list[str]:
    """Return the names of the references of each datum."""
    names = [str(name) for name in np.atleast_1d(table["reference"].values)]
    return [names[-1]] * len(table["obs_id"])


def compare_elbo(pair: Pair, table: Any, row: Row) -> None:
    """Compare the sum of the data's ELBOs with Pyro's loss, globals held at the same values."""
    joint = LogJoint(pair.model, pair.guide, *pair.args, plate=pair.options.get("plate"), hold=pair.options.get("hold", ()))
    pinned = {name: value.float() for name, value in joint.program.pinned.items()}
    model, guide, args = pair.plain or (pair.model, pair.guide, pair.args)
    model = poutine.block(poutine.condition(model, data=pinned), hide=list(pinned))
    guide = poutine.block(poutine.condition(guide, data=pinned), hide=list(pinned))
    listed = joint.program.discrete or joint.program.summed
    if listed:
        model = pyro.infer.config_enumerate(model)
        loss = TraceEnum_ELBO(num_particles=PARTICLES, max_plate_nesting=joint.program.nesting)
    else:
        loss = Trace_ELBO(num_particles=PARTICLES)
    try:
        with torch.no_grad():
            found = np.array([-loss.loss(model, guide, *args) for _ in range(BATCHES)])
    except (ValueError, NotImplementedError, RuntimeError) as error:
        row.elbo = f"Pyro's cannot be had: {str(error).splitlines()[0]}"
        return
    mine = float(table["elbo"].values.sum())
    error = math.hypot(found.std(ddof=1) / math.sqrt(BATCHES), float(np.sqrt((table["elbo_se"].values ** 2).sum())))
    off = mine - float(found.mean())
    row.elbo = f"{mine:.3f}, {found.mean():.3f} +- {error:.3f}"
    near = FAR * error + SLACK * len(table["obs_id"])
    if joint.dim and any(site.name in joint.program.guide_sites for site in joint.program.discrete):
        row.elbo += "; a bound of ours, as it counts the guide's draws of discrete sites"
        row.right &= off >= -near
    else:
        row.right &= abs(off) <= near


def compare_evidence(pair: Pair, table: Any, row: Row) -> None:
    """Compare log p(x) of each datum with what is known of it."""
    if pair.evidence is None:
        return
    known = pair.evidence().double().numpy()
    mine, error = table["log_evidence"].values, table["log_evidence_se"].values
    off = np.abs(mine - known)
    row.evidence = f"{mine.sum():.3f}, {known.sum():.3f}; {off.max():.1g} at most"
    row.right &= bool((off <= FAR * np.nan_to_num(error) + SLACK).all())


def as_text(row: Row) -> str:
    """Return one line for the terminal."""
    mark = "ok " if row.right else "NOT"
    found = f"{row.outcome}; {row.reference}; gap {row.gap}; ELBO {row.elbo}; log p {row.evidence}"
    return f"{mark} {row.seconds:6.1f} s  {row.entry.name}: {found}"


def page(rows: list[Row]) -> str:
    """Return the page."""
    audited_, refused = [row for row in rows if row.outcome == "audited"], [row for row in rows if row.outcome != "audited"]
    known = [row for row in audited_ if row.evidence]
    wrong = [row for row in rows if not row.right]
    lines = [
        "# Your own Pyro program",
        "",
        "<!-- written by `python -m examples.programs`; change the programs in examples/programs, not this page -->",
        "",
        "Pyro programs as people write them, rewritten here in our own words and kept small, each handed to `er.audit` as",
        f"it is. Of {len(rows)} programs {len(audited_)} are audited ({len(audited_) / len(rows):.0%}), {len(refused)} not.",
        f"Of those audited, log p(x) was also computed by hand for {len(known)}, by a formula or a sum that shares",
        "nothing with Elbowroom.",
        f"Audited, and said to be not certified: {', '.join(e.name for e in ENTRIES if not e.certified) or 'none'}.",
        f"Not right: {', '.join(row.entry.name for row in wrong) if wrong else 'none'}.",
        "",
        *TAKEN.splitlines(),
        "",
        "## Audited",
        "",
        "ELBO: that of the audit, and Pyro's own (`Trace_ELBO`, or `TraceEnum_ELBO` where discrete sites are summed out), with",
        "global latents held at the same values and the standard error of the difference, summed over the data. log p(x): the",
        "audit's and that by hand, summed, and the largest difference of one datum. All in nats. A number is right within four",
        f"standard errors, and {SLACK:g} nats of rounding.",
        "",
        "| program | from | reference | median gap | ELBO: ours, Pyro's | log p(x): ours, by hand |",
        "|---|---|---|---|---|---|",
    ]
    for row in audited_:
        cells = (row.entry.name, row.entry.source, row.reference, row.gap, row.elbo, row.evidence or "not computed")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += [
        "",
        "## Refused",
        "",
        "Each with the message, and what came of the cure that it names.",
        "",
        "| program | from | message | the cure, tried |",
        "|---|---|---|---|",
    ]
    for row in refused:
        cells = (row.entry.name, row.entry.source, row.outcome.removeprefix("refused: "), row.reference or "there is none")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(min(1, main()))
