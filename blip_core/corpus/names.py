"""What a person names to be forgotten: a URL, an image by its sha256, or a domain."""

import ipaddress
import re
from collections.abc import Iterable
from pathlib import Path

from blip_core import stores
from blip_core.data.denied import Denied, domain_name, host_of, url_key
from blip_core.errors import ConfigError, InputError

DIGEST = re.compile(r"[0-9a-fA-F]{64}")
LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")


def parse_names(names: Iterable[str]) -> Denied:
    """The names as a deny list. Raises ConfigError for what is neither a URL, nor a sha256, nor a domain."""
    urls, images, domains = set(), set(), set()
    for name in (given.strip() for given in names):
        if "://" in name and host_of(name):
            urls.add(url_key(name))
        elif DIGEST.fullmatch(name):
            images.add(name.lower())
        elif _is_domain(domain_name(name)):
            domains.add(domain_name(name))
        else:
            raise ConfigError(
                f"{name!r}: expected a URL with its scheme, the 64 hexadecimal digits of an image's sha256, or a "
                "domain such as example.org"
            )
    return Denied(frozenset(urls), frozenset(images), frozenset(domains))


def read_names(path: Path) -> list[str]:
    """The lines of a text file; empty ones and those that begin with # are passed over.

    Raises InputError where it cannot be read.
    """
    try:
        lines = stores.read_bytes(path).decode("utf-8-sig").splitlines()
    except stores.errors(ValueError) as error:
        raise InputError(f"{path}: not a readable text file ({stores.reason(error)})") from error
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _is_domain(name: str) -> bool:
    """Two labels at least, so that no slip of the pen forgets all of `com`; or an address."""
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        labels = name.split(".")
        return len(labels) > 1 and all(LABEL.fullmatch(label) for label in labels)
