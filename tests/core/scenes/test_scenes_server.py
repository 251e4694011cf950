"""The loopback server: what it serves, what it refuses, and that its address lasts."""

import http.client
import socket
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from blip_core.errors import WorkspaceError
from blip_core.scenes.server import serve_scenes

NAME = "0123456789abcdef.jpg"
BODY = b"\xff\xd8picture"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "web" / "images"
    images.mkdir(parents=True)
    (images / NAME).write_bytes(BODY)
    (tmp_path / "web" / "truth.parquet").write_bytes(b"secret")
    (tmp_path / "web" / "fedcba9876543210.jpg").write_bytes(b"secret")
    return tmp_path / "web"


def _status(base_url: str, path: str) -> int:
    """The status of a request whose path is sent as it is, not tidied by the client."""
    connection = http.client.HTTPConnection(base_url.removeprefix("http://"), timeout=5)
    connection.putrequest("GET", path, skip_host=True)
    connection.putheader("Host", "127.0.0.1")
    connection.endheaders()
    status = connection.getresponse().status
    connection.close()
    return status


def test_a_picture_is_served_with_its_type(folder: Path) -> None:
    with serve_scenes(folder) as base_url, urllib.request.urlopen(f"{base_url}/images/{NAME}", timeout=5) as answer:
        assert base_url.startswith("http://127.0.0.1:")
        assert answer.read() == BODY
        assert answer.headers["Content-Type"] == "image/jpeg"


def test_a_dead_link_is_not_found(folder: Path) -> None:
    with serve_scenes(folder) as base_url, pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{base_url}/images/{'0' * 16}.jpg", timeout=5)


def test_nothing_but_pictures_is_served(folder: Path) -> None:
    paths = [
        "/",
        "/images/",
        "/truth.parquet",
        "/images/../truth.parquet",
        "/images/%2e%2e/truth.parquet",
        "/images/../fedcba9876543210.jpg",
        "/fedcba9876543210.jpg",
        "//etc/passwd",
        "/images//etc/passwd",
    ]
    with serve_scenes(folder) as base_url:
        assert {path: _status(base_url, path) for path in paths} == dict.fromkeys(paths, 404)
        assert _status(base_url, f"/images/{NAME}") == 200


def test_one_connection_serves_many_pictures(folder: Path) -> None:
    with serve_scenes(folder) as base_url:
        connection = http.client.HTTPConnection(base_url.removeprefix("http://"), timeout=5)
        for name, status in ((NAME, 200), ("f" * 16 + ".jpg", 404), (NAME, 200)):
            connection.request("GET", f"/images/{name}")
            answer = connection.getresponse()
            assert answer.status == status
            assert status == 404 or answer.read() == BODY
            answer.read()
        connection.close()


def test_many_clients_at_once_are_all_served(folder: Path) -> None:
    def fetch(url: str) -> bytes:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.read()

    with serve_scenes(folder) as base_url, ThreadPoolExecutor(64) as pool:
        assert set(pool.map(fetch, [f"{base_url}/images/{NAME}"] * 512)) == {BODY}


def test_a_folder_keeps_its_address(folder: Path) -> None:
    with serve_scenes(folder) as first:
        pass
    with serve_scenes(folder) as second:
        pass
    assert first == second


def test_where_the_kept_port_is_taken_another_is_chosen_and_kept(folder: Path) -> None:
    with serve_scenes(folder) as first:
        pass
    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        squatter.bind(("127.0.0.1", int(first.rsplit(":", 1)[1])))
        squatter.listen()
        with serve_scenes(folder) as second:
            assert second != first
    with serve_scenes(folder) as third:
        assert third == second


def test_a_given_port_that_is_taken_is_an_error(folder: Path) -> None:
    with serve_scenes(folder) as base_url:
        port = int(base_url.rsplit(":", 1)[1])
        with pytest.raises(WorkspaceError, match=f"port {port}"), serve_scenes(folder, port):
            pass


def test_the_server_is_gone_after_the_block(folder: Path) -> None:
    with serve_scenes(folder) as base_url:
        pass
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{base_url}/images/{NAME}", timeout=2)
