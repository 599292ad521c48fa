"""The report: a self-contained `report.html` and its figures as PNG, made from the files of a run folder.

It needs neither torch nor Pyro nor the weights. A missing file is reported in a sentence; only `audit.nc` is required.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import xarray as xr
import yaml

from elbowroom.analysis import idata
from elbowroom.analysis.measures.population import random_rows, sampled
from elbowroom.analysis.plots import events as plots
from elbowroom.analysis.plots.drawing import attempt, drawn, tell
from elbowroom.analysis.plots.style import DPI, Absent, Plot, thumbnail, tone
from elbowroom.analysis.report import conclusions, key_figures
from elbowroom.analysis.report import diagnosis as judged
from elbowroom.analysis.verdict import judgement
from elbowroom.errors import RunFolderError, damaged
from elbowroom.inference.fit.record import Row
from elbowroom.system.archive import read_npz
from elbowroom.system.files import atomic, write_text
from elbowroom.system.paths import MAX_BYTES, limited_text
from elbowroom.system.stages import stage

TEMPLATES = Path(__file__).parent / "templates"
TEMPLATE = "report.html.j2"
FIGURES = "figures"


@dataclass(frozen=True)
class Files:
    """The contents of a run folder that a report uses; None where a file is missing.

    Attributes:
        name: of the run.
        audit: `audit.nc`; of its random sample only, where a budget cut the audit short, as are `posteriors`.
        whole: `audit.nc` with all data.
        everything: all of these data, as `observed`.
        spec: `spec.yaml`.
        split: sizes of train, validation and test, and their rows.
        history: `history.csv`.
        latent: `latent.nc`.
        posteriors: `posteriors/*.nc`.
        diagnosis: `diagnosis.nc`.
    """

    name: str
    audit: xr.Dataset
    spec: dict[str, Any] | None = None
    whole: xr.Dataset | None = None
    everything: np.ndarray | None = None
    split: dict[str, np.ndarray] | None = None
    history: pd.DataFrame | None = None
    latent: xr.DataTree | None = None
    posteriors: dict[str, xr.DataTree] = field(default_factory=dict)
    diagnosis: xr.DataTree | None = None

    @classmethod
    def read(cls, folder: str | Path) -> Files:
        """Read a run folder.

        Raises:
            RunFolderError: it has no audit, or one of its files is damaged.
        """
        folder = Path(folder)
        if not (folder / "audit.nc").is_file():
            raise RunFolderError(f"{folder}: no audit.nc here; run `elbowroom audit {folder}` first")
        audit = _read(folder / "audit.nc", idata.read_table)
        if not audit.sizes.get("obs_id"):
            raise RunFolderError(f"{folder / 'audit.nc'}: holds no data (dimension obs_id)")
        trees = {}
        for path in sorted((folder / "posteriors").glob("*.nc")):
            trees[path.stem] = _read(path, idata.read)
        everything = _observed(trees, audit.sizes["obs_id"])
        inside = random_rows(audit)  # all data, unless a budget let only a random sample be audited
        if not inside.all():
            trees = {name: _of_rows(tree, inside) for name, tree in trees.items()}
        return cls(
            name=str(audit.attrs.get("experiment") or folder.resolve().name),
            audit=sampled(audit),
            whole=audit,
            everything=everything,
            spec=_read(folder / "spec.yaml", _read_spec),
            split=_read(folder / "split.npz", _read_split),
            history=_read(folder / "history.csv", _read_history),
            latent=_read(folder / "latent.nc", idata.read),
            posteriors=trees,
            diagnosis=_read(folder / "diagnosis.nc", judgement.read),
        )

    @property
    def observed(self) -> np.ndarray | None:
        """The audited data, (N, *event), from the file that holds them; only for a single observed site."""
        return _observed(self.posteriors, self.audit.sizes["obs_id"])

    @property
    def held_out(self) -> bool:
        """Whether all audited data belong to the test split."""
        if self.split is None or "test" not in self.split:
            return False
        return bool(np.isin(self.audit["obs_id"].values, self.split["test"]).all())

    @property
    def entries(self) -> int | None:
        """Entries of one datum where the data are discrete, for bits per dimension; else None."""
        stored = str(self.audit.attrs.get("entries", ""))
        return int(stored) if stored.isdecimal() and int(stored) else None


def _observed(trees: Mapping[str, xr.DataTree], n: int) -> np.ndarray | None:
    """Return the n data of the first file that holds them, (N, *event); None where there are several observed sites."""
    for tree in trees.values():
        if "observed_data" in tree.children:
            sites = list(tree["observed_data"].data_vars.values())
            if len(sites) == 1 and "obs_id" in sites[0].dims:
                values = sites[0].transpose("obs_id", ...).values
                return values if len(values) == n else None
    return None


def _of_rows(tree: xr.DataTree, rows: np.ndarray) -> xr.DataTree:
    """Return the groups of a posterior for some of the data."""
    groups = {node.path: node.to_dataset(inherit=False) for node in tree.subtree}
    kept = {path: group.isel(obs_id=rows) if "obs_id" in group.dims else group for path, group in groups.items()}
    return xr.DataTree.from_dict(kept)


@stage("report")
def write_report(folder: str | Path) -> Path:
    """Write `figures/*.png` and `report.html` into a run folder that holds an audit, and return the report's path.

    Outdated figures of an earlier report are removed. Each file is written completely or not at all.

    Raises:
        RunFolderError: there is no audit, or a file is damaged.
    """
    folder = Path(folder)
    with stage("files"):
        files = Files.read(folder)
    with stage("figures drawn"), damaged(folder, "audit again"):
        figures = draw(files)
    with stage("figures written"):
        written = {name: _written(item, folder / FIGURES) for name, item in figures.items()}
    with damaged(folder, "audit again"):
        html = _page(files, written)
    path = folder / "report.html"
    write_text(path, html)
    tell(path, written.values())
    return path


def _page(files: Files, written: Mapping[str, dict[str, Any] | Absent]) -> str:
    """Return the HTML of the report, given its figures as `_written` returns them."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    may, may_not = conclusions.conclusions(files.audit)
    said = [line for line in str(files.audit.attrs.get("verdict", "")).splitlines() if line.strip()]
    verdict = [line for line in said if not line.startswith("Verdict: ")]  # verdicts are in the table
    split = None if files.split is None else {name: len(rows) for name, rows in files.split.items()}
    whole = files.audit if files.whole is None else files.whole
    rows = key_figures.worst_rows(whole)
    return environment.get_template(TEMPLATE).render(
        name=files.name,
        policy=policy((TEMPLATES / TEMPLATE).read_text(encoding="utf-8")),
        verdicts=judged.lines(files.audit, files.diagnosis),
        missing=judged.missing(files.diagnosis),
        verdict=verdict or ["The audit says nothing more."],
        facts=[
            *key_figures.of_all(whole),
            *key_figures.key_figures(files.audit, files.entries, held_out=files.held_out),
        ],
        n=files.audit.sizes["obs_id"],
        figures={name: {"absent": one.reason} if isinstance(one, Absent) else one for name, one in written.items()},
        worst=rows,
        thumbnails=_thumbnails(files, [row.obs_id for row in rows]),
        columns=key_figures.WORST_COLUMNS,
        may=may,
        may_not=may_not,
        declared=key_figures.declared(files.spec, split, files.audit),
        has_spec=files.spec is not None,
        version=str(files.audit.attrs.get("elbowroom", "")),
    )


def policy(template: str) -> str:
    """Return the Content-Security-Policy of the page: its own style, known by its hash, and pictures inside it."""
    style = template.partition("<style>")[2].partition("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode("ascii")
    return f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"


def write_picture(folder: str | Path, path: str | Path) -> Path:
    """Write a separate figure of guide and exact posterior for the best, a typical and the worst datum, sized for a README.

    Args:
        folder: the run folder; its model has one or two latents.
        path: the PNG to write.

    Raises:
        RunFolderError: the folder lacks the data of this figure; the message says why.
    """
    from elbowroom.analysis.plots.report.posterior import contours

    files = Files.read(folder)
    title = f"Three of {files.audit.sizes['obs_id']} data: the exact posterior p(z|x), and what the encoder says, q(z|x)"
    item = contours(files.latent, width=11.5, title=title)
    if isinstance(item, Absent):
        raise RunFolderError(f"{folder}: {item.reason}")
    with atomic(path) as temporary:
        item.write(temporary)
    return Path(path)


def draw(files: Files) -> dict[str, Plot | Absent]:
    """Draw every figure of the report: name -> figure, or the reason why there is none."""
    made = [
        drawn("contours", "posterior.contours", files.latent),
        drawn("gaps", "audit.gaps", files.audit, files.entries),
        drawn("trust", "audit.trust", files.audit),
        drawn("intervals", "forest.intervals", files.audit, files.posteriors, files.latent),
        drawn("comparison", "audit.comparison", files.audit),
        drawn("latent_space", "latent.latent_space", files.latent),
        drawn("plane", "latent.plane", files.latent),
        drawn("prior_samples", "model.prior_samples", files.latent, files.observed),
        drawn("reconstructions", "model.reconstructions", files.latent),
        drawn("training", "training.training", files.history),
        *judged.draw(files.audit, files.diagnosis, audited="test" if files.held_out else "audited"),
    ]
    return {item.name: item for item in made}


def _written(item: Plot | Absent, folder: Path) -> dict[str, Any] | Absent:
    """Write a figure as PNG and return its data for the page; remove the file of an absent figure."""
    path = folder / f"{item.name}.png"
    found = item if isinstance(item, Absent) else attempt(item.name, partial(_embed, item, path))
    if isinstance(found, Absent):
        path.unlink(missing_ok=True)
    return found


def _embed(item: Plot, path: Path) -> dict[str, Any]:
    with stage(item.name), atomic(path) as temporary:
        item.write(temporary)
    width, height = item.figure.get_size_inches() * (DPI / 2)
    return {
        "absent": None,
        "source": _data_uri(path.read_bytes()),
        "width": round(width),
        "height": round(height),
        "alt": item.alt,
        "caption": item.caption,
        "wide": item.wide,
    }


def _thumbnails(files: Files, obs_id: list[int]) -> dict[int, str]:
    """Return small images of the data, obs_id -> data URI; empty where the data are not images, or cannot be drawn."""
    observed = files.observed if files.everything is None else files.everything
    image, whole = plots.event_image(files.latent), files.audit if files.whole is None else files.whole
    if image is None or observed is None:
        return {}
    limits, everything = tone(observed), whole["obs_id"].values
    place = {int(label): n for n, label in enumerate(everything)}
    draw_all = lambda: {i: _data_uri(thumbnail(observed[place[i]].reshape(image), limits)) for i in obs_id}
    drawn = attempt("thumbnails", draw_all)
    return {} if isinstance(drawn, Absent) else drawn


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _read(path: Path, reader: Any) -> Any:
    """Read a file, None where there is none; an error names the file."""
    if not path.is_file():
        return None
    try:
        return reader(path)
    except RunFolderError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise RunFolderError(f"{path}: damaged ({reason}); make it anew, or remove it") from error


def _read_spec(path: Path) -> dict[str, Any]:
    text = limited_text(path, MAX_BYTES)
    if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, Loader=yaml.SafeLoader)):
        raise ValueError("aliases are not allowed")
    tree = yaml.safe_load(text)
    if not isinstance(tree, dict):
        raise ValueError("not a mapping")
    return tree


def _read_history(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path)
    for name in (column.name for column in fields(Row)):
        if name not in table:
            raise ValueError(f"there is no column {name}")
        table[name] = pd.to_numeric(table[name])
    return table


def _read_split(path: Path) -> dict[str, np.ndarray]:
    return read_npz(path)
