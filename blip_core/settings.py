"""How a plain dataclass says what its fields mean, without importing pydantic.

`setting` puts description and bounds into the field's metadata, which pydantic reads when
`blip_core.config` composes the dataclass; a GPU machine without pydantic uses the same dataclass as is.
"""

from dataclasses import field
from typing import Any, ClassVar


class Settings:
    """Base of every settings dataclass: an unknown key is an error, not a silence."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}


def setting(default: Any, description: str, **bounds: Any) -> Any:
    """A dataclass field with a default, a description, and pydantic's bounds (ge, gt, le, lt, min_length, pattern).

    Mutable defaults are given as a factory (a callable).
    """
    metadata = {"description": description, **bounds}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def required(description: str, **bounds: Any) -> Any:
    """A dataclass field without a default. Required fields stand before those with defaults."""
    return field(metadata={"description": description, **bounds})
