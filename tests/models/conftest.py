from __future__ import annotations

import pytest

from tests.models import tiny


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """`checkpoint(family)`: the folder of a tiny random model of that family, built once."""
    folders = {}

    def get(family: str):
        if family not in folders:
            folders[family] = tiny.build(family, tmp_path_factory.mktemp(family))
        return folders[family]

    return get
