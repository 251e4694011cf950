"""Where checkpoints come from: folders and files, here or in an object store, and names on the hub.

And which of their files hold the weights, whose bytes tell one model from another.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from pathlib import Path

from huggingface_hub import snapshot_download

from blip_core import stores
from blip_core.errors import CheckpointError, WorkspaceError, first_line
from blip_core.files import read_json
from blip_core.med.word_pieces import HUB_ERRORS, HUB_FILES

CARD = "README.md"  # says under which licence it is given
SAFETENSORS, TORCH = "model.safetensors", "pytorch_model.bin"
EXPECTED = (
    "expected a checkpoint folder of this project or of transformers' BLIP, a .pth file of the original release, or a "
    "name on the hub such as Salesforce/blip-image-captioning-base"
)
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_SAFETENSORS = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
HUB_TORCH = ["pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"]


def is_hub_name(source: str) -> bool:
    """Whether a source is to be looked for on the hub: owner/name, where no such path is here."""
    return bool(HUB_NAME.fullmatch(source)) and not Path(source).exists()


def locate(source: str | Path) -> Path:
    """The folder or file of a source, fetched from the hub if need be: the files that are needed, no others.

    What lies in an object store stays there. Raises CheckpointError where there is no such thing, or no network.
    """
    if is_hub_name(str(source)):
        return _fetch(str(source))
    path = stores.located(source) if stores.is_url(source) else Path(source).expanduser()
    with stores.reaching(f"checkpoint {path}"):
        found = path.exists()
    if not found:
        raise CheckpointError(f"checkpoint {path}: not found; {EXPECTED}")
    return path


@cache
def _fetch(name: str) -> Path:
    try:
        folder = Path(snapshot_download(name, allow_patterns=[CARD, *HUB_FILES, *HUB_SAFETENSORS]))
        if not find_weights(folder):
            folder = Path(snapshot_download(name, allow_patterns=[CARD, *HUB_FILES, *HUB_TORCH]))
    except HUB_ERRORS as error:
        raise CheckpointError(
            f"checkpoint {name}: no folder or file here, and not to be had from the hub ({first_line(error)}); "
            "where there is no network, give the path of a folder that holds the model's files: config.json, its "
            f"weights and its tokenizer, as 'hf download {name} --local-dir FOLDER' leaves them where there is one"
        ) from error
    return folder


def find_weights(folder: Path) -> list[Path]:
    """The weights' files of a folder as transformers writes it: one, or those that an index names; empty for none.

    Raises CheckpointError for an index that is torn or names a file that is not there.
    """
    for name in (SAFETENSORS, TORCH):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / f"{name}.index.json").is_file():
            return _indexed(folder / f"{name}.index.json")
    return []


def _indexed(index: Path) -> list[Path]:
    try:
        names = read_json(index)["weight_map"].values()
    except (WorkspaceError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index of weights; expected an object with weight_map") from error
    files = sorted({index.parent / Path(str(name)).name for name in names})
    if missing := [file for file in files if not file.is_file()]:
        raise CheckpointError(
            f"{index}: {len(missing)} of its {len(files)} files are missing, such as {missing[0].name}"
        )
    return files


def digest(files: Iterable[Path]) -> str:
    """16 hexadecimal digits that identify the files' bytes."""
    sha256 = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                sha256.update(part)
    return sha256.hexdigest()[:16]


def standing_digest(files: Sequence[Path]) -> str:
    """The same of files that stay as they are: in one process they are read once, as long as size and time are kept."""
    stats = [file.stat() for file in files]
    return _kept_digest(tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in zip(files, stats, strict=True)))


@lru_cache(maxsize=16)
def _kept_digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    return digest(path for path, _, _ in files)
