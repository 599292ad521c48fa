"""Data sets in the files and splits of their publishers: downloaded once, and checked by their checksums.

`ELBOWROOM_DATA` names a folder that already holds the files (plain or `.gz`); otherwise they are downloaded into pooch's cache.
Checksums are always those of the uncompressed content.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import os
import zlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from annotated_types import Gt, Le

from elbowroom.data.dataset import Dataset, Source, Split
from elbowroom.errors import DataError
from elbowroom.system.memory import slices
from elbowroom.system.paths import located

VARIABLE = "ELBOWROOM_DATA"
SHAPE = (28, 28)
HELD_OUT = 10_000
"""Number of MNIST's 60,000 training images, the last ones, that serve for validation."""

_TEST_ORDER, _DRAW = 20_251, 20_252  # seeds: order of the test rows, fixed binarization
_LARGEST = 2**28  # largest allowed size of an uncompressed file, in bytes


@dataclass(frozen=True)
class Published:
    """One published file.

    Attributes:
        name: name of the uncompressed file.
        url: URL of the publisher's file, possibly compressed.
        download: checksum of the file at the URL, for pooch.
        md5: checksum of the uncompressed content.
        sha256: likewise.
    """

    name: str
    url: str
    download: str
    md5: str
    sha256: str


def _amat(part: str, md5: str, sha256: str) -> Published:
    name = f"binarized_mnist_{part}.amat"
    url = f"http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/{name}"
    return Published(name, url, f"sha256:{sha256}", md5, sha256)


def _idx(name: str, packed: str, md5: str, sha256: str) -> Published:
    url = f"https://ossci-datasets.s3.amazonaws.com/mnist/{name}.gz"
    return Published(name, url, f"md5:{packed}", md5, sha256)


def _kept(name: str, url: str, md5: str, sha256: str) -> Published:
    return Published(name, f"https://raw.githubusercontent.com/{url}", f"sha256:{sha256}", md5, sha256)


_HI_VAE = "probabilistic-learning/HI-VAE/855b255d15451f80cf337cc648ff6acab5d86402/Adult"

FILES: dict[str, Published] = {
    "train.amat": _amat(
        "train",
        "db28b1a6ae0fe70cbd3da91acf46e477",
        "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
    ),
    "valid.amat": _amat(
        "valid",
        "bf37822a04e94123630de6a7dfd9c9ef",
        "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2",
    ),
    "test.amat": _amat(
        "test",
        "14e41ae11040adba6ab8cb291eda0dd8",
        "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
    ),
    "train.images": _idx(
        "train-images-idx3-ubyte",
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "6bbc9ace898e44ae57da46a324031adb",
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    "train.labels": _idx(
        "train-labels-idx1-ubyte",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "a25bea736e30d166cdddb491f175f624",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    "test.images": _idx(
        "t10k-images-idx3-ubyte",
        "9fb629c4189551a2d022fa330f9573f3",
        "2646ac647ad5339dbf082846283269ea",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    "test.labels": _idx(
        "t10k-labels-idx1-ubyte",
        "ec29112dd5afa0611ce80d1b7f02629c",
        "27ae3e4e09519cfbb04c329615203637",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    "adult.data": _kept(
        "adult/data.csv",
        f"{_HI_VAE}/data.csv",
        "f219a03183489c4e7738163d77f517a7",
        "a38d3e228cc9cc12eca35ea3439706906aae966372fdd791ef8f9c347b37cb77",
    ),
    "adult.types": _kept(
        "adult/data_types.csv",
        f"{_HI_VAE}/data_types.csv",
        "d783b9f7bc41523a9133d89c5bb27b7d",
        "6f5fe8db1634101eed8b4c1549b3ae1f4f92dca88b34af13a9b5d8e8e5012fd5",
    ),
    "adult.missing": _kept(
        "adult/missing20_1.csv",
        f"{_HI_VAE}/Missing20_1.csv",
        "fb770bd5270b63f88da0d6137ba87544",
        "5640540fcbb8424d1b24edddb9b7edd9985e4e4a9011dc76210185fb65f1dfcb",
    ),
    "jsb.quarter": _kept(
        "jsb-chorales-quarter.json",
        "czhuang/JSB-Chorales-dataset/9a7f733ddb4ed91f48da64ac7f0f621c34aadd4d/jsb-chorales-quarter.json",
        "3bf6c38f846f08869f8ae53078e34902",
        "2db9329f1881a1d3f49703ec556bf1d6f84b4f6c1d702c156536e93cf31e1c91",
    ),
}


class PublishedSource(Source):
    """A published data set: its files are in the folder `ELBOWROOM_DATA`, or are downloaded.

    Attributes:
        split: fractions of train, validation and test; not used where the published split is kept.
        keys: keys of its files in `FILES`.
    """

    split: Sequence[float] = (5 / 7, 1 / 7, 1 / 7)
    keys: Sequence[str]

    def missing(self) -> str | None:
        """Say which file is not on this machine and would be downloaded, or is not in `ELBOWROOM_DATA`."""
        for key in self.keys:
            file = FILES[key]
            places = [path for folder in _folders() for path in (folder / file.name, folder / f"{file.name}.gz")]
            if not any(path.is_file() for path in places):
                return f"{file.name} is not on this machine"
        return None

    @abstractmethod
    def load(self) -> Dataset:
        """Read the files; missing ones are downloaded."""


class BinarizedMNIST(PublishedSource):
    """Larochelle's static binarized MNIST: 70,000 handwritten digits of 28 x 28 pixels that are 0 or 1, no labels.

    Salakhutdinov and Murray 2008, as fixed by Larochelle and Murray 2011, https://proceedings.mlr.press/v15/larochelle11a.html.
    The published split is kept; the test rows, sorted by digit in the file, are taken in a fixed random order. 110 MB are
    downloaded once, unless `ELBOWROOM_DATA` names a folder with the files.
    """

    keys = ("train.amat", "valid.amat", "test.amat")

    def load(self) -> Dataset:
        """Return x of shape (70000, 28, 28), uint8 0 and 1."""
        parts = [_parse_amat(FILES[key].name, content(FILES[key])) for key in self.keys]
        return Dataset(np.concatenate(parts), "binarized_mnist", split=published_split(*map(len, parts)))


class MNIST(PublishedSource):
    """MNIST: 70,000 handwritten digits of 28 x 28 grey pixels from 0 to 255, with the digits as labels.

    LeCun, Bottou, Bengio and Haffner 1998, https://doi.org/10.1109/5.726791. The last 10,000 of the 60,000 training images
    validate; the test rows are taken in a fixed random order. 11 MB are downloaded once, unless `ELBOWROOM_DATA` names a
    folder with the files.

    Args:
        binarize: make a pixel 1 where it is at least this threshold (on the scale 0 to 255), else 0; `dynamic` draws each
            pixel from Bernoulli(grey / 255): training data anew in every epoch, validation and test data once; null keeps grey.
        scale: what grey pixels are divided by: 255 gives values in [0, 1]. It does not matter when binarized.
    """

    keys = ("train.images", "train.labels", "test.images", "test.labels")

    def __init__(
        self,
        *,
        binarize: Annotated[float, Gt(0), Le(255)] | Literal["dynamic"] | None = None,
        scale: Annotated[float, Gt(0)] = 255.0,
    ) -> None:
        self.binarize = binarize
        self.scale = scale

    def load(self) -> Dataset:
        """Return x of shape (70000, 28, 28), uint8 if binarized, with the digits as labels."""
        found = [_parse_idx(FILES[key].name, content(FILES[key])) for key in self.keys]
        for images, labels in ((0, 1), (2, 3)):
            if len(found[images]) != len(found[labels]):
                raise DataError(f"{FILES[self.keys[labels]].name}: {len(found[labels])} labels for {len(found[images])} images")
        grey, labels_of = np.concatenate(found[::2]), np.concatenate(found[1::2]).astype(np.int64)
        n = len(found[0])
        split = published_split(n - HELD_OUT, HELD_OUT, len(found[2]))
        if self.binarize == "dynamic":
            return Dataset(draw(grey, _DRAW), "mnist", labels=labels_of, split=split, grey=grey)
        x = grey / np.float32(self.scale) if self.binarize is None else (grey >= self.binarize).astype(np.uint8)
        return Dataset(x, "mnist", labels=labels_of, split=split)


def published_split(n_train: int, n_validation: int, n_test: int) -> Split:
    """Return the split of rows in the order train, validation, test; the test rows are in a fixed random order."""
    order = np.random.default_rng([_TEST_ORDER, n_test]).permutation(n_test)
    first_test = n_train + n_validation
    return Split(
        train=np.arange(n_train, dtype=np.int64),
        validation=np.arange(n_train, first_test, dtype=np.int64),
        test=(first_test + order).astype(np.int64),
    )


def draw(grey: np.ndarray, seed: int) -> np.ndarray:
    """Draw every pixel once from Bernoulli(grey / 255), (N, *event) uint8 of 0 and 1; the seed determines the draw."""
    rng = np.random.default_rng(seed)
    x = np.empty_like(grey)
    for some in slices(len(grey), 5000):
        x[some] = rng.random(grey[some].shape, dtype=np.float32) * np.float32(255) < grey[some]
    return x


def content(file: Published) -> bytes:
    """Return the uncompressed content of a published file; a DataError if it is not available or its checksum differs."""
    path = _find(file)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as handle:
            raw = handle.read(_LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        raise DataError(f"{path}: cannot be read ({reason}); {_cure(file)}") from None
    for kind, wanted in (("md5", file.md5), ("sha256", file.sha256)):
        got = hashlib.new(kind, raw, usedforsecurity=False).hexdigest()
        if got != wanted:
            raise DataError(f"{path}: is not the published {file.name}: its {kind} is {got}, not {wanted}; {_cure(file)}")
    return raw


def _cure(file: Published) -> str:
    return f"get it from {file.url} again, or set {VARIABLE} to a folder that holds it"


def _folders() -> list[Path]:
    """Return the folders to search: the one that the user names, else pooch's cache."""
    named = os.environ.get(VARIABLE)
    if named:
        try:
            return [located(Path(), Path(named))]
        except ValueError as error:
            raise DataError(f"{VARIABLE}: {error}") from None
    import pooch

    return [Path(pooch.os_cache("elbowroom"))]


def _find(file: Published) -> Path:
    """Return the path of a published file; download it if no folder is named and the cache does not hold it."""
    (folder,) = _folders()
    for path in (folder / file.name, folder / f"{file.name}.gz"):
        if path.is_file():
            return path
    if os.environ.get(VARIABLE):
        what = "holds neither" if folder.is_dir() else "is no folder; it should hold"
        raise DataError(
            f"{VARIABLE}: {folder} {what} {file.name} {'nor' if folder.is_dir() else 'or'} {file.name}.gz; "
            f"put it there (from {file.url}), or unset {VARIABLE} to download it"
        )
    import pooch

    pooch.get_logger().setLevel(logging.ERROR)
    place = folder / (file.name + ".gz" * file.url.endswith(".gz"))
    try:
        return Path(pooch.retrieve(file.url, known_hash=file.download, fname=place.name, path=place.parent))
    except Exception as error:  # requests, urllib3, sockets and pooch raise errors of many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
        raise DataError(
            f"{file.name}: could not be downloaded from {file.url} ({reason}); "
            f"download it elsewhere and set {VARIABLE} to the folder that holds it"
        ) from None


def _parse_amat(name: str, raw: bytes) -> np.ndarray:
    """Parse text of zeros and ones, one image per line, into (N, 28, 28) uint8."""
    symbols = np.frombuffer(raw, dtype=np.uint8)
    x = symbols[symbols > ord(" ")] - np.uint8(ord("0"))
    width = SHAPE[0] * SHAPE[1]
    if x.size == 0 or x.size % width or int(x.max()) > 1:
        raise DataError(f"{name}: is not text of {width} zeros and ones per line")
    return x.reshape(-1, *SHAPE)


def _parse_idx(name: str, raw: bytes) -> np.ndarray:
    """Parse an IDX file of bytes: images (N, 28, 28) or labels (N,), uint8."""
    head = np.frombuffer(raw[:4], dtype=np.uint8)
    ndim = int(head[3]) if len(head) == 4 and head[:3].tolist() == [0, 0, 8] else 0
    shape = tuple(np.frombuffer(raw, dtype=">u4", offset=4, count=ndim).tolist()) if ndim and len(raw) >= 4 + 4 * ndim else ()
    if not shape or shape[1:] not in (SHAPE, ()) or len(raw) != 4 + 4 * ndim + int(np.prod(shape)):
        raise DataError(f"{name}: is not an IDX file of bytes")
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * ndim).reshape(shape)
