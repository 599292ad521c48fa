"""Questions about rows in a CSV file, in whatever way it is written: the same rows, columns and holes as the frame itself."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import elbowroom as er

N = 12
SPEC = {
    "model": {"latent_dim": 1, "likelihood": "mixed", "decoder": {"name": "mlp", "hidden": [8]}},
    "guide": {"encoder": {"name": "mlp", "hidden": [8]}},
    "fit": {"epochs": 2},
}
HOW = {"references": "none"}


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    rng = np.random.default_rng(3)
    frame = pd.DataFrame({"a": rng.normal(size=N), "b": rng.normal(size=N), "city": rng.choice(["rome", "st. john's"], N)})
    frame = frame.round(6)
    frame.iloc[4] = np.nan  # a line of empty cells
    frame.loc[7, "a"] = frame.loc[9, "city"] = np.nan
    return frame


@pytest.fixture(scope="module")
def run(rows: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> er.Run:
    many = pd.concat([rows.dropna()] * 30, ignore_index=True)
    return er.fit(er.Experiment.from_dict(SPEC, data=many), tmp_path_factory.mktemp("other") / "run")


def bare(frame: pd.DataFrame, **how: object) -> str:
    return str(frame.to_csv(index=False, **how))


WRITTEN = {
    "plain": bare,
    "index": lambda frame: frame.to_csv(),
    "index of text": lambda frame: frame.set_axis([f"r{i}" for i in range(len(frame))]).to_csv(),
    "quotes": lambda frame: bare(frame, quoting=csv.QUOTE_ALL),
    "semicolons": lambda frame: bare(frame, sep=";"),
    "tabs": lambda frame: bare(frame, sep="\t"),
    "NA": lambda frame: bare(frame, na_rep="NA"),
    "blank lines": lambda frame: bare(frame).replace("\n", "\n\n  \n", 3),
    "other order": lambda frame: bare(frame[["city", "b", "a"]]),
    "more columns": lambda frame: bare(frame.assign(note="x, y")),
    "carriage returns": lambda frame: bare(frame, lineterminator="\r\n"),
    "mark": lambda frame: "\ufeff" + bare(frame),
    "sep line": lambda frame: "sep=;\n" + bare(frame, sep=";"),
}


@pytest.mark.parametrize("how", WRITTEN)
def test_answers_are_those_about_the_frame(how: str, run: er.Run, rows: pd.DataFrame, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(WRITTEN[how](rows).encode())
    same = np.testing.assert_array_equal
    by_file, by_frame = run.encode(path, **HOW), run.encode(rows, **HOW)
    same(by_file.dataset["obs_id"], np.arange(N))
    same(by_file.dataset["mean"], by_frame.dataset["mean"])
    same(run.score(path, **HOW).dataset["log_evidence"], run.score(rows, **HOW).dataset["log_evidence"])
    filled, expected = run.impute(path, **HOW).completed(), run.impute(rows, **HOW).completed()
    assert len(filled) == N
    holes = rows.isna()
    for name in rows:
        text = filled[name].where(~holes[name]).dropna()
        same([str(v) for v in rows[name].dropna()] if name == "city" else rows[name].dropna(), text.astype(rows[name].dtype))
        values = filled[name][holes[name]].astype(rows[name].dtype)
        if name == "city":
            same(values, expected[name][holes[name]])
        else:
            np.testing.assert_allclose(values, expected[name][holes[name]], rtol=1e-5)
