"""Numbers that a smaller type cannot hold keep theirs: no infinities, no wrapped whole numbers, no warning."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import xarray as xr

from elbowroom.analysis import idata
from elbowroom.analysis.report.report import TEMPLATE, TEMPLATES, policy
from elbowroom.errors import RunFolderError


@pytest.mark.parametrize(
    ("values", "small", "kept"),
    [
        ([1.5, np.nan, np.inf], np.float32, True),
        ([1e39], np.float32, False),
        ([-1e300, 1.0], np.float32, False),
        ([2**31 - 1], np.int32, True),
        ([2**31], np.int32, False),
        ([-(2**62)], np.int32, False),
        ([], np.float32, True),
    ],
)
def test_a_number_that_does_not_fit_keeps_the_type(values, small, kept):
    given = np.array(values, dtype=np.int64 if small is np.int32 else np.float64)
    found = idata.narrowed(given, np.dtype(small))
    assert found.dtype == (small if kept else given.dtype)
    assert np.allclose(found.astype(given.dtype), given, equal_nan=True)


LINKS = {
    "external": lambda file, path: file.__setitem__("led", h5py.ExternalLink("other.nc", "/")),
    "soft": lambda file, path: file.__setitem__("led", h5py.SoftLink("/x")),
    "raw": lambda file, path: file.create_dataset("led", (4,), "u1", external=[(str(path), 0, 4)]),
    "circle": lambda file, path: file.create_group("led").__setitem__("back", file["/"]),
}


@pytest.mark.parametrize("kind", LINKS)
@pytest.mark.parametrize("read", [idata.read, idata.read_table])
def test_a_file_that_leads_elsewhere_is_refused_unread(kind, read, tmp_path):
    secret, path = tmp_path / "secret", tmp_path / "audit.nc"
    secret.write_text("secret")
    idata.write(xr.Dataset({"x": ("obs_id", [1.0, 2.0])}), path)
    assert read(path) is not None
    with h5py.File(path, "r+") as file:
        LINKS[kind](file, secret)
    with pytest.raises(RunFolderError, match=r"audit\.nc: damaged \(/led.* (elsewhere|other files|above it)\); make it anew"):
        read(path)


def test_the_report_may_load_nothing_and_its_template_needs_nothing():
    template = (TEMPLATES / TEMPLATE).read_text(encoding="utf-8")
    assert policy(template).startswith("default-src 'none'; style-src 'sha256-")
    assert template.count("<style>") == 1
    assert "{" + "{" not in template.partition("<style>")[2].partition("</style>")[0]
    for needed in ("<script", " style=", " onclick", " onload", "<link", "<iframe"):
        assert needed not in template
