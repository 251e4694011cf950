"""What stands under a final name is whole, whatever happens while it is written."""

import json
import os
from pathlib import Path

import pytest

from blip_core.errors import WorkspaceError
from blip_core.files import atomic_file, atomic_folder, fingerprint, read_json, write_json


class StopError(BaseException):
    """Stands for the signal that ends a process."""


def test_a_file_appears_whole_and_in_a_folder_made_for_it(tmp_path: Path) -> None:
    target = tmp_path / "new" / "deep" / "part.bin"
    with atomic_file(target) as temporary:
        temporary.write_bytes(b"half")
        assert not target.exists()
        assert temporary.name == f".part.bin.{os.getpid()}.tmp"
    assert target.read_bytes() == b"half"
    assert list(target.parent.iterdir()) == [target]


def test_a_writer_that_is_stopped_leaves_what_stood_before(tmp_path: Path) -> None:
    target = tmp_path / "part.bin"
    target.write_bytes(b"old")

    def write() -> None:
        with atomic_file(target) as temporary:
            temporary.write_bytes(b"new")
            raise StopError

    with pytest.raises(StopError):
        write()
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_replaces_the_one_that_stood_there(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for content in ("first", "second"):
        with atomic_folder(target) as temporary:
            (temporary / content).write_text(content)
    assert [path.name for path in target.iterdir()] == ["second"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_is_not_finished_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as temporary:
        (temporary / "whole").touch()

    def write() -> None:
        with atomic_folder(target) as temporary:
            (temporary / "half").touch()
            raise StopError

    with pytest.raises(StopError):
        write()
    assert [path.name for path in target.iterdir()] == ["whole"]
    assert list(tmp_path.iterdir()) == [target]


def test_leftovers_of_a_killed_writer_are_no_hindrance(tmp_path: Path) -> None:
    leftover = tmp_path / f".model.{os.getpid()}.tmp"
    leftover.mkdir()
    (leftover / "half").touch()
    with atomic_folder(tmp_path / "model") as temporary:
        (temporary / "whole").touch()
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["whole"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for atomic in (atomic_file, atomic_folder):
        with pytest.raises(WorkspaceError, match=r"file: the folder cannot be made"), atomic(tmp_path / "file" / "x"):
            pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(WorkspaceError, match=r"folder: cannot be written"), atomic_file(tmp_path / "folder") as written:
        written.touch()


def test_json_is_sorted_and_read_back(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1.5, "a": ["ä", None]})
    assert (tmp_path / "a.json").read_text(encoding="utf-8").index('"a"') < 10
    assert "ä" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"a": ["ä", None], "b": 1.5}


@pytest.mark.parametrize("content", [b'{"a": ', b"", b"\xff\xfe"])
def test_a_torn_json_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "torn.json").write_bytes(content)
    with pytest.raises(WorkspaceError, match=r"torn\.json: not a readable JSON file"):
        read_json(tmp_path / "torn.json")
    with pytest.raises(WorkspaceError, match=r"gone\.json: not a readable JSON file"):
        read_json(tmp_path / "gone.json")


def test_a_value_that_json_cannot_hold_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert list(tmp_path.iterdir()) == []


def test_a_fingerprint_changes_with_any_value_and_with_nothing_else() -> None:
    base = {"steps": 10, "rate": 0.1}
    mark = fingerprint("train", base, 3)
    assert fingerprint("train", json.loads('{"rate": 0.1, "steps": 10}'), 3) == mark
    others = [
        ("train", base, 4),
        ("tune", base, 3),
        ("train", {**base, "steps": 11}, 3),
        ("train", base),
        (base, "train", 3),
    ]
    assert len({mark, *(fingerprint(*values) for values in others)}) == 6
    assert len(mark) == 16
    assert int(mark, 16) >= 0
