"""The deny list of a workspace: URLs, images and domains that were forgotten, and that no later download takes in.

It must be no trace of what it keeps out: a URL stands in it as a sha256, an image as that of its bytes. A row that it
refuses keeps its place in a shard, with the reason, without URL and text, and under a name from which nothing can be
read but that it is the same row again.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from blip_core import stores
from blip_core.data.tables import PairTable, iterate_pairs
from blip_core.errors import InputError, WorkspaceError
from blip_core.files import atomic_file
from blip_core.workspace import Workspace

DENIED_URL, DENIED_IMAGE, DENIED_DOMAIN = DENIED_REASONS = ("denied_url", "denied_image", "denied_domain")
VEIL = "denied-"
VEIL_DIGITS = 20
PLACE = re.compile(r"(?:[a-z][a-z0-9+.-]*:)?//([^/?#\\]*)([^#]*)", re.IGNORECASE | re.DOTALL)
PORT = re.compile(r":\d*$")


@dataclass(frozen=True)
class Denied:
    """What may not come in: `url_key` of URLs, sha256 of stored images, and domains, their subdomains included."""

    urls: frozenset[str] = frozenset()
    images: frozenset[str] = frozenset()
    domains: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.urls or self.images or self.domains)

    def __or__(self, other: "Denied") -> "Denied":
        return Denied(self.urls | other.urls, self.images | other.images, self.domains | other.domains)

    def reasons(self, urls: Iterable[str | None], images: Iterable[str | None] | None = None) -> list[str | None]:
        """For each row, by its URL and its image's sha256, the first of DENIED_REASONS that applies, or None."""
        hosts: dict[str, bool] = {}
        by_url = [self._of_url(url, hosts) for url in urls]
        if images is None or not self.images:
            return by_url
        by_image = (DENIED_IMAGE if image in self.images else None for image in images)
        return [reason or other for reason, other in zip(by_url, by_image, strict=True)]

    def _of_url(self, url: str | None, hosts: dict[str, bool]) -> str | None:
        if not url:
            return None
        if self.urls and url_key(url) in self.urls:
            return DENIED_URL
        if not self.domains:
            return None
        name = host_of(url)
        if name not in hosts:
            hosts[name] = any(domain in self.domains for domain in _domains_above(name))
        return DENIED_DOMAIN if hosts[name] else None


NOTHING = Denied()


def read_denied(workspace: Workspace) -> Denied:
    """The deny list as it stands; an empty one where there is none. Raises WorkspaceError where it is torn."""
    path = workspace.denied
    with stores.reaching(path):
        data = stores.read_bytes(path) if path.exists() else b""
    try:
        return _parsed(data)
    except (ValueError, KeyError, TypeError) as error:
        raise WorkspaceError(f'{path}: must have lines such as {{"domain": "example.org"}} ({error})') from error


def deny(workspace: Workspace, more: Denied) -> Denied:
    """Adds to the deny list in one atomic step, and returns all of it."""
    standing = read_denied(workspace)
    every = standing | more
    if every == standing:
        return every
    if stores.is_remote(workspace.denied):
        with stores.reaching(workspace.denied):
            stores.change(workspace.denied, lambda before: _text(_parsed(before or b"") | more))
    else:
        with atomic_file(workspace.denied) as temporary:
            temporary.write_bytes(_text(every))
    return every


def _parsed(data: bytes) -> Denied:
    found: dict[str, set[str]] = {field.name: set() for field in fields(Denied)}
    for line in data.decode().splitlines():
        ((kind, value),) = json.loads(line).items()
        found[f"{kind}s"].add(str(value))
    return Denied(**{name: frozenset(values) for name, values in found.items()})


def _text(denied: Denied) -> bytes:
    lines = [
        json.dumps({field.name.removesuffix("s"): value}, ensure_ascii=False)
        for field in fields(Denied)
        for value in sorted(getattr(denied, field.name))
    ]
    return "".join(f"{line}\n" for line in lines).encode()


def url_key(url: str) -> str:
    """sha256 of a URL without scheme and fragment, its host in lower case: what names one place has one key."""
    found = PLACE.match(url.strip())
    place = f"{found[1].lower()}{found[2] or '/'}" if found else url.strip()
    return hashlib.sha256(place.encode(errors="surrogatepass")).hexdigest()


def host_of(url: str) -> str:
    """The host that a URL names, as `domain_name` has it; empty where it names none."""
    found = PLACE.match(url.strip())
    return domain_name(PORT.sub("", found[1].rpartition("@")[2])) if found else ""


def domain_name(name: str) -> str:
    """A domain in lower case, without the dot at its end, and in ASCII where it has such a form."""
    name = name.strip().lower().rstrip(".")
    try:
        return name.encode("idna").decode() if not name.isascii() else name
    except UnicodeError:
        return name


def _domains_above(host: str) -> Iterable[str]:
    """The host and every domain that it belongs to."""
    labels = host.split(".")
    return (".".join(labels[place:]) for place in range(len(labels)))


def veil(uid: str) -> str:
    """The name under which a row stays in its shard when nothing of it may: the same for the same uid."""
    return VEIL + hashlib.sha256(f"capfilt.denied\0{uid}".encode()).hexdigest()[:VEIL_DIGITS]


def veiled_row(uid: str, reason: str) -> dict[str, Any]:
    """What stays of a row in a shard."""
    return {"uid": veil(uid), "status": "failed", "reason": reason}


def veil_rows(rows: pa.Table, denied: Denied) -> pa.Table:
    """The rows of a URL table (uid, url, caption, ...) with all that is denied veiled, in the order in which they came.

    That is no longer the order of uid. A column `denied` says why, null for all others; the table is returned as it is
    where nothing is denied.
    """
    if not denied:
        return rows
    reasons = pa.array(denied.reasons(rows["url"].to_pylist()), pa.string())
    if "denied" in rows.column_names:
        reasons = pc.coalesce(reasons, rows["denied"].combine_chunks())
    if reasons.null_count == len(reasons):
        return rows
    fresh = pc.and_(pc.is_valid(reasons), pc.is_valid(rows["url"]))
    uids = _replaced(rows["uid"].to_pylist(), fresh.to_pylist())
    texts = {name: pc.if_else(fresh, None, rows[name]) for name in ("url", "caption")}
    others = {name: rows[name] for name in rows.column_names if name not in ("uid", "url", "caption", "denied")}
    veiled = {"uid": pa.array(uids, rows["uid"].type), **texts, **others, "denied": reasons}
    return pa.table(veiled, metadata=rows.schema.metadata)


def refuse_denied(human: PairTable, denied: Denied) -> None:
    """Raises InputError where a table of human pairs, which is its owner's to change, has an image that is denied."""
    if not denied.images:
        return
    for uid, image, _ in iterate_pairs(human):
        if (digest := hashlib.sha256(image).hexdigest()) in denied.images:
            raise InputError(
                f"{human.path}: the image of {uid!r} ({digest}) is on the workspace's deny list; take it out of the "
                "table"
            )


def _replaced(uids: Sequence[str], fresh: Sequence[bool]) -> list[str]:
    return [veil(uid) if hidden else uid for uid, hidden in zip(uids, fresh, strict=True)]
