"""Runs, logs and sweeps whose strings try to be markup."""

import json

from support.runs import make_exports, make_run

from pgolf_core.files import atomic_write

HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "![x](http://127.0.0.1:9/x.png)",
    "[x](javascript:alert(1))", "</style><script>alert(1)</script>", "`<b>` expected <class 'str'>", "$x$ $\\frac$",
    "_x", "&lt;img src=x onerror=alert(1)&gt;", "<http://127.0.0.1:9/>", "a\n\n# b\x1b[31m\u202e",
    "&#60;script&#62;alert(1)",
]  # fmt: skip


def hostile_runs(root) -> None:
    """Runs, logs and sweeps whose every string is somebody else's."""
    for i, text in enumerate(HOSTILE):
        name = text.replace("/", "\u2215").replace("\n", " ")
        told = dict(folder=text, scored_fraction=1.0, published=text, findings=[text], train_tokens=5, audit=text)
        environment = {"git_commit": text, "git_dirty": False, "torch": text, "python": text, "platform": text}
        for seed in (1, 2):
            make_run(
                root, f"{name}/{seed} {name}", knobs={"seed": seed}, data=told, environment=environment, track=text
            )
        log = make_run(root, f"log {i}/{name}", kind="import", protocol=text)
        atomic_write(log / "import.json", json.dumps({"flags": [text], "disagreements": [text]}))
        atomic_write(root / name / "sweep.json", json.dumps({"question": text, "control": text, "file": text}))
        failed = make_run(root, f"{name}/failed {name}")
        (failed / "result.json").unlink()
        atomic_write(failed / "error.json", json.dumps({"error": text, "message": text}))
    make_exports(root, f"{HOSTILE[1]}/source {HOSTILE[1]}", 3)
