"""Fuzz: whatever a spec or a file holds, the command line ends with code 0 or 2, no traceback, and nothing half-written.

`make test` tries a few; the full numbers, 2,000 specs and 500 files, are behind the marker `slow`.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import killing

from elbowroom.cli.app import main
from elbowroom.run import fit
from elbowroom.spec import document
from elbowroom.spec.spec import shipped, shipped_text

CHECKS = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
FEW = settings(max_examples=40, deadline=None, suppress_health_check=CHECKS, derandomize=True, database=None)
SPECS = settings(FEW, max_examples=2000)
FILES = settings(FEW, max_examples=500)
FEW_FILES = settings(FEW, max_examples=12)


MEMORY = 4 * 2**30
"""Bytes that a command may take beside what this process holds. A spec of a kilobyte once took all that a machine had: what
Hypothesis tries depends on the modules that are loaded, so it came up only late in a long run."""


@contextmanager
def limited() -> Iterator[None]:
    """Refuse more than `MEMORY`, where the system can."""
    if not Path("/proc/self/statm").exists():
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def call(*arguments: str) -> tuple[int, str]:
    """Run the command line in this process; return its code and what it said on stderr. A traceback is a failure."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings(), limited():
        warnings.simplefilter("error")
        try:
            main(arguments)
        except SystemExit as stop:
            return int(stop.code or 0), err.getvalue()
    raise AssertionError("main returned")


def judge(code: int, err: str) -> None:
    """One line and code 2, or code 0."""
    assert code in (0, 2), err
    assert "not enough memory" not in err, err
    if code == 2:
        assert err.startswith("elbowroom: ")
        assert err.count("\n") == 1, err


# specs

NAMES = [
    "schema", "data", "model", "guide", "fit", "audit", "seed", "record", "name", "path", "key", "split", "latent_dim", "prior",
    "likelihood", "decoder", "family", "encoder", "hidden", "activation", "epochs", "batch_size", "learning_rate", "patience",
    "kl_warmup", "gradient_clip", "validation_draws", "dtype", "device", "observations", "references", "draws", "keep",
    "digits", "linear_gaussian", "file", "normal", "bernoulli", "gaussian", "continuous_bernoulli", "mlp", "linear",
    "diagonal_normal", "full_rank_normal", "grid", "closed_form", "auto", "all", "scale", "floor", "binarize", "n", "dim",
    "noise", "tolerance", "shared", "float64", "cpu", "cosine", "x.npy", "", "budget", "10m", "hmc", "ais", "importance",
]  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-3, 12),
    st.sampled_from([0, 100, 10**6, 10**9, 2**31, 2**62, -(2**62), 2**63, 10**30]),
    st.floats(),
    st.sampled_from([1e-300, 1e-8, 0.5, 1e8, 1e300]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.sampled_from(NAMES), st.text(max_size=8))
KEYS = st.sampled_from(NAMES) | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)
GOOD = {
    "schema": 1,
    "data": {"name": "file", "path": "x.npy"},
    "model": {"latent_dim": 1, "prior": "normal", "likelihood": "bernoulli", "decoder": {"name": "mlp", "hidden": [5]}},
    "guide": {"family": "diagonal_normal", "encoder": {"name": "mlp", "hidden": [5]}},
    "fit": {"epochs": 2, "batch_size": 16, "learning_rate": 1e-3, "device": "cpu", "dtype": "float32"},
    "audit": {"draws": 200, "keep": 100, "observations": "all", "references": "auto"},
    "seed": 0,
}


def places(tree: object, prefix: tuple = ()) -> list[tuple]:
    """Return the path of every node below the root."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path for key, value in items for path in [(*prefix, key), *places(value, (*prefix, key))]]


@st.composite
def trees(draw) -> dict:
    """A good spec with up to three places replaced, removed or added to."""
    tree = document.parse(document.write(GOOD), "")
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from(places(tree)))
        node = tree
        for key in path[:-1]:
            node = node[key]
        match draw(st.integers(0, 3)):
            case 0 if isinstance(node, dict):
                del node[path[-1]]
            case 1 if isinstance(node, dict):
                node[draw(st.sampled_from(NAMES) | st.text(max_size=5))] = draw(VALUES)
            case _:
                node[path[-1]] = draw(VALUES)
        if not places(tree):
            break
    return tree


PIECES = [b":", b"-", b"{", b"}", b"[", b"]", b"&a", b"*a", b"!!x ", b"\t", b"\n", b"'", b'"', b"#", b"1e9", b"%", b"\xff"]


@st.composite
def texts(draw) -> bytes:
    """The text of a spec: of a fuzzed tree, or a good one with its characters mangled, or noise."""
    kind = draw(st.integers(0, 9))
    if kind < 6:
        try:
            return document.write(draw(trees())).encode("utf-8", "surrogatepass")
        except (ValueError, UnicodeError):
            return b"unwritable"
    text = shipped_text(draw(st.sampled_from(shipped()[-3:]))) if kind == 6 else document.write(GOOD)
    raw = bytearray(text.encode())
    if kind == 9:
        return draw(st.binary(max_size=60))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(raw) - 1))
        piece = draw(
            st.sampled_from(
                [b":", b"-", b"{", b"}", b"[", b"]", b"&a", b"*a", b"!!x ", b"\t", b"\n", b"'", b'"', b"#", b"1e9", b"%"]
            )
        )
        match draw(st.integers(0, 2)):
            case 0:
                raw[at : at + 1] = piece
            case 1:
                raw[at:at] = piece
            case _:
                del raw[at : at + draw(st.integers(1, 20))]
    return bytes(raw)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with data and a whole run, which no example changes."""
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        rng = np.random.default_rng(0)
        x = (rng.random((40, 6)) < rng.random((40, 1))).astype(np.float32)
        np.save("x.npy", x)
        np.savez("x.npz", x=x, y=x)
        np.savez_compressed("packed.npz", x=x)
        np.savetxt("x.csv", x, delimiter=",", header="a,b,c,d,e,f", comments="")
        Path("s.yaml").write_text(document.write(GOOD))
        fit("s.yaml", out="run").audit()
    return folder


def try_spec(home: Path, text: bytes) -> None:
    os.chdir(home)
    Path("fuzzed.yaml").unlink(missing_ok=True)
    before = {str(p) for p in home.rglob("*")}
    Path("fuzzed.yaml").write_bytes(text)
    judge(*call("run", "fuzzed.yaml", "--dry-run", "--json"))
    Path("fuzzed.yaml").unlink()
    assert {str(p) for p in home.rglob("*")} == before


@FEW
@given(text=texts())
def test_a_few_fuzzed_specs(home, text):
    try_spec(home, text)


@pytest.mark.slow
@SPECS
@given(text=texts())
def test_two_thousand_fuzzed_specs(home, text):
    try_spec(home, text)


# files

TARGETS = {
    "x.npy": ["fit", "s.yaml", "--set", "data.path=bad.npy", "--out", "new", "--set", "fit.epochs=1"],
    "x.npz": ["audit", "run", "--data", "bad.npz", "--out", "new"],
    "packed.npz": ["fit", "s.yaml", "--set", "data.path=bad.npz", "--out", "new", "--set", "fit.epochs=1"],
    "x.csv": ["audit", "run", "--data", "bad.csv", "--out", "new"],
    "run/spec.yaml": ["audit", "bad"],
    "run/split.npz": ["audit", "bad"],
    "run/weights.pt": ["audit", "bad"],
    "run/checkpoint.pt": ["fit", "s.yaml", "--out", "bad", "--resume"],
    "run/history.csv": ["report", "bad"],
    "run/audit.nc": ["report", "bad"],
    "run/latent.nc": ["report", "bad"],
    "run/posteriors/grid.nc": ["report", "bad"],
    "run/audit.csv": ["audit", "bad", "--resume"],
}


@st.composite
def mangled(draw) -> tuple[str, list[tuple[str, float, bytes]]]:
    """A file, and what is done to it: (what, where as a fraction, bytes)."""
    target = draw(st.sampled_from(sorted(TARGETS)))
    one = st.tuples(
        st.sampled_from(["flip", "flip", "cut", "overwrite", "insert", "remove", "random"]),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=40),
    )
    return target, draw(st.lists(one, min_size=1, max_size=3))


def mangle(raw: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    data = bytearray(raw)
    for what, where, piece in changes:
        at = int(where * len(data))
        if what == "flip" and data:
            data[at] ^= 1 << (piece[0] % 8)
        elif what == "cut":
            del data[at:]
        elif what == "overwrite":
            data[at : at + len(piece)] = piece
        elif what == "insert":
            data[at:at] = piece
        elif what == "remove":
            del data[at : at + len(piece)]
        elif what == "random":
            data = bytearray(piece)
    return bytes(data)


def try_file(home: Path, target: str, changes: list[tuple[str, float, bytes]]) -> None:
    os.chdir(home)
    name = f"bad{Path(target).suffix}" if "/" not in target else "bad"
    for left in ("bad", "new"):
        shutil.rmtree(left, ignore_errors=True)
    if name == "bad":
        shutil.copytree("run", "bad")
        victim = Path("bad", *Path(target).parts[1:])
    else:
        victim = Path(name)
    victim.write_bytes(mangle(Path(target).read_bytes(), changes))
    code, err = call(*TARGETS[target], "--json")
    judge(code, err)
    if code == 2:
        assert not Path("new").exists()
    torn = [line for folder in ("bad", "new") for line in killing.unreadable(Path(folder)) if not line.startswith(f"{victim}:")]
    assert torn == []
    if name != "bad":
        victim.unlink()


@FEW_FILES
@given(case=mangled())
@pytest.mark.usefixtures("no_figures")
def test_a_few_mangled_files(home, case):
    try_file(home, *case)


@pytest.mark.slow
@FILES
@given(case=mangled())
def test_five_hundred_mangled_files(home, case):
    try_file(home, *case)
