"""The gate's verdicts, on numbers whose limits are worked out by hand."""

from typing import Any

import pytest

from blip_core.evaluation.gate import METRICS, Criterion, RoundNumbers, RoundsConfig, Verdict, judge

# 5% of the recalls, of BLEU-4 and of CIDEr may be lost; no noise may be added.
RETRAINS = RoundsConfig(retrain=True)
OLD = {"r1": 0.4, "r5": 0.6, "r10": 0.8}  # their limits are 0.38, 0.57 and 0.76
SAME_FILTER = ("f11733",)


def evaluation(
    recalls: dict[str, float] | None = None,
    bleu4: float = 0.2,
    cider: float = 1.0,
    images: int = 100,
    corpus_noise: float | None = 0.1,
) -> dict[str, Any]:
    recalls = OLD if recalls is None else recalls
    scores = {"images": images, "texts": 300, "image_to_text": recalls, "text_to_image": recalls}
    return {
        "retrieval": {"retrained": scores},
        "captioning": {"retrained": {"bleu4": bleu4, "cider": cider}},
        "audit": None if corpus_noise is None else {"corpus_noise": corpus_noise},
    }


def numbers(
    round: int, evaluation: dict[str, Any], estimate: float | None = 0.05, filters: tuple[str, ...] = SAME_FILTER
) -> RoundNumbers:
    return RoundNumbers(round, evaluation, estimate, filters)


def against_round_1(candidate: dict[str, Any], config: RoundsConfig = RETRAINS) -> Verdict:
    return judge(numbers(2, candidate), numbers(1, evaluation()), config)


def row(verdict: Verdict, name: str) -> Criterion:
    return next(row for row in verdict.table if row.name == name)


def test_a_round_that_is_as_good_as_the_promoted_one_passes_by_every_criterion() -> None:
    verdict = against_round_1(evaluation())
    assert verdict.passed
    assert verdict.reasons == ["no worse than round 1 by 9 of 9 criteria"]
    assert [row.name for row in verdict.table] == [*METRICS, "noise, by the truth"]
    assert len(METRICS) == 8


@pytest.mark.parametrize(
    ("name", "candidate", "limit"),
    [
        ("image to text R@1", evaluation({**OLD, "r1": 0.3799}), 0.38),
        ("text to image R@5", evaluation({**OLD, "r5": 0.5699}), 0.57),
        ("text to image R@10", evaluation({**OLD, "r10": 0.7599}), 0.76),
        ("BLEU-4", evaluation(bleu4=0.1899), 0.19),
        ("CIDEr", evaluation(cider=0.9499), 0.95),
        ("noise, by the truth", evaluation(corpus_noise=0.1001), 0.1),
    ],
)
def test_one_number_beyond_its_limit_fails_the_round_and_is_named(
    name: str, candidate: dict[str, Any], limit: float
) -> None:
    verdict = against_round_1(candidate)
    assert not verdict.passed
    assert row(verdict, name).limit == pytest.approx(limit)
    assert row(verdict, name).passed is False
    assert any(reason.startswith(f"{name}: ") for reason in verdict.reasons)
    assert len(verdict.reasons) == sum(row.passed is False for row in verdict.table)


def test_a_number_exactly_at_its_limit_passes() -> None:
    at_limits = evaluation({"r1": 0.38, "r5": 0.57, "r10": 0.76}, bleu4=0.19, cider=0.95, corpus_noise=0.1)
    assert against_round_1(at_limits).passed


def test_tolerances_are_relative_for_metrics_and_absolute_for_noise() -> None:
    generous = RoundsConfig(retrain=True, tolerance=0.5, noise_tolerance=0.03)
    half = evaluation({"r1": 0.2, "r5": 0.3, "r10": 0.4}, bleu4=0.1, cider=0.5, corpus_noise=0.13)
    assert against_round_1(half, generous).passed
    assert not against_round_1(evaluation(corpus_noise=0.1301), generous).passed
    assert not against_round_1(evaluation(bleu4=0.0999), generous).passed


def test_the_reason_says_the_number_its_limit_and_where_that_comes_from() -> None:
    verdict = against_round_1(evaluation(cider=0.5))
    assert verdict.reasons == ["CIDEr: 0.5 is below 0.95, round 1's 1 less 0.05 of it"]
    verdict = against_round_1(evaluation(corpus_noise=0.25))
    assert verdict.reasons == ["noise, by the truth: 0.25 is above 0.1, round 1's 0.1"]


def test_without_a_promoted_round_the_candidate_passes() -> None:
    verdict = judge(numbers(1, evaluation()), None, RETRAINS)
    assert verdict.passed
    assert verdict.reasons == ["no round is promoted yet"]
    assert row(verdict, "CIDEr") == Criterion("CIDEr", 1.0, None, None, None, "no round is promoted yet")


def test_where_no_retraining_is_asked_for_the_noise_alone_decides() -> None:
    worse_model = evaluation({"r1": 0.0, "r5": 0.0, "r10": 0.0}, bleu4=0.0, cider=0.0)
    verdict = against_round_1(worse_model, RoundsConfig())
    assert verdict.passed
    assert [row.name for row in verdict.table] == ["noise, by the truth"]
    assert not against_round_1(evaluation(corpus_noise=0.2), RoundsConfig()).passed


def test_a_candidate_that_lacks_what_the_promoted_round_has_fails() -> None:
    lacking = evaluation()
    lacking["captioning"] = {}
    verdict = against_round_1(lacking)
    assert not verdict.passed
    assert verdict.reasons == ["BLEU-4: is missing, and round 1 has it", "CIDEr: is missing, and round 1 has it"]


def test_what_the_promoted_round_lacks_is_not_judged() -> None:
    verdict = judge(numbers(2, evaluation()), numbers(1, {"audit": {"corpus_noise": 0.2}}), RETRAINS)
    assert verdict.passed
    assert verdict.reasons == ["no worse than round 1 by 1 of 9 criteria"]
    assert row(verdict, "CIDEr").passed is None
    assert row(verdict, "CIDEr").note == "round 1 has no such number"


def test_scores_on_other_held_out_pairs_are_not_taken_for_better_ones() -> None:
    better = evaluation({"r1": 1.0, "r5": 1.0, "r10": 1.0}, bleu4=1.0, cider=9.0, images=10)
    verdict = against_round_1(better)
    assert not verdict.passed
    assert verdict.reasons[0].endswith(
        "was measured on 10 images and 300 texts, and that of round 1 on 100 images and 300 texts"
    )


def test_a_number_that_is_no_number_fails() -> None:
    assert not against_round_1(evaluation(cider=float("nan"))).passed
    assert not against_round_1(evaluation(corpus_noise=float("nan"))).passed


class TestEstimatedNoise:
    """The Filter's own estimate, where the truth is not known of both rounds."""

    @staticmethod
    def judge(new: float | None, old: float | None, filters: tuple[str, ...] = SAME_FILTER) -> Verdict:
        candidate = numbers(2, evaluation(corpus_noise=None), new, filters)
        return judge(candidate, numbers(1, evaluation(corpus_noise=0.5), old), RoundsConfig())

    def test_stands_in_for_the_truth_where_one_round_has_none(self) -> None:
        assert self.judge(0.05, 0.05).passed
        verdict = self.judge(0.06, 0.05)
        assert verdict.reasons == ["noise, as the Filter estimates it: 0.06 is above 0.05, round 1's 0.05"]

    def test_of_another_filter_is_compared_with_nothing_and_such_a_round_is_not_promoted_by_itself(self) -> None:
        verdict = self.judge(0.01, 0.05, ("another",))
        assert not verdict.passed
        assert [row.passed for row in verdict.table] == [None]
        assert verdict.reasons == [
            "nothing could be compared with round 1 (was estimated by another Filter than that of round 1: the two "
            "cannot be compared)"
        ]

    def test_of_another_filter_does_not_hold_up_a_round_whose_metrics_are_judged(self) -> None:
        candidate = numbers(2, evaluation(corpus_noise=None), 0.2, ("another",))
        verdict = judge(candidate, numbers(1, evaluation(corpus_noise=None), 0.05), RETRAINS)
        assert verdict.passed
        assert verdict.reasons == ["no worse than round 1 by 8 of 9 criteria"]

    def test_is_missing_where_the_candidate_kept_nothing(self) -> None:
        verdict = self.judge(None, 0.05)
        assert not verdict.passed
        assert "no web or synthetic text was kept" in verdict.reasons[0]
