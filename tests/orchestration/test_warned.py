"""Warnings in a run's log: each kind once when it first comes, and at the step's end how often it came."""

import logging
import threading
import warnings
from collections.abc import Callable

import pytest
from prefect import flow

from tasks import warned
from tasks.warned import counted_warnings

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[Callable[[], None]], list[str]]:
    """The lines of the run's log that warn, of a step that does this."""

    def tell(work: Callable[[], None]) -> list[str]:
        @flow
        def run() -> None:
            with counted_warnings("annotate"):
                work()

        caplog.clear()
        run()
        return [r.getMessage() for r in caplog.records if r.name.startswith("prefect.") and r.levelname == "WARNING"]

    return tell


Told = Callable[[Callable[[], None]], list[str]]


def test_a_warning_is_told_once_and_counted(told: Told) -> None:
    def work() -> None:
        for number in range(37):
            warnings.warn(f"picture {number}: corrupt EXIF data", UserWarning, stacklevel=1)

    assert told(work) == [
        "annotate: UserWarning: picture 0: corrupt EXIF data",
        "annotate: 37 times in all: UserWarning: picture 0: corrupt EXIF data",
    ]


@pytest.mark.parametrize("name", ["some.library", "transformers.models.blip", "blip_core.capfilt.candidates"])
def test_what_a_library_logs_as_a_warning_is_counted_too(name: str, told: Told) -> None:
    def work() -> None:
        logger = logging.getLogger(name)
        for count in (128, 64, 32):
            logger.warning("out of memory with %d\nimages", count)
        logger.info("not this")

    assert told(work) == [
        f"annotate: {name}: out of memory with 128 images",
        f"annotate: 3 times in all: {name}: out of memory with 128 images",
    ]


def test_warnings_of_threads_without_a_run_come_to_the_steps_log(told: Told) -> None:
    def work() -> None:
        thread = threading.Thread(target=lambda: warnings.warn("from afar", UserWarning, stacklevel=1))
        thread.start()
        thread.join()

    assert told(work) == ["annotate: UserWarning: from afar"]


def test_what_is_ignored_stays_ignored(told: Told) -> None:
    def work() -> None:
        warnings.filterwarnings("ignore", "deliberate")
        warnings.warn("deliberate", UserWarning, stacklevel=1)

    assert told(work) == []


def test_a_flood_of_different_warnings_is_cut_and_counted(told: Told) -> None:
    def work() -> None:
        for number in range(warned.KINDS + 5):
            letters = "abcdefghijklmnopqrstuvwxyz"[number]
            for _ in range(2 if number >= warned.KINDS else 1):
                warnings.warn(letters, UserWarning, stacklevel=1)

    lines = told(work)
    assert len(lines) == warned.KINDS + 1
    assert lines[-1] == "annotate: 10 more warnings of 5 other kinds"


def test_a_step_that_fails_sums_up_as_well_and_leaves_python_as_it_was(
    told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    def work() -> None:
        for _ in range(2):
            warnings.warn("once more", UserWarning, stacklevel=1)
        raise ValueError("the step failed")

    before = warnings.showwarning, list(logging.getLogger().handlers)
    with pytest.raises(ValueError, match="the step failed"):
        told(work)
    assert "annotate: 2 times in all: UserWarning: once more" in caplog.messages
    assert (warnings.showwarning, list(logging.getLogger().handlers)) == before
