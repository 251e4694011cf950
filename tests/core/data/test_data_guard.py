"""The guard's opener in this process: what it connects to, what it spends, and how long hosts are left alone."""

import io
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from services.web import serving

from blip_core.data.budget import Budget, Refusal
from blip_core.data.fetch_process import LIMITS_VARIABLE
from blip_core.data.guard import Limits, guarded_opener
from blip_core.data.hosts import Hosts


class _Page(BaseHTTPRequestHandler):
    """Answers with the target it was asked for, as an origin or as a proxy is; a tunnel leads nowhere."""

    server: "Site"

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.targets.append(self.path)
            self.server.authorised.append(self.headers["Proxy-Authorization"])
            self.server.here += 1
            self.server.most = max(self.server.most, self.server.here)
        time.sleep(self.server.seconds)
        body = self.path.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with self.server.lock:
            self.server.here -= 1
        self.wfile.write(body)

    def do_CONNECT(self) -> None:
        self.server.targets.append(self.path)
        self.send_error(502)

    def log_message(self, *_: object) -> None:
        """Silent."""


class Site(ThreadingHTTPServer):
    """Counts how many it serves at a time."""

    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Page)
        self.lock = threading.Lock()
        self.targets: list[str] = []
        self.authorised: list[str | None] = []
        self.here = self.most = 0
        self.seconds = 0.0

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


@pytest.fixture
def site() -> Iterator[Site]:
    with serving(Site()) as server:
        yield server


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


def opened(url: str, limits: Limits, **options: Any) -> bytes:
    with guarded_opener(limits, **options).open(url, timeout=10) as answer:
        return answer.read()


def test_a_name_is_looked_up_once_for_a_connection_and_that_answer_is_what_is_connected_to(site: Site) -> None:
    looked_up: list[str] = []

    def resolve(host: str, port: int, *_: object) -> list[tuple[Any, ...]]:
        looked_up.append(host)
        address = ("127.0.0.1", site.server_port) if len(looked_up) == 1 else ("127.0.0.2", 9)
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", address)]

    assert opened("http://changing.test/page", Limits(allow_private_networks=True), resolve=resolve) == b"/page"
    assert looked_up == ["changing.test"]
    with pytest.raises(OSError, match=r"forbidden_address: changing.test is 127.0.0.2 \(loopback\)"):
        opened("http://changing.test/page", Limits(), resolve=resolve)
    assert site.targets == ["/page"]


def test_a_proxy_of_the_environment_is_used_but_not_for_what_is_no_public_host(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"http://me:secret@127.0.0.1:{site.server_port}")
    assert opened("http://nowhere.invalid/a?b", Limits()) == b"http://nowhere.invalid/a?b"
    with pytest.raises(OSError, match="Tunnel connection failed: 502"):
        opened("https://nowhere.invalid/a", Limits())
    asked = ["http://nowhere.invalid/a?b", "nowhere.invalid:443"]
    assert (site.targets, site.authorised) == (asked, ["Basic bWU6c2VjcmV0"])
    for url in ("http://10.0.0.1/", "https://localhost/", "http://2130706433/", "https://[::ffff:10.0.0.1]/"):
        with pytest.raises(OSError, match="forbidden_address"):
            opened(url, Limits())
    assert site.targets == asked


def test_a_host_that_the_environment_keeps_from_the_proxy_is_judged_as_any_other(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{site.server_port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    for url in (site.url("/"), f"http://localhost:{site.server_port}/"):
        with pytest.raises(OSError, match="forbidden_address"):
            opened(url, Limits())
    assert site.targets == []


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x", "gopher://h/"])
def test_no_other_scheme_is_opened(url: str) -> None:
    with pytest.raises(urllib.error.URLError, match="unknown url type"):
        opened(url, Limits(allow_private_networks=True))


def test_as_many_connections_to_a_host_are_open_as_it_is_to_bear_and_others_wait(site: Site) -> None:
    site.seconds = 0.05
    opener = guarded_opener(Limits(allow_private_networks=True, per_host=3))
    bodies: list[bytes] = []

    def read(number: int) -> None:
        with opener.open(site.url(f"/{number}"), timeout=10) as answer:
            bodies.append(answer.read())

    threads = [threading.Thread(target=read, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(bodies) == sorted(f"/{number}".encode() for number in range(24))
    assert 1 < site.most <= 3


def test_a_host_that_failed_or_whose_answer_was_dropped_may_be_asked_again(site: Site) -> None:
    opener = guarded_opener(Limits(allow_private_networks=True, per_host=1))
    for _ in range(3):
        with pytest.raises(urllib.error.URLError, match="refused"):
            opener.open("http://127.0.0.1:1/", timeout=5)
        opener.open(site.url("/dropped"), timeout=5)
    with opener.open(site.url("/last"), timeout=5) as answer:
        assert answer.read() == b"/last"


def _enter(hosts: Hosts, moments: "multiprocessing.Queue[float]") -> None:
    for _ in range(3):
        hosts.enter("a.test")()
        moments.put(time.monotonic())


def test_processes_leave_a_host_alone_between_their_requests_together() -> None:
    context = multiprocessing.get_context("fork")
    hosts, moments = Hosts(per_host=0, pause_s=0.05), context.Queue()
    processes = [context.Process(target=_enter, args=(hosts, moments)) for _ in range(2)]
    began = time.monotonic()
    for process in processes:
        process.start()
    times = sorted(moments.get() for _ in range(6))
    for process in processes:
        process.join()
    assert times[-1] - began >= 5 * 0.05  # six requests have five pauses between them


def test_a_budget_is_spent_and_then_refuses() -> None:
    budget = Budget(seconds=100, max_bytes=10, max_redirects=1)
    budget.spend(4)
    budget.spend(6)
    with pytest.raises(Refusal, match="too_many_bytes: more than 10 bytes"):
        budget.spend(1)
    budget.follow()
    with pytest.raises(Refusal, match="too_many_redirects: more than 1"):
        budget.follow()
    assert budget.timeout(5) == 5
    assert 90 < budget.timeout(1000) <= 100
    budget.pause(50)
    assert 140 < budget.timeout(1000) <= 150
    budget.pause(-150)
    with pytest.raises(TimeoutError, match="timed out: it took more than 100 s"):
        budget.timeout(5)


def test_the_memory_for_a_length_that_is_only_claimed_is_never_asked_for(site: Site) -> None:
    with guarded_opener(Limits(allow_private_networks=True, max_bytes=1000)).open(site.url("/"), timeout=5) as answer:
        with pytest.raises(Refusal, match="too_many_bytes"):
            answer.fp.read(10**15)
        assert isinstance(answer.fp, io.BufferedReader)


def test_a_worker_that_is_started_anew_instead_of_forked_has_the_guard_before_it_does_anything(site: Site) -> None:
    script = f"""
import runpy, urllib.request
from blip_core.data.fetch import PROGRAM
runpy.run_path(str(PROGRAM), run_name="__mp_main__")  # as multiprocessing does with the program of its parent
try:
    urllib.request.urlopen({site.url("/")!r})
except OSError as error:
    print(error)
"""
    environment = os.environ | {LIMITS_VARIABLE: json.dumps(Limits()._asdict())}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "refused as forbidden_address" in done.stdout
    assert site.targets == []
