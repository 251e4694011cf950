"""Pictures small enough to travel inside a page."""

import base64
import io

from blip_core.data.images import decode_image

THUMBNAIL_SIDE = 160


def thumbnail(data: bytes, side: int = THUMBNAIL_SIDE) -> str:
    """An image file as a `data:` URI of a JPEG whose longer side is at most `side` pixels."""
    picture = decode_image(data)
    picture.thumbnail((side, side))
    small = io.BytesIO()
    picture.save(small, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(small.getvalue()).decode()}"
