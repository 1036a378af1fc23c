"""Results of loops that tokens may leave, and of distributions that an n-gram cache or tilt has changed."""

import matplotlib.pyplot as plt
import pytest
from support.training import tiny

from pgolf.reports.sweep_figures import plot_passes
from pgolf.runs.table import load_runs
from pgolf.studies.reexport import export_checkpoint
from pgolf.training.run import train

LOOP = dict(num_layers=3, parallel_from=3, loop_start=1, loop_end=1, loop_extra=2, iterations=4, val_loss_every=0)


@pytest.fixture(scope="module")
def runs(embedded, tmp_path_factory):
    """Folder of a sweep, and the results of its runs by name."""
    root = tmp_path_factory.mktemp("runs") / "sweep"
    arms = dict(plain={}, fixed=dict(halting_eval="fixed"), act=dict(halting="act"))
    return root, {name: train(tiny(**LOOP | knobs), root / name) for name, knobs in arms.items()}


def test_all_passes_fixed_at_scoring_are_the_plain_loop(runs):
    _, results = runs
    plain, fixed = results["plain"], results["fixed"]
    assert (plain.mean_passes, plain.bpb_by_passes) == (None, [])
    assert fixed.roundtrip_val_bpb == plain.roundtrip_val_bpb == fixed.bpb_by_passes[-1]
    assert fixed.mean_passes == 3 and len(set(fixed.bpb_by_passes)) == 3


def test_tokens_that_may_leave_take_fewer_than_all_passes(runs):
    root, results = runs
    assert 1 < results["act"].mean_passes < 3 and len(results["act"].bpb_by_passes) == 3
    hard = dict(halting_eval="threshold", halting_threshold=0.01)
    assert export_checkpoint(root / "act", root / "hard", **hard).mean_passes == 1


def test_fewer_passes_at_scoring_need_no_other_training(runs):
    root, results = runs
    once = export_checkpoint(root / "fixed", root / "once", halting_passes=1)
    assert once.roundtrip_val_bpb == results["fixed"].bpb_by_passes[0] and once.mean_passes == 1
    assert once.prequant_val_bpb != results["fixed"].prequant_val_bpb


def test_figure_has_a_line_of_all_passes_and_the_score_of_every_run(runs):
    root, results = runs
    table = load_runs(root)
    table = table[table.mean_passes.notna() & (table.kind == "train")]
    figure = plot_passes(table)
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    for name in ("fixed", "act"):
        assert list(lines[name]) == results[name].bpb_by_passes
    plt.close(figure)


def test_a_result_says_that_changed_distributions_sum_to_one(runs):
    root, results = runs
    assert results["plain"].distribution_error is None
    cache = dict(eval_cache_size=8, eval_cache_mix_weight=0.5, eval_bigram_mix_weight=2.0)
    for name, knobs in dict(cache=cache, tilt=dict(eval_tilt_boost=2.0, eval_tilt_order=2)).items():
        changed = export_checkpoint(root / "plain", root / name, **knobs)
        assert 0 <= changed.distribution_error < 1e-5
        assert changed.roundtrip_val_bpb != results["plain"].roundtrip_val_bpb
    assert changed.protocol != results["plain"].protocol  # what was scored before is context
