"""A checkpoint in a store is read from a copy on this machine: fetched once, of one moment, and not kept for ever."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from services.s3 import S3

from blip_core import copies, stores
from blip_core.copies import local_copy
from blip_core.errors import CheckpointError, WorkspaceError
from blip_core.files import atomic_folder
from blip_core.med.checkpoint import load_med
from blip_core.med.description import read_checkpoint_config


@pytest.fixture(autouse=True)
def cache(store: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return stores.cache_folder() / "copies"


def put(url: str, **files: str) -> Path:
    """A folder in the store."""
    folder = stores.located(url)
    with atomic_folder(folder) as temporary:
        for name, content in files.items():
            (temporary / name).write_text(content)
    return folder


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def fetched(store: S3, since: int) -> list[str]:
    return [line for line in store.requests()[since:] if line.startswith("GET") and "list-type" not in line]


def test_a_path_of_this_machine_is_its_own_copy(tmp_path: Path) -> None:
    assert local_copy(tmp_path) == tmp_path


def test_a_folder_is_fetched_once_however_many_ask_for_it(bucket: str, store: S3) -> None:
    folder = put(f"{bucket}/med", weights="w" * 1000, config="{}")
    seen = len(store.requests())
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: local_copy(folder), range(8)))
    [copy] = found
    assert copy.name == "med"
    assert content(copy) == {"weights": "w" * 1000, "config": "{}"}
    assert len(fetched(store, seen)) == 2
    assert local_copy(folder / "weights").read_text() == "w" * 1000


def test_a_folder_that_was_replaced_is_another_copy(bucket: str) -> None:
    first = local_copy(put(f"{bucket}/med", weights="a", config="{}", old="x"))
    second = local_copy(put(f"{bucket}/med", weights="b", config="{}"))
    assert content(second) == {"weights": "b", "config": "{}"}
    assert content(first) == {"weights": "a", "config": "{}", "old": "x"}


def test_a_folder_that_changes_while_it_is_fetched_is_fetched_again(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = put(f"{bucket}/med", a="1", b="1")
    fetch: Callable[[Path, Path], None] = stores.fetch
    changes = iter("23")

    def overtaken(source: Path, target: Path) -> None:
        if source.name == "b" and (version := next(changes, None)):
            put(f"{bucket}/med", a=version, b=version)
        fetch(source, target)

    monkeypatch.setattr(stores, "fetch", overtaken)
    assert content(local_copy(folder)) == {"a": "3", "b": "3"}


def test_the_longest_unused_copies_go_when_room_is_needed(
    bucket: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "KEPT_BYTES", 250)
    kept = {name: local_copy(put(f"{bucket}/{name}", weights=name * 100)) for name in "ab"}
    hours_ago = time.time() - 5 * copies.UNUSED_SECONDS
    os.utime(kept["a"].parent, (hours_ago, hours_ago))
    kept["c"] = local_copy(put(f"{bucket}/c", weights="c" * 100))
    assert not kept["a"].exists()
    kept["d"] = local_copy(put(f"{bucket}/d", weights="d" * 100))
    assert all(kept[name].exists() for name in "bcd")  # in use, or were a moment ago
    assert content(local_copy(stores.located(f"{bucket}/a"))) == {"weights": "a" * 100}
    assert not [path for path in cache.iterdir() if path.name.endswith(".tmp")]


def test_what_is_not_there_is_named_by_its_url(bucket: str) -> None:
    with pytest.raises(WorkspaceError, match=f"{bucket}/nothing: there is no such file or folder"):
        local_copy(stores.located(f"{bucket}/nothing"))
    with pytest.raises(CheckpointError, match=f"{bucket}/nothing: not found"):
        load_med(f"{bucket}/nothing")


def test_a_checkpoint_in_a_store_is_the_one_in_a_folder(
    published: Path, bucket: str, tmp_path: Path, store: S3
) -> None:
    from blip_core.med.checkpoint import save_med

    loaded = load_med(published / "captioner")
    target = stores.located(f"{bucket}/captioner")
    digests = {
        save_med(folder, loaded.med, loaded.architecture, loaded.tokenizer, {"made": "here"})
        for folder in (tmp_path / "captioner", target)
    }
    assert len(digests) == 1
    seen = len(store.requests())
    assert read_checkpoint_config(target) == read_checkpoint_config(tmp_path / "captioner")
    assert not [line for line in fetched(store, seen) if "safetensors" in line]
    there, here = load_med(f"{bucket}/captioner"), load_med(tmp_path / "captioner")
    assert there.digest == here.digest
    assert all((there.med.state_dict()[name] == tensor).all() for name, tensor in here.med.state_dict().items())
    fsspec.filesystem("s3").rm_file(f"{bucket}/captioner/config.json")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_med(f"{bucket}/captioner")
    fsspec.filesystem("s3").put(str(published / "filter"), f"{bucket}/foreign", recursive=True)
    assert load_med(f"{bucket}/foreign").digest == load_med(published / "filter").digest
