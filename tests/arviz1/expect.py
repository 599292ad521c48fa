"""In the project's own environment (ArviZ 0.x): make a small run and write down what ArviZ says of its files.

python tests/arviz1/expect.py FOLDER
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import elbowroom as er

warnings.simplefilter("ignore")

import arviz as az  # noqa: E402 - it warns of its own future when it is imported

SETTINGS = ["fit.epochs=3", "fit.device=cpu", "audit.observations=12", "audit.draws=1000", "audit.keep=1000"]


def main(folder: Path) -> None:
    """Fit, audit, and write `expected.json`: file -> row of the summary -> column -> number."""
    spec = folder / "digits.yaml"
    spec.write_text((Path(__file__).parents[2] / "experiments" / "digits.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    run = er.fit(er.Experiment.load(spec, set=SETTINGS), out=folder / "run", overwrite=True)
    run.audit()
    expected = {}
    for path in sorted((folder / "run" / "posteriors").glob("*.nc")):
        found = az.from_netcdf(path).map(lambda group: group.astype("float64"), groups="posterior")
        table = az.summary(found, round_to="none", hdi_prob=0.94)
        expected[path.name] = table.to_dict("index")
    (folder / "expected.json").write_text(json.dumps({"arviz": az.__version__, "files": expected}), encoding="utf-8")
    print(f"ArviZ {az.__version__}: wrote {folder}/expected.json for {', '.join(expected)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
