"""Every file of settings that comes with the project parses, and builds the model that it describes.

The paper's recipes are held against numbers written down here by hand, from the paper and its released code.
"""

import importlib.util
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
import yaml

from blip_core.config import BootstrapConfig, load_config
from blip_core.corpus.selection import check_predicate
from blip_core.med.architecture import FACES, Face
from blip_core.med.med import MED, build_med
from blip_core.med.sources import is_hub_name
from blip_core.training.recipe import TrainConfig
from blip_core.training.schedule import learning_rate

ROOT = Path(__file__).parents[2]
PRESETS = [*sorted((ROOT / "deployments" / "presets").glob("*.yaml")), ROOT / "blip_core" / "scenes" / "demo.yaml"]
TABLES = {"workspace": "work", "web.path": "urls.parquet", "human.path": "human.parquet"}
BASE, LARGE = (ROOT / "deployments" / "presets" / f"blip-{name}.yaml" for name in ("base-14m", "large-129m"))
RECIPES = [BASE, LARGE]
CLEAN = ROOT / "deployments" / "presets" / "clean.yaml"
TRAININGS = ("pretrain", "captioner", "filter", "retrain")
BERT_WORDS = 30522
GPUS = 32

THOUSAND_TEXTS = {"COCO": 567, "VG": 769, "SBU": 860, "CC3M": 3000, "CC12M": 10_000, "LAION": 115_000}
"""Table 15 of the paper."""

FROM_SCRATCH = {
    "image_size": 224,
    "schedule": "exponential",
    "decay": 0.9,
    "warmup_steps": 3000,
    "warmup_learning_rate": 1e-6,
    "final_learning_rate": 1e-6,
    "queue_size": 57600,
    "momentum": 0.995,
    "alpha": 0.4,
    "negatives": "process",
    "crop_scale": 0.2,
    "max_tokens": 30,
    "prompt": "",
}
FINE_TUNING = {
    "image_size": 384,
    "batch_size": 256,
    "schedule": "cosine",
    "epoch_steps": 2214,
    "warmup_steps": 0,
    "final_learning_rate": 0.0,
    "crop_scale": 0.5,
}
CAPTIONER = FINE_TUNING | {"steps": 11070, "prompt": "a picture of", "max_tokens": 40}
FILTER = FINE_TUNING | {"steps": 13284, "queue_size": 57600, "momentum": 0.995, "alpha": 0.4, "max_tokens": 35}
FILTER |= {"alpha_ramp_steps": 2214, "negatives": "all"}
EVERY_TRAINING = {"weight_decay": 0.05, "clip_norm": 0.0, "flip": True, "augment": True, "precision": "fp32"}
EXPECTED: dict[Path, dict[str, dict[str, Any]]] = {
    BASE: {
        "pretrain": FROM_SCRATCH | {"steps": 105_520, "batch_size": 2880, "learning_rate": 3e-4},
        "retrain": FROM_SCRATCH | {"steps": 171_520, "batch_size": 2880, "learning_rate": 3e-4},
        "captioner": CAPTIONER | {"learning_rate": 1e-5},
        "filter": FILTER | {"learning_rate": 1e-5},
    },
    LARGE: {
        "pretrain": FROM_SCRATCH | {"steps": 318_300, "batch_size": 2400, "learning_rate": 2e-4},
        "retrain": FROM_SCRATCH | {"steps": 528_920, "batch_size": 2400, "learning_rate": 2e-4},
        "captioner": CAPTIONER | {"learning_rate": 2e-6},
        "filter": FILTER | {"learning_rate": 5e-6},
    },
}
# Lengths are one less than in the official files, which count [DEC].
DECODING = {"max_length": 20 - 1, "min_length": 5 - 1, "prompt": "a picture of"}
GENERATION = DECODING | {"method": "nucleus", "p": 0.9, "top_k": 50, "temperature": 1.0, "repetition_penalty": 1.1}
EVALUATION = DECODING | {"rerank": 256, "max_images": 5000, "beam_size": 3, "repetition_penalty": 1.0}


def load(path: Path) -> BootstrapConfig:
    return load_config(path, TABLES)


def built(config: BootstrapConfig, training: TrainConfig, faces: tuple[Face, ...] = FACES) -> MED:
    """The model of a training, without memory for its weights."""
    med = replace(config.med, image_size=training.image_size or config.med.image_size)
    with torch.device("meta"):
        return build_med(med.architecture(), config.tokenizer.vocabulary + 2, 1, 2, faces)


def weights(med: MED) -> int:
    return sum(parameter.numel() for parameter in med.parameters())


def test_there_are_presets_for_the_papers_models_photographs_and_the_demo() -> None:
    names = {"blip-base-14m.yaml", "blip-large-129m.yaml", "clean.yaml", "photos.yaml", "demo.yaml"}
    assert names <= {path.name for path in PRESETS}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_parses_and_its_settings_fit_together(path: Path) -> None:
    config = load(path)
    check_predicate(config.publish.where)
    for decoding in (config.generation, config.evaluation):
        assert decoding.min_length <= decoding.max_length <= config.tokenizer.max_tokens
    for name in TRAININGS:
        training = getattr(config, name)
        assert training.warmup_steps < training.steps
        assert training.alpha_ramp_steps <= training.steps


@pytest.mark.parametrize("path", sorted({*PRESETS} - {*RECIPES, CLEAN}), ids=lambda path: path.stem)
def test_a_preset_for_trying_out_needs_no_network(path: Path) -> None:
    config = load(path)
    assert config.tokenizer.source == "train"
    assert (config.med.image_weights, config.med.text_weights) == (None, None)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_builds_its_models(path: Path) -> None:
    config = load(path)
    for name in TRAININGS:
        training = getattr(config, name)
        med = built(config, training)
        assert med.image_size == (training.image_size or config.med.architecture().image_size)
        assert config.download.image_size >= med.image_size  # images are not stored smaller than the model sees them


def test_clean_needs_a_table_alone_and_works_as_the_paper_and_its_code_do() -> None:
    values = yaml.safe_load(CLEAN.read_text())
    assert set(BootstrapConfig.model_json_schema()["required"]) - {*values} == {"web"}
    config = load_config(CLEAN, {"web.path": "urls.parquet"})
    generation = asdict(config.generation)
    assert {key: generation[key] for key in GENERATION} == GENERATION
    assert config.publish.where == "itm_score > 0.5"
    assert config.download.image_size == 384
    for name in (config.checkpoints.captioner, config.checkpoints.filter):
        assert is_hub_name(str(name))
    assert config.annotate.precision == "bf16"
    text = CLEAN.read_text()
    assert all(f"  {key}: " in text for key in asdict(config.annotate))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_the_numbers_of_the_paper_and_its_code(path: Path) -> None:
    config = load(path)
    for name, expected in EXPECTED[path].items():
        training = asdict(getattr(config, name))
        wanted = expected | EVERY_TRAINING
        assert {key: training[key] for key in wanted} == wanted, name
    generation, evaluation = asdict(config.generation), asdict(config.evaluation)
    assert {key: generation[key] for key in GENERATION} == GENERATION
    assert {key: evaluation[key] for key in EVALUATION} == EVALUATION
    assert config.annotate.candidates == 1
    assert config.publish.where == "itm_score > 0.5"
    assert config.tokenizer.max_tokens == 35
    assert (config.tokenizer.source, config.med.text_weights) == ("bert-base-uncased", "bert-base-uncased")


def test_the_recipes_models_have_as_many_weights_as_the_official_ones() -> None:
    # counted on the official code's own classes: BLIP_Pretrain's trainable ones (table 3's 252M), BLIP_Decoder,
    # and BLIP_ITM, which has no temperature
    base, large = load(BASE), load(LARGE)
    assert base.tokenizer.vocabulary == large.tokenizer.vocabulary == BERT_WORDS
    assert weights(built(base, base.pretrain)) == 252_441_919
    assert weights(built(base, base.captioner, ("decoder",))) == 223_971_644
    assert weights(built(large, large.captioner, ("decoder",))) == 446_290_492
    assert weights(built(base, base.filter, ("encoder",))) == 223_744_258 + 1
    assert weights(built(large, large.filter, ("encoder",))) == 446_128_642 + 1


def test_the_recipes_models_begin_with_the_files_that_the_official_code_names() -> None:
    urls = [timm.models.get_pretrained_cfg(load(path).med.image_weights).url for path in RECIPES]
    assert urls[0].endswith("deit_base_patch16_224-b5f2ef4d.pth")
    # timm 0.4.12's vit_large_patch16_224_in21k
    assert urls[1].endswith("L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1.npz")
    assert [load(path).med.architecture().drop_path for path in RECIPES] == [0.0, 0.1]


def test_a_recipes_steps_are_the_papers_epochs_over_table_15() -> None:
    of_14m = sum(count for name, count in THOUSAND_TEXTS.items() if name != "LAION")
    texts = {BASE: of_14m, LARGE: of_14m + THOUSAND_TEXTS["LAION"] / 5}
    for path, thousands in texts.items():
        config = load(path)
        assert config.pretrain.epoch_steps == 1000 * thousands // config.pretrain.batch_size
        for training in (config.pretrain, config.retrain):
            assert training.steps == 20 * training.epoch_steps
            assert training.alpha_ramp_steps == 2 * training.epoch_steps
        for training, epochs in ((config.captioner, 5), (config.filter, 6)):
            assert training.epoch_steps == 1000 * THOUSAND_TEXTS["COCO"] // training.batch_size
            assert training.steps == epochs * training.epoch_steps
    assert load(BASE).retrain.epoch_steps == 24_700_000 // 2880  # table 12


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipes_learning_rate_falls_as_the_official_schedules_do(path: Path) -> None:
    config = load(path)
    for training in (config.pretrain, config.retrain):
        for epoch in (0, 1, 10, 19):
            step = (epoch + 1) * training.epoch_steps - 1
            expected = max(1e-6, training.learning_rate * 0.9**epoch)  # step_lr_schedule
            assert learning_rate(step, training) == pytest.approx(expected)
        for step in (0, 1500, 2999):  # warmup_lr_schedule, which begins one step lower
            expected = 1e-6 + (training.learning_rate - 1e-6) * step / 3000
            assert learning_rate(step, training) == pytest.approx(expected, abs=training.learning_rate / 2999)
    for training, epochs in ((config.captioner, 5), (config.filter, 6)):
        for step in (0, 2213, 2214, training.steps - 1):
            expected = training.learning_rate * 0.5 * (1 + math.cos(math.pi * (step // 2214) / epochs))
            assert learning_rate(step, training) == pytest.approx(expected)  # cosine_lr_schedule


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_divides_among_the_papers_gpus_and_fewer(path: Path) -> None:
    config = load(path)
    for training in (config.pretrain, config.retrain):
        assert 57600 % training.batch_size == 0  # as the official code asserts
        assert training.batch_size / GPUS == {BASE: 90, LARGE: 75}[path]
    for world in (1, 2, 4, 8, 16, GPUS):
        for name in TRAININGS:
            training = getattr(config, name)
            assert training.batch_size % world == 0
            assert training.lanes % (world * training.workers) == 0


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_number_of_a_recipe_says_where_it_is_from(path: Path) -> None:
    how_it_is_run = {"lanes", "workers", "save_every", "log_every"}
    for line in path.read_text().splitlines():
        if (key := re.match(r"  (\w+): \S", line)) and key[1] not in how_it_is_run:
            assert re.search(r"  # .{6}", line), line


@pytest.fixture(scope="module")
def photos() -> ModuleType:
    """tests/benchmarks/photos.py as a module."""
    spec = importlib.util.spec_from_file_location("photos", ROOT / "tests" / "benchmarks" / "photos.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_photographs_the_benchmark_says_so_in_one_line_and_makes_nothing(
    photos: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = photos.main(["--data", str(tmp_path / "none"), "--workspace", str(tmp_path / "work")])
    output = capsys.readouterr()
    assert status == 0
    assert (output.out.count("\n"), output.err) == (1, "")
    assert output.out.startswith(f"skipped: no photographs in {tmp_path / 'none'}")
    assert list(tmp_path.iterdir()) == []
