"""Strict decoding: orientation, transparency, and a reason for everything that is no whole image."""

import io

import numpy as np
import pytest
from PIL import Image

from blip_core.data.images import UnreadableImage, decode_image, store_image
from blip_core.data.shards import REASONS

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def _encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _corners(width: int, height: int) -> Image.Image:
    """Four flat quarters: red, green / blue, white."""
    image = Image.new("RGB", (width, height), WHITE)
    image.paste(RED, (0, 0, width // 2, height // 2))
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    return image


def _quarters(image: Image.Image) -> list[tuple[int, ...]]:
    """The colours at the middle of the quarters, each channel rounded to 0 or 255."""
    width, height = image.size
    places = [(width // 4, height // 4), (3 * width // 4, height // 4)]
    places += [(x, 3 * height // 4) for x, _ in places]
    return [tuple(255 * (channel > 127) for channel in image.getpixel(place)) for place in places]


def _tagged(orientation: int, width: int = 120, height: int = 80, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return _encoded(_corners(width, height), kind, exif=exif)


# What a viewer shows for each value of the tag (EXIF 2.32, table 4.6.4), written down by hand.
UPRIGHT = {
    1: [RED, GREEN, BLUE, WHITE],
    2: [GREEN, RED, WHITE, BLUE],
    3: [WHITE, BLUE, GREEN, RED],
    4: [BLUE, WHITE, RED, GREEN],
    5: [RED, BLUE, GREEN, WHITE],
    6: [BLUE, RED, WHITE, GREEN],
    7: [WHITE, GREEN, BLUE, RED],
    8: [GREEN, WHITE, RED, BLUE],
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_size", [40, 400])
def test_every_orientation_comes_out_upright_shrunk_or_not(orientation: int, image_size: int) -> None:
    data = _tagged(orientation)
    stored = store_image(data, image_size)
    assert _quarters(decode_image(data)) == UPRIGHT[orientation]
    assert _quarters(Image.open(io.BytesIO(stored.data))) == UPRIGHT[orientation]
    assert Image.open(io.BytesIO(stored.data)).getexif().get(0x0112, 1) == 1
    upright = (120, 80) if orientation < 5 else (80, 120)
    small = (60, 40) if orientation < 5 else (40, 60)
    assert (stored.original_width, stored.original_height) == upright
    assert (stored.width, stored.height) == (small if image_size == 40 else upright)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_orientation_is_applied_in_other_formats_too(kind: str) -> None:
    assert _quarters(decode_image(_tagged(6, kind=kind))) == UPRIGHT[6]


def test_an_upright_small_jpeg_keeps_its_bytes_and_others_become_jpegs() -> None:
    picture = _corners(120, 80)
    jpeg = _encoded(picture)
    assert store_image(jpeg, 384).data == jpeg
    for kind in ("PNG", "WEBP", "GIF", "BMP", "TIFF"):
        stored = Image.open(io.BytesIO(store_image(_encoded(picture, kind), 384).data))
        assert (stored.format, stored.size, _quarters(stored)) == ("JPEG", (120, 80), UPRIGHT[1])
    cmyk = Image.open(io.BytesIO(store_image(_encoded(picture.convert("CMYK")), 384).data))
    assert cmyk.mode == "RGB"


def test_a_large_jpeg_shrinks_to_the_same_picture_as_a_plain_resize() -> None:
    smooth = np.linspace(0, 255, 900)[:, None, None] * np.ones((1, 1201, 3)) * [1.0, 0.5, 0.2]
    picture = Image.fromarray(smooth.astype(np.uint8))
    stored = store_image(_encoded(picture, quality=95), 100)
    assert (stored.width, stored.height, stored.original_width, stored.original_height) == (133, 100, 1201, 900)
    expected = np.asarray(picture.resize((133, 100), Image.Resampling.BOX), dtype=float)
    assert np.abs(np.asarray(decode_image(stored.data), dtype=float) - expected).mean() < 2


def _photo(width: int, height: int) -> Image.Image:
    """Smooth shapes with some grain, as photographs have."""
    rows, columns = np.mgrid[0:height, 0:width] / 40
    waves = np.stack([np.sin(rows + columns), np.cos(rows * 1.7), np.sin(columns - rows * 0.6)], axis=2)
    grain = np.random.default_rng(1).normal(0, 6, waves.shape)
    return Image.fromarray((127 + 100 * waves + grain).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size_and_looks_the_same(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _encoded(_photo(1203, 901), exif=exif, quality=92)
    whole, drafted = decode_image(data), decode_image(data, size=100)
    # of 8/8, 4/8, 2/8 and 1/8, a quarter is the smallest with both sides at least 200; JPEG rounds up
    assert drafted.size == ((301, 226) if orientation != 6 else (226, 301))
    one, other = (np.asarray(image.resize((100, 100), Image.Resampling.BICUBIC), float) for image in (whole, drafted))
    assert np.abs(one - other).mean() < 0.5
    assert np.abs(one - other[::-1]).mean() > 20


def test_what_is_not_much_larger_than_asked_is_decoded_whole() -> None:
    picture = _photo(390, 260)
    jpeg = _encoded(picture)
    assert np.array_equal(decode_image(jpeg, size=131), decode_image(jpeg))
    assert decode_image(jpeg, size=130).size == (390, 260)  # half would be 195 x 130, and the gap asks for 260
    assert decode_image(jpeg, size=65).size == (195, 130)
    assert decode_image(_encoded(picture, "PNG"), size=10).size == (390, 260)


def test_a_jpeg_cut_short_is_truncated_at_a_fraction_of_its_size_as_well() -> None:
    with pytest.raises(UnreadableImage, match="truncated"):
        decode_image(_encoded(_photo(800, 800))[:-3000], size=50)


def test_transparency_lies_on_white_and_sixteen_bits_are_scaled() -> None:
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    assert decode_image(_encoded(clear, "PNG")).getpixel((5, 5)) == WHITE
    deep = Image.fromarray(np.full((20, 20), 32_896, dtype=np.uint16))
    assert decode_image(_encoded(deep, "PNG")).getpixel((5, 5)) == (128, 128, 128)


def _broken_exif() -> bytes:
    return _encoded(_corners(40, 40), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff broken")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_malformed_exif_block_does_not_cost_the_image() -> None:
    assert _quarters(decode_image(_broken_exif())) == UPRIGHT[1]


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not_an_image"),
        (b"<html>no image here</html>", "not_an_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "not_an_image"),
        (_encoded(NOISE)[:-2000], "truncated"),
        (_encoded(NOISE)[:-2], "truncated"),
        (_encoded(NOISE, "PNG")[:-2000], "truncated"),
        (_encoded(NOISE, "WEBP")[:-2000], "unreadable"),
        (_encoded(Image.new("1", (9000, 9000)), "PNG"), "too_large"),
        (_encoded(Image.new("1", (12_000, 12_000)), "PNG"), "too_large"),
        (_encoded(Image.new("1", (16_000, 16_000)), "PNG"), "too_large"),
    ],
)
def test_what_is_no_whole_image_has_a_reason(data: bytes, reason: str) -> None:
    for decode in (decode_image, lambda data: store_image(data, 64)):
        with pytest.raises(UnreadableImage) as caught:
            decode(data)
        assert caught.value.reason == reason
        assert reason in REASONS


def test_limits_are_the_callers() -> None:
    data = _encoded(_corners(120, 80))
    assert store_image(data, 384, min_side=80, max_pixels=9600).width == 120
    with pytest.raises(UnreadableImage, match="too_small"):
        store_image(data, 384, min_side=81)
    with pytest.raises(UnreadableImage, match="too_large"):
        decode_image(data, max_pixels=9599)
