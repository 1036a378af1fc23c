"""Figures of the frontier and of exports: labels that do not overlap, caps, and few names among many points."""

import matplotlib
import pytest

matplotlib.use("agg")
from matplotlib import pyplot as plt
from support.runs import make_exports, make_run, only_group

from pgolf.analysis import frontier
from pgolf.reports import figures


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def labels_of(figure, prefix: str = "") -> list[str]:
    """Labels of the first axes that begin with prefix; fails if two of them overlap."""
    figure.draw_without_rendering()
    texts = [text for text in figure.axes[0].texts if text.get_text().startswith(prefix)]
    boxes = [text.get_window_extent() for text in texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    return [text.get_text() for text in texts]


@pytest.mark.parametrize("count", [1, 9, 40])
def test_run_labels_do_not_overlap(tmp_path, count):
    for i in range(count):
        bpb = 2.5 - 0.002 * i + 0.01 * (i % 3)
        make_run(tmp_path, f"a/run-{i}", total=500_000 + 3_000 * i, bpb=bpb, knobs={"iterations": i + 1})
    figure = figures.plot_frontier(frontier.frontier_table(only_group(tmp_path)))
    assert 1 <= len(labels_of(figure, "run-")) <= 2 * figures.LABELS


def test_many_exports_have_one_label_in_the_frontier_and_some_in_their_own_figure(tmp_path):
    make_exports(tmp_path, "a/control", 40)
    ((_, _, rows),) = frontier.checkpoints(only_group(tmp_path))
    assert 5 <= len(labels_of(figures.plot_exports(rows))) <= figures.LABELS + 8
    for i in range(4):
        make_run(tmp_path, f"a/run-{i}", bpb=2.6 + 0.01 * i)
    figure = figures.plot_frontier(frontier.frontier_table(only_group(tmp_path)))
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert "40 exports of control" in texts and len(texts) <= 8
    assert [text for text in texts if text.startswith("cap ")] == ["cap 1,000,000 B"]  # the solver's caps are left out
