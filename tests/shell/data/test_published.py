"""Published data sets: parsed, checked by checksum, split as published; nothing here touches the network."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import os
import struct
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import elbowroom as er
from elbowroom.components import registry
from elbowroom.components.slots import build
from elbowroom.data import published
from elbowroom.data.dataset import Dataset
from elbowroom.data.published import MNIST, BinarizedMNIST
from elbowroom.errors import DataError, SpecError

SIZES = {"train": 30, "valid": 12, "test": 20}


def amat(x: np.ndarray) -> bytes:
    return b"".join(b" ".join(b"%d" % pixel for pixel in row) + b" \n" for row in x.reshape(len(x), -1))


def idx(x: np.ndarray) -> bytes:
    return bytes([0, 0, 8, x.ndim]) + struct.pack(f">{x.ndim}I", *x.shape) + x.tobytes()


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Fake files, half of them compressed, whose checksums count as the published ones."""
    rng = np.random.default_rng(0)
    grey = {part: rng.integers(0, 256, (n, 28, 28), dtype=np.uint8) for part, n in SIZES.items()}
    arrays = {f"{part}.amat": (x > 127).astype(np.uint8) for part, x in grey.items()}
    arrays |= {"train.images": np.concatenate([grey["train"], grey["valid"]]), "test.images": grey["test"]}
    arrays |= {"train.labels": np.arange(42, dtype=np.uint8) % 10, "test.labels": np.sort(np.arange(20, dtype=np.uint8) % 10)}
    known = {}
    for i, (key, x) in enumerate(arrays.items()):
        raw = amat(x) if key.endswith("amat") else idx(x)
        file = published.FILES[key]
        known[key] = replace(file, md5=hashlib.md5(raw).hexdigest(), sha256=hashlib.sha256(raw).hexdigest())
        path = tmp_path / (file.name + ".gz" * (i % 2))
        path.write_bytes(gzip.compress(raw) if i % 2 else raw)
    monkeypatch.setattr(published, "FILES", known)
    monkeypatch.setattr(published, "HELD_OUT", SIZES["valid"])
    monkeypatch.setenv(published.VARIABLE, str(tmp_path))
    return arrays


def test_binarized_mnist(files: dict[str, np.ndarray]) -> None:
    dataset = BinarizedMNIST().load()
    assert dataset.x.dtype == np.uint8
    np.testing.assert_array_equal(dataset.x, np.concatenate([files[f"{part}.amat"] for part in SIZES]))
    assert dataset.event_shape == (28, 28)
    assert dataset.labels is None
    dataset.check()
    split = dataset.split
    assert split is not None
    np.testing.assert_array_equal(split.train, np.arange(30))
    np.testing.assert_array_equal(split.validation, np.arange(30, 42))
    assert sorted(split.test) == list(range(42, 62))
    assert list(split.test) != sorted(split.test)
    np.testing.assert_array_equal(split.test, BinarizedMNIST().load().split.test)


def test_mnist(files: dict[str, np.ndarray]) -> None:
    grey = np.concatenate([files["train.images"], files["test.images"]])
    dataset = MNIST().load()
    assert dataset.x.dtype == np.float32
    np.testing.assert_array_equal(dataset.x, grey / np.float32(255))
    np.testing.assert_array_equal(dataset.labels, np.concatenate([files["train.labels"], files["test.labels"]]))
    assert [len(part) for part in (dataset.split.train, dataset.split.validation, dataset.split.test)] == [30, 12, 20]
    binary = MNIST(binarize=128).load()
    assert binary.x.dtype == np.uint8
    np.testing.assert_array_equal(binary.x, grey >= 128)
    registry.component("data", "mnist")  # from here on the constructor is checked
    with pytest.raises(SpecError, match=r"mnist: binarize: "):
        MNIST(binarize=256)


def test_dynamic_binarization_has_one_fixed_draw(files: dict[str, np.ndarray]) -> None:
    first, second = MNIST(binarize="dynamic").load(), MNIST(binarize="dynamic").load()
    np.testing.assert_array_equal(first.x, second.x)
    assert first.x.dtype == np.uint8
    assert set(np.unique(first.x)) == {0, 1}
    np.testing.assert_array_equal(first.grey, np.concatenate([files["train.images"], files["test.images"]]))
    assert (first.x[first.grey == 0] == 0).all()
    p, n = first.grey / 255, first.x.size
    assert abs(first.x.mean() - p.mean()) < 4 * (p * (1 - p)).mean() ** 0.5 / n**0.5
    whole = np.full((3, 2), 255, dtype=np.uint8)
    assert published.draw(whole, 0).all()


def test_a_spec_names_it_and_the_split_is_the_published_one(files: dict[str, np.ndarray]) -> None:
    tree = {"data": "binarized_mnist", "model": {"latent_dim": 2, "likelihood": "bernoulli"}, "fit": {"epochs": 1}}
    experiment = er.Experiment.from_dict(tree)
    experiment.check()
    assert experiment.split is experiment.data.split
    rows = experiment.rows(experiment.split.test[:3])
    assert rows.dtype == experiment.dtype
    np.testing.assert_array_equal(rows.numpy(), experiment.data.x[experiment.split.test[:3]])
    with pytest.raises(SpecError, match="split"):
        er.Experiment.from_dict({**tree, "data": {"name": "mnist", "split": [0.5, 0.2, 0.3]}})


def problem(load: object) -> str:
    with pytest.raises(DataError) as error:
        load()  # type: ignore[operator]
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.usefixtures("files")
def test_a_wrong_checksum_is_named(tmp_path: Path) -> None:
    path = tmp_path / "binarized_mnist_train.amat"
    path.write_bytes(path.read_bytes().replace(b"1 0", b"0 1", 1))
    assert problem(BinarizedMNIST().load).startswith(f"{path}: is not the published binarized_mnist_train.amat: its md5 is ")
    path.write_bytes(b"")
    assert "its md5 is d41d8cd98f00b204e9800998ecf8427e, not " in problem(BinarizedMNIST().load)


@pytest.mark.usefixtures("files")
def test_a_torn_archive_is_named(tmp_path: Path) -> None:
    (path,) = tmp_path.glob("*valid.amat.gz")
    path.write_bytes(path.read_bytes()[:100])
    assert problem(BinarizedMNIST().load).startswith(f"{path}: cannot be read (")


def test_an_archive_that_unpacks_to_too_much_is_not_held(
    files: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "_LARGEST", 1000)
    assert "is not the published" in problem(MNIST().load)


@pytest.mark.usefixtures("files")
def test_a_folder_without_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert BinarizedMNIST().missing() is None
    (tmp_path / "binarized_mnist_train.amat").unlink()
    assert BinarizedMNIST().missing() == "binarized_mnist_train.amat is not on this machine"
    assert problem(BinarizedMNIST().load) == (
        f"ELBOWROOM_DATA: {tmp_path} holds neither binarized_mnist_train.amat nor binarized_mnist_train.amat.gz; put it there "
        f"(from {published.FILES['train.amat'].url}), or unset ELBOWROOM_DATA to download it"
    )
    monkeypatch.setenv(published.VARIABLE, str(tmp_path / "nowhere"))
    assert "nowhere is no folder; it should hold binarized_mnist_train.amat or" in problem(BinarizedMNIST().load)


def test_without_a_folder_pooch_downloads_once(
    files: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    asked: list[tuple[str, str]] = []

    def retrieve(url: str, known_hash: str, fname: str, path: Path) -> str:
        asked.append((url, known_hash))
        source = next(
            p for p in (tmp_path / fname, tmp_path / f"{fname}.gz", tmp_path / fname.removesuffix(".gz")) if p.exists()
        )
        raw = gzip.decompress(source.read_bytes()) if source.suffix == ".gz" else source.read_bytes()
        (path / fname).write_bytes(gzip.compress(raw) if fname.endswith(".gz") else raw)
        return str(path / fname)

    monkeypatch.delenv(published.VARIABLE)
    monkeypatch.setattr("pooch.os_cache", lambda name: cache)
    monkeypatch.setattr("pooch.retrieve", retrieve)
    first = MNIST().load()
    assert [url for url, _ in asked] == [published.FILES[key].url for key in MNIST.keys]
    assert all(known.startswith("md5:") for _, known in asked)
    np.testing.assert_array_equal(MNIST().load().x, first.x)
    assert len(asked) == 4


def test_pooch_itself_downloads_checks_and_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing mocked but the publisher: a server on this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    raw, cache, shelf = b"0 1 \n", tmp_path / "cache", tmp_path / "shelf"
    shelf.mkdir()
    (shelf / "binarized_mnist_train.amat").write_bytes(raw)
    monkeypatch.delenv(published.VARIABLE, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("pooch.os_cache", lambda name: cache)
    known = published.FILES["train.amat"]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(shelf))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url, sha256 = f"http://127.0.0.1:{server.server_port}/{known.name}", hashlib.sha256(raw).hexdigest()
        with pytest.raises(DataError, match=r"could not be downloaded from .* does not match the known hash"):
            published.content(replace(known, url=url))
        assert not any(cache.rglob("*.amat"))
        ours = replace(known, url=url, download=f"sha256:{sha256}", md5=hashlib.md5(raw).hexdigest(), sha256=sha256)
        assert published.content(ours) == raw
        server.shutdown()
    assert published.content(ours) == raw


def test_a_failed_download_names_file_url_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def retrieve(*_: object, **__: object) -> str:
        raise ConnectionError("no network\nat all")

    monkeypatch.delenv(published.VARIABLE, raising=False)
    monkeypatch.setattr("pooch.os_cache", lambda name: tmp_path)
    monkeypatch.setattr("pooch.retrieve", retrieve)
    assert BinarizedMNIST().missing() is not None
    url = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/binarized_mnist_train.amat"
    assert problem(BinarizedMNIST().load) == (
        f"binarized_mnist_train.amat: could not be downloaded from {url} (no network); "
        "download it elsewhere and set ELBOWROOM_DATA to the folder that holds it"
    )


@pytest.mark.parametrize("raw", [b"", b"0 1 2\n", b"0 1\n"])
def test_what_is_no_amat(raw: bytes) -> None:
    with pytest.raises(DataError, match=r"^x: is not text of 784 zeros and ones per line$"):
        published._parse_amat("x", raw)


@pytest.mark.parametrize("raw", [b"", b"\0\0\x08\x01\0", idx(np.zeros((2, 28, 28), np.uint8))[:-1], b"\0\0\x0d\x01\0\0\0\0"])
def test_what_is_no_idx(raw: bytes) -> None:
    with pytest.raises(DataError, match=r"^x: is not an IDX file of bytes$"):
        published._parse_idx("x", raw)


real = pytest.mark.skipif(published.VARIABLE not in os.environ, reason=f"{published.VARIABLE} is not set")


@pytest.mark.slow
@real
@pytest.mark.parametrize("name", ["binarized_mnist", "mnist"])
def test_the_published_files(name: str) -> None:
    chosen = registry.options_model("data", name).model_validate({"name": name})
    dataset: Dataset = build("data", chosen).load()
    dataset.check()
    assert dataset.x.shape == (70_000, 28, 28)
    assert [len(part) for part in (dataset.split.train, dataset.split.validation, dataset.split.test)] == [
        50_000,
        10_000,
        10_000,
    ]
    mean = dataset.x[dataset.split.train].mean(dtype=np.float64)
    assert mean == pytest.approx(0.131, abs=5e-4)
    if dataset.labels is not None:
        assert np.bincount(dataset.labels[dataset.split.test]).tolist() == [
            980,
            1135,
            1032,
            1010,
            982,
            892,
            958,
            1028,
            974,
            1009,
        ]
