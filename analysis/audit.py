r"""The audit: how far is q(z|x) from p(z|x), for this model and for each datum?

    log p(x) = ELBO + KL(q(z|x) || p(z|x)),   gap = log p(x) - ELBO

`audit(model, guide, *args)` works for any Pyro pair; `audit_log_joint` is the same on a seam that is already built.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import xarray as xr
from annotated_types import Ge

from elbowroom.analysis import idata
from elbowroom.analysis.distances import compare
from elbowroom.analysis.evidence import climb
from elbowroom.analysis.planning import choose
from elbowroom.analysis.tabulate import tabulate
from elbowroom.analysis.verdict import sentences, summary
from elbowroom.errors import RunFolderError
from elbowroom.files import atomic
from elbowroom.inference import discrete
from elbowroom.inference.importance import amortized
from elbowroom.inference.posterior import CHAINS, Posterior, Reference, concatenate
from elbowroom.inference.target import LogJoint

log = logging.getLogger("elbowroom")

BLOCK = 2**22  # draws x data held at once
SEED_STEP = 7919  # between the guide and each reference
DISCRETE_STEP = 15_485_863  # between draws of the continuous sites and of the discrete ones
BLOCK_STEP = 104_729  # between blocks of data: shared noise would hide in the error of means


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        table: one row per datum (`obs_id`), and per datum and reference; every variable has units and a long name.
        posteriors: method -> ArviZ DataTree.
    """

    table: xr.Dataset
    posteriors: dict[str, xr.DataTree]

    @property
    def verdict(self) -> str:
        """Two or three plain sentences, one per line."""
        return str(self.table.attrs["verdict"])

    def lines(self) -> list[tuple[str, str]]:
        """Return the rows (quantity, value) of the short table."""
        return summary(self.table)

    def save(self, folder: str | Path) -> None:
        """Write posteriors/<method>.nc, audit.csv and, last, audit.nc into a folder, each whole or not at all.

        An audit.nc that is there is removed first: where one is, all that lies beside it belongs to it.
        """
        folder = Path(folder)
        (folder / "audit.nc").unlink(missing_ok=True)
        for method, tree in self.posteriors.items():
            idata.write(tree, folder / "posteriors" / f"{method}.nc")
        with atomic(folder / "audit.csv") as temporary:
            self.to_csv(temporary)
        idata.write(self.table, folder / "audit.nc")

    def to_csv(self, path: str | Path) -> None:
        """Write one line per datum; what is per reference gets a column each, such as `mean_error[grid]`."""
        flat = self.table.drop_dims("reference").to_dataframe()
        per_datum = list(flat.columns)
        for reference in self.table["reference"].values:
            part = self.table.sel(reference=reference, drop=True).drop_vars(per_datum).to_dataframe()
            flat = flat.join(part.add_suffix(f"[{reference}]"))
        flat.to_csv(path)

    @classmethod
    def load(cls, folder: str | Path) -> Audit:
        """Read an audit that `save` wrote.

        Raises:
            RunFolderError: when the folder holds none.
        """
        folder = Path(folder)
        if not (folder / "audit.nc").is_file():
            raise RunFolderError(f"{folder}: no audit.nc here; run `elbowroom audit {folder}` first")
        table = idata.read_table(folder / "audit.nc")
        trees = {path.stem: idata.read(path) for path in sorted((folder / "posteriors").glob("*.nc"))}
        return cls(table, trees)

    def __repr__(self) -> str:
        rows = "\n".join(f"  {name:<34}{value}" for name, value in self.lines())
        return f"Audit of {self.table.sizes['obs_id']} data\n{rows}\n{self.verdict}"


def audit(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    plate: str | None = None,
    references: Literal["auto"] | Sequence[str | Reference] = "auto",
    seed: int = 0,
    **kwargs: Any,
) -> Audit:
    """Audit the guide of any Pyro (model, guide) pair against references.

    Args:
        model: Pyro program p(x, z), with a data plate.
        guide: Pyro program q(z|x), with the same plate.
        *args: arguments of both programs.
        plate: name of the data plate, where several could be meant.
        references: `auto` (closed form, else enumeration where all latents are discrete, else a grid for d <= 3), or names
            (`closed_form`, `enumeration`, `grid`) or Reference objects.
        seed: random seed.
        **kwargs: keyword arguments of both programs.

    Returns:
        The audit; print it, or see `.table`, `.posteriors`, `.verdict`.

    Raises:
        UnsupportedProgram: when per-datum inference does not apply to the pair; it names the site or plate and the reason.
        UserError: when a reference that was asked for cannot be used on this model.
    """
    log_joint = LogJoint(model, guide, *args, plate=plate, **kwargs)
    return audit_log_joint(log_joint, references=references, seed=seed)


def audit_log_joint(
    log_joint: LogJoint,
    *,
    references: Literal["auto"] | Sequence[str | Reference] = "auto",
    draws: Annotated[int, Ge(100)] = 10_000,
    keep: Annotated[int, Ge(100)] = 1_000,
    seed: int = 0,
    obs_id: Sequence[int] | None = None,
    attrs: Mapping[str, str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Audit:
    """Audit a guide through the seam.

    Args:
        log_joint: the model and guide.
        references: as in `audit`.
        draws: guide draws per datum for ELBO, k-hat and importance sampling.
        keep: draws per datum and method kept in the files.
        seed: random seed.
        obs_id: labels of the data; default 0 .. N-1.
        attrs: further attributes of the files, such as the spec's hash.
        progress: called with a short sentence before each piece of work.

    Raises:
        UserError: when a reference that was asked for cannot be used on this model.
    """
    keep = min(keep, draws) // CHAINS * CHAINS
    chosen = choose(references, log_joint)
    say = progress or (lambda sentence: None)
    guides: list[Posterior] = []
    found: list[list[Posterior]] = [[] for _ in chosen]
    for block, (part, label) in enumerate(_blocks(log_joint, draws)):
        say(f"guide{label}")
        start = seed + BLOCK_STEP * block
        drawn = amortized(part, draws=draws, keep=keep, seed=start)
        guides.append(discrete.completed(part, drawn, start + DISCRETE_STEP, which="guide"))
        for k, (method, results) in enumerate(zip(chosen, found, strict=True), start=1):
            say(f"{method.name}{label}")
            # a seed of its own: draws that shared the guide's random numbers would lie closer to it than chance
            drawn = method(part, keep=keep, seed=start + SEED_STEP * k)
            results.append(discrete.completed(part, drawn, start + SEED_STEP * k + DISCRETE_STEP))
    guide, posteriors = concatenate(guides), [concatenate(results) for results in found]
    labels = np.arange(log_joint.n_obs) if obs_id is None else np.asarray(obs_id)
    comparisons = [compare(guide, posterior, seed=seed) for posterior in posteriors]
    facts = {"seed": str(seed), "plate": log_joint.plate, "latent_dim": str(log_joint.dim), "draws": str(draws)}
    if log_joint.notes:
        facts["notes"] = "\n".join(log_joint.notes)
    facts |= dict(attrs or {})
    table = tabulate(guide, posteriors, comparisons, climb(guide, posteriors), labels, facts)
    table.attrs["verdict"] = "\n".join(sentences(table))
    observed = {name: value.cpu().numpy() for name, value in log_joint.program.observed.items()}
    joint = {name: value.cpu().numpy() for name, value in discrete.values(log_joint).items()}
    trees = {
        posterior.method: idata.to_datatree(
            posterior, obs_id=labels.tolist(), observed=observed, assignments=joint, attrs=facts
        )
        for posterior in (guide, *posteriors)
    }
    return Audit(table, trees)


def _blocks(log_joint: LogJoint, draws: int) -> list[tuple[LogJoint, str]]:
    """Split the data so that draws x data stay within memory; one block where the arguments cannot be taken apart."""
    size = max(1, BLOCK // draws)
    n = log_joint.n_obs
    if n <= size:
        return [(log_joint, "")]
    blocks = []
    for rows in torch.arange(n, device=log_joint.device).split(size):
        part = log_joint.subset(rows)
        if part is None:
            return [(log_joint, "")]
        blocks.append((part, f" for data {int(rows[0])}..{int(rows[-1])} of {n}"))
    return blocks
