"""The workspace: where everything that a project makes lies (drawn in docs/workspace.md).

Its root is a folder of this machine or an object store's; the paths below it are of the same kind.
"""

import os
import socket
import threading
from dataclasses import dataclass
from pathlib import Path

from blip_core import stores
from blip_core.errors import WorkspaceError
from blip_core.files import add_to_account


@dataclass(frozen=True)
class Round:
    """One pass of the whole cycle: the paths of what it makes."""

    number: int
    root: Path

    @property
    def med(self) -> Path:
        return self.root / "med"

    @property
    def captioner(self) -> Path:
        return self.root / "captioner"

    @property
    def filter(self) -> Path:
        return self.root / "filter"

    @property
    def retrained(self) -> Path:
        """The MED trained from scratch on the corpus and the human pairs."""
        return self.root / "retrained"

    @property
    def retrained_raw(self) -> Path:
        """The MED trained for the same number of steps on the raw web pairs and the human pairs."""
        return self.root / "retrained-raw"

    @property
    def annotations(self) -> Path:
        return self.root / "annotations"

    @property
    def embeddings(self) -> Path:
        """The Filter's embedding of every image, a part for each shard."""
        return self.root / "embeddings"

    @property
    def left_out(self) -> Path:
        """The images that the corpus leaves out because of others, a part for each shard; where a rule asks for it."""
        return self.root / "left_out"

    @property
    def corpus(self) -> Path:
        return self.root / "corpus"

    @property
    def metrics(self) -> Path:
        """One JSON-lines file of training metrics for each model: `metrics/<model>.jsonl`."""
        return self.root / "metrics"

    @property
    def begun(self) -> Path:
        """What stood when `re-bootstrap` began the round."""
        return self.root / "begun.json"

    @property
    def verdict(self) -> Path:
        """Whether the round may be promoted, why, and who said so."""
        return self.root / "verdict.json"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation.json"

    @property
    def audit_page(self) -> Path:
        """The sample on which a person marks pairs right or wrong."""
        return self.root / "audit.html"

    @property
    def audit(self) -> Path:
        """What a person's marks say of the round."""
        return self.root / "audit.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def seconds(self) -> Path:
        """Seconds of work that each step took, over all runs of the round."""
        return self.root / "seconds.json"

    @property
    def images(self) -> Path:
        """Images that were annotated in those seconds."""
        return self.root / "images.json"

    def add_seconds(self, step: str, seconds: float) -> None:
        """Adds time to a step's account; a step that is run again in parts sums up."""
        add_to_account(self.seconds, step, seconds)

    def add_images(self, step: str, images: int) -> None:
        """Adds images to a step's account, next to the seconds that they took."""
        add_to_account(self.images, step, images)


@dataclass(frozen=True)
class Workspace:
    """The root folder of a project, and the names of what lies in it."""

    root: Path

    @classmethod
    def open(cls, root: str | Path) -> "Workspace":
        """Makes the root if it is missing. Raises WorkspaceError where it cannot be written."""
        path = stores.located(root)
        probe = path / f".probe.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"
        if stores.is_remote(path):
            with stores.reaching(f"workspace {path}: cannot be written"):
                stores.put_bytes(b"", probe)
                stores.remove(probe)
            return cls(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WorkspaceError(f"workspace {path}: cannot be made ({error.strerror}); name a folder") from error
        try:
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise WorkspaceError(f"workspace {path}: cannot be written ({error.strerror})") from error
        return cls(path)

    @classmethod
    def preview(cls, root: str | Path) -> "Workspace":
        """The same, with nothing made: raises WorkspaceError where `open` would, as far as can be told by looking."""
        path = stores.located(root)
        if stores.is_remote(path):
            with stores.reaching(f"workspace {path}: cannot be reached"):
                stores.check_bucket(path)
            return cls(path)
        standing = next(folder for folder in (path, *path.parents) if folder.exists())
        if not standing.is_dir():
            raise WorkspaceError(f"workspace {path}: cannot be made ({standing} is a file); name a folder")
        if not os.access(standing, os.W_OK | os.X_OK):
            raise WorkspaceError(f"workspace {path}: cannot be written ({standing} is not yours to write)")
        return cls(path)

    @classmethod
    def existing(cls, root: str | Path) -> "Workspace":
        """The workspace at `root`. Raises WorkspaceError where there is none, and makes nothing."""
        path = stores.located(root)
        with stores.reaching(f"workspace {path}: cannot be reached"):
            there = any((path / name).is_dir() for name in ("shards", "rounds"))
        if not there:
            raise WorkspaceError(f"workspace {path}: not found (it would hold a folder named shards or rounds)")
        return cls(path)

    @property
    def shards(self) -> Path:
        return self.root / "shards"

    @property
    def plans(self) -> Path:
        """The input rows of the shards that are still to be fetched."""
        return self.root / ".plans"

    @property
    def denied(self) -> Path:
        """What `capfilt forget` has removed and keeps out."""
        return self.root / "denied.jsonl"

    @property
    def forgotten(self) -> Path:
        """The checkpoints that were trained on what was forgotten since."""
        return self.root / "forgotten.json"

    @property
    def catalog(self) -> Path:
        return self.root / "catalog.duckdb"

    @property
    def scratch(self) -> Path:
        """The folder on this machine for locks, and for what other programs write; the root itself where it is one."""
        return stores.scratch_folder(self.root)

    @property
    def promoted(self) -> Path:
        """Which round's corpus is shown, and which were before it."""
        return self.root / "promoted.json"

    @property
    def prefect_home(self) -> Path:
        return self.scratch / ".prefect"

    def shard(self, name: str) -> Path:
        return self.shards / f"{name}.parquet"

    def shard_paths(self) -> list[Path]:
        """All shards, by name."""
        return sorted(self.shards.glob("*.parquet"))

    def round(self, number: int) -> Round:
        return Round(number, self.root / "rounds" / f"{number:04d}")

    def round_numbers(self) -> list[int]:
        folders = (self.root / "rounds").glob("[0-9][0-9][0-9][0-9]")
        return sorted(int(folder.name) for folder in folders if folder.is_dir())
