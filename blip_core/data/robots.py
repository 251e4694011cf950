"""robots.txt (RFC 9309), asked for once a host and read by Protego, which matches in linear time.

A host without one (any 4xx but 429, or redirects that end nowhere) allows all. One that does not answer, or answers
5xx or 429, forbids all as long as that lasts: its URLs then fail as that request did, for a reason that may pass.
"""

import re
import threading
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Callable
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request

from protego import Protego

from blip_core.data.budget import Refusal

# The most that is read of one; RFC 9309, 2.5, asks for as much at least. What follows is not looked at.
MAX_BYTES = 500 * 1024
# Of redirects; RFC 9309, 2.3.1.2, asks for as many at least.
MAX_REDIRECTS = 5
# Hosts whose rules are kept at a time; the one that was asked for first goes first.
HOSTS_KEPT = 256
# Statuses of a host that has none; redirects that end nowhere are among them.
UNAVAILABLE = range(300, 500)
TOO_MANY_REQUESTS = 429
GROUP = re.compile(r"\s*user[- ]?agent\s*[:\s]\s*([^#]*)", re.IGNORECASE)

Open = Callable[..., Any]  # OpenerDirector.open


class Robots:
    """The rules of hosts for one user agent.

    Args:
        user_agent: the product token that rules may be for.
        open: opens a request within limits of its own, and asks for no robots.txt.
    """

    def __init__(self, user_agent: str, open: Open) -> None:
        self._user_agent, self._open = user_agent, open
        self._hosts: OrderedDict[str, _Host] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, request: Request) -> None:
        """Raises Refusal where the request's URL is forbidden, and OSError where its host's robots.txt is out of reach,
        with the message that this had."""
        place = urlsplit(request.full_url)
        address = f"{place.scheme}://{place.netloc}/robots.txt".lower()
        with self._lock:
            host = self._hosts.setdefault(address, _Host())
            while len(self._hosts) > HOSTS_KEPT:
                self._hosts.popitem(last=False)
        with host.lock:
            if host.rules is None:
                host.rules = self._rules(address, request)
        if isinstance(host.rules, str):
            raise OSError(f"robots.txt: {host.rules}")
        if not host.rules.can_fetch(request.full_url, self._user_agent):
            raise Refusal("robots_txt", f"{address} forbids it to {self._user_agent}")

    def _rules(self, address: str, request: Request) -> Protego | str:
        """What the host says, or why that is not known."""
        asked = Request(address, headers={"User-Agent": request.get_header("User-agent") or self._user_agent})
        try:
            with self._open(asked, timeout=request.timeout) as answer:
                return parse_rules(answer.read(MAX_BYTES), self._user_agent)
        except urllib.error.HTTPError as error:
            unavailable = error.code in UNAVAILABLE and error.code != TOO_MANY_REQUESTS
            return parse_rules(b"", self._user_agent) if unavailable else str(error)
        except Refusal as error:
            return parse_rules(b"", self._user_agent) if error.reason == "too_many_redirects" else str(error)
        except (OSError, HTTPException, ValueError) as error:
            return str(error) or type(error).__name__


class _Host:
    """What is known of a host: None before it was asked."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.rules: Protego | str | None = None


def parse_rules(data: bytes, user_agent: str) -> Protego:
    """The rules in a robots.txt. Groups for others count as one: Protego gives every agent of a group its own copy of
    all rules, of which half a megabyte may have ten thousand each."""
    lines = data.decode("utf-8-sig", "replace").splitlines()
    return Protego.parse("\n".join(_with_known_agent(line, user_agent.lower()) for line in lines))


def _with_known_agent(line: str, user_agent: str) -> str:
    found = GROUP.match(line)
    if found is None:
        return line
    named = found[1].strip().lower()
    concerned = named.replace("*", "") in user_agent
    return f"User-agent: {named if concerned else f'{user_agent}-not'}"
