"""Runs of one configuration → a record folder that runs alone, written only if every claim of its runs holds.

Each artifact is read from disk and scored again, as in its run and on the whole validation split; the data is audited
in full.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pgolf.data import audit
from pgolf.data.dataset import Dataset
from pgolf.disk import explain_disk_errors
from pgolf.runs import directory, integrity
from pgolf.runs.result import ARTIFACT, Result, finished_run
from pgolf.script.compile import Script, script_of
from pgolf.submission import record as folders
from pgolf.submission.record import Comparison, Record, Seed
from pgolf.training.inputs import open_dataset
from pgolf.training.round_trip import score_model
from pgolf_core.config import ROOT, RunConfig
from pgolf_core.device import cpu_threads, pick_device
from pgolf_core.evaluate import Score
from pgolf_core.export import load
from pgolf_core.export_inputs import model_of
from pgolf_core.knobs import BOS

SUBMISSIONS = ROOT / "reports" / "submissions"
SAME_MACHINE, OTHER_MACHINE = 1e-9, 1e-3  # tolerance between two scores of one file, bpb and nats
MAY_DIFFER = ("seed", "world_size", "resume_every_seconds", "save_raw_checkpoint", "allow_over_cap")


MACHINE = ("device", "device_name", "platform", "torch", "numpy")  # equal ones score a file alike


def same_machine(result: Result, here: dict) -> bool:
    """True if a run's machine and libraries are those of describe_environment, here."""
    return all(result.environment.get(name) == here[name] for name in MACHINE)


def tolerance(result: Result, here: dict) -> float:
    """Allowed difference between a run's score of its file and one made here."""
    return SAME_MACHINE if same_machine(result, here) else OTHER_MACHINE


class SubmissionError(ValueError):
    """Runs whose claims do not hold; the message lists everything that is wrong."""


@dataclass(frozen=True)
class Finished:
    """A run to submit."""

    directory: Path
    result: Result
    config: RunConfig

    @property
    def name(self) -> str:
        return f"{self.directory.parent.name}/{self.directory.name}"


def submit(
    run_dirs: str | Path | Sequence[str | Path], out: str | Path | None = None, base: str | Path | None = None,
    beats: float | None = None,
) -> Path:  # fmt: skip
    """The record folder of runs that differ in their seed alone; it appears only when it is complete.

    Its val_bpb is the mean over seeds on the whole validation split, whatever part the runs scored, and scored here.
    base: a run whose knobs the README compares. beats: bits per byte of a claim to test against. Default folder:
    reports/submissions/<sweep>_<run>. Raises SubmissionError, RunError, DataError.
    """
    run_dirs = [run_dirs] if isinstance(run_dirs, str | Path) else list(run_dirs)
    runs = [Finished(path, *finished_run(path)) for path in (Path(each).resolve() for each in run_dirs)]
    first = runs[0]
    out = Path(out or SUBMISSIONS / first.name.replace("/", "_")).absolute()
    if out.exists():
        raise SubmissionError(f"{out}: is there already; delete it or name another folder with --out")
    _refuse(first, _not_one_configuration(runs))
    for run in runs:
        if run.result.artifact_sha256 is None or run.result.kind not in ("train", "export"):
            raise SubmissionError(
                f"{run.directory}: has no artifact with a score; train it with final_roundtrip_eval=1"
            )
        if damage := integrity.damage(run.directory, vars(run.result), thorough=True):
            raise SubmissionError(f"{run.directory}: damaged ({damage}): not what the run wrote")
    dataset, script = open_dataset(first.config), script_of(first.config)
    found = audit.audit(dataset, seq_len=first.config.train_seq_len)
    audit.store(dataset, found)
    for run in runs:
        _refuse(run, _problems(run, dataset, script, found))
    compared = folders.compared(first.directory, base) if base else None
    with explain_disk_errors(out), cpu_threads(first.config.cpu_threads):
        seeds = [_scored(run, dataset) for run in runs]
        record = Record(first.name, seeds, first.config, script, found, Comparison(compared, beats))
        unfinished = out.with_name(f"{out.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        folders.write(record, unfinished)
        os.replace(unfinished, out)
    return out


def _refuse(run: Finished, problems: list[str]) -> None:
    """Raise SubmissionError with all problems, if there are any."""
    if problems:
        raise SubmissionError("\n  - ".join([f"{run.directory}: this run cannot be submitted:", *problems]))


def _not_one_configuration(runs: list[Finished]) -> list[str]:
    """Why runs are not several seeds of one configuration."""
    problems, seeds = [], [run.result.seed for run in runs]
    if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        problems.append(f"seed {twice[0]} is that of two runs; a seed counts once")
    for run in runs[1:]:
        differing = runs[0].config.differences(run.config).keys() - set(MAY_DIFFER)
        if differing:
            problems.append(f"{run.name} is another configuration: {', '.join(sorted(differing))}")
    return problems


def _problems(run: Finished, dataset: Dataset, script: Script, found: audit.Audit) -> list[str]:
    """Why a run cannot be submitted, as far as can be said without scoring it."""
    result = run.result
    problems = [finding.message for finding in found.findings if finding.level == "error"]
    if not result.fits:
        problems.append(f"{result.total_bytes:,} bytes are over the cap of {result.cap_bytes:,}")
    if problem := other_script(result, script):
        problems.append(problem)
    if dataset.fingerprint != result.data_fingerprint:
        problems.append(f"{dataset.directory} is not the data that was scored: its fingerprint is another")
    if dataset.tokenizer.bos != BOS:
        problems.append(f"the tokenizer begins documents with token {dataset.tokenizer.bos}, the script with {BOS}")
    return problems


def other_script(result: Result, script: Script) -> str:
    """Why a script is not the one whose bytes a run counted; '' if it is."""
    if script.sha256 == result.script_sha256:
        return ""
    commit = result.environment["git_commit"]  # None of a run outside a checkout
    way = f"check out its commit {commit}, or run it again" if commit else "run it again with this version of pgolf"
    return (
        f"the script of this version has {len(script.packed):,} bytes, that of the run {result.bytes['code']:,}, and "
        f"another content: {way}"
    )


def _scored(run: Finished, dataset: Dataset) -> Seed:
    """A run's artifact, scored again as in the run and on the whole validation split. Raises SubmissionError."""
    config, device = run.config, pick_device(run.config.train)
    here = directory.describe_environment(device)
    model = model_of(load(run.directory / ARTIFACT), config, device)
    again = score_model(model, config, dataset, roundtrip=True, shipped=True)
    _refuse(run, _differences(run.result, again, here))
    whole = config.with_knobs(roundtrip_val_max_tokens=0, roundtrip_val_max_documents=0)
    score = score_model(model, whole, dataset, roundtrip=True, shipped=True) if whole != config else again
    plain = score_model(model, whole, dataset, roundtrip=True) if config.adapt != "off" else None
    return Seed(run.directory, run.result, score, plain, here["device_name"])


def _differences(result: Result, again: Score, here: dict) -> list[str]:
    """How a second score of the same text contradicts the run; a smaller tolerance on an equal machine."""
    ours = (again.val_bpb, again.val_loss, again.tokens, again.bytes)
    theirs = (result.roundtrip_val_bpb, result.roundtrip_val_loss, result.roundtrip_tokens, result.roundtrip_bytes)
    if all(abs(a - b) <= tolerance(result, here) for a, b in zip(ours, theirs, strict=True)):
        return []
    text = "{:.8f} bpb, {:.8f} nats per token, {:,} tokens of {:,} bytes"
    return [f"scored again the file has {text.format(*ours)}; the run says {text.format(*theirs)}"]
