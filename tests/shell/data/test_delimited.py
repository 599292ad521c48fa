"""CSV files: rows, columns and holes are those of pandas, for everyone who reads them; what is ambiguous is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support.cases.written import save

from elbowroom.data import delimited
from elbowroom.data.columns import MISSING, Layout
from elbowroom.data.dataset import Dataset
from elbowroom.data.file import File, read_like
from elbowroom.data.frames import csv_frame
from elbowroom.errors import DataError

ROWS = "1.5,2\n0.5,1\n2.5,4\n"


def read(folder: Path, text: str, **options: object) -> Dataset:
    (folder / "x.csv").write_text(text)
    return File(folder, path=Path("x.csv"), **options).load()


def asked(folder: Path, text: str, **options: object) -> str:
    with pytest.raises(DataError) as error:
        read(folder, text, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def refused(folder: Path, path: Path) -> str | None:
    """Return the line with which a file is refused."""
    try:
        File(folder, path=Path(path.name)).load()
    except DataError as error:
        return str(error)
    return None


@pytest.mark.parametrize("first", range(0, 500, 100))
def test_reads_what_pandas_reads_or_asks(first: int, tmp_path: Path) -> None:
    read_without_asking = 0
    for seed in range(first, first + 100):
        path, table = save(tmp_path, seed)
        options: dict[str, object] = {}
        error = refused(tmp_path, path)
        if error is None:
            read_without_asking += 1
        elif table.damage is not None:
            continue
        else:  # not damaged: it was a question, and its answer must do
            assert "data.header" in error or "data.delimiter" in error, (seed, error)
            options = {"header": table.header, "delimiter": table.delimiter}
        data = File(tmp_path, path=Path(path.name), **options).load()
        assert table.damage is None, (seed, table.damage)
        columns = data.columns or tuple(str(i) for i in range(data.x.shape[1]))
        assert table.agrees(columns, data.x, dict(data.categories)) is None, (
            seed,
            table.agrees(columns, data.x, data.categories),
        )
        again = read_like(path, data.layout, tmp_path)  # as encode, score and impute read other rows
        np.testing.assert_array_equal(again.x, data.x, err_msg=str(seed))
        cells = delimited.read(path, path.name, data.layout).rows()[0]  # in which impute fills holes
        assert len(cells) == len(data.x), seed
    assert read_without_asking > 30


def test_holes_are_those_of_pandas_and_a_question_mark() -> None:
    from pandas._libs.parsers import STR_NA_VALUES

    assert set(STR_NA_VALUES) | {"?", "NAN"} == MISSING


def test_a_row_of_empty_cells_is_a_row_and_a_line_of_spaces_is_none(tmp_path: Path) -> None:
    data = read(tmp_path, "a,b\n1.5,2\n,,\n".replace(",,", ",") + "  \n\n2.5,4\n")
    np.testing.assert_array_equal(data.x, [[1.5, 2], [np.nan, np.nan], [2.5, 4]])
    one = read(tmp_path, 'a\n1.5\n""\n\n2.5\n')  # as pandas writes a hole of a single column
    np.testing.assert_array_equal(one.x[:, 0], [1.5, np.nan, 2.5])


def test_the_index_of_pandas_is_no_data(tmp_path: Path) -> None:
    frame = pd.DataFrame(np.random.default_rng(0).normal(size=(12, 3)), columns=list("abc"))
    for index in (None, [f"r{i}" for i in range(12)]):
        data = read(tmp_path, frame.set_axis(index or range(12)).to_csv())
        assert data.columns == ("a", "b", "c")
        np.testing.assert_allclose(data.x, frame)
        assert data.notes == ("the first column has no name and was taken for the index: not modelled",)
    plain = frame.set_axis(range(3), axis=1)
    np.testing.assert_allclose(read(tmp_path, plain.to_csv()).x, frame)  # its index makes plain that 0, 1, 2 are names
    assert "data.header" in asked(tmp_path, plain.to_csv(index=False))
    np.testing.assert_allclose(read(tmp_path, plain.to_csv(index=False), header=True).x, frame)
    assert "counts the rows" in asked(tmp_path, plain.to_csv(header=False))
    chosen = read(tmp_path, plain.to_csv(header=False), x=["1", "2", "3"])
    np.testing.assert_allclose(chosen.x, frame)
    assert "'Unnamed: 0' is an index" in asked(tmp_path, frame.rename_axis("Unnamed: 0").to_csv())


@pytest.mark.parametrize("first", ["0,1", "2019,2020", "5,17"])
def test_numbers_that_may_be_names_are_asked_for(first: str, tmp_path: Path) -> None:
    text = f"{first}\n" + "".join(f"{i}.5,{i * i}.25\n" for i in range(1, 12))
    assert f"line 1 ({first.replace(',', ', ')}) may hold the names of the columns or the first row" in asked(tmp_path, text)
    names = read(tmp_path, text, header=True)
    assert (names.columns, len(names.x)) == (tuple(first.split(",")), 11)
    assert len(read(tmp_path, text, header=False).x) == 12
    again = read_like(tmp_path / "x.csv", names.layout, tmp_path)
    np.testing.assert_array_equal(again.x, names.x)
    if first == "0,1":  # also the names of columns without a header
        assert "data.header" in asked(tmp_path, text, x=["0", "1"])
    else:  # whoever names them says that they are names
        assert read(tmp_path, text, x=first.split(",")).columns == names.columns


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b,\n1,2,\n", "column 3 has no name; remove what separates cells at the ends of lines"),
        ("a,,b\n1,2,3\n", "column 2 has no name; name it"),
        (",\n1,2\n", "a header without names"),
        ("a b\n1 2\n3 4\n", "cells are separated by spaces"),
        ("1,5;2,5\n3,5;4,5\n", "both commas and semicolons divide its lines; say which stands between cells: data.delimiter"),
        ("rome,1.5\noslo,2.5\n", "may hold the names of the columns or the first row"),
        ("a,a\n1,2\n", "'a' appears twice"),
        ("a,b\n1,12%\n2,13%\n", "holds percentages as text"),
        ("a,b\n1,12 km\n2,13 km\n", "holds numbers with units as text"),
        ("a,b\n1,12:30\n2,9:40 pm\n", "holds times as text"),
        (
            "id,b\n" + "".join(f"row{i},{i % 3}\n" for i in range(12)),
            "column 'id' holds 12 different values in 12 rows; leave it out",
        ),
        ("a,b\n1,$12.50\n2,$13\n", "holds amounts of money as text"),
    ],
)
def test_what_is_open_is_asked_or_refused(text: str, words: str, tmp_path: Path) -> None:
    if text.startswith(",\n"):
        assert "header" in asked(tmp_path, text, header=True)
    else:
        assert words in asked(tmp_path, text)


def test_other_separators(tmp_path: Path) -> None:
    for mark in ",;\t|":
        if mark == "|":
            assert "say so with data.delimiter: '|'" in asked(tmp_path, f"a{mark}b\n" + ROWS.replace(",", mark))
        data = read(tmp_path, f"a{mark}b\n" + ROWS.replace(",", mark), delimiter=mark)
        again = read_like(tmp_path / "x.csv", data.layout, tmp_path)
        np.testing.assert_array_equal(again.x, data.x)
        np.testing.assert_array_equal(data.x, [[1.5, 2], [0.5, 1], [2.5, 4]])
    excel = read(tmp_path, "sep=;\na;b\n" + ROWS.replace(",", ";"))
    assert excel.columns == ("a", "b")
    (tmp_path / "x.tsv").write_text("a\tb\n" + ROWS.replace(",", "\t"))
    np.testing.assert_array_equal(File(tmp_path, path=Path("x.tsv")).load().x, excel.x)


def test_a_file_of_covariates_is_read_alike(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text('"","batch","dose"\n"r1","9",0.5\n"r2","10",\n;\n'.replace(";\n", ",,\n"))
    frame = csv_frame(path, "c.csv", Layout(levels={"batch": ("9", "10")}))
    assert list(frame.columns) == ["batch", "dose"]
    np.testing.assert_array_equal(frame["dose"], [0.5, np.nan, np.nan])
    assert len(frame) == 3


def test_what_was_answered_for_the_fit_is_not_asked_of_other_rows(tmp_path: Path) -> None:
    """There is no option for it: the layout of the fit knows header and delimiter."""
    text = "1,5;2,5\n3,5;4,5\n5,5;6,5\n"
    assert "data.delimiter" in asked(tmp_path, text)
    data = read(tmp_path, text, delimiter=",", header=False, kinds={"1": "categorical"})
    assert data.x.shape == (3, 3)
    kept = Layout.of(json.loads(json.dumps(data.layout.tree())))
    again = read_like(tmp_path / "x.csv", kept, tmp_path)
    np.testing.assert_array_equal(again.x, data.x)
    assert delimited.read(tmp_path / "x.csv", "x.csv", kept).width == 3


def test_an_odd_first_line_of_excel_is_no_crash(tmp_path: Path) -> None:
    assert asked(tmp_path, 'sep="\na,b\n1,2\n')
