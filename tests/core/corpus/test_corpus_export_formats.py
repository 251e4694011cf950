"""Every format of an export, read back with the library that its users have."""

import csv
import hashlib
import io
import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image
from pycocotools.coco import COCO

from blip_core.corpus.export import FORMATS, UIDS, ExportSummary, export_corpus

if TYPE_CHECKING:
    from conftest import Published


def export(published: "Published", folder: Path, format: str, **options: Any) -> ExportSummary:
    options = {"human": published.human, **options}
    return export_corpus(published.workspace, folder, format, **options)


def expected_images(published: "Published") -> dict[str, bytes]:
    """The stored bytes by their sha256, from the files themselves."""
    images = []
    for shard in published.workspace.shard_paths():
        images += [image for image in pq.read_table(shard)["image"].to_pylist() if image]
    images += pq.read_table(published.human.path)["image"].to_pylist()
    return {hashlib.sha256(image).hexdigest(): image for image in images}


def identity(row: dict) -> tuple:
    return row["uid"], row["source"], row["candidate"]


@pytest.mark.parametrize("format", [*FORMATS, UIDS])
def test_sha256sum_accepts_the_checksums_of_all_files(format: str, published: "Published", tmp_path: Path) -> None:
    if format == UIDS:
        name_uids_in_hexadecimal(published)
    export(published, tmp_path / "out", format)
    check = subprocess.run(
        ["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=tmp_path / "out", capture_output=True, text=True, check=False
    )
    assert check.returncode == 0, check.stdout + check.stderr
    summed = {line.split(":")[0] for line in check.stdout.splitlines()}
    assert summed == {path.name for path in (tmp_path / "out").iterdir()} - {"SHA256SUMS"}


def test_datasets_load_the_parquet_files_and_show_pictures(
    shared_published: "Published", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(shared_published, tmp_path / "out", "parquet", shard_size=4_000)
    assert len(list((tmp_path / "out").glob("*.parquet"))) > 1
    for arguments in (
        {"path": "parquet", "data_files": str(tmp_path / "out" / "*.parquet")},
        {"path": "parquet", "data_dir": str(tmp_path / "out")},
        {"path": str(tmp_path / "out")},
    ):
        loaded = datasets.load_dataset(**arguments, split="train", cache_dir=str(tmp_path / "cache"))
        assert loaded.features["image"] == datasets.Image()
        assert sorted(map(identity, loaded)) == sorted(map(identity, shared_published.rows))
    rows = {identity(row): row for row in shared_published.rows}
    for row in loaded:
        assert isinstance(row["image"], Image.Image)
        assert row["image"].size == (row["width"], row["height"])
        assert {name: row[name] for name in row if name != "image"} == rows[identity(row)]
    images = expected_images(shared_published)
    for row in loaded.cast_column("image", datasets.Image(decode=False)):
        assert row["image"]["bytes"] == images[row["image_sha256"]]
        assert row["image"]["path"].endswith(".jpg" if row["image"]["bytes"][:2] == b"\xff\xd8" else ".png")


def test_parquet_files_have_a_page_index_and_the_types_of_the_corpus(
    shared_published: "Published", tmp_path: Path
) -> None:
    export(shared_published, tmp_path / "out", "parquet")
    (path,) = (tmp_path / "out").glob("*.parquet")
    group = pq.read_metadata(path).row_group(0)
    for column in range(group.num_columns):
        assert group.column(column).has_offset_index
        assert group.column(column).has_column_index
        assert group.column(column).compression == "ZSTD"
    corpus = pq.read_schema(next(shared_published.workspace.round(1).corpus.glob("*.parquet")))
    schema = pq.read_schema(path)
    assert schema.names == ["image", *corpus.names]
    assert [schema.field(name) for name in corpus.names] == list(corpus)


def test_an_inserted_pair_leaves_most_of_the_pages_of_the_images_as_they_were(
    published: "Published", tmp_path: Path
) -> None:
    """What content-defined chunks are for: without them every page behind the pair would have other bytes."""
    shard = published.workspace.shard("aaaa000000000001")
    table = pq.read_table(shard)
    noise = np.random.default_rng(0).bytes
    images = [noise(600_000).hex().encode() if image else None for image in table["image"].to_pylist()]
    table = table.set_column(table.schema.get_field_index("image"), table.schema.field("image"), [images])
    pq.write_table(table, shard)
    export(published, tmp_path / "all", "parquet", where="shard = 'aaaa000000000001'")
    export(published, tmp_path / "fewer", "parquet", where="shard = 'aaaa000000000001' AND uid <> 'aaaa-1'")

    def blocks(folder: Path) -> set[bytes]:
        """The chunks of the file, wherever they lie: those between places that the bytes themselves decide."""
        data = np.frombuffer((folder / "train-00000.parquet").read_bytes(), np.uint8).astype(np.uint64)
        weights = np.uint64(31) ** np.arange(32, dtype=np.uint64)
        hashes = np.convolve(data, weights, mode="valid")
        cuts = np.flatnonzero(hashes % np.uint64(4096) == 0)
        return {chunk.tobytes() for chunk in np.split(data.astype(np.uint8), cuts)}

    every, fewer = blocks(tmp_path / "all"), blocks(tmp_path / "fewer")
    assert len(fewer) > 100
    assert len(fewer - every) < 0.25 * len(fewer)


def test_webdataset_reads_the_tars(shared_published: "Published", tmp_path: Path) -> None:
    summary = export(shared_published, tmp_path / "out", "webdataset", shard_size=40_000)
    tars = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    assert len(tars) == summary.files > 1
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    abouts = [json.loads(sample["json"]) for sample in samples]
    assert sorted(map(identity, abouts)) == sorted(map(identity, shared_published.rows))
    assert len({sample["__key__"] for sample in samples}) == len(samples)
    images = expected_images(shared_published)
    for sample, about in zip(samples, abouts, strict=True):
        kind = "png" if "png" in sample else "jpg"
        assert set(sample) == {"__key__", "__url__", "__local_path__", kind, "txt", "json"}
        assert sample[kind] == images[about["sha256"]]
        assert sample["txt"].decode() == about["text"]
        assert sample["__key__"] == about["key"]
        assert "." not in sample["__key__"]
        if about["source"] != "human":
            assert (about["original_width"], about["original_height"]) == (400, 300)
    decoded = webdataset.WebDataset(tars, shardshuffle=False).decode("pil").to_tuple("jpg;png", "txt")
    assert {image.mode for image, _ in decoded} == {"RGB"}
    sizes = json.loads((tmp_path / "out" / "sizes.json").read_text())
    assert sizes == {Path(tar).name: len(list(webdataset.WebDataset(tar, shardshuffle=False))) for tar in tars}


def name_uids_in_hexadecimal(published: "Published") -> None:
    """The uids of the workspace become numbers: of 32 digits in one part, of 20 in the other; one stays as it was."""
    for part in sorted(published.workspace.round(1).corpus.glob("[ab]*.parquet")):
        table = pq.read_table(part)
        digits = 32 if part.name.startswith("a") else 20
        uids = [
            hashlib.sha256(uid.encode()).hexdigest()[:digits] if not uid.endswith("4") else f"{uid}?"
            for uid in table["uid"].to_pylist()
        ]
        pq.write_table(table.set_column(0, "uid", [uids]), part)


def test_datacomps_resharder_finds_the_uids_in_the_list(published: "Published", tmp_path: Path) -> None:
    name_uids_in_hexadecimal(published)
    summary = export(published, tmp_path / "out", UIDS)
    rows = [
        row for part in published.workspace.round(1).corpus.glob("[ab]*") for row in pq.read_table(part).to_pylist()
    ]
    chosen = {row["uid"] for row in rows if not row["uid"].endswith("?")}
    assert summary.left_out == {"no_datacomp_uid": 3 + sum(row["uid"].endswith("?") for row in rows)}
    # As the resharder does: mapped into memory, its type asserted, a sample's uid looked up by halves.
    subset = np.load(tmp_path / "out" / "uids.npy", mmap_mode="r")
    u16 = np.dtype("u8,u8")
    assert subset.dtype == u16
    assert subset.shape == (len(chosen),) == (summary.pairs,)
    others = {hashlib.sha256(uid.encode()).hexdigest()[:32] for uid in chosen}
    for uid in chosen | others:
        key = np.array([divmod(int(uid, 16), 2**64)], u16)[0]
        found = np.searchsorted(subset, key, "right") - np.searchsorted(subset, key, "left")
        assert found == (uid in chosen)


def test_blips_lists_hold_url_and_caption_of_every_pair_that_has_a_url(
    shared_published: "Published", tmp_path: Path
) -> None:
    summary = export(shared_published, tmp_path / "out", "blip", shard_size=300)
    files = sorted((tmp_path / "out").glob("pairs-*.json"))
    assert len(files) > 1
    pairs = [pair for file in files for pair in json.loads(file.read_text())]
    expected = [{"url": row["url"], "caption": row["text"]} for row in shared_published.rows if row["url"]]
    assert sorted(pairs, key=str) == sorted(expected, key=str)
    assert summary.left_out == {"no_url": 3}


def test_pycocotools_read_the_captions_and_the_tars_have_the_files(
    shared_published: "Published", tmp_path: Path
) -> None:
    export(shared_published, tmp_path / "coco", "coco")
    (path,) = (tmp_path / "coco").glob("captions-*.json")
    coco = COCO(str(path))
    found = {
        (coco.imgs[note["image_id"]]["uid"], note["source"], note["caption"])
        for note in coco.loadAnns(coco.getAnnIds())
    }
    assert found == {(row["uid"], row["source"], row["text"]) for row in shared_published.rows}
    sizes = {row["uid"]: (row["width"], row["height"]) for row in shared_published.rows}
    assert {image["uid"]: (image["width"], image["height"]) for image in coco.imgs.values()} == sizes
    assert [len(coco.getAnnIds(imgIds=image)) for image in coco.getImgIds()].count(2) > 0
    export(shared_published, tmp_path / "tars", "webdataset")
    members = {}
    for sample in webdataset.WebDataset(str(tmp_path / "tars" / "00000000.tar"), shardshuffle=False):
        members |= {f"{sample['__key__']}.{kind}": sample[kind] for kind in ("jpg", "png") if kind in sample}
    for image in coco.imgs.values():
        opened = Image.open(io.BytesIO(members[image["file_name"]]))
        assert opened.size == (image["width"], image["height"])


def test_numbers_of_coco_files_are_those_of_the_whole_export(shared_published: "Published", tmp_path: Path) -> None:
    export(shared_published, tmp_path / "out", "coco", shard_size=700)
    files = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").glob("captions-*.json"))]
    assert len(files) > 1
    notes = [note["id"] for file in files for note in file["annotations"]]
    assert notes == list(range(1, len(shared_published.rows) + 1))
    by_number: dict[int, set[str]] = {}
    for file in files:
        assert {note["image_id"] for note in file["annotations"]} == {image["id"] for image in file["images"]}
        for image in file["images"]:
            by_number.setdefault(image["id"], set()).add(json.dumps(image))
    assert {len(images) for images in by_number.values()} == {1}
    assert len(by_number) == len({row["uid"] for row in shared_published.rows})


def test_csv_has_every_row_with_the_columns_of_the_corpus(shared_published: "Published", tmp_path: Path) -> None:
    summary = export(shared_published, tmp_path / "out", "csv", human=None, shard_size=2_000)
    files = sorted((tmp_path / "out").glob("corpus-*.csv"))
    assert len(files) > 1
    rows = []
    for file in files:
        with file.open(newline="", encoding="utf-8") as lines:
            rows += list(csv.DictReader(lines))
    assert summary.left_out == {}
    assert list(rows[0]) == list(shared_published.rows[0])
    expected = {identity(row): row for row in shared_published.rows}
    for row in rows:
        original = expected.pop((row["uid"], row["source"], int(row["candidate"])))
        for name, value in original.items():
            kind = type(value)
            assert (kind(row[name]) if value is not None else row[name] or None) == pytest.approx(value), name
    assert not expected
