"""Adult and the JSB chorales: made-up files of the same format, and the real ones."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from elbowroom.components import registry
from elbowroom.components.slots import build
from elbowroom.data import published
from elbowroom.data.repositories import ADULT, Adult, JSBChorales
from elbowroom.errors import DataError

TYPES = (
    "type,dim,nclass\r\ncount,1,\r\ncat,7,7\r\npos,1,\r\nordinal,16,16\r\ncat,7,7\r\ncat,14,14\r\ncat,6,6\r\n"
    "cat,5,5\r\ncat,2,2\r\npos,1,\r\npos,1,\r\ncount,1,"
)
ROWS = "39,6,77516,13,3,9,4,1,1,2174,0,40\n54,NaN,1.8021e+05,10,1,NaN,3,2,2,0,0,60\n50,2,83311,16,1,5,3,1,1,0,5,13\n"
CHORALES = {"test": [[[21]]], "train": [[[60, 64], [], [108]], [[60]]], "valid": [[[60], [61]]]}


def put(monkeypatch: pytest.MonkeyPatch, folder: Path, key: str, text: str) -> None:
    raw = text.encode()
    file = published.FILES[key]
    known = replace(file, md5=hashlib.md5(raw).hexdigest(), sha256=hashlib.sha256(raw).hexdigest())
    monkeypatch.setitem(published.FILES, key, known)
    (folder / file.name).parent.mkdir(exist_ok=True)
    (folder / file.name).write_bytes(raw)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(published.VARIABLE, str(tmp_path))
    put(monkeypatch, tmp_path, "adult.data", ROWS)
    put(monkeypatch, tmp_path, "adult.types", TYPES)
    put(monkeypatch, tmp_path, "adult.missing", "1,1\n2,2\n3,12\n")
    put(monkeypatch, tmp_path, "jsb.quarter", json.dumps(CHORALES))
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_adult() -> None:
    dataset = Adult().load()
    dataset.check()
    np.testing.assert_array_equal(dataset.x[0], [39, 5, 77516, 12, 2, 8, 3, 0, 0, 2175, 1, 40])
    assert np.argwhere(np.isnan(dataset.x)).tolist() == [[1, 1], [1, 5]]
    assert dataset.columns == ADULT
    assert dataset.hidden is None
    kinds = {column.name: (column.kind, column.levels) for column in dataset.described}
    assert kinds["education_num"] == ("ordinal", 16)
    assert kinds["occupation"] == ("categorical", 14)
    assert kinds["sex"] == ("categorical", 2)
    assert kinds["capital_gain"] == ("positive", 0)
    assert kinds["age"] == ("count", 0)


@pytest.mark.usefixtures("folder")
def test_adult_keeps_what_it_hides() -> None:
    whole, dataset = Adult().load(), Adult(missing="20%").load()
    hidden = dataset.hidden
    assert list(zip(hidden.rows, hidden.columns, hidden.values, strict=True)) == [(0, 0, 39), (2, 11, 13)]
    assert np.isnan(dataset.x[hidden.rows, hidden.columns]).all()
    dataset.x[hidden.rows, hidden.columns] = hidden.values
    np.testing.assert_array_equal(dataset.x, whole.x)


@pytest.mark.usefixtures("folder")
def test_jsb_chorales() -> None:
    dataset = JSBChorales().load()
    dataset.check()
    assert dataset.x.shape == (4, 3, 88)
    assert dataset.x.dtype == np.float32
    assert np.argwhere(dataset.x == 1).tolist() == [
        [0, 0, 39],
        [0, 0, 43],
        [0, 2, 87],
        [1, 0, 39],
        [2, 0, 39],
        [2, 1, 40],
        [3, 0, 0],
    ]
    np.testing.assert_array_equal(np.isnan(dataset.x).all(2), [[0, 0, 0], [0, 1, 1], [0, 0, 1], [0, 1, 1]])
    assert (dataset.levels, dataset.missing, dataset.described) == (2, True, None)
    assert [part.tolist() for part in (dataset.split.train, dataset.split.validation, dataset.split.test)] == [[0, 1], [2], [3]]
    assert JSBChorales(steps=1).load().x.shape == (4, 1, 88)
    assert not JSBChorales(steps=1).load().missing


BAD = {
    ("jsb.quarter", "{}"): "jsb-chorales-quarter.json: is not train, valid and test sequences of chords of notes 21 to 108",
    ("jsb.quarter", "x"): "jsb-chorales-quarter.json: is not train, valid and test sequences of chords of notes 21 to 108",
    ("adult.data", "a,b"): "adult/data.csv: is not lines of numbers",
    ("adult.data", "1,2"): "adult: 2 columns of data and 12 of types, not 12; get them again",
    ("adult.types", "type\nodd"): "adult/data_types.csv: is not a table of type, dim and nclass",
    ("adult.missing", "0,1"): (
        "adult/missing20_1.csv: is not a list of rows and columns, counted from 1, of the data; get it again"
    ),
}


@pytest.mark.parametrize("key", BAD)
def test_other_content_is_named(key: tuple[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, folder, *key)
    with pytest.raises(DataError) as error:
        (JSBChorales() if key[0].startswith("jsb") else Adult(missing="20%")).load()
    assert str(error.value) == BAD[key]


def test_a_download_goes_into_the_same_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def retrieve(url: str, known_hash: str, fname: str, path: Path) -> str:
        path.mkdir(parents=True, exist_ok=True)
        text = {"data.csv": ROWS, "data_types.csv": TYPES}[fname]
        (path / fname).write_bytes(text.encode())
        return str(path / fname)

    (tmp_path / "elsewhere").mkdir()
    for key, text in (("adult.data", ROWS), ("adult.types", TYPES)):
        put(monkeypatch, tmp_path / "elsewhere", key, text)
    monkeypatch.delenv(published.VARIABLE, raising=False)
    monkeypatch.setattr("pooch.os_cache", lambda name: tmp_path / "cache")
    monkeypatch.setattr("pooch.retrieve", retrieve)
    assert Adult().missing() == "adult/data.csv is not on this machine"
    assert len(Adult().load()) == 3
    assert (tmp_path / "cache/adult/data_types.csv").is_file()
    assert published.FILES["adult.missing"].url.endswith("/Adult/Missing20_1.csv")


real = pytest.mark.skipif(published.VARIABLE not in os.environ, reason=f"{published.VARIABLE} is not set")


@pytest.mark.slow
@real
def test_the_published_files() -> None:
    chosen = registry.options_model("data", "adult").model_validate({"name": "adult", "missing": "20%"})
    dataset = build("data", chosen).load()
    dataset.check()
    assert dataset.x.shape == (32_561, 12)
    assert len(dataset.hidden.rows) == 77_647
    assert [column.levels for column in dataset.described] == [0, 7, 0, 16, 7, 14, 6, 5, 2, 0, 0, 0]
    assert np.isnan(Adult().load().x).sum() == 3686
    chorales = JSBChorales().load()
    chorales.check()
    assert chorales.x.shape == (382, 160, 88)
    assert np.nansum(chorales.x) == 90_002
    assert [len(part) for part in (chorales.split.train, chorales.split.validation, chorales.split.test)] == [229, 76, 77]
