"""Which columns of a table hold URLs, web texts and uids, by the names that published tables have.

LAION: URL, TEXT. DataComp: uid, url, text. COYO: url, text. Conceptual Captions, RedCaps and SBU on the Hugging Face
hub: image_url, caption; SBU as published: image_urls, captions.
"""

from collections.abc import Sequence
from typing import NamedTuple

from blip_core.errors import InputError

AUTO = "auto"
# The first one is taken whatever else there is; of the others there may be one.
URL_NAMES = ("url", "URL", "image_url", "image_urls")
CAPTION_NAMES = ("caption", "text", "TEXT", "alt_text", "alt", "captions")
UID_NAME = "uid"


class Columns(NamedTuple):
    """The names of a table's columns. uid None: it has none."""

    url: str
    caption: str
    uid: str | None

    def listed(self) -> str:
        """For an error message."""
        return f"{self.url}, {self.caption} and {self.uid or 'no uid'}"


def choose_columns(wanted: Columns, present: Sequence[str], path: str) -> Columns:
    """The columns of a file.

    Args:
        wanted: names, or AUTO for those that are to be recognised.
        present: the file's columns.
        path: the file, for the errors.

    Raises InputError where one is missing, comes twice, or cannot be told from others.
    """
    url = _recognised("url", "image URLs", URL_NAMES, present, path) if wanted.url == AUTO else wanted.url
    caption = (
        _recognised("caption", "web texts", CAPTION_NAMES, present, path) if wanted.caption == AUTO else wanted.caption
    )
    uid = wanted.uid
    if uid == AUTO:
        uid = UID_NAME if UID_NAME in present else None
    require_columns(present, [name for name in (url, caption, uid) if name is not None], path)
    return Columns(url, caption, uid)


def require_columns(present: Sequence[str], wanted: Sequence[str], path: str) -> None:
    """Raises InputError where a column is missing, or there are two of its name."""
    for name in wanted:
        if name not in present:
            raise InputError(f"{path}: has no column '{name}'; its columns are {_listed(present)}")
        if present.count(name) > 1:
            raise InputError(f"{path}: has {present.count(name)} columns '{name}'; its columns are {_listed(present)}")


def _recognised(key: str, what: str, names: Sequence[str], present: Sequence[str], path: str) -> str:
    found = [name for name in names if name in present]
    if not found:
        raise InputError(
            f"{path}: has no column of {what}, such as {', '.join(names)}; its columns are {_listed(present)}. Name it "
            f"by web.{key}, and where the file has no line of names, all of its columns by web.columns"
        )
    if len(found) > 1 and found[0] != names[0]:
        raise InputError(f"{path}: {' and '.join(found)} may each be its column of {what}; name one by web.{key}")
    return found[0]


def _listed(present: Sequence[str]) -> str:
    return ", ".join(f"{name:.60}" for name in present) or "none"
