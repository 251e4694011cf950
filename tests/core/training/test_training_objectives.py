"""One step of each training: which losses, what is computed once, and what a gradient reaches."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from blip_core.data.pairs import PairSource, iterate_texts
from blip_core.data.stream import PairBatch, PairStream
from blip_core.data.transforms import eval_transform
from blip_core.med.architecture import MEDConfig
from blip_core.med.itm import draw_hard_negatives
from blip_core.med.lm import lm_loss
from blip_core.med.med import MED, build_med
from blip_core.med.tokenizer import Tokenizer
from blip_core.training.objectives import (
    Batch,
    Captioning,
    ContrastiveMatching,
    Objective,
    Pretraining,
    Step,
    ramped_alpha,
)
from blip_core.training.recipe import TrainConfig
from blip_core.training.schedule import learning_rate

CPU = torch.device("cpu")
CONFIG = TrainConfig(steps=10, batch_size=6, queue_size=10, momentum=0.9, alpha=0.4)


@pytest.fixture
def tokenizer(sources: list[PairSource]) -> Tokenizer:
    return Tokenizer.train(iterate_texts(sources), 100, 12)


@pytest.fixture
def plain(sizes: MEDConfig) -> MEDConfig:
    return replace(sizes, dropout=0.0, drop_path=0.0)


@pytest.fixture
def med(plain: MEDConfig, tokenizer: Tokenizer) -> MED:
    torch.manual_seed(0)
    return build_med(plain.architecture(), len(tokenizer), tokenizer.encode_id, tokenizer.decode_id)


@pytest.fixture
def pretraining(med: MED, plain: MEDConfig, tokenizer: Tokenizer) -> Pretraining:
    return Pretraining(med, plain.architecture(), tokenizer, CONFIG)


@pytest.fixture
def pairs(sources: list[PairSource]) -> PairBatch:
    return next(PairStream(sources, 6, eval_transform(16), seed=0).batches())


@pytest.fixture
def batch(pretraining: Pretraining, pairs: PairBatch) -> Batch:
    return pretraining.tokenize(pairs, CPU)


def at(number: int, batch: Batch) -> Step:
    """A step whose draws follow from its number."""
    return Step(number, number, batch.mask[:, 1:].sum().float())


def losses_of(objective: Objective, batch: Batch, number: int = 0) -> dict[str, Tensor]:
    objective.begin_step()
    return objective(batch, at(number, batch))


def _reached(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.grad is not None}


def test_an_image_is_encoded_once_in_a_step(pretraining: Pretraining, batch: Batch) -> None:
    encoded = []
    pretraining.med.image_encoder.register_forward_hook(lambda *call: encoded.append(len(call[1][0])))
    losses = losses_of(pretraining, batch)
    assert encoded == [6]
    assert list(losses) == ["itc", "itm", "lm"]
    assert all(loss.ndim == 0 and torch.isfinite(loss) for loss in losses.values())


def test_pretraining_reaches_every_parameter_of_med_and_none_of_the_momentum_encoders(
    pretraining: Pretraining, batch: Batch
) -> None:
    sum(losses_of(pretraining, batch).values()).backward()
    assert _reached(pretraining) == {f"med.{name}" for name, _ in pretraining.med.named_parameters()}


def test_the_losses_are_the_objectives_of_the_batch(pretraining: Pretraining, batch: Batch) -> None:
    med, config = pretraining.med, pretraining.config
    keys = pretraining.queue.images.clone(), pretraining.queue.texts.clone()
    losses = losses_of(pretraining, batch, 3)
    ids, mask = batch.ids, batch.mask
    features = med.encode_image(batch.images)
    grounded = med.cross_keys(features)
    assert losses["lm"].item() == pytest.approx(lm_loss(med.decode(grounded, ids, mask), ids, mask).item(), rel=1e-5)
    image, text = med.project_image(features), med.embed_text(ids, mask)
    # nothing has been learnt yet, so the momentum embeddings are the embeddings themselves
    same = batch.image_ids[:, None] == batch.image_ids[None, :]
    hard = torch.cat([same, torch.zeros(6, 10).bool()], dim=1).float()
    hard = hard / hard.sum(dim=1, keepdim=True)
    expected = 0.0
    for queries, others, queued in ((image, text, keys[1]), (text, image, keys[0])):
        log_p = (queries @ torch.cat([others, queued]).T / 0.07).log_softmax(dim=1)
        target = config.alpha * log_p.exp().detach() + (1 - config.alpha) * hard
        expected -= (target * log_p).sum(dim=1).mean().item() / 2
    assert losses["itc"].item() == pytest.approx(expected, rel=1e-4)
    uniforms = torch.rand(2, 6, generator=torch.Generator().manual_seed(3))
    negatives = draw_hard_negatives(image @ text.T, text @ image.T, same, med.temperature, uniforms)
    right = med.match(grounded, ids, mask).log_softmax(dim=1)[:, 1]
    wrong_image = med.match(med.cross_keys(features[negatives.images]), ids, mask).log_softmax(dim=1)[:, 0]
    wrong_text = med.match(grounded, ids[negatives.texts], mask[negatives.texts]).log_softmax(dim=1)[:, 0]
    assert losses["itm"].item() == pytest.approx(-torch.cat([right, wrong_image, wrong_text]).mean().item(), rel=1e-4)


def test_a_step_pushes_the_batch_into_the_queue_and_moves_the_momentum_encoders(
    pretraining: Pretraining, batch: Batch
) -> None:
    start = pretraining.momentum.text_projection.bias.clone()
    with torch.no_grad():
        pretraining.med.text_projection.bias += 1.0
    losses_of(pretraining, batch)
    assert torch.allclose(pretraining.momentum.text_projection.bias, start + 0.1, atol=1e-6)
    assert pretraining.queue.image_ids.tolist() == [*batch.image_ids.tolist(), -1, -1, -1, -1]
    losses_of(pretraining, batch, 1)
    ids = batch.image_ids.tolist()
    assert pretraining.queue.image_ids.tolist() == [*ids[4:], *ids[2:6], *ids[:4]]


def test_the_temperature_stays_in_its_range(pretraining: Pretraining, batch: Batch) -> None:
    for wrong, allowed in ((-1.0, 0.001), (3.0, 0.5)):
        with torch.no_grad():
            pretraining.med.temperature.fill_(wrong)
        assert torch.isfinite(losses_of(pretraining, batch)["itc"])
        assert pretraining.med.temperature.item() == pytest.approx(allowed)


def test_the_captioner_learns_lm_and_the_filter_itc_and_itm(
    med: MED, plain: MEDConfig, tokenizer: Tokenizer, batch: Batch
) -> None:
    captioning = Captioning(med, tokenizer, CONFIG)
    losses = losses_of(captioning, batch)
    assert list(losses) == ["lm"]
    losses["lm"].backward()
    names = {name for name, _ in med.named_parameters()}
    apart = {name for name in names if "self_attention.encoder" in name or name.endswith("temperature")}
    apart |= {name for name in names if name.startswith(("image_projection", "text_projection", "itm_head"))}
    assert _reached(med) == names - apart
    med.zero_grad(set_to_none=True)
    matching = ContrastiveMatching(med, plain.architecture(), tokenizer, CONFIG)
    losses = losses_of(matching, batch)
    assert list(losses) == ["itc", "itm"]
    sum(losses.values()).backward()
    assert _reached(med) == {name for name in names if "self_attention.decoder" not in name and ".head_" not in name}


def test_the_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    config = TrainConfig(steps=14, warmup_steps=4, learning_rate=0.8, final_learning_rate=0.2)
    assert [learning_rate(step, config) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    # 0.2 + 0.6 * (1 + cos(pi * share)) / 2 at shares 0, 1/5, 1/2 and 9/10
    expected = [0.8, 0.7427051, 0.5, 0.2146830]
    assert [learning_rate(step, config) for step in (4, 6, 9, 13)] == pytest.approx(expected)
    assert learning_rate(14, config) == pytest.approx(0.2)
    constant = TrainConfig(steps=2, warmup_steps=5, learning_rate=0.5)
    assert [learning_rate(step, constant) for step in (0, 1)] == pytest.approx([0.1, 0.2])
    assert learning_rate(0, TrainConfig(steps=5, warmup_steps=0, learning_rate=0.5)) == 0.5


def test_the_soft_targets_weight_rises_over_its_ramp() -> None:
    config = TrainConfig(alpha=0.4, alpha_ramp_steps=8)
    assert [ramped_alpha(step, config) for step in (0, 2, 8, 100)] == pytest.approx([0.0, 0.1, 0.4, 0.4])
    assert ramped_alpha(0, TrainConfig(alpha=0.4, alpha_ramp_steps=0)) == 0.4


def test_itm_learns_to_tell_the_pairs_of_a_batch_apart(pretraining: Pretraining, sources: list[PairSource]) -> None:
    torch.manual_seed(0)
    batch = pretraining.tokenize(next(PairStream(sources, 3, eval_transform(16), seed=2).batches()), CPU)
    assert len(set(batch.image_ids.tolist())) == 3
    optimizer = torch.optim.Adam(pretraining.med.parameters(), lr=3e-3)
    curve = []
    for step in range(150):
        loss = losses_of(pretraining, batch, step)["itm"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    # 0.6365 is what the share of matches alone would give
    assert sum(curve[-9:]) / 9 < 0.45
