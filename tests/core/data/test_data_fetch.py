"""What img2dataset's messages mean."""

import pytest

from blip_core.data.fetch import reason_of
from blip_core.data.shards import REASONS


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("HTTP Error 404: Not Found", "not_found"),
        ("HTTP Error 408: Request timed out", "http_error"),
        ("<urlopen error timed out>", "timeout"),
        ("<urlopen error _ssl.c:983: The handshake operation timed out>", "timeout"),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed>", "tls"),
        ("<urlopen error [SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred>", "connection"),
        ("<urlopen error [Errno -3] Temporary failure in name resolution>", "dns"),
        ("'ascii' codec can't encode character '\\xe9' in position 5", "bad_url"),
        ("[Errno 104] Connection reset by peer", "connection"),
        ("IncompleteRead(10 bytes read, 20 more expected)", "connection"),
        ("", "connection"),
    ],
)
def test_messages_of_the_fetcher_become_reasons(message: str, reason: str) -> None:
    assert reason_of(message) == reason
    assert reason in REASONS
