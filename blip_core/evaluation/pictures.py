"""Pictures small enough to travel inside a page, alone or as a sheet of cards."""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from blip_core.data.images import decode_image

THUMBNAIL_SIDE = 160
SHEET_WIDTH = 840
SHEET_COLUMNS = 4
CARD_HEIGHT = 252
CARD_GAP = 10
# Of the characters that a text from the web may have, those that XML does not.
NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def thumbnail(data: bytes, side: int = THUMBNAIL_SIDE) -> str:
    """An image file as a `data:` URI of a JPEG whose longer side is at most `side` pixels."""
    picture = decode_image(data)
    picture.thumbnail((side, side))
    small = io.BytesIO()
    picture.save(small, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(small.getvalue()).decode()}"


def sheet(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of `RoundTables.grid` as one picture, a card each with image, text, source and score.

    A `data:` URI of an SVG, for pages that show pictures but lay out nothing: the browser sets the texts, in
    whatever script, and as a picture it runs nothing and fetches nothing.
    """
    environment = Environment(
        loader=PackageLoader("blip_core.evaluation", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    lines = -(-len(rows) // SHEET_COLUMNS)
    cards = [{**row, "image": thumbnail(row["image"]), "text": NOT_XML.sub(" ", row["text"])} for row in rows]
    drawn = environment.get_template("sheet.svg.jinja").render(
        cards=cards,
        columns=SHEET_COLUMNS,
        width=SHEET_WIDTH,
        card_height=CARD_HEIGHT,
        height=lines * (CARD_HEIGHT + CARD_GAP) - CARD_GAP + 2,
    )
    return f"data:image/svg+xml;base64,{base64.b64encode(drawn.encode()).decode()}"
