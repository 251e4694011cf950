"""A store's file system as DuckDB may see it: what lies below one path, to be read and nothing else.

DuckDB confines a query by the text of a path. What a store, or a proxy before it, makes of a path with '..' is its own
affair: such a path does not get that far.
"""

from typing import Any

from fsspec import AbstractFileSystem


class Confined(AbstractFileSystem):  # type: ignore[misc]
    """`inner` below `root`. Raises PermissionError for every other path, and for whatever would write."""

    cachable = False

    def __init__(self, inner: Any, root: str) -> None:
        super().__init__()
        self.inner = inner
        self.root = root
        self.protocol = inner.protocol

    def _strip_protocol(self, path: str) -> str:  # type: ignore[override]
        return str(self.inner._strip_protocol(path))

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        return self._to_root(path) or self.inner.info(self._allowed(path), **kwargs)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        step = self._to_root(path)
        found = [step] if step else self.inner.ls(self._allowed(path), detail=True, **kwargs)
        return found if detail else [entry["name"] for entry in found]

    def glob(self, path: str, **kwargs: Any) -> Any:
        self._without_steps_up(path)  # a walk would pass over the refusal, and find nothing
        return super().glob(path, **kwargs)

    def modified(self, path: str) -> Any:
        return self.inner.modified(self._allowed(path))

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if mode not in ("r", "rb"):
            raise PermissionError(f"{path}: may not be written to")
        return self.inner.open(self._allowed(path), "rb", **kwargs)

    def _allowed(self, path: str) -> str:
        name = self._without_steps_up(path)
        if not f"{name}/".startswith(f"{self.root}/"):
            raise PermissionError(f"{path}: outside of {self.root}")
        return name

    def _without_steps_up(self, path: str) -> str:
        name = self._strip_protocol(path)
        if ".." in name.split("/"):
            raise PermissionError(f"{path}: outside of {self.root}")
        return name

    def _to_root(self, path: str) -> dict[str, Any] | None:
        """The one entry of a folder above the root that leads to it; None for a path that is none above it."""
        name = self._strip_protocol(path).rstrip("/")
        if not self.root.startswith(f"{name}/"):
            return None
        following = self.root.removeprefix(f"{name}/").partition("/")[0]
        return {"name": f"{name}/{following}", "size": 0, "type": "directory"}
