"""Everything a spec can name, with everything it goes with: fitted, audited, reported; and all the rest refused, rightly.

`covering` builds the array, `matrix` runs it; the table that it gives is docs/matrix.md.
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from support.combinations import matrix
from support.combinations.covering import EVENT, FACTORS, ISSUE, TABLES, WORDS, array, clash, refused_pairs, valid_pairs

import elbowroom as er
from elbowroom.cli.app import main
from elbowroom.errors import SpecError
from elbowroom.spec import document, spec

# Written by hand, not read from the classes: what the refusals are held against.
SPACE_OF_PRIOR = {
    "autoregressive_normal": "real",
    "bernoulli": "binary",
    "categorical": "one_hot",
    "dirichlet": "simplex",
    "flow": "real",
    "gamma": "positive",
    "gaussian_mixture": "real",
    "hierarchical": "two levels",
    "horseshoe": "real",
    "laplace": "real",
    "log_normal": "positive",
    "logistic_normal": "simplex",
    "markov": "real",
    "normal": "real",
    "student_t": "real",
    "vamp": "real",
    "von_mises_fisher": "sphere",
}
SPACE_OF_GUIDE = {
    "bernoulli": "binary",
    "categorical": "one_hot",
    "diagonal_normal": "real",
    "flow": "real",
    "full_rank_normal": "real",
    "hierarchical": "two levels",
    "log_normal": "positive",
    "logistic_normal": "simplex",
    "low_rank_normal": "real",
    "markov": "real",
    "mixture": "real",
    "power_spherical": "sphere",
    "semi_amortized": "real",
    "student_t": "real",
}
IN_WORDS = {
    "binary": "zeros and ones",
    "one_hot": "one of d categories",
    "simplex": "a simplex",
    "sphere": "a sphere",
    "positive": "positive numbers",
    "real": "the real line",
}
DISCRETE = ("binary", "one_hot")
OBJECTIVES_OF_DISCRETE = ("beta", "elbo", "trace_enum", "wake_sleep")
PRIOR_FOR = {
    "sphere": "von_mises_fisher",
    "binary": "bernoulli",
    "one_hot": "categorical",
    "simplex": "dirichlet",
    "positive": "gamma",
    "real": "normal",
}
GUIDE_FOR = {
    "sphere": "power_spherical",
    "binary": "bernoulli",
    "one_hot": "categorical",
    "simplex": "logistic_normal",
    "positive": "log_normal",
}
PLACE = {"guide.family": ("guide", "family"), "fit.objective": ("fit", "objective"), "model.prior": ("model", "prior")}
KIND_AT = {"guide.family": "guide", "fit.objective": "objective", "model.prior": "prior"}

REFUSED = refused_pairs()
RULES = [pair for pair in REFUSED if "network" not in pair]


def compatible(prior: str, guide: str) -> bool:
    """Say what goes with what, from the tables above: guides on the real line are carried onto any continuous space."""
    p, q = SPACE_OF_PRIOR[prior], SPACE_OF_GUIDE[guide]
    return p == q or (q == "real" and p in ("positive", "simplex", "sphere"))


def expected(factor: str, word: str, other: str, second: str) -> bool:
    """Say from the tables above whether a pair of words of prior, guide and objective is possible."""
    if (factor, other) == ("prior", "guide"):
        return compatible(word, second)
    if other != "objective" or factor not in ("prior", "guide"):
        return True
    space = (SPACE_OF_PRIOR if factor == "prior" else SPACE_OF_GUIDE)[word]
    if space in DISCRETE:
        return second in OBJECTIVES_OF_DISCRETE
    return second != "trace_enum" and (second != "wake_sleep" or word not in ("vamp", "semi_amortized"))


def completed(factor: str, word: str, other: str, second: str) -> dict[str, str]:
    """Return prior, guide and objective with a pair of words, of which only that pair can be at fault."""
    chosen = {"objective": "elbo", factor: word, other: second}
    if "prior" not in chosen:
        space = SPACE_OF_GUIDE[chosen["guide"]]
        chosen["prior"] = "hierarchical" if space == "two levels" else PRIOR_FOR[space]
    if "guide" not in chosen:
        space = SPACE_OF_PRIOR[chosen["prior"]]
        chosen["guide"] = "hierarchical" if space == "two levels" else GUIDE_FOR.get(space, "diagonal_normal")
    return chosen


def tree(prior: str, guide: str, objective: str) -> dict:
    return {
        "data": "digits",
        "model": {"latent_dim": 2, "prior": prior, "likelihood": "gaussian"},
        "guide": {"family": guide},
        "fit": {"objective": objective},
    }


def test_every_pair_of_words_that_go_together_is_in_the_array():
    rows = array()
    assert len(rows) == len(set(rows)) <= 400
    together = {(i, j): set() for i, j in valid_pairs()}
    for row in rows:
        assert clash(row.prior, row.guide, row.objective) is None
        for i, j in together:
            together[i, j].add((row[i], row[j]))
    for (i, j), table in valid_pairs().items():
        words = WORDS[FACTORS[i]], WORDS[FACTORS[j]]
        wanted = {(words[0][a], words[1][b]) for a, b in np.argwhere(table)}
        assert together[i, j] == wanted, (FACTORS[i], FACTORS[j])
    counts = Counter(row.network for row in rows)
    assert min(counts.values()) > 0.8 * len(rows) / len(counts)  # no word is everywhere for want of another


def test_what_goes_with_what_is_what_it_should_be():
    """The rules of the code against tables written by hand: neither a good pair is refused nor a bad one let through."""
    assert list(SPACE_OF_PRIOR) == WORDS["prior"]
    assert list(SPACE_OF_GUIDE) == WORDS["guide"]
    for i, first in enumerate(ISSUE):
        for other in ISSUE[i + 1 :]:
            for word in WORDS[first]:
                for second in WORDS[other]:
                    refused = (first, word, other, second) in REFUSED
                    tables = first == "likelihood" and other == "network" and word in TABLES and second in EVENT
                    assert refused == (tables or not expected(first, word, other, second)), (word, second)


def test_every_combination_passes_the_checks_before_a_fit(tmp_path):
    for number, row in enumerate(array()):
        matrix.experiment(number, row, tmp_path).check()


@pytest.mark.parametrize("pair", RULES, ids=lambda pair: "-".join(pair[1::2]))
def test_an_invalid_pair_is_refused_for_the_right_reason_with_a_remedy_that_works(pair):
    chosen = completed(*pair)
    given = tree(**chosen)
    with pytest.raises(SpecError) as stop:
        spec.validate(given)
    message = str(stop.value)
    assert "\n" not in message
    assert message.startswith("spec: ")
    where, _, said = message.removeprefix("spec: ").partition(": ")
    reason, _, remedy = said.partition("; use ")
    factor, word, other, second = pair
    assert second in reason
    if "prior" in (factor, other) and "guide" in (factor, other):
        assert where == "guide.family"
        p, q = SPACE_OF_PRIOR[chosen["prior"]], SPACE_OF_GUIDE[chosen["guide"]]
        assert chosen["prior"] in reason
        if "two levels" in (p, q):
            two, one = ("guide", "prior") if q == "two levels" else ("prior", "guide")
            assert re.search(rf"{chosen[two]} (draws|has) z_top and z", reason)
            assert re.search(rf"{chosen[one]} (draws|has) z(,|$)", reason)
        else:
            assert f"{chosen['guide']} lives on {IN_WORDS[q]}" in reason
            assert f"prior {chosen['prior']} on {IN_WORDS[p]}" in reason
    else:
        assert where == "fit.objective"
        space = SPACE_OF_PRIOR[chosen["prior"]]
        if second == "wake_sleep":
            assert f"prior {word} is made of the guide" in reason or f"guide {word} reads the model" in reason
        elif second == "trace_enum":
            assert space not in DISCRETE
            assert "needs discrete latents" in reason
        else:
            assert space in DISCRETE
            assert "differentiable" in reason
    remedies = re.split(r", or |, | or ", remedy)
    assert remedies
    for text in remedies:
        path, _, name = text.rpartition(" = ")
        block, key = PLACE[path or where]
        assert name in WORDS[KIND_AT[path or where]]
        spec.validate({**given, block: {**given[block], key: name}})


@pytest.mark.parametrize("network", list(EVENT))
def test_a_table_is_refused_by_networks_for_images_and_sequences(network, tmp_path):
    """The remedies work: mlp for the table, data of the network's kind for the network, another likelihood for those."""
    import pandas as pd

    frame = pd.DataFrame({"a": np.linspace(-1, 1, 30), "b": np.arange(30) % 2})
    given = tree("normal", "diagonal_normal", "elbo") | {"data": {"name": "memory"}}
    given["model"] |= {"likelihood": "mixed", "decoder": network}
    given["guide"]["encoder"] = "gru" if network == "stepwise" else network
    with pytest.raises(SpecError, match=rf"{network} is for .*reshape the data to .*, or use mlp$"):
        er.Experiment.from_dict(given, data=frame).check()
    mended = {**given, "model": {**given["model"], "decoder": "mlp"}, "guide": {"encoder": "mlp"}}
    er.Experiment.from_dict(mended, data=frame).check()
    x = np.random.default_rng(0).normal(size=(30, *EVENT[network]))
    with pytest.raises(SpecError, match="mixed: needs a table.*; use another likelihood for arrays$"):
        er.Experiment.from_dict(given, data=x).check()
    er.Experiment.from_dict({**given, "model": {**given["model"], "likelihood": "gaussian"}}, data=x).check()


@pytest.mark.parametrize(
    ("prior", "guide", "objective"),
    [
        ("bernoulli", "flow", "elbo"),
        ("normal", "hierarchical", "elbo"),
        ("categorical", "categorical", "iwae"),
        ("vamp", "mixture", "wake_sleep"),
    ],
)
def test_on_the_command_line_it_is_one_line_and_exit_2(prior, guide, objective, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(document.write(tree(prior, guide, objective)))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "s.yaml"])
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    assert "; use " in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_every_combination_fits_audits_exactly_and_reports(part):
    wrong = []
    for number, row in enumerate(array()):
        if number % 10 == part:
            found = matrix.run_one(number, row)
            wrong += [f"#{number} {' '.join(row)}: {text}" for text in matrix.problems(found)]
    assert not wrong, "\n".join(wrong)
