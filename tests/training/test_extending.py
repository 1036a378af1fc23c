"""The changes that docs/extending.md shows work as they stand, in a copy of the code."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
from pathlib import Path
from support.options import config_of
from pgolf.runs.result import ARTIFACT
from pgolf.training.run import train
from pgolf_core.export import load
from pgolf_core.model import GPT
from pgolf_core.regularizers import CompressionRegularizer

knobs = dict(compression_reg_weight=0.1, compression_reg_warmup_steps=0, l1_reg_weight=1.0)
config = config_of((), embed_gain=True, allocation="fixed", cap_bytes=1_000_000, **knobs)
result = train(config, Path("sweep/run"))
assert load(Path("sweep/run") / ARTIFACT)["embed_gain"].std() > 0, "not trained"
assert abs(result.roundtrip_val_bpb - result.prequant_val_bpb) < 0.1
model = GPT(config.model)
penalty, without = (CompressionRegularizer(model, c)(0)[0] for c in (config, config.with_knobs(l1_reg_weight=0.0)))
print("penalised", bool(penalty > without))
"""


def changed(text: str, hunk: str) -> str:
    """Text in which the lines of a hunk without + stand once, as those without - instead."""
    lines = hunk.splitlines(keepends=True)
    old, new = ("".join(line[1:] for line in lines if line[0] != left_out) for left_out in "+-")
    assert text.count(old) == 1, f"stands {text.count(old)} times:\n{old}"
    return text.replace(old, new)


@pytest.mark.slow
def test_the_model_option_and_the_regulariser_of_the_docs_train_and_read_back(embedded, tmp_path):
    for package in ("pgolf", "pgolf_core"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    hunks = re.findall(r"^```diff (\S+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(hunks) == 7
    for name, hunk in hunks:
        path = tmp_path / name
        path.write_text(changed(path.read_text(encoding="utf-8"), hunk), encoding="utf-8")
    paths = os.pathsep.join(map(str, (tmp_path, ROOT / "tests")))
    environment = os.environ | {"PYTHONPATH": paths, "PGOLF_ROOT": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "penalised True" in done.stdout, done.stderr
