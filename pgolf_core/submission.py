"""A submission: a folder with a run's artifact and what it claims, written only when every claim held.

The file is scored again from disk, on the whole validation split, and the data behind it is audited in full.
"""

import json
import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from pgolf_core import artifact, audit, integrity, runs
from pgolf_core.config import ROOT
from pgolf_core.export import code_archive, load
from pgolf_core.files import write_whole
from pgolf_core.roundtrip import cpu_threads, finished, model_of, open_dataset, pick_device, score_model

SUBMISSIONS = ROOT / "reports" / "submissions"
SAME_MACHINE, OTHER_MACHINE = 1e-9, 1e-3  # bpb that a second score of one file may lie apart


class SubmissionError(ValueError):
    """A run whose claims do not hold; the message says all that is wrong with it."""


def submit(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Folder of artifact, code, submission.json, audit.txt, config and log; it appears when it is complete.

    Default folder: reports/submissions/<sweep>_<run>. Raises SubmissionError, RunError, DataError.
    """
    run_dir = Path(run_dir)
    result, config = finished(run_dir)
    out = Path(out or SUBMISSIONS / f"{run_dir.parent.name}_{run_dir.name}")
    if out.exists():
        raise SubmissionError(f"{out}: is there already; delete it or name another folder with --out")
    if result.artifact_sha256 is None or result.kind not in ("train", "export"):
        raise SubmissionError(f"{run_dir}: has no artifact with a score; train it with final_roundtrip_eval=1")
    if damage := integrity.damage(run_dir, vars(result), thorough=True):
        raise SubmissionError(f"{run_dir}: damaged ({damage}): not what the run wrote")

    problems = []
    if not result.fits:
        problems.append(f"{result.total_bytes:,} bytes are over the cap of {result.cap_bytes:,}")
    unpacked = artifact.read(run_dir / runs.ARTIFACT)
    code = code_archive(artifact.from_arrays(unpacked.arrays, unpacked.about))
    if len(code) != result.bytes["code"]:
        problems.append(
            f"the code of this checkout has {len(code):,} bytes, that of the run had {result.bytes['code']:,}: check "
            f"out its commit {result.environment['git_commit']}, or run it again"
        )
    dataset = open_dataset(config)
    if dataset.fingerprint != result.data_fingerprint:
        problems.append(f"{dataset.directory} is not the data that was scored: its fingerprint is another")
    limits = config.roundtrip_val_max_tokens, config.roundtrip_val_max_documents
    found = audit.audit(dataset, seq_len=config.train_seq_len, max_tokens=limits[0], max_documents=limits[1])
    audit.store(dataset, found)
    problems += [finding.message for finding in found.findings if finding.level == "error"]
    problems += [
        f"{finding.message}; score the file again with roundtrip_val_max_tokens=0 and roundtrip_val_max_documents=0"
        for finding in found.findings
        if (finding.level, finding.check) == ("warning", "scored")
    ]
    device = pick_device(config)
    if not problems:  # else that hour is for nothing
        with cpu_threads(config):
            score = score_model(
                model_of(load(run_dir / runs.ARTIFACT), config, device), config, dataset, roundtrip=True
            )
        same = result.environment == runs.environment(device)
        if not math.isclose(
            score.val_bpb, result.roundtrip_val_bpb, rel_tol=0, abs_tol=SAME_MACHINE if same else OTHER_MACHINE
        ):
            problems.append(
                f"scored again the file has {score.val_bpb:.8f} bpb, the run says {result.roundtrip_val_bpb:.8f}"
            )
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise SubmissionError(f"{run_dir}: nothing to submit{listed}")

    claims = {
        "name": f"{run_dir.parent.name}/{run_dir.name}",
        "val_loss": result.roundtrip_val_loss,
        "val_bpb": result.roundtrip_val_bpb,
        "val_bpb_again": score.val_bpb,
        "val_tokens": score.tokens,
        "val_bytes": score.bytes,
        "bytes_total": result.total_bytes,
        "bytes_model": result.total_bytes - result.bytes["code"],
        "bytes_code": result.bytes["code"],
        "cap_bytes": result.cap_bytes,
        "scored_again_on": runs.environment(device)["device_name"],
        "audit": {"findings": [asdict(finding) for finding in found.findings], "figures": found.figures},
    }
    same_as_run = (
        "seed",
        "track",
        "steps",
        "train_seconds",
        "stopped_by",
        "data_fingerprint",
        "scored_text",
        "protocol",
    )
    claims |= {name: getattr(result, name) for name in same_as_run}
    claims |= {"artifact_sha256": result.artifact_sha256, "environment": result.environment}
    unfinished = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for name in (runs.ARTIFACT, "config.json", "log.txt"):
        if (run_dir / name).exists():
            shutil.copyfile(run_dir / name, unfinished / name)
    write_whole(unfinished / "code.tar.xz", code)
    write_whole(unfinished / "audit.txt", audit.words(found) + "\n")
    write_whole(unfinished / "submission.json", json.dumps(claims, indent=1))
    os.replace(unfinished, out)
    return out
