"""In an environment with ArviZ 1.x and without torch: open the files of a run, summarise them, plot them, compare.

python tests/arviz1/check.py FOLDER
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import arviz as az
import numpy as np
import xarray as xr

SAME = ("mean", "sd", "hdi_3%", "hdi_97%", "ess_bulk", "ess_tail", "r_hat", "mcse_mean", "mcse_sd")
RENAMED = {"hdi94_lb": "hdi_3%", "hdi94_ub": "hdi_97%"}
TAIL = (0.05, 0.95)  # the quantiles behind ess_tail in ArviZ 0.x; the summary of 1.x takes others
TOLERANCE = 1e-6


def main(folder: Path) -> None:
    """Check every posterior file and the audit's table; an AssertionError says what differs."""
    assert int(az.__version__.split(".")[0]) >= 1, f"this is ArviZ {az.__version__}, not 1.x"
    assert importlib.util.find_spec("torch") is None, "torch is here: these files must open without it"
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    for name, rows in expected["files"].items():
        tree = az.from_netcdf(folder / "run" / "posteriors" / name)
        tree["posterior"] = xr.DataTree(tree["posterior"].dataset.astype("float64"))  # sums in single precision differ by order
        assert "posterior" in tree.children, name
        table = az.summary(tree, round_to="none", ci_kind="hdi", ci_prob=0.94).rename(columns=RENAMED)
        tail = az.ess(tree, method="tail", prob=TAIL)
        tail = tail["posterior"] if "posterior" in tree.children and hasattr(tail, "children") and tail.children else tail
        table["ess_tail"] = np.concatenate([tail[variable].values.ravel() for variable in tree.posterior.data_vars])
        assert list(table.index) == list(rows), f"{name}: other rows than in ArviZ {expected['arviz']}"
        assert set(SAME) <= set(table), f"{name}: columns {list(table)}"
        worst = 0.0
        for row, numbers in rows.items():
            for column in SAME:
                ours, theirs = float(table.loc[row, column]), numbers[column]
                difference = 0.0 if np.isnan(ours) and np.isnan(theirs) else abs(ours - theirs) / max(1.0, abs(theirs))
                assert difference <= TOLERANCE, f"{name}: {column} of {row} is {ours}, ArviZ {expected['arviz']} says {theirs}"
                worst = max(worst, difference)
        one = tree.posterior["obs_id"].values[:1]
        plot = az.plot_dist(tree, var_names=["z"], coords={"obs_id": one})
        picture = folder / f"{name}.png"
        plot.savefig(picture)
        assert picture.stat().st_size > 5000, f"{name}: the plot is empty"
        print(f"{name}: {len(rows)} rows x {', '.join(SAME)}, largest relative difference {worst:.1g}; plot {picture.name}")
    with xr.open_dataset(folder / "run" / "audit.nc", engine="h5netcdf") as audit:
        assert {"gap_total", "log_evidence"} <= set(audit.data_vars)
        assert audit.attrs["verdict"]
    print(f"ArviZ {az.__version__} agrees with {expected['arviz']}, files in, no torch")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
