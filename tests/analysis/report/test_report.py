"""The report, from files in exactly the format of a run folder; the model behind them is linear-Gaussian, in plain numpy."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import xarray as xr
from matplotlib import pyplot
from matplotlib.collections import LineCollection
from PIL import Image
from support.report.run_folder import FIGURES, INJECTION, OF_LATENT, Page, sequences, write_run

from elbowroom.analysis import idata
from elbowroom.analysis.plots import events as plots
from elbowroom.analysis.plots import style as canvas
from elbowroom.analysis.plots.report import audit as plots_audit
from elbowroom.analysis.plots.report import forest as plots_forest
from elbowroom.analysis.plots.report import latent as plots_latent
from elbowroom.analysis.plots.report import posterior as plots_posterior
from elbowroom.analysis.plots.report import training as plots_training
from elbowroom.analysis.plots.report.model import prior_samples, reconstructions
from elbowroom.analysis.report import key_figures
from elbowroom.analysis.report.report import Files, write_picture, write_report
from elbowroom.analysis.verdict import summary as verdict
from elbowroom.errors import RunFolderError
from elbowroom.models.columns import image_shape


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("runs") / "toy")
    return folder, Page(write_report(folder).read_text("utf-8"))


def test_the_page_is_whole_and_self_contained(reported):
    folder, page = reported
    assert page.open == []
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    assert {"script", "link", "iframe"}.isdisjoint(page.tags)
    assert all(image["alt"] and image["width"] and image["height"] for image in page.images)
    assert "First sentence." in page.text
    assert "Second & last sentence." in page.text
    assert len(page.images) == len(FIGURES) + 10  # and a thumbnail for each of the ten worst data


def test_every_figure_is_also_a_file_at_twice_its_size(reported):
    folder, page = reported
    assert {path.stem for path in (folder / "figures").iterdir()} == FIGURES
    shown = {(int(i["width"]), int(i["height"])) for i in page.images}
    for path in (folder / "figures").iterdir():
        with Image.open(path) as image:
            width, height = image.size
        assert any(abs(2 * w - width) <= 1 and abs(2 * h - height) <= 1 for w, h in shown), path.name
    assert not list(folder.rglob("*.tmp*"))


@pytest.mark.slow
def test_the_same_files_give_the_same_report(reported):
    folder, _ = reported
    before = (folder / "report.html").read_bytes()
    assert write_report(folder).read_bytes() == before


@pytest.mark.slow
def test_no_weights_and_no_torch_are_needed(tmp_path):
    folder = write_run(tmp_path / "run", n=12)
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'pyro', 'arviz'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "from elbowroom.cli import main\n"
        "for folder, code in (('nowhere', 2), (sys.argv[1], 0)):\n"
        "    try: main(['report', folder])\n"
        "    except SystemExit as stop: assert stop.code == code, stop.code"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(folder / "report.html") in done.stdout


@pytest.mark.usefixtures("no_figures")
def test_text_is_escaped(tmp_path):
    folder = write_run(tmp_path / "run", n=12, name=INJECTION)
    text = write_report(folder).read_text("utf-8")
    assert "<script" not in text
    assert "<b>fine" not in text
    page = Page(text)
    assert page.text.count(INJECTION) >= 3  # the title, the heading and the decoder's name, all as text
    assert "<b>fine</b>" in page.text


@pytest.mark.parametrize(
    ("d", "event", "labels"),
    [
        (1, (8, 8), True),
        *(
            pytest.param(*shape, marks=pytest.mark.slow)
            for shape in ((5, (20,), True), (1, (3,), False), (2, (6,), False), (2, (20,), True), (5, (8, 8), False))
        ),
    ],
)
def test_any_latent_and_event_shape(tmp_path, d, event, labels):
    folder = write_run(tmp_path / "run", d=d, n=15, event=event, labels=labels)
    page = Page(write_report(folder).read_text("utf-8"))
    missing = {"contours"} if d > 2 else set()
    assert {path.stem for path in (folder / "figures").iterdir()} == FIGURES - missing
    if d > 2:
        assert "it can be drawn for one or two latents, this model has 5" in page.text


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("remove", "lost", "sentence"),
    [
        ("latent.nc", OF_LATENT, "the run folder has no latent.nc"),
        ("history.csv", {"training"}, "no history.csv"),
        ("posteriors", {"intervals"}, "does not hold the draws of both"),
        ("spec.yaml", set(), "no spec.yaml"),
        ("split.npz", set(), ""),
    ],
)
def test_what_is_missing_costs_a_sentence(tmp_path, reported, remove, lost, sentence):
    folder = tmp_path / "run"
    shutil.copytree(reported[0], folder)
    path = folder / remove
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = Page(write_report(folder).read_text("utf-8"))
    assert sentence in page.text
    assert {p.stem for p in (folder / "figures").iterdir()} == FIGURES - lost  # the old figure is gone, too


@pytest.mark.usefixtures("no_figures")
def test_the_audit_alone_is_enough(tmp_path, reported):
    shutil.copy(reported[0] / "audit.nc", tmp_path / "audit.nc")
    page = Page(write_report(tmp_path).read_text("utf-8"))
    assert {p.stem for p in (tmp_path / "figures").iterdir()} == {"parts", "gaps", "trust", "comparison"}
    assert "held out" not in page.text


def test_no_reference_and_no_evidence(tmp_path):
    folder = write_run(tmp_path / "run", d=5, n=12, known=0, references=False)
    page = Page(write_report(folder).read_text("utf-8"))
    assert "lower bound on log p(x), held out" in page.text
    assert "log p(x) itself is not known for any of them" in page.text
    assert "median gap –" in page.text
    assert "Anything about the gap of 12 data of 12" in page.text
    assert {"parts", "gaps", "trust", "comparison", "intervals"}.isdisjoint(p.stem for p in (folder / "figures").iterdir())


@pytest.mark.parametrize("k", [np.nan, -np.inf])
def test_without_k_hats_none_is_counted(reported, k):
    table = xr.load_dataset(reported[0] / "audit.nc").isel(reference=[])
    rows = dict(verdict.summary(table.assign(pareto_k=table["pareto_k"] * 0 + k)))
    assert rows["k-hat > 0.7"] == rows["k-hat, median (quartiles)"] == "not available"
    assert dict(verdict.summary(table))["k-hat > 0.7"] == "10 of 40"


@pytest.mark.slow
def test_one_datum(tmp_path):
    folder = write_run(tmp_path / "run", n=1)
    assert "1 datum" in Page(write_report(folder).read_text("utf-8")).text


@pytest.mark.usefixtures("no_figures")
def test_data_without_evidence_are_counted_and_enter_no_mean(tmp_path):
    folder = write_run(tmp_path / "run", n=30, known=24)
    files = Files.read(folder)
    log_p = files.audit["log_evidence"].values[:24]
    facts = {fact.label: fact for fact in key_figures.key_figures(files.audit, None, held_out=True)}
    evidence = facts["log p(x), held out"]
    assert evidence.value == f"{log_p.mean():.1f} ± {log_p.std(ddof=1) / np.sqrt(24):.1f}".replace("-", "−")
    assert "exact for 24, unknown for 6, which are not in this mean of 30 data (by grid)" in evidence.note
    assert facts["posteriors exact or certified"].value == "80%"
    assert float(facts["median gap"].value) == pytest.approx(np.median(files.audit["gap_total"].values[:24]), abs=5e-4)
    page = Page(write_report(folder).read_text("utf-8"))
    assert "6 data of 30 have no known log p(x)" in page.text
    assert "6 data without an exact or certified reference are left out" in page.text
    assert "Anything about the gap of 6 data of 30" in page.text


@pytest.mark.usefixtures("no_figures")
def test_a_random_sample_stands_for_all(tmp_path):
    """Of 40 data 24 are the sample; the worst of all are listed, also those outside it."""
    folder = write_run(tmp_path / "run", n=40)
    table = idata.read_table(folder / "audit.nc")
    inside = np.arange(40) < 24
    proxy = table["gap_total"].values + 0.01
    table = table.assign(
        in_sample=("obs_id", inside.astype(float)),
        proxy_iwae=("obs_id", proxy),
        proxy_variance=("obs_id", np.log1p(proxy.clip(0))),
    )
    idata.write(table, folder / "audit.nc")
    files = Files.read(folder)
    assert files.audit.sizes["obs_id"] == 24
    assert files.whole.sizes["obs_id"] == 40
    assert all(len(tree["posterior"]["obs_id"]) == 24 for tree in files.posteriors.values())
    (first,) = key_figures.of_all(files.whole)
    assert first.label == "mean gap of all 40 data"
    assert abs(float(first.value) - table["gap_total"].values.mean()) < 0.02  # the proxy is all but the gap
    page = Page(write_report(folder).read_text("utf-8"))
    assert "from a random sample of 24 data" in page.text
    worst = int(np.nanargmax(table["gap_total"].values))
    assert key_figures.worst_rows(files.whole)[0].obs_id == int(table["obs_id"].values[worst])


def test_a_negative_gap_is_shown_and_said(reported):
    _, page = reported
    assert "1 datum has a negative gap, all within 3 standard errors of 0" in page.text


def test_bits_are_said_of_discrete_data_only(tmp_path, reported):
    assert "bits per dimension" not in reported[1].text
    folder = write_run(tmp_path / "run", n=12, likelihood="bernoulli")
    files = Files.read(folder)
    assert files.entries == 64
    bits = -files.audit["log_evidence"].values / (64 * np.log(2))
    note = key_figures.key_figures(files.audit, 64, held_out=True)[0].note
    written = re.search(r"([0-9.]+) ± ([0-9.]+) bits per dimension\.", note)
    assert written is not None
    error = bits.std(ddof=1) / 12**0.5
    np.testing.assert_allclose([float(part) for part in written.groups()], [bits.mean(), error], atol=0.06 * error)


def test_the_worst_rows_are_the_worst(reported):
    files = Files.read(reported[0])
    gap = files.audit["gap_total"].values
    rows = key_figures.worst_rows(files.audit)
    assert [row.obs_id for row in rows] == files.audit["obs_id"].values[np.argsort(-gap)][:10].tolist()
    assert rows[0].cells[2].startswith(canvas.say(gap.max()))
    bounded = write_run(reported[0].parent / "bounded", n=12, known=8)
    cells = [row.cells for row in key_figures.worst_rows(Files.read(bounded).audit, 12)]
    assert [("(bound)" in c[1], "≥" in c[1]) for c in cells] == [(False, False)] * 8 + [(True, True)] * 4


def test_the_weights_kept_are_the_best_at_full_kl_weight(reported):
    assert "Validation ELBO is highest at epoch 15 of 20" in reported[1].text
    assert "the model over-fits" in reported[1].text


def test_the_words_of_the_contours_are_true(reported):
    data = Files.read(reported[0]).latent["density"].to_dataset()
    caption = plots_posterior.contours(Files.read(reported[0]).latent).caption
    case = data.isel(case=2)
    q, p = np.exp(case["log_guide"].values), np.exp(case["log_posterior"].values)
    inside = q >= -np.sort(-q.ravel())[np.searchsorted(np.cumsum(-np.sort(-q.ravel())), 0.9 * q.sum())]
    assert f"{canvas.percent(p[inside].sum() / p.sum())} (worst)" in caption


def test_the_picture_of_the_readme(tmp_path, reported):
    with Image.open(write_picture(reported[0], tmp_path / "images" / "picture.png")) as image:
        assert image.size[0] == 2300
    write_run(tmp_path / "deep", d=5, n=12)
    with pytest.raises(RunFolderError, match="one or two latents, this model has 5"):
        write_picture(tmp_path / "deep", tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()


@pytest.mark.slow
def test_nothing_global_changes(reported):
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"axes.facecolor": "black"}):
        write_report(reported[0])
        assert matplotlib.rcParams["axes.facecolor"] == "black"
    assert dict(matplotlib.rcParams) == before
    assert pyplot.get_fignums() == []


def test_no_audit_is_one_line(tmp_path):
    with pytest.raises(RunFolderError, match=r"no audit.nc here; run `elbowroom audit .*` first"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["audit.nc", "latent.nc", "spec.yaml", "split.npz", "posteriors/guide.nc"])
def test_a_damaged_file_is_named(tmp_path, reported, name):
    folder = tmp_path / "run"
    shutil.copytree(reported[0], folder)
    (folder / name).write_bytes(b"\x00: [")
    with pytest.raises(RunFolderError, match=re.escape(str(folder / name)) + ": damaged"):
        write_report(folder)


@pytest.mark.usefixtures("no_figures")
def test_files_of_different_audits_are_noticed(tmp_path, reported):
    folder = tmp_path / "run"
    shutil.copytree(reported[0], folder)
    with xr.open_dataset(folder / "audit.nc", engine="h5netcdf") as audit:
        moved = audit.load().assign_coords(obs_id=audit["obs_id"].values + 1)
    moved.to_netcdf(folder / "audit.nc", engine="h5netcdf")
    assert "hold different data; run the audit again" in Page(write_report(folder).read_text("utf-8")).text


def test_heavy_tails_and_equal_gaps_are_drawn(reported):
    audit = Files.read(reported[0]).audit
    n = audit.sizes["obs_id"]
    for gap in (np.geomspace(1e-3, 1e3, n), np.full(n, 0.2), np.zeros(n), np.linspace(-1, 40, n) ** 3):
        table = audit.assign(gap_total=("obs_id", gap))
        for plot in (plots_audit.gaps(table), plots_audit.trust(table)):
            assert isinstance(plot, canvas.Plot)
            plot.figure.savefig(Path("/dev/null"), format="png")
            assert "nan" not in plot.caption


def test_the_intervals_are_of_the_latents_with_the_highest_rate(tmp_path):
    """As in the pictures of the latent space; without rates they are the first four."""
    files = Files.read(write_run(tmp_path / "run", d=5, n=12))
    rate = np.array([0.1, 3.0, 0.2, 2.0, 1.0])
    encoding = files.latent["encoding"].to_dataset().assign(rate=("latent", rate))
    plot = plots_forest.intervals(files.audit, files.posteriors, xr.DataTree.from_dict({"encoding": encoding}))
    names = lambda plot: {text.get_text() for text in plot.figure.axes[0].texts if text.get_text().startswith("z[")}
    assert names(plot) == {"z[1]", "z[2]", "z[3]", "z[4]"}
    assert names(plots_forest.intervals(files.audit, files.posteriors)) == {"z[0]", "z[1]", "z[2]", "z[3]"}


def test_words_of_the_worst_data(reported):
    audit = Files.read(reported[0]).audit
    n = audit.sizes["obs_id"]
    caption = lambda gap, rows: (
        plots_audit.gaps(audit.isel(obs_id=slice(rows)).assign(gap_total=("obs_id", gap[:rows]))).caption
    )
    assert f"the 2 worst of {n} data carry 5.0% of the sum: the loss is spread" in caption(np.full(n, 0.2), n)
    uneven = np.ones(n)
    uneven[0] = 4.0
    one = "and the worst of 15 data carries 22% of the sum, where 6.7% would be an even share: few data weigh heavily"
    assert one in caption(uneven, 15)
    uneven[:2] = 100.0
    assert "the guide fails on a few data, not on all" in caption(uneven, n)


def test_nothing_is_cut_off_or_covered(reported):
    """The rug is inside the axes, the shading reaches the edge, the legend leaves the start of the KL weight free."""
    files = Files.read(reported[0])
    rug = next(c for c in plots_audit.gaps(files.audit).figure.axes[0].collections if isinstance(c, LineCollection))
    assert all((segment[:, 1] >= 0).all() for segment in rug.get_segments())
    axes = plots_audit.trust(files.audit).figure.axes[0]
    shade = next(patch for patch in axes.patches if patch.get_x() == 0.7)
    assert shade.get_x() + shade.get_width() == pytest.approx(axes.get_xlim()[1])
    figure = plots_training.training(files.history).figure
    figure.draw_without_rendering()
    below = figure.axes[1]
    weight = below.transData.transform(below.lines[1].get_xydata())
    box = below.get_legend().get_window_extent()
    assert not any(box.contains(x, y) for x, y in weight)


def test_intervals_of_methods_with_different_chains_and_of_bounds(reported):
    """hmc has eight chains where others have four, and certified posteriors may have no log p(x), only a bound."""
    files = Files.read(reported[0])
    posteriors = dict(files.posteriors)
    draws = posteriors["grid"]["posterior"].to_dataset()
    k = draws.sizes["draw"] // 2 - 1
    halves = [draws.isel(draw=slice(start, start + k)).assign_coords(draw=range(k)) for start in (0, k)]
    eight = xr.concat(halves, "chain").assign_coords(chain=range(8))
    posteriors["grid"] = xr.DataTree.from_dict({"posterior": eight})
    plot = plots_forest.intervals(files.audit, posteriors)
    assert isinstance(plot, canvas.Plot)
    table = files.audit.assign(gap_total=files.audit["gap_total"] * np.nan, gap_total_lower=files.audit["gap_total"])
    bounded = plots_forest.intervals(table, posteriors)
    assert isinstance(bounded, canvas.Plot)
    assert any("≥" in text.get_text() for axes in bounded.figure.axes for text in axes.texts)
    distance = xr.full_like(table["mean_error"], 0.1)
    assert "every latent is discrete" in plots_forest.intervals(table.assign(total_variation=distance), posteriors).reason
    nothing = plots_forest.intervals(table.assign(gap_total_lower=table["gap_total"]), posteriors)
    assert "no datum has both" in nothing.reason


def test_the_plane_of_a_table_names_its_columns_and_measures_each_in_its_own_unit():
    """An income in thousands beside a rate below 1 hides nothing: each column counts in sds of the audited data."""
    z, sd = np.linspace(-2.0, 2.0, 5), np.array([5000.0, 0.1])
    expected = np.stack([20_000 + 500 * z, 0.3 + 0.1 * z], 1)
    plane = xr.Dataset({"expected_x": (("c", "x"), expected), "z_column": ("c", z)}, attrs={"latents": [0]})
    beside = xr.Dataset({"x_mean": ("x", np.array([20_000.0, 0.3])), "x_sd": ("x", sd)})
    tree = xr.DataTree.from_dict({"/": xr.Dataset(attrs={"latent_dim": 1}), "plane": plane, "reconstruction": beside})
    bare = plots_latent.plane(tree)
    assert [line.get_label() for line in bare.figure.axes[0].lines] == ["entry 0", "entry 1"]
    tree.attrs["columns"] = ["income", "rate"]
    plot = plots_latent.plane(tree)
    lines = {line.get_label(): line.get_ydata() for line in plot.figure.axes[0].lines}
    np.testing.assert_allclose(lines["income"], 0.1 * z, atol=1e-9)
    np.testing.assert_allclose(lines["rate"], z, atol=1e-9)
    assert "sd of the data" in plot.figure.axes[0].get_ylabel()
    assert "sd of the data" in plot.caption
    assert "data's units" not in plot.caption
    tree["encoding"] = xr.DataTree(xr.Dataset({"loc": ("obs_id", np.zeros(9))}))
    assert "the 9 audited rows: so few" in plots_latent.plane(tree).caption


@pytest.mark.parametrize("d", [1, 2])
def test_sequences_are_drawn_by_feature_against_step(d):
    """A line for each feature, in the order of the steps, as far as there are data."""
    tree, x = sequences(2, d)
    for plot in (prior_samples(tree, x), prior_samples(tree, None)):
        assert [axes.get_title(loc="left") for axes in plot.figure.axes] == ["feature 0", "feature 1"]
        np.testing.assert_allclose(plot.figure.axes[1].lines[0].get_ydata()[:4], x[:, :4, 1].mean(0))
    plot = reconstructions(tree)
    shown = {tuple(line.get_ydata()) for axes in plot.figure.axes for line in axes.lines}
    assert shown == {tuple(x[n, :4, f]) for n in (0, 2, 5, 7) for f in (0, 1)}
    plot = plots_latent.plane(tree)
    assert len(plot.figure.axes) == 2 * d
    lines = plot.figure.axes[1].lines
    np.testing.assert_allclose([line.get_ydata()[3] for line in lines], 31 + (100 if d == 2 else 1) * np.linspace(-2, 2, 5))
    assert {axes.get_xlabel() for axes in plot.figure.axes[-2:]} == {"step"}


def test_sequences_of_many_features_are_heat_maps_and_no_images():
    """(T, F) with F >= 4 could be an image: that it is not is said by the description."""
    tree, x = sequences(7)
    assert plots.event_image(tree) is None
    pictures = [axes.images[0].get_array() for axes in reconstructions(tree).figure.axes if axes.images]
    assert [picture.shape for picture in pictures] == 8 * [(7, 4)]
    np.testing.assert_array_equal(pictures[0], x[0, :4].T)
    for plot, panels in (
        (prior_samples(tree, x), 4),
        (prior_samples(tree, None), 2),
        (plots_latent.plane(tree), 6),
    ):
        assert [axes.images[0].get_array().shape for axes in plot.figure.axes if axes.images] == panels * [(7, 6)]
    del tree.attrs["sequence"]
    assert plots.event_image(tree) == (6, 7)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1.23456, "1.23"),
        (-20.961, "−21.0"),
        (0.00671, "0.0067"),
        (0.097, "0.097"),
        (1234567.0, "1.2e+06"),
        (np.nan, "not known"),
        (-np.inf, "−∞"),
        (1482.3, "1482"),
    ],
)
def test_say(value, text):
    assert canvas.say(value) == text


def test_percent_keeps_all_and_none_for_all_and_none():
    assert canvas.percent(5, 5) == "100%"
    assert canvas.percent(9999, 10000) == "99.9%"
    assert canvas.percent(1, 100000) == "0.1%"
    assert canvas.percent(0, 7) == "0%"
    assert canvas.percent(1, 2) == "50%"


def test_region_levels_of_a_normal():
    z = np.linspace(-8, 8, 16001)
    levels = canvas.region_levels(-0.5 * z**2)
    assert np.sqrt(-2 * np.array(levels)) == pytest.approx([0.6745, 1.6449], abs=2e-3)
    assert canvas.mass_inside(-0.5 * z**2, np.abs(z) < 1.6449) == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize(
    ("event", "declared", "shape"),
    [
        ((8, 8), None, (8, 8)),
        ((64,), None, (8, 8)),
        ((1, 28, 28), None, (28, 28)),
        ((16,), None, None),
        ((63,), None, None),
        ((12,), (3, 4), (3, 4)),
        ((12,), (5, 5), None),
        ((), None, None),
        ((2, 3), None, None),
    ],
)
def test_image_shape(event, declared, shape):
    assert image_shape(event, declared) == shape


def test_tiles_stand_where_their_labels_are():
    figure = canvas.canvas(4, 4, "tiles")
    axes = figure.subplots()
    images = np.zeros((3, 2, 8, 8))
    images[2, 1] = 1  # the last row, at the bottom
    canvas.show_tiles(axes, images, (0, 1))
    sheet, (left, right, bottom, top) = axes.images[0].get_array(), axes.images[0].get_extent()
    height, width = sheet.shape
    at = lambda x, y: sheet[int((y - top) / (bottom - top) * height), int((x - left) / (right - left) * width)]
    assert at(1, 2) == 1
    assert at(0, 0) == at(1, 1) == at(0, 2) == 0
    assert plots.event_image(None) is None
