"""Effects of the same arms at two scales: what transfers, flips or is not known, and what the sweep page warns of."""

import numpy as np
import pandas as pd
import pytest
from support.runs import make_run, only_group

from pgolf.analysis import seed_groups, transfer
from pgolf.runs.schema import About

SEEDS = range(1, 5)
ARMS = {"helps": (-0.1, -0.05), "turns": (-0.1, 0.08), "faint": (-0.1, -0.001), "nothing": (0.001, 0.002)}
KNOBS = {"control": {}, "helps": {"mlp_mult": 4}, "turns": {"mlp_slope": 0.5}, "faint": {"beta2": 0.99}}
KNOBS |= {"nothing": {"beta1": 0.8}}


@pytest.fixture
def study(tmp_path):
    """by_config of two scales and their About, every arm's effect as ARMS says, noise of 0.002."""
    random, about = np.random.default_rng(0), {}
    for place, scale in enumerate(("own", "wide")):
        names = {}
        for arm, knobs in KNOBS.items():
            for seed in SEEDS:
                run = f"{arm}-s{seed}"
                names[run] = arm
                bpb = 2.5 - 0.2 * place + ARMS.get(arm, (0, 0))[place] + random.normal(0, 0.002)
                knobs_of_run = knobs | {"seed": seed, "iterations": 100 + place}
                make_run(tmp_path, f"t-{scale}/{run}", bpb=bpb, knobs=knobs_of_run)
        changes = {arm: sorted(knobs) for arm, knobs in KNOBS.items()}
        told = {"family": "t", "scale": scale, "control": "control", "arms": names, "changes": changes}
        about[f"t-{scale}"] = About(**told)
        (tmp_path / f"t-{scale}" / "sweep.json").write_text(about[f"t-{scale}"].model_dump_json())
    return [seed_groups.by_config(only_group(tmp_path))], about


def test_an_arm_flips_or_transfers_only_if_both_effects_are_significant(study):
    rows = transfer.effects(*study)
    verdicts = transfer.verdicts(rows).set_index("arm")
    assert verdicts.verdict.to_dict() == {
        "helps": "transfers", "turns": "flips", "faint": "unknown", "nothing": "unknown"
    }  # fmt: skip
    assert verdicts.signs["turns"] == "− +" and not verdicts.agree["turns"] and verdicts.agree["helps"]
    assert verdicts.needed[["helps", "turns"]].isna().all()
    assert verdicts.needed["faint"] > len(SEEDS)


def test_the_seeds_needed_are_those_of_the_smallest_unsure_effect(study):
    rows = transfer.effects(*study)
    needed = rows[rows.arm == "nothing"].needed
    assert transfer.verdicts(rows).set_index("arm").needed["nothing"] == needed.max()
    one = rows[(rows.arm == "helps") & (rows.scale == "own")].iloc[0]
    assert one.needed <= one.n  # an effect of this size is found with fewer


def test_a_sweep_outside_a_study_has_no_effects(study):
    configs, about = study
    assert transfer.effects(configs, {}).empty
    assert set(transfer.effects(configs, {"t-own": about["t-own"]}).scale) == {"own"}


def test_rank_correlation_is_that_of_ranks_and_its_interval_holds_it(study):
    assert transfer.spearman(np.array([[1.0, 2, 3, 4]]), np.array([[10.0, 20, 30, 400]])) == pytest.approx(1)
    assert transfer.spearman(np.array([[1.0, 2, 3, 4]]), np.array([[4.0, 3, 2, 1]])) == pytest.approx(-1)
    random = np.random.default_rng(1)
    a, b = random.normal(size=(2, 30))
    expected = pd.Series(a).corr(pd.Series(b), method="pearson")
    ranks = pd.Series(a).rank().corr(pd.Series(b).rank())
    assert transfer.spearman(a[None], b[None])[0] == pytest.approx(ranks) and ranks != pytest.approx(expected)
    (found,) = transfer.correlations(transfer.effects(*study)).itertuples()
    assert (found.scale, found.other, found.arms) == ("own", "wide", 4)
    assert found.low <= found.rho <= found.high and 0 <= found.ceiling <= 1


def test_the_ceiling_falls_with_the_noise_of_seeds():
    random = np.random.default_rng(2)
    true = random.normal(size=25)

    def reliability(noise):
        return transfer._reliability(pd.Series([pd.Series(mean + noise * random.normal(size=3)) for mean in true]))

    assert reliability(0.01) > 0.98 > reliability(1.0) > reliability(20.0)


def test_a_sweep_is_warned_of_a_knob_that_flips_at_other_scales(study):
    configs, about = study
    runs = pd.DataFrame({"world_size": [1, 1], "track": ["nano", "nano"]})
    told = About(changes={"control": [], "average": ["ema_decay"], "turn": ["mlp_slope"], "gate": ["attn_gate"]})
    flipped = transfer.flipped(configs, about)
    assert flipped == {"mlp_slope": "own and wide of t"}
    ema, own = transfer.warnings(told, runs, flipped)
    assert ema.startswith("ema_decay: EMA of 0.990: -0.0117 bpb at 2 GPUs, +0.0025 at 8 GPUs (#2005)")
    assert own == "mlp_slope: its effect flips between own and wide of t"
    assert not list(transfer.warnings(told, runs.assign(world_size=8), {}))
    assert not list(transfer.warnings(About(changes={"wide": ["model_dim"]}), runs, flipped))


def test_the_known_effects_name_knobs_and_their_flips_where_to_decide_them():
    from pgolf_core.config import RunConfig

    for row in transfer.load_known().itertuples():
        assert row.knobs in RunConfig.model_fields and row.source
        assert row.flips == bool(row.decide_at)
        assert not row.decide_at or row.decide_at.partition("=")[0] in RunConfig.model_fields
