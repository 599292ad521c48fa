"""Two checkouts of this project side by side: training steps, epochs, posteriors and the demo, in turn in one run.

    .venv/bin/python -m benchmarks.two_checkouts /tmp/before /tmp/after          # quarter of an hour on two idle cores

Each side runs in a process of its own, with `<checkout>/src` on PYTHONPATH, and waits while the other works. The worker imports
the names of today or, where they are missing, those of 0.1.0. Ratios are after / before: below 1 is faster; of ESS, above 1.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROUNDS = {"step of 128 rows": 31, "step of 1,024 rows": 9, "epoch of 12,800 rows": 9, "chains, ESS per second": 4}


def worker() -> None:
    """Answer each line of standard input, the name of a measurement, with a number."""
    import pyro
    import torch

    torch.set_num_threads(2)
    try:
        from elbowroom.inference.compiled.policies import policy
        from elbowroom.inference.fit.plan import Session
        from elbowroom.inference.fit.step import Step
        from elbowroom.inference.fit.svi import fit
        from elbowroom.inference.references.hmc.hmc import HMC
        from elbowroom.inference.target.log_joint import LogJoint
        from elbowroom.models.guides.base import AmortizedGuide
        from elbowroom.models.guides.normal import DiagonalNormal
        from elbowroom.models.likelihoods.binary import Bernoulli
        from elbowroom.models.networks.mlp import MLP
        from elbowroom.models.priors.standard import Normal
    except ImportError:  # 0.1.0
        from elbowroom.inference.compiled import policy
        from elbowroom.inference.hmc import HMC
        from elbowroom.inference.svi import Session, fit
        from elbowroom.inference.target import LogJoint
        from elbowroom.inference.training_step import Step
        from elbowroom.models.guides import AmortizedGuide, DiagonalNormal
        from elbowroom.models.likelihoods import Bernoulli
        from elbowroom.models.networks import MLP
        from elbowroom.models.priors import Normal
    from elbowroom.models.vae import VAE

    def vae(latents: int, pixels: int, hidden: int) -> VAE:
        torch.manual_seed(0)
        q, options = DiagonalNormal(latents), {"hidden": (hidden,)}
        encoder = MLP((pixels,), q.param_dim, **options)
        return VAE(Normal(latents), Bernoulli((pixels,)), MLP((latents,), pixels, **options), AmortizedGuide(encoder, q))

    generator = torch.Generator().manual_seed(1)
    images = (torch.rand(12_800, 784, generator=generator) < 0.3).float()
    small = vae(2, 64, 64).eval()
    with torch.no_grad():
        for parameter in small.decoder.parameters():
            parameter.mul_(3)
    pixels = (torch.rand(500, 64, generator=generator) < 0.3).float()
    trained = vae(20, 784, 400)

    def steps(rows: int, count: int) -> Callable[[], float]:
        step, x = Step(trained, size=50_000, learning_rate=1e-3, compile="always", steps=10_000), images[:rows]
        for _ in range(30):
            step(x)

        def measure() -> float:
            started = time.perf_counter()
            for _ in range(count):
                step(x)
            return (time.perf_counter() - started) / count

        return measure

    def epoch() -> float:
        seconds: list[float] = []
        session = Session(report=lambda plan, row: seconds.append(row.seconds))
        options = {"epochs": 3, "batch_size": 128, "compile": "always", "device": "cpu"}
        fit(vae(20, 784, 400), images, images[:0], session, **options)
        return (seconds[2] - seconds[0]) / 2

    def chains() -> float:
        with policy("always"):
            log_joint, started = LogJoint(small.model, small.guide, pixels), time.perf_counter()
            found = HMC()(log_joint, keep=400, seed=3)
            return float(found.stats["ess_bulk_min"].sum()) / (time.perf_counter() - started)

    with pyro.get_param_store().scope():
        measures = dict(zip(ROUNDS, (steps(128, 200), steps(1_024, 40), epoch, chains), strict=True))
        chains()  # compiles
        print("ready", flush=True)
        for line in sys.stdin:
            print(measures[line.strip()](), flush=True)


def _python(checkout: Path, *arguments: object) -> list[str]:
    return ["env", f"PYTHONPATH={checkout / 'src'}", sys.executable, *map(str, arguments)]


def demo(checkout: Path) -> float:
    """Return the seconds of the demo's run: fit, audit, report."""
    code = "import sys; from elbowroom.cli import main; main(sys.argv[1:])"
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        spec = checkout / "experiments" / "digits.yaml"
        command = _python(checkout, "-c", code, "run", spec, "--out", f"{folder}/demo")
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"MPLBACKEND": "Agg"})
        return time.perf_counter() - started


def table(before: list[float], after: list[float]) -> str:
    """Return medians and the ratio of the rounds, with its range."""
    ratios = [a / b for a, b in zip(after, before, strict=True)]
    medians = " | ".join(f"{statistics.median(values):.4g}" for values in (before, after))
    return f"{medians} | {statistics.median(ratios):.3f} ({min(ratios):.2f} .. {max(ratios):.2f})"


def main() -> None:
    """Measure both checkouts in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs=2, type=lambda text: Path(text).resolve(), metavar="BEFORE AFTER")
    parser.add_argument("--demos", type=int, default=2, help="runs of the demo of each side")
    options = parser.parse_args()
    sides = [
        subprocess.Popen(
            _python(checkout, __file__, "--worker"), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )
        for checkout in options.checkouts
    ]  # fmt: skip

    def ask(side: subprocess.Popen[str], what: str) -> float:
        assert side.stdin is not None
        assert side.stdout is not None
        side.stdin.write(f"{what}\n")
        side.stdin.flush()
        return float(side.stdout.readline())

    for side in sides:
        assert side.stdout is not None
        while side.stdout.readline().strip() != "ready":
            pass
    print("| what | before | after | after / before |\n|---|---|---|---|", flush=True)
    for what, rounds in ROUNDS.items():
        found: list[list[float]] = [[], []]
        for number in range(rounds):
            for k in (0, 1) if number % 2 == 0 else (1, 0):
                found[k].append(ask(sides[k], what))
        print(f"| {what} | {table(*found)} |", flush=True)
    for side in sides:
        side.kill()
    found = [[], []]
    for number in range(options.demos):
        for k in (0, 1) if number % 2 == 0 else (1, 0):
            found[k].append(demo(options.checkouts[k]))
    print(f"| demo, seconds | {table(*found)} |")


if __name__ == "__main__":
    worker() if "--worker" in sys.argv else main()
