"""The card of a checkpoint is read by the hub's library, says what is on record, and never takes a person's place."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from blip_core.corpus.schemas import ANNOTATION_SCHEMA, ANNOTATION_VERSION, write_part
from blip_core.evaluation.model_card import facts_of, model_card, write_model_card, write_round_cards
from blip_core.files import write_json
from blip_core.med.description import read_checkpoint_config
from blip_core.workspace import Workspace

SIZES = {"image_size": 224, "patch_size": 16, "image_width": 768, "image_depth": 12, "image_heads": 12}
SIZES |= {"text_width": 768, "text_depth": 11, "text_heads": 12, "projection": 256, "drop_path": 0.0, "dropout": 0.1}


def checkpoint(folder: Path, digest: str, faces: tuple[str, ...] = ("encoder", "decoder"), **more: Any) -> Path:
    """config.json and a file in the weights' place, which no card needs."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    write_json(folder / "config.json", {"med": SIZES, "faces": faces, "vocabulary": 30524, "digest": digest, **more})
    return folder


def trained(steps: int, start: Any) -> dict[str, Any]:
    train = {"batch_size": 64, "learning_rate": 3e-4, "prompt": "a picture of ", "save_every": 17}
    return {"steps": steps, "seed": 3, "data": "da7ada7a", "train": train, "start": start, "undecodable": 2}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Round 1 with four checkpoints, an evaluation, an audit by hand, and annotations of its Captioner and Filter."""
    made = Workspace.open(tmp_path / "workspace")
    round_1 = made.round(1)
    checkpoint(round_1.med, "3ed", **trained(500, ["vit_base_patch16_224.augreg_in21k", "bert-base-uncased"]))
    checkpoint(round_1.captioner, "ca9", ("decoder",), **trained(50, "3ed"))
    checkpoint(round_1.filter, "f11", ("encoder",), **trained(50, "3ed"))
    checkpoint(round_1.retrained, "4e4", **trained(500, [None, None]))
    recall = {"text_to_image": {"r1": 0.25, "r5": 0.5, "r10": 0.75}, "image_to_text": {"r1": 0.3}}
    audit = {"filter_auc": 0.97, "filter_auc_interval": [0.96, 0.98], "filter_precision": 0.9, "synthetic_noise": 0.2}
    evaluation = {"retrieval": {"retrained": recall}, "captioning": {"retrained": {"bleu4": 0.4, "cider": 1.23456}}}
    write_json(round_1.evaluation, evaluation | {"audit": audit})
    by_hand = {"filter_precision": {"value": 0.91, "low": 0.88, "high": 0.93}, "filter_recall": None}
    write_json(round_1.audit, {"estimates": {"all": by_hand, "synthetic": {"candidate_noise": None}}})
    annotate(made, "ca9", "f11")
    return made


def annotate(workspace: Workspace, captioner: str, filter: str) -> None:
    part = workspace.round(1).annotations / "aaaa.parquet"
    models = {"capfilt.captioner": captioner, "capfilt.filter": filter}
    write_part(part, ANNOTATION_SCHEMA.empty_table(), ANNOTATION_VERSION, "0", models)


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def cells(text: str, first: str) -> list[list[str]]:
    """The rows of tables that begin with `first`."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def results(card: ModelCard) -> dict[tuple[str, str, str], float]:
    """Value by task, metric and what it was measured on."""
    return {
        (result.task_type, result.metric_type, result.dataset_name): result.metric_value
        for result in card.data.eval_results or []
    }


def test_every_checkpoint_of_a_round_has_a_card_that_the_hub_reads(workspace: Workspace) -> None:
    made = workspace.round(1)
    assert write_round_cards(workspace, 1) == [
        folder / "README.md" for folder in (made.med, made.captioner, made.filter, made.retrained)
    ]
    tags = {"captioner": ["image-captioning"], "filter": ["image-text-matching"]}
    both = ["image-text-matching", "image-captioning"]
    for folder in (made.med, made.captioner, made.filter, made.retrained):
        data = card_of(folder).data
        assert (data.library_name, data.license, data.license_name) == ("capfilt", "other", "unknown")
        assert data.pipeline_tag == ("other" if folder.name == "filter" else "image-to-text")
        assert data.tags == ["capfilt", "blip", *tags.get(folder.name, both), "arxiv:2201.12086"]
        card_of(folder).validate  # noqa: B018


def test_what_was_measured_stands_in_the_front_matter_and_in_the_table(workspace: Workspace) -> None:
    write_round_cards(workspace, 1)
    held_out, truth, by_hand = "held-out human pairs", "web texts, by the known truth", "texts marked by hand"
    retrained = card_of(workspace.round(1).retrained)
    assert retrained.data.model_name == "MED of round 1"
    assert results(retrained) == {
        ("text-to-image-retrieval", "recall_at_1", held_out): 0.25,
        ("text-to-image-retrieval", "recall_at_5", held_out): 0.5,
        ("text-to-image-retrieval", "recall_at_10", held_out): 0.75,
        ("image-to-text-retrieval", "recall_at_1", held_out): 0.3,
        ("image-to-text", "bleu", held_out): 0.4,
        ("image-to-text", "cider", held_out): 1.2346,
    }
    assert cells(retrained.text, "CIDEr") == [["CIDEr", held_out, "1.235", ""]]
    judge = card_of(workspace.round(1).filter)
    assert results(judge) == {
        ("image-text-matching", "roc_auc", truth): 0.97,
        ("image-text-matching", "precision", truth): 0.9,
        ("image-text-matching", "precision", by_hand): 0.91,
    }
    assert cells(judge.text, "AUC") == [["AUC", truth, "0.970", "0.960 to 0.980"]]
    assert cells(judge.text, "precision")[1] == ["precision", by_hand, "0.910", "0.880 to 0.930"]
    assert list(results(card_of(workspace.round(1).captioner)).values()) == [0.2]
    med = card_of(workspace.round(1).med)
    assert med.data.eval_results is None
    assert "It has not been measured here." in med.text


def test_the_texts_of_a_round_tell_nothing_of_models_that_did_not_make_them(workspace: Workspace) -> None:
    annotate(workspace, "another", "f11")
    write_round_cards(workspace, 1)
    assert card_of(workspace.round(1).captioner).data.eval_results is None
    assert results(card_of(workspace.round(1).filter))


def test_the_record_of_the_training_is_told(workspace: Workspace) -> None:
    folder = workspace.round(1).captioner
    sources = [{"kind": "corpus", "name": f"{n}", "digest": "0", "images": 700} for n in range(2)]
    sources += [{"kind": "human", "name": "human.parquet", "digest": "1", "images": 50}]
    write_json(folder / "data.json", {"schema": "data/1", "round": 1, "digest": "da7ada7a", "sources": sources})
    write_round_cards(workspace, 1)
    text = card_of(folder).text
    assert cells(text, "steps") == [["steps", "50"]]
    assert cells(text, "learning_rate") == [["learning_rate", "0.0003"]]
    assert cells(text, "seed") == [["seed", "3"]]
    assert cells(text, "digest") == [["digest", "`ca9`"]]
    assert cells(text, "digest of the pairs it saw") == [["digest of the pairs it saw", "`da7ada7a`"]]
    assert cells(text, "images of the corpus")[0][1] == "1,400, in 2 files"
    assert cells(text, "images of human pairs")[0][1] == "50, in 1 files"
    assert "It began with the checkpoint `3ed`." in text
    assert "It was trained with `a picture of` before every caption" in text
    assert "save_every" not in text


def test_pretrained_encoders_are_base_models_of_all_that_began_with_them(workspace: Workspace) -> None:
    write_round_cards(workspace, 1)
    begun = ["timm/vit_base_patch16_224.augreg_in21k", "google-bert/bert-base-uncased"]
    assert card_of(workspace.round(1).med).data.base_model == begun
    assert card_of(workspace.round(1).filter).data.base_model == begun
    assert card_of(workspace.round(1).retrained).data.base_model is None


def test_a_card_is_the_same_each_time_and_holds_no_path(workspace: Workspace) -> None:
    (path, *_) = write_round_cards(workspace, 1)
    first = path.read_bytes()
    assert str(workspace.root).encode() not in first
    os.utime(path, (1, 1))
    write_round_cards(workspace, 1)
    assert (path.read_bytes(), path.stat().st_mtime) == (first, 1)
    write_json(workspace.round(1).evaluation, {"retrieval": {"med": {"text_to_image": {"r1": 0.5}}}, "captioning": {}})
    write_round_cards(workspace, 1)
    assert results(card_of(path.parent)) == {("text-to-image-retrieval", "recall_at_1", "held-out human pairs"): 0.5}


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("license: other\nlicense_name: unknown", "license: apache-2.0"),
        lambda text: text + "one line more\n",
        lambda text: "# My model\n",
        lambda text: "",
    ],
)
def test_a_card_that_a_person_wrote_or_changed_is_left_as_it_is(
    change: Callable[[str], str], workspace: Workspace
) -> None:
    write_round_cards(workspace, 1)
    path = workspace.round(1).captioner / "README.md"
    own = change(path.read_text())
    path.write_text(own)
    (workspace.round(1).evaluation).unlink()
    assert path not in write_round_cards(workspace, 1)
    assert path.read_text() == own


def test_what_a_person_said_of_the_licence_goes_on_with_the_weights(workspace: Workspace, tmp_path: Path) -> None:
    source = workspace.round(1).filter
    front = "---\nlicense: apache-2.0\nlanguage: de\ndatasets:\n- me/my-pairs\n---\n"
    (source / "README.md").write_text(f"{front}\n# Mine\n")
    facts = facts_of(source, "transformers", read_checkpoint_config(source), converted=True)
    target = tmp_path / "converted"
    target.mkdir()
    write_model_card(target, facts)
    data = card_of(target).data
    assert (data.license, data.language, data.datasets) == ("apache-2.0", "de", ["me/my-pairs"])
    assert "license_name" not in data.to_dict()
    assert "`apache-2.0`, as the checkpoint that it was made from says." in card_of(target).text
    (source / "README.md").write_text("---\nlicense: [\n---\n")
    assert "Nobody has said" in model_card(facts_of(source, "capfilt", read_checkpoint_config(source)))
