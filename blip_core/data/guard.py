"""What stands between a stranger's URL and the network: an opener of urllib that img2dataset uses without knowing.

Every connection, that of a redirect too, is made to an address that was looked up and judged a moment before, so a
name cannot mean one address when it is judged and another when it is asked. A proxy of the environment is used as
ever; it then makes the connections, and only what a name means here can be judged.
"""

import http.client
import socket
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from email.message import Message
from functools import partial
from typing import IO, TYPE_CHECKING, Any, NamedTuple, NoReturn, cast
from urllib.parse import urlsplit
from urllib.request import Request

from blip_core.data.addresses import forbidden_kind
from blip_core.data.budget import Budget, BudgetedResponse, Refusal
from blip_core.data.hosts import Hosts

if TYPE_CHECKING:
    from blip_core.data.robots import Robots

SCHEMES = ("http", "https")
HEAD_BYTES = 65_536  # of an answer, beside a body that is cut

Resolve = Callable[..., list[tuple[Any, ...]]]  # socket.getaddrinfo, or what tests put in its place
Connect = Callable[[Budget, tuple[str, int], float, object], socket.socket]


class Limits(NamedTuple):
    """What URLs may lead to and cost."""

    allow_private_networks: bool = False
    url_s: float = 60  # seconds of one URL, redirects included
    max_bytes: int = 20_000_000  # of one URL, redirects included
    max_redirects: int = 10
    per_host: int = 0  # connections to one host at a time; 0: any number
    host_pause_s: float = 0  # seconds between the beginnings of two requests to one host
    robots_txt: bool = False  # whether each host is asked for its robots.txt first
    user_agent: str = "capfilt"  # that its rules may be for


def install_guard(limits: Limits) -> None:
    """Has every urllib.request.urlopen of this process, and of those forked from it, keep the limits."""
    urllib.request.install_opener(guarded_opener(limits))


def guarded_opener(limits: Limits, resolve: Resolve | None = None) -> urllib.request.OpenerDirector:
    """An opener for http and https alone, which keeps the limits."""
    return _opener(limits, Door(limits, resolve))


def _opener(limits: Limits, door: "Door") -> urllib.request.OpenerDirector:
    proxies = {scheme: proxy for scheme, proxy in urllib.request.getproxies().items() if scheme in SCHEMES}
    opener = urllib.request.OpenerDirector()
    for handler in (
        _Admission(limits, _robots(limits, door) if limits.robots_txt else None),
        urllib.request.ProxyHandler(proxies),
        urllib.request.UnknownHandler(),
        _Http(door),
        _Https(door),
        _TellingRetryAfter(),
        _Redirects(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _robots(limits: Limits, door: "Door") -> "Robots":
    """The rules of hosts, asked for through the same door."""
    from blip_core.data import robots  # which only those who ask for it need a library for

    most = robots.MAX_BYTES + HEAD_BYTES
    own = limits._replace(max_bytes=most, max_redirects=robots.MAX_REDIRECTS, robots_txt=False)
    return robots.Robots(limits.user_agent, _opener(own, door).open)


class Door:
    """Makes connections, to addresses that may be asked."""

    def __init__(self, limits: Limits, resolve: Resolve | None = None) -> None:
        self.hosts = Hosts(limits.per_host, limits.host_pause_s)
        self._private = limits.allow_private_networks
        self._resolve = resolve

    def addresses(self, host: str, port: int | None) -> list[tuple[Any, ...]]:
        """What getaddrinfo says of a host. Raises Refusal where any of its addresses is not a public one."""
        found = (self._resolve or socket.getaddrinfo)(host, port, 0, socket.SOCK_STREAM)
        for *_, address in found:
            kind = None if self._private else forbidden_kind(address[0])
            if kind:
                raise Refusal("forbidden_address", f"{host} is {address[0]} ({kind})")
        return found

    def connect(self, budget: Budget, place: tuple[str, int], timeout: float, _source: object) -> socket.socket:
        """A connection to the first address that answers, as socket.create_connection makes it."""
        problem = OSError(f"{place[0]} has no address")
        for family, kind, protocol, _, address in self.addresses(*place):
            connection = socket.socket(family, kind, protocol)
            try:
                connection.settimeout(budget.timeout(timeout))
                connection.connect(address)
            except OSError as error:
                connection.close()
                problem = error
            else:
                return connection
        raise problem

    def judge_for_proxy(self, target: str) -> None:
        """Raises Refusal where a host that a proxy will be asked for is, as far as is known here, no public one."""
        place = urlsplit(f"//{target}")
        try:
            self.addresses(place.hostname or "", place.port)
        except socket.gaierror:
            return  # such a network may leave all look-ups to its proxy


class _Admission(urllib.request.BaseHandler):
    """Looks at each request, a redirect's too, before anything is done for it."""

    handler_order = 50  # before a proxy takes the host's place in the request

    def __init__(self, limits: Limits, robots: "Robots | None") -> None:
        self._limits = limits
        self._robots = robots

    def http_request(self, request: Request) -> Request:
        """Refuses credentials and what robots.txt forbids, and gives a URL its budget."""
        if "@" in (request.host or ""):
            raise Refusal("credentials_refused", "the URL has a user name in it")
        if not hasattr(request, "budget"):
            limits = self._limits
            request.budget = Budget(limits.url_s, limits.max_bytes, limits.max_redirects)  # type: ignore[attr-defined]
        request.target = request.host  # type: ignore[attr-defined]
        if self._robots:
            began = time.monotonic()
            self._robots.check(request)
            request.budget.pause(time.monotonic() - began)  # type: ignore[attr-defined]
        return request

    https_request = http_request


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https, on the budget of the first URL, which counts them as well."""

    max_redirections = sys.maxsize

    def http_error_302(self, req: Request, fp: Any, code: int, msg: str, headers: Any) -> Any:
        """The body that comes with a redirect is never read."""
        fp.close()
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> Request | None:
        """The request for where it leads to."""
        if urlsplit(newurl).scheme not in SCHEMES:
            raise Refusal("scheme_refused", f"a redirect to {newurl[:100]}")
        req.budget.follow()  # type: ignore[attr-defined]
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request:
            request.budget = req.budget  # type: ignore[attr-defined]
            request.remove_header("Proxy-authorization")  # the next host may be one that is asked without the proxy
        return request


class _TellingRetryAfter(urllib.request.HTTPDefaultErrorHandler):
    """Adds what a server says of another try to the error's message, all that img2dataset keeps of an answer."""

    def http_error_default(self, req: Request, fp: IO[bytes] | None, code: int, msg: str, hdrs: Message) -> NoReturn:
        """Raises urllib's error."""
        if fp:
            fp.close()
        asked = hdrs.get("Retry-After")
        raise urllib.error.HTTPError(req.full_url, code, f"{msg} [Retry-After: {asked}]" if asked else msg, hdrs, fp)


class _Connection(http.client.HTTPConnection):
    """A connection that goes through the door."""

    def __init__(self, host: str, *, lead: Callable[[http.client.HTTPConnection], None], **options: Any) -> None:
        super().__init__(host, **options)
        lead(self)


class _TlsConnection(http.client.HTTPSConnection):
    """The same with TLS, which asks for a certificate of the host's name as ever."""

    def __init__(self, host: str, *, lead: Callable[[http.client.HTTPConnection], None], **options: Any) -> None:
        super().__init__(host, **options)
        lead(self)


class _Opening(urllib.request.AbstractHTTPHandler):
    """Asks a server, or a proxy of the environment for it, when its host may be asked."""

    def __init__(self, door: Door) -> None:
        super().__init__()
        self._door = door

    def ask(
        self, kind: Callable[..., http.client.HTTPConnection], request: Request, **options: Any
    ) -> BudgetedResponse:
        """The answer; the host has one connection more until it is read or closed."""
        target, budget = request.target, request.budget  # type: ignore[attr-defined]
        host = urlsplit(f"//{target}").hostname or ""
        began = time.monotonic()
        leave = self._door.hosts.enter(host)
        budget.pause(time.monotonic() - began)
        try:
            connect = self._door.connect
            if request.host != target:
                self._door.judge_for_proxy(target)
                connect = connect_to_proxy
            lead = partial(_lead, connect=connect, budget=budget)
            answer = cast("BudgetedResponse", self.do_open(partial(kind, lead=lead), request, **options))
        except BaseException:
            leave()
            raise
        answer.when_closed(leave)
        return answer


class _Http(_Opening):
    def http_open(self, request: Request) -> BudgetedResponse:
        """Opens an http URL."""
        return self.ask(_Connection, request)

    http_request = urllib.request.AbstractHTTPHandler.do_request_


class _Https(_Opening):
    def __init__(self, door: Door) -> None:
        super().__init__(door)
        self._context = ssl.create_default_context()  # one for all: reading the authorities takes longer than a fetch
        self._context.set_alpn_protocols(["http/1.1"])

    def https_open(self, request: Request) -> BudgetedResponse:
        """Opens an https URL."""
        return self.ask(_TlsConnection, request, context=self._context)

    https_request = urllib.request.AbstractHTTPHandler.do_request_


def _lead(connection: http.client.HTTPConnection, connect: Connect, budget: Budget) -> None:
    # http.client has no public way to give a connection its socket; without it TLS and tunnels would be repeated here
    connection._create_connection = partial(connect, budget)  # type: ignore[attr-defined]
    connection.response_class = partial(BudgetedResponse, budget=budget)  # type: ignore[assignment]


def connect_to_proxy(budget: Budget, place: tuple[str, int], timeout: float, _source: object) -> socket.socket:
    """A connection to a proxy that the environment names, wherever it is."""
    return socket.create_connection(place, budget.timeout(timeout))
