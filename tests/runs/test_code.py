"""The digest of the code: what it ignores, and that reading it or a result needs neither torch nor pandas."""

import json
import subprocess
import sys

from pgolf.runs import code


def test_code_digest_ignores_line_endings_and_outputs(tmp_path, monkeypatch):
    monkeypatch.setattr(code, "ROOT", tmp_path)
    (tmp_path / "notebooks").mkdir()
    path = tmp_path / "notebooks" / "n.ipynb"

    def digest(source, outputs=()):
        cell = {"cell_type": "code", "source": source, "outputs": list(outputs)}
        path.write_text(json.dumps({"cells": [cell, {"cell_type": "markdown", "source": str(outputs)}]}))
        return code.code_digest(["n.ipynb"])

    assert digest(["a\n", "b"]) == digest(["a\r\n", "b"], ["x"]) != digest(["a\n", "c"])


def test_results_and_code_are_read_without_torch_and_pandas():
    script = "import sys, pgolf.runs.result, pgolf.runs.code; print({'torch', 'pandas'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "set()"
