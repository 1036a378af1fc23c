"""A small trained run for every test module of studies."""

import pytest

from pgolf.training.run import train
from pgolf_core.config import RunConfig


@pytest.fixture(scope="module")
def source(request, embedded, tmp_path_factory):
    """Directory of a run of the module's own KNOBS."""
    run_dir = tmp_path_factory.mktemp("runs") / "sweep" / "run"
    train(RunConfig(**request.module.KNOBS), run_dir)
    return run_dir
