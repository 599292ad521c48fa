"""What the program says and computes, on record: made before a restructuring, compared after it.

    python tests/support/record.py make /tmp/before              # a quarter of an hour on one core, less on two
    python tests/support/record.py make /tmp/after
    python tests/support/record.py compare /tmp/before /tmp/after             # the same bytes
    python tests/support/record.py compare /tmp/before /tmp/after --rtol 1e-4 # equal to rounding

It runs the program by its command line and by the names in `elbowroom.__all__` alone, so that it also runs on commits whose
folders differ (PYTHONPATH=<other checkout>/src chooses one). A record holds five runs with fixed seeds (digits, digits by
compiled graphs, a table with holes, counts, a plain Pyro pair) with their answers to every question, the help of every command,
the schema of specs, the list of components and the names of the tests. Times, dates, paths and versions are not compared.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

COMMANDS = (
    *("run", "fit", "audit", "report", "improve", "compare", "components", "encode", "score", "impute", "integrate"),
    *("sample", "explain", "spec", "spec init", "spec show", "spec schema"),
)
MAIN = "import sys; from elbowroom.cli import main; main(sys.argv[1:])"
TABLE = """
schema: 1
data: {name: file, path: table.csv}
model: {latent_dim: 5, prior: normal, likelihood: mixed, decoder: {name: mlp, hidden: [24]}}
guide: {family: full_rank_normal, encoder: {name: mlp, hidden: [24]}}
fit: {epochs: 12, batch_size: 64, learning_rate: 3e-3, kl_warmup: 4, device: cpu}
audit: {observations: 16, references: [hmc, importance, ais], draws: 500, keep: 200}
seed: 1
"""
PAIR = """
import elbowroom as er, pyro, pyro.distributions as dist, sys, torch

def model(y):
    with pyro.plate("data", len(y)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Poisson(rate * (0.3 * z.sum(-1)).exp()), obs=y)

def guide(y):
    with pyro.plate("data", len(y)):
        pyro.sample("rate", dist.LogNormal((y + 2).log() - 0.6, 0.5))
        pyro.sample("z", dist.Normal(torch.zeros(2), torch.full((2,), 0.9)).to_event(1))

audit = er.audit(model, guide, torch.tensor([0.0, 3.0, 11.0, 2.0, 5.0, 1.0]))
audit.save(sys.argv[1])
print(audit)
"""
RUNS: dict[str, list[list[str]]] = {
    "digits": [
        [
            "run",
            "{repo}/experiments/digits.yaml",
            "--out",
            "digits",
            "--set",
            "fit.epochs=20",
            "--set",
            "audit.observations=40",
        ],
        ["encode", "digits", "--out", "answers/digits-encode.nc"],
        ["score", "digits", "--out", "answers/digits-score.nc", "--references", "none", "--simulated", "50", "--most", "60"],
        ["sample", "digits", "--out", "answers/digits-sample.nc"],
        ["explain", "digits", "--out", "answers/digits-explain.nc"],
        ["integrate", "digits", "--datum", "3", "--out", "answers/digits-integrate.nc"],
        ["audit", "digits", "--dry-run"],
        ["improve", "digits", "--dry-run"],
    ],
    "table": [
        ["run", "table.yaml", "--out", "table"],
        ["encode", "table", "--references", "importance", "--out", "answers/table-encode.nc"],
        ["score", "table", "--references", "none", "--simulated", "50", "--most", "60", "--out", "answers/table-score.nc"],
        ["impute", "table", "--references", "none", "--out", "answers/table-impute.nc"],
        ["explain", "table", "--references", "none", "--out", "answers/table-explain.nc"],
        ["sample", "table", "--out", "answers/table-sample.nc"],
    ],
    "compiled": [
        [
            *(
                "run",
                "{repo}/experiments/digits.yaml",
                "--out",
                "compiled",
                "--set",
                "fit.epochs=4",
                "--set",
                "fit.compile=always",
            ),
            *("--set", "audit.compile=always", "--set", "audit.observations=20", "--set", "audit.references=[grid, hmc]"),
        ],
    ],
    "counts": [
        [
            *("run", "{repo}/experiments/digits_counts.yaml", "--out", "counts", "--set", "fit.epochs=4"),
            *("--set", "model.likelihood=negative_binomial", "--set", "audit.observations=20"),
        ],
        ["impute", "counts", "--references", "none", "--hide", "left", "--out", "answers/counts-impute.nc"],
    ],
}


def make(folder: Path, repo: Path) -> None:
    """Make the record of the program that Python finds, for the checkout `repo`."""
    folder.mkdir(parents=True)
    (folder / "answers").mkdir()
    (folder / "said").mkdir()
    (folder / "table.yaml").write_text(TABLE)
    (folder / "table.csv").write_text(_table())
    (folder / "pair.py").write_text(PAIR)

    def pair() -> None:
        said = _run([sys.executable, "pair.py", "pair"], folder)
        (folder / "said" / "pair.txt").write_text(said)

    def commands(name: str) -> None:
        said = [f"$ {' '.join(line)}\n{_elbowroom(line, folder, repo)}" for line in RUNS[name]]
        (folder / "said" / f"{name}.txt").write_text("\n".join(said))

    def texts() -> None:
        helps = [f"$ {name} --help\n{_elbowroom([*name.split(), '--help'], folder, repo)}" for name in COMMANDS]
        (folder / "said" / "help.txt").write_text("\n".join([_elbowroom(["--help"], folder, repo), *helps]))
        (folder / "said" / "schema.json").write_text(_elbowroom(["spec", "schema"], folder, repo))
        (folder / "said" / "components.json").write_text(_elbowroom(["components", "--json"], folder, repo))
        collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", "-p", "no:cacheprovider"]
        (folder / "said" / "tests.txt").write_text("\n".join(sorted(_test_names(_run(collect, repo)))))

    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(commands, name) for name in RUNS]
        for job in [*jobs, pool.submit(pair), pool.submit(texts)]:
            job.result()


def _table() -> str:
    """A table with numbers, counts, levels and holes, as CSV."""
    random = np.random.default_rng(5)
    z = random.normal(size=(240, 2))
    columns = {
        "height": np.char.mod("%.3f", 170 + 8 * z[:, 0] + random.normal(size=240)),
        "weight": np.char.mod("%.3f", 70 + 6 * z[:, 0] + 4 * z[:, 1] + random.normal(size=240)),
        "visits": np.char.mod("%d", random.poisson(np.exp(1 + 0.5 * z[:, 1]))),
        "town": np.array(["north", "south", "west"])[
            (z @ [[1.0, -1, 0.3], [0.2, 0.5, -1]] + random.gumbel(size=(240, 3))).argmax(1)
        ],
        "smokes": np.array(["no", "yes"])[(z[:, 1] + random.logistic(size=240) > 0).astype(int)],
    }
    rows = np.stack(list(columns.values()), 1).astype(object)
    rows[random.random(rows.shape) < 0.15] = ""
    return "\n".join(",".join(row) for row in [list(columns), *rows.tolist()]) + "\n"


def _run(command: list[str], where: Path) -> str:
    environment = {"OMP_NUM_THREADS": "1", "COLUMNS": "120", "MPLBACKEND": "Agg", "NO_COLOR": "1", "TERM": "dumb"}
    found = subprocess.run(command, cwd=where, env=os.environ | environment, capture_output=True, text=True, check=False)
    return f"{found.stdout}\n[exit code {found.returncode}]\n{found.stderr if found.returncode else ''}"


def _elbowroom(arguments: list[str], folder: Path, repo: Path) -> str:
    return _run([sys.executable, "-c", MAIN, *(one.format(repo=repo) for one in arguments)], folder)


def _test_names(collected: str) -> list[str]:
    return [line.partition("::")[2] for line in collected.splitlines() if "::" in line]


VOLATILE = re.compile(
    r"(?i)"
    r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:?\d\d)?"  # dates
    r"|\b\d+(\.\d+)? ?(ms|s|seconds|minutes|min|h)\b( \d+ ?s\b)?"  # times
    r"|/(tmp|work)/[\w./-]+|[\w./-]*experiments/"  # paths
    r"|elbowroom\W+(?:dt\W+dd\W+)?v?\d+\.\d+\.\d+\w*|\bsha256[\"':= ]+[0-9a-f]+"
)
TIMES = re.compile(r"@elbowroom$|second|time_|created|version|_stamp|elapsed|wall")


def compare(before: Path, after: Path, rtol: float) -> list[str]:
    """Return one line for each difference between two records."""
    first, second = _files(before), _files(after)
    found = [f"{one}: only {'before' if one in first else 'after'}" for one in sorted(set(first) ^ set(second))]
    for one in sorted(set(first) & set(second)):
        found += [f"{one}: {difference}" for difference in _differences(first[one], second[one], rtol)]
    return found


def _files(folder: Path) -> dict[str, Path]:
    """Return the files of a record by name; hashes that stand in some names, which the version enters, are left out."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"]
    return {re.sub(r"-[0-9a-f]{16}(?=\.)", "", str(p.relative_to(folder))): p for p in files}


def _differences(a: Path, b: Path, rtol: float) -> list[str]:
    if a.read_bytes() == b.read_bytes():
        return []
    if a.suffix == ".nc":
        return _arrays(_of_netcdf(a), _of_netcdf(b), rtol)
    if a.suffix == ".pt":
        return _arrays(_of_torch(a), _of_torch(b), rtol)
    if a.suffix == ".npz":
        return _arrays(dict(np.load(a)), dict(np.load(b)), rtol)
    if a.suffix == ".png":
        return [] if rtol else ["another picture"]
    if a.suffix == ".html":
        pictures = re.compile(r"data:image/png;base64,[\w+/=]+")
        return _texts(pictures.sub("", a.read_text()), pictures.sub("", b.read_text()), rtol)
    if a.name == "history.csv":
        return _texts(*(re.sub(r",[^,\n]*$", "", one.read_text(), flags=re.MULTILINE) for one in (a, b)), rtol)  # seconds, last
    return _texts(a.read_text(), b.read_text(), rtol)


def _of_netcdf(path: Path) -> dict[str, Any]:
    import xarray as xr

    found: dict[str, Any] = {}
    tree = xr.open_datatree(path, engine="h5netcdf")
    for node in tree.subtree:
        found |= {f"{node.path}/@{name}": np.asarray(str(value)) for name, value in node.attrs.items()}
        for name, variable in node.to_dataset(inherit=False).variables.items():
            found[f"{node.path}/{name}"] = variable.values
            found |= {f"{node.path}/{name}@{key}": np.asarray(str(value)) for key, value in variable.attrs.items()}
    tree.close()
    return found


def _of_torch(path: Path) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {}

    def walk(place: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[place] = value.detach().cpu().numpy()
        elif isinstance(value, dict):
            for key, one in value.items():
                walk(f"{place}.{key}", one)
        elif isinstance(value, list | tuple):
            for i, one in enumerate(value):
                walk(f"{place}.{i}", one)
        else:
            found[place] = np.asarray(str(value))

    walk("", torch.load(path, weights_only=True))
    return found


def _arrays(a: dict[str, Any], b: dict[str, Any], rtol: float) -> list[str]:
    found = [f"{name}: only {'before' if name in a else 'after'}" for name in sorted(set(a) ^ set(b)) if not TIMES.search(name)]
    for name in sorted(set(a) & set(b)):
        x, y = np.asarray(a[name]), np.asarray(b[name])
        if TIMES.search(name):
            continue
        if (
            x.shape != y.shape
            or x.dtype.kind != y.dtype.kind
            or x.dtype.itemsize != y.dtype.itemsize
            and x.dtype.kind not in "OUST"
        ):
            found.append(f"{name}: {x.dtype}{x.shape} before, {y.dtype}{y.shape} after")
        elif x.dtype.kind in "fc":
            if not np.array_equal(x, y, equal_nan=True):
                scale = np.nanmax(np.abs(x)) if np.isfinite(x).any() else 1.0
                worst = np.nanmax(np.abs(x - y)) / (scale or 1.0) if (np.isnan(x) == np.isnan(y)).all() else np.inf
                if not worst <= rtol:
                    found.append(f"{name}: differs by {worst:.2g} of its largest value")
        elif x.dtype.kind in "OUST":
            pairs = zip(x.ravel().tolist(), y.ravel().tolist(), strict=True)
            found += [f"{name}: {d}" for p, q in pairs for d in _texts(str(p), str(q), rtol)][:3]
        elif not np.array_equal(x, y):
            found.append(f"{name}: {(x != y).mean():.0%} of its whole numbers differ")
    return found


def _texts(a: str, b: str, rtol: float) -> list[str]:
    def cleaned(text: str) -> list[str]:
        text = VOLATILE.sub("", text)
        if rtol:
            text = re.sub(r"-?\d+(\.\d+)?(e[+-]?\d+)?", lambda m: f"{float(m[0]):.2g}", text)
        return [
            line for line in (re.sub(r"\s+", " ", line).strip() for line in text.splitlines()) if not TIMES.search(line[:80])
        ]

    first, second = cleaned(a), cleaned(b)
    only = [f"- {line[:200]}" for line in _less(first, second)] + [f"+ {line[:200]}" for line in _less(second, first)]
    return only


def _less(a: list[str], b: list[str]) -> list[str]:
    """The lines of a that b has fewer of."""
    from collections import Counter

    return list((Counter(a) - Counter(b)).elements())


def main() -> None:
    """Make or compare records; the exit code says whether they are equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    maker = actions.add_parser("make")
    maker.add_argument("folder", type=Path)
    maker.add_argument(
        "--repo", type=Path, default=Path(__file__).resolve().parents[2], help="the checkout whose tests and specs count"
    )
    comparer = actions.add_parser("compare")
    comparer.add_argument("before", type=Path)
    comparer.add_argument("after", type=Path)
    comparer.add_argument("--rtol", type=float, default=0.0, help="allowed difference, as a share of an array's largest value")
    options = parser.parse_args()
    if options.action == "make":
        make(options.folder.resolve(), options.repo.resolve())
        return
    found = compare(options.before, options.after, options.rtol)
    sys.stdout.write("\n".join([*found, json.dumps({"differences": len(found)})]) + "\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
