"""Specs: YAML without surprises, errors of one line, --set in any order, and round trips."""

from __future__ import annotations

import itertools
import json

import pytest

from elbowroom.errors import SpecError
from elbowroom.spec import document, spec

GOOD = """\
schema: 1
data: {name: digits, binarize: 8}
model:
  latent_dim: 2
  prior: normal
  likelihood: bernoulli
  decoder: {name: mlp, hidden: [128, 128]}
guide:
  family: diagonal_normal
  encoder: {name: mlp, hidden: [128, 128]}
fit: {epochs: 100, learning_rate: 1e-3}
audit: {observations: all, references: auto}
seed: 0
"""


@pytest.fixture
def digits(tmp_path):
    path = tmp_path / "digits.yaml"
    path.write_text(GOOD)
    return path


def message(call, *arguments) -> str:
    with pytest.raises(SpecError) as error:
        call(*arguments)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_scalars_follow_yaml_1_2():
    tree = document.parse("{a: 1e-3, b: no, c: on, d: 1_000, e: .5, f: 010, g: 0x1f, h: null, i: 2020-01-01, j: 1:30}", "s")
    assert tree == {
        "a": 1e-3, "b": "no", "c": "on", "d": 1000, "e": 0.5, "f": 10, "g": 31, "h": None, "i": "2020-01-01", "j": "1:30",
    }  # fmt: skip


YAML = {
    "a: [1,": "s, line 1, column 7: expected the node content, but found '<stream end>'",
    "a: 1\na: 2": "s, line 2, column 1: the key 'a' appears twice",
    "a: {b: 1, b: 2}": "s, line 1, column 11: the key 'b' appears twice",
    "a:\n\t- b": "s, line 2, column 1: found character '\\t' that cannot start any token",
    "a: &x 1": "s, line 1, column 4: anchors and aliases are not allowed",
    "a: *x": "s, line 1, column 4: anchors and aliases are not allowed",
    "a: !!python/object/apply:os.getcwd []": "s, line 1, column 4: the tag tag:yaml.org,2002:python/object/apply:os.getcwd "
    "is not allowed",
    "a: !!float x": "s, line 1, column 4: the tag tag:yaml.org,2002:float is not allowed",
    "1: 2": "s, line 1, column 1: a key must be text",
    "? [a]\n: 1": "s, line 1, column 3: a key must be text",
    "a: 1\n---\nb: 2": "s, line 2, column 1: but found another document",
    "a: " + "9" * 5000: "s, line 1, column 4: this number has too many digits",
    'a: "\\ud800"': "s, line 1, column 4: this text is not valid Unicode",
    "a: \x07": "s, line 1: the character '\\x07' is not allowed",
    "[" * 5000: "s: nested too deeply",
}


@pytest.mark.parametrize("text", YAML, ids=[repr(key[:20]) for key in YAML])
def test_yaml_problems_name_the_place(text):
    assert message(document.parse, text, "s") == YAML[text]


def test_written_trees_read_back_equal():
    tree = {
        "a": [1, 2], "b": "1e-3", "c": "no", "d": 1e-5, "e": {"f": [{"g": None}]}, "h": "2020-01-01", "i": "", "j": 1e22,
        "k": "null", "l": float("inf"), "m": "1_0", "n": "é", "o": 0.1, "q": True, "r": "a: b\n# c", "s": "=", "u": [],
        "v": "true", "w": "010", "x": "0x1f", "y": ".5", "z": "~",
    }  # fmt: skip
    assert document.parse(document.write(tree), "s") == tree


FILES = {
    b"": "empty; `elbowroom spec init` copies a spec that comes with elbowroom",
    b"# only a comment": "empty; `elbowroom spec init` copies a spec that comes with elbowroom",
    b"- 1\n- 2": "a spec is a block of `key: value` lines, this is [1, 2]",
    b"\xff\xfe\x00": "not a text file in UTF-8 (byte 0)",
    b"a" * 1_000_001: "more than 1,000,000 bytes: this is not a spec",
}


@pytest.mark.parametrize("content", FILES, ids=[repr(key[:10]) for key in FILES])
def test_files_that_are_no_specs(content, tmp_path):
    path = tmp_path / "s.yaml"
    path.write_bytes(content)
    assert message(spec.load, path) == f"s.yaml: {FILES[content]}"


def test_missing_file_and_folder(tmp_path):
    assert "no such spec; `elbowroom spec init`" in message(spec.load, tmp_path / "s.yaml")
    assert message(spec.load, tmp_path) == f"{tmp_path}: this is a folder; name the spec file"


REPLACED = {
    ("latent_dim: 2", "latentdim: 2"): "model.latentdim: unknown; did you mean 'latent_dim'?",
    ("latent_dim: 2", "latent_dim: two"): "model.latent_dim: must be a whole number, got 'two'",
    ("latent_dim: 2", "latent_dim: '2'"): "model.latent_dim: must be a whole number, got '2'; write it without quotes",
    ("latent_dim: 2", "latent_dim: 2.0"): "model.latent_dim: must be a whole number, got 2.0; write 2",
    ("latent_dim: 2", "latent_dim: true"): "model.latent_dim: must be a whole number, got true",
    ("latent_dim: 2", "latent_dim: 0"): "model.latent_dim: must be at least 1, got 0",
    ("latent_dim: 2", "latent_dim:"): "model.latent_dim: must be a whole number, got nothing",
    ("  latent_dim: 2\n", ""): "model.latent_dim: missing",
    ("model:", "modle:"): "modle: unknown; did you mean 'model'?",
    ("likelihood: bernoulli", "likelihood: bernuli"): "model.likelihood: unknown likelihood 'bernuli'; "
    "did you mean 'bernoulli'?",
    ("likelihood: bernoulli", "likelihood: {name: gausian}"): "model.likelihood.name: unknown likelihood 'gausian'; "
    "did you mean 'gaussian'?",
    ("likelihood: bernoulli", "likelihood: {scale: 1}"): "model.likelihood: needs a name, one of bernoulli, "
    "beta, beta_binomial, binomial, categorical, continuous_bernoulli, dirichlet_multinomial, discretized_logistic, gamma, "
    "gaussian, laplace, log_normal, mixed, multinomial, negative_binomial, ordinal, poisson, student_t, "
    "zero_inflated_negative_binomial, zero_inflated_poisson, zero_one_inflated_beta",
    ("likelihood: bernoulli", "likelihood: {name:student_t,df:3}"): "model.likelihood: needs a name; put a space after the "
    "colon: {name: student_t, df: 3}",
    ("likelihood: bernoulli", "likelihood: {name: bernoulli, scale: 1}"): "model.likelihood.scale: bernoulli takes no options",
    ("likelihood: bernoulli", "likelihood: 3"): "model.likelihood: must be a name, or a block with a name, got 3",
    ("likelihood: bernoulli", "likelihood: {name: gaussian, scale: no}"): "model.likelihood.scale: must be a number or "
    "'shared', 'per_dimension' or 'decoder', got 'no'",
    ("hidden: [128, 128]", "hiden: [128]"): "model.decoder.hiden: unknown option of mlp; did you mean 'hidden'?",
    ("hidden: [128, 128]", "hidden: 128"): "model.decoder.hidden: must be a list such as [64, 64], got 128",
    ("hidden: [128, 128]", "hidden: [128, a]"): "model.decoder.hidden.1: must be a whole number, got 'a'",
    ("epochs: 100", "epochs: 1e2"): "fit.epochs: must be a whole number, got 100.0; write 100",
    ("epochs: 100", "epochs: -1"): "fit.epochs: must be at least 1, got -1",
    ("epochs: 100", "epoch: 1"): "fit.epoch: unknown; did you mean 'epochs'?",
    ("learning_rate: 1e-3", "learning_rate: fast"): "fit.learning_rate: must be a number, got 'fast'",
    ("learning_rate: 1e-3", "learning_rate: .inf"): "fit.learning_rate: must be finite, got inf",
    ("learning_rate: 1e-3", "dtype: float16"): "fit.dtype: must be 'float32' or 'float64', got 'float16'; "
    "did you mean 'float64'?",
    ("references: auto", "references: grd"): "audit.references: unknown reference 'grd'; did you mean 'grid'?",
    ("references: auto", "references: [grid, {name: nuts}]"): "audit.references.1.name: unknown reference 'nuts'; "
    "allowed: ais, closed_form, enumeration, grid, hmc, importance",
    ("observations: all", "budget: soon"): "audit.budget: must be a time above 0, such as 90s, 10m or 1h, or none, got 'soon'",
    ("observations: all", "budget: -3"): "audit.budget: must be a time above 0, such as 90s, 10m or 1h, or none, got -3",
    ("observations: all", "budget: [1]"): "audit.budget: must be a time above 0, such as 90s, 10m or 1h, or none, got [1]",
    ("references: auto", "references: [{name: grid, tolerence: 1}]"): "audit.references.0.tolerence: unknown option of grid; "
    "did you mean 'tolerance'?",
    ("references: auto", "references: []"): "audit.references: must be 'auto' or a list of at least 1, got []",
    ("references: auto", "references: [grid, grid]"): "audit.references: grid is given twice",
    ("references: auto", "references: closed_form"): "audit.references: closed_form needs model.decoder = linear, "
    "it is mlp; use auto",
    ("observations: all", "observations: most"): "audit.observations: must be 'all' or a whole number, got 'most'",
    ("binarize: 8", "binarise: 8"): "data.binarise: unknown option of digits; did you mean 'binarize'?",
    ("binarize: 8", "split: [0.5, 0.5]"): "data.split: must be a list of at least 3, got [0.5, 0.5]",
    ("binarize: 8", "split: [0.5, 0.5, 0.5]"): "data.split: train, validation and test must sum to 1, got 1.5",
    ("binarize: 8", "split: [1, 0, 0]"): "data.split: train and test must be positive, such as [0.6, 0.2, 0.2]",
    ("data: {name: digits, binarize: 8}", "data: file"): "data.path: missing",
    ("data: {name: digits, binarize: 8}\n", ""): "data: missing",
    ("schema: 1", "schema: 2"): "schema: 2 is newer than this elbowroom, which reads 1; upgrade elbowroom",
    ("schema: 1", "schema: one"): "schema: must be 1, got 'one'",
    ("seed: 0", "seed: -1"): "seed: must be at least 0, got -1",
    ("seed: 0", "sede: 0"): "sede: unknown; did you mean 'seed'?",
}


@pytest.mark.parametrize("change", REPLACED, ids=[new or f"no {old}" for old, new in REPLACED])
def test_one_line_names_file_path_and_cure(change, digits):
    old, new = change
    assert old in GOOD
    digits.write_text(GOOD.replace(old, new, 1))
    assert message(spec.load, digits) == f"digits.yaml: {REPLACED[change]}"


def test_grid_with_seven_latents_is_a_contradiction(digits):
    wanted = "digits.yaml: audit.references: grid needs at most 3 latent dimensions, model.latent_dim is 7; use auto"
    assert message(spec.load, digits, ["model.latent_dim=7", "audit.references=grid"]) == wanted


def test_patience_needs_validation_data(digits):
    wanted = "digits.yaml: fit.patience: there are no validation data to judge by (data.split); leave it out"
    assert message(spec.load, digits, ["data.split=0.8,0,0.2", "fit.patience=3"]) == wanted


SETS = {
    ("model.latentdim=3",): "--set model.latentdim: unknown; did you mean 'latent_dim'?",
    ("modle.latent_dim=3",): "--set modle: unknown; did you mean 'model'?",
    ("model.latent_dim",): "--set model.latent_dim: write it as key=value with a dotted key, e.g. --set model.latent_dim=2",
    ("=3",): "--set =3: write it as key=value with a dotted key, e.g. --set model.latent_dim=2",
    ("seed=1", "seed=2"): "--set seed: given twice",
    ("model.decoder=mlp", "model.decoder.name=linear"): "--set model.decoder: given twice",
    ("seed.x=1",): "--set seed: this is 0, which has nothing inside to set",
    ("model.decoder.hidden.7=1",): "--set model.decoder.hidden.7: the list has 2 entries; name one by its position, from 0",
    ("seed=[1",): "--set seed, line 1, column 3: expected ',' or ']', but got '<stream end>'",
    ("model.likelihood.scale=1",): "--set model.likelihood.scale: bernoulli takes no options",
    ("audit.references=grid,nuts",): "--set audit.references.1: unknown reference 'nuts'; "
    "allowed: ais, closed_form, enumeration, grid, hmc, importance",
}


@pytest.mark.parametrize("changes", SETS, ids=[" ".join(c) for c in SETS])
def test_set_problems_name_the_option(changes, digits):
    assert message(spec.load, digits, list(changes)) == SETS[changes]


def test_the_order_of_set_never_matters(digits):
    changes = [
        "model.likelihood=gaussian",
        "model.likelihood.scale=0.5",
        "model.decoder.hidden=64,32",
        "data.binarize=null",
        "audit.references=grid",
    ]
    loaded = [spec.load(digits, order) for order in itertools.permutations(changes)]
    assert all(item.spec == loaded[0].spec and item.notes == loaded[0].notes for item in loaded)
    tree = loaded[0].spec.tree()
    assert tree["model"]["likelihood"] == {"name": "gaussian", "scale": 0.5, "floor": 1e-3}
    assert tree["model"]["decoder"]["hidden"] == [64, 32]
    assert [r["name"] for r in tree["audit"]["references"]] == ["grid"]


def test_another_name_resets_the_options_and_says_so(digits):
    loaded = spec.load(digits, ["model.decoder=linear"])
    assert loaded.spec.tree()["model"]["decoder"] == {"name": "linear"}
    assert loaded.notes == ("--set model.decoder=linear: the options of mlp were reset (hidden)",)
    kept = spec.load(digits, ["model.decoder.name=mlp"])
    assert kept.spec.tree()["model"]["decoder"]["hidden"] == [128, 128]
    assert kept.notes == ()
    family = spec.load(digits, ["guide.family=full_rank_normal"])
    assert family.spec.tree()["guide"]["family"] == {"name": "full_rank_normal"}


def test_a_number_in_exponent_notation_is_a_number(digits):
    assert spec.load(digits, ["fit.learning_rate=3e-4"]).spec.fit.learning_rate == 3e-4


def test_defaults_are_filled_in(tmp_path):
    path = tmp_path / "short.yaml"
    path.write_text("data: digits\nmodel: {latent_dim: 1, likelihood: bernoulli}\n")
    tree = spec.load(path).spec.tree()
    assert tree["guide"]["family"] == {"name": "diagonal_normal"}
    plain = {"residual": False, "norm": "none", "dropout": 0.0}
    assert tree["model"]["decoder"] == {"name": "mlp", "hidden": [128, 128], "activation": "silu", **plain}
    assert (tree["schema"], tree["seed"], tree["audit"]["references"]) == (1, 0, "auto")


@pytest.mark.parametrize("name", spec.shipped())
def test_shipped_specs_round_trip(name, tmp_path):
    path = tmp_path / f"{name}.yaml"
    path.write_text(spec.shipped_text(name))
    loaded = spec.load(path)
    again = tmp_path / "again.yaml"
    again.write_text(document.write(loaded.spec.tree()))
    assert spec.load(again).spec == loaded.spec


def test_shipped_names():
    assert spec.shipped() == [
        "adult",
        "binarized_mnist",
        "binarized_mnist_d50",
        "deep_markov",
        "digits",
        "digits_counts",
        "digits_gaussian",
        "jsb_chorales",
        "linear_gaussian",
    ]
    assert message(spec.shipped_text, "digit") == "there is no spec 'digit' in elbowroom; did you mean 'digits'?"


def test_the_json_schema_knows_every_component():
    text = json.dumps(spec.json_schema())
    for word in ("bernoulli", "full_rank_normal", "closed_form", "kl_warmup", "binarize", "latent_dim"):
        assert f'"{word}"' in text
