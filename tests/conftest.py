"""Fixtures that several test files use."""

import pytest

from pgolf_core import corpus


@pytest.fixture(scope="session")
def embedded():
    """Folder of the embedded corpus with 1024 pieces; built once (some 20 s), then kept in data/."""
    return corpus.build_embedded(1024)
