"""Bits per weight at one size of file: which runs compare, and where the best of them lies."""

from support.runs import make_config, only_group

from pgolf.analysis import seed_groups, widths
from pgolf.reports import sentences, sweep_figures

CAP = dict(cap_bytes=500_000)


def make_sizes(root, scores: dict[int, float], steps: int = 120, **changes) -> None:
    for width, bpb in scores.items():
        knobs = CAP | dict(model_dim=width, iterations=steps)
        fields = dict(total=498_000, steps=steps, parameters=width * width * 40) | changes
        make_config(root, f"w{width}_{steps}", [bpb, bpb + 0.01], knobs, seeds=[1, 2], **fields)


def test_the_best_of_several_sizes_and_whether_it_is_between_others(tmp_path):
    make_sizes(tmp_path, {96: 2.50, 128: 2.45, 192: 2.48})
    make_config(
        tmp_path, "w96_other", [2.6], CAP | dict(model_dim=96, matrix_lr=0.1), [1], total=498_000, parameters=368_640
    )
    make_sizes(tmp_path, {96: 2.40, 128: 2.38, 192: 2.35}, steps=240)
    rows = widths.bits_per_weight(seed_groups.by_config(only_group(tmp_path)))
    assert list(rows.arm[rows.best]) == ["w128_120-s1", "w192_240-s1"]
    assert list(rows.bits.round(2)[:3]) == [2.7, 6.08, 10.81] and rows.bits.is_monotonic_increasing is False
    short, long = sentences.best_widths(rows)
    assert short == (
        "At 500,000 bytes after 120 steps the best of 3 sizes is **w128_120-s1**: 6.1 bits per weight of 655,360, "
        "2.4550 bpb."
    )
    assert long.endswith("2.7 bits per weight of 1,474,560, 2.3550 bpb, at the end of what was tried.")
    lines = sweep_figures.plot_widths(rows).axes[0].get_legend().get_texts()
    assert [text.get_text() for text in lines] == ["500,000 B, 120 steps", "500,000 B, 240 steps"]


def test_two_sizes_or_files_of_other_sizes_have_no_optimum(tmp_path):
    make_sizes(tmp_path, {96: 2.50, 128: 2.45})
    make_sizes(tmp_path, {192: 2.48}, total=400_000)
    assert widths.bits_per_weight(seed_groups.by_config(only_group(tmp_path))).empty
