"""Files in exactly the format of a run folder, of a linear-Gaussian model in plain numpy, and a reader of the page."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr
import yaml

FIGURES = {
    "contours",
    "parts",
    "gaps",
    "trust",
    "intervals",
    "comparison",
    "latent_space",
    "plane",
    "prior_samples",
    "reconstructions",
    "training",
}
OF_LATENT = {"contours", "latent_space", "plane", "prior_samples", "reconstructions"}
INJECTION = "<script>alert(1)</script>"


def gaussian_kl(a, S, m, C):
    """KL(N(a, diag S) || N(m, C)) for a, m (N, d), S (d,), C (d, d)."""
    inverse = np.linalg.inv(C)
    trace = np.trace(inverse * S)
    log_dets = np.linalg.slogdet(C)[1] - np.log(S).sum()
    return 0.5 * (trace - len(S) + log_dets + np.einsum("ni,ij,nj->n", a - m, inverse, a - m))


def write_run(
    folder: Path, *, d=2, n=40, event=(8, 8), labels=True, known=None, references=True, name="toy", likelihood="gaussian"
):
    """Write a run folder whose numbers are all exact: x = W z + 0.5 e, guide = diagonal normal beside the posterior.

    known: how many data have a known log p(x); the others have a bound.
    """
    rng = np.random.default_rng(0)
    width, known = int(np.prod(event)), n if known is None else known
    W = rng.normal(size=(width, d)) / np.sqrt(width) * np.array([2.0, 1.0, 0.5, 0.3, 0.1])[:d]
    z = rng.normal(size=(n, d))
    x = z @ W.T + 0.5 * rng.normal(size=(n, width))
    C = np.linalg.inv(np.eye(d) + W.T @ W / 0.25)
    m = x @ W @ C / 0.25
    a, S = m + 0.4 * rng.normal(size=(n, d)) * rng.exponential(size=(n, 1)), 0.8 * np.diag(C)
    cov_x = W @ W.T + 0.25 * np.eye(width)
    log_p = -0.5 * (
        width * np.log(2 * np.pi) + np.linalg.slogdet(cov_x)[1] + np.einsum("ni,ij,nj->n", x, np.linalg.inv(cov_x), x)
    )
    gap = gaussian_kl(a, S, m, C)
    elbo = log_p - gap
    gap[0], elbo[0] = -0.004, log_p[0] + 0.004  # an ELBO that its own noise lifts above log p(x)
    method = np.array(["grid"] * known + ["importance-weighted lower bound"] * (n - known))
    unknown = np.arange(n) >= known
    value, upper, se = np.where(unknown, np.nan, log_p), np.where(unknown, np.nan, log_p), np.where(unknown, np.nan, 1e-6)
    obs_id = 100 + 3 * np.arange(n)
    one, two = "obs_id", ("obs_id", "reference")
    names = ["grid"] if references else []
    status = np.where(unknown, "uncertified", "exact")[:, None][:, : len(names)]
    per_reference = {
        "mean_error": (np.abs(a - m) / np.sqrt(np.diag(C))).max(1),
        "sd_ratio": np.full(n, np.sqrt(0.8)),
        "sliced_wasserstein": 0.1 + gap,
        "noise_floor": np.full(n, 0.05),
        "border_mass": np.zeros(n),
        "refinement_error": np.full(n, 1e-6),
    }
    folder.mkdir(parents=True, exist_ok=True)
    audit = xr.Dataset(
        {
            "elbo": (one, elbo),
            "elbo_se": (one, np.full(n, 0.01)),
            "log_evidence": (one, value),
            "log_evidence_se": (one, se),
            "log_evidence_lower": (one, log_p - 0.01),
            "log_evidence_upper": (one, upper),
            "gap_total": (one, value - elbo),
            "gap_total_lower": (one, np.where(unknown, log_p - 0.01, log_p) - elbo - 0.02),
            "gap_total_upper": (one, upper - elbo + 0.02),
            "pareto_k": (one, np.linspace(-0.2, 1.0, n)),
            "ess_fraction": (one, np.full(n, 0.6)),
            "rate": (one, np.full(n, 2.0)),
            "distortion": (one, -elbo - 2.0),
            "evidence_method": (one, method),
            **{key: (two, values[:, None][:, : len(names)]) for key, values in per_reference.items()},
            "status": (two, status),
            "reason": (two, np.full(status.shape, "grid: <b>fine</b>")),
        },
        coords={"obs_id": obs_id, "reference": np.array(names, dtype=str)},
        attrs={"verdict": "First sentence.\nSecond & last sentence.", "seed": "0", "plate": "data", "experiment": name}
        | ({"entries": str(math.prod(event))} if likelihood == "bernoulli" else {}),
    )
    audit.to_netcdf(folder / "audit.nc", engine="h5netcdf")
    x_dims = tuple(f"x_dim_{i}" for i in range(len(event)))
    (folder / "posteriors").mkdir(exist_ok=True)
    exact = m + rng.multivariate_normal(np.zeros(d), C, size=(4, 50, n))
    guide = a + np.sqrt(S) * rng.normal(size=(4, 50, n, d))
    for key, draws in {"guide": guide, **({"grid": exact} if references else {})}.items():
        xr.DataTree.from_dict(
            {
                "posterior": xr.Dataset(
                    {"z": (("chain", "draw", "obs_id", "latent"), draws)},
                    coords={"chain": range(4), "draw": range(50), "obs_id": obs_id, "latent": range(d)},
                ),
                "observed_data": xr.Dataset({"x": (("obs_id", *x_dims), x.reshape(n, *event))}, coords={"obs_id": obs_id}),
            }
        ).to_netcdf(folder / "posteriors" / f"{key}.nc", engine="h5netcdf")
    write_latent(folder, W, m, C, a, S, x, gap, obs_id, event, rng.integers(0, 3, n) if labels else None, rng)
    tree = {
        "schema": 1,
        "data": {"name": "toy", "scale": None},
        "model": {
            "latent_dim": d,
            "likelihood": {"name": likelihood, "scale": 0.5},
            "decoder": {"name": INJECTION, "hidden": [3, 4]},
        },
        "guide": {"family": {"name": "diagonal_normal"}},
        "fit": {"epochs": 20},
        "seed": 7,
        "record": {"elbowroom": "0.1.0", "versions": {"torch": "2.13.0"}, "event_shape": list(event)},
    }
    (folder / "spec.yaml").write_text(yaml.safe_dump(tree))
    np.savez(folder / "split.npz", train=np.arange(50), validation=np.arange(50, 60), test=100 + np.arange(3 * n))
    epoch = np.arange(1, 21)
    curve = -50 - 100.0 / epoch
    pd.DataFrame(
        {
            "epoch": epoch,
            "step": 4 * epoch,
            "learning_rate": 1e-3,
            "kl_weight": np.minimum(1, epoch / 5),
            "train_loss": -curve,
            "train_elbo": curve,
            "validation_elbo": curve - 0.5 - np.where(epoch > 15, epoch - 15.0, 0),
            "seconds": 0.1 * epoch,
        }
    ).to_csv(folder / "history.csv", index=False)
    return folder


def write_latent(folder, W, m, C, a, S, x, gap, obs_id, event, label, rng):
    d, n = W.shape[1], len(x)
    dims = tuple(f"x_dim_{i}" for i in range(len(event)))
    encoding = xr.Dataset(
        {
            "loc": (("obs_id", "latent"), a),
            "scale": (("obs_id", "latent"), np.broadcast_to(np.sqrt(S), a.shape)),
            "rate": ("latent", 0.5 * (a**2 + S - 1 - np.log(S)).mean(0)),
        },
        coords={"obs_id": obs_id, "latent": range(d)},
    )
    if label is not None:
        encoding["label"] = ("obs_id", label)
    side = np.linspace(-2, 2, 5)
    if d == 1:
        plane = xr.Dataset(
            {"expected_x": (("column", *dims), (side[:, None] @ W.T).reshape(5, *event))}, coords={"z_column": ("column", side)}
        )
        plane.attrs["latents"] = [0]
    else:
        zz = np.zeros((5, 5, d))
        zz[..., 0], zz[..., 1] = side[None], side[:, None]
        plane = xr.Dataset(
            {"expected_x": (("row", "column", *dims), (zz @ W.T).reshape(5, 5, *event))},
            coords={"z_row": ("row", side), "z_column": ("column", side)},
            attrs={"latents": [0, 1]},
        )
    z = rng.normal(size=(20, d))
    mean = (z @ W.T).reshape(20, *event)
    prior = xr.Dataset(
        {"z": (("sample", "latent"), z), "expected_x": (("sample", *dims), mean), "x": (("sample", *dims), mean)}
    )
    show = np.argsort(gap)[np.linspace(0, n - 1, min(6, n)).round().astype(int)]
    reconstruction = xr.Dataset(
        {
            "x": (("obs_id", *dims), x[show].reshape(-1, *event)),
            "expected_x": (("obs_id", *dims), (a[show] @ W.T).reshape(-1, *event)),
            "gap": ("obs_id", gap[show]),
        },
        coords={"obs_id": obs_id[show]},
    )
    groups = {"encoding": encoding, "plane": plane, "prior": prior, "reconstruction": reconstruction}
    if d <= 2:
        groups["density"] = density(m, C, a, S, gap, obs_id)
    tree = xr.DataTree.from_dict(groups)
    tree.attrs.update({"latent_dim": d, "event_shape": list(event)})
    tree.to_netcdf(folder / "latent.nc", engine="h5netcdf")


def density(m, C, a, S, gap, obs_id):
    order = np.argsort(gap)
    cases = order[[0, len(gap) // 2, -1]]
    d = m.shape[1]
    axis = np.linspace(-6, 6, 121)
    z_axes = m[cases][:, None] + axis[:, None] * np.sqrt(np.diag(C)).max()  # (case, point, latent)
    parts = {"log_posterior": [], "log_guide": []}
    for c, n in enumerate(cases):
        if d == 1:
            z = z_axes[c]
        else:
            grid = np.meshgrid(z_axes[c, :, 0], z_axes[c, :, 1], indexing="xy")
            z = np.stack(grid, -1)
        for key, mean, cov in (("log_posterior", m[n], C), ("log_guide", a[n], np.diag(S))):
            r = z - mean
            quadratic = np.einsum("...i,ij,...j->...", r, np.linalg.inv(cov), r)
            parts[key].append(-0.5 * (quadratic + d * np.log(2 * np.pi) + np.linalg.slogdet(cov)[1]))
    dims = ("case", "column") if d == 1 else ("case", "row", "column")
    out = {key: (dims, np.stack(values)) for key, values in parts.items()}
    out |= {"gap": ("case", gap[cases]), "obs_id": ("case", obs_id[cases]), "z_column": (("case", "column"), z_axes[..., 0])}
    if d == 2:
        out["z_row"] = (("case", "row"), z_axes[..., 1])
    return xr.Dataset(out, coords={"case": np.array(["best", "typical", "worst"], dtype=object)})


class Page(HTMLParser):
    """Reads a page: its text, its images, its links, and whether its tags match."""

    VOID = {"meta", "img", "br", "link", "hr", "input"}

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.links, self.words, self.tags = [], [], [], [], set()
        self.feed(text)
        self.close()
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        self.links += [value for key, value in attrs if key in ("href", "src")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


def sequences(features: int, d: int = 2) -> tuple[xr.DataTree, np.ndarray]:
    """Return the description of a model of sequences of 6 steps, whose entries tell step and feature, and 8 data, padded."""
    step, z = 10.0 * np.arange(6)[:, None] + np.arange(features), np.linspace(-2.0, 2.0, 5)
    x = np.stack([step + n for n in range(8)])
    x[:, 4:] = np.nan
    expected = np.nan_to_num(x)
    plane = {1: step + z[:, None, None], 2: step + z[:, None, None, None] + 100 * z[:, None, None]}[d]
    dims = ("row", "column")[-d:]
    groups = {
        "prior": xr.Dataset({"x": (("s", "t", "f"), expected), "expected_x": (("s", "t", "f"), expected)}),
        "reconstruction": xr.Dataset(
            {"x": (("obs_id", "t", "f"), x), "expected_x": (("obs_id", "t", "f"), expected), "gap": ("obs_id", np.arange(8.0))},
            coords={"obs_id": np.arange(8)},
        ),
        "plane": xr.Dataset(
            {"expected_x": ((*dims, "t", "f"), plane), **{f"z_{dim}": (dim, z) for dim in dims}}, attrs={"latents": [0, 1][:d]}
        ),
    }
    tree = xr.DataTree.from_dict(groups)
    tree.attrs.update({"latent_dim": d, "event_shape": [6, features], "sequence": 1})
    return tree, x
