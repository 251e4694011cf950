"""The README's file tree is true: what it names is there, and what is there it names."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAME = re.compile(r"[\w.-]+/?")


def tree() -> list[str]:
    """The paths of the README's file tree: the fenced block that begins with `blip_core/`."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    (block,) = [block for block in blocks if block.startswith("blip_core/")]
    return list(paths_of(block))


def paths_of(block: str) -> Iterator[str]:
    """Each line names one or more files or folders, then, after spaces, says what they are; two spaces a level."""
    folders: list[str] = []
    for line in filter(str.strip, block.splitlines()):
        level = (len(line) - len(line.lstrip())) // 2
        names = []
        for word in line.split():
            if not NAME.fullmatch(word) or not (word.endswith("/") or "." in word[1:] or (ROOT / word).is_file()):
                break
            names.append(word)
        assert names, f"README: no file or folder in the line {line!r}"
        folders = [*folders[:level], names[0]]
        yield from ("".join([*folders[:level], name]) for name in names)


def test_every_path_of_the_tree_is_there() -> None:
    paths = tree()
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_module_of_the_method_is_in_the_tree() -> None:
    named = set(tree())
    unnamed = [
        path
        for file in sorted((ROOT / "blip_core").rglob("*.py"))
        if file.name != "__init__.py"
        and (path := file.relative_to(ROOT).as_posix()) not in named
        and f"{file.parent.relative_to(ROOT).as_posix()}/" not in named
    ]
    assert unnamed == []
