"""`python -m benchmarks.plans`: what an audit says that it will take, against what it takes.

Twelve cases over kinds of model, dimensions and references, each audited without its diagnosis (`wall` includes the plan
itself); two more have a budget that is too short, and are to end with it. Ratios are wall over plan, or over the budget.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from benchmarks import measure, results
from elbowroom.analysis.audit.auditor import audit_log_joint
from elbowroom.analysis.audit.budget import Progress
from elbowroom.analysis.audit.plan import Plan
from elbowroom.inference.target.log_joint import LogJoint

HEADING = "## Plans and wall time"
HIDDEN, SIDE = 100, 28


@dataclass(frozen=True)
class Case:
    """A model of `d` latents and n data, its references, and a budget in seconds or none.

    Attributes:
        kind: of the likelihood and decoder.
        width: entries of x.
    """

    kind: str
    d: int
    n: int
    references: str | tuple[str, ...]
    width: int = 100
    budget: float | None = None


CASES = (
    Case("curved", 1, 1_000, "auto"),
    Case("curved", 2, 1_000, "auto"),
    Case("mlp", 2, 500, "auto"),
    Case("mlp", 2, 500, ("hmc",)),
    Case("mlp", 5, 200, ("hmc",)),
    Case("mlp", 10, 100, "auto"),
    Case("mlp", 20, 60, "auto", 784),
    Case("mlp", 20, 200, ("importance",)),
    Case("mlp", 5, 60, ("ais",)),
    Case("mlp", 10, 40, ("hmc", "importance", "ais")),
    Case("conv", 16, 30, ("hmc",), SIDE * SIDE),
    Case("counts", 10, 30, ("importance",), 20_000),
    Case("mlp", 20, 5_000, "auto", 784, 60.0),
    Case("conv", 16, 1_000, "auto", SIDE * SIDE, 60.0),
)
QUICK = (CASES[1], CASES[5])


def decoder(case: Case) -> nn.Module:
    """Return a decoder with random weights, whose posteriors are far from the prior."""
    torch.manual_seed(case.d)
    if case.kind != "conv":
        return nn.Sequential(nn.Linear(case.d, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, case.width))
    layers = (nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 1, 4, 2, 1), nn.Flatten())
    return nn.Sequential(nn.Linear(case.d, 32 * 49), nn.ReLU(), nn.Unflatten(1, (32, 7, 7)), *layers)


def built(case: Case) -> LogJoint:
    """Return the log joint of n data drawn from the model, with a guide that takes a linear guess."""
    network, d = decoder(case).requires_grad_(False), case.d

    def p(z: Tensor) -> dist.Distribution:
        if case.kind == "curved":
            return dist.Normal(z + (2 * z).tanh() / 2, 0.5).to_event(1)
        out = 2 * network(z.reshape(-1, d)).unflatten(0, z.shape[:-1])
        return (dist.Poisson((out / 4 - 2).exp()) if case.kind == "counts" else dist.Bernoulli(logits=out)).to_event(1)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(d), 1.0).to_event(1))
            pyro.sample("x", p(z), obs=x)

    z = torch.randn(case.n, d, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    x = p(z).sample()
    design = torch.cat([x, torch.ones(len(x), 1)], 1)
    guess = torch.linalg.lstsq(design, z, driver="gelsd").solution * (0.5 if case.width > case.n else 1.0)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc = torch.cat([x, x.new_ones(len(x), 1)], 1) @ guess
            pyro.sample("z", dist.Normal(loc, 0.4).to_event(1))

    return LogJoint(model, guide, x)


def run(case: Case) -> tuple[Plan, float, float]:
    """Audit; return the plan, the seconds, and the share of the audited data that are exact or certified."""
    log_joint, plans = built(case), list[Plan]()

    def seen(step: Progress) -> None:
        plans.append(step.plan)

    references = case.references if isinstance(case.references, str) else list(case.references)
    start = time.perf_counter()
    found = audit_log_joint(log_joint, references=references, budget=case.budget, progress=seen)  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    table = found.table
    inside = table["in_sample"].values.astype(bool) if "in_sample" in table else np.ones(case.n, dtype=bool)
    good = np.isin(table["status"].values.astype(str), ("exact", "certified")).any(1)
    return plans[0], seconds, float(good[inside].mean()) if inside.any() else 0.0


def rows(cases: Sequence[Case], say: Callable[[str], None] = print) -> list[list[str]]:
    """Run the cases; return the rows of the table."""
    found = []
    for case in cases:
        plan, seconds, good = run(case)
        promised = case.budget or plan.total
        what = f"{case.kind} {case.width if case.kind != 'curved' else case.d}"
        names = case.references if isinstance(case.references, str) else ", ".join(case.references)
        sample = f"{plan.sample:,}" if case.budget else ""
        budget = f"{case.budget:.0f}" if case.budget else "none"
        row = [
            what,
            str(case.d),
            f"{case.n:,}",
            names,
            budget,
            f"{plan.total:.1f}",
            f"{seconds:.1f}",
            f"{seconds / promised:.2f}",
        ]
        found.append([*row, sample, f"{good:.0%}"])
        say(" | ".join(found[-1]))
    return found


def section(found: Sequence[Sequence[str]], args: argparse.Namespace) -> str:
    """Return the markdown section."""
    columns = ["model", "d", "data", "references", "budget [s]", "plan [s]", "wall [s]", "ratio", "sample planned", "certified"]
    head = measure.circumstances(args, ("torch", "pyro-ppl"), "python -m benchmarks.plans")
    said = (
        "Audits without their diagnosis; wall includes the plan itself and compiling. Decoders have random weights. The ratio "
        "is wall over plan, or over the budget where there is one. `certified`: share of the data that were reached."
    )
    return "\n".join([HEADING, "", *head, *measure.paragraph(said), "", *measure.table(columns, found)]) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the section."""
    args = measure.parser("plans", "What an audit says that it will take, against what it takes.").parse_args(arguments)
    measure.use(args.threads)
    text = section(rows(QUICK if args.quick else CASES), args)
    print(text)
    if not args.print:
        results.write(text)


if __name__ == "__main__":
    main()
