"""Where an address leads: a path of this machine, or an object store that fsspec knows, such as `s3://bucket/folder`.

An object store's path has the methods of pathlib's (it is a UPath) and goes by the type Path. Nothing that it lists is
kept: another machine may have written since. What cannot lie in a store lies in the cache folder of this machine.
"""

import hashlib
import os
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import fsspec

from blip_core.errors import WorkspaceError

SEPARATOR, CHAIN = "://", "::"
LOCAL = ("file://", "local://")
# s3fs would read 50 MB ahead of whatever is asked for; it takes no less than 5.
OPTIONS: dict[str, dict[str, Any]] = {"s3": {"default_block_size": 5 * 2**20}}
# Read at once where a few columns of a Parquet file are wanted: they lie side by side, its footer at the end.
READ_AHEAD = 2**18
# Two writers of one small file collide rarely; so many in a row are no chance.
CHANGE_TRIES, CHANGE_SECONDS = 60, 0.5
AT_A_TIME = 16

Value = TypeVar("Value")


def located(address: str | Path) -> Path:
    """The path of an address: of this machine, resolved, or of an object store for a URL.

    Raises WorkspaceError where the URL is of no kind that is known, or what speaks to it is not installed.
    """
    if is_remote(address):
        return cast(Path, address)
    text = str(address)
    for scheme in LOCAL:
        text = text.removeprefix(scheme)
    if SEPARATOR not in text:
        return Path(text).expanduser().resolve()
    protocol, _, rest = text.partition(SEPARATOR)
    if not rest.strip("/") or CHAIN in text:
        raise WorkspaceError(f"{text}: names no place in a store; expected a URL such as s3://bucket/folder")
    from upath import UPath

    try:
        path = UPath(text.rstrip("/"), use_listings_cache=False, **OPTIONS.get(protocol, {}))
        _ = path.fs
    except ImportError as error:
        remedy = "; pip install capfilt[s3]" if protocol in ("s3", "s3a") else ""
        raise WorkspaceError(f"{text}: {reason(error)}{remedy}") from error
    except (ValueError, TypeError) as error:
        raise WorkspaceError(f"{text}: cannot be opened ({reason(error)})") from error
    return cast(Path, path)


def is_url(address: str | Path) -> bool:
    """Whether an address has a scheme, as that of a store's path always has."""
    return SEPARATOR in str(address)


def is_remote(path: str | Path) -> bool:
    """Whether a path is an object store's."""
    return not isinstance(path, (str, Path))


def filesystem(path: Path) -> Any:
    """The fsspec file system of an object store's path."""
    return cast(Any, path).fs


def snapshot(path: Path) -> Any:
    """The same file system with its listings kept from now on, for a reader that asks for every file over and over."""
    upath = cast(Any, path)
    kept = fsspec.filesystem(upath.protocol, **{**upath.storage_options, "use_listings_cache": True})
    kept.invalidate_cache()
    return kept


def each(paths: Iterable[Path], function: Callable[[Path], Value]) -> Iterator[Value]:
    """What the function makes of each path, in their order; of a store's, many at a time, for each is waited for."""
    left = iter(paths)
    first = list(islice(left, 2 * AT_A_TIME))
    if not any(map(is_remote, first)):
        yield from map(function, chain(first, left))
        return
    with ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="store") as pool:
        waiting = deque(pool.submit(function, path) for path in first)
        while waiting:
            value = waiting.popleft().result()
            waiting.extend(pool.submit(function, path) for path in islice(left, 1))
            yield value


def key(path: Path) -> str:
    """The name by which its file system knows an object store's path."""
    return str(cast(Any, path).path)


def cache_folder() -> Path:
    """What may be removed when nothing runs: $XDG_CACHE_HOME/capfilt, or ~/.cache/capfilt."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "capfilt"


def scratch_folder(path: Path) -> Path:
    """A place on this machine for what belongs to a path and cannot lie in a store; a local path's is the path itself.

    Locks, a database, what other programs write to.
    """
    if not is_remote(path):
        return path
    return cache_folder() / "scratch" / f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"


def readable(path: Path, read_ahead: int = READ_AHEAD) -> Path | IO[bytes]:
    """What pyarrow reads a file from: a local path as it is, or a store's file, of which parts are fetched.

    Args:
        read_ahead: bytes fetched beyond what is asked for, and held.

    Raises one of `errors`.
    """
    if not is_remote(path):
        return path
    opened = filesystem(path).open(key(path), "rb", cache_type="readahead", block_size=read_ahead)
    return cast("IO[bytes]", opened)


def check_bucket(path: Path) -> None:
    """Raises one of `errors` where the bucket of a store's path is not there or may not be looked at."""
    bucket = key(path).partition("/")[0]
    try:
        filesystem(path).info(bucket)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no bucket {bucket}") from error


def read_bytes(path: Path) -> bytes:
    """All of a file."""
    return cast(bytes, filesystem(path).cat_file(key(path))) if is_remote(path) else path.read_bytes()


def put_bytes(data: bytes, path: Path) -> None:
    """Puts a file into a store in one step."""
    filesystem(path).pipe_file(key(path), data)


def put(source: Path, target: Path) -> None:
    """Puts a local file into a store; it is there when all of it is."""
    filesystem(target).put_file(str(source), key(target))


def put_folder(source: Path, target: Path, marker: str) -> None:
    """Puts the files of a local folder into a store in the place of those that are there; `marker` comes last.

    What was there before loses its marker first. Raises WorkspaceError where `target` is a file.
    """
    fs, root = filesystem(target), key(target)
    standing = set(fs.find(root))
    if root in standing:
        raise WorkspaceError(f"{target}: cannot be written (is no folder)")
    last = f"{root}/{marker}"
    if last in standing:
        fs.rm_file(last)
    files = {f"{root}/{file.relative_to(source).as_posix()}": file for file in source.rglob("*") if file.is_file()}
    for name in sorted(files, key=lambda name: (name == last, name)):
        fs.put_file(str(files[name]), name)
    for name in standing - files.keys() - {last}:
        fs.rm_file(name)


def fetch(source: Path, target: Path) -> None:
    """Copies a store's file to a local path."""
    filesystem(source).get_file(key(source), str(target))


def copy(source: Path, target: Path) -> None:
    """Copies a file from one place of a store to another, inside the store."""
    filesystem(source).cp_file(key(source), key(target))


def remove(path: Path) -> None:
    """Removes a file."""
    filesystem(path).rm_file(key(path))


def remove_folder(path: Path) -> None:
    """Removes all files below a path."""
    with suppress(FileNotFoundError):
        filesystem(path).rm(key(path), recursive=True)


def change(path: Path, new: Callable[[bytes | None], bytes]) -> None:
    """Replaces a file by what `new` makes of it (None: there is none), and of what others made of it meanwhile.

    S3 refuses what was made of an older state, and it is made anew; in other stores the last writer wins.
    """
    fs, name = filesystem(path), key(path)
    for attempt in range(CHANGE_TRIES):
        state = _conditions(path)
        before = None if state.get("mode") == "create" else read_bytes(path)
        try:
            fs.pipe_file(name, new(before), **state)
        except OSError as error:
            if not _overtaken(error) or attempt + 1 == CHANGE_TRIES:
                raise
            time.sleep(random.uniform(0, CHANGE_SECONDS))
        else:
            return


def _conditions(path: Path) -> dict[str, str]:
    """What a put says, so that it is refused where the file is not as it is now."""
    fs = filesystem(path)
    try:
        etag = fs.info(key(path)).get("ETag")
    except FileNotFoundError:
        return {"mode": "create"}
    return {"IfMatch": etag} if etag and "s3" in fs.protocol else {}


def _overtaken(error: OSError) -> bool:
    """Whether S3 refused a put because the file has changed."""
    answer = getattr(error.__cause__, "response", None) or {}
    refused = answer.get("Error", {}).get("Code") in ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")
    return refused or isinstance(error, FileExistsError)


def errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """OSError, what the clients of stores raise that is none, and `others`."""
    return (OSError, *client_errors(), *others)


def client_errors() -> tuple[type[Exception], ...]:
    """What the clients of stores raise on their own account: no connection, no credentials."""
    known = (("botocore.exceptions", "BotoCoreError"), ("aiohttp", "ClientError"))
    return tuple(getattr(sys.modules[module], name) for module, name in known if module in sys.modules)


def reason(error: Exception) -> str:
    """What an error says, in one line."""
    if isinstance(error, PermissionError) and error.strerror is None:
        return f"access denied ({' '.join(str(error).split())})"
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())


@contextmanager
def reaching(what: object) -> Iterator[None]:
    """Within, an error of the file system or of a store's client becomes a WorkspaceError that names `what`."""
    try:
        yield
    except errors(NotImplementedError) as error:
        raise WorkspaceError(f"{what}: {reason(error)}") from error
