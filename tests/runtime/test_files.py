"""Files in folders that are not trusted, and files written whole."""

from __future__ import annotations

import os
import stat

import pytest

from scale_digrap.runtime.files import UntrustedFileError, is_private, open_inside, write_whole


def test_regular_files_inside_are_opened(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "a").write_bytes(b"whole")
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    for folder in (tmp_path, tmp_path / "link"):  # the folder itself may be a link
        with open_inside(folder, "state/a") as file:
            assert file.read() == b"whole"
    with pytest.raises(FileNotFoundError):
        open_inside(tmp_path, "state/b")


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "name", ["../x", "/dev/zero", "state/../../x", "", "state//a", "fifo", "zero", "out", "folder/x", "state", "a\0b"]
)
def test_nothing_else_is(tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x").write_bytes(b"secret")
    inside = tmp_path / "inside"
    (inside / "state").mkdir(parents=True)
    os.mkfifo(inside / "fifo")
    (inside / "zero").symlink_to("/dev/zero")
    (inside / "out").symlink_to(outside / "x")
    (inside / "folder").symlink_to(outside)
    with pytest.raises(UntrustedFileError):
        open_inside(inside, name)


def test_written_whole_with_its_mode(tmp_path):
    target = tmp_path / "target"
    target.write_text("old")
    (tmp_path / "link").symlink_to(target)
    write_whole(tmp_path / "link", "new", mode=0o600)
    assert target.read_text() == "old"
    assert (tmp_path / "link").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "link").lstat().st_mode) == 0o600

    def broken():
        yield b"half"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(target, broken())
    assert target.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target"]


def test_private_folders(tmp_path):
    assert is_private(tmp_path) is None
    tmp_path.chmod(0o777)
    assert "others can write" in is_private(tmp_path)
    tmp_path.chmod(0o700)
