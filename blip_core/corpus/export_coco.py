"""Pairs as COCO's captions: one list of images, one of annotations, each of which is one text of an image.

`file_name` is the name that the image has in the WebDataset tars of the same rows. Numbers are those of the whole
export, so that an image whose texts lie in two files is the same in both.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from blip_core.corpus.export_format import Entry, Pair, pair_key

OPENING = '{"info": {"description": "capfilt"}, "licenses": [], "type": "captions", "images": [\n'
MIDDLE, CLOSING = '\n], "annotations": [\n', "\n]}\n"
BETWEEN = ",\n"
FRAME_BYTES = len(OPENING) + len(MIDDLE) + len(CLOSING)

ImageAndAnnotation = tuple[bytes, bytes]


def encode_coco(pair: Pair) -> Entry:
    """The image and the annotation of a pair; the size is that of both, though an image is written once."""
    row, picture = pair.row, pair.picture
    image = {"id": picture.place + 1, "file_name": f"{pair_key(picture.rows[0])}.{picture.extension}"}
    image |= {"width": row["width"], "height": row["height"], "coco_url": row["url"], "uid": row["uid"]}
    annotation = {"id": pair.place + 1, "image_id": image["id"], "caption": row["text"]}
    annotation |= {name: row[name] for name in ("source", "itm_score", "itc_score")}
    encoded = tuple(json.dumps(value, ensure_ascii=False).encode() for value in (image, annotation))
    return Entry(encoded, sum(len(value) + len(BETWEEN) for value in encoded))


def write_coco(path: Path, pairs: Iterator[ImageAndAnnotation]) -> None:
    """Writes one file; the annotations wait in another one until all images are written."""
    with path.open("wb") as file, tempfile.TemporaryFile(dir=path.parent) as annotations:
        file.write(OPENING.encode())
        last = None
        for image, annotation in pairs:
            if image != last:
                file.write(BETWEEN.encode() + image if last else image)
            annotations.write(BETWEEN.encode() + annotation if last else annotation)
            last = image
        file.write(MIDDLE.encode())
        annotations.seek(0)
        shutil.copyfileobj(annotations, file)
        file.write(CLOSING.encode())
