"""What a training says when ITM has not started, and that the constant it looks for is the right one."""

import math
import warnings

import pytest

from blip_core.training.metrics import ITM_PRIOR, ITMStuckWarning, ITMWatch


def test_the_prior_is_the_loss_of_the_best_constant_answer() -> None:
    # one match to two negatives: the best constant says 'match' with probability 1/3
    losses = [-(math.log(share) + 2 * math.log(1 - share)) / 3 for share in (0.3, 1 / 3, 0.4)]
    assert min(losses) == losses[1]
    assert losses[1] == pytest.approx(ITM_PRIOR, abs=1e-4)


def test_itm_that_stays_at_the_prior_after_the_warm_up_is_told_once() -> None:
    watch = ITMWatch(warmup_steps=5, patience=8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, 13):
            watch.see(step, 0.6365 + 0.004 * (-1) ** step)
        assert [warning.category for warning in caught] == [ITMStuckWarning]
        assert "0.6365 is what a constant answer gets" in str(caught[0].message)
        assert "for 8 steps, until step 12" in str(caught[0].message)
        for step in range(13, 60):
            watch.see(step, 0.6365)
        assert len(caught) == 1


@pytest.mark.parametrize(
    "curve",
    [
        [0.6365] * 7,  # not long enough
        [0.6365] * 6 + [0.60] * 40,  # it started
        [0.70 - 0.002 * step for step in range(60)],  # it passes through
        [0.58, 0.693] * 30,  # the mean is there, the loss is not: a batch's luck does not swing so far
        [None] * 60,  # it is not trained
    ],
)
def test_any_other_itm_is_not(curve: list[float | None]) -> None:
    watch = ITMWatch(warmup_steps=0, patience=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step, loss in enumerate(curve, start=1):
            watch.see(step, loss)
