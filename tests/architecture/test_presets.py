"""Every file of settings that comes with the project parses, and builds the model that it describes."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from blip_core.config import BootstrapConfig, load_config
from blip_core.corpus.selection import check_predicate
from blip_core.med.med import build_med

ROOT = Path(__file__).parents[2]
PRESETS = [*sorted((ROOT / "deployments" / "presets").glob("*.yaml")), ROOT / "blip_core" / "scenes" / "demo.yaml"]
TABLES = {"workspace": "work", "web.path": "urls.parquet", "human.path": "human.parquet"}


def load(path: Path) -> BootstrapConfig:
    return load_config(path, TABLES)


def test_there_are_presets_for_photographs_and_for_the_demo() -> None:
    assert {"photos.yaml", "demo.yaml"} <= {path.name for path in PRESETS}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_parses_and_its_settings_fit_together(path: Path) -> None:
    config = load(path)
    check_predicate(config.publish.where)
    assert config.tokenizer.source == "train"  # a preset needs no network
    assert config.generation.min_length <= config.generation.max_length <= config.tokenizer.max_tokens
    for training in (config.pretrain, config.captioner, config.filter, config.retrain):
        assert training.warmup_steps < training.steps
        assert training.alpha_ramp_steps <= training.steps


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_builds_a_model(path: Path) -> None:
    config = load(path)
    med = build_med(config.med.architecture(), config.tokenizer.vocabulary, encode_id=1, decode_id=2)
    assert med.image_size == config.med.architecture().image_size
    assert config.download.image_size >= med.image_size  # images are not stored smaller than the model sees them


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
