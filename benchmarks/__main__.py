"""`make bench`, or `python -m benchmarks`: ours and the peers side by side, quality beside time, part after part.

Each part runs in a process of its own and writes its own sections of benchmarks/RESULTS.md; each can be run alone
(`python -m benchmarks.training`). A part that fails does not take the others with it.
"""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks import measure, results

HEADING = """# Measured ratios

`make bench` measures the sections on speed: [Training step](#training-step), [Training epoch](#training-epoch),
[Posteriors](#posteriors), [Shared grid](#shared-grid), [Pareto k-hat](#pareto-k-hat), [Growth](#growth) and
[Plans and wall time](#plans-and-wall-time). Where there are peers, ours and theirs take turns in one run, on the same data and
model, with what shows that they did the same work beside the seconds.
The other sections say what their own commands found out.
"""
PARTS = ("training", "posteriors", "grid", "smoothing", "scaling", "plans")


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; returns the number of those that failed."""
    parser = measure.parser("", "Run the benchmarks, part after part.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    args = parser.parse_args(arguments)
    words = [f"--{name}" for name in ("quick", "ours", "print") if getattr(args, name)]
    failed = []
    for part in args.parts:
        start = time.perf_counter()
        print(f"== {part}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{part}", "--threads", str(args.threads), *words]
        if subprocess.run(command, cwd=measure.ROOT).returncode:
            failed.append(part)
        print(f"== {part}: {time.perf_counter() - start:.0f} s", flush=True)
    if not args.print:
        results.write(HEADING)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
