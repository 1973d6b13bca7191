"""What systems leave beside a person's files is never data."""

import pytest

from scale_digrap.data.sidecars import is_sidecar


@pytest.mark.parametrize(
    "path",
    [
        "._a.tar",
        "train/._0001.jpg",
        ".DS_Store",
        "train/.DS_Store",
        "__MACOSX/train/0001.jpg",
        "train/Thumbs.db",
        "thumbs.DB",
        "desktop.ini",
        "@eaDir/a.jpg/x.jpg",
        "cat/.ipynb_checkpoints/1-checkpoint.jpg",
        "Icon\r",
    ],
)
def test_sidecars_of_every_system_are_known_at_any_depth(path):
    assert is_sidecar(path)


@pytest.mark.parametrize("path", ["a.jpg", "train/0001.json", "_.jpg", "my._x.jpg", "a.b/c.jpg", "thumbs.db.jpg", ""])
def test_other_names_are_not(path):
    assert not is_sidecar(path)
