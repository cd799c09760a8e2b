"""Files that appear whole or not at all."""

import os
import stat
from pathlib import Path

import pytest

from groundingdino.runtime.files import atomic_file, atomic_folder, leftovers, open_file, write_text


def test_a_replaced_file_keeps_its_permissions_and_a_new_one_has_the_usual_ones(tmp_path):
    write_text(tmp_path / "private", "old")
    (tmp_path / "private").chmod(0o600)
    write_text(tmp_path / "private", "new")
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600
    (tmp_path / "usual").touch()
    write_text(tmp_path / "made", "x")
    assert (tmp_path / "made").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_private_file_is_private_while_it_is_written(tmp_path):
    (tmp_path / "private").touch(0o600)
    with atomic_file(tmp_path / "private"):
        (temporary,) = leftovers(tmp_path / "private")
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600


def test_the_temporary_name_cannot_be_foreseen(tmp_path):
    names = set()
    for _ in range(3):
        with atomic_file(tmp_path / "a"):
            names |= {found.name for found in leftovers(tmp_path / "a")}
    assert len(names) == 3 and not leftovers(tmp_path / "a")


def test_a_link_prepared_at_the_temporary_name_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr("secrets.token_hex", lambda _: "guessed")
    (tmp_path / "victim").write_text("untouched")
    (tmp_path / ".a.guessed.tmp").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="could not write .*File exists"):
        write_text(tmp_path / "a", "evil")
    assert (tmp_path / "victim").read_text() == "untouched" and not (tmp_path / "a").exists()


def test_content_and_rename_are_flushed_to_the_disk_in_this_order(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(
        "os.fsync", lambda fd: (events.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file"), fsync(fd))
    )
    monkeypatch.setattr("os.replace", lambda a, b: (events.append("rename"), replace(a, b)))
    write_text(tmp_path / "a", "x")
    assert events == ["file", "rename", "folder"]


def test_a_failure_inside_leaves_the_old_file_and_nothing_else(tmp_path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(KeyError), atomic_file(tmp_path / "a") as file:
        file.write(b"new")
        raise KeyError
    with pytest.raises(KeyError), atomic_folder(tmp_path / "folder") as folder:
        (folder / "b").touch()
        raise KeyError
    assert (tmp_path / "a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_folders_pipes_sockets_and_devices_are_neither_replaced_nor_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, kind in (("pipe", "a pipe"), ("folder", "a folder")):
        with pytest.raises(ValueError, match=f"{kind}; name a file to write"):
            write_text(tmp_path / name, "x")
        with pytest.raises(ValueError, match=f"{kind}, expected a file"):
            open_file(tmp_path / name)
    os.mknod(tmp_path / "socket", stat.S_IFSOCK | 0o600)
    for wrong, message in (
        (tmp_path / "nothing", "no such file"),
        (tmp_path / "a\0b", "cannot be the name of a file"),
        (tmp_path / "socket", "socket: cannot be opened"),
        (Path("/dev/zero"), "a device or a socket, expected a file"),
    ):
        with pytest.raises(ValueError, match=message):
            open_file(wrong)
