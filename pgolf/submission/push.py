"""A finished run → a model repository on the Hugging Face hub: artifact, config, result, script and model card."""

import re
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError

from pgolf.data.download import ENDPOINT
from pgolf.runs import integrity
from pgolf.runs.result import ARTIFACT, Result, finished_run
from pgolf.script.compile import script_of
from pgolf.submission.record import READABLE, SCRIPT
from pgolf.submission.submit import SubmissionError, other_script
from pgolf_core.config import RunConfig, shown


def push(run_dir: Path, repo: str = "", private: bool = False, endpoint: str | None = None) -> str:
    """Upload a run in one commit; returns the repository's address. A repository that exists gets another commit.

    repo: NAME of one's own account, or OWNER/NAME; '' = pgolf-<sweep>-<run>. Raises RunError or SubmissionError.
    """
    run_dir = run_dir.resolve()
    result, config = finished_run(run_dir)
    if result.artifact_sha256 is None:
        raise SubmissionError(f"{run_dir}: has no artifact with a score; train it with final_roundtrip_eval=1")
    if damage := integrity.damage(run_dir, vars(result), thorough=True):
        raise SubmissionError(f"{run_dir}: damaged ({damage}): not what the run wrote")
    script = script_of(config)
    if problem := other_script(result, script):
        raise SubmissionError(f"{run_dir}: not pushed: {problem}")
    name = f"{run_dir.parent.name}/{run_dir.name}"
    files = {SCRIPT: script.packed, READABLE: script.readable.encode()}
    files |= {file: run_dir / file for file in (ARTIFACT, "config.json", "result.json")}
    files["README.md"] = card(name, result, config).encode(errors="replace")
    endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
    if not ENDPOINT.fullmatch(endpoint):
        raise SubmissionError(f"--endpoint {endpoint}: not the address of a server; one begins with https://")
    repo = repo or re.sub(r"[^A-Za-z0-9_]+", "-", f"pgolf-{name}")[:90].strip("-_")
    api = HfApi(endpoint, library_name="pgolf")
    try:
        repo = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
        additions = [CommitOperationAdd(path, content) for path, content in files.items()]
        api.create_commit(repo, additions, commit_message=f"{name} by pgolf")
    except HFValidationError as error:
        raise SubmissionError(f"--repo {repo}: {error}") from error
    except (HTTPError, LocalTokenNotFoundError) as error:
        why, login = " ".join(str(error).split()), "`hf auth login`, or a token in HF_TOKEN, lets you write there"
        raise SubmissionError(f"{endpoint}/{repo}: cannot be written to; {login} ({why})") from error
    return f"{endpoint}/{repo}"


def card(name: str, result: Result, config: RunConfig) -> str:
    """README.md: the score, what it was measured on, the knobs, and how to score the file again."""
    metrics = [
        {"type": "bits_per_byte", "name": "bits per byte of the artifact", "value": result.roundtrip_val_bpb},
        {"type": "bytes", "name": "bytes of artifact and code", "value": result.total_bytes},
    ]
    data = {"name": f"pgolf data {(result.data_fingerprint or '')[:12]}", "type": "text"}
    scores = {"task": {"type": "text-generation"}, "dataset": data, "metrics": metrics}
    index = [{"name": name, "results": [scores]}]
    about = {"library_name": "pgolf", "tags": ["pgolf", "compression"], "model-index": index}
    differences = config.differences(RunConfig(track=config.track))
    knobs = [f"{knob}: {shown(value)}  # {shown(usual)}" for knob, (value, usual) in sorted(differences.items())]
    return f"""---
{yaml.safe_dump(about, sort_keys=False, allow_unicode=True)}---

# {" ".join(name.split())}

**{result.roundtrip_val_bpb:.5f} bits per byte in {result.total_bytes:,} bytes**, artifact and code; size limit
{result.cap_bytes:,} bytes: {"it fits" if result.fits else "it does not fit"}. The score is that of {ARTIFACT} as read
back from disk, on {result.roundtrip_tokens:,} tokens ({result.roundtrip_bytes:,} bytes) of validation text,
{result.protocol}.

| file | what it is |
|---|---|
| {ARTIFACT} | the model: {result.total_bytes - result.bytes["code"]:,} bytes, sha256 {result.artifact_sha256} |
| {SCRIPT} | the code that counts, packed: {result.bytes["code"]:,} bytes; {READABLE} is the same program |
| config.json, result.json | every knob; every figure |

The script scores the artifact on the whole validation split of a folder of shards with their tokenizer:

```
DATA_PATH=data python {SCRIPT} --eval {ARTIFACT}
```

{result.parameters or 0:,} parameters, {result.steps or 0:,} steps, seed {result.seed}. Knobs that differ from {
        f"the track {config.track}" if config.track else "the defaults"
    }, whose values follow #:

```yaml
{chr(10).join(knobs) or "# none"}
```
"""
