"""`.venv-peers/bin/python -m benchmarks.adapters`: a trained model of each peer, audited; the table of docs/adapters.md.

What stands beside each figure is the peer's own: its loss, and its estimate of log p(x) where it has one.
`make test-peers` makes the environment. Ten to twenty minutes on two cores.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import platform
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

import elbowroom as er
from benchmarks import results

PAGE = Path(__file__).parents[1] / "docs" / "adapters.md"
HEADING = "## Measured"
TRAIN, ROWS = 1437, 30  # digits that are trained on; the next ones are audited
CELLS, GENES, FACTORS, AUDITED = 2000, 100, 5, 40
REPEATS = 200  # evaluations of a peer's loss, each by one draw per datum
SAMPLES = 4000  # of a peer's estimate of log p(x)


@dataclass
class Case:
    """A trained model, as a pair, and what its own package says of the same rows, in nats per datum.

    Attributes:
        pair: model and guide.
        args: the rows.
        own_elbo: their mean ELBO by the peer's own loss.
        own_evidence: their mean log p(x) by the peer's own estimate; NaN where it has none.
        seconds: of training.
    """

    pair: Any
    args: tuple[Any, ...]
    own_elbo: float
    own_evidence: float
    seconds: float


@dataclass
class Row:
    """What is printed of a case, in nats per datum; gaps are medians."""

    name: str
    latents: int
    elbo: float
    own_elbo: float
    log_p: float
    own_evidence: float
    reference: str
    trusted: int
    data: int
    gap: float
    amortization: float
    approximation: float
    khat: float
    verdicts: list[str]
    training: float
    audit: float


def import_pyroved() -> Any:
    """Import pyroVED, with an empty module in the place of a missing torchvision while it is imported.

    pyroVED imports torchvision.utils.make_grid for its plots, and torchvision's wheel on PyPI does not load beside a CPU torch.
    Other packages (torchmetrics) ask whether torchvision is there, and must not find the empty one.
    """
    stand_ins: dict[str, ModuleType] = {}
    if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        package, utils = ModuleType("torchvision"), ModuleType("torchvision.utils")
        utils.make_grid = package.utils = utils  # type: ignore[attr-defined]
        stand_ins = {"torchvision": package, "torchvision.utils": utils}
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module("pyroved")
    finally:
        for name in stand_ins:
            del sys.modules[name]


def digits() -> Tensor:
    """Binary 8 x 8 digits, (1797, 8, 8)."""
    return torch.tensor(load_digits().images >= 8, dtype=torch.float32)


def counts() -> Any:
    """An AnnData of cells in two batches, drawn from a model that is known: five factors, log-linear, negative binomial."""
    import anndata

    rng = np.random.default_rng(0)
    batch = rng.integers(0, 2, CELLS)
    rate = rng.normal(size=(CELLS, FACTORS)) @ rng.normal(0, 0.5, (FACTORS, GENES)) + rng.normal(0, 0.3, (2, GENES))[batch]
    share = np.exp(rate + rng.normal(0, 1, GENES))
    mean = np.exp(rng.normal(math.log(500), 0.4, CELLS))[:, None] * share / share.sum(1, keepdims=True)
    made = anndata.AnnData(rng.poisson(rng.gamma(3.0, mean / 3.0)).astype(np.float32))
    made.obs["batch"] = batch.astype(str)
    return made


def scvi(epochs: int, **options: Any) -> Case:
    """SCVI, audited at cells that it was validated on."""
    import scvi as peer

    peer.settings.seed = 0
    table = counts()
    peer.model.SCVI.setup_anndata(table, batch_key="batch")
    model = peer.model.SCVI(table, n_latent=10, **options)
    start = time.perf_counter()
    model.train(max_epochs=epochs, accelerator="cpu", enable_progress_bar=False, logger=False, enable_checkpointing=False)
    seconds = time.perf_counter() - start
    pair = er.adapt.scvi(model)
    args = pair.rows(np.sort(model.validation_indices)[:AUDITED].tolist())
    with torch.no_grad():
        losses = [model.module(args[0])[2] for _ in range(REPEATS)]
        own = [(loss.reconstruction_loss["reconstruction_loss"] + sum(loss.kl_local.values())).mean() for loss in losses]
        evidence = model.module.marginal_ll(args[0], n_mc_samples=SAMPLES, n_mc_samples_per_pass=500)
    return Case(pair, args, -float(torch.stack(own).mean()), float(evidence.mean()), seconds)


def pythae(epochs: int) -> Case:
    """Pythae's VAE with its default networks."""
    from pythae.models import VAE, VAEConfig

    torch.manual_seed(0)
    x = digits().flatten(1)
    vae = VAE(VAEConfig(input_dim=(64,), latent_dim=6, reconstruction_loss="bce"))
    step = torch.optim.Adam(vae.parameters(), 1e-3)
    start = time.perf_counter()
    for _ in range(epochs):
        for rows in torch.randperm(TRAIN).split(128):
            step.zero_grad()
            vae({"data": x[rows]}).loss.backward()
            step.step()
    seconds = time.perf_counter() - start
    vae.eval()
    some = x[TRAIN : TRAIN + ROWS]
    with torch.no_grad():
        own = float(np.mean([vae({"data": some}).loss.item() for _ in range(REPEATS)]))
        evidence = vae.get_nll(some, n_samples=SAMPLES, batch_size=SAMPLES)  # log p(x), whatever its name
    return Case(er.adapt.pythae(vae), (some,), -own, float(evidence), seconds)


def pyroved(epochs: int, invariances: list[str] | None = None) -> Case:
    """PyroVED's iVAE."""
    import pyro

    peer = import_pyroved()

    vae = peer.models.iVAE((8, 8), 2, invariances, device="cpu")
    trainer, x = peer.trainers.SVItrainer(vae, device="cpu"), digits()
    loader = peer.utils.init_dataloader(x[:TRAIN], batch_size=128)
    start = time.perf_counter()
    for _ in range(epochs):
        trainer.step(loader)
    seconds = time.perf_counter() - start
    vae.eval()
    some = x[TRAIN : TRAIN + ROWS]
    with torch.no_grad():
        own = np.mean([pyro.infer.Trace_ELBO().loss(vae.model, vae.guide, some) / ROWS for _ in range(REPEATS)])
    return Case(er.adapt.pyroved(vae), (some,), -float(own), math.nan, seconds)


CASES: dict[str, Callable[[int], Case]] = {
    "scvi-tools SCVI, nb": lambda epochs: scvi(epochs, gene_likelihood="nb"),
    "scvi-tools SCVI, zinb, library size latent": lambda epochs: scvi(
        epochs, gene_likelihood="zinb", use_observed_lib_size=False
    ),
    "pythae VAE, bce": pythae,
    "pyroVED iVAE": pyroved,
    "pyroVED iVAE, rotations": lambda epochs: pyroved(epochs, ["r"]),
}


def measured(name: str, epochs: int, budget: str) -> Row:
    """Train, audit, and gather."""
    case = CASES[name](epochs)
    start = time.perf_counter()
    audit = er.audit(*case.pair, *case.args, budget=budget)
    seconds, table = time.perf_counter() - start, audit.table
    print(audit, flush=True)
    status = table["status"].values.astype(str)
    good = np.isin(status, ("exact", "certified"))
    best = int(good.sum(0).argmax())
    known = np.isfinite(table["log_evidence"].values)
    median = lambda column: float(np.nanmedian(table[column].values)) if known.any() else math.nan
    return Row(
        name,
        int(table.attrs["latent_dim"]),
        float(table["elbo"].mean()),
        case.own_elbo,
        float(table["log_evidence"].mean(skipna=False)),
        case.own_evidence,
        str(table["reference"].values[best]),
        int(good.any(1).sum()),
        len(status),
        median("gap_total"),
        median("gap_amortization"),
        median("gap_approximation"),
        float(np.nanmedian(table["pareto_k"].values)),
        [judgement.verdict for judgement in audit.verdicts],
        case.seconds,
        seconds,
    )


def line(row: Row) -> str:
    """One line of the table."""
    number = lambda value: "-" if math.isnan(value) else f"{value:.2f}"
    cells = [
        row.name,
        str(row.latents),
        f"{number(row.elbo)} ({number(row.own_elbo)})",
        f"{number(row.log_p)} ({number(row.own_evidence)})",
        f"{row.reference}, {row.trusted} of {row.data}",
        *(number(value) for value in (row.gap, row.amortization, row.approximation, row.khat)),
        ", ".join(row.verdicts),
    ]
    return f"| {' | '.join(cells)} |"


def section(rows: list[Row], epochs: int) -> str:
    """The section of the page."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("scvi-tools", "pythae", "pyroved", "torch"))
    head = (
        f"`python -m benchmarks.adapters`, {datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, 2 CPU cores (shared), "
        f"{versions}; {epochs} epochs, one seed; audits of {sum(row.audit for row in rows) / len(rows):.0f} s on average."
    )
    return "\n".join(
        [
            HEADING,
            "",
            head,
            "",
            "| model | latents | ELBO (its own) | log p(x) (its own) | reference, certified | gap | amortization | family "
            "| k-hat | verdict |",
            "|---|--:|---|---|---|--:|--:|--:|--:|---|",
            *map(line, rows),
        ]
    )


def main() -> None:
    """Measure, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--budget", default="5m", help="of each audit")
    parser.add_argument("--only", nargs="*", default=list(CASES), help="names of cases")
    parser.add_argument("--out", type=Path, default=Path("runs/adapters.json"), help="cases that are there are kept")
    parser.add_argument("--print", action="store_true", help="leave the page as it is")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the peers' own
    kept = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in options.only:
        if name not in kept:
            kept[name] = asdict(measured(name, options.epochs, options.budget))
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(kept, indent=1))
        print(line(Row(**kept[name])), flush=True)
    text = section([Row(**kept[name]) for name in CASES if name in kept], options.epochs)
    if not options.print:
        results.write(text, PAGE)
    print(text)


if __name__ == "__main__":
    main()
