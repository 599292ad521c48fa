"""Run the combinations of `covering` end to end: data, fit, audit, report; one line of JSON each.

PYTHONPATH=tests python -m support.combinations.matrix build/matrix.jsonl        run what is not there yet
PYTHONPATH=tests python -m support.combinations.matrix build/matrix.jsonl --table docs/matrix.md
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import torch

import elbowroom as er
from elbowroom.analysis.measures import table as reading
from elbowroom.inference.references.importance.psis import psis
from elbowroom.models.vae import PLATE
from support.combinations.covering import EVENT, FACTORS, Combination, array, lines_of, refused_pairs
from support.combinations.covering import PAGE as PAGE_FILE

N, AUDITED, DRAWS = 60, 3, 10_000
COLUMNS = ("a", "b", "c", "d")
SMALL: dict[tuple[str, str], dict[str, Any]] = {
    ("prior", "vamp"): {"components": 4},
    ("prior", "gaussian_mixture"): {"components": 3},
    ("prior", "flow"): {"transforms": 1, "hidden": [8]},
    ("prior", "markov"): {"steps": 2},
    ("prior", "hierarchical"): {"top_dim": 1, "hidden": [8]},
    ("guide", "flow"): {"transforms": 1, "hidden": [8], "context": 4},
    ("guide", "hierarchical"): {"hidden": [8]},
    ("guide", "mixture"): {"components": 2},
    ("guide", "semi_amortized"): {"steps": 2, "draws": 2},
    ("network", "mlp"): {"hidden": [8]},
    ("network", "conv"): {"channels": [4]},
    ("network", "gru"): {"hidden": 8},
    ("network", "stepwise"): {"hidden": [8]},
    ("objective", "iwae"): {"particles": 3},
    ("objective", "dreg"): {"particles": 3},
    ("objective", "renyi"): {"particles": 3},
}
DIMS = {
    "autoregressive_normal": (2,),
    "dirichlet": (2, 3),
    "logistic_normal": (2, 3),
    "categorical": (3,),
    "bernoulli": (2,),
    "hierarchical": (1,),
    "horseshoe": (1,),  # at two, the grid resolves its spike in minutes
    "markov": (2,),
    "von_mises_fisher": (2, 3),
}


PAGE = """# Every word with every other

{rows} combinations in which every two words of a spec that go together (of prior, likelihood, guide, network and objective, and
of covariates, exposure and holes in the data) meet at least once: a pairwise covering array. Each was fitted for two epochs to
{n} rows, audited on {audited} data against an exact reference, and reported. What is tested is that all parts speak to each
other and that log p(x) is right, not that the fit is good: the gaps are those of guides that have hardly been trained.

* {exact} of {posteriors} posteriors were certified `exact`; {clean} of {done} combinations went through without a warning.
{kept}* log p(x) was estimated a second time from {draws:,} draws of the prior through the plain Pyro program, which shares
  nothing with the references. Where the weights of those draws can be trusted ({compared} posteriors), the two agree within 4.5
  standard errors unless the table says otherwise; the median difference is {off:.1g} nats.
* The other {refused} pairs of words are refused before anything is built, each with its reason and a remedy that works
  (`tests/whole/test_matrix.py`).

Made by `PYTHONPATH=tests python -m support.combinations.matrix build/matrix.jsonl`, then `--table docs/matrix.md`;
`make test-slow` runs it anew. `gap` is the median of log p(x) - ELBO in nats; data: `c` covariates (`c*`: the prior is
conditional on them too), `e` exposure, `h` holes.

| # | prior | likelihood | guide | network | objective | data | d | reference | gap |
|---|---|---|---|---|---|---|---|---|---|"""


def values(likelihood: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draw (N, *shape) data of a likelihood's kind from two hidden numbers per datum."""
    rng = np.random.default_rng(7)
    z = rng.normal(size=(N, 2))
    eta = (z @ rng.normal(size=(2, math.prod(shape))) * 0.6).reshape(N, *shape)
    noise, u = rng.normal(size=eta.shape), rng.random(eta.shape)
    share = 1 / (1 + np.exp(-eta - 0.5 * noise))
    counts = rng.poisson(np.exp(0.6 * eta + 0.7)).astype(float)
    if likelihood == "bernoulli":
        return (u < share).astype(float)
    if likelihood in ("beta", "continuous_bernoulli"):
        return np.clip(share, 0.02, 0.98)
    if likelihood == "zero_one_inflated_beta":
        return np.clip(1.4 * share - 0.2, 0, 1)
    if likelihood in ("binomial", "beta_binomial"):
        return rng.binomial(5, share).astype(float)
    if likelihood in ("categorical", "ordinal"):
        return np.floor(3.999 * share)
    if likelihood == "discretized_logistic":
        return np.floor(15.999 * share)
    if likelihood in ("gamma", "log_normal"):
        return np.exp(eta + 0.5 * noise)
    if likelihood in ("poisson", "negative_binomial", "multinomial", "dirichlet_multinomial"):
        return counts
    if likelihood.startswith("zero_inflated"):
        return counts * (u < 0.7)
    if likelihood == "mixed":
        columns = (eta[:, 0] + noise[:, 0], counts[:, 1], np.floor(2.999 * share[:, 2]), np.exp(eta[:, 3]))
        return np.stack(columns, 1)
    return eta + 0.5 * noise


def tree_and_data(number: int, row: Combination, folder: Path) -> tuple[dict[str, Any], pd.DataFrame | None]:
    """Return the spec of a combination, and its rows where they come from Python; arrays with names go to an .npz."""
    rng = np.random.default_rng([11, number])
    shape = EVENT.get(row.network, (len(COLUMNS),))
    if row.likelihood == "categorical" and row.network in ("gru", "stepwise"):
        shape = (shape[0], 1)  # a step is one code
    x = values(row.likelihood, shape)
    if row.holes == "some":
        hidden = rng.random(x.shape) < 0.15
        hidden[:2] = False  # each column keeps an observed value
        x[hidden] = np.nan
    beside = {"dose": rng.normal(size=N)} if row.covariates != "none" else {}
    rates = {"time": rng.uniform(0.5, 2.0, size=N)} if row.exposure == "given" else {}
    roles: dict[str, Any] = {"covariates": list(beside)} if beside else {}
    roles |= {"exposure": "time"} if rates else {}
    if row.network in EVENT:
        np.savez(folder / "data.npz", x=x, **beside, **rates)
        data: dict[str, Any] = {"name": "file", "path": str(folder / "data.npz"), **roles}
        frame = None
    else:
        frame = pd.DataFrame(dict(zip(COLUMNS, x.T, strict=True)) | beside | rates)
        data = {"name": "memory", **roles}
        if row.likelihood == "mixed":
            data["kinds"] = {"c": "categorical"}
    block = lambda factor, word: {"name": word, **SMALL.get((factor, word), {})}
    # A kink of the prior makes quadrature converge slowly; the numerical error is stated and enters every comparison below.
    references = [{"name": "grid", "tolerance": 0.01}] if row.prior == "laplace" else "auto"
    prior = block("prior", row.prior) | ({"covariates": True} if row.covariates == "conditional" else {})
    network = block("network", row.network)
    dims = (shape[0],) if row.network == "stepwise" else DIMS.get(row.prior, (1, 2))
    reader = block("network", "gru") if row.network == "stepwise" else network
    return {
        "data": data,
        "model": {
            "latent_dim": dims[number % len(dims)],
            "prior": prior,
            "likelihood": row.likelihood,
            "decoder": network,
        },
        "guide": {"family": block("guide", row.guide), "encoder": reader},
        "fit": {"objective": block("objective", row.objective), "epochs": 2, "learning_rate": 0.01},
        "audit": {"observations": AUDITED, "draws": 500, "keep": 200, "references": references},
        "seed": number,
    }, frame


def experiment(number: int, row: Combination, folder: Path) -> er.Experiment:
    """Return the experiment of a combination."""
    tree, frame = tree_and_data(number, row, folder)
    return er.Experiment.from_dict(tree, data=frame)


def second_opinion(run: er.Run, obs_id: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Estimate log p(x) by draws of the prior through the plain Pyro program: (N,) values and standard errors, both in nats.

    It shares nothing with the references: no transform to R^d, no grid, no table. The error is infinite where the weights rest
    on fewer than 100 draws, or their tail index says that the largest were not drawn yet.
    """
    vae = run.vae.double().eval()
    batch = {name: value.double() for name, value in run.experiment.batch(obs_id).items()}
    found, error = [], []
    for i in range(len(obs_id)):
        x, c, e = (batch[name][i : i + 1] if name in batch else None for name in ("x", "covariates", "exposure"))
        many = lambda value: None if value is None else value.expand(DRAWS, *value.shape[1:])
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(i)
            with pyro.plate(PLATE, DRAWS):
                z = vae.prior(vae._standard(many(c))) if vae.prior.covariates else vae.prior()
            p = vae.decode(z, many(c), many(e))
            if bool(x.isnan().any()):
                p = vae.likelihood.incomplete(p, many(x.isnan()))
            log_w = p.log_prob(many(x))
        top = log_w.max()
        w = (log_w - top).exp()
        mean = w.mean()
        tail = float(psis(log_w[:, None]).pareto_k)
        enough = float(w.sum() ** 2 / w.square().sum()) >= 100 and not tail > 0.5
        found.append(float(top + mean.log()))
        error.append(float(w.std() / mean / DRAWS**0.5) if enough else math.inf)
    return np.array(found), np.array(error)


def run_one(number: int, row: Combination) -> dict[str, Any]:
    """Fit, audit, report; what was found, as plain values."""
    start = time.perf_counter()
    found: dict[str, Any] = {"number": number, **row._asdict()}
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pyro.clear_param_store()
            chosen = experiment(number, row, Path(folder))
            run = er.fit(chosen, out=Path(folder) / "run")
            fitted = time.perf_counter()
            audit = run.audit()
            audited = time.perf_counter()
            found["report"] = run.report().is_file()
            found["latent_dim"] = chosen.spec.model.latent_dim
            found |= {"fit_s": fitted - start, "audit_s": audited - fitted, "report_s": time.perf_counter() - audited}
            table = audit.table
            best = reading.best_reference(table)
            found["reference"] = best or str(table["reference"].values[0])
            found["status"] = table["status"].sel(reference=found["reference"]).values.astype(str).tolist()
            found["reason"] = table["reason"].sel(reference=found["reference"]).values.astype(str).tolist()
            for name in ("gap_total", "elbo", "elbo_se", "log_evidence", "log_evidence_se", "pareto_k"):
                found[name] = reading.column(table, name).tolist()
            found["evidence_method"] = table["evidence_method"].values.astype(str).tolist()
            value, error = second_opinion(run, table["obs_id"].values)
            found["second"], found["second_se"] = value.tolist(), error.tolist()
        found["warnings"] = sorted({f"{w.category.__name__}: {str(w.message)[:200]}" for w in caught})
    except Exception as error:
        found["crash"] = f"{type(error).__name__}: {str(error)[:300]}"
        found["where"] = traceback.format_exc(limit=-4)
    found["seconds"] = time.perf_counter() - start
    return found


def problems(found: dict[str, Any]) -> list[str]:
    """Say what is wrong with the outcome of a combination; nothing where it is as it should be."""
    if "crash" in found:
        return [f"crash: {found['crash']}"]
    wrong = [f"warning: {text}" for text in found["warnings"]]
    if not found["report"]:
        wrong.append("no report.html")
    for i, status in enumerate(found["status"]):
        if status != "exact" or found["evidence_method"][i] not in ("grid", "enumeration", "closed_form"):
            wrong.append(f"datum {i}: {found['reference']} is {status}: {found['reason'][i]}")
            continue
        if not found["gap_total"][i] >= -3 * found["elbo_se"][i] - 1e-4:
            wrong.append(f"datum {i}: gap {found['gap_total'][i]:.4f} below 0, SE {found['elbo_se'][i]:.4f}")
        error = math.hypot(found["second_se"][i], found["log_evidence_se"][i])
        off = abs(found["second"][i] - found["log_evidence"][i])
        if math.isfinite(error) and not off <= 4.5 * error + 1e-3:
            wrong.append(
                f"datum {i}: log p(x) {found['log_evidence'][i]:.4f}, by the prior {found['second'][i]:.4f} +- {error:.4f}"
            )
    return wrong


def done(path: Path) -> dict[Combination, dict[str, Any]]:
    """Read what was found before."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return {Combination(*(found[factor] for factor in FACTORS)): found for found in lines}


def main(path: Path) -> None:
    """Run what is not there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    there = done(path)
    order = [n for n in reversed(range(len(array()))) if array()[n] not in there]  # the newest words first
    for place, number in enumerate(order):
        found = run_one(number, array()[number])
        with path.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(
            f"{place + 1}/{len(order)} #{number} {' '.join(array()[number])} {found['seconds']:.1f} s",
            *problems(found),
            sep="\n   ",
            flush=True,
        )


def page(found: Mapping[Combination, dict[str, Any]]) -> str:
    """Return docs/matrix.md: what was run, what came out, and one line per combination."""
    rows, before = array(), lines_of(PAGE_FILE.read_text() if PAGE_FILE.is_file() else "")
    missing = [number for number, row in enumerate(rows) if row not in found and number not in before]
    if missing:
        raise SystemExit(f"{len(missing)} of {len(rows)} combinations were not run yet, the first: #{missing[0]}")
    outcomes = [found[row] | {"number": number} for number, row in enumerate(rows) if row in found]
    wrong = {outcome["number"]: problems(outcome) for outcome in outcomes}
    posteriors = sum(len(outcome.get("status", ())) for outcome in outcomes)
    exact = sum(status == "exact" for outcome in outcomes for status in outcome.get("status", ()))
    off, compared = [], 0
    for outcome in outcomes:
        for value, error, exactly in zip(*(outcome.get(k, ()) for k in ("second", "second_se", "log_evidence")), strict=True):
            if math.isfinite(error):
                compared += 1
                off.append(abs(value - exactly))
    clean = len(outcomes) - sum(map(bool, wrong.values()))
    older = len(rows) - len(outcomes)
    kept = f"* The other {older}, marked `~`, were not run again: they are as they were found when their words were new.\n"
    head = PAGE.format(
        rows=len(rows), n=N, audited=AUDITED, exact=exact, posteriors=posteriors, clean=clean, draws=DRAWS, compared=compared,
        off=np.median(off), refused=len(refused_pairs()), done=len(outcomes), kept=kept if older else "",
    )  # fmt: skip
    lines = {number: line if line.endswith("~ |") else line.removesuffix(" |") + " ~ |" for number, line in before.items()}
    for outcome in outcomes:
        data = {"none": "", "given": "c", "conditional": "c*"}[outcome["covariates"]]
        data += ("e" if outcome["exposure"] == "given" else "") + ("h" if outcome["holes"] == "some" else "")
        gap = "; ".join(wrong[outcome["number"]]) or f"{np.median(outcome['gap_total']):.2f}"
        words = " | ".join(outcome[factor] for factor in ("prior", "likelihood", "guide", "network", "objective"))
        d, reference = outcome.get("latent_dim", ""), outcome.get("reference", "")
        lines[outcome["number"]] = f"| {outcome['number']} | {words} | {data} | {d} | {reference} | {gap} |"
    return "\n".join([head, *(lines[number] for number in sorted(lines))]) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    elif len(sys.argv) == 4 and sys.argv[2] == "--table":
        Path(sys.argv[3]).write_text(page(done(Path(sys.argv[1]))))
    else:
        raise SystemExit(__doc__)
