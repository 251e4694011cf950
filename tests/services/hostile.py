"""A web that means harm, on loopback: each path is a trick, told with what should become of its row.

Two servers. The hostile one stands for a public address (services/names/sitecustomize.py); the inner one is what it
tries to lead to, has a picture for everyone, and counts who came.
"""

import gzip
import io
import socketserver
import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

PUBLIC, PUBLIC_TLS = "93.184.215.14", "93.184.215.15"
PATIENCE = 8.0  # seconds that a trick goes on, if it is let
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n"

Send = Callable[[bytes], None]


class Trick(NamedTuple):
    """What the server does, and the reason that the row should have."""

    act: Callable[[Send], None]
    reason: str


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


PICTURE = picture()


def says(answer: bytes) -> Callable[[Send], None]:
    return lambda send: send(answer)


def drips(before: bytes, drop: bytes, pause: float = 0.2) -> Callable[[Send], None]:
    """Sends a drop now and then: no single read ever waits for long."""

    def act(send: Send) -> None:
        send(before)
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            send(drop)
            time.sleep(pause)

    return act


def pours(before: bytes, drop: bytes) -> Callable[[Send], None]:
    """Sends as fast as it can."""
    return drips(before, drop, 0.0)


def whole(body: bytes, *headers: bytes) -> bytes:
    lines = b"".join(header + b"\r\n" for header in headers)
    return HEAD + lines + b"Content-Length: %d\r\n\r\n" % len(body) + body


def leads(location: str) -> bytes:
    return b"HTTP/1.1 302 Found\r\nLocation: " + location.encode() + b"\r\nContent-Length: 0\r\n\r\n"


CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
TRICKS = {
    "slow-status": Trick(drips(b"", b"H"), "timeout"),
    "slow-header": Trick(drips(HEAD + b"X-A: ", b"a"), "timeout"),
    "slow-headers": Trick(drips(HEAD, b"X-A: a\r\n"), "timeout"),
    "slow-body": Trick(drips(HEAD + b"Content-Length: 9999\r\n\r\n", b"a"), "timeout"),
    "slow-chunks": Trick(drips(CHUNKED, b"1\r\na\r\n"), "timeout"),
    "slow-endless": Trick(drips(HEAD + b"\r\n", b"a"), "timeout"),
    "silent": Trick(lambda send: time.sleep(PATIENCE), "timeout"),
    "endless": Trick(pours(HEAD + b"\r\n" + PICTURE, bytes(65536)), "too_many_bytes"),
    "endless-chunks": Trick(pours(CHUNKED, b"10000\r\n" + bytes(65536) + b"\r\n"), "too_many_bytes"),
    "endless-continue": Trick(pours(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 500), "too_many_bytes"),
    "endless-header": Trick(pours(HEAD + b"X-A: ", b"a" * 65536), "connection"),
    "endless-headers": Trick(pours(HEAD, b"X-A: a\r\n" * 500), "connection"),
    "endless-trailers": Trick(pours(CHUNKED + b"0\r\n", b"X-A: " + b"a" * 999 + b"\r\n"), "too_many_bytes"),
    "endless-error": Trick(pours(b"HTTP/1.1 404 Not Found\r\n\r\n", bytes(65536)), "not_found"),
    "early-hints": Trick(pours(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n" * 500), "http_error"),
    "huge-length": Trick(says(HEAD + b"Content-Length: 999999999999999\r\n\r\n" + PICTURE), "too_many_bytes"),
    "huge-chunk": Trick(says(CHUNKED + b"fffffffffffff\r\n" + PICTURE), "too_many_bytes"),
    "length-too-long": Trick(says(HEAD + b"Content-Length: 99999\r\n\r\n" + PICTURE), "connection"),
    "length-too-short": Trick(says(HEAD + b"Content-Length: 40\r\n\r\n" + PICTURE), "truncated"),
    "chunks-of-nonsense": Trick(says(CHUNKED + b"zz\r\n" + PICTURE), "connection"),
    "chunks-negative": Trick(says(CHUNKED + b"-5\r\n" + PICTURE), "connection"),
    "chunks-cut": Trick(says(CHUNKED + b"%x\r\n" % len(PICTURE) + PICTURE[:-9]), "connection"),
    "gzip-bomb": Trick(says(whole(gzip.compress(bytes(10**7)), b"Content-Encoding: gzip")), "not_an_image"),
    "not-http": Trick(says(b"SSH-2.0-OpenSSH_9.6\r\n" + PICTURE), "connection"),
    "old-http": Trick(says(PICTURE), "connection"),
    "nothing": Trick(says(b""), "connection"),
    "status-of-nonsense": Trick(says(b"HTTP/1.1 9999 OK\r\n\r\n" + PICTURE), "connection"),
    "switching": Trick(says(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n" + PICTURE), "http_error"),
    "no-content": Trick(says(b"HTTP/1.1 204 No Content\r\n\r\n" + PICTURE), "not_an_image"),
    "two-answers": Trick(says(whole(b"no picture") + whole(PICTURE)), "not_an_image"),
    "robots": Trick(says(whole(PICTURE, b"X-Robots-Tag: noai")), "refused_by_robots"),
    "page": Trick(says(whole(b"<svg xmlns='http://www.w3.org/2000/svg'/>")), "not_an_image"),
    "circle": Trick(says(leads("/circle")), "too_many_redirects"),
    "chain": Trick(says(leads("/chain/1")), "too_many_redirects"),
    "nowhere": Trick(says(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n"), "http_error"),
    "injection": Trick(says(leads("http://public.test/%0d%0aHost:%20inner/picture%00")), "not_found"),
    "slow-redirect": Trick(drips(b"HTTP/1.1 302 Found\r\nX-A: ", b"a"), "timeout"),
    "fat-redirect": Trick(
        pours(b"HTTP/1.1 302 Found\r\nLocation: http://localhost:{inner}/\r\n\r\n", bytes(65536)), "forbidden_address"
    ),
}

# Where redirects lead to, and what should become of the row.
REDIRECTS = {
    "file:///etc/passwd": "scheme_refused",
    "FILE:///etc/passwd": "scheme_refused",
    "ftp://127.0.0.1:{inner}/picture": "scheme_refused",
    "gopher://127.0.0.1:{inner}/_GET%20/": "scheme_refused",
    "data:image/png;base64,aGVsbG8=": "scheme_refused",
    "javascript:alert(1)": "scheme_refused",
    "jar:http://127.0.0.1:{inner}/": "scheme_refused",
    "http://someone:secret@public.test/picture": "credentials_refused",
    "http://public.test@127.0.0.1:{inner}/": "credentials_refused",
    "http://public.test%40127.0.0.1:{inner}/": "credentials_refused",
    "http://public.test\\@127.0.0.1:{inner}/": "credentials_refused",
    "//127.0.0.1:{inner}/": "forbidden_address",
    "https://127.0.0.1:{inner}/": "forbidden_address",
    "http://public.test/chain-to-inner": "forbidden_address",
}

# Hosts that may neither stand in the table nor be led to.
FORBIDDEN = (
    *("127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0x7f.1", "127%2e0%2e0%2e1"),
    *("0.0.0.0", "0", "localhost", "LOCALHOST", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]"),
    *("[64:ff9b::7f00:1]", "[64:ff9b::a9fe:a9fe]", "[64:ff9b:1::1]", "[2002:7f00:1::1]", "[2001:0:7f00:1::]"),
    *("10.0.0.1", "172.16.0.1", "192.168.0.1", "100.64.0.1", "169.254.0.1", "224.0.0.1", "240.0.0.1"),
    *("255.255.255.255", "169.254.169.254", "2852039166", "100.100.100.200", "168.63.129.16", "[fd00:ec2::254]"),
    *("[fe80::1]", "[fc00::1]", "[ff02::1]", "[::127.0.0.1]", "inner.test", "mixed.test", "six.test"),
)

NAMES = {
    "public.test": [[PUBLIC]],
    "tls.test": [[PUBLIC_TLS]],
    "another.test": [[PUBLIC_TLS]],
    "inner.test": [["127.0.0.1"]],
    "six.test": [["::ffff:127.0.0.1"]],
    "mixed.test": [[PUBLIC, "127.0.0.1"]],
    "later.test": [[PUBLIC], ["127.0.0.1"]],
    "once.test": [[PUBLIC], ["127.0.0.1"]],
}


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, handler: type[socketserver.BaseRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.asked: Counter[str] = Counter()
        self.inner = 0
        self.context: ssl.SSLContext | None = None
        self._lock = threading.Lock()

    def count(self, what: str) -> None:
        with self._lock:
            self.asked[what] += 1

    @property
    def port(self) -> int:
        return self.server_address[1]

    def handle_error(self, request: object, client_address: object) -> None:
        """Silent: clients that go away are what is wished for."""


class _Inner(socketserver.StreamRequestHandler):
    server: _Server

    def setup(self) -> None:
        self.server.count("connections")
        super().setup()

    def handle(self) -> None:
        self.rfile.readline()
        self.wfile.write(whole(PICTURE))


class _Hostile(socketserver.StreamRequestHandler):
    server: _Server

    def setup(self) -> None:
        if self.server.context:
            self.request = self.server.context.wrap_socket(self.request, server_side=True)
        super().setup()

    def handle(self) -> None:
        line = self.rfile.readline()
        if not line.startswith(b"GET "):  # TLS: its random bytes may look like the start of many lines
            return
        path = line.split(b" ")[1].decode()
        while self.rfile.readline().strip():
            pass
        self.server.count(path)
        with suppress(OSError):
            self._act(path.strip("/"))

    def _act(self, name: str) -> None:
        if name in TRICKS:
            TRICKS[name].act(self._send)
        elif name == "picture":
            self._send(whole(PICTURE))
        elif name.startswith("chain/"):
            self._send(leads(f"/chain/{int(name.split('/')[1]) + 1}"))
        elif name.startswith("to/"):
            self._send(leads([*REDIRECTS, *forbidden_urls()][int(name.split("/")[1])]))
        elif name == "chain-to-inner":
            self._send(leads("http://localhost:{inner}/"))
        elif name == "again":
            self._send(leads("http://later.test:{inner}/picture"))
        elif name == "kindly":
            self._send(leads("/picture"))
        else:
            self._send(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    def _send(self, data: bytes) -> None:
        self.request.sendall(data.replace(b"{inner}", str(self.server.inner).encode()))


def forbidden_urls() -> list[str]:
    """URLs of forbidden hosts, with the inner server's port."""
    return [f"http://{host}:{{inner}}/picture" for host in FORBIDDEN]


class Stage(NamedTuple):
    """The servers at work; a certificate that the one with TLS has for tls.test."""

    hostile: _Server
    tls: _Server
    inner: _Server
    certificate: Path

    @property
    def world(self) -> dict[str, Any]:
        """The false internet."""
        return {"names": NAMES, "served": {PUBLIC: self.hostile.port, PUBLIC_TLS: self.tls.port}}

    def rows(self) -> dict[str, str]:
        """URL to the reason that its row should have; 'ok' for the few that are honest."""
        rows = {f"http://public.test/{name}": trick.reason for name, trick in TRICKS.items()}
        reasons = [*REDIRECTS.values(), *("forbidden_address" for _ in FORBIDDEN)]
        rows |= {f"http://public.test/to/{number}": reason for number, reason in enumerate(reasons)}
        rows |= {url.format(inner=self.inner.port): "forbidden_address" for url in forbidden_urls()}
        rows |= {
            f"http://someone@127.0.0.1:{self.inner.port}/": "credentials_refused",
            "http://later.test/again": "forbidden_address",
            f"http://once.test:{self.inner.port}/missing": "not_found",  # asked where it was looked up, and once
            "https://public.test/picture": "connection",  # it speaks no TLS
            "https://another.test/picture": "tls",  # its certificate is another's
        }
        rows |= {f"https://tls.test/{name}": trick.reason for name, trick in TRICKS.items()}
        honest = ("http://public.test/picture", "http://public.test/kindly", "https://tls.test/picture")
        return rows | dict.fromkeys(honest, "ok")


@contextmanager
def hostile(folder: Path) -> Iterator[Stage]:
    """The servers, running; the certificate is made in the folder."""
    certificate, key = _certificate(folder)
    with _Server(_Hostile) as plain, _Server(_Hostile) as tls, _Server(_Inner) as inner:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        tls.context = context
        plain.inner = tls.inner = inner.port
        for server in (plain, tls, inner):
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield Stage(plain, tls, inner, certificate)
        finally:
            for server in (plain, tls, inner):
                server.shutdown()


def _certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for tls.test that signs itself, and its key."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    words = ["-newkey", "rsa:2048", "-nodes", "-subj", "/CN=tls.test", "-addext", "subjectAltName=DNS:tls.test"]
    command = ["openssl", "req", "-x509", *words, "-days", "2", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key
