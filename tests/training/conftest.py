from __future__ import annotations

import pytest

from tests.models import tiny
from tests.models.conftest import checkpoint  # noqa: F401


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Training shards of coloured shapes, all with images."""
    return tiny.write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def mixed_shards(tmp_path_factory):
    """Shards in which two samples of three have no image."""
    text_only = tuple(i for i in range(48) if i % 3)
    return tiny.write_shards(tmp_path_factory.mktemp("mixed"), text_only=text_only)
