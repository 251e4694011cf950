"""How far a step is: images counted over shards, their speed, the time that is left; seldom in logs."""

import logging

import pytest

from tasks import progress
from tasks.progress import LogDisplay, Meter


class Clock:
    """A clock that is set by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_speed_and_time_left_are_those_of_the_images_done_in_this_run(clock: Clock) -> None:
    meter = Meter(total=1000, standing=400, clock=clock)
    assert (meter.done, meter.note()) == (400, "")
    clock.now += 10
    meter.at("a", 30)
    meter.at("b", 20)
    assert (meter.done, meter.note()) == (450, "5 images/s, 1 min 50 s left")
    clock.now += 10
    meter.at("a", 230)
    assert meter.done == 650
    assert meter.note() == "12.5 images/s, 28 s left"


def test_speed_is_that_of_the_last_minute(clock: Clock) -> None:
    meter = Meter(total=100_000, clock=clock)
    for second in range(1, 301):  # a slow beginning, as of models that load and compile
        clock.now += 1
        meter.at("a", second if second <= 200 else 200 + 10 * (second - 200))
    assert meter.note() == "10 images/s, 2 h 44 min left"


def test_what_failed_is_taken_off_and_counted_until_it_is_done_after_all(clock: Clock) -> None:
    meter = Meter(total=100, clock=clock)
    clock.now += 10
    meter.at("a", 50)
    meter.fail("b")
    meter.fail("a")
    assert (meter.done, meter.note()) == (0, "5 images/s, 10 s left, 2 failed")
    meter.at("a", 100)
    assert meter.done == 100
    assert meter.note() == "10 images/s, 1 failed"


def test_shards_have_neither_speed_nor_time_left(clock: Clock) -> None:
    meter = Meter(total=4, unit="shards", clock=clock)
    clock.now += 1
    meter.at("a", 1)
    assert (meter.done, meter.note()) == (1, "")


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What LogDisplay writes, without a run."""
    logger = logging.getLogger("test-progress")
    monkeypatch.setattr(progress, "get_run_logger", lambda: logger)
    lines: list[str] = []
    monkeypatch.setattr(logger, "info", lambda text, *values: lines.append(text % values))
    return lines


def test_a_log_gets_the_first_line_the_last_and_one_in_ten_seconds(
    logged: list[str], monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.setattr(progress.time, "monotonic", clock)
    display = LogDisplay()
    for done in range(101):
        display.show("annotate", done, 100, "3 images/s")
        clock.now += 0.25
    done = [int(line.split()[1]) for line in logged]
    assert done == [0, 40, 80, 100]
    assert logged[0] == "annotate: 0 of 100 (3 images/s)"


def test_what_was_begun_in_another_process_is_not_shown_here(logged: list[str]) -> None:
    progress.at("a step that was not begun", "a", 3)
    assert logged == []
