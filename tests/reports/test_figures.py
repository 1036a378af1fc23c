"""Figures: their content, that no text covers another or leaves the figure, few names among many points."""

import json

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.text import Text
from support.runs import make_config, make_exports, make_run, only_group, write_sweep

from pgolf.analysis import frontier, seed_groups
from pgolf.reports import curves, figures, sentences, sweep_figures, tables
from pgolf.runs.table import load_runs


def collisions(figure) -> list[str]:
    """Texts of a figure that cover one another, or reach out of it."""
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    axes = [axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)]
    every, drawn = (
        {label for ticks in groups for tick in ticks for label in (tick.label1, tick.label2)}
        for groups in ([axis.get_major_ticks() for axis in axes], [axis._update_ticks() for axis in axes])
    )
    texts = [text for text in texts if text not in every or text in drawn]  # a tick beyond the limits is not drawn
    boxes = [text.get_window_extent().shrunk(0.96, 0.8) for text in texts]
    found = []
    for i, (text, box) in enumerate(zip(texts, boxes, strict=True)):
        if box.x0 < -1 or box.y0 < -1 or box.x1 > figure.bbox.x1 + 1 or box.y1 > figure.bbox.y1 + 1:
            found.append(f"{text.get_text()!r} reaches out of the figure")
        for other, other_box in zip(texts[:i], boxes[:i], strict=True):
            if box.overlaps(other_box) and text.get_text() != other.get_text():
                found.append(f"{text.get_text()!r} lies on {other.get_text()!r}")
    return found


@pytest.fixture(autouse=True)
def style():
    with plt.rc_context(figures.STYLE):
        yield
    plt.close("all")


def labels_of(figure, prefix: str = "") -> list[str]:
    """Labels of the first axes that begin with prefix; fails if texts cover one another."""
    assert collisions(figure) == []
    return [text.get_text() for text in figure.axes[0].texts if text.get_text().startswith(prefix)]


@pytest.mark.parametrize("count", [1, 9, 40])
def test_the_frontier_names_some_of_many_runs(tmp_path, count):
    for i in range(count):
        bpb = 2.5 - 0.002 * i + 0.01 * (i % 3)
        make_run(tmp_path, f"a/run-{i}", total=500_000 + 3_000 * i, bpb=bpb, knobs={"iterations": i + 1})
    figure = figures.plot_frontier(frontier.frontier_table(only_group(tmp_path)))
    assert 1 <= len(labels_of(figure, "run-")) <= figures.LABELS


def test_every_point_of_a_front_has_a_name_and_is_placed_first(tmp_path):
    for i in range(30):  # twelve on the front, among others that are worse and larger
        front = i < 12
        place = (
            dict(total=500_000 + 30_000 * i, bpb=2.5 - 0.01 * i) if front else dict(total=890_000, bpb=2.5 + 0.01 * i)
        )
        make_run(tmp_path, f"a/run-{i}", **place, knobs={"iterations": i + 1})
    texts = labels_of(figures.plot_frontier(rows := frontier.frontier_table(only_group(tmp_path))), "run-")
    assert set(texts[:12]) == set(rows.run[rows.on_front]) and rows.on_front.sum() == 12


def test_many_exports_have_one_label_in_the_frontier_and_some_in_their_own_figure(tmp_path):
    make_exports(tmp_path, "a/control", 40)
    ((_, _, rows),) = frontier.checkpoints(only_group(tmp_path))
    assert 5 <= len(labels_of(figures.plot_exports(rows))) <= figures.LABELS + 8
    for i in range(4):
        make_run(tmp_path, f"a/run-{i}", bpb=2.6 + 0.01 * i)
    texts = labels_of(figures.plot_frontier(frontier.frontier_table(only_group(tmp_path))))
    assert "40 exports of control" in texts and len(texts) <= 8
    assert [text for text in texts if text.startswith("cap ")] == ["cap 1,000,000 B"]  # the solver's caps are left out


def test_a_verdict_by_blocks_of_text_is_short_in_tables():
    for method, shown in (("paired, 64 blocks of text", "64 blocks"), ("paired, 5 seeds", "paired, 5 seeds")):
        assert tables.format_verdict(pd.Series({"verdict": "better", "method": method})) == f"better ({shown})"


def test_one_run_of_one_sweep_is_counted_as_one(tmp_path):
    make_run(tmp_path, "a/run")
    assert sentences.run_counts(load_runs(tmp_path)) == "1 run in 1 sweep: 1 complete."


def test_bars_of_bytes_end_with_their_totals(tmp_path):
    for i, total in enumerate((500_000, 1_200_000)):
        make_run(tmp_path, f"a/run-{i}", total=total, bpb=2.5 + i, knobs={"num_layers": i + 1})
    figure = figures.plot_bytes(only_group(tmp_path))
    assert labels_of(figure) == ["500,000", "1,200,000 over cap"]
    shown = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert sorted(shown) == ["cap 1,000,000 B", "code", "weights"]


@pytest.fixture
def sweep(tmp_path):
    """A sweep of five configs with five seeds each: better, worse and neither, one over the cap."""
    rng = np.random.default_rng(0)
    base = 2.5 + rng.normal(0, 0.01, 5)
    make_config(tmp_path, "control", base)
    for i, (shift, total) in enumerate([(-0.03, 700_000), (0.03, 400_000), (0.0, 510_000), (-0.05, 1_100_000)]):
        scores = base + shift + rng.normal(0, 0.002, 5)
        make_config(tmp_path, f"config-with-a-long-name-{i}", scores, {"model_dim": 152 + 16 * i}, total=total)
    write_sweep(tmp_path, ["control", *(f"config-with-a-long-name-{i}" for i in range(4))])
    return tmp_path


def plotted(root, referenced: bool = True):
    """plot_sweep's figure of the runs below root, without collisions, and its configs."""
    runs = only_group(root)
    rows = seed_groups.by_config(runs)
    scores = np.linspace(2.043, 2.0431, len(rows))
    reference = pd.DataFrame({"arm": rows.arm, "bpb": scores, "bytes": 6_663_470})[: len(rows) * referenced]
    figure = sweep_figures.plot_sweep(rows, runs, reference)
    assert len(figure.axes) == 2 + referenced and collisions(figure) == []
    return figure, rows


@pytest.mark.parametrize("referenced", [True, False])
def test_one_numeric_factor_is_a_curve(sweep, referenced):
    figure, _ = plotted(sweep, referenced)
    ticks = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert ticks == ["152", "168", "184", "192", "200"]
    assert figure.axes[0].get_xlabel() == "model_dim" and "bits per byte" in figure.axes[0].get_ylabel()
    assert any("cap 1,000,000 B" in text.get_text() for text in figure.axes[1].texts)


def test_several_factors_are_names(sweep):
    make_run(sweep, "s/both", bpb=2.45, knobs={"model_dim": 256, "num_layers": 3, "seed": 1})
    figure, rows = plotted(sweep)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(rows.arm)
    shown = {text.get_text() for text in figure.legends[0].get_texts()}
    assert shown == {"baseline", "better", "worse", "not significant"}


def test_many_arms_are_cut(tmp_path):
    for i in range(40):
        make_run(tmp_path, f"s/arm-{i}", bpb=2.5 + 0.001 * i, knobs={"num_layers": 1 + i % 8, "model_dim": 64 + 8 * i})
    figure, _ = plotted(tmp_path, referenced=False)
    assert len(figure.axes[0].get_yticklabels()) == sweep_figures.CONFIGS


def test_seeds(sweep):
    rows = seed_groups.by_config(only_group(sweep))
    figure = sweep_figures.plot_seeds(rows)
    away = np.concatenate([line.get_xdata() for line in figure.axes[0].lines if line.get_marker() == "o"])
    assert len(away) == 25 and abs(away).max() < 40  # milli-bpb
    assert collisions(figure) == []
    figure = sweep_figures.plot_seeds(rows.assign(seeds=[[1, 1]] * len(rows)))
    assert all(label.get_text().endswith(" (repeats)") for label in figure.axes[0].get_yticklabels())


def test_the_leaderboard_names_each_leader_once_and_no_name_lies_on_its_line():
    bpb = 2.6 - 0.01 * np.arange(12)
    finished = [f"2026-01-01T00:{minute:02}:00" for minute in range(12)]
    names = [f"s/leader-{minute}" for minute in range(12)]
    ax = sweep_figures.plot_leaderboard(
        pd.DataFrame({"finished": finished, "cap_bytes": 10**6, "bpb": bpb, "name": names})
    ).axes[0]
    assert labels_of(ax.figure) == names
    line = ax.transData.transform_path(ax.lines[0].get_path())
    assert not any(line.intersects_bbox(Text.get_window_extent(text), filled=False) for text in ax.texts)


def test_a_leader_that_goes_on_leading_is_named_once():
    steps = pd.DataFrame({"finished": [f"2026-01-01T00:0{i}:00" for i in range(4)], "cap_bytes": 10**6})
    steps = steps.assign(bpb=[2.6, 2.5, 2.55, 2.4], name=["s/plain", "s/plain", "s/plain", "s/wide"])
    assert labels_of(sweep_figures.plot_leaderboard(steps)) == ["s/plain", "s/wide"]


def test_few_of_many_runs_are_drawn_with_the_first_seed_of_the_baseline(tmp_path):
    for name, scores in (("control", [2.6, 2.5, 2.4, 2.5, 2.5]), ("wide", [2.1] * 5)):
        make_config(tmp_path, name, scores, {"model_dim": 64 * len(name)}, val_bpb=1.0 + len(name))
    write_sweep(tmp_path, ["control", "wide"])
    chosen = curves.choose(load_runs(tmp_path))
    assert len(chosen) == 8 and chosen.run.iloc[0] == "control-s1"


def test_training_curves_show_late_differences_and_say_what_is_missing(tmp_path):
    for name in ("control", "c"):
        make_run(tmp_path, f"s/{name}", knobs={"num_layers": len(name)})
    figure = curves.plot_training([tmp_path / "s" / n for n in ("control", "c")], ["control", "c"])
    assert [ax.get_xlabel() for ax in figure.axes] == ["step", "step", "seconds of training"]
    assert collisions(figure) == []
    # make_run writes no seconds, as some imported logs have none: an empty axis says so.
    assert [[text.get_text() for text in ax.texts] for ax in figure.axes] == [[], [], ["nothing recorded"]]
    rows = [dict(step=i, train_loss=8 / i + 2, train_seconds=i / 2) for i in range(1, 61)]
    rows += [dict(step=0, val_bpb=8.0, train_seconds=0.0), dict(step=60, val_bpb=2.5, train_seconds=30.0)]
    (tmp_path / "s/control/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses, by_step, by_seconds = curves.plot_training([tmp_path / "s/control"], ["control"]).axes
    assert losses.get_ylim()[1] == pytest.approx(1.03 * (8 / 11 + 2))
    assert [list(map(float, ax.lines[0].get_xdata())) for ax in (by_step, by_seconds)] == [[60.0], [30.0]]
    assert by_step.get_xlim() == losses.get_xlim()
