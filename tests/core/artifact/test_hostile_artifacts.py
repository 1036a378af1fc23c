"""Files with right checksums that lie about all else: refused in one line, in bounded time and memory."""

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from support.artifacts import bombs, lies, mutants

from pgolf_core.artifact.codec import ArtifactError
from pgolf_core.artifact.container import FILE_LIMIT, MAGIC, PREAMBLE
from pgolf_core.artifact.format import load

OLD = Path(__file__).parent / "old_artifacts"
SECONDS, BYTES = 5, 1e9  # of a processor for one file; of memory for a process that reads them all
# Loads each file that is named on a line of the input; prints seconds and the error, or whether the numbers are sane.
READER = """
import re, resource, sys, time
from pathlib import Path
from pgolf_core.artifact.codec import ArtifactError
from pgolf_core.artifact.format import load
for line in sys.stdin:
    start = time.process_time()
    try:
        state = load(line.strip())
        said = "read" if all(t.isfinite().all() for t in state.values()) else "read NaN"
    except ArtifactError as error:
        said = repr(str(error))
    print(round(time.process_time() - start, 3), said)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # under Linux that of the process before exec, too
status = Path("/proc/self/status")
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]) if status.exists() else peak)
"""
# Only a run's config says how large a tensor has to be, so a float tensor of another shape is read here; so are zeros.
HARMLESS = {"bombs": "one long block|zeros", "lies": r"libraries|sections', \d, 0\]|columns'\] (\[|\{)"}
REFUSED = r": (?!float)\S+ (deep|orphan)|(nan|inf)$|: index (-1|127)|: no (q|scale|index|book|left|right)"


@pytest.mark.parametrize("hostile", ["bombs", "lies", "mutants"])
def test_hostile_artifacts_cost_little_and_are_named(hostile, tmp_path):
    generator = {"bombs": bombs, "lies": partial(lies, OLD / "solve_ans.pgolf"), "mutants": partial(mutants, OLD)}
    names = []
    for name, content in generator[hostile]():
        (tmp_path / str(len(names))).write_bytes(content)
        names.append(name)
    paths = "\n".join(str(tmp_path / str(i)) for i in range(len(names)))
    done = subprocess.run([sys.executable, "-c", READER], input=paths, capture_output=True, text=True, timeout=500)
    *lines, peak = done.stdout.splitlines()
    assert done.returncode == 0 and int(peak) < BYTES, done.stderr[-500:] or peak
    for name, line in zip(names, lines, strict=True):
        seconds, said = line.split(" ", 1)
        assert float(seconds) < SECONDS and said != "read NaN" and len(said) < 500, f"{name}: {line}"
        harmless = re.search(HARMLESS[hostile], name) if hostile in HARMLESS else not re.search(REFUSED, name)
        assert said != "read" or harmless, f"{name} was read"
    assert len(names) > {"bombs": 14, "lies": 200, "mutants": 800}[hostile]


def test_other_kinds_of_file_and_sparse_ones_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, "/dev/zero"):
        with pytest.raises(ArtifactError, match="not a regular file"):
            load(path)
    sparse = tmp_path / "sparse"
    large = PREAMBLE.pack(MAGIC, 1, 9, 9, 20 << 30, 0)
    for start, says in ((b"", "not a pgolf"), (large, f"more than the {FILE_LIMIT:,}")):
        with open(sparse, "wb") as f:
            f.write(start)
            f.truncate(20 << 30)
        with pytest.raises(ArtifactError, match=says):
            load(sparse)
