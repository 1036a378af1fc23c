"""Run a script in a process that has not got the workbench."""

import os
import re
import subprocess
import sys
from pathlib import Path

ONLY = ("torch", "numpy", "sentencepiece", "constriction", "brotli")
# What an environment with only these packages lacks; the script's own packages are checked against ONLY.
ALONE = """
import runpy, sys
for name in ("pgolf", "pgolf_core", "pydantic", "yaml", "safetensors", "pandas", "tqdm", "python_minifier"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_alone(script: Path, data: Path, *arguments: str, ranks: int = 1) -> str:
    """What the script prints, run in its folder without the packages of the workbench."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SEED", "OUT")}
    words = [sys.executable, "-P", "-c", ALONE, str(script), *arguments]
    if ranks > 1:
        words = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        words += [str(script), *arguments]
    environment |= {"DATA_PATH": str(data), "OUT": str(script.parent / "out")}
    done = subprocess.run(words, cwd=script.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def final_bpb(output: str) -> str:
    return re.findall(r"_roundtrip_exact val_loss:[\d.]+ val_bpb:([\d.]+)", output)[-1]
