"""A warmed-up process that forks the command line, kills it (-9), and looks at what is left. Run by test_durability.

    python tests/support/killing.py WORK KILLS SEED [renames|both|interrupts] [quick|answers [COMMAND ...]]

It prints one JSON object: kills made, problems found, and where the kills struck. With `renames`, the kills strike just
before or after the n-th rename of a file, for every n, not at random times; with `both`, as many of one kind as of the other.
If `quick`, two children race for one folder at the end, and their exit codes and words are in it too. If `answers`, the
commands that ask an audited run are killed, and `improve` and `report`, instead of those that make it; with `interrupts` they
are interrupted (-2), and must say in one line what is kept.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import h5py
import numpy as np
import torch
import yaml

from elbowroom.analysis.verdict import summary as verdict  # noqa: F401 - warmed up for the children
from elbowroom.cli import app as cli
from elbowroom.inference.fit.plan import Session
from elbowroom.queries import stream
from elbowroom.run import Run  # noqa: F401
from elbowroom.spec import document

torch.set_num_threads(1)
Session = functools.partial(Session, checkpoint_seconds=0.0)  # a checkpoint after every epoch

SPEC = {
    "data": {"name": "file", "path": "x.npy"},
    "model": {"latent_dim": 1, "likelihood": "bernoulli", "decoder": {"name": "mlp", "hidden": [5]}},
    "guide": {"encoder": {"name": "mlp", "hidden": [5]}},
    "fit": {"epochs": 12, "batch_size": 8, "patience": 11, "device": "cpu"},
    "audit": {"draws": 200, "keep": 100, "diagnose": False},
}
TEMPORARY = re.compile(r"\..+\.\d+\.tmp(\.\w+)?")


def child(arguments: list[str], at_rename: tuple[int, bool] | None = None, log: str = "child.log") -> int:
    """Fork; in the child run the command line; return the child's process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        if at_rename is not None:
            _die_at(*at_rename)
        cli.main(arguments)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 98
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 97
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _die_at(number: int, after: bool) -> None:
    """Make this process kill itself just before or just after its n-th rename."""
    real, count = Path.replace, 0

    def replace(self, target):
        nonlocal count
        count += 1
        if count == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        moved = real(self, target)
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return moved

    Path.replace = replace


def wait(pid: int) -> int:
    """Return the exit code, or -9 where it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def unreadable(folder: Path) -> list[str]:
    """Read every file below a folder and return those that are not whole; temporary ones and locks do not count."""
    bad = []
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or path.name.endswith(".lock") or TEMPORARY.fullmatch(path.name):
            continue
        try:
            match path.suffix:
                case ".pt":
                    torch.load(path, weights_only=True)
                case ".nc":
                    with h5py.File(path) as opened:
                        opened.visititems(lambda _, item: item[()] if isinstance(item, h5py.Dataset) else None)
                case ".npz":
                    with path.open("rb") as handle, np.load(handle) as arrays:
                        [arrays[name] for name in arrays.files]
                case ".csv":
                    text = path.read_text()
                    widths = {len(row) for row in csv.reader(text.splitlines())}
                    assert text.endswith("\n")
                    assert len(widths) == 1
                case ".yaml":
                    assert "record" in yaml.safe_load(path.read_text())
                case ".png":
                    assert path.read_bytes().endswith(b"IEND\xaeB`\x82")
                case ".html":
                    assert path.read_text().rstrip().endswith("</html>")
                case _:
                    raise AssertionError("a file of an unknown kind")
        except Exception as error:
            bad.append(f"{path}: {type(error).__name__} {error}")
    return bad


def outcome(folder: Path) -> dict[str, object]:
    """Return everything that must be the same bit for bit."""
    state = torch.load(folder / "weights.pt", weights_only=True)
    history = list(csv.DictReader((folder / "history.csv").read_text().splitlines()))
    with np.load(folder / "split.npz") as split:
        rows = {name: split[name].tobytes() for name in split.files}
    found: dict[str, object] = {f"weights {name}": value.numpy().tobytes() for name, value in state.items()}
    found |= {f"history {i} {k}": v for i, row in enumerate(history) for k, v in row.items() if k != "seconds"}
    found |= {f"split {name}": value for name, value in rows.items()}
    found["audit.csv"] = (folder / "audit.csv").read_bytes()
    found["names"] = tuple(sorted(str(p.relative_to(folder)) for p in folder.rglob("*")))
    return found


ASKED = {
    "encode": ["encode", "RUN", "x.npy", "--samples", "2", "--draws", "100", "--keep", "100"],
    "score": ["score", "RUN", "x.npy", "--calibration", "c.npy", "--simulated", "20", "--draws", "100", "--band", "10-90"],
    "impute": ["impute", "RUN", "h.npy", "--samples", "2", "--draws", "100", "--keep", "100"],
    "sample": ["sample", "RUN", "--data", "x.npy", "--draws", "100", "--keep", "100"],
    "explain": ["explain", "RUN", "--draws", "50", "--points", "3", "--steps", "3"],
    "improve": ["improve", "RUN", "--set", "fit.epochs=3"],
    "report": ["report", "RUN"],
}
CHUNK = 7  # rows, so that answers have several chunks


def contents(folder: Path) -> dict[str, object]:
    """Return what the files below a folder hold, by their names: arrays of .nc, .npz and .pt files, else bytes."""
    found: dict[str, object] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".nc":
            with h5py.File(path) as opened:
                values: dict[str, object] = {}
                opened.visititems(lambda at, item, into=values: into.update({at: _plain(item)}))
            found |= {f"{name} {at}": value for at, value in values.items()}
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                found |= {f"{name} {at}": arrays[at].tobytes() for at in arrays.files}
        elif path.suffix in (".csv", ".png") and path.name != "history.csv":
            found[name] = path.read_bytes()
        else:
            found[name] = None  # spec, weights, report: dates and seconds are in them
    return found


def _plain(item: object) -> object:
    return str(item[()].tolist()) if isinstance(item, h5py.Dataset) else None


def answers(work: Path, kills: int, seed: int, at: str, names: list[str]) -> dict[str, object]:
    """Kill the named commands that ask a run until `kills` kills have struck; return what was found."""
    os.chdir(work)
    rng, numbers = random.Random(seed), np.random.default_rng(0)
    x = (numbers.random((40, 6)) < numbers.random((40, 1))).astype(np.float32)
    np.save("x.npy", x)
    np.save("c.npy", (numbers.random((40, 6)) < numbers.random((40, 1))).astype(np.float32))
    np.save("h.npy", np.where(numbers.random(x.shape) < 0.2, np.nan, x))
    Path("s.yaml").write_text(document.write(SPEC))
    stream.stream.__kwdefaults__["size"] = CHUNK
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        cli.main(["run", "s.yaml", "--out", "new"])
    shutil.copytree("new", "warm")
    wanted, seconds = {}, {}
    for name, command in ((name, ASKED[name]) for name in names):
        quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
        with contextlib.suppress(SystemExit), quiet[0], quiet[1]:
            cli.main([word.replace("RUN", "warm") for word in command])
        shutil.copytree("new", f"whole/{name}/r")
        started = time.perf_counter()
        code = wait(child([word.replace("RUN", f"whole/{name}/r") for word in command]))
        assert code == 0, Path("child.log").read_text()
        seconds[name], wanted[name] = time.perf_counter() - started, contents(Path(f"whole/{name}"))
    problems: list[str] = []
    struck, told = Counter[str](), Counter[str]()
    made, point, rounds = 0, 1, 0
    while made < kills and not problems:
        name = names[rounds % len(names)]
        place, rounds = Path(f"killed/{rounds}"), rounds + 1
        shutil.copytree("new", place / "r")
        command = [word.replace("RUN", str(place / "r")) for word in ASKED[name]] + ["--resume"] * (name != "report")
        for _ in range(rng.choice([5, 8, 11])):
            if made >= kills:
                break
            if at == "renames" or (at == "both" and made % 2):
                pid, point = child(command, (rng.randint(1, 24), bool(point % 2))), point + 1
            else:
                pid = child(command)
                time.sleep(rng.uniform(0.05, 1.05 * seconds[name]))
                os.kill(pid, signal.SIGINT if at == "interrupts" else signal.SIGKILL)
            code, log = wait(pid), Path("child.log").read_text()
            if code in (-signal.SIGKILL, 130):
                made += 1
                there = len(list(place.rglob("*.parts/*.nc")))
                struck[f"{name}: {'with' if there else 'without'} finished chunks"] += 1
                if code == 130 and (log.count("elbowroom: interrupted; ") != 1 or "Traceback" in log or "Exception" in log):
                    problems.append(f"{command}: interrupted: {log[-1500:]}")
                told[" ".join(log.splitlines()[-1:])[:300]] += code == 130
            elif code != 0:
                problems.append(f"{command}: exit code {code}: {log[-1500:]}")
            problems += unreadable(place)
        if (code := wait(child(command))) != 0:
            problems.append(f"{command} after the kills: exit code {code}: {Path('child.log').read_text()[-800:]}")
            continue
        found = contents(place)
        keys = {*found, *wanted[name]}
        problems += [f"{name}: {key} is not that of the undisturbed command" for key in sorted(keys) if key not in found
                     or key not in wanted[name] or found[key] != wanted[name][key]][:5]  # fmt: skip
        if not problems:
            shutil.rmtree(place)
    return {
        "kills": made, "runs": rounds, "bitwise": rounds - bool(problems), "struck": dict(sorted(struck.items())),
        "told": list(+told),
        "seconds": {k: round(v, 2) for k, v in seconds.items()}, "problems": problems[:5],
    }  # fmt: skip


def stages(out: str, rng: random.Random, quick: bool) -> list[list[str]]:
    """Return the commands of one run: one `run`, or `fit`, `audit` and `report` apart; the latter not if quick."""
    if quick:
        return [["fit", "s.yaml", "--out", out, "--resume"], ["audit", out, "--resume"]]
    if rng.random() < 0.4:
        return [["run", "s.yaml", "--out", out, "--resume"]]
    return [["fit", "s.yaml", "--out", out, "--resume"], ["audit", out, "--resume"], ["report", out]]


def where(folder: Path) -> str:
    """Say how far a run had come when it was killed."""
    for name, stage in (("report.html", "report written"), ("audit.nc", "report"), ("weights.pt", "audit")):
        if (folder / name).exists():
            return stage
    return "fit" if (folder / "spec.yaml").exists() else "before the first file"


def race() -> list[tuple[int, str]]:
    """Let two processes fit into one new folder at once; return the exit code and the words of each."""
    command = ["fit", "s.yaml", "--out", "both", "--set", "fit.epochs=300"]
    pids = {log: child(command, log=log) for log in ("one.log", "other.log")}
    codes = [(wait(pid), log) for log, pid in pids.items()]
    return sorted((code, Path(log).read_text()) for code, log in codes)


def main(work: Path, kills: int, seed: int, at: str, quick: bool) -> dict[str, object]:
    """Kill until `kills` kills have struck; return what was found."""
    os.chdir(work)
    rng, numbers = random.Random(seed), np.random.default_rng(0)
    np.save("x.npy", (numbers.random((40, 6)) < numbers.random((40, 1))).astype(np.float32))
    Path("s.yaml").write_text(document.write(SPEC))
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        # whatever is imported late is now there for every child
        cli.main(["run", "s.yaml", "--out", "warm"] if not quick else ["fit", "s.yaml", "--out", "warm"])
    seconds: dict[str, float] = {}
    for command in (["fit", "s.yaml", "--out", "whole"], ["audit", "whole"], ["report", "whole"])[: 2 if quick else 3]:
        started = time.perf_counter()
        assert wait(child(command)) == 0, Path("child.log").read_text()
        seconds[command[0]] = time.perf_counter() - started
    seconds["run"] = sum(seconds.values())
    wanted = outcome(Path("whole"))
    problems: list[str] = []
    struck: Counter[str] = Counter()
    left = runs = temporary = 0
    made, point = 0, 1
    while made < kills:
        runs += 1
        out = Path(f"run{runs}")
        for command in stages(str(out), rng, quick):
            for _ in range(rng.choice([1, 2, 4, 6])):
                if made >= kills:
                    break
                if at == "renames" or (at == "both" and made % 2):
                    pid, point = child(command, (1 + (point // 2) % 16, bool(point % 2))), point + 1
                else:
                    pid = child(command)
                    time.sleep(rng.uniform(0, 1.05 * seconds[command[0]]))
                    os.kill(pid, signal.SIGKILL)
                code = wait(pid)
                if code == -signal.SIGKILL:
                    made += 1
                    struck[f"{command[0]}: {where(out)}"] += 1
                elif code != 0:
                    problems.append(f"{command}: exit code {code}: {Path('child.log').read_text()[-800:]}")
                temporary += any(TEMPORARY.fullmatch(p.name) for p in out.rglob("*"))
                problems += unreadable(out)
            if (code := wait(child(command))) != 0:
                problems.append(f"{command} after the kills: exit code {code}: {Path('child.log').read_text()[-800:]}")
        found = outcome(out) if not problems else wanted
        different = [key for key in wanted if found.get(key) != wanted[key]] + [key for key in found if key not in wanted]
        problems += [f"{out}: {key} is not that of the undisturbed run" for key in different]
        if problems:
            break
        left += 1
    found = {"raced": race()} if quick else {}
    return found | {
        "kills": made, "runs": runs, "bitwise": left, "temporary": temporary, "struck": dict(sorted(struck.items())),
        "seconds": {k: round(v, 2) for k, v in seconds.items()}, "problems": problems[:5],
    }  # fmt: skip


if __name__ == "__main__":
    words = sys.argv[4:]
    at = next((word for word in words if word in ("renames", "both", "interrupts")), "times")
    given = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), at
    names = [word for word in words if word in ASKED] or list(ASKED)
    print(json.dumps(answers(*given, names) if "answers" in words else main(*given, "quick" in words)))
