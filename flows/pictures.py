"""Pictures that are named on the command line."""

from pathlib import Path

from PIL import Image

from blip_core.data.images import UnreadableImage, decode_image
from blip_core.errors import InputError


def read_picture(path: Path) -> tuple[bytes, Image.Image]:
    """The file's bytes and the upright RGB picture in them. Raises InputError where it is no whole image."""
    try:
        data = path.read_bytes()
        return data, decode_image(data)
    except OSError as error:
        raise InputError(f"image {path}: cannot be read ({error.strerror})") from error
    except UnreadableImage as error:
        raise InputError(f"image {path}: {error}") from error
