"""Fetching through img2dataset, which stays behind this file: URLs in, a file or a reason for each out.

img2dataset is asked for bytes as they came (it neither decodes nor re-encodes), runs in a process group of its own
under a wall-clock limit, and is judged by what it wrote, never by its exit status, which is 0 whatever happened.
"""

import json
import math
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from blip_core.data.guard import Limits
from blip_core.errors import DownloadError, WorkspaceError

PROGRAM = Path(__file__).with_name("fetch_process.py")

# X-Robots-Tag directives by which a page declines such use.
ROBOTS_DIRECTIVES = ["noai", "noimageai", "noindex", "noimageindex", "noml"]

# Libraries that img2dataset imports would otherwise report to, or ask, their makers.
QUIET = {
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "WANDB_MODE": "disabled",
    "WANDB_ERROR_REPORTING": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}

# img2dataset's messages are urllib's, and blip_core.data.guard's: the first pattern that occurs names the reason, none
# of them 'connection'.
MESSAGES = (
    (r"refused as forbidden_address\b", "forbidden_address"),
    (r"refused as credentials_refused\b", "credentials_refused"),
    (r"refused as too_many_bytes\b", "too_many_bytes"),
    (r"refused as robots_txt\b", "robots_txt"),
    (r"refused as scheme_refused\b|Redirection to url '.*' is not allowed", "scheme_refused"),
    (r"refused as too_many_redirects\b|would lead to an infinite loop", "too_many_redirects"),
    (r"HTTP Error (404|410)\b", "not_found"),
    (r"HTTP Error (429|500|502|503|504)\b", "overloaded"),
    (r"HTTP Error \d", "http_error"),
    (r"X-Robots-Tag", "refused_by_robots"),
    (r"timed out", "timeout"),
    (r"name resolution|Name or service not known|nodename nor servname|No address associated|does not resolve", "dns"),
    (r"unknown url type|no host given|control characters|nonnumeric port|Invalid IPv6|codec can't|label", "bad_url"),
    (r"UNEXPECTED_EOF", "connection"),
    (r"CERTIFICATE|\[SSL", "tls"),
)

Progress = Callable[[int], None]
PROGRESS_SECONDS = 1.0


class Fetched(NamedTuple):
    """What became of one URL: the file that holds its bytes, or the reason (of REASONS) and the message."""

    path: Path | None
    reason: str | None = None
    message: str = ""


class Fetcher(NamedTuple):
    """How img2dataset is run."""

    processes: int
    threads: int
    timeout_s: int
    user_agent: str
    limits: Limits = Limits()
    ray_address: str | None = None  # of the cluster whose nodes fetch; None: this machine does


@contextmanager
def temporary_folder(parent: Path, name: str) -> Iterator[Path]:
    """A fresh folder under `parent`, gone when the block ends; those that killed processes left are removed as well."""
    folder = parent / f"{name}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise WorkspaceError(f"{folder}: the folder cannot be made ({error.strerror})") from error
    remove_left_folders(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_left_folders(parent: Path) -> None:
    """Removes the temporary folders that killed processes of this host left under `parent`."""
    for left in parent.glob(f"*.{socket.gethostname()}.*.*"):
        if not _is_alive(int(left.name.split(".")[-2])):
            shutil.rmtree(left, ignore_errors=True)


def fetch_urls(
    urls: list[str], folder: Path, fetcher: Fetcher, wall_clock_s: float, progress: Progress | None = None
) -> dict[str, Fetched]:
    """Fetches every URL once.

    Args:
        urls: distinct http and https URLs, at least one. No other scheme may come here: img2dataset opens files.
        folder: does not exist yet; keeps the files.
        fetcher: how.
        wall_clock_s: seconds after which img2dataset and all its processes are killed.
        progress: is told now and then how many files have arrived.

    Returns:
        An entry for every URL; 'interrupted' where img2dataset was ended before it wrote the URL's result.

    Raises:
        DownloadError: img2dataset ended by itself and wrote nothing.
    """
    output = folder / "output"
    output.mkdir(parents=True)
    pq.write_table(pa.table({"url": pa.array(urls, pa.string())}), folder / "urls.parquet")
    tell = (lambda: progress(_arrived(output))) if progress else None
    arguments = _arguments(folder / "urls.parquet", output, len(urls), fetcher)
    ended = _run(arguments, fetcher, folder, wall_clock_s, tell)
    results = dict(_results(output))
    if not results and ended:
        raise DownloadError(f"img2dataset wrote no result for {len(urls)} URLs; it said: {_tail(folder / 'log')}")
    return {url: results.get(url, Fetched(None, "interrupted", "no result was written")) for url in urls}


def _arguments(urls: Path, output: Path, count: int, fetcher: Fetcher) -> dict[str, object]:
    """Arguments of img2dataset.download. Its format 'files' keeps each image at once: a killed run loses few."""
    return {
        "url_list": str(urls),
        "input_format": "parquet",
        "url_col": "url",
        "output_folder": str(output),
        "output_format": "files",
        "disable_all_reencoding": True,
        "extract_exif": False,
        "compute_hash": None,
        "processes_count": fetcher.processes,
        "number_sample_per_shard": math.ceil(count / fetcher.processes),
        "thread_count": fetcher.threads,
        "timeout": fetcher.timeout_s,
        "retries": 0,
        "max_shard_retry": 0,
        "user_agent_token": fetcher.user_agent.lower(),  # with which it compares that of an X-Robots-Tag in lower case
        "disallowed_header_directives": ROBOTS_DIRECTIVES,
        "distributor": "multiprocessing" if fetcher.ray_address is None else "ray",
    }


def _run(
    arguments: dict[str, object],
    fetcher: Fetcher,
    folder: Path,
    wall_clock_s: float,
    tell: Callable[[], None] | None,
) -> bool:
    """Runs img2dataset to its end (True) or to the wall-clock limit (False); leaves none of its processes behind.

    On a Ray cluster its workers end with the process that is run here, which drives them.
    """
    cluster = fetcher.ray_address and {"address": fetcher.ray_address, "environment": QUIET}
    settings = [json.dumps(value) for value in (arguments, fetcher.limits._asdict(), cluster)]
    command = [sys.executable, "-P", str(PROGRAM), str(os.getpid()), *settings]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, **QUIET},
            start_new_session=True,
        )
        try:
            return _ends(process, wall_clock_s, tell)
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _ends(process: subprocess.Popen[bytes], wall_clock_s: float, tell: Callable[[], None] | None) -> bool:
    """Whether the process ends within the limit; `tell` is called while it runs."""
    deadline = time.monotonic() + wall_clock_s
    while (left := deadline - time.monotonic()) > 0:
        try:
            process.wait(timeout=min(left, PROGRESS_SECONDS) if tell else left)
        except subprocess.TimeoutExpired:
            if tell:
                tell()
        else:
            return True
    return False


def _arrived(output: Path) -> int:
    """Files of images so far, as img2dataset lays them out: `00000/000000000.jpg`."""
    return sum(1 for _ in output.glob("[0-9]*/*.jpg"))


def _results(output: Path) -> Iterator[tuple[str, Fetched]]:
    """Every result that img2dataset wrote: from its tables, and where it was killed before one, from its files."""
    for folder in sorted(path for path in output.glob("[0-9]*") if path.is_dir()):
        try:
            table = pq.read_table(folder.with_suffix(".parquet"), columns=["url", "key", "status", "error_message"])
        except (OSError, pa.ArrowException):
            yield from _rescued(folder)
            continue
        for row in table.to_pylist():
            yield row["url"], _result(row, folder)


def _result(row: dict[str, str], folder: Path) -> Fetched:
    if row["status"] == "success":
        return Fetched(folder / f"{row['key']}.jpg")
    message = row["error_message"] or ""
    return Fetched(None, reason_of(message), message)


def _rescued(folder: Path) -> Iterator[tuple[str, Fetched]]:
    """The images whose description, written after the image itself, is whole."""
    for path in sorted(folder.glob("*.json")):
        with suppress(ValueError):
            yield json.loads(path.read_text(encoding="utf-8"))["url"], Fetched(path.with_suffix(".jpg"))


def reason_of(message: str) -> str:
    """The reason (of blip_core.data.shards.REASONS) that an error message of img2dataset stands for."""
    for pattern, reason in MESSAGES:
        if re.search(pattern, message):
            return reason
    return "connection"


def retry_after(message: str) -> float:
    """Seconds that the server asked for before another try, as fetch_process.py adds them to a message; or 0."""
    found = re.search(r"\[Retry-After: (.*)\]", message)
    if found is None:
        return 0
    if found[1].strip().isdecimal():
        return float(found[1])
    try:
        moment = parsedate_to_datetime(found[1])
    except ValueError:
        return 0
    return max(0.0, moment.timestamp() - time.time())


def _tail(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-5:]) or "nothing"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
