"""The evaluation of a checkpoint, against scoring every pair one at a time."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from blip_core.data.images import decode_image
from blip_core.data.tables import PairTable, iterate_pairs
from blip_core.data.transforms import eval_transform
from blip_core.errors import CheckpointError, InputError
from blip_core.evaluation.captioning import caption_scores
from blip_core.evaluation.heldout import best_of_each, evaluate_checkpoint, rerank_scores
from blip_core.evaluation.protocol import EvaluationConfig
from blip_core.med.architecture import MEDConfig
from blip_core.med.checkpoint import load_med, save_med
from blip_core.med.decoding import GenerationConfig
from blip_core.med.generation import generate
from blip_core.med.med import build_med
from blip_core.med.tokenizer import Tokenizer

IMAGES = 14


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> PairTable:
    rng = torch.Generator().manual_seed(0)
    rows = []
    for number in range(IMAGES):
        pixels = torch.randint(256, (4, 4, 3), generator=rng, dtype=torch.uint8).numpy()
        file = io.BytesIO()
        Image.fromarray(pixels).resize((40, 40)).save(file, "PNG")
        captions = [f"picture {number} of many", f"a thing that is {'red' * (number % 3)} blue {number * 7}"]
        rows.append({"uid": f"u{number}", "image": file.getvalue(), "caption": captions[: 1 + number % 2]})
    path = tmp_path_factory.mktemp("held") / "held_out.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return PairTable(str(path), uid="uid")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, held_out: PairTable) -> Path:
    torch.manual_seed(1)
    texts = [text for pair in iterate_pairs(held_out) for text in pair.captions]
    tokenizer = Tokenizer.train(texts, 200, max_tokens=35)
    sizes = {"image_size": 32, "patch_size": 16, "image_width": 32, "image_depth": 1, "image_heads": 2}
    sizes |= {"text_width": 32, "text_depth": 1, "text_heads": 2, "projection": 16}
    architecture = MEDConfig(preset="tiny", **sizes).architecture()
    med = build_med(architecture, len(tokenizer), tokenizer.encode_id, tokenizer.decode_id)
    with torch.no_grad():
        for parameter in med.parameters():  # large weights: the scores of an untrained model would be nearly equal
            if parameter.dim() > 1:
                parameter.mul_(3)
    folder = tmp_path_factory.mktemp("checkpoint") / "med"
    save_med(folder, med, architecture, tokenizer, {})
    return folder


@torch.inference_mode()
def scores_one_at_a_time(folder: Path, held_out: PairTable) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """ITC cosine and ITM logit of every image with every text, each pair alone; and the texts' images."""
    loaded = load_med(folder)
    pairs = list(iterate_pairs(held_out))
    view = eval_transform(loaded.med.image_size)
    texts = [(owner, text) for owner, pair in enumerate(pairs) for text in pair.captions]
    itc, itm = torch.zeros(len(pairs), len(texts)), torch.zeros(len(pairs), len(texts))
    for i, pair in enumerate(pairs):
        features = loaded.med.encode_image(view(decode_image(pair.image))[None])
        for t, (_, text) in enumerate(texts):
            ids, mask = loaded.tokenizer([text])
            itc[i, t] = loaded.med.project_image(features)[0] @ loaded.med.embed_text(ids, mask)[0]
            itm[i, t] = loaded.med.match(loaded.med.cross_keys(features), ids, mask)[0, 1]
    return itc, itm, [owner for owner, _ in texts]


def slow_recalls(itc: torch.Tensor, itm: torch.Tensor, owners: list[int], rerank: int, k: int) -> tuple[float, float]:
    """BLIP's evaluation as loops: the k best by ITC are ordered anew, all others stand behind in ITC's order."""
    images, texts = itc.shape
    from_images = []
    for i in range(images):
        ranked = sorted(range(texts), key=lambda t: -itc[i, t])
        order = sorted(ranked[:rerank], key=lambda t: -(itm[i, t] + itc[i, t])) + ranked[rerank:]
        from_images.append(any(owners[t] == i for t in order[:k]))
    from_texts = []
    for t in range(texts):
        ranked = sorted(range(images), key=lambda i: -itc[i, t])
        order = sorted(ranked[:rerank], key=lambda i: -(itm[i, t] + itc[i, t])) + ranked[rerank:]
        from_texts.append(owners[t] in order[:k])
    return sum(from_images) / images, sum(from_texts) / texts


@pytest.mark.parametrize("rerank", [3, 5, 100])
def test_retrieval_is_that_of_scoring_every_pair_alone(checkpoint: Path, held_out: PairTable, rerank: int) -> None:
    itc, itm, owners = scores_one_at_a_time(checkpoint, held_out)
    found = evaluate_checkpoint(checkpoint, held_out, EvaluationConfig(rerank=rerank, batch_size=3))["retrieval"]
    assert (found["images"], found["texts"]) == (IMAGES, len(owners))
    for k in (1, 5):
        from_images, from_texts = slow_recalls(itc, itm, owners, rerank, k)
        assert found["image_to_text"][f"r{k}"] == pytest.approx(from_images)
        assert found["text_to_image"][f"r{k}"] == pytest.approx(from_texts)


def official_recalls(itc: np.ndarray, itm: np.ndarray, owners: list[int], k_test: int) -> dict[str, dict[str, float]]:
    """The official evaluation: -100 for what is not among the k_test best by ITC (train_retrieval.py, `itm_eval`)."""

    def ranked(sims: np.ndarray, logits: np.ndarray) -> np.ndarray:
        scores = np.full(sims.shape, -100.0)
        best = np.argsort(sims)[::-1][:k_test]
        scores[best] = logits[best] + sims[best]
        return np.argsort(scores)[::-1]

    images, texts = itc.shape
    text_ranks = [
        min(int(np.where(ranked(itc[i], itm[i]) == t)[0][0]) for t in range(texts) if owners[t] == i)
        for i in range(images)
    ]
    image_ranks = [int(np.where(ranked(itc[:, t], itm[:, t]) == owners[t])[0][0]) for t in range(texts)]
    return {
        way: {f"r{k}": float(np.mean(np.array(ranks) < k)) for k in (1, 5, 10)}
        for way, ranks in (("image_to_text", text_ranks), ("text_to_image", image_ranks))
    }


@pytest.mark.parametrize("k_test", [10, 12])
def test_recalls_are_those_of_the_official_score_matrix(checkpoint: Path, held_out: PairTable, k_test: int) -> None:
    itc, itm, owners = scores_one_at_a_time(checkpoint, held_out)
    found = evaluate_checkpoint(checkpoint, held_out, EvaluationConfig(rerank=k_test))["retrieval"]
    for way, recalls in official_recalls(itc.numpy(), itm.numpy(), owners, k_test).items():
        assert found[way] == pytest.approx(recalls)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"max_length": 8, "min_length": 2},  # the default
        {"max_length": 9, "min_length": 4, "repetition_penalty": 1.3, "prompt": "a thing that"},
    ],
    ids=["plain", "prompt and penalty"],
)
def test_captions_and_examples_are_what_the_decoder_gives_for_each_image_alone(
    checkpoint: Path, held_out: PairTable, beams: int, settings: dict[str, Any]
) -> None:
    assert EvaluationConfig().min_length == 2
    config = EvaluationConfig(beam_size=beams, batch_size=5, examples=4, **settings)
    found = evaluate_checkpoint(checkpoint, held_out, config)
    loaded = load_med(checkpoint)
    view = eval_transform(loaded.med.image_size)
    generation = GenerationConfig(method="beam" if beams > 1 else "greedy", beams=beams, **settings)
    pairs = list(iterate_pairs(held_out))
    with torch.inference_mode():
        features = [loaded.med.encode_image(view(decode_image(pair.image))[None]) for pair in pairs]
        texts = [generate(loaded.med, loaded.tokenizer, loaded.med.cross_keys(alone), generation) for alone in features]
    texts = [text for [(text, _)] in texts]
    assert [example["text"] for example in found["examples"]] == texts[:4]
    assert [example["uid"] for example in found["examples"]] == ["u0", "u1", "u2", "u3"]
    assert found["examples"][1]["references"] == pairs[1].captions
    assert found["examples"][0]["image"].startswith("data:image/jpeg;base64,")
    assert found["captioning"] == pytest.approx(caption_scores(texts, [pair.captions for pair in pairs]))


def test_max_images_takes_the_first_of_the_table(checkpoint: Path, held_out: PairTable) -> None:
    found = evaluate_checkpoint(checkpoint, held_out, EvaluationConfig(max_images=3))
    assert (found["retrieval"]["images"], found["retrieval"]["texts"]) == (3, 4)


def test_rerank_keeps_the_cosine_in_the_score_and_puts_the_rest_behind() -> None:
    similarities = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.8, 0.3]])
    logits = torch.tensor([[1.0, 7.0, 3.0], [2.0, 0.5, 4.0]])
    of_images = best_of_each(similarities, 2, dim=1)
    assert of_images.tolist() == [[True, False, True], [False, True, True]]
    assert best_of_each(similarities, 1, dim=0).tolist() == [[True, False, True], [False, True, False]]
    expected = torch.tensor([[1.9, -99.9, 3.5], [-99.8, 1.3, 4.3]])
    assert torch.allclose(rerank_scores(similarities, logits, of_images), expected)


def test_one_image_cannot_be_ranked(checkpoint: Path, held_out: PairTable, tmp_path: Path) -> None:
    pq.write_table(pq.read_table(held_out.path).slice(0, 1), tmp_path / "one.parquet")
    with pytest.raises(InputError, match=r"one\.parquet.*at least 2"):
        evaluate_checkpoint(checkpoint, PairTable(str(tmp_path / "one.parquet")), EvaluationConfig())


def test_missing_checkpoint_is_named(held_out: PairTable, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        evaluate_checkpoint(tmp_path / "nowhere", held_out, EvaluationConfig())
