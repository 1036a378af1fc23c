"""Fixtures that several test files use."""

import hashlib
import os
from collections.abc import Iterator

import pytest

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # before torch: they share the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import hypothesis
import numpy as np
from support.shards import write_shard
from support.training import tiny

from pgolf.data import embedded_corpus
from pgolf.data.dataset import describe
from pgolf.script import compile as compiling
from pgolf.training.run import train
from pgolf_core.config import RunConfig
from pgolf_core.shards import read_shard, shard_paths

hypothesis.settings.register_profile("any machine", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("any machine")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Of `-n auto`: one more than cores, as some tests wait for processes of their own; each takes some hundred MB."""
    return min(4, (os.cpu_count() or 1) + 1)


PACKED, ESTIMATED = compiling._packed, compiling._estimated


def expected_bytes(config: RunConfig) -> int:
    """Nearly a script's, with more for each knob that is not at its default."""
    return 12_700 + 20 * sum(value != RunConfig.model_fields[name].default for name, value in config)


def stand_in(config: RunConfig) -> bytes:
    """A script's bytes for tests that read only their number and digest: packing one takes a second."""
    return hashlib.sha256(repr(config).encode()).digest().ljust(round(1.01 * expected_bytes(config)), b"#")


@pytest.fixture(scope="session", autouse=True)
def scripts_of_expected_size(request) -> None:
    """Stand-ins under `-m "not slow"`; slow tests pack theirs."""
    if "not slow" in (request.config.getoption("-m") or ""):
        compiling._packed, compiling._estimated = stand_in, expected_bytes


@pytest.fixture(scope="module")
def real_scripts() -> Iterator[None]:
    """Packs scripts in the modules that name this fixture: they run scripts or compare them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "_packed", PACKED)
        patch.setattr(compiling, "_estimated", ESTIMATED)
        compiling._script.cache_clear()
        yield
        compiling._script.cache_clear()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of long tests first, so that no worker ends with one alone."""
    items.sort(key=lambda item: item.path.parent.name not in ("script", "studies", "training"))


@pytest.fixture(scope="session")
def embedded():
    """Folder of the embedded corpus with 1024 pieces; built once (some 20 s), then kept in data/."""
    return embedded_corpus.build_embedded(1024)


@pytest.fixture(scope="session")
def few_documents(embedded, tmp_path_factory):
    """Folder of real shards, of sixty documents for training and two for validation."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 60), ("val", 2)):
        tokens = read_shard(shard_paths(embedded, split)[0])
        write_shard(folder / f"fineweb_{split}_000000.bin", tokens[: np.flatnonzero(tokens == 1)[count]])
    (folder / "tokenizer.model").write_bytes((embedded / "tokenizer.model").read_bytes())
    describe(folder)
    return folder


@pytest.fixture(scope="session")
def finished(embedded, tmp_path_factory):
    """(directory, result) of a complete tiny run under the regulariser."""
    run_dir = tmp_path_factory.mktemp("runs") / "sweep" / "run"
    return run_dir, train(tiny(compression_reg_weight=0.005), run_dir)
