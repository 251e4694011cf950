"""A false internet for a process whose PYTHONPATH begins here: names mean what a test says, at each look-up anew.

CAPFILT_TEST_NAMES is a file of JSON: `names` has for each name a list of look-ups, the last of which repeats, each a
list of addresses; `served` has the public addresses, and the port on loopback that stands for all of theirs.
"""

import json
import os
import socket
import threading
from collections import Counter
from pathlib import Path
from typing import Any

WORLD = json.loads(Path(os.environ["CAPFILT_TEST_NAMES"]).read_text())
LOOKED_UP: Counter[str] = Counter()
LOCK = threading.Lock()

look_up, connect = socket.getaddrinfo, socket.socket.connect


def false_look_up(host: Any, port: Any, *arguments: Any, **options: Any) -> list[Any]:
    """What getaddrinfo gives, in the false internet."""
    answers = WORLD["names"].get(host)
    if answers is None:
        return look_up(host, port, *arguments, **options)
    with LOCK:
        addresses = answers[min(LOOKED_UP[host], len(answers) - 1)]
        LOOKED_UP[host] += 1
    return [entry for address in addresses for entry in look_up(address, port, *arguments, **options)]


def false_connect(self: socket.socket, address: Any) -> None:
    """Leads to the port that stands for a public address; every other address is the real one."""
    port = WORLD["served"].get(address[0])
    connect(self, ("127.0.0.1", port) if port else address)


socket.getaddrinfo = false_look_up
socket.socket.connect = false_connect  # type: ignore[method-assign]
