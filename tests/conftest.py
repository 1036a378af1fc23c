"""Fixtures that several test files use."""

import os

import pytest

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # before torch: they share the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import hypothesis
from support.training import tiny

from pgolf.data import embedded_corpus
from pgolf.training.run import train

hypothesis.settings.register_profile("any machine", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("any machine")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Of `-n auto`: one more than cores, as some tests wait for processes of their own; each takes some hundred MB."""
    return min(4, (os.cpu_count() or 1) + 1)


@pytest.fixture(scope="session")
def embedded():
    """Folder of the embedded corpus with 1024 pieces; built once (some 20 s), then kept in data/."""
    return embedded_corpus.build_embedded(1024)


@pytest.fixture(scope="session")
def finished(embedded, tmp_path_factory):
    """(directory, result) of a complete tiny run under the regulariser."""
    run_dir = tmp_path_factory.mktemp("runs") / "sweep" / "run"
    return run_dir, train(tiny(compression_reg_weight=0.005), run_dir)
