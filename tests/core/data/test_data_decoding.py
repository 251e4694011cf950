"""Decoding in processes: the pixels of evaluation, in order, whoever dies."""

import io
import multiprocessing
import os
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blip_core.data.decoding import CHUNK, Decoded, decode, decoder, default_workers
from blip_core.data.images import decode_image
from blip_core.data.transforms import eval_transform, normalise
from blip_core.errors import CapfiltError


def picture(number: int, side: int = 20, kind: str = "PNG") -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (side, side + 3, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def same(one: Decoded, other: Decoded) -> bool:
    return (
        one.reasons == other.reasons
        and one.pixels.keys() == other.pixels.keys()
        and all(torch.equal(one.pixels[size], other.pixels[size]) for size in one.pixels)
    )


BATCHES = [[picture(40 * batch + number) for number in range(1 + 7 * batch)] for batch in range(6)]


def test_pixels_are_those_of_evaluation_in_each_size_and_bad_images_have_a_reason() -> None:
    images = [picture(1), b"", picture(2)[:60], picture(3)]
    with decoder([8, 12, 8], workers=0) as made:
        found = made.begin(images).result()
    assert found.reasons == [None, "not_an_image", "truncated", None]
    assert found.pixels.keys() == {8, 12}
    for size, pixels in found.pixels.items():
        expected = [eval_transform(size)(decode_image(images[number])) for number in (0, 3)]
        assert torch.equal(normalise(pixels), torch.stack(expected))


def test_a_batch_without_a_readable_image_has_no_pixels() -> None:
    found = decode([b"", b"<html>"], [8])
    assert found.pixels[8].shape == (0, 3, 8, 8)
    assert found.reasons == ["not_an_image"] * 2


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_come_in_order_and_whole_with_any_number_of_processes(workers: int) -> None:
    with decoder([8, 12], workers) as made:
        begun = [made.begin(batch) for batch in BATCHES]
        for future, batch in zip(begun, BATCHES, strict=True):
            assert same(future.result(), decode(batch, [8, 12]))
    assert max(map(len, BATCHES)) > 2 * CHUNK
    assert multiprocessing.active_children() == []


def test_a_large_jpeg_is_decoded_at_a_fraction_for_the_largest_size_wanted() -> None:
    large = picture(5, 403, "JPEG")
    found = decode([large], [25, 50])
    for size, pixels in found.pixels.items():
        assert torch.equal(normalise(pixels[0]), eval_transform(size)(decode_image(large, size=50)))
        assert not torch.equal(normalise(pixels[0]), eval_transform(size)(decode_image(large)))


def test_what_a_killed_process_had_is_decoded_by_another() -> None:
    batches = [[picture(number, 300) for number in range(batch, batch + 40)] for batch in range(4)]
    with decoder([8], workers=2) as made:
        begun = [made.begin(batch) for batch in batches]
        first = multiprocessing.active_children()
        assert len(first) == 2
        for child in first:
            child.kill()
        for future, batch in zip(begun, batches, strict=True):
            assert same(future.result(timeout=200), decode(batch, [8]))
        assert not {child.pid for child in first} & {child.pid for child in multiprocessing.active_children()}


class Deadly(bytes):
    """An image that kills whoever receives it, as running out of memory does."""

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return os._exit, (9,)


def test_a_batch_that_kills_twice_is_an_error_of_one_line_and_the_next_one_is_decoded() -> None:
    with decoder([8], workers=1) as made:
        deadly = made.begin([picture(1), Deadly(), picture(2)])
        after = made.begin(BATCHES[2])
        with pytest.raises(CapfiltError, match=r"^3 images could not be decoded: a process") as caught:
            deadly.result(timeout=200)
        assert "\n" not in str(caught.value)
        assert same(after.result(timeout=200), decode(BATCHES[2], [8]))
        assert same(made.begin(BATCHES[1]).result(timeout=200), decode(BATCHES[1], [8]))


def test_what_nobody_waits_for_any_more_is_given_up() -> None:
    with decoder([8], workers=1) as made:
        begun = [made.begin([picture(number, 200)] * 100) for number in range(50)]
    assert multiprocessing.active_children() == []
    assert any(future.cancelled() for future in begun)


def test_without_a_number_there_is_a_process_for_every_two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, workers in ((1, 1), (2, 1), (8, 4), (96, 16)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert default_workers() == workers


SCRIPT = """
    import multiprocessing, time
    from blip_core.data.decoding import decoder
    if __name__ == "__main__":
        with decoder([8], workers=2) as made:
            made.begin([b""] * 99).result()
            print(*(child.pid for child in multiprocessing.active_children()), flush=True)
            time.sleep(600)
"""


def test_processes_end_with_a_program_that_is_killed(
    kill_program: Callable[[Path], tuple[list[int], list[int]]], tmp_path: Path
) -> None:
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(SCRIPT))
    before, after = kill_program(script)
    assert len(before) == 2
    assert after == []
