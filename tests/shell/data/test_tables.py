"""Tables: columns chosen by name, text as codes, covariates and exposures, kinds of columns, and other rows read alike."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pydantic import TypeAdapter

from elbowroom.components import registry
from elbowroom.components.slots import build
from elbowroom.data.columns import Layout, describe_columns
from elbowroom.data.dataset import Dataset
from elbowroom.data.file import read_like
from elbowroom.data.frames import Memory, from_python
from elbowroom.errors import UserError
from elbowroom.models.columns import Column
from elbowroom.spec.experiment import Experiment
from elbowroom.spec.spec import Roles

TABLE = (
    "a,b,city,batch,dose,depth,who\n1,0.5,rome,10,0.1,100,ann\n2,,oslo,9,0.2,200,bob\n"
    ",2.5,rome,10,0.3,300,\n4,3.5,,9,0.4,50,ann\n"
)
ROLES = {"covariates": ["dose", "batch"], "exposure": "depth", "labels": "who", "kinds": {"batch": "categorical"}}


def load(folder: Path, text: str = TABLE, **options: object) -> Dataset:
    (folder / "x.csv").write_text(text)
    chosen = registry.options_model("data", "file").model_validate({"name": "file", "path": "x.csv", **options})
    return build("data", chosen, folder=folder, where="data").load()


def problem(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_columns_by_name(tmp_path: Path) -> None:
    dataset = load(tmp_path, **ROLES)
    assert dataset.columns == ("a", "b", "city")
    nan = np.nan
    np.testing.assert_array_equal(dataset.x, [[1, 0.5, 1], [2, nan, 0], [nan, 2.5, 1], [4, 3.5, nan]])
    assert dataset.categories == {"city": ("oslo", "rome")}
    assert dataset.covariate_names == ("dose", "batch=9", "batch=10")
    np.testing.assert_array_equal(dataset.covariates, [[0.1, 0, 1], [0.2, 1, 0], [0.3, 0, 1], [0.4, 1, 0]])
    np.testing.assert_array_equal(dataset.exposure, [100, 200, 300, 50])
    assert dataset.labels.tolist() == ["ann", "bob", "missing", "ann"]
    assert dataset.described == (Column("a", "count"), Column("b", "positive"), Column("city", "categorical", 2))
    assert (dataset.missing, dataset.levels) == (True, None)
    chosen = load(tmp_path, x=["b", "a"], labels="dose")
    assert chosen.columns == ("b", "a")
    assert chosen.covariates is None
    assert chosen.labels.tolist() == ["0.1", "0.2", "0.3", "0.4"]


def test_a_frame_has_the_same_roles(tmp_path: Path) -> None:
    wanted = load(tmp_path, **ROLES)
    frame = pd.read_csv(tmp_path / "x.csv")
    dataset = Memory(**ROLES).hand_over(frame)
    np.testing.assert_array_equal(dataset.x, wanted.x)
    np.testing.assert_array_equal(dataset.covariates, wanted.covariates)
    np.testing.assert_array_equal(dataset.labels, wanted.labels)
    assert dataset.described == wanted.described
    assert dataset.fingerprint() == wanted.fingerprint()
    ordered = pd.Categorical(["mid", "low", "high", None], categories=["low", "mid", "high"], ordered=True)
    dataset = from_python(pd.DataFrame({"size": ordered, "group": pd.Categorical([10, 9, 10, 9])}))
    np.testing.assert_array_equal(dataset.x, [[1, 1], [0, 0], [2, 1], [np.nan, 0]])
    assert dataset.described == (Column("size", "ordinal", 3), Column("group", "categorical", 2))


WRONG = {
    "data: x: column 'a' is named twice": {"x": ["a", "a"]},
    "data: x: column 'a' is named by covariates too; give it one role": {"x": ["a"], "covariates": ["a"]},
    "x.csv: data.x: there is no column 'citi'; did you mean 'city'?": {"x": ["a", "citi"]},
    "x.csv: data.exposure: there is no column 'dpth'; did you mean 'depth'?": {"exposure": "dpth"},
    "x.csv: data.kinds: there is no column 'zz'; allowed: a, b, batch, city, depth, dose, who": {"kinds": {"zz": "count"}},
    "x.csv: covariate 'b' is missing at row 1; fill it in or remove the row": {"covariates": ["b"]},
    "x.csv: covariate 'city' is missing at row 3; fill it in or remove the row": {"covariates": ["city"]},
    "x.csv: an exposure must be above 0, it is missing at row 2, column 'a'; fill it in or remove the row": {"exposure": "a"},
    "x.csv: exposure 'city' holds text, such as 'oslo'; give it numbers above 0": {"exposure": "city"},
    "x.csv: column 'b' is declared count, found 0.5 at row 0; correct it, or declare another kind in data.kinds": {
        "kinds": {"b": "count"}
    },
    "x.csv: column 'a' is declared proportion, found 1 at row 0; correct it, or declare another kind in data.kinds": {
        "kinds": {"a": "proportion"}
    },
    "x.csv: data.kinds: column 'city' is declared real and holds text, such as 'oslo'; declare it categorical or ordinal": {
        "kinds": {"city": "real"}
    },
    "x.csv: data.x: no column is left for x; name some": {
        "covariates": ["a", "b", "city", "batch", "dose"],
        "exposure": "depth",
        "labels": "who",
    },
}


@pytest.mark.parametrize("wanted", WRONG)
def test_columns_that_cannot_be_what_they_should(wanted: str, tmp_path: Path) -> None:
    assert problem(load, tmp_path, **WRONG[wanted]) == wanted


def test_text_that_never_repeats_is_no_category(tmp_path: Path) -> None:
    text = "n,a\n" + "".join(f"name{i},{i}\n" for i in range(200))
    assert problem(load, tmp_path, text) == (
        "x.csv: column 'n' holds 200 different values in 200 rows; leave it out: name the columns to use in data.x"
    )
    assert load(tmp_path, text, labels="n").labels[7] == "name7"
    with pytest.raises(UserError, match="leave it out of data.covariates"):
        load(tmp_path, text, covariates=["n"])


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        (["2024-01-05", "2024-02-06", "soon"], "holds dates as text, such as '2024-01-05'; convert them to numbers"),
        (["05/01/2024", "06.02.24"], "holds dates as text"),
        (["2024-01-05 10:00:00", "2024-01-05T10:00Z", ""], "holds dates as text"),
        (["1,5", "-2,25", "3,0"], "holds numbers with commas as text, such as '-2,25'; write them with a decimal point"),
        (["1,234", "12,345,678.5"], "holds numbers with commas as text"),
        (["1.234,5", "2,0"], "holds numbers with commas as text"),
    ],
)
def test_dates_and_numbers_with_commas_are_no_categories(cells: list[str], words: str) -> None:
    frame = pd.DataFrame({"when": cells * 4, "n": range(4 * len(cells))})
    said = problem(from_python, frame)
    assert said.startswith("data: column 'when' ")
    assert words in said
    assert said.endswith("or keep them as categories: data.kinds: {when: categorical}")
    assert problem(Memory(covariates=["when"]).hand_over, frame) == said
    kept = Memory(kinds={"when": "categorical"}).hand_over(frame)
    assert set(kept.categories) == {"when"}
    assert Memory(labels="when").hand_over(frame).columns == ("n",)


def test_text_with_digits_may_be_categories() -> None:
    """Ranges, versions, codes and lists are names as good as any; one date among them changes nothing."""
    for cells in (["10-20", "20-30"], ["v1.2", "3-4-5-6"], ["A1,2", "b"], ["2024-01-05", "never", "never"], ["1,2,3", "a"]):
        assert set(from_python(pd.DataFrame({"a": cells * 4})).categories) == {"a"}


def test_without_a_header_columns_are_numbers(tmp_path: Path) -> None:
    text = "?,1,2\nx,3,4\ny,5,6\n"
    dataset = load(tmp_path, text)
    assert dataset.columns is None
    np.testing.assert_array_equal(dataset.x, [[np.nan, 1, 2], [0, 3, 4], [1, 5, 6]])
    assert [column.name for column in dataset.described] == ["0", "1", "2"]
    assert dataset.described[0] == Column("0", "categorical", 2)
    np.testing.assert_array_equal(load(tmp_path, text, exposure="2").exposure, [2, 4, 6])


def test_other_rows_get_the_same_columns(tmp_path: Path) -> None:
    fitted = load(tmp_path, **ROLES)
    layout = Layout.of(json.loads(json.dumps(fitted.layout.tree())))
    other = "who,depth,extra,batch,dose,city,b,a\nzoe,7,1,9,0.5,rome,1,2\n"
    (tmp_path / "y.csv").write_text(other)
    dataset = read_like("y.csv", layout, tmp_path)
    dataset.check(whole=False)
    np.testing.assert_array_equal(dataset.x, [[2, 1, 1]])
    assert dataset.columns == fitted.columns
    assert dataset.covariate_names == fitted.covariate_names
    np.testing.assert_array_equal(dataset.covariates, [[0.5, 1, 0]])
    np.testing.assert_array_equal(dataset.exposure, [7])
    frame = pd.read_csv(tmp_path / "y.csv")
    np.testing.assert_array_equal(read_like(frame, layout, tmp_path).covariates, [[0.5, 1, 0]])
    assert read_like(frame.drop(columns="who"), layout, tmp_path).labels is None
    empty = read_like(frame.assign(city=np.nan), layout, tmp_path)
    assert np.isnan(empty.x[0, 2])
    new = "was not in the data of the fit"
    bad = {
        f"data: column 'city': 'paris' at row 0 {new} (there: oslo, rome); remove or correct such rows": frame.assign(
            city="paris"
        ),
        f"data: column 'batch': '11' at row 0 {new} (there: 9, 10); remove or correct such rows": frame.assign(batch=11),
        "data: column 'b' holds text, such as 'much', where the fit had numbers; give it numbers": frame.assign(b="much"),
        "data: there is no column 'depth'; allowed: a, b, batch, city, dose, extra, who": frame.drop(columns="depth"),
        "data: data.covariates: an array has no column 'dose'; use a table (.csv, .parquet or a frame) or an .npz": np.ones(
            (2, 3)
        ),
    }
    for wanted, given in bad.items():
        assert problem(read_like, given, layout, tmp_path) == wanted


def test_a_table_without_names_is_read_by_places(tmp_path: Path) -> None:
    layout = load(tmp_path, "a,b\n1,2\n3,4\n5,7\n").layout
    (tmp_path / "y.csv").write_text("8,9\n")
    assert read_like("y.csv", layout, tmp_path).columns == ("a", "b")
    assert read_like(np.array([[8, 9]]), layout, tmp_path).columns == ("a", "b")
    assert read_like(np.zeros((2, 3)), None, tmp_path).columns is None
    plain = load(tmp_path, "1,2\n3,4\n5,7\n").layout
    (tmp_path / "y.csv").write_text("a,b\n8,9\n")
    np.testing.assert_array_equal(read_like("y.csv", plain, tmp_path).x, [[8, 9]])


def test_kinds_of_columns() -> None:
    x = np.array([[0, 3, 0.2, -1, 0.5, 2, 1], [1, 0, 7.5, 2, 0.25, np.nan, 0], [np.nan, 9, 1, 3.5, 0.1, 0, 2]])
    names = ("yes", "n", "size", "change", "share", "code", "grade")
    kinds = {"share": "proportion", "code": "categorical", "grade": "ordinal"}
    assert describe_columns(x, names, kinds) == (
        Column("yes", "binary", 2),
        Column("n", "count"),
        Column("size", "positive"),
        Column("change", "real"),
        Column("share", "proportion"),
        Column("code", "categorical", 3),
        Column("grade", "ordinal", 3),
    )
    assert describe_columns(x, names, {})[4].kind == "positive"
    assert [c.kind for c in describe_columns(np.array([[True, False]]), ("a", "b"))] == ["binary", "binary"]
    assert describe_columns(np.array([[np.nan]]), ("a",))[0].kind == "real"


@pytest.mark.parametrize("chunk", [7, 2**22])
def test_the_place_of_a_wrong_kind_is_found_in_any_part(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elbowroom.data.chunks.CHUNK", chunk)
    x = np.ones((6, 2))
    x[4, 1] = -1
    assert problem(describe_columns, x, ("a", "b"), {"b": "positive"}) == (
        "data: column 'b' is declared positive, found -1 at row 4; correct it, or declare another kind in data.kinds"
    )


def test_constant_columns_are_noted() -> None:
    spec = {
        "model": {"latent_dim": 1, "likelihood": "gaussian", "decoder": "linear"},
        "guide": {"family": "diagonal_normal", "encoder": "linear"},
    }
    frame = pd.DataFrame({"a": 20 * [3.0], "b": 20 * [0.5], "c": np.arange(20.0) ** 2, "d": np.arange(20)})
    frame.loc[3, "a"] = np.nan
    noted = lambda columns: Experiment.from_dict(spec, data=frame[columns]).notes
    assert noted(["a", "b"]) == ("data: every column of x is constant: 'a', 'b'; there is nothing to learn",)
    assert noted(["a", "c"]) == (
        "data: 1 column of x is constant: 'a'; there is nothing to learn in it, leave it out of data.x",
    )
    assert noted(["c"]) == ()
    assert noted(["c", "d"]) == ("data: column 'd' counts the rows; leave it out of data.x if it is no measurement",)


def test_an_array_has_no_names() -> None:
    wanted = "data: data.exposure: an array has no column 'n'; use a table (.csv, .parquet or a frame) or an .npz"
    assert problem(Memory(exposure="n").hand_over, np.ones((3, 2))) == wanted
    dataset = Memory(kinds={"1": "categorical"}).hand_over(np.array([[1, 0], [2, 3]]))
    assert dataset.described == (Column("0", "count"), Column("1", "categorical", 4))


def test_a_large_table_of_text_is_read_in_time(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"n": rng.integers(0, 9, 20_000), "t": rng.choice(["a", "b", ""], 20_000)})
    dataset = load(tmp_path, frame.to_csv(index=False))
    assert np.isnan(dataset.x[:, 1]).mean() == pytest.approx((frame.t == "").mean())


def test_a_record_holds_every_part_of_a_layout() -> None:
    """Else a run on a table is written and cannot be opened again."""
    assert {field.name for field in dataclasses.fields(Layout)} - {"fitted"} == set(Roles.__annotations__)
    full = Layout(("a",), ("c",), "e", "l", {"a": "count"}, {"c": ("x", "y")}, header=False, delimiter=";", fitted=True)
    read = TypeAdapter(Roles).validate_python(json.loads(json.dumps(full.tree())))
    again = Layout.of(read)
    assert [getattr(again, field.name) for field in dataclasses.fields(Layout)] == [
        getattr(full, field.name) for field in dataclasses.fields(Layout)
    ]
