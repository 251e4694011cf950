"""What the guard costs a download: `make download`.

img2dataset fetches the same pictures from a server on loopback with the guard and without it, by turns, in one run; the
median of the turns counts. The rate is that of the fetching itself, as img2dataset's own clocks have it: the seconds
in which it starts are the same on both sides and would hide a cost. CPU seconds are those of all its processes.
"""

import argparse
import io
import json
import multiprocessing
import os
import resource
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from PIL import Image

from blip_core.data import fetch
from blip_core.data.download import DownloadConfig
from blip_core.data.guard import Limits

PROGRAMS = {"guarded": fetch.PROGRAM, "unguarded": Path(__file__).with_name("unguarded.py")}
MOST = 0.10  # of the throughput
WALL_CLOCK = 600.0


class Turn(NamedTuple):
    """One download: images a second, and CPU seconds an image."""

    rate: float
    cpu: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status, 1 where the guard costs more than MOST."""
    options = _options(arguments)
    turns: dict[str, list[Turn]] = {side: [] for side in PROGRAMS}
    with TemporaryDirectory(prefix="capfilt-bench-") as folder, _server(options.side) as address:
        urls = [f"{address}/{number}.jpg" for number in range(options.images)]
        for number in range(options.repeats + 1):
            for side in sorted(PROGRAMS, reverse=bool(number % 2)):
                turn = _turn(urls, Path(folder) / f"{side}-{number}", side, options)
                if number:  # the first one is the warm-up
                    turns[side].append(turn)
    figures = _figures(turns, options)
    sys.stdout.write(json.dumps(figures) + "\n" if options.json else _told(figures))
    return 1 if figures["cost"] > MOST else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    config = DownloadConfig()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4000, help="images of a turn")
    parser.add_argument("--side", type=int, default=200, help="side of the pictures; 200: about 25 kB")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="img2dataset's")
    parser.add_argument("--threads", type=int, default=config.threads, help="connections open at a time")
    parser.add_argument("--per-host", type=int, default=config.per_host, help="of them to a host; 0: any number")
    parser.add_argument("--repeats", type=int, default=5, help="measured turns of each side; the median counts")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(arguments)


def _turn(urls: list[str], folder: Path, side: str, options: argparse.Namespace) -> Turn:
    fetch.PROGRAM = PROGRAMS[side]
    limits = Limits(allow_private_networks=True, per_host=options.per_host)
    fetcher = fetch.Fetcher(options.processes, -(-options.threads // options.processes), 10, "capfilt", limits)
    before = _cpu()
    found = fetch.fetch_urls(urls, folder, fetcher, WALL_CLOCK)
    cpu = _cpu() - before
    missing = [(url, answer) for url, answer in found.items() if answer.path is None]
    if missing:
        raise SystemExit(f"{side}: {len(missing)} of {len(urls)} pictures did not come, {missing[0]}")
    clocks = [json.loads(path.read_text()) for path in (folder / "output").glob("*_stats.json")]
    seconds = max(clock["end_time"] for clock in clocks) - min(clock["start_time"] for clock in clocks)
    return Turn(len(urls) / seconds, cpu / len(urls))


def _cpu() -> float:
    """CPU seconds of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _figures(turns: dict[str, list[Turn]], options: argparse.Namespace) -> dict[str, float | int | str | None]:
    rates = {side: statistics.median(turn.rate for turn in found) for side, found in turns.items()}
    cpu = {side: statistics.median(turn.cpu for turn in found) for side, found in turns.items()}
    return {
        "cost": round(1 - rates["guarded"] / rates["unguarded"], 3),
        **{f"images_per_second_{side}": round(rate, 1) for side, rate in rates.items()},
        **{f"cpu_ms_per_image_{side}": round(1000 * seconds, 2) for side, seconds in cpu.items()},
        "images": options.images,
        "per_host": options.per_host,
        "repeats": options.repeats,
        "cores": os.cpu_count(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _told(figures: dict[str, float | int | str | None]) -> str:
    return "".join(f"{name:32} {value}\n" for name, value in figures.items())


@contextmanager
def _server(side: int) -> Iterator[str]:
    """A server of one picture under every name, in a process of its own; yields its address."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, side), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.kill()
        process.join()


def _serve(connection: Connection, side: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=60)
    _Picture.body = buffer.getvalue()
    with _Server(("127.0.0.1", 0), _Picture) as server:
        connection.send(server.server_port)
        server.serve_forever()


class _Server(ThreadingHTTPServer):
    request_queue_size = 512
    daemon_threads = True


class _Picture(BaseHTTPRequestHandler):
    wbufsize = -1
    body = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "image/jpeg")
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        """Silent."""


if __name__ == "__main__":
    sys.exit(main())
