"""Stands for `pgolf sweep` on the rented machine: writes the files of a training in their order, in a second, and
resumes as train() does. Without torch: python -S training_stand_in.py PLAN.json DIR."""

import hashlib
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from pgolf_core.files import atomic_write


def append(path, line):
    with open(path, "a") as f:
        f.write(line + "\n")


def train(run, made, plan, top):
    (run / "error.json").unlink(missing_ok=True)
    atomic_write(run / "config.json", (made / "config.json").read_bytes())
    if run.name not in plan["bare"]:
        atomic_write(run / "environment.json", b"{}")
    if run.name in plan["fails"]:
        append(run / "log.txt", "it begins")
        atomic_write(run / "error.json", json.dumps({"error": "TrainError", "message": "as asked"}))
        raise ValueError("as asked")
    resume, log, metrics = run / "resume.pt", run / "log.txt", run / "metrics.jsonl"
    step = int(resume.read_bytes()[:8]) if resume.exists() else 0
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    if step:
        append(log, f"resumed at {step}")
    else:
        log.unlink(missing_ok=True)
    atomic_write(metrics, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))
    while step < plan["steps"]:
        step += 1
        append(log, f"step {step}")
        append(metrics, json.dumps({"step": step, "at": time.time()}))
        if step % 5 == 0:  # each of another size: rsync does not distinguish times within a second
            atomic_write(resume, b"%08d" % step + bytes([step]) * (100_000 + step))
        time.sleep(plan["pace"])
    while run.name == plan["waits"] and not (top / "go").exists():
        time.sleep(0.02)
    for name in ("checkpoint.safetensors", "artifact.pgolf"):
        atomic_write(run / name, (made / name).read_bytes())
    result = json.loads((made / "result.json").read_text())
    files = {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in ("log.txt", "metrics.jsonl")}
    result |= {"files": files, "finished": "2026-01-01T00:00:00"}
    told = {name: value for name, value in result.items() if name != "checksum"}
    result["checksum"] = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]
    atomic_write(run / "result.json", json.dumps(result, indent=1))
    resume.unlink(missing_ok=True)
    atomic_write(run / "notebook.ipynb", json.dumps({"cells": [run.name] * 1000}))


def main(plan, top):
    made_runs, failed = sorted(Path(plan["made"]).iterdir()), []
    atomic_write(top / "runs/small/sweep.json", json.dumps({"runs": [made.name for made in made_runs]}))
    for made in made_runs:
        run = top / "runs/small" / made.name
        run.mkdir(parents=True, exist_ok=True)
        if not (run / "result.json").exists():
            append(top / "trained", made.name)
            atomic_write(run / "job.json", b"{}")
            try:
                train(run, made, plan, top)
            except Exception as error:
                print(f"{run.name} FAILED: {error}", flush=True)
                failed.append(run.name)
    if failed:
        print(f"pgolf: {len(failed)} failed: {failed}", flush=True)
    sys.exit(1 if failed else 0)


main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
