"""The SQL function `embed_text`: texts by the text encoder of the promoted round's Filter.

The Filter is looked for, and torch imported, when a statement calls it for the first time; the text encoder stays for
the statements after it.
"""

from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import duckdb
import pyarrow as pa
from duckdb.func import ARROW, SPECIAL

from blip_core.corpus.macros import EMBED_TEXT, no_embeddings
from blip_core.corpus.models import find_checkpoint
from blip_core.corpus.schemas import EMBEDDING_VERSION, FILTER_KEY
from blip_core.data.shards import check_part
from blip_core.errors import CheckpointError, WorkspaceError
from blip_core.med.description import read_checkpoint_config
from blip_core.workspace import Workspace

if TYPE_CHECKING:
    from blip_core.med.text_embedder import TextEmbedder

_loading = Lock()


def register_embed_text(
    connection: duckdb.DuckDBPyConnection, workspace: Workspace, promoted: int | None, filter: str | None = None
) -> None:
    """Gives a connection the function `embed_text(VARCHAR) -> FLOAT[]`; a text without a word has null.

    Args:
        promoted: the round whose embeddings are searched.
        filter: a checkpoint, where that of the round is not in the workspace: a folder, a file, or a name on the hub.

    A statement that calls it raises duckdb.Error with the words of WorkspaceError or CheckpointError where the round
    has no embeddings, or the Filter that made them is not to be had.
    """

    def embed(texts: pa.ChunkedArray) -> pa.Array:
        with _loading:
            embedder = _embedder(*_filter_of(workspace, promoted, filter))
        vectors = embedder([text or "" for text in texts.to_pylist()])
        return pa.array(vectors, pa.list_(pa.float32()))

    connection.create_function(EMBED_TEXT, embed, ["VARCHAR"], "FLOAT[]", type=ARROW, null_handling=SPECIAL)


def _filter_of(workspace: Workspace, promoted: int | None, given: str | None) -> tuple[str | Path, str]:
    """The source of the Filter that made the round's embeddings, and its digest."""
    if promoted is None:
        raise WorkspaceError(f"{workspace.root}: no round is promoted yet; publish one first, its images are searched")
    folder = workspace.round(promoted).embeddings
    part = next(iter(sorted(folder.glob("*.parquet"))), None)
    if part is None:
        raise WorkspaceError(f"{folder}: {no_embeddings(promoted)}")
    digest = check_part(part, EMBEDDING_VERSION)[FILTER_KEY]
    if given is not None:
        found = read_checkpoint_config(given, "encoder")["digest"]
        if found != digest:
            raise CheckpointError(
                f"checkpoint {given}: its digest is {found}; the embeddings of round {promoted} are of the Filter "
                f"{digest}"
            )
        return given, digest
    source = find_checkpoint(workspace, "filter", digest)
    if source is None:
        raise CheckpointError(
            f"the embeddings of round {promoted} are of the Filter {digest}, which no round of {workspace.root} has; "
            "name it: capfilt query --filter CHECKPOINT"
        )
    return source, digest


# The digest is part of the key: another model in the same place is loaded anew.
@lru_cache(maxsize=1)
def _embedder(source: str | Path, digest: str) -> "TextEmbedder":
    from blip_core.med.text_embedder import TextEmbedder  # it takes torch, which few statements need

    return TextEmbedder.load(source)
