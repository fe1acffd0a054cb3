"""Figures show the numbers they are given; they leave matplotlib as it was, and files whole."""

from __future__ import annotations

import csv
import io
import itertools
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import pyro_vae as pv
from pyro_vae.evaluation.likelihood import Evaluation
from pyro_vae.reporting import columns, curves, latents, style
from pyro_vae.training.compare import Comparison

plots: Any = pv.plots  # matplotlib's types say too little to look into a figure


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    """No figure in pyplot's hands, no setting changed; and what was made can be drawn."""
    before = dict(matplotlib.rcParams)
    yield
    assert dict(matplotlib.rcParams) == before
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        assert pyplot.get_fignums() == []


def numbers(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).uniform(size=shape)


def picture(figure: Any, number: int = 0) -> Any:
    """What an image of the one axes shows, drawn once without a warning."""
    figure.savefig(io.BytesIO(), format="png", dpi=30)
    (axes,) = figure.axes
    return axes.images[number].get_array()


def labels(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def widths(bars: Any) -> list[float]:
    """Half the lengths of horizontal error bars."""
    (lines,) = bars[2]
    return [float(np.ptp(segment[:, 0]) / 2) for segment in lines.get_segments()]


# ---------------------------------------------------------------------------------------------
# Images


@pytest.mark.parametrize("shape", [(5, 4), (1, 5, 4), (20,)])
def test_samples_are_a_grid_of_the_images(shape: tuple[int, ...]):
    images = torch.as_tensor(numbers(5, *shape))
    figure = plots.samples(images, columns=3, image_shape=(5, 4) if len(shape) == 1 else None)
    canvas, cells = picture(figure), images.reshape(5, 5, 4).numpy()
    assert canvas.shape == (2 * 5 + 1, 3 * 4 + 2)  # a pixel between them
    for i in range(5):
        top, left = 6 * (i // 3), 5 * (i % 3)
        np.testing.assert_array_equal(canvas[top : top + 5, left : left + 4], cells[i])
    assert canvas[:, 4].mask.all()
    assert canvas[5].mask.all()
    assert canvas[6:, 10:].mask.all()  # there is no sixth
    assert figure.axes[0].images[0].get_clim() == (0, 1)


@pytest.mark.parametrize(
    ("top", "wanted"), [(1.0, (0, 1)), (0.7, (0, 1)), (16.0, (0, 16)), (200.0, (0, 255))]
)
def test_black_and_white_are_those_of_the_data(top: float, wanted: tuple[float, float]):
    images = numbers(4, 6, 6)
    images *= top / images.max()
    assert plots.samples(images).axes[0].images[0].get_clim() == pytest.approx(wanted)
    signed = images - top
    clim = plots.samples(signed).axes[0].images[0].get_clim()
    assert clim == pytest.approx((signed.min(), 0))


def test_colour_images():
    images = np.round(255 * numbers(3, 3, 8, 8)).astype(np.uint8)
    canvas = picture(plots.samples(images, columns=2))
    np.testing.assert_allclose(canvas[9:17, :8, :3], images[2].transpose(1, 2, 0) / 255)
    assert (canvas[9:17, :8, 3] == 1).all()
    assert (canvas[8, :, 3] == 0).all()
    assert (canvas[9:, 9:, 3] == 0).all()


def test_reconstructions_stand_below_their_originals():
    x, mean = numbers(5, 8, 8), numbers(5, 8, 8, seed=1)
    seen = numbers(5, 8, 8, seed=2) < 0.7
    x[1, 0, 0] = np.nan
    figure = plots.reconstructions(x, mean, seen, columns=3)
    canvas = picture(figure)
    assert canvas.shape == (4 * 8 + 3, 3 * 8 + 2)
    np.testing.assert_array_equal(canvas[:8, 18:], x[2])
    np.testing.assert_array_equal(canvas[9:17, 18:], mean[2])
    np.testing.assert_array_equal(canvas[18:26, :8], x[3])
    np.testing.assert_array_equal(canvas[27:, :8], mean[3])
    axes = figure.axes[0]
    assert labels(axes.yaxis) == ["original", "reconstruction"] * 2
    middles = [9 * i + 3.5 for i in range(4)]
    assert axes.get_yticks().tolist() == middles

    paint = picture(figure, 1)
    np.testing.assert_array_equal(paint[:8, 18:, 3], ~seen[2])
    np.testing.assert_array_equal(paint[:8, 9:17, 3], ~seen[1] | np.isnan(x[1]))
    assert (paint[9:17, ..., 3] == 0).all()
    assert len(plots.reconstructions(x[2:], mean[2:]).axes[0].images) == 1  # nothing is missing


def test_names_fit_beside_the_images():
    figure = plots.reconstructions(numbers(2, 8, 8), numbers(2, 8, 8))
    figure.savefig(io.BytesIO(), format="png")
    for label in figure.axes[0].get_yticklabels():
        assert label.get_window_extent().x0 > 0


def test_a_pixel_in_colour_is_missing_if_any_part_is():
    x, seen = numbers(1, 3, 8, 8), np.ones((1, 3, 8, 8), bool)
    seen[0, 1, 2, 3] = False
    paint = picture(plots.reconstructions(x, x, seen), 1)
    assert np.argwhere(paint[..., 3] > 0).tolist() == [[2, 3]]


def test_interpolations_are_lines_of_images():
    images = numbers(2, 4, 8, 8)
    figure = plots.interpolations(images)
    canvas = picture(figure)
    assert canvas.shape == (2 * 8 + 1, 4 * 8 + 3)
    np.testing.assert_array_equal(canvas[9:, 9:17], images[1, 1])
    assert labels(figure.axes[0].xaxis) == ["first", "", "", "second"]
    flat = plots.interpolations(images.reshape(2, 4, 64), image_shape=(8, 8))
    np.testing.assert_array_equal(picture(flat), canvas)


def test_traversals_are_ordered_by_rate():
    images, rate = numbers(3, 5, 8, 8), torch.tensor([0.25, 3.0, 1.5])
    values = [-2.0, -1.0, 0.0, 1.0, 2.5]
    figure = plots.traversals(images, values, rate=rate, dims=[4, 7, 2])
    canvas, axes = picture(figure), figure.axes[0]
    for line, dim in enumerate([1, 2, 0]):
        np.testing.assert_array_equal(canvas[9 * line : 9 * line + 8, 9:17], images[dim, 1])
    assert labels(axes.yaxis) == ["z[7]  3.00 nats", "z[2]  1.50 nats", "z[4]  0.25 nats"]
    assert labels(axes.xaxis) == ["−2", "−1", "0", "1", "2.5"]  # noqa: RUF001
    assert axes.get_xlabel() == "value of the dimension"
    two = plots.traversals(images, values, rate=rate, top=2, latent="style")
    assert labels(two.axes[0].yaxis) == ["style[1]  3.00 nats", "style[2]  1.50 nats"]
    plain = plots.traversals(images)
    assert labels(plain.axes[0].yaxis) == ["z[0]", "z[1]", "z[2]"]


# ---------------------------------------------------------------------------------------------
# Tables


def test_samples_of_a_table_are_histograms_beside_the_data():
    drawn, data = torch.randn(400, 3), torch.randn(300, 3)
    drawn[:, 2], data[:, 2] = torch.randint(0, 4, (400,)).double(), 2.0
    data[5, 0] = torch.nan
    figure = plots.samples(drawn, data, names=["age", "height", "children"])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["age", "height", "children"]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
        "data",
        "samples",
    ]
    for column, axes in enumerate(figure.axes):
        known = data[:, column][~data[:, column].isnan()].numpy()
        together = np.concatenate([known, drawn[:, column].numpy()])
        edges = np.linspace(together.min(), together.max(), 18 + 1)  # 299 is the smaller
        edges = np.arange(-0.5, 4) if column == 2 else edges
        for patch, values in zip(axes.patches, (known, drawn[:, column].numpy()), strict=True):
            heights, _ = np.histogram(values, edges, density=True)
            tops = patch.get_path().vertices[1 : 2 * len(heights) + 1 : 2, 1]
            np.testing.assert_allclose(tops, heights)
    alone = plots.samples(drawn)
    assert [len(axes.patches) for axes in alone.axes] == [1, 1, 1]
    assert alone.axes[0].get_title(loc="left") == "column[0]"
    assert plots.samples(drawn[:, 0], data[:, 0]).axes[0].patches  # rows of one number


def test_reconstructions_of_a_table_are_scattered_against_it():
    x, mean = numbers(60, 2), numbers(60, 2, seed=1)
    x[3, 1], seen = np.nan, np.ones((60, 2), bool)
    seen[7, 1] = False
    figure = plots.reconstructions(x, mean, seen)
    first, second = figure.axes
    (dots,) = first.collections
    np.testing.assert_array_equal(dots.get_offsets(), np.stack([x[:, 0], mean[:, 0]], 1))
    (dots,) = second.collections
    kept = np.delete(np.arange(60), [3, 7])
    np.testing.assert_array_equal(dots.get_offsets(), np.stack([x[kept, 1], mean[kept, 1]], 1))
    ends = first.lines[0].get_xydata()
    np.testing.assert_array_equal(ends[:, 0], ends[:, 1])
    told = 1 - ((x - mean)[:, 0] ** 2).mean() / x[:, 0].var()
    assert [text.get_text() for text in first.texts] == [f"R² {told:.2f}, n = 60"]
    assert second.texts[0].get_text().endswith(", n = 58")
    for axes in figure.axes:
        assert axes.get_xlim() == axes.get_ylim()
        assert axes.get_xticks().tolist() == axes.get_yticks().tolist()
    assert second.texts[1].get_text() == "2 missing"


@pytest.mark.parametrize(("rows", "bins"), [(64, 8), (65, 9), (5000, columns.BINS)])
def test_few_draws_have_few_bins(rows: int, bins: int):
    drawn, data = numbers(rows, 1), numbers(6000, 1, seed=1)
    data[:6, 0] = np.nan
    for patch in plots.samples(drawn, data).axes[0].patches:
        assert len(np.unique(patch.get_xy()[:, 0])) == bins + 1
    assert len(plots.samples(drawn, np.full((3, 1), np.nan)).axes[0].patches) == 1


def test_long_titles_end_within_the_figure():
    long, short = "od280/od315_of_diluted_wines", "alcohol"
    figure = plots.samples(numbers(9, 4), names=[short, "nonflavanoid_phenols", long, 3 * long])
    figure.savefig(io.BytesIO(), format="png")
    titles = [axes.title if axes.get_title() else axes._left_title for axes in figure.axes]
    for title, axes in zip(titles, figure.axes, strict=True):
        assert title.get_window_extent().x1 <= axes.get_tightbbox().x1 <= figure.bbox.x1
    for left, right in pairwise(titles):
        assert left.get_window_extent().x1 < right.get_window_extent().x0
    assert [titles[0].get_text(), titles[1].get_text()] == [short, "nonflavanoid_phenols"]
    for title in titles[2:]:
        start, end = title.get_text().split("…")
        assert long.startswith(start)
        assert long.endswith(end)
        assert len(start) + len(end) > 12


def test_many_columns_are_cut_and_it_says_so():
    figure = plots.reconstructions(numbers(20, 30), numbers(20, 30))
    assert len(figure.axes) == columns.SHOWN
    assert figure.get_suptitle() == f"the first {columns.SHOWN} of 30 columns"
    figure.savefig(io.BytesIO(), format="png", dpi=30)


# ---------------------------------------------------------------------------------------------
# Latents


def scatters(figure: Any) -> list[Any]:
    return [each for each in figure.axes[0].collections if isinstance(each, PathCollection)]


def test_the_map_shows_two_active_dimensions():
    mean = numbers(50, 4) * np.array([0.01, 3.0, 0.02, 2.0])
    y = np.arange(50) % 3
    figure = plots.latent_map(mean, y, label="digit")
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("E[z[1] | x]", "E[z[3] | x]")
    for number, dots in enumerate(scatters(figure)):
        np.testing.assert_array_equal(dots.get_offsets(), mean[y == number][:, [1, 3]])
        assert to_hex(dots.get_facecolor()[0]) == style.COLOURS[number].lower()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["0", "1", "2"]
    assert legend.get_title().get_text() == "digit"


def test_the_map_of_more_is_that_of_principal_components():
    g = torch.Generator().manual_seed(1)
    mean = torch.randn(300, 2, 3, generator=g)  # events are flattened
    points = mean.reshape(300, 6).numpy()
    figure = plots.latent_map(mean, latent="w")
    (dots,) = scatters(figure)
    values, directions = np.linalg.eigh(np.cov(points.T))
    wanted = (points - points.mean(0)) @ directions[:, [-1, -2]]
    offsets = np.asarray(dots.get_offsets())
    np.testing.assert_allclose(np.abs(offsets), np.abs(wanted), atol=1e-10)
    for i, text in enumerate((figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel())):
        share = values[-1 - i] / values.sum()
        assert text == f"principal component {i + 1} of E[w | x] ({share:.0%} of variance)"
    chosen = plots.latent_map(mean, dims=(5, 0))
    np.testing.assert_array_equal(scatters(chosen)[0].get_offsets(), points[:, [5, 0]])
    assert chosen.axes[0].get_xlabel() == "E[z[5] | x]"


def test_labels_are_classes_or_a_colour_bar():
    mean = numbers(400, 2)
    names = np.array(["b", "a"])[np.arange(400) % 2]
    legend = plots.latent_map(mean, names).legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    many = plots.latent_map(mean, torch.arange(400) % 20)
    looks = {
        (to_hex(dots.get_facecolor()[0]), len(dots.get_paths()[0].vertices))
        for dots in scatters(many)
    }
    assert len(looks) == latents.CLASSES  # no two look alike
    many.savefig(io.BytesIO(), format="png", dpi=30)
    assert many.bbox.contains(*many.legends[0].get_window_extent().min)
    heat = numbers(400, seed=3)
    figure = plots.latent_map(mean, heat, label="heat (K)")
    np.testing.assert_array_equal(scatters(figure)[0].get_array(), heat)
    assert figure.axes[1].get_ylabel() == "heat (K)"
    assert not figure.legends
    assert len(plots.latent_map(mean, np.arange(400)).axes) == 2  # too many to be classes


@pytest.mark.parametrize("rows", [200, 5000])
def test_points_of_the_map_are_seen(rows: int):
    classes = plots.latent_map(numbers(rows, 2), np.arange(rows) % 10)
    assert len({to_hex(dots.get_facecolor()[0]) for dots in scatters(classes)}) == 10
    for dots in scatters(classes):
        assert dots.get_sizes()[0] >= 16
        assert 0.35 <= dots.get_alpha() <= (0.85 if rows == 200 else 0.5)
    assert all(handle.get_alpha() == 1 for handle in classes.legends[0].legend_handles)


@pytest.mark.parametrize(
    "given",
    [
        np.array([0, 1, np.nan, 1, 0, np.nan]),
        np.array(["a", "b", None, "b", "a", None], dtype=object),
        np.array([0.5, 1.5, np.nan, 1.0, 0.0, np.nan]),
    ],
    ids=["numbers", "names", "heat"],
)
def test_rows_without_a_label_are_grey_and_counted(given: Any):
    mean = numbers(6, 2)
    figure = plots.latent_map(mean, given, dims=(0, 1), label="y")
    missing, *known = scatters(figure)
    np.testing.assert_array_equal(missing.get_offsets(), mean[[2, 5]])
    assert to_hex(missing.get_facecolor()[0]) == latents.PALE.lower()
    assert sum(len(dots.get_offsets()) for dots in known) == 4
    assert figure.axes[0].get_title(loc="left") == "y: missing in 2 of 6 rows (grey)"
    nothing = plots.latent_map(mean, np.full(6, np.nan))
    assert len(scatters(nothing)) == 1
    assert not nothing.legends


def test_rates_are_sorted_and_the_active_are_coloured():
    rate, active = torch.tensor([0.5, 2.0, 0.001, 0.02]), torch.tensor([True, True, False, False])
    figure = plots.rates(rate, active)
    (axes,) = figure.axes
    bars = axes.patches
    assert [bar.get_height() for bar in bars] == [2.0, 0.5, 0.02, 0.001]
    assert labels(axes.xaxis) == ["1", "0", "3", "2"]
    colours = [to_hex(bar.get_facecolor()) for bar in bars]
    assert colours[:2] == [style.COLOURS[0].lower()] * 2
    assert len(set(colours)) == 2
    assert colours[2] == colours[3]
    assert axes.get_title(loc="left") == "z: 2.5 nats\n2 of 4 active"
    assert axes.get_ylabel() == "rate (nats)"
    assert not axes.lines  # grey is another criterion's
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["not active"]
    assert to_hex(axes.get_legend().get_patches()[0].get_facecolor()) == colours[2]
    assert plots.rates(rate, torch.ones(4)).axes[0].get_legend() is None
    by_rate = plots.rates(rate, threshold=0.6).axes[0]
    assert by_rate.get_title(loc="left") == "z: 2.5 nats\n1 of 4 active"
    assert set(by_rate.lines[0].get_ydata()) == {0.6}
    assert by_rate.get_legend() is None
    assert set(plots.rates(rate).axes[0].lines[0].get_ydata()) == {latents.THRESHOLD}


def test_rates_of_several_sites_stand_side_by_side():
    rate = {"z1": torch.ones(2, 40), "z2": torch.tensor([3.0])}
    assert labels(plots.rates(torch.ones(40)).axes[0].xaxis) == [str(i) for i in range(40)]
    figure = plots.rates(rate, {"z1": torch.ones(2, 40)})
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "z1: 80.0 nats\n80 of 80 active",
        "z2: 3.0 nats\n1 of 1 active",
    ]
    assert labels(figure.axes[0].xaxis) == []  # too many to be read
    figure.savefig(io.BytesIO(), format="png", dpi=30)


def test_titles_of_narrow_panels_do_not_meet():
    figure = plots.rates({"z1": torch.ones(8), "z2": 100 * torch.ones(1), "z3": torch.ones(2)})
    figure.canvas.draw()
    boxes = [axes._left_title.get_window_extent() for axes in figure.axes]
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))
    assert boxes[-1].x1 <= figure.bbox.x1


def test_weights_are_counted_on_both_sides_of_the_threshold():
    khat = torch.cat([torch.linspace(0.1, 0.69, 30), torch.linspace(0.71, 2.0, 60)])
    khat = torch.cat([khat, torch.tensor([torch.inf, -torch.inf])])
    figure = plots.weights(khat, 0.7)
    axes = figure.axes[0]
    for bars, wanted in zip(axes.containers, (30, 60), strict=True):
        assert sum(bar.get_height() for bar in bars.patches) == wanted
    good, bad = axes.containers
    assert all(bar.get_x() >= 0.7 - 1e-12 for bar in bad.patches if bar.get_height())
    assert all(
        bar.get_x() + bar.get_width() < 0.7 + 1e-12 for bar in good.patches if bar.get_height()
    )
    assert axes.get_title(loc="left") == f"{61 / 92:.0%} of 92 rows above 0.70"
    assert axes.lines[0].get_xdata() == [0.7, 0.7]
    told = plots.weights(khat, 0.7, num_particles=500).axes[0].get_title(loc="left")
    assert told == f"{61 / 92:.0%} of 92 rows above 0.70, K = 500"


# ---------------------------------------------------------------------------------------------
# Runs


def history(epochs: int = 6, valid: bool = True) -> list[dict[str, float]]:
    records = [
        {"step": 10.0 * i, "epoch": float(i), "seconds": 0.5 * i, "loss": 100 / i, "lr": 1e-3}
        for i in range(1, epochs + 1)
    ]
    bounds = [-90.0, -50.0, -40.0, -30.0, -35.0, -36.0]
    return [r | {"valid": bounds[i]} for i, r in enumerate(records)] if valid else records


@pytest.mark.parametrize("from_file", [False, True])
def test_training_shows_loss_and_held_out_bound(from_file: bool):
    records: list[Any] = history()
    if from_file:
        text = io.StringIO()
        writer = csv.DictWriter(text, records[0])
        writer.writeheader()
        writer.writerows(records)
        records = list(csv.DictReader(io.StringIO(text.getvalue())))
    figure = plots.training(records)
    (axes,) = figure.axes
    loss, valid, best = axes.lines
    assert loss.get_ydata().tolist() == [-100 / i for i in range(1, 7)]
    assert valid.get_ydata().tolist() == [-90.0, -50.0, -40.0, -30.0, -35.0, -36.0]
    assert best.get_xydata().tolist() == [[4.0, -30.0]]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "bound (nats per row)")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "training (minus loss)",
        "held out, and its best",
    ]
    by_time = plots.training(records, x="seconds").axes[0]
    assert by_time.lines[0].get_xdata().tolist() == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert by_time.get_xlabel() == "time (s)"


def test_several_runs_have_a_colour_each():
    figure = plots.training({"a": history(), "b": history(3, valid=False)}, x="step")
    (axes,) = figure.axes
    assert [line.get_color() for line in axes.lines] == [style.COLOURS[0]] * 3 + [style.COLOURS[1]]
    told = [text.get_text() for text in figure.legends[0].get_texts()]
    assert told == ["a", "b", "training (minus loss)", "held out, and its best"]


def test_a_first_epoch_out_of_proportion_is_left_outside():
    records = [{"epoch": float(i), "loss": 100.0 - i} for i in range(20)]
    low = plots.training([{"epoch": -1.0, "loss": 1e6}, *records]).axes[0].get_ylim()[0]
    assert -150 < low < -100
    failed = [*records, {"epoch": 20.0, "loss": float("nan")}]
    assert np.isfinite(plots.training(failed).axes[0].get_ylim()).all()
    one = plots.training(records[:1]).axes[0]
    assert one.lines[0].get_marker() == "."  # a line through one point is not to be seen
    assert one.get_ylim() == (-101, -99)


@pytest.mark.parametrize(
    ("last", "ticks"),
    [(1, [1]), (5, [1, 2, 3, 4, 5]), (47, [5, 10, 15, 20, 25, 30, 35, 40, 47]), (3431, None)],
)
def test_the_last_epoch_has_a_tick(last: int, ticks: list[float] | None):
    records = [
        {"epoch": float(i), "loss": 1 + 1 / i, "valid": -1 - 2 / i} for i in range(1, last + 1)
    ]
    figure = plots.training(records)
    (axes,) = figure.axes
    came = axes.get_xticks().tolist()
    assert came[-1] == last
    assert came == (ticks or came)
    figure.savefig(io.BytesIO(), format="png")
    spans = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert all(a.x1 < b.x0 for a, b in pairwise(spans))
    assert not figure.legends[0].get_window_extent().overlaps(axes.get_window_extent())


def compared() -> list[dict[str, Any]]:
    """Real summaries of evaluations with known rows."""
    rows = 50

    def evaluation(shift: float, seed: int) -> Evaluation:
        log_p = torch.randn(rows, generator=torch.Generator().manual_seed(seed)) + shift
        zero = torch.zeros(rows)
        sites: Any = {
            "rate": {"z": torch.ones(2)},
            "active": {"z": torch.ones(2, dtype=torch.bool)},
        }
        return Evaluation(
            log_p, log_p - 1, log_p - 2, zero + 5, zero, **sites, num_particles=500,
            proposals=("not widened",), seed=0,
        )  # fmt: skip

    cells = {(f"o{i}", s): evaluation(float(i), 10 * i + s) for i in range(3) for s in (0, 1)}
    return Comparison(cells).summary()


def test_comparisons_have_error_bars_and_paired_gains():
    records = compared()
    figure = plots.comparison(records)
    left, right = figure.axes
    log_p, elbo = left.containers
    for bars, name in ((log_p, "log_p"), (elbo, "elbo")):
        assert bars[0].get_xdata().tolist() == [record[name] for record in records]
        assert widths(bars) == pytest.approx([record[f"{name}_se"] for record in records])
    (gain,) = right.containers
    assert gain[0].get_xdata().tolist() == [record["log_p_gain"] for record in records[1:]]
    assert widths(gain) == pytest.approx([record["log_p_gain_se"] for record in records[1:]])
    assert gain[0].get_ydata().tolist() == [1, 2]
    seeds = left.lines[1].get_xdata().tolist()
    assert seeds == [value for record in records for value in record["log_p_per_seed"]]
    assert labels(left.yaxis) == ["o0", "o1", "o2"]
    assert [text.get_text() for text in left.get_legend().get_texts()] == [
        "log p(x) ≥, K = 500",
        "its seeds",
        "ELBO",
    ]
    assert left.get_xlabel() == "nats"
    assert right.get_xlabel() == "gain in log p(x), paired (nats)"
    figure.savefig(io.BytesIO(), format="png", dpi=30)
    assert len(plots.comparison(records[:1]).axes[1].containers) == 1


@pytest.mark.parametrize("gain", [1.23e-2, -1.23e-2, -12.5, 1e-4])
def test_texts_of_a_comparison_do_not_meet(gain: float):
    records = compared()
    for i, record in enumerate(records):
        record |= {"log_p_gain": i * gain, "log_p_gain_se": abs(gain) / 9}
    figure = plots.comparison(records)
    figure.savefig(io.BytesIO(), format="png")
    right = figure.axes[1]
    low, high = right.get_xlim()
    ticks = zip(right.get_xticks(), right.get_xticklabels(), strict=True)
    spans = [label.get_window_extent() for tick, label in ticks if low <= tick <= high]
    assert len(spans) >= 2
    assert all(a.x1 < b.x0 for a, b in pairwise(spans))
    (reference,) = right.texts
    frame, text = right.get_window_extent(), reference.get_window_extent()
    assert frame.x0 <= text.x0 < text.x1 <= frame.x1


def test_rate_and_distortion_with_lines_of_equal_elbo():
    points = {
        "a": {"rate": 10.0, "distortion": 90.0, "rate_se": 0.5, "distortion_se": 1.5},
        "b": {"rate": 20.0, "distortion": 75.0},
    }
    figure = plots.rate_distortion(points)
    (axes,) = figure.axes
    first, second = axes.containers
    assert first[0].get_xydata().tolist() == [[10.0, 90.0]]
    across, up = first[2]
    assert float(np.ptp(across.get_segments()[0][:, 0])) == pytest.approx(2 * 0.5)
    assert float(np.ptp(up.get_segments()[0][:, 1])) == pytest.approx(2 * 1.5)
    assert second[0].get_xydata().tolist() == [[20.0, 75.0]]
    assert second[1:] == ((), ())  # no caps around an error that is not known
    lines = [
        line.get_xydata() for line in axes.lines if to_hex(line.get_color()) == curves.PALE.lower()
    ]
    totals = [set(np.round(line.sum(1), 6)) for line in lines]
    assert len(lines) >= 3
    assert all(len(total) == 1 for total in totals)
    texts = {text.get_text(): text for text in axes.texts}
    assert {"a", "b"} < set(texts)
    for name, text in texts.items():
        if name.startswith("ELBO"):
            value = -float(name[5:].replace("\N{MINUS SIGN}", "-"))
            assert sum(text.get_position()) == pytest.approx(value)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("rate (nats)", "distortion (nats)")


def test_an_evaluation_is_a_point_of_the_plane():
    summary = {"elbo": -100.0, "rate": {"z1": 8.0, "z2": 2.0}, "log_p": -95.0}
    (point,) = plots.rate_distortion({"run": summary}).axes[0].containers
    assert point[0].get_xydata().tolist() == [[10.0, 90.0]]
    assert point[1:] == ((), ())
    whole = {**summary, "distortion": 90.5, "rate_se": 0.5, "distortion_se": 1.5}
    (point,) = plots.rate_distortion({"run": whole}).axes[0].containers
    assert point[0].get_xydata().tolist() == [[10.0, 90.5]]
    assert widths([*point[:2], point[2][:1]]) == pytest.approx([0.5])
    one_row = {**whole, "rate_se": float("nan"), "distortion_se": float("nan")}
    (point,) = plots.rate_distortion({"run": one_row}).axes[0].containers
    assert point[1:] == ((), ())


# ---------------------------------------------------------------------------------------------
# Files, notebooks, imports


@pytest.mark.parametrize(
    ("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")]
)
def test_figures_are_saved_by_suffix(tmp_path: Path, suffix: str, start: bytes):
    path = tmp_path / f"rates{suffix}"
    plots.save(plots.rates(torch.ones(3)), path)
    assert path.read_bytes().startswith(start)
    assert list(tmp_path.iterdir()) == [path]


def test_files_are_whole_or_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    figure, path = plots.rates(torch.ones(3)), tmp_path / "a.png"
    path.write_bytes(b"before")

    def fail(file: Any, **options: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plots.save(figure, path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match=r"a\.gif: came suffix '\.gif', wanted one of"):
        plots.save(figure, tmp_path / "a.gif")
    with pytest.raises(ValueError, match="no such folder"):
        plots.save(figure, tmp_path / "nowhere" / "a.png")


def test_notebooks_show_a_figure_by_itself():
    figure = plots.rates(torch.ones(3))
    assert issubclass(style.Picture, Figure)
    assert isinstance(figure, style.Picture)
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_the_users_settings_do_not_matter():
    with matplotlib.rc_context({"axes.labelsize": 40, "font.size": 40, "axes.grid": True}):
        figure = plots.rates(torch.ones(3))
    assert figure.axes[0].xaxis.label.get_size() == style.STYLE["axes.labelsize"]


def test_matplotlib_is_imported_on_demand_and_pyplot_never():
    code = (
        "import sys, pyro_vae as pv\n"
        "assert not {'matplotlib', 'arviz'} & set(sys.modules)\n"
        "assert pv.plots.rates([1.0, 2.0]).axes\n"
        "assert 'matplotlib' in sys.modules\n"
        "assert not {'matplotlib.pyplot', 'arviz', 'pandas'} & set(sys.modules)\n"
        "try:\n    pv.nothing\nexcept AttributeError as error:\n    assert 'nothing' in str(error)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_from_a_pair_to_a_figure():
    """The shapes that the functions of a pair return are those that the figures take."""
    batch = pv.Batch({"x": (torch.rand(12, 6, 6) < 0.3).double()})
    model, guide = pv.pairs.vae(batch, latent=2, hidden=4)
    assert picture(plots.samples(pv.sample(model, 4, mean=True)["x"])).shape == (13, 13)
    means = pv.reconstruct(model, guide, batch)["x"]
    assert picture(plots.reconstructions(batch["x"], means)).shape == (27, 69)
    way = pv.interpolate(model, guide, batch.rows([0, 1]), batch.rows([2, 3]), steps=3)["x"]
    assert picture(plots.interpolations(way)).shape == (13, 20)
    grid = pv.traverse(model, guide, batch.rows([0]))["x"][0]
    assert picture(plots.traversals(grid)).shape == (13, 48)
    codes = pv.encode(model, guide, batch)["z"]
    assert len(scatters(plots.latent_map(codes))) == 1
    result = pv.evaluate(model, guide, batch, 100)
    assert len(plots.rates(result.rate, result.active).axes) == 1
    assert plots.rate_distortion({"run": result.summary()}).axes
    assert plots.weights(result.khat).axes


# ---------------------------------------------------------------------------------------------
# Refusals


IMAGES, FLAT = np.zeros((3, 4, 4)), np.zeros((3, 16))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.interpolations(np.zeros((3, 5, 16))), "say image_shape="),
        (lambda: plots.traversals(FLAT), "say image_shape="),
        (lambda: plots.samples(np.zeros((3, 2, 4, 4))), r"came \[3, 2, 4, 4\], wanted a table"),
        (lambda: plots.samples(FLAT, image_shape=(4, 5)), r"image_shape=\[4, 5\].* as many pixels"),
        (lambda: plots.samples(FLAT, image_shape=(16,)), r"image_shape=\[16\]"),
        (lambda: plots.samples(IMAGES[:0]), r"samples: came \[0, 4, 4\], which is empty"),
        (lambda: plots.samples(FLAT[:0]), r"came \[0, 16\], which is empty"),
        (lambda: plots.samples("x"), "samples: came a str, wanted an array of numbers"),
        (lambda: plots.samples(FLAT, FLAT[:, :3]), r"tables of \[3, 16\] columns"),
        (lambda: plots.samples(FLAT, names=["a"]), "came 1 names, wanted 16"),
        (lambda: plots.reconstructions(IMAGES, IMAGES[:2]), r"came \[3, 4, 4\] and \[2, 4, 4\]"),
        (lambda: plots.reconstructions(FLAT, FLAT[:, :2]), "wanted equal shapes"),
        (lambda: plots.reconstructions(FLAT, FLAT, FLAT[:2]), "wanted equal shapes"),
        (lambda: plots.reconstructions(IMAGES, IMAGES, IMAGES[:2] == 0), "wanted equal shapes"),
        (lambda: plots.traversals(np.zeros((2, 5, 4, 4)), [1, 2]), "2 values for images of 5"),
        (lambda: plots.traversals(np.zeros((2, 5, 4, 4)), rate=[1.0]), "1 rates for images of 2"),
        (lambda: plots.traversals(np.zeros((2, 5, 4, 4)), dims=[1]), "1 dims for images of 2"),
        (lambda: plots.latent_map(np.zeros((5, 1))), "came 1 dimension of 'z'"),
        (lambda: plots.latent_map(np.zeros((5, 3)), np.zeros(4)), r"labels \[4\] for 5 rows"),
        (
            lambda: plots.latent_map(np.zeros((5, 3)), dims=(0, 3)),
            r"dims=\(0, 3\), wanted two of 0 to 2",
        ),
        (
            lambda: plots.latent_map(np.zeros((30, 2)), [f"n{i}" for i in range(30)]),
            "30 names of classes, wanted 20",
        ),
        (lambda: plots.rates({}), "came no site"),
        (lambda: plots.rates([]), "which is empty"),
        (lambda: plots.rates([1.0, 2.0], [True]), "1 of active for 2 of 'z'"),
        (lambda: plots.weights([np.nan]), "no finite number"),
        (lambda: plots.weights([np.inf], num_particles=5), "K = 5, too small for k-hat"),
        (lambda: plots.training([]), "without records"),
        (lambda: plots.training({}), "without records"),
        (lambda: plots.training(history(), x="lr"), "x='lr', wanted one of"),
        (lambda: plots.training([{"epoch": 1.0}]), "without a loss"),
        (lambda: plots.comparison([]), "no records"),
        (lambda: plots.comparison([{"objective": "a"}]), "came records without"),
        (lambda: plots.rate_distortion({}), "no points"),
        (lambda: plots.rate_distortion({"a": {"rate": 1.0}}), "point 'a': wanted numbers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(call: Any, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
