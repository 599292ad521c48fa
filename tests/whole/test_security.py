"""Nothing from outside is run, everything shown is escaped, and nothing is written outside the run folder."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import numpy as np
import pytest
from support.registry import forget_python

from elbowroom.analysis.audit.auditor import Audit
from elbowroom.analysis.report.report import write_report
from elbowroom.cli.app import main
from elbowroom.components.table import PLACES
from elbowroom.errors import DataError, SpecError, UserError
from elbowroom.run import Run, fit
from elbowroom.runs.fitting import default_folder
from elbowroom.spec import document, run_folder
from elbowroom.spec.experiment import Experiment
from elbowroom.system import archive

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for top in ("src/elbowroom", "models", "inference", "analysis")
    for path in (ROOT / top).rglob("*.py")
    if path.is_file()
)


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Return every call of a source file, with the dotted name of what is called."""
    found = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    return [(ast.unparse(node.func), node) for node in found]


def keywords(node: ast.Call) -> dict[str, str]:
    return {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg}


def test_the_sources_run_nothing_from_files():
    assert len(SOURCES) > 40
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        assert not imported & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "subprocess"}, path
        for name, node in calls(path):
            where, given = f"{path}:{node.lineno}", keywords(node)
            assert name not in ("eval", "exec", "compile", "os.system", "os.popen", "__import__"), where
            if name == "torch.load":
                assert given.get("weights_only") == "True", where
            if name in ("np.load", "numpy.load"):
                assert given.get("allow_pickle") == "False", where
            if name in ("np.save", "np.savez", "np.savez_compressed"):
                assert given.get("allow_pickle", "False") == "False", where
            if name in ("yaml.load", "yaml.load_all"):
                assert given.get("Loader", "") in ("_Loader", "yaml.SafeLoader"), where
            assert name not in ("yaml.unsafe_load", "yaml.full_load", "pd.read_pickle", "pandas.read_pickle"), where
            if name == "jinja2.Environment":
                assert given.get("autoescape") == "True", where


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a spec and its data, two levels below the temporary one."""
    home = tmp_path / "a" / "b"
    home.mkdir(parents=True)
    monkeypatch.chdir(home)
    rng = np.random.default_rng(0)
    np.save("x.npy", (rng.random((40, 6)) < rng.random((40, 1))).astype(np.float32))
    spec = {
        "data": {"name": "file", "path": str(home / "x.npy")},
        "model": {"latent_dim": 1, "likelihood": "bernoulli", "decoder": {"name": "mlp", "hidden": [5]}},
        "fit": {"epochs": 1, "device": "cpu"},
        "audit": {"draws": 200, "keep": 100},
    }
    Path("s.yaml").write_text(document.write(spec))
    return home


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['touch owned']", "!!python/name:os.system", "!<x> 1"])
def test_code_in_a_spec_is_refused_in_one_line(text, here, capsys):
    Path("s.yaml").write_text(f"data: {text}\n")
    with pytest.raises(SystemExit) as stop:
        main(["run", "s.yaml"])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("elbowroom: s.yaml, line 1, column 7: the tag ")
    assert err.count("\n") == 1
    assert not Path("owned").exists()


@pytest.mark.parametrize("name", ["..yaml", "...yaml", "....yaml", ".yaml", "a..yaml"])
def test_no_name_of_a_spec_leads_out_of_runs(name, here):
    Path("s.yaml").rename(name)
    out = default_folder(Experiment.load(name))
    assert out.parent == Path("runs")
    assert out.resolve().parent == (here / "runs").resolve()


def test_no_name_of_data_leads_out_of_a_run(here):
    run = fit("s.yaml", out="run")
    before = {p for p in here.parents[1].rglob("*") if run.path.resolve() not in p.resolve().parents}
    for name in ("...npy", "..npy"):
        target = run.audit_folder(name)
        assert target.parent == run.path / run_folder.AUDITS
    Path("...npy").write_bytes(Path("x.npy").read_bytes())
    Run.load("run").audit("...npy")
    after = {p for p in here.parents[1].rglob("*") if run.path.resolve() not in p.resolve().parents}
    assert after - before == {here / "...npy"}
    assert not (run.path / "audit.nc").exists()


def test_a_planted_lock_is_not_followed(here):
    Path("run").mkdir()
    Path("run/.lock").symlink_to(here / "victim")
    with pytest.raises(UserError, match="is a link"):
        fit("s.yaml", out="run")
    assert not Path("victim").exists()


@pytest.mark.usefixtures("no_figures")
def test_what_a_report_shows_is_escaped(here):
    evil = "<script>alert(1)</script>&\"'"
    run = fit("s.yaml", out=here / "<img src=x onerror=alert(1)>")
    audit = run.audit()
    audit.table.attrs |= {"verdict": evil, "data": evil, "elbowroom": evil, "notes": evil, "experiment": evil}
    audit.table["reason"][:] = evil
    Audit(audit.table, audit.posteriors).save(run.path)
    spec = document.read(run.path / "spec.yaml")
    spec["model"][evil] = evil
    (run.path / "spec.yaml").write_text(document.write(spec))
    html = write_report(run.path).read_text()
    assert "<script>alert" not in html
    assert "<img src=x" not in html
    assert "&lt;script&gt;" in html


OWN = """from pathlib import Path
Path(__file__).with_name("owned").touch()
from elbowroom.models.priors.standard import Normal
class Own(Normal):
    "A normal prior that leaves a trace."
"""


@pytest.mark.parametrize("name", ["python:own.py:Own", "python:../b/own.py:Own", "python:own:Own", "python:own.sub:Own"])
@pytest.mark.parametrize("where", sorted(PLACES))
def test_a_spec_executes_nothing_without_the_flag(name, where, here, monkeypatch, capsys):
    monkeypatch.syspath_prepend(here)
    Path("own.py").write_text(OWN)
    for given in (name, {"name": name}, {"name": name, "sha256": "0" * 64}):
        tree = document.read("s.yaml")
        parent, _, key = where.rpartition(".")
        (tree.setdefault(parent, {}) if parent else tree)[key] = [given] if where == "audit.references" else given
        Path("evil.yaml").write_text(document.write(tree))
        for command in (["run"], ["fit"], ["run", "--dry-run"], ["spec", "show"]):
            with pytest.raises(SystemExit) as stop:
                main([*command, "evil.yaml"])
            assert stop.value.code == 2
            err = capsys.readouterr().err
            assert err.startswith(f"elbowroom: evil.yaml: {where}: {name} would execute ")
            assert err.count("\n") == 1
    with pytest.raises(SystemExit) as stop:
        main(["fit", "s.yaml", "--set", f"{where}={name}"])
    assert stop.value.code == 2
    with pytest.raises(SystemExit):
        main(["components", PLACES[where], name, "--check"])
    assert not Path("owned").exists()
    assert "own" not in sys.modules


@pytest.mark.usefixtures("no_figures")
def test_a_run_folder_from_elsewhere_executes_nothing_without_the_flag(here, capsys):
    Path("own.py").write_text(OWN)
    run = fit(Experiment.load("s.yaml", ["model.prior=python:own.py:Own"], allow_python=True), out="run")
    run.audit()
    Path("owned").unlink()
    forget_python()  # as in another process
    for command in (["audit", "run"], ["audit", "run", "--dry-run"], ["fit", "run/spec.yaml", "--out", "run", "--resume"]):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 2
        err = capsys.readouterr().err
        assert f"would execute {here}/own.py; allow it with --allow-python" in err
        assert err.count("\n") == 1
    with pytest.raises(SpecError, match="would execute"):
        Run.load("run")
    with pytest.raises(SystemExit) as stop:
        main(["report", "run"])
    assert stop.value.code == 0
    assert not Path("owned").exists()
    Run.load("run", allow_python=True)
    assert Path("owned").exists()
    with pytest.raises(SpecError, match="would execute"):  # what was let in once is not let in for the next
        Run.load("run")


def test_aliases_in_a_spec_do_not_swell_a_report(here):
    run = fit("s.yaml", out="run")
    run.audit()
    bomb = "a: &a [x, x]\n" + "".join(f"{c}: &{c} [*{p}, *{p}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True))
    (run.path / "spec.yaml").write_text(bomb)
    with pytest.raises(Exception, match=r"spec\.yaml: damaged \(aliases are not allowed\)"):
        write_report(run.path)


def test_archives_are_sized_before_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "memory", lambda: 100_000)
    np.savez_compressed(tmp_path / "zeros.npz", x=np.zeros((1000, 100)))  # 1 kB that unpacks to 800 kB
    assert (tmp_path / "zeros.npz").stat().st_size < 5_000
    with pytest.raises(DataError, match=r"^zeros.npz: x unpacks to 800 kB, and this machine has 100 kB of memory; save it as"):
        archive.check_npz(tmp_path / "zeros.npz", "x", "zeros.npz")
    with pytest.raises(DataError, match=r"^zeros.npz: x unpacks to"):
        archive.read_npz(tmp_path / "zeros.npz")
    assert archive.too_large(40_000) is None
    assert archive.amount(999) == "999 bytes"
