"""What stands under a final name is whole, whatever happens while it is written."""

import json
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from blip_core.errors import WorkspaceError
from blip_core.files import atomic_file, atomic_folder, fingerprint, read_json, sweep, write_json


class StopError(BaseException):
    """Stands for the signal that ends a process."""


def test_a_file_appears_whole_and_in_a_folder_made_for_it(tmp_path: Path) -> None:
    target = tmp_path / "new" / "deep" / "part.bin"
    with atomic_file(target) as temporary:
        temporary.write_bytes(b"half")
        assert not target.exists()
        [hidden] = target.parent.iterdir()
        assert hidden.name.startswith(".part.bin.capfilt-")
        assert hidden.name.endswith(".tmp")
        assert temporary.parent == hidden
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


WRITER = """
    import pathlib, sys, time
    from blip_core import files
    with getattr(files, sys.argv[1])(pathlib.Path(sys.argv[2])) as temporary:
        if sys.argv[1] == "atomic_folder":
            temporary = temporary / "half"
        temporary.write_bytes(b"half")
        print(temporary, flush=True)
        sys.stdin.read()
"""


def writer(atomic: str, target: Path) -> subprocess.Popen[str]:
    """A process amid its writing; it goes on when its input ends."""
    script = textwrap.dedent(WRITER)
    command = [sys.executable, "-c", script, atomic, str(target)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def written_by(process: subprocess.Popen[str]) -> Path:
    assert process.stdout is not None
    return Path(process.stdout.readline().strip())


@pytest.mark.parametrize("atomic", ["atomic_file", "atomic_folder"])
def test_what_a_killed_writer_left_is_swept_and_what_a_living_one_writes_is_not(atomic: str, tmp_path: Path) -> None:
    with writer(atomic, tmp_path / "dead") as dead, writer(atomic, tmp_path / "living") as living:
        left, kept = written_by(dead), written_by(living)
        sweep(tmp_path)
        assert left.exists()
        dead.kill()
        dead.wait()
        with atomic_file(tmp_path / "another") as temporary:
            temporary.touch()
        assert not left.exists()
        assert kept.exists()
    assert (tmp_path / "living").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["another", "living"]


def test_no_sweep_hinders_a_writer_that_begins(tmp_path: Path) -> None:
    over = threading.Event()

    def sweeping() -> int:
        rounds = 0
        while not over.is_set():
            sweep(tmp_path)
            rounds += 1
        return rounds

    with ThreadPoolExecutor(4) as pool:
        sweepers = [pool.submit(sweeping) for _ in range(3)]
        try:
            for number in range(300):
                write_json(tmp_path / f"{number % 7}.json", number)
        finally:
            over.set()
        assert all(sweeper.result() for sweeper in sweepers)
    assert sorted(read_json(path) for path in tmp_path.iterdir()) == list(range(293, 300))


def test_foreign_hidden_files_are_never_swept(tmp_path: Path) -> None:
    names = {".part.tmp", ".part.123.tmp", "part.capfilt-host-1-0123abcd.tmp", ".config", ".a.capfilt-host-1-01.tmp"}
    for name in names:
        (tmp_path / name).mkdir()
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == names


SWAPPER = """
    import os, pathlib, signal, sys
    from blip_core.files import atomic_folder
    target, rename = pathlib.Path(sys.argv[1]), pathlib.Path.rename
    def last_rename(path, to):
        if to == target:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(path, to)
    pathlib.Path.rename = last_rename
    with atomic_folder(target) as temporary:
        (temporary / "new").touch()
"""


def test_a_writer_killed_between_the_old_folder_and_the_new_one_costs_neither(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as temporary:
        (temporary / "old").touch()
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(SWAPPER), str(target)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not target.exists()
    sweep(tmp_path)
    assert [path.name for path in target.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_new_folder_that_cannot_be_put_in_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as temporary:
        (temporary / "old").touch()
    rename = Path.rename

    def failing(path: Path, to: Path) -> Path:
        if path == temporary:
            raise OSError(28, "No space left on device")
        return rename(path, to)

    def write() -> None:
        nonlocal temporary
        with atomic_folder(target) as temporary:
            (temporary / "new").touch()

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(WorkspaceError, match=r"model: cannot be written \(No space left on device\)"):
        write()
    assert [path.name for path in target.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_is_not_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WorkspaceError, match=r"file: cannot be written"), atomic_folder(tmp_path / "file"):
        pass
    assert (tmp_path / "file").is_file()


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
