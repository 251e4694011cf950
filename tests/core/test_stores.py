"""An object store is written and read like a folder: whole files, no stale listings, and errors in one line."""

import json
import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from services.s3 import S3

from blip_core import stores
from blip_core.errors import WorkspaceError
from blip_core.files import (
    append_text,
    atomic_copy,
    atomic_file,
    atomic_folder,
    read_json,
    remove_folder,
    write_json,
)
from blip_core.workspace import Workspace


class StopError(BaseException):
    """Stands for the signal that ends a process."""


def names(bucket: str) -> list[str]:
    """What a client of its own finds in the bucket."""
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    root = bucket.removeprefix("s3://")
    return sorted(name.removeprefix(f"{root}/") for name in fs.find(root))


def content(bucket: str, name: str) -> bytes:
    return fsspec.filesystem("s3", skip_instance_cache=True).cat_file(f"{bucket}/{name}")


def in_another_process(script: str, *words: str) -> str:
    command = [sys.executable, "-c", textwrap.dedent(script), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_a_file_is_in_the_store_when_it_is_whole_and_not_before(bucket: str) -> None:
    target = stores.located(f"{bucket}/w/new/part.bin")
    with atomic_file(target) as temporary:
        temporary.write_bytes(b"half")
        assert isinstance(temporary, Path)
        assert names(bucket) == []
    assert content(bucket, "w/new/part.bin") == b"half"
    assert names(bucket) == ["w/new/part.bin"]
    assert list((stores.cache_folder() / "writing").iterdir()) == []


def test_a_writer_that_is_stopped_leaves_what_stood_in_the_store(bucket: str) -> None:
    target = stores.located(f"{bucket}/part.bin")
    for data, stop in ((b"old", False), (b"new", True)):
        try:
            with atomic_file(target) as temporary:
                temporary.write_bytes(data)
                if stop:
                    raise StopError
        except StopError:
            pass
    assert content(bucket, "part.bin") == b"old"


def test_what_a_writer_killed_amid_its_file_left_on_the_machine_is_swept(bucket: str) -> None:
    script = """
        import os, sys
        from blip_core import files, stores
        with files.atomic_file(stores.located(sys.argv[1])) as temporary:
            temporary.write_bytes(b"half")
            os._exit(0)
    """
    in_another_process(script, f"{bucket}/part.bin")
    writing = stores.cache_folder() / "writing"
    assert len(list(writing.iterdir())) == 1
    in_another_process(script.replace("os._exit(0)", ""), f"{bucket}/other.bin")
    assert list(writing.iterdir()) == []
    assert names(bucket) == ["other.bin"]


def test_a_folder_gets_its_marker_last_and_loses_it_first(bucket: str, store: S3) -> None:
    target = stores.located(f"{bucket}/model")
    for version in ("first", "second"):
        seen = len(store.requests())
        with atomic_folder(target) as temporary:
            for name in ("a.bin", "config.json", version, "z.bin"):
                (temporary / name).write_text(version)
        changes = [line for line in store.requests()[seen:] if line.startswith(("PUT", "DELETE"))]
        assert changes[-1 if version == "first" else -2].split()[:2] == ["PUT", f"/{target.path}/config.json"]
        if version == "second":
            assert changes[0].split()[:2] == ["DELETE", f"/{target.path}/config.json"]
    assert names(bucket) == ["model/a.bin", "model/config.json", "model/second", "model/z.bin"]
    assert {content(bucket, name) for name in names(bucket)} == {b"second"}


def test_a_file_that_another_process_puts_or_takes_away_is_seen_at_once(bucket: str) -> None:
    root = stores.located(f"{bucket}/w")
    write_json(root / "folder" / "first.json", 1)
    assert [path.name for path in (root / "folder").glob("*.json")] == ["first.json"]
    assert not (root / "folder" / "second.json").exists()
    script = """
        import sys, fsspec
        fs = fsspec.filesystem("s3")
        fs.pipe_file(f"{sys.argv[1]}/second.json", b"2")
        fs.rm_file(f"{sys.argv[1]}/first.json")
    """
    in_another_process(script, f"{root}/folder")
    assert [path.name for path in (root / "folder").glob("*.json")] == ["second.json"]
    assert (root / "folder" / "second.json").exists()
    assert not (root / "folder" / "first.json").exists()


def test_a_copy_is_made_inside_the_store_out_of_it_and_into_it(bucket: str, store: S3, tmp_path: Path) -> None:
    inside, copied = (stores.located(f"{bucket}/{name}") for name in ("inside", "copied"))
    (tmp_path / "local").write_bytes(b"bytes")
    atomic_copy(tmp_path / "local", inside)
    seen = len(store.requests())
    atomic_copy(inside, copied)
    assert not [line for line in store.requests()[seen:] if line.startswith("GET")]
    atomic_copy(copied, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content(bucket, "copied") == b"bytes"


def test_text_is_added_to_the_end_and_a_folder_is_removed_whole(bucket: str) -> None:
    root = stores.located(f"{bucket}/w")
    for line in ("ä\n", "b\n"):
        append_text(root / "rows", line)
    assert content(bucket, "w/rows").decode() == "ä\nb\n"
    write_json(root / "deep" / "er.json", {})
    write_json(stores.located(f"{bucket}/w2/kept.json"), {})
    remove_folder(root)
    remove_folder(root)
    assert names(bucket) == ["w2/kept.json"]


def test_no_addition_to_an_account_is_lost_among_writers(bucket: str) -> None:
    made = Workspace.open(f"{bucket}/w").round(1)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: made.add_seconds("annotate", 0.5), range(24)))
    assert read_json(made.seconds) == {"annotate": 12.0}


def test_a_workspace_in_a_store_is_opened_previewed_and_found(bucket: str) -> None:
    preview = Workspace.preview(f"{bucket}/w/")
    assert names(bucket) == []
    opened = Workspace.open(f"{bucket}/w")
    assert opened == preview
    assert names(bucket) == []
    with pytest.raises(WorkspaceError, match=f"workspace {bucket}/w: not found"):
        Workspace.existing(f"{bucket}/w")
    write_json(opened.round(2).evaluation, {})
    found = Workspace.existing(f"{bucket}/w")
    assert found.round_numbers() == [2]
    assert str(found.shard("x")) == f"{bucket}/w/shards/x.parquet"
    assert isinstance(found.scratch, Path)
    assert found.scratch != Workspace.open(f"{bucket}/w2").scratch


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("s3://no-such-bucket/w", "bucket"),
        ("s3://", "names no place"),
        ("simplecache::s3://bucket/w", "names no place"),
        ("nothing://bucket/w", "nothing"),
        ("http://127.0.0.1:9/w", "http"),
    ],
)
def test_a_store_that_cannot_hold_a_workspace_is_refused_in_one_line(store: S3, url: str, named: str) -> None:
    with pytest.raises(WorkspaceError, match=named) as caught:
        Workspace.open(url)
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "127.0.0.1:9"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "true"}, "credentials"),
        ({"FSSPEC_S3_ENDPOINT_URL": "http://127.0.0.1:10"}, "127.0.0.1:10"),
    ],
)
def test_no_network_and_no_credentials_are_told_in_one_line(
    store: S3, bucket: str, variables: dict[str, str], said: str
) -> None:
    environment = {name: value for name, value in {**os.environ, **variables}.items() if value}
    command = [sys.executable, "-m", "flows", "query", "--workspace", f"{bucket}/w", "SELECT 1"]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 1
    assert answer.stderr.startswith(f"error: workspace {bucket}/w: cannot be reached: ")
    assert said in answer.stderr
    assert answer.stderr.count("\n") == 1


def test_a_bucket_that_may_not_be_written_to_is_told_in_one_line(bucket: str) -> None:
    name = bucket.removeprefix("s3://")
    statement = {"Effect": "Deny", "Principal": "*", "Action": "s3:PutObject", "Resource": f"arn:aws:s3:::{name}/*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    fsspec.filesystem("s3").call_s3("put_bucket_policy", Bucket=name, Policy=policy)
    with pytest.raises(WorkspaceError, match=f"workspace {bucket}/w: cannot be written: access denied") as caught:
        Workspace.open(f"{bucket}/w")
    assert "\n" not in str(caught.value)
    target = stores.located(f"{bucket}/w/part")
    with pytest.raises(WorkspaceError, match=f"{target}: cannot be written"), atomic_file(target) as temporary:
        temporary.touch()


def test_a_store_that_is_gone_amid_a_command_is_told_in_one_line(bucket: str) -> None:
    script = """
        import sys
        from blip_core.stores import located
        from blip_core.workspace import Workspace
        from flows.cli import main
        Workspace.existing = classmethod(lambda cls, root: cls(located(root)))
        sys.argv = ["capfilt", "query", "--workspace", "s3://bucket/w", "SELECT 1"]
        main()
    """
    answer = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 1
    assert answer.stderr.startswith("error: Could not connect to the endpoint")
    assert answer.stderr.count("\n") == 1


def test_a_stores_files_are_waited_for_together_and_come_in_their_order(bucket: str, tmp_path: Path) -> None:
    together = threading.Barrier(4)

    def name_when_the_first_four_are_here(path: Path) -> str:
        if int(path.name) < together.parties:
            together.wait(60)
        return path.name

    names = [str(number) for number in range(100)]
    root = stores.located(bucket)
    assert list(stores.each((root / name for name in names), name_when_the_first_four_are_here)) == names
    threads = {*stores.each((tmp_path / name for name in names), lambda _: threading.get_ident())}
    assert threads == {threading.get_ident()}


def test_a_store_whose_client_is_not_installed_is_told_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "s3fs.py").write_text("raise ImportError('No module named s3fs')")
    script = "from blip_core.workspace import Workspace; Workspace.open('s3://bucket/w')"
    answer = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "WorkspaceError: s3://bucket/w: " in answer.stderr
    assert "pip install capfilt[s3]" in answer.stderr
