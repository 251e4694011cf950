"""`capfilt convert`: a checkpoint of this project, of transformers or of the original release as another of them.

A folder goes out with a model card; the release's format is one file, which has no place for one.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from blip_core.errors import ConfigError
from blip_core.evaluation.model_card import facts_of, write_model_card
from blip_core.med.architecture import Face
from blip_core.med.checkpoint import LoadedMED, load_med, save_med
from blip_core.med.convert import CLASSES, FACES, Kind, write_release, write_transformers
from blip_core.med.sources import is_hub_name
from blip_core.stores import located

Format = Literal["capfilt", "transformers", "release"]


def convert_checkpoint(
    source: str, target: Path, to: Format, kind: Kind | None, tokenizer: str | None, image_size: int | None
) -> str:
    """Reads `source` and writes `target`, where nothing may stand, with its card; returns a line that says so.

    Raises ConfigError for a target that is there, and where it is not clear which face is to be written;
    CheckpointError as `load_med` does, and for what the format cannot hold.
    """
    if target.exists():
        raise ConfigError(f"{target}: exists already; give a name that is free")
    if to == "capfilt" and kind is not None:
        raise ConfigError("--kind: chooses what transformers and release can hold; capfilt keeps all that is read")
    loaded = load_med(source, image_size=image_size, tokenizer=tokenizer, face=FACES[kind] if kind else None)
    if to == "capfilt":
        origin = {"source": source if is_hub_name(source) else str(located(source)), "start": loaded.digest}
        save_med(target, loaded.med, loaded.architecture, loaded.tokenizer, origin)
        _write_card(target, source, to, loaded, loaded.med.faces)
        return _line(loaded, source, f"a checkpoint of this project ({_faces(loaded)})", target)
    kind = kind or _only_kind(loaded, source)
    if to == "transformers":
        write_transformers(target, loaded, kind)
        _write_card(target, source, to, loaded, [FACES[kind]])
        return _line(loaded, source, f"transformers' {CLASSES[kind]}", target)
    write_release(target, loaded, kind)
    return _line(loaded, source, f"a {kind} of the original release", target)


def _write_card(
    target: Path, source: str, to: Literal["capfilt", "transformers"], loaded: LoadedMED, faces: Sequence[Face]
) -> None:
    config = {**loaded.config, "med": asdict(loaded.architecture)}
    write_model_card(target, facts_of(source, to, config, faces, converted=True))


def _only_kind(loaded: LoadedMED, source: str) -> Kind:
    kinds = [kind for kind, face in FACES.items() if face in loaded.med.faces]
    if len(kinds) > 1:
        raise ConfigError(f"{source}: can be written as either; say which, --kind {' or --kind '.join(kinds)}")
    return kinds[0]


def _line(loaded: LoadedMED, source: str, what: str, target: Path) -> str:
    numbers = sum(parameter.numel() for parameter in loaded.med.parameters())
    form = loaded.config.get("format", "a checkpoint of this project")
    size = loaded.architecture.image_size
    return (
        f"read {source}: {form} ({_faces(loaded)}), {numbers / 1e6:,.1f} million weights; "
        f"wrote {target}: {what}, for images of {size} x {size}"
    )


def _faces(loaded: LoadedMED) -> str:
    return " and ".join(f"text {face}" for face in loaded.med.faces)
