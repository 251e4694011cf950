"""Images that mean harm, and images that were damaged at random: a whole picture, or a reason, and never a crash."""

import hashlib
import io
import struct
import subprocess
import sys
import textwrap
import tracemalloc
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from blip_core.data.decoding import decode
from blip_core.data.images import UnreadableImage, decode_image, store_image
from blip_core.data.shards import REASONS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")

NOISE = np.random.default_rng(7).integers(0, 256, (24, 30, 3), dtype=np.uint8)
PICTURE = Image.fromarray(NOISE)
DEEP = Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257)
SIZE = 16


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def moving(kind: str) -> bytes:
    frames = [Image.new("L", PICTURE.size, grey) for grey in range(0, 250, 25)]
    return encoded(PICTURE.quantize(), kind, save_all=True, append_images=frames, duration=9)


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG, its checksum right."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, pixels: bytes = b"") -> bytes:
    """A PNG of grey pixels that claims a size, with further chunks before its pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(pixels))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + data + chunk(b"IEND", b"")


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("evil.js", "alert(1)")
    return buffer.getvalue()


def grey(width: int, height: int, *chunks: bytes) -> bytes:
    return png(width, height, *chunks, pixels=(b"\0" + b"\x80" * width) * height)


SCRIPT = b"/*<script>alert(1)</script>*/"
WHOLE = {
    **{kind: encoded(PICTURE, kind) for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "AVIF")},
    **{f"moving {kind}": moving(kind) for kind in ("GIF", "WEBP", "PNG", "TIFF")},
    "CMYK": encoded(PICTURE.convert("CMYK"), "JPEG"),
    "progressive": encoded(PICTURE, "JPEG", progressive=True, exif=Image.Exif()),
    "16 bits": encoded(DEEP, "PNG"),
    "16 bits TIFF": encoded(DEEP, "TIFF"),
    "float TIFF": encoded(Image.fromarray(NOISE[..., 0].astype(np.float32)), "TIFF"),
    "palette": encoded(PICTURE.quantize(9), "PNG", transparency=1),
    "packed TIFF": encoded(PICTURE, "TIFF", compression="tiff_lzw"),
    "JPEG and page": encoded(PICTURE, "JPEG") + SCRIPT,
    "JPEG and archive": encoded(PICTURE, "JPEG") + archive(),
    "GIF and script": moving("GIF") + SCRIPT,
    "PNG with a comment": grey(24, 24, chunk(b"tEXt", b"Comment\0" + SCRIPT)),
}
REFUSED = {
    "nothing": (b"", "not_an_image"),
    "page": (b"<!doctype html><img src=x>", "not_an_image"),
    "SVG": (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "not_an_image"),
    "SVG that asks for more": (
        b"<!DOCTYPE svg [<!ENTITY a SYSTEM 'file:///etc/passwd'>]><svg xmlns='http://www.w3.org/2000/svg'>&a;</svg>",
        "not_an_image",
    ),
    "PDF": (b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\n", "not_an_image"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "not_an_image"),
    "archive first": (archive() + encoded(PICTURE, "JPEG"), "not_an_image"),
    "program": (b"MZ\x90\x00\x03" + bytes(60) + encoded(PICTURE, "PNG"), "not_an_image"),
    "wide": (png(60_000, 60_000), "too_large"),
    "wider than C counts": (png(2**31 - 1, 2**31 - 1), "too_large"),
    "bomb": (encoded(Image.new("1", (12_000, 12_000)), "PNG"), "too_large"),
    "GIF that claims much": (b"GIF89a\xff\xff\xff\xff" + moving("GIF")[10:], "too_large"),
    "BMP that claims much": (
        encoded(PICTURE, "BMP")[:18] + struct.pack("<ii", 50_000, 50_000) + encoded(PICTURE, "BMP")[26:],
        "too_large",
    ),
    "no pixels": (png(20, 20), "truncated"),
    "no size": (png(0, 20), "not_an_image"),
    "a comment that unpacks to much": (
        grey(24, 24, chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(10**8)))),
        "unreadable",
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_a_whole_image_is_stored_as_one_whatever_its_kind_and_whatever_stands_behind_it(name: str) -> None:
    stored = store_image(WHOLE[name], SIZE)
    shown = Image.open(io.BytesIO(stored.data))
    assert (shown.format, shown.size, min(shown.size)) == ("JPEG", (stored.width, stored.height), SIZE)
    assert SCRIPT not in stored.data
    assert b"evil.js" not in stored.data
    assert decode([WHOLE[name]], [8]).reasons == [None]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_none_has_the_reason_and_costs_no_memory(name: str) -> None:
    data, reason = REFUSED[name]
    tracemalloc.start()
    try:
        with pytest.raises(UnreadableImage) as caught:
            store_image(data, SIZE)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()
    assert caught.value.reason == reason
    assert decode([data], [8]).reasons == [reason]


BOMB = """
    import pathlib, re, sys
    from blip_core.data.images import UnreadableImage, decode_image, store_image
    def peak():
        return int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
    data = pathlib.Path(sys.argv[1]).read_bytes()
    before = peak()
    for act in (decode_image, lambda data: store_image(data, 384)):
        try:
            act(data)
        except UnreadableImage as error:
            print(error.reason)
    print(peak() - before)
"""


def test_a_png_that_would_unpack_to_a_gigabyte_costs_what_its_bytes_do(tmp_path: Path) -> None:
    side = 16_000
    packed = zlib.compressobj(9)
    rows = b"".join([packed.compress(bytes((1 + 3 * side) * 100)) for _ in range(side // 100)]) + packed.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    assert 700_000 < len(data) < 800_000
    (tmp_path / "bomb.png").write_bytes(data)
    (tmp_path / "program.py").write_text(textwrap.dedent(BOMB))
    command = [sys.executable, "-W", "ignore", tmp_path / "program.py", tmp_path / "bomb.png"]
    decoded, stored, grown = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert (decoded, stored) == ("too_large", "too_large")
    assert int(grown) < 20_000_000


def test_a_million_frames_cost_the_first() -> None:
    frame = moving("GIF")
    body = frame[13 + 3 * 2 ** ((frame[10] & 7) + 1) : -1]
    assert store_image(frame[:-1] + body * 5_000 + b";", SIZE) == store_image(frame, SIZE)


def test_a_profile_or_a_text_that_is_damaged_does_not_cost_a_picture_its_orientation() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * 1000, zip=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(PICTURE, "PNG", pnginfo=info, icc_profile=bytes(100), exif=exif)
    assert decode_image(data).size == (24, 30)


DAMAGES = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.integers(0, 4000), st.integers(1, 255)),
        st.tuples(st.just("cut"), st.integers(0, 4000), st.just(0)),
        st.tuples(st.just("grow"), st.integers(0, 4000), st.integers(1, 300)),
        st.tuples(st.just("take"), st.integers(0, 4000), st.integers(1, 300)),
        st.tuples(st.just("number"), st.integers(0, 300), st.sampled_from([0, 1, 255, 65_535, 2**31 - 1, 2**32 - 1])),
    ),
    min_size=1,
    max_size=6,
)


def damaged(data: bytes, damages: list[tuple[str, int, int]]) -> bytes:
    """Bytes that were changed, cut off, put in, taken out, and numbers written over."""
    for kind, place, value in damages:
        place %= len(data) + 1
        head, tail = data[:place], data[place:]
        if kind == "flip" and tail:
            data = head + bytes([tail[0] ^ value]) + tail[1:]
        elif kind == "cut":
            data = head
        elif kind == "grow":
            data = head + bytes(value % 256 for _ in range(value)) + tail
        elif kind == "take":
            data = head + tail[value:]
        elif kind == "number":
            order = "<" if place % 2 else ">"
            data = head + struct.pack(f"{order}I", value) + tail[4:]
    return data


def check(data: bytes) -> None:
    """A picture that can be shown, or a reason; the same one twice, and decoding is of the same mind."""
    outcomes = []
    for _ in range(2):
        try:
            outcomes.append(hashlib.sha256(store_image(data, SIZE, max_pixels=10**6).data).hexdigest())
        except UnreadableImage as error:
            outcomes.append(error.reason)
    assert outcomes[0] == outcomes[1]
    if outcomes[0] not in REASONS:
        assert len(outcomes[0]) == 64
        stored = store_image(data, SIZE, max_pixels=10**6)
        with Image.open(io.BytesIO(stored.data)) as shown:
            shown.load()
            assert (shown.format, shown.size) == ("JPEG", (stored.width, stored.height))
        assert decode([stored.data], [8]).reasons == [None]
    assert decode([data], [8]).reasons[0] in {None, *REASONS}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(WHOLE)), DAMAGES)
def test_a_damaged_image_is_a_picture_or_a_reason(name: str, damages: list[tuple[str, int, int]]) -> None:
    check(damaged(WHOLE[name], damages))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([data[:12] for data in WHOLE.values()]), st.binary(max_size=400))
def test_noise_behind_the_first_bytes_of_an_image_is_a_reason(head: bytes, noise: bytes) -> None:
    check(head + noise)
