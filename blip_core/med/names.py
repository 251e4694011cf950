"""Names of weights in other programs' checkpoints against ours: one table a program, read in both directions.

A line of a table holds our name and theirs; `N` stands for each layer, a last `*` for weight and bias, and `T` for
the module of the text encoder or decoder. Nothing is left out in silence: a name of theirs is in a line, or in the
table's list of what has no place here, or an error.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from blip_core.errors import CheckpointError
from blip_core.med.architecture import Face

Weights = Mapping[str, Tensor]
Line = tuple[str, str]


@dataclass(frozen=True)
class NameTable:
    """The names of one program.

    Attributes:
        image: of the image encoder.
        shared: what both faces of the text transformer use; their names stand below `T` of each face that there is.
        faces: what one face alone uses, heads included.
        roots: what `T` is for each face.
        optional: lines that a checkpoint may lack.
        copies: names of theirs that repeat another's weight, and that a checkpoint may lack.
        left_out: names of theirs that have no place in a MED.
        momentum: modules of theirs that come again, with `_m` behind, as moving averages; these have no place either.
    """

    image: tuple[Line, ...]
    shared: tuple[Line, ...]
    faces: Mapping[Face, tuple[Line, ...]]
    roots: Mapping[Face, str]
    optional: tuple[Line, ...] = ()
    copies: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    momentum: tuple[str, ...] = ()

    def pairs(self, faces: Iterable[Face], image_depth: int, text_depth: int) -> list[Line]:
        """Every (our name, their name) of a checkpoint with these faces; one of ours may have several of theirs."""
        lines = [*_expand(self.image, image_depth, "")]
        for face in faces:
            lines += _expand((*self.shared, *self.faces[face]), text_depth, self.roots[face])
        return lines

    def found_faces(self, names: Collection[str]) -> tuple[Face, ...]:
        """The faces that have a weight among these names of theirs."""
        return tuple(face for face, root in self.roots.items() if any(name.startswith(f"{root}.") for name in names))

    def depths(self, names: Collection[str], faces: Iterable[Face]) -> tuple[int, int]:
        """Layers of the image encoder and of the text transformer, by the highest number in a name of theirs."""
        text = [_depth(names, self.shared, self.roots[face]) for face in faces]
        return _depth(names, self.image, ""), max(text, default=0)

    def without_place(self, faces: Iterable[Face], theirs: Iterable[str]) -> set[str]:
        """Every name that a checkpoint with these faces and weights may have, and that a MED has not."""
        lines = [(name, name) for name in self.left_out]
        left_out = {name for face in faces for _, name in _expand(lines, 0, self.roots[face])}
        again = {
            f"{module}_m{name.removeprefix(module)}"
            for module in self.momentum
            for name in [*theirs, *left_out]
            if name.startswith(f"{module}.")
        }
        return left_out | again


def to_ours(
    origin: str | Path, weights: Weights, table: NameTable, faces: tuple[Face, ...]
) -> dict[str, tuple[str, Tensor]]:
    """Their weights under our names, each with the name that it has there.

    Args:
        origin: the file, for messages.
        faces: those that the checkpoint has.

    Raises CheckpointError naming what is missing, unknown, or held twice with different values.
    """
    required = table.pairs(faces, *table.depths(weights, faces))
    pairs = [*required, *(line for line in table.optional if line[1] in weights)]
    _check_missing(origin, weights, required, table)
    known = {theirs for _, theirs in pairs}
    if unknown := sorted(weights.keys() - known - table.without_place(faces, known)):
        raise CheckpointError(f"{origin}: {len(unknown)} weights are unknown, the first is {unknown[0]}")
    found: dict[str, tuple[str, Tensor]] = {}
    for ours, theirs in pairs:
        if theirs in weights:
            first, tensor = found.setdefault(ours, (theirs, weights[theirs]))
            _check_tied(origin, first, tensor, theirs, weights[theirs])
    return found


def to_theirs(weights: Weights, table: NameTable, face: Face, image_depth: int, text_depth: int) -> dict[str, Tensor]:
    """Our weights under the names that a model of theirs with one face has."""
    pairs = table.pairs([face], image_depth, text_depth)
    return {theirs: weights[ours] for ours, theirs in pairs if theirs not in table.copies}


def _check_missing(origin: str | Path, weights: Weights, required: list[Line], table: NameTable) -> None:
    held = {ours for ours, theirs in required if theirs in weights}
    missing = [theirs for ours, theirs in required if theirs not in weights and not (table.copies and ours in held)]
    if missing:
        raise CheckpointError(f"{origin}: {len(missing)} weights are missing, the first is {missing[0]}")


def _check_tied(origin: str | Path, first: str, tensor: Tensor, second: str, other: Tensor) -> None:
    if tensor.dtype != other.dtype or not tensor.equal(other):
        raise CheckpointError(
            f"{origin}: {first} and {second} differ; expected a checkpoint whose text encoder and decoder share all "
            "but their self-attentions (one that was trained untied, as for VQA, is not supported)"
        )


def _expand(lines: Iterable[Line], depth: int, root: str) -> Iterator[Line]:
    for ours, theirs in lines:
        theirs = f"{root}.{theirs[2:]}" if theirs.startswith("T.") else theirs
        for number in range(depth if ".N." in theirs else 1):
            for kind in ("weight", "bias") if theirs.endswith("*") else ("",):
                yield _fill(ours, number, kind), _fill(theirs, number, kind)


def _fill(name: str, number: int, kind: str) -> str:
    return name.replace(".N.", f".{number}.").replace("*", kind)


def _depth(names: Collection[str], lines: Iterable[Line], root: str) -> int:
    starts = {
        f"{root}.{start[2:]}" if start.startswith("T.") else start
        for _, theirs in lines
        if ".N." in theirs and (start := theirs.partition("N.")[0])
    }
    numbers = [
        name.removeprefix(start).partition(".")[0] for start in starts for name in names if name.startswith(start)
    ]
    return max((int(number) for number in numbers if number.isdigit()), default=-1) + 1
