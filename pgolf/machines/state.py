"""Local knowledge of remote jobs: runs/.remote/<job>/state.json. Reading it needs neither torch nor a network."""

import json
import time
from pathlib import Path

from pgolf.disk import read_json
from pgolf.runs import directory
from pgolf.runs.result import TIME
from pgolf_core.files import atomic_write

REMOTE = ".remote"  # below runs/
TIMES = ("started", "last_pull", "ended", "verified")


def folder(job_id: str) -> Path:
    return directory.RUNS / REMOTE / job_id


def read(job_id: str) -> dict:
    """{} for a job that was never started from here, or whose state.json is damaged."""
    return read_json(folder(job_id) / "state.json") or {}


def write(job_id: str, content: dict) -> None:
    atomic_write(folder(job_id) / "state.json", json.dumps(content, indent=1))


def states() -> dict[str, dict]:
    """Job -> state, for all jobs that were started from here."""
    found = sorted((directory.RUNS / REMOTE).glob("*/state.json"))
    return {path.parent.name: read(path.parent.name) for path in found}


def now() -> str:
    return time.strftime(TIME, time.gmtime())


def report() -> list[str]:
    """`pgolf remote status`: a line per job as it was last seen, and the command that continues it."""
    lines = []
    for job, known in states().items():
        if "host" not in known:
            lines.append(f"{job:32} its state.json cannot be read; the command that started it writes it again")
            continue
        words = [known.get("state", "checked"), f"on {known['user']}@{known['host']} port {known['port']}"]
        words += [f"{key.replace('_', ' ')} {known[key]}" for key in TIMES if known.get(key)]
        words += [f"{len(known['failed'])} failed"] if known.get("failed") else []
        if torn := known.get("teardown"):
            words.append(f"teardown {'done' if torn.get('status') == 0 else 'FAILED OR CUT SHORT'}")
        lines.append(f"{job:32} {', '.join(words)}")
        lines += [] if known.get("verified") else [f"{'':32} {known['command']}"]
    return lines or [f"no remote jobs in {directory.RUNS}; `pgolf remote run` starts one"]
