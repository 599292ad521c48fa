"""A user's own components: the examples of CONTRIBUTING.md, `python:` names, and what installed packages offer."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from support.registry import forget_python

import elbowroom as er
from elbowroom.cli.app import main
from elbowroom.components import plugins, registry
from elbowroom.conformance.conformance import problems_of
from elbowroom.errors import RunFolderError, SpecError
from elbowroom.spec import document, spec

ROOT = Path(__file__).parents[3]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = {code.split()[1]: code for code in re.findall(r"```python\n(# \w+\.py\n.*?)```", CONTRIBUTING, flags=re.S)}
USES = {
    "wide.py": ("prior", "Wide", "model.prior"),
    "cauchy.py": ("likelihood", "Cauchy", "model.likelihood"),
    "laplace_guide.py": ("guide", "LaplaceGuide", "guide.family"),
    "wave.py": ("network", "WaveNet", "model.decoder"),
    "averaged.py": ("objective", "Averaged", "fit.objective"),
    "rings.py": ("data", "Rings", "data"),
    "prior_sampling.py": ("reference", "PriorSampling", "audit.references"),
}
DIGITS = {
    "data": {"name": "digits", "split": [0.3, 0.1, 0.6]},
    "model": {"latent_dim": 1, "likelihood": {"name": "gaussian", "scale": 0.5}, "decoder": {"name": "mlp", "hidden": [5]}},
    "guide": {"encoder": {"name": "mlp", "hidden": [5]}},
    "fit": {"epochs": 2, "device": "cpu"},
    "audit": {"observations": 3, "draws": 200, "keep": 100, "references": "grid"},
}
WIDE = "python:wide.py:Wide"


@pytest.fixture(autouse=True)
def forget():
    """Take what a test made known out of the registry."""
    yield
    for kind in registry.kinds():
        registry.in_use[kind].clear()
    forget_python()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a spec and the examples, as the working folder."""
    monkeypatch.chdir(tmp_path)
    for name, code in EXAMPLES.items():
        Path(name).write_text(code)
    write()
    return tmp_path


def write(prior: object = WIDE, **others: object) -> None:
    """Write s.yaml with a prior."""
    Path("s.yaml").write_text(document.write({**DIGITS, "model": {**DIGITS["model"], "prior": prior}, **others}))


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one line that a refused command says."""
    capsys.readouterr()
    assert call(*arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("elbowroom: ")
    assert err.count("\n") == 1
    return err.removeprefix("elbowroom: ").rstrip("\n")


# -- the examples of CONTRIBUTING.md ------------------------------------------------------------------------------------


def test_there_is_an_example_of_every_kind():
    assert set(EXAMPLES) == set(USES)
    assert {kind for kind, _, _ in USES.values()} == set(registry.kinds())


@pytest.mark.parametrize("file", USES)
def test_an_example_keeps_the_protocol(file, here):
    kind, cls, _ = USES[file]
    name = registry.python(kind, f"python:{file}:{cls}", folder=here)
    assert name == f"python:{here / file}:{cls}"
    assert problems_of(kind, name) == []


@pytest.mark.parametrize(
    "file", [file if i == 0 else pytest.param(file, marks=pytest.mark.slow) for i, file in enumerate(USES)]
)
@pytest.mark.usefixtures("no_figures")
def test_an_example_is_fitted_and_audited_by_the_command_line(file, here, capsys):
    kind, cls, where = USES[file]
    Path("s.yaml").write_text(document.write({**DIGITS}))
    change = f"{where}=python:{file}:{cls}"
    assert call("run", "s.yaml", "--set", change, "--allow-python", "--out", "run") == 0, capsys.readouterr().err
    said = document.read("run/spec.yaml")
    for part in where.split("."):
        said = said[part]
    said = said[0] if kind == "reference" else said
    assert said["name"] == f"python:{here / file}:{cls}"
    assert said["sha256"] == plugins.sha256(Path(file).read_bytes())
    assert Path("run/report.html").is_file()


# -- names in specs -----------------------------------------------------------------------------------------------------


def test_options_are_checked_like_those_of_our_own(here, capsys):
    assert er.Experiment.load("s.yaml", allow_python=True).build().prior.scale == 2.0
    write({"name": WIDE, "scale": 3})
    assert er.Experiment.load("s.yaml", allow_python=True).build().prior.scale == 3.0
    assert er.Experiment.load("s.yaml", ["model.prior.scale=4"], allow_python=True).build().prior.scale == 4.0
    full = f"python:{here}/wide.py:Wide"
    told = refused(capsys, "fit", "s.yaml", "--allow-python", "--set", "model.prior.scale=wide")
    assert told == "--set model.prior.scale: must be a number, got 'wide'"
    told = refused(capsys, "fit", "s.yaml", "--allow-python", "--set", "model.prior.scael=3")
    assert told == f"--set model.prior.scael: unknown option of {full}; did you mean 'scale'?"
    with pytest.raises(SpecError, match="scale: must be a number, got 'x'"):
        registry.component("prior", full).cls(2, scale="x")


def test_what_python_code_loads_needs_consent_too(here):
    tree = document.read("s.yaml")
    for load in (
        lambda **allow: er.Experiment.load("s.yaml", **allow),
        lambda **allow: er.Experiment.from_dict(tree, **allow),
        lambda **allow: er.Experiment.from_dict(tree, data=np.random.default_rng(0).normal(size=(9, 3)), **allow),
        lambda **allow: er.fit("s.yaml", "run", **allow),
        lambda **allow: er.Run.load("run", **allow),
    ):
        load(allow_python=True)
        with pytest.raises(
            SpecError, match=r"would execute .*wide\.py; allow it with --allow-python \(in Python: allow_python"
        ):
            load()


def test_paths_start_from_the_folder_of_the_spec(here, monkeypatch):
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    assert er.Experiment.load(here / "s.yaml", allow_python=True).build().prior.scale == 2.0


def test_a_module_is_named_like_a_file(here, monkeypatch, capsys):
    write("python:own_module:Wide")
    told = refused(capsys, "fit", "s.yaml", "--allow-python")
    assert told.endswith("there is no module own_module; install it, or name a file: python:my_file.py:Class")
    Path("own_module.py").write_text(EXAMPLES["wide.py"])
    told = refused(capsys, "fit", "s.yaml", "--allow-python")
    assert told.endswith("there is no module own_module; write python:own_module.py:Wide")
    monkeypatch.syspath_prepend(here)
    assert refused(capsys, "fit", "s.yaml") == (
        "s.yaml: model.prior: python:own_module:Wide would execute the module own_module; allow it with --allow-python "
        "(in Python: allow_python=True) if you trust it"
    )
    assert call("fit", "s.yaml", "--allow-python") == 0
    assert document.read("runs/s/spec.yaml")["model"]["prior"]["name"] == "python:own_module:Wide"


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("python:wide.py", None, "'python:wide.py' names no class; write python:my_file.py:Class, or python:my_module:Class"),
        (
            "python:a/b:Wide",
            None,
            "'python:a/b:Wide': 'a/b' is no module; write python:my_file.py:Class, or python:my_module:Class",
        ),
        (
            "python:no.py:Wide",
            None,
            "python:no.py:Wide: there is no file {here}/no.py; correct the path, which starts from {here}",
        ),
        ("python:own.py:Wied", None, "python:own.py:Wied: there is no 'Wied'; did you mean 'Wide'?"),
        ("python:own.py:x", "x = 1", "python:own.py:x: x is no class"),
        (
            "python:own.py:Wide",
            "\n1 / 0",
            "python:own.py:Wide cannot be executed (line 2: ZeroDivisionError: {error}",
        ),
        ("python:own.py:Wide", "def f(:", "python:own.py:Wide cannot be executed (line 1: SyntaxError: {error}"),
        ("python:own.py:Wide", "raise SystemExit", "python:own.py:Wide cannot be executed (line 1: SystemExit); correct"),
        (
            "python:own.py:Wide",
            "class Wide: ...",
            "prior python:own.py:Wide: Wide is no prior; derive it from elbowroom.models.priors.Prior",
        ),
        (
            "python:own.py:Wide",
            EXAMPLES["wide.py"].replace("scale: float = 2.0", "scale=2.0"),
            "prior python:own.py:Wide: Wide: option scale has no type annotation",
        ),
        (
            "python:own.py:Wide",
            EXAMPLES["wide.py"].replace("scale: float = 2.0", "scale: torch.Tensor = torch.ones(())"),
            "prior python:own.py:Wide: option scale: Tensor cannot be written in a spec; use numbers, text, true or false, ",
        ),
        (
            "python:own.py:Wide",
            EXAMPLES["wide.py"].replace("scale: float = 2.0", "scale: int = 2.5"),
            "prior python:own.py:Wide: option scale: its default must be a whole number, got 2.5",
        ),
        (
            "python:own.py:Wide",
            EXAMPLES["wide.py"].replace("scale: float", "sha256: float"),
            "prior python:own.py:Wide: an option cannot be called 'sha256'",
        ),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(name, code, message, here, capsys):
    write(name)
    Path("own.py").write_text(code or EXAMPLES["wide.py"])
    told = refused(capsys, "fit", "s.yaml", "--allow-python")
    wanted, _, _ = f"s.yaml: model.prior: {message}".partition("{error}")
    assert told.startswith(wanted.format(here=here))
    assert not Path("runs").exists()


def test_nothing_is_left_beside_a_file_that_was_executed(here):
    before = {p.name for p in here.iterdir()}
    er.Experiment.load("s.yaml", allow_python=True)
    assert {p.name for p in here.iterdir()} == before


def test_a_file_is_executed_once_and_again_when_it_has_changed(here):
    Path("wide.py").write_text(
        EXAMPLES["wide.py"] + "\nfrom pathlib import Path\nPath('count').write_text('x' * (1 + Path('count').exists()))\n"
    )
    first = er.Experiment.load("s.yaml", allow_python=True)
    er.Experiment.load("s.yaml", allow_python=True)
    assert Path("count").read_text() == "x"
    Path("wide.py").write_text(EXAMPLES["wide.py"].replace("scale: float = 2.0", "scale: float = 5.0"))
    second = er.Experiment.load("s.yaml", allow_python=True)
    assert second.build().prior.scale == 5.0
    assert first.identity != second.identity


# -- run folders ----------------------------------------------------------------------------------------------------------


def test_a_run_whose_file_has_changed_is_refused_with_the_remedy(here, capsys):
    assert call("fit", "s.yaml", "--allow-python") == 0
    Path("wide.py").write_text(EXAMPLES["wide.py"] + "\n")
    told = refused(capsys, "audit", "runs/s", "--allow-python")
    assert told.startswith(f"runs/s/spec.yaml: model.prior: python:wide.py:Wide: {here}/wide.py is not what it was (sha256 is ")
    assert told.endswith("bring the old one back, or leave sha256 out and fit again")
    told = refused(capsys, "fit", "s.yaml", "--resume", "--allow-python")
    assert "belongs to another experiment (model.prior.sha256 is " in told
    Path("wide.py").write_text(EXAMPLES["wide.py"])
    assert call("fit", "s.yaml", "--resume", "--allow-python") == 0
    assert call("audit", "runs/s", "--allow-python") == 0


def test_a_file_may_move_when_the_run_is_told(here):
    er.fit("s.yaml", "run", allow_python=True)
    (here / "moved").mkdir()
    Path("wide.py").rename("moved/wide.py")
    with pytest.raises(SpecError, match=r"there is no file .*wide.py; correct the path"):
        er.Run.load("run", allow_python=True)
    text = Path("run/spec.yaml").read_text()
    Path("run/spec.yaml").write_text(text.replace(f"{here}/wide.py", f"{here}/moved/wide.py"))
    assert er.Run.load("run", allow_python=True).vae.prior.scale == 2.0
    Path("run/spec.yaml").write_text(re.sub(r"\n +sha256: .*", "", text.replace(f"{here}/wide.py", "../moved/wide.py")))
    with pytest.raises(RunFolderError, match="was changed after the fit"):
        er.Run.load("run", allow_python=True)


# -- the commands -----------------------------------------------------------------------------------------------------------


def test_components_shows_and_checks_one_of_ones_own(here, capsys):
    assert refused(capsys, "components", "prior", WIDE).startswith(f"{WIDE} would execute {here}/wide.py; allow it with")
    assert refused(capsys, "components", WIDE, "--allow-python").startswith(f"{WIDE}: say its kind first, such as")
    assert call("components", "prior", WIDE, "--allow-python") == 0
    out = capsys.readouterr().out
    assert "A normal prior with another scale" in out
    assert "scale: number; default 2.0. standard deviation of each latent." in out
    assert "guides: diagonal_normal, flow, full_rank_normal" in " ".join(out.split())
    assert call("components", "--check", "--allow-python", "prior", WIDE) == 0
    assert capsys.readouterr().out == f"ok      prior {WIDE}\nchecked 1: all keep their promises\n"
    Path("wide.py").write_text(EXAMPLES["wide.py"].replace("torch.zeros(latent_dim)", "torch.zeros(latent_dim + 1)"))
    assert call("components", "prior", WIDE, "--check", "--allow-python") == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"FAILED  prior {WIDE}: returns z of shape (N, latent_dim), got (6, 3)"
    assert lines[-1] == "checked 1: 1 do not keep their promises"


def test_check_takes_required_options(here, capsys):
    Path("wide.py").write_text(EXAMPLES["wide.py"].replace("scale: float = 2.0", "scale: float"))
    assert call("components", "prior", WIDE, "--check", "--allow-python") == 2
    assert "scale" in capsys.readouterr().out
    assert call("components", "prior", WIDE, "--check", "--allow-python", "--set", "scale=3") == 0
    assert refused(capsys, "components", "prior", "--check", "--set", "df=3").startswith(
        "--set: name the component that it is for"
    )


def test_spec_show_and_dry_run_need_consent_as_well(here, capsys):
    for command in (["spec", "show", "s.yaml"], ["run", "s.yaml", "--dry-run"]):
        assert "would execute" in refused(capsys, *command)
        assert call(*command, "--allow-python") == 0


# -- what installed packages offer ------------------------------------------------------------------------------------------


@pytest.fixture
def install(here, monkeypatch):
    """Install a package with entry points, as a folder with metadata on the path."""

    def installed(package: str, code: str, **entries: str) -> None:
        site = here / f"site_{package}"
        (site / f"{package}-1.0.dist-info").mkdir(parents=True)
        (site / f"{package}.py").write_text(code)
        (site / f"{package}-1.0.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = "".join(f"{name.replace('__', '.')} = {target}\n" for name, target in entries.items())
        (site / f"{package}-1.0.dist-info" / "entry_points.txt").write_text(f"[elbowroom.components]\n{lines}")
        monkeypatch.syspath_prepend(site)
        plugins.forget()

    return installed


@pytest.mark.slow
def test_an_installed_package_offers_a_prior(install, capsys):
    install("wide_pack", EXAMPLES["wide.py"], prior__wide="wide_pack:Wide")
    write({"name": "wide", "scale": 3})
    assert "wide" in registry.names("prior")
    spec.validate(DIGITS)
    assert "wide_pack" not in sys.modules  # listed by its metadata alone
    assert er.Experiment.load("s.yaml").build().prior.scale == 3.0
    assert call("fit", "s.yaml", "--set", "model.prior.scale=4") == 0
    assert document.read("runs/s/spec.yaml")["model"]["prior"] == {"name": "wide", "scale": 4.0}
    assert call("audit", "runs/s") == 0
    capsys.readouterr()
    assert call("components", "prior") == 0
    assert "wide (from wide_pack 1.0)" in capsys.readouterr().out
    assert call("components", "--check", "prior", "wide") == 0
    assert "prior_wide" in json.dumps(spec.json_schema())
    assert refused(capsys, "fit", "s.yaml", "--set", "model.prior=wid") == (
        "--set model.prior: unknown prior 'wid'; did you mean 'wide'?"
    )


def test_a_broken_package_harms_no_other(install, capsys):
    install("broken_pack", "import no_such_thing", prior__broken="broken_pack:Wide", prior__normal="broken_pack:Wide")
    install("wide_pack2", EXAMPLES["wide.py"], prior__wide="wide_pack2:Wide", priors__x="wide_pack2:Wide")
    write("wide")
    assert er.Experiment.load("s.yaml").build().prior.scale == 2.0
    write("normal")
    assert type(er.Experiment.load("s.yaml").build().prior).__module__ == "elbowroom.models.priors.standard"
    write("broken")
    why = (
        "prior broken: broken_pack:Wide of broken_pack 1.0 cannot be imported (ModuleNotFoundError: No module named "
        "'no_such_thing'); mend or uninstall it"
    )
    assert refused(capsys, "fit", "s.yaml") == f"s.yaml: model.prior: {why}"
    assert call("components") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"cannot be used: {why}" in out
    clash = "there is a prior 'normal' in elbowroom; the package must choose another name"
    assert f"cannot be used: broken_pack 1.0: entry point prior.normal: {clash}" in out
    assert "wide_pack2 1.0: entry point priors.x: must be called kind.name, such as prior.wide; did you mean 'prior'?" in out
    assert "wide N" not in out
    assert call("components", "prior", "--json") == 0
    listed = {(c["name"], "broken" in c) for c in json.loads(capsys.readouterr().out)}
    assert {("wide", False), ("normal", False), ("normal", True), ("broken", True)} <= listed


def test_two_packages_with_one_name_are_both_named(install, capsys):
    install("one_pack", EXAMPLES["wide.py"], prior__twice="one_pack:Wide")
    install("other_pack", EXAMPLES["wide.py"], prior__twice="other_pack:Wide")
    write("twice")
    told = refused(capsys, "fit", "s.yaml")
    assert told == "s.yaml: model.prior: prior twice: offered by one_pack 1.0 and by other_pack 1.0; uninstall one"


def test_what_a_package_offers_must_be_of_its_kind(install, capsys):
    install("wrong_pack", EXAMPLES["wide.py"], likelihood__wide="wrong_pack:Wide")
    told = refused(capsys, "fit", "s.yaml", "--allow-python", "--set", "model.likelihood=wide")
    assert told.endswith("likelihood wide: Wide is no likelihood; derive it from elbowroom.models.likelihoods.Likelihood")


STUBBORN = '''
import math
import torch
from elbowroom.models.networks import Network

class Fixed(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.eye = torch.eye(width)
    def forward(self, x):
        return x @ self.eye

class Stubborn(Network):
    """A layer that ends with a matrix that is no buffer."""

    def __init__(self, in_shape: tuple[int, ...], out_dim: int) -> None:
        linear = torch.nn.Linear(math.prod(in_shape), out_dim)
        super().__init__(in_shape, out_dim, torch.nn.Sequential(linear, Fixed(out_dim)))
'''


def test_a_component_of_another_precision_is_one_line(here, capsys):
    Path("stubborn.py").write_text(STUBBORN)
    model = {**DIGITS["model"], "decoder": "python:stubborn.py:Stubborn"}
    Path("s.yaml").write_text(document.write({**DIGITS, "model": model, "fit": {**DIGITS["fit"], "dtype": "float64"}}))
    assert call("fit", "s.yaml", "--allow-python", "--out", "r") == 2
    err = capsys.readouterr().err  # a bar of progress, then the line
    assert "Traceback" not in err
    said = err.splitlines()[-1]
    assert said.startswith(
        "elbowroom: fit.dtype: a component computes with tensors of its own in another precision than torch.float64 ("
    )
    assert said.endswith("; make them parameters or buffers (register_buffer)")
