"""A submission: a folder with a run's artifact and its claims, written only if every claim holds.

The file is read from disk and scored again, as in the run and on the whole validation split; its data is audited in
full.
"""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from pgolf.data import audit
from pgolf.data.dataset import Dataset
from pgolf.disk import explain_disk_errors
from pgolf.runs import directory, integrity
from pgolf.runs.result import ARTIFACT, Result, finished_run
from pgolf.training.inputs import open_dataset
from pgolf.training.round_trip import score_model
from pgolf_core.artifact.code_archive import code_archive
from pgolf_core.artifact.format import read_model
from pgolf_core.config import ROOT
from pgolf_core.device import cpu_threads, pick_device
from pgolf_core.evaluate import Score
from pgolf_core.export import load
from pgolf_core.export_inputs import model_of
from pgolf_core.files import atomic_write

SUBMISSIONS = ROOT / "reports" / "submissions"
SAME_MACHINE, OTHER_MACHINE = 1e-9, 1e-3  # tolerance between two scores of one file, bpb and nats


class SubmissionError(ValueError):
    """A run whose claims do not hold; the message lists everything that is wrong."""


def submit(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Folder with artifact, code, submission.json, audit.txt, config and log; it appears only when it is complete.

    Its val_bpb is of the whole validation split, whatever part the run scored, and scored here. Default folder:
    reports/submissions/<sweep>_<run>. Raises SubmissionError, RunError, DataError.
    """
    run_dir = Path(run_dir).resolve()
    result, config = finished_run(run_dir)
    out = Path(out or SUBMISSIONS / f"{run_dir.parent.name}_{run_dir.name}").absolute()
    if out.exists():
        raise SubmissionError(f"{out}: is there already; delete it or name another folder with --out")
    if result.artifact_sha256 is None or result.kind not in ("train", "export"):
        raise SubmissionError(f"{run_dir}: has no artifact with a score; train it with final_roundtrip_eval=1")
    if damage := integrity.damage(run_dir, vars(result), thorough=True):
        raise SubmissionError(f"{run_dir}: damaged ({damage}): not what the run wrote")
    dataset = open_dataset(config)
    code = code_archive(*read_model(run_dir / ARTIFACT).forms)
    found = audit.audit(dataset, seq_len=config.train_seq_len)
    audit.store(dataset, found)
    _refuse(run_dir, _problems(result, dataset, code, found))

    unfinished = out.with_name(f"{out.name}.unfinished")
    with explain_disk_errors(out), cpu_threads(config.cpu_threads):
        device = pick_device(config.train)
        here = directory.describe_environment(device)
        model = model_of(load(run_dir / ARTIFACT), config, device)
        again = score_model(model, config, dataset, roundtrip=True)
        _refuse(run_dir, _differences(result, again, here))
        whole = config.with_knobs(roundtrip_val_max_tokens=0, roundtrip_val_max_documents=0)
        score = score_model(model, whole, dataset, roundtrip=True) if whole != config else again
        claims = _claims(run_dir, result, score, found) | {"scored_on": here["device_name"]}
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for name in (ARTIFACT, "config.json", "log.txt"):
            if (run_dir / name).exists():
                shutil.copyfile(run_dir / name, unfinished / name)
        atomic_write(unfinished / "code.tar.xz", code)
        atomic_write(unfinished / "audit.txt", audit.format_audit(found) + "\n")
        atomic_write(unfinished / "submission.json", json.dumps(claims, indent=1))
        os.replace(unfinished, out)
    return out


def _refuse(run_dir: Path, problems: list[str]) -> None:
    """Raise SubmissionError with all problems, if there are any."""
    if problems:
        raise SubmissionError("\n  - ".join([f"{run_dir}: nothing to submit", *problems]))


def _problems(result: Result, dataset: Dataset, code: bytes, found: audit.Audit) -> list[str]:
    """Why the run cannot be submitted, as far as can be said without scoring it."""
    problems = [finding.message for finding in found.findings if finding.level == "error"]
    if not result.fits:
        problems.append(f"{result.total_bytes:,} bytes are over the cap of {result.cap_bytes:,}")
    if len(code) != result.bytes["code"]:
        sizes = f"the code of this checkout has {len(code):,} bytes, that of the run had {result.bytes['code']:,}"
        problems.append(f"{sizes}: check out its commit {result.environment['git_commit']}, or run it again")
    if dataset.fingerprint != result.data_fingerprint:
        problems.append(f"{dataset.directory} is not the data that was scored: its fingerprint is another")
    return problems


def _differences(result: Result, again: Score, here: dict) -> list[str]:
    """How a second score of the same text contradicts the run; a smaller tolerance on an equal machine."""
    machine = ("device", "device_name", "platform", "torch", "numpy")
    same = all(result.environment.get(name) == here[name] for name in machine)
    ours = (again.val_bpb, again.val_loss, again.tokens, again.bytes)
    theirs = (result.roundtrip_val_bpb, result.roundtrip_val_loss, result.roundtrip_tokens, result.roundtrip_bytes)
    if all(abs(a - b) <= (SAME_MACHINE if same else OTHER_MACHINE) for a, b in zip(ours, theirs, strict=True)):
        return []
    text = "{:.8f} bpb, {:.8f} nats a token, {:,} tokens of {:,} bytes"
    return [f"scored again the file has {text.format(*ours)}; the run says {text.format(*theirs)}"]


def _claims(run_dir: Path, result: Result, score: Score, found: audit.Audit) -> dict:
    """submission.json. score: of the file on the whole validation split."""
    same_as_run = (
        *("seed", "track", "steps", "train_seconds", "stopped_by", "data_fingerprint", "protocol", "cap_bytes"),
        *("artifact_sha256", "environment"),
    )
    return {
        "name": f"{run_dir.parent.name}/{run_dir.name}",
        "val_loss": score.val_loss,
        "val_bpb": score.val_bpb,
        "val_tokens": score.tokens,
        "val_bytes": score.bytes,
        "run": {"val_bpb": result.roundtrip_val_bpb, "val_tokens": result.roundtrip_tokens},
        "bytes_total": result.total_bytes,
        "bytes_model": result.total_bytes - result.bytes["code"],
        "bytes_code": result.bytes["code"],
        "audit": {"findings": [asdict(finding) for finding in found.findings], "figures": found.figures},
    } | {name: getattr(result, name) for name in same_as_run}
