"""What img2dataset's messages mean, and that none of its processes outlives the one that started it."""

import subprocess
import sys
import time
from email.utils import formatdate

import pytest

from blip_core.data.fetch import reason_of, retry_after
from blip_core.data.shards import REASONS


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("HTTP Error 404: Not Found", "not_found"),
        ("HTTP Error 408: Request timed out", "http_error"),
        ("HTTP Error 403: Forbidden", "http_error"),
        ("HTTP Error 429: Too Many Requests [Retry-After: 3]", "overloaded"),
        ("HTTP Error 500: Internal Server Error", "overloaded"),
        ("HTTP Error 503: Service Unavailable", "overloaded"),
        ("HTTP Error 501: Not Implemented", "http_error"),
        ("<urlopen error timed out>", "timeout"),
        ("<urlopen error _ssl.c:983: The handshake operation timed out>", "timeout"),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed>", "tls"),
        ("<urlopen error [SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred>", "connection"),
        ("<urlopen error [Errno -3] Temporary failure in name resolution>", "dns"),
        ("'ascii' codec can't encode character '\\xe9' in position 5", "bad_url"),
        ("[Errno 104] Connection reset by peer", "connection"),
        ("IncompleteRead(10 bytes read, 20 more expected)", "connection"),
        ("", "connection"),
        ("<urlopen error refused as forbidden_address: a.test is 10.0.0.1 (private)>", "forbidden_address"),
        ("refused as credentials_refused: the URL has a user name in it", "credentials_refused"),
        ("refused as too_many_bytes: more than 5 bytes", "too_many_bytes"),
        ("refused as too_many_redirects: more than 5", "too_many_redirects"),
        ("HTTP Error 302: Found - Redirection to url 'file:///etc/passwd' is not allowed", "scheme_refused"),
        ("refused as scheme_refused: a redirect to ftp://a.test/404", "scheme_refused"),
        ("<urlopen error [Errno 111] Connection refused>", "connection"),
        ("timed out: it took more than 60 s", "timeout"),
    ],
)
def test_messages_of_the_fetcher_become_reasons(message: str, reason: str) -> None:
    assert reason_of(message) == reason
    assert reason in REASONS


@pytest.mark.parametrize(("asked", "seconds"), [(" [Retry-After: 7]", 7), (" [Retry-After: soon]", 0), ("", 0)])
def test_the_seconds_that_a_server_asks_for_are_read_from_the_message(asked: str, seconds: float) -> None:
    assert retry_after(f"HTTP Error 429: Too Many Requests{asked}") == seconds


@pytest.mark.parametrize(("hence", "seconds"), [(600, 600), (-600, 0)])
def test_a_date_that_a_server_asks_for_is_as_far_as_it_lies_ahead(hence: float, seconds: float) -> None:
    date = formatdate(time.time() + hence, usegmt=True)
    found = retry_after(f"HTTP Error 503: Service Unavailable [Retry-After: {date}]")
    assert found == pytest.approx(seconds, abs=30)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_a_process_that_is_forked_while_its_parent_dies_ends_as_well() -> None:
    script = """
import os, time
from blip_core.data.fetch_process import let_forked_die_with_their_parent
os.register_at_fork(after_in_child=lambda: time.sleep(1))  # in which the parent dies
let_forked_die_with_their_parent()
if os.fork():
    os._exit(0)
print("lives", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
