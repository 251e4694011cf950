"""Makes a small synthetic web with known truth: pictures, alt texts, human pairs, and what each picture shows.

Everything follows from the seed, byte by byte. The truth of every alt text is kept in a table of its own,
which only the audit reads. No address appears in these files: `url_table` writes the URLs for the server at hand.
"""

import io
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from blip_core.errors import ConfigError, WorkspaceError
from blip_core.files import atomic_file, atomic_folder, fingerprint, read_json, write_json
from blip_core.scenes import grammar, render
from blip_core.scenes.grammar import Scene, captions_of, draw_scene, is_right
from blip_core.scenes.junk import draw_junk
from blip_core.scenes.render import render_scene
from blip_core.settings import Settings, setting

MANIFEST = "scenes.json"
WEB, HUMAN, HELD_OUT, TEXTS, FAULTS = range(5)
"""The streams of random numbers, so that a change in one part of the web leaves the others as they are."""
OVERSIZED_SIDE = 9_000

ROW_SCHEMA = pa.schema({"uid": pa.string(), "path": pa.string(), "alt": pa.string()})
URL_SCHEMA = pa.schema({"uid": pa.string(), "url": pa.string(), "alt": pa.string()})
PAIR_SCHEMA = pa.schema({"uid": pa.string(), "image": pa.binary(), "caption": pa.list_(pa.string())})
TRUTH_SCHEMA = pa.schema({"uid": pa.string(), "kind": pa.string(), "scene": pa.string()})


@dataclass(frozen=True)
class ScenesConfig(Settings):
    """How large the synthetic web is, and how bad."""

    web_images: int = setting(2400, "web pairs whose picture can be fetched, without the duplicates", ge=1)
    human_pairs: int = setting(800, "pictures with right captions to train on", ge=1)
    held_out: int = setting(100, "pictures with right captions to test on", ge=1, le=500)
    mismatched: float = setting(0.35, "share of web pairs with another picture's text", ge=0.0, le=1.0)
    junk: float = setting(0.2, "share of web pairs with a junk text; the rest is right", ge=0.0, le=1.0)
    dead_links: int = setting(30, "further rows whose URL is not found", ge=0)
    non_images: int = setting(15, "further rows whose URL gives a web page in the name of a picture", ge=0)
    truncated: int = setting(15, "further rows whose picture is cut short", ge=0)
    oversized: int = setting(2, "further rows whose picture is 9,000 x 9,000 pixels", ge=0)
    duplicates: int = setting(30, "further rows that repeat another row's URL, or its picture at another URL", ge=0)
    image_size: int = setting(64, "side of a picture in pixels", ge=32, le=512)
    seed: int = setting(0, "decides every picture and every text", ge=0)

    def __post_init__(self) -> None:
        if self.mismatched + self.junk > 1:
            raise ConfigError(
                f"mismatched + junk: {self.mismatched + self.junk:g}; the two shares are at most 1 together"
            )


class ScenesPaths(NamedTuple):
    """The tables of a synthetic web; the pictures lie in `folder/images`."""

    folder: Path
    human: Path
    held_out: Path
    truth: Path

    @property
    def rows(self) -> Path:
        """The web pairs: uid, path below the server's base URL, alt."""
        return self.folder / "rows.parquet"


class _WebRow(NamedTuple):
    uid: str
    path: str
    alt: str
    kind: str
    scene: Scene | None


def make_scenes(folder: Path, config: ScenesConfig) -> ScenesPaths:
    """Writes the synthetic web to `folder`, in one atomic step; does nothing where it stands already.

    Raises WorkspaceError where the folder holds something else, and ConfigError where the grammar has too few
    scenes for the held-out set.
    """
    paths = ScenesPaths(folder, folder / "human.parquet", folder / "held_out.parquet", folder / "truth.parquet")
    manifest = {"fingerprint": _fingerprint(config), "settings": asdict(config)}
    if (folder / MANIFEST).exists():
        if read_json(folder / MANIFEST) == manifest:
            return paths
    elif folder.exists() and any(folder.iterdir()):
        raise WorkspaceError(f"{folder}: holds something other than scenes; name a new or empty folder")
    with atomic_folder(folder) as temporary:
        (temporary / "images").mkdir()
        rows = _web_pairs(temporary, config)
        rows += _faulty_rows(temporary, rows, config)
        _write(temporary / "rows.parquet", ROW_SCHEMA, [(row.uid, row.path, row.alt) for row in rows])
        _write(temporary / "truth.parquet", TRUTH_SCHEMA, [(row.uid, row.kind, _to_text(row.scene)) for row in rows])
        _write(temporary / "human.parquet", PAIR_SCHEMA, _human_pairs(config))
        _write(temporary / "held_out.parquet", PAIR_SCHEMA, _held_out_pairs(config))
        write_json(temporary / MANIFEST, manifest)
    return paths


def url_table(paths: ScenesPaths, base_url: str, target: Path) -> Path:
    """Writes the URL table (uid, url, alt) of the web as served at `base_url`. The uids do not depend on it."""
    rows = pq.read_table(paths.rows)
    table = [(row["uid"], f"{base_url.rstrip('/')}/{row['path']}", row["alt"]) for row in rows.to_pylist()]
    with atomic_file(target) as temporary:
        _write(temporary, URL_SCHEMA, table)
    return target


def _fingerprint(config: ScenesConfig) -> str:
    """Changes with the settings, the grammar or the drawing."""
    constants = [
        {name: repr(value) for name, value in vars(module).items() if name.isupper()} for module in (grammar, render)
    ]
    return fingerprint(asdict(config), constants)


def _stream(config: ScenesConfig, stream: int, index: int = 0) -> np.random.Generator:
    return np.random.default_rng([config.seed, stream, index])


def _name(config: ScenesConfig, kind: str, index: int) -> str:
    return fingerprint("scenes", config.seed, kind, index)


def _to_text(scene: Scene | None) -> str | None:
    return None if scene is None else json.dumps(scene.to_json(), sort_keys=True)


def _write(path: Path, schema: pa.Schema, rows: Iterable[tuple[Any, ...]]) -> None:
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    table = pa.table([pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema)
    pq.write_table(table.replace_schema_metadata({"capfilt.schema": "scenes/1"}), path, compression="zstd")


def _web_pairs(folder: Path, config: ScenesConfig) -> list[_WebRow]:
    """Draws the web's pictures into `folder/images` and gives each a text of one of the three kinds."""
    scenes = []
    for index in range(config.web_images):
        rng = _stream(config, WEB, index)
        scenes.append(draw_scene(rng))
        _image(folder, config, index).write_bytes(render_scene(scenes[-1], rng, config.image_size))
    rng = _stream(config, TEXTS)
    kinds = _kinds(config)[rng.permutation(config.web_images)]
    return [
        _WebRow(
            _name(config, "uid", index),
            _image(Path(), config, index).as_posix(),
            _alt(str(kinds[index]), scene, scenes, rng),
            str(kinds[index]),
            scene,
        )
        for index, scene in enumerate(scenes)
    ]


def _image(folder: Path, config: ScenesConfig, index: int, suffix: str = "jpg") -> Path:
    return folder / "images" / f"{_name(config, 'image', index)}.{suffix}"


def _kinds(config: ScenesConfig) -> np.ndarray:
    """The kind of each web pair, not yet mixed: the shares hold exactly, not only on average."""
    mismatched, junk = round(config.mismatched * config.web_images), round(config.junk * config.web_images)
    right = config.web_images - mismatched - junk
    return np.repeat(["right", "mismatched", "junk"], [right, mismatched, junk])


def _alt(kind: str, scene: Scene, scenes: list[Scene], rng: np.random.Generator) -> str:
    if kind == "junk":
        return draw_junk(rng)
    if kind == "right":
        return captions_of(scene, rng, 1)[0]
    for _ in range(1000):
        text = captions_of(scenes[rng.integers(len(scenes))], rng, 1)[0]
        if not is_right(text, scene):
            return text
    raise ConfigError(f"web_images: {len(scenes)} pictures are too few to mismatch their texts; ask for more")


def _faulty_rows(folder: Path, good: list[_WebRow], config: ScenesConfig) -> list[_WebRow]:
    """What else is on a web: rows that show no picture, and rows that show one again."""
    rng = _stream(config, FAULTS)
    page = b"<!DOCTYPE html><html><body><h1>This picture has moved</h1></body></html>"
    makers: list[tuple[int, str, Callable[[], bytes | None]]] = [
        (config.dead_links, "jpg", lambda: None),
        (config.non_images, "jpg", lambda: page),
        (config.truncated, "jpg", lambda: _cut_short(render_scene(draw_scene(rng), rng, config.image_size))),
        (config.oversized, "png", _oversized_picture),
    ]
    rows: list[_WebRow] = []
    for count, suffix, make in makers:
        for _ in range(count):
            index = len(good) + len(rows)
            image = _image(folder, config, index, suffix)
            if (body := make()) is not None:
                image.write_bytes(body)
            # Where nothing is shown, no text is right.
            kind = "junk" if rng.random() < config.junk else "mismatched"
            alt = draw_junk(rng) if kind == "junk" else captions_of(draw_scene(rng), rng, 1)[0]
            rows.append(_WebRow(_name(config, "uid", index), image.relative_to(folder).as_posix(), alt, kind, None))
    return rows + _duplicate_rows(folder, good, len(good) + len(rows), config)


def _cut_short(jpeg: bytes) -> bytes:
    return jpeg[: len(jpeg) // 2]


def _oversized_picture() -> bytes:
    """A few kilobytes of PNG that decode to 81 million pixels."""
    buffer = io.BytesIO()
    Image.new("1", (OVERSIZED_SIDE, OVERSIZED_SIDE)).save(buffer, format="PNG")
    return buffer.getvalue()


def _duplicate_rows(folder: Path, good: list[_WebRow], first: int, config: ScenesConfig) -> list[_WebRow]:
    """Rows that repeat another: in turn the same URL, and the same picture at another URL."""
    rng = _stream(config, FAULTS, 1)
    rows: list[_WebRow] = []
    for index in range(first, first + config.duplicates):
        row = good[rng.integers(len(good))]._replace(uid=_name(config, "uid", index))
        if index % 2:
            copy = _image(folder, config, index)
            shutil.copyfile(folder / row.path, copy)
            row = row._replace(path=copy.relative_to(folder).as_posix())
        rows.append(row)
    return rows


def _human_pairs(config: ScenesConfig) -> list[tuple[str, bytes, list[str]]]:
    rows = []
    for index in range(config.human_pairs):
        rng = _stream(config, HUMAN, index)
        scene = draw_scene(rng)
        captions = captions_of(scene, rng, int(rng.integers(2, 4)))
        rows.append((_name(config, "human", index), render_scene(scene, rng, config.image_size), captions))
    return rows


def _held_out_pairs(config: ScenesConfig) -> list[tuple[str, bytes, list[str]]]:
    """Pictures with captions of which each is right for its own picture and for no other of the set."""
    rows: list[tuple[str, bytes, list[str]]] = []
    told: set[Scene] = set()
    for index in range(20 * config.held_out):
        rng = _stream(config, HELD_OUT, index)
        scene = draw_scene(rng)
        if scene in told:
            continue
        told.add(scene)
        captions = captions_of(scene, rng, int(rng.integers(2, 4)))
        rows.append((_name(config, "held_out", index), render_scene(scene, rng, config.image_size), captions))
        if len(rows) == config.held_out:
            return rows
    raise ConfigError(f"held_out: {config.held_out} scenes cannot be told apart by their captions; ask for fewer")
