"""Pictures that are named on the command line."""

from pathlib import Path

from blip_core.data.images import UnreadableImage, decode_image
from blip_core.errors import InputError


def read_picture(path: Path) -> bytes:
    """The file's bytes. Raises InputError where they are no whole image."""
    try:
        data = path.read_bytes()
        decode_image(data)
    except OSError as error:
        raise InputError(f"image {path}: cannot be read ({error.strerror})") from error
    except UnreadableImage as error:
        raise InputError(f"image {path}: {error}") from error
    return data
