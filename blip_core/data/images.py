"""Images, decoded strictly: a file cut short, a decompression bomb or a page of HTML is an error with a reason.

Only web formats are opened, so that none of Pillow's readers that start other programs (EPS) ever sees a
stranger's bytes. What comes out is upright (EXIF orientation applied), RGB, transparency laid on white.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from blip_core.errors import ShardError

MAX_PIXELS = 50_000_000
JPEG_QUALITY = 95
JPEG_MAX_SIDE = 65_500
# A JPEG is decoded at the smallest fraction of its size that is still this much larger than what is stored; Pillow
# calls 2 very close to fair resampling.
REDUCING_GAP = 2

WEB_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
ORIENTATION_TAG = 0x0112
UPRIGHTING = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What Pillow's readers raise on malformed files, besides OSError.
MALFORMED = (
    *(SyntaxError, ValueError, LookupError, EOFError, TypeError, AttributeError, ArithmeticError, RuntimeError),
    *(AssertionError, struct.error, zlib.error),
)

# The size is checked here before anything is decoded, and a malformed EXIF block only costs the orientation: without
# these two filters a few images of a shard would fill the terminal.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")


class UnreadableImage(ShardError):
    """Bytes that are no whole image; `reason` is one of blip_core.data.shards.REASONS."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"the image cannot be used: {reason} ({detail})")
        self.reason = reason


class StoredImage(NamedTuple):
    """An image as a shard keeps it; all sizes in pixels, after EXIF orientation."""

    data: bytes
    width: int
    height: int
    original_width: int
    original_height: int


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS, size: int | None = None) -> Image.Image:
    """The upright RGB image that `data` encodes; the first frame of an animation.

    Args:
        data: the encoded image.
        max_pixels: the most that are decoded.
        size: the side of the square that the image will be resized to, in pixels. A JPEG of which no side is below
            a multiple of it (REDUCING_GAP) is then decoded at a fraction of its size, which is several times faster.

    Raises:
        UnreadableImage: with reason not_an_image, too_large (over `max_pixels`), truncated or unreadable.
    """
    with _reasons(), _opened(data, max_pixels) as image:
        box = None if size is None else _draft(image, (size, size))
        image.load()
        rgb = _to_rgb(image)
        if box is not None and box != (0, 0, *rgb.size):  # the last pixels of a fraction lie half outside
            rgb = rgb.resize(rgb.size, Image.Resampling.BICUBIC, box=box)
        return _upright(rgb, _orientation(image))


def store_image(data: bytes, image_size: int, min_side: int = 1, max_pixels: int = MAX_PIXELS) -> StoredImage:
    """The image as a shard keeps it: upright, and with no shorter side above `image_size`.

    An upright JPEG that is small enough keeps its bytes; everything else becomes a JPEG of quality 95.

    Raises:
        UnreadableImage: as decode_image, and too_small where a side is below `min_side`.
    """
    with _reasons(), _opened(data, max_pixels) as image:
        width, height = image.size
        if min(width, height) < min_side:
            raise UnreadableImage("too_small", f"{width} x {height} pixels, at least {min_side} a side are needed")
        same_bytes = image.format == "JPEG" and image.mode in ("RGB", "L")
        shrink = min(1.0, image_size / min(width, height))
        size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
        box = _draft(image, size)
        image.load()
        orientation = _orientation(image)
        if orientation >= 5:  # the tags that turn by a quarter
            width, height = height, width
        if same_bytes and shrink == 1 and orientation == 1:
            return StoredImage(data, width, height, width, height)
        rgb = _to_rgb(image)
    if rgb.size != size:
        rgb = rgb.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=REDUCING_GAP)
    upright = _upright(rgb, orientation)
    if max(upright.size) > JPEG_MAX_SIDE:
        raise UnreadableImage("too_large", f"a side of {max(upright.size)} pixels, a JPEG has at most {JPEG_MAX_SIDE}")
    buffer = io.BytesIO()
    upright.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return StoredImage(buffer.getvalue(), *upright.size, width, height)


@cache
def _readable_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in WEB_FORMATS if name in Image.OPEN)


@contextmanager
def _reasons() -> Iterator[None]:
    """Turns what Pillow raises on malformed files, at whatever step, into a reason."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise UnreadableImage("not_an_image", "no image format is recognised") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImage("too_large", str(error)) from error
    except (OSError, *MALFORMED) as error:
        reason = "truncated" if "truncated" in str(error).lower() else "unreadable"
        raise UnreadableImage(reason, str(error) or type(error).__name__) from error


def _opened(data: bytes, max_pixels: int) -> Image.Image:
    """The image with its header read and no pixel decoded."""
    image = Image.open(io.BytesIO(data), formats=_readable_formats())
    width, height = image.size
    if width * height > max_pixels:
        raise UnreadableImage("too_large", f"{width} x {height} pixels, at most {max_pixels} are decoded")
    return image


def _draft(image: Image.Image, size: tuple[int, int]) -> tuple[float, float, float, float] | None:
    """Lets a JPEG be decoded at a fraction of its size, and says which box of the pixels then is the image."""
    drafted = image.draft(None, (size[0] * REDUCING_GAP, size[1] * REDUCING_GAP))
    return drafted[1] if drafted else None


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where there is none or the EXIF block is malformed."""
    try:
        value = image.getexif().get(ORIENTATION_TAG, 1)
    except (OSError, *MALFORMED):
        return 1
    return value if value in UPRIGHTING else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image if orientation == 1 else image.transpose(UPRIGHTING[orientation])


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(white, layered).convert("RGB")
    if image.mode.startswith("I"):  # 16 bits a pixel: Pillow would clip instead of scaling
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    return image.convert("RGB")
