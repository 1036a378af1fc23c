"""What a search answers with, once its finalists were trained again."""

import json

import pytest
from search.conftest import Surrogate
from support.runs import make_run

from pgolf.cli.search import _dry_run
from pgolf.runs import directory
from pgolf.search.answer import answer, finalists
from pgolf.search.driver import run_search
from pgolf.search.study import Outcome


class Known(Surrogate):
    """One layer scores 2.4 in 90,000 bytes, two layers 2.3 in 80,000."""

    def begin(self, run, config):
        bpb, size = ((2.4, 90_000), (2.3, 80_000))[config.num_layers - 1]
        return Outcome("complete", bpb, size, -0.1)


@pytest.mark.parametrize(
    ("keys", "again", "best"),
    [
        # The baseline, behind in both at first, is the better of the finalists.
        ({"objective": "both"}, {"one": (2.2, 90_000), "two": (2.3, 80_000)}, "one"),
        # The smaller of the finalists scores above max_bpb with new seeds.
        ({"objective": "bytes", "max_bpb": 2.5}, {"one": (2.4, 90_000), "two": (2.6, 80_000)}, "one"),
    ],
)
def test_the_best_finalist_is_by_the_objective_and_within_its_limits(search, keys, again, best):
    enqueue = {"one": {"num_layers": 1}, "two": {"num_layers": 2}}
    asked = {"space": {"num_layers": [1, 2]}, "enqueue": enqueue, "trials": 2, "finalists": 1, "seeds": [1, 2]}
    study = run_search(own := search(**asked | keys), Known(), lambda line: None)
    sweep = finalists(own, study)
    for run, arm in sweep.groups.items():
        bpb, size = again[arm]
        make_run(directory.RUNS, f"s-finalists/{run}", size, bpb, enqueue[arm] | {"seed": sweep.runs[run].seed})
    about = {"control": "one", "arms": sweep.groups}
    (directory.RUNS / "s-finalists" / "sweep.json").write_text(json.dumps(about))
    assert answer(own, study).startswith(f"best of s: {best}, ")


def test_a_baseline_over_the_cap_is_named_as_nothing_to_compare_with(search, capsys):
    class Capped(Surrogate):
        def begin(self, run, config):
            if config.num_layers == 2:
                return Outcome("refused", bytes=120_000, over=0.2, why="forecast 120,000 bytes")
            return Outcome("complete", 2.4, 90_000, -0.1)

    space = {"num_layers": [1, 2], "matrix_lr": {"low": 0.01, "high": 0.1}}
    enqueue = {"start": {"num_layers": 2}, "one": {"num_layers": 1, "matrix_lr": 0.0333333333}}
    own = search(space=space, enqueue=enqueue, trials=2, finalists=1, seeds=[1, 2], cap=100_000)
    study = run_search(own, Capped(), lambda line: None)
    by_one_seed = answer(own, study)
    for seed in (1, 2):
        make_run(directory.RUNS, f"s-finalists/one-s{seed}", 90_000, 2.4, enqueue["one"] | {"seed": seed})
    about = {"control": "start", "arms": {"one-s1": "one", "one-s2": "one"}}
    (directory.RUNS / "s-finalists" / "sweep.json").write_text(json.dumps(about))
    for said in (by_one_seed, answer(own, study)):
        assert "the baseline start was over the cap, nothing to compare with. num_layers=1" in said
        assert "nan" not in said and said.endswith("matrix_lr=0.03333")
    _dry_run(own)
    assert "warning: enqueue: start is over the cap" in capsys.readouterr().out
