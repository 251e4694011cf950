"""robots.txt on request: read once a host, kept by its rules, and what is done where a host has none or is silent."""

import io
import threading
import time
import tracemalloc
import urllib.error
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.robotparser import RobotFileParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from services.web import serving

from blip_core.data.budget import Refusal
from blip_core.data.download import DownloadConfig, download_shard, plan_shards
from blip_core.data.fetch import reason_of, retry_after
from blip_core.data.guard import Limits, guarded_opener
from blip_core.data.robots import HOSTS_KEPT, MAX_BYTES, MAX_REDIRECTS, Robots, parse_rules
from blip_core.data.shards import read_shard
from blip_core.data.tables import WebTable
from blip_core.workspace import Workspace

LIMITS = Limits(allow_private_networks=True, robots_txt=True, url_s=3)
RULES = b"User-agent: *\nDisallow: /private/\nAllow: /private/open\n\nUser-agent: otherbot\nDisallow: /\n"


class _Handler(BaseHTTPRequestHandler):
    server: "Site"

    def do_GET(self) -> None:
        site = self.server
        with site.lock:
            site.asked[self.path] += 1
            site.agents.add(self.headers["User-Agent"])
        if self.path != "/robots.txt":
            self._say(200, b"page")
        elif site.status == 302:
            self._say(302, b"", Location=site.leads)
        elif site.pours:
            self._pour()
        else:
            self._say(site.status, site.rules, **site.headers)

    def _say(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _pour(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.server.rules)
        while self.server.pours:
            self.wfile.write(b"#" * self.server.pours)
            time.sleep(0 if self.server.pours > 1 else 0.05)

    def log_message(self, *_: object) -> None:
        """Silent."""


class Site(ThreadingHTTPServer):
    """A host with a robots.txt, or what stands in its place."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lock = threading.Lock()
        self.asked: Counter[str] = Counter()
        self.agents: set[str] = set()
        self.status, self.rules, self.leads = 200, RULES, ""
        self.headers: dict[str, str] = {}
        self.pours = 0  # bytes at a time that follow the rules without end

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.server_port}{path}"

    def handle_error(self, *_: object) -> None:
        """Silent: clients go away."""


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(Site()) as server:
        yield server
        server.pours = 0


def outcome(site: Site, *paths: str, limits: Limits = LIMITS) -> list[str]:
    """'page' for a URL that was answered, or the reason that its row would have."""
    opener, found = guarded_opener(limits), []
    for path in paths:
        try:
            with opener.open(site.url(path), timeout=2) as answer:
                found.append(answer.read().decode())
        except OSError as error:
            found.append(reason_of(str(error)))
    return found


def test_what_is_forbidden_is_not_asked_for_and_a_host_is_asked_once(site: Site) -> None:
    paths = ("/a.jpg", "/private/b.jpg", "/private/open/c.jpg", "/d.jpg")
    assert outcome(site, *paths) == ["page", "robots_txt", "page", "page"]
    assert site.asked == Counter(["/robots.txt", "/a.jpg", "/private/open/c.jpg", "/d.jpg"])
    assert outcome(site, *paths, limits=LIMITS._replace(user_agent="OtherBot")) == ["robots_txt"] * 4


def test_it_is_not_asked_for_unless_that_is_wished_for(site: Site) -> None:
    assert outcome(site, "/private/a", limits=LIMITS._replace(robots_txt=False)) == ["page"]
    assert site.asked == Counter(["/private/a"])


def test_many_threads_ask_a_host_for_its_rules_once_and_another_name_is_another_host(site: Site) -> None:
    opener = guarded_opener(LIMITS)
    urls = [site.url(f"/{number}", host) for host in ("127.0.0.1", "localhost") for number in range(12)]
    bodies: list[bytes] = []

    def read(url: str) -> None:
        with opener.open(url, timeout=5) as answer:
            bodies.append(answer.read())

    threads = [threading.Thread(target=read, args=(url,)) for url in urls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (bodies, site.asked["/robots.txt"]) == ([b"page"] * 24, 2)


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_host_that_has_none_allows_all(site: Site, status: int) -> None:
    site.status = status
    assert outcome(site, "/private/a") == ["page"]


@pytest.mark.parametrize(("status", "reason"), [(429, "overloaded"), (500, "overloaded"), (503, "overloaded")])
def test_a_host_that_cannot_say_forbids_all_for_now(site: Site, status: int, reason: str) -> None:
    site.status, site.headers = status, {"Retry_After": "7"}
    assert outcome(site, "/a", "/b") == [reason, reason]
    assert site.asked == Counter(["/robots.txt"])
    with pytest.raises(OSError, match=f"HTTP Error {status}") as failure:
        guarded_opener(LIMITS).open(site.url("/a"), timeout=2)
    assert retry_after(str(failure.value)) == 7


def test_a_host_that_is_not_there_is_asked_for_nothing(site: Site) -> None:
    opener = guarded_opener(LIMITS)
    for url, reason in (("http://127.0.0.1:1/a", "connection"), ("http://nowhere.invalid/a", "dns")):
        with pytest.raises(OSError, match=r"robots\.txt") as failure:
            opener.open(url, timeout=2)
        assert reason_of(str(failure.value)) == reason


def test_redirects_are_followed_and_end_as_rfc_9309_says(site: Site) -> None:
    site.status, site.leads = 302, "/robots.txt"
    assert outcome(site, "/private/a") == ["page"]
    assert 1 < site.asked["/robots.txt"] <= 1 + MAX_REDIRECTS
    site.leads, site.rules = "file:///etc/passwd", b""
    assert outcome(site, "/private/a") == ["page"]
    with serving(Site()) as other:
        site.leads = other.url("/robots.txt")
        assert outcome(site, "/private/a", "/a") == ["robots_txt", "page"]


def test_a_page_that_leads_to_where_robots_forbid_it_is_not_followed(site: Site) -> None:
    class Leading(_Handler):
        def do_GET(self) -> None:
            status, leads = (404, "") if self.path == "/robots.txt" else (302, site.url("/private/x"))
            self._say(status, b"", Location=leads)

    with serving(Site()) as other:
        other.RequestHandlerClass = Leading
        assert outcome(other, "/a") == ["robots_txt"]
    assert site.asked == Counter(["/robots.txt"])


def test_rules_behind_half_a_megabyte_do_not_count_and_no_more_is_read(site: Site) -> None:
    site.pours = 65_536
    assert outcome(site, "/private/a", "/a") == ["robots_txt", "page"]
    site.rules = b"#" * MAX_BYTES + b"\n" + RULES
    assert outcome(site, "/private/a") == ["page"]


def test_one_that_drips_is_given_up_within_the_time_of_a_url(site: Site) -> None:
    site.pours = 1
    assert outcome(site, "/a", limits=LIMITS._replace(url_s=1)) == ["timeout"]


def test_no_address_inside_is_reached_through_it(site: Site) -> None:
    with pytest.raises(OSError, match="forbidden_address"):
        guarded_opener(LIMITS._replace(allow_private_networks=False)).open(site.url("/a"), timeout=2)
    assert site.asked == Counter()


def test_the_rules_of_many_hosts_are_not_kept_for_ever() -> None:
    asked: list[str] = []

    class Opened(io.BytesIO):
        """An answer."""

    def opened(request: urllib.request.Request, timeout: float) -> Opened:
        asked.append(request.full_url)
        return Opened(RULES)

    robots = Robots("capfilt", opened)
    for number in [*range(HOSTS_KEPT + 1), HOSTS_KEPT, 0]:
        request = urllib.request.Request(f"http://h{number}.test/a")
        request.timeout = 1
        robots.check(request)
    assert asked == [f"http://h{number}.test/robots.txt" for number in (*range(HOSTS_KEPT + 1), 0)]


def test_plain_rules_mean_what_the_standard_librarys_reader_takes_them_to_mean() -> None:
    text = (
        "# a comment\nUser-agent: capfilt\nUser-agent: friend # too\nDisallow: /a\nDisallow: /b/c\n\n"
        "User-Agent: *\nDisallow: /\n\nuser-agent: stranger\nAllow: /"
    )
    reader = RobotFileParser()
    reader.parse(text.splitlines())
    for agent in ("capfilt", "friend", "stranger", "nobody"):
        rules = parse_rules(text.encode(), agent)
        for path in ("/", "/a", "/ab", "/b", "/b/c/d", "/c?d=/a"):
            url = f"http://h.test{path}"
            assert rules.can_fetch(url, agent) == reader.can_fetch(agent, url), (agent, path)


@pytest.mark.parametrize(
    ("rules", "path", "allowed"),
    [
        ("Disallow: /*.jpg$", "/x/y.jpg", False),
        ("Disallow: /*.jpg$", "/x/y.jpg?z", True),
        ("Disallow: /p\nAllow: /pub", "/public", True),  # the longest match decides
        ("Disallow: /same\nAllow: /same", "/same", True),  # of equal ones the one that allows
        ("Disallow: /%7Ejoe", "/~joe/a", False),
        ("Disallow:", "/a", True),
    ],
)
def test_wildcards_and_precedence_are_those_of_rfc_9309(rules: str, path: str, allowed: bool) -> None:
    assert parse_rules(f"user-agent: *\n{rules}".encode(), "capfilt").can_fetch(f"http://h.test{path}", "capfilt") is (
        allowed
    )


def test_a_robots_txt_that_means_harm_takes_little_memory() -> None:
    agents = b"".join(b"user-agent:%d\n" % number for number in range(14_000))
    rules = b"".join(b"allow:/%d\n" % number for number in range(20_000))
    stars = b"user-agent:*\ndisallow:/" + b"*a" * 50_000 + b"b\n"
    tracemalloc.start()
    try:
        parsed = parse_rules(agents + rules + stars, "capfilt")
        assert parsed.can_fetch("http://h.test/" + "a" * 2000, "capfilt")
        assert tracemalloc.get_traced_memory()[1] < 60_000_000
    finally:
        tracemalloc.stop()
    parse_rules(b"\xff\xfe\x00" * 1000 + b"\nuser-agent\ndisallow", "capfilt")


def test_a_forbidden_row_says_so_in_its_shard(site: Site, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((24, 24, 3), np.uint8)).save(buffer, "JPEG")

    class Pictures(_Handler):
        def do_GET(self) -> None:
            self.server.agents.add(self.headers["User-Agent"])
            self._say(200, RULES if self.path == "/robots.txt" else buffer.getvalue())

    site.RequestHandlerClass = Pictures
    urls = [site.url("/a.jpg"), site.url("/private/b.jpg"), "http://127.0.0.1:1/c.jpg"]
    pq.write_table(pa.table({"url": urls, "caption": urls}), tmp_path / "web.parquet")
    config = DownloadConfig(
        processes=1, threads=2, retries=0, timeout_s=5, allow_private_networks=True, robots_txt=True, user_agent="MyBot"
    )
    workspace = Workspace.open(tmp_path / "workspace")
    (name,) = plan_shards(WebTable(str(tmp_path / "web.parquet")), config, workspace).names
    download_shard(workspace, name, config)
    rows = read_shard(workspace.shard(name), ["url", "reason"]).to_pylist()
    assert {row["url"]: row["reason"] for row in rows} == dict(
        zip(urls, (None, "robots_txt", "connection"), strict=True)
    )
    assert all("mybot" in agent for agent in site.agents)


def test_a_refusal_names_its_reason() -> None:
    assert Refusal("robots_txt", "x").reason == "robots_txt"
    assert reason_of(str(Refusal("robots_txt", "http://h forbids it"))) == "robots_txt"
