"""Figures that answer the mouse: each link lies on its point, tells of its run and leads to it."""

import base64
import html
import io
import re
from html.parser import HTMLParser

import matplotlib
import pandas as pd
import pytest

matplotlib.use("agg")
from matplotlib import pyplot as plt
from support.hostile import HOSTILE
from support.runs import make_config, make_exports, make_run, only_group, write_sweep

from pgolf.analysis import frontier, seed_groups
from pgolf.reports import figures, hover, sweep_figures

NO_RESULTS = pd.DataFrame({name: [] for name in ("stage", "bpb", "score", "run", "arm")})


class Links(HTMLParser):
    """Tags of a text, and of its links: attributes, left and top as shares of the figure."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.links, self.png = set(), [], b""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        own = dict(attributes)
        if tag == "a":
            self.links.append(own | {"at": [float(x) / 100 for x in re.findall(r"([\d.]+)%", own["style"])]})
        if tag == "img":
            self.png = base64.b64decode(own["src"].partition("base64,")[2])


def drawn(figure, points) -> Links:
    data, _ = figures.save(figure, None, "figure")._repr_mimebundle_()
    return Links(hover.over(figure, data["image/png"], points.assign(href=points.path.map(str))))


@pytest.fixture(autouse=True)
def style():
    with plt.rc_context(figures.STYLE):
        yield
    plt.close("all")


def ink(links: Links) -> list[bool]:
    """Whether something is drawn within two pixels of each link's place."""
    picture = plt.imread(io.BytesIO(links.png))[..., :3]
    height, width, _ = picture.shape
    found = []
    for left, top in (link["at"] for link in links.links):
        i, j = round(top * height), round(left * width)
        found.append(bool(picture[i - 2 : i + 3, j - 2 : j + 3].min() < 0.8))
    return found


def test_a_link_lies_on_each_point_of_the_frontier_and_of_the_exports(tmp_path):
    make_exports(tmp_path, "a/control", 9)
    group = only_group(tmp_path)
    rows = frontier.frontier_table(group)
    front = drawn(figures.plot_frontier(rows), hover.of_frontier(rows, group))
    files = frontier.checkpoints(group)[0][-1]
    exports = drawn(figures.plot_exports(files), hover.of_exports(files))
    for links in (front, exports):
        assert len(links.links) == 10 and all(ink(links))
        assert {link["href"] for link in links.links} == set(map(str, group.path))
        (one,) = [link["aria-label"] for link in links.links if "file-03" in link["aria-label"]]
        for words in ("2.5612 bpb", "359,000 bytes", "on the front", "quantizer step:0.4 instead of absmax"):
            assert words in one, (words, one)


def test_a_config_of_a_sweep_tells_its_interval_and_its_knob(tmp_path):
    write_sweep(tmp_path, ["control", "m0.9", "m0.97"])
    make_config(tmp_path, "control", [2.50, 2.51, 2.49, 2.50, 2.52])
    for value in (0.9, 0.97):
        make_config(tmp_path, f"m{value}", [2.45, 2.46, 2.445, 2.45, 2.465], {"muon_momentum": value})
    group = only_group(tmp_path)
    rows = seed_groups.by_config(group)
    points = hover.of_sweep(rows, group)
    links = drawn(sweep_figures.plot_sweep(rows, group, sweep_figures.reference_scores(rows, NO_RESULTS)), points)
    assert all(ink(links)) and len(links.links) == 3
    (text,) = points.text[points.text.str.contains("s/m0.9\n", regex=False)]
    assert re.search(r"2\.4540 bpb, mean of 5 seeds, -0\.0500 ± 0\.\d{4} to the baseline: better\n", text)
    assert text.endswith("against the baseline run:\nmuon_momentum 0.9 instead of 0.95")


def test_runs_of_one_point_share_a_link(tmp_path):
    for i in range(5):
        make_run(tmp_path, f"a/same-{i}")
    make_run(tmp_path, "a/other", total=700_000, bpb=2.4)
    group = only_group(tmp_path)
    rows = frontier.frontier_table(group)
    links = drawn(figures.plot_frontier(rows), hover.of_frontier(rows, group)).links
    assert len(links) == 2
    (text,) = [link["aria-label"] for link in links if "other" not in link["aria-label"]]
    assert text.count("same-") == 3 and text.endswith("and 2 more here")


def test_many_knobs_are_cut_and_equal_ones_are_not_named():
    own = {f"knob{i}": i for i in range(20)}
    text = hover.changed(own, own | {f"knob{i}": -i for i in range(1, 12)}, own)
    assert text.startswith("knob1 1 instead of -1\n") and text.endswith("\nand 3 more knobs")
    assert hover.changed(own, own, own) == ""


def test_foreign_names_are_text(tmp_path):
    for i, name in enumerate(HOSTILE):
        make_run(tmp_path, f"a/{name.replace('/', chr(0x2215))}", total=400_000 + 9_000 * i, bpb=2.5 - i / 100)
    group = only_group(tmp_path)
    rows = frontier.frontier_table(group)
    points = hover.of_frontier(rows, group)
    figure = figures.plot_frontier(rows)
    data, _ = figures.save(figure, None, "figure")._repr_mimebundle_()
    text = hover.over(figure, data["image/png"], points.assign(href="x"))
    links = Links(text)
    assert links.tags == {"style", "div", "img", "a"} and len(links.links) == len(HOSTILE)
    assert "<script" not in text and html.escape("<img src=x onerror=alert(1)>") in text
