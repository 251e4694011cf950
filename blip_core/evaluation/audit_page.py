"""The page on which a person marks a sample's pairs: one HTML file with its pictures, style and script in it.

Texts and pictures come from anyone. The page shows texts as text, lets no other script or style run than its own two
by their digests, asks nothing of any address, and does not say what the Filter thinks, which would sway the marks.
"""

import base64
import hashlib
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from blip_core.errors import WorkspaceError
from blip_core.evaluation.answers import ANSWERS_VERSION
from blip_core.evaluation.pictures import thumbnail
from blip_core.evaluation.sample import Sample
from blip_core.evaluation.tables import RoundTables
from blip_core.files import atomic_file
from blip_core.workspace import Workspace

PICTURE_SIDE = 384
MOST_CHARACTERS = 2_000  # of a text; what is longer is cut, and the page says so


def write_page(workspace: Workspace, sample: Sample) -> Path:
    """Writes `audit.html` of the sample's round and returns its path.

    Raises WorkspaceError where the picture of a pair is not in its shard any more.
    """
    environment = Environment(
        loader=PackageLoader("blip_core.evaluation", ""),
        autoescape=True,  # texts from the web are never markup
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = (_resource(name) for name in ("audit.css", "audit.js"))
    page = environment.get_template("audit.html.jinja").render(
        sample=sample,
        schema=ANSWERS_VERSION,
        cards=_cards(workspace, sample),
        most=MOST_CHARACTERS,
        style=style,
        script=script,
        policy=_policy(style, script),
    )
    target = workspace.round(sample.round).audit_page
    with atomic_file(target) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return target


def _cards(workspace: Workspace, sample: Sample) -> list[dict[str, Any]]:
    """Text and picture of each pair."""
    with RoundTables.open(workspace, sample.round) as tables:
        images = tables.images([(pair.shard, pair.uid) for pair in sample.drawn])
    for pair in sample.drawn:
        if (pair.shard, pair.uid) not in images:
            shard = workspace.shard(pair.shard)
            raise WorkspaceError(f"{shard}: has no image of uid {pair.uid!r}, which was annotated from it")
    return [
        {"text": pair.text, "image": thumbnail(images[pair.shard, pair.uid], PICTURE_SIDE)} for pair in sample.drawn
    ]


def _resource(name: str) -> str:
    return files("blip_core.evaluation").joinpath(name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """The Content-Security-Policy: pictures that are in the page, and exactly this style and this script."""
    allowed = {"img-src": "data:", "style-src": _digest(style), "script-src": _digest(script)}
    forbidden = dict.fromkeys(("default-src", "base-uri", "form-action"), "'none'")
    return "; ".join(f"{name} {value}" for name, value in (forbidden | allowed).items())


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
