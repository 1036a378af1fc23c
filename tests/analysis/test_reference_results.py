"""Every sweep of the reference has its file, with the knobs and results of the notes, and runs at nano scale."""

import functools
import itertools
import math
import re

import pandas as pd
import pytest

from pgolf.analysis import reference_results
from pgolf.studies.export_lab import residual_variants
from pgolf.sweeps.sweep_file import NOTEBOOKS, load_sweep
from pgolf.training import forecast
from pgolf_core.config import HASH_EXCLUDED, ROOT, RunConfig
from pgolf_core.model import skeleton

NOTES = ROOT.parent / "shared" / "seed" / "research_tracks.md"
OURS = re.compile(  # not in the notes
    "demo|growth|tokenizers|tour|record_.*|stack_.*|frontier_nano|width_vs_bits|regularizers_solved|low_bits|"
    "generated_weights|halting|adaptation"
)
FILES = sorted(path for path in (NOTEBOOKS / "sweeps").glob("*.yaml") if not OURS.fullmatch(path.stem))
RESULTS = reference_results.load()

HEADS = {"num_heads", "num_kv_heads"}  # always 2 and 1 at nano scale
SAME_AT_NANO = {  # depths so close that they are equal at nano scale
    "isobyte_fixedstep": {"num_layers"},
    "recurtsweep": {"num_unique_blocks"},
    "sp4096frontier_fixedstep": {"num_layers"},
    "sp4096isobyte_fixedstep": {"num_layers"},
}


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def file(request):
    return request.param


load = functools.cache(load_sweep)


def differences(a, b):
    return a.differences(b).keys() - HASH_EXCLUDED


def baseline_of(sweep):
    """Config of the first run of the sweep's baseline."""
    return next(config for run, config in sweep.runs.items() if sweep.groups[run] == sweep.baseline)


# Sweep files


def test_results_and_sweep_files_name_the_same_sweeps():
    assert set(RESULTS.sweep) == {path.stem for path in FILES}


def test_a_sweep_file_has_the_runs_and_changed_knobs_of_the_results(file):
    sweep = load(file)
    assert sweep.name == file.stem and sweep.question.endswith("?") and sweep.baseline
    rows = RESULTS[RESULTS.sweep == file.stem]
    assert set(rows.track) == {config.track for config in sweep.runs.values()}
    trained = rows[rows.stage == ""]
    assert set(trained.run) <= sweep.runs.keys()
    without_figures = sweep.runs.keys() - set(trained.run)  # baselines, or trained for a stage: rows of another sweep
    assert {sweep.groups[run] for run in without_figures} <= {sweep.baseline}
    for row in trained.itertuples():
        assert_changed(row, baseline_of(sweep), sweep.runs[row.run])


def assert_changed(row, before, after):
    changed = reference_results.knobs(row.changed)
    assert changed.keys() == differences(after, before), row.run
    assert not differences(before.with_knobs(**changed), after), row.run


def test_rows_of_stages_are_variants_of_the_stage(file):
    sweep = load(file)
    rows = RESULTS[(RESULTS.sweep == file.stem) & (RESULTS.stage != "")]
    assert set(rows.stage) == sweep.stages.keys()
    config = baseline_of(sweep)
    for row in rows.itertuples():
        if row.stage == "sensitivity":
            change, _, tensor = row.run.partition(":")
            assert tensor in skeleton(config.model).state_dict()
            assert change == sweep.stages[row.stage]["change"]
        else:
            variants = residual_variants(sweep.stages[row.stage]["budgets"])
            assert_changed(row, config.with_knobs(**variants["plain"]), config.with_knobs(**variants[row.run]))


def test_no_shrunk_run_is_refused_for_its_size(file):
    forecast.check(load(file, scale="nano").runs)


@pytest.mark.slow
def test_no_run_is_refused_for_its_size(file):
    configs = load(file).runs
    forecast.check(configs)
    if any(config.allow_over_cap for config in configs.values()):
        over = [forecast.forecast(config).bytes > config.cap_bytes for config in configs.values()]
        assert any(over), "allow_over_cap, and no run needs it"


def test_shrunk_runs_differ_as_the_whole_ones_do(file):
    whole, small = load(file), load(file, scale="nano")
    assert list(small.runs) == list(whole.runs)
    assert list(small.stages) == list(whole.stages)
    assert {config.track for config in small.runs.values()} == {"nano"}
    lost = set()
    for a, b in itertools.combinations(whole.runs, 2):
        lost |= differences(whole.runs[a], whole.runs[b]) - differences(small.runs[a], small.runs[b])
    assert lost - HEADS == SAME_AT_NANO.get(file.stem, set())


# The results


def test_every_figure_of_the_notes_is_in_the_results():
    if not NOTES.exists():
        pytest.skip(f"no {NOTES}: the reference's notes are not in the repository")
    notes = NOTES.read_text(encoding="utf-8")
    scores = set(re.findall(r"(?<![\d.])[1-9]\.\d{6,}", notes)) | set(re.findall(r"val_\w+[= ](\d\.\d+)", notes))
    assert {float(s) for s in scores} == {*RESULTS.bpb.dropna(), *RESULTS.val_loss.dropna()}
    assert scores >= set(RESULTS.bpb_text) - {""}, "digits as given"
    sizes = set(re.findall(r"\d+(?:,\d{3}){2,}(?!\d|` total tokens)", notes)) - {"16,000,000"}
    assert {int(size.replace(",", "")) for size in sizes} == set(RESULTS.bytes.dropna())
    names = set(re.findall(r"`(\w+_2026\d{4}_\d+[\w.]*)`", notes))
    missing = {name for name in names if not RESULTS.reference_run.str.contains(name, regex=False).any()}
    assert {re.sub(r"_2026\d{4}_\d+$", "", name) for name in missing} <= set(RESULTS.sweep), "more than sweeps' names"


def test_columns_are_numbers_where_they_are_figures():
    assert list(RESULTS.columns) == [*reference_results.COLUMNS[:8], "bpb_text", *reference_results.COLUMNS[8:]]
    row = RESULTS[RESULTS.reference_run == "compressrt3090_20260318_175828"].squeeze()
    assert (row.bpb, row.val_loss, row.bytes, row.bpb_text) == (2.06085837, 3.48014999, 6_839_798, "2.06085837")
    assert RESULTS[RESULTS.status == "incomplete"].bpb.isna().all()


CAP_BYTES = 16_000_000
FORMS = {"bpb_text": r"\d\.\d{4,8}", "status": "complete|incomplete|aborted|over cap", "score": "roundtrip|raw"}


def test_every_row_is_consistent():
    keys = RESULTS[["sweep", "run", "stage", "score"]]
    assert not keys.duplicated().any() and (RESULTS[["sweep", "run", "verdict"]] != "").all(axis=None)
    for row in RESULTS.itertuples():
        wrong = [name for name, form in FORMS.items() if not re.fullmatch(form, getattr(row, name) or "0.0000")]
        assert not wrong, row
        assert row.status in ("complete", "over cap") or (math.isnan(row.bpb) and math.isnan(row.val_loss)), row
        assert (row.status == "over cap") == (pd.notna(row.bytes) and row.bytes > CAP_BYTES), row
        assert reference_results.knobs(row.changed).keys() <= RunConfig.model_fields.keys(), row


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("verdict", "opinion", "expected the columns sweep, run"),
        ("2.0943", "2,0943", "Expected 12 fields in line 4, saw 13"),
        ("quick,,raw", "raw", "Unable to parse string 'complete'"),
        ("2.0928", "2.09x8", "Unable to parse string '2.09x8'"),
        ("baseline3090", "\udcff", "'utf-8' codec"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, old, new, says):
    text = reference_results.PATH.read_text(encoding="utf-8")
    path = tmp_path / "results.csv"
    path.write_bytes(text.replace(old, new, 1).encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        reference_results.load(path)
    assert str(path) in str(error.value)
