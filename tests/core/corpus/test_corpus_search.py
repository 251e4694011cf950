"""Search among images in SQL, and the macros: against numpy, against hand-made rows, and where they cannot work."""

import json
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pytest
import torch
from services.filters import save_filter

from blip_core.corpus.catalog import build_catalog
from blip_core.corpus.macros import MACROS
from blip_core.corpus.query import run_query
from blip_core.corpus.schemas import EMBEDDING_VERSION, FILTER_KEY, embedding_schema, write_part
from blip_core.corpus.selection import publish_shard
from blip_core.errors import QueryError
from blip_core.files import write_json
from blip_core.med.checkpoint import load_med
from blip_core.workspace import Workspace

WIDTH = 16
SCENES = {"aaaa-1": "a red circle", "bbbb-2": "two green rings", "bbbb-4": "a blue square under a star"}
"""What some of the workspace's ten images show; the others show nothing in particular."""


@torch.inference_mode()
def embedded(checkpoint: Path, text: str) -> np.ndarray:
    """A text's embedding by the whole model, as it is loaded for scoring."""
    loaded = load_med(checkpoint)
    return loaded.med.embed_text(*loaded.tokenizer([text]))[0].numpy()


def write_embeddings(workspace: Workspace, round: int, digest: str, vectors: dict[str, np.ndarray]) -> None:
    for shard in workspace.shard_paths():
        uids = sorted(uid for uid in vectors if uid.startswith(shard.stem[:4]))
        rows = [{"uid": uid, "embedding": list(vectors[uid].astype(np.float16))} for uid in uids]
        table = pa.Table.from_pylist(rows, embedding_schema(WIDTH)).append_column(
            "candidate", pa.array([0] * len(uids))
        )
        target = workspace.round(round).embeddings / shard.name
        write_part(target, table, EMBEDDING_VERSION, "mark", {FILTER_KEY: digest})


def publish(workspace: Workspace, round: int) -> None:
    for annotation in sorted(workspace.round(1).annotations.glob("*.parquet")):
        shard = workspace.shard(annotation.stem)
        publish_shard(annotation, shard, workspace.round(round).corpus / annotation.name, "true", round)


def make_vectors(checkpoint: Path) -> dict[str, np.ndarray]:
    """Of length 1: near the embedding of what an image shows, or anywhere."""
    draw = np.random.default_rng(0)
    vectors = {}
    for uid in (f"{shard}-{number}" for shard in ("aaaa", "bbbb") for number in range(5)):
        vector = draw.normal(size=WIDTH)
        if uid in SCENES:
            vector = embedded(checkpoint, SCENES[uid]) + 0.02 * vector
        vectors[uid] = (vector / np.linalg.norm(vector)).astype(np.float32)
    return vectors


@pytest.fixture
def searched(workspace: Workspace) -> tuple[Workspace, dict[str, np.ndarray]]:
    """Round 1, published, with the embeddings of its ten images and the Filter that made them."""
    made = workspace.round(1)
    digest = save_filter(made.filter)
    vectors = make_vectors(made.filter)
    write_embeddings(workspace, 1, digest, vectors)
    publish(workspace, 1)
    return workspace, vectors


Searched = tuple[Workspace, dict[str, np.ndarray]]


@pytest.mark.parametrize(("uid", "text"), SCENES.items())
def test_the_image_that_shows_what_is_asked_for_comes_first(searched: Searched, uid: str, text: str) -> None:
    (row,) = run_query(searched[0], f"FROM image_search('{text}', 1)").to_pylist()
    number = uid.partition("-")[2]
    assert (row["uid"], row["url"]) == (uid, f"http://web.test/{uid[:4]}/{number}.jpg")
    assert row["shard"].startswith(uid[:4])
    assert row["caption"] == f"web text {2 * int(number)}"
    assert row["similarity"] > 0.98


def test_images_come_in_the_order_that_numpy_computes(searched: Searched) -> None:
    workspace, vectors = searched
    text = embedded(workspace.round(1).filter, "a star under rings")
    cosines = {uid: float(vector @ text) for uid, vector in vectors.items()}
    expected = sorted(cosines, key=lambda uid: -cosines[uid])
    found = run_query(workspace, "FROM image_search('a star under rings')").to_pylist()
    assert [row["uid"] for row in found] == expected
    assert [row["similarity"] for row in found] == pytest.approx([cosines[uid] for uid in expected], abs=1e-3)
    few = run_query(workspace, "SELECT uid FROM image_search('a star under rings', k := 3)")["uid"].to_pylist()
    assert few == expected[:3]


def test_embed_text_is_the_filters_text_encoder_on_any_number_of_texts(searched: Searched) -> None:
    workspace, _ = searched
    texts = "(SELECT unnest(['a star', 'Two GREEN rings!', '', '#', NULL]) AS text)"
    sql = f"SELECT text, embed_text(text) AS vector FROM {texts}"
    rows = {row["text"]: row["vector"] for row in run_query(workspace, sql).to_pylist()}
    for text in ("a star", "Two GREEN rings!"):
        assert rows[text] == pytest.approx(embedded(workspace.round(1).filter, text), abs=1e-5)
    assert [rows[text] for text in ("", "#", None)] == [None, None, None]
    many = "SELECT count(DISTINCT embed_text('a star ' || i)[1]) AS n, count(*) AS rows FROM range(500) AS r(i)"
    assert run_query(workspace, many).to_pylist() == [{"n": 1, "rows": 500}]
    assert run_query(workspace, "FROM image_search('')").num_rows == 0


def test_an_image_finds_its_like_by_its_own_embedding(searched: Searched) -> None:
    own = "(SELECT embedding FROM embeddings WHERE uid = 'aaaa-1')"
    rows = run_query(searched[0], f"SELECT uid, similarity FROM nearest({own}, 2)").to_pylist()
    assert rows[0]["uid"] == "aaaa-1"
    assert rows[0]["similarity"] == pytest.approx(1, abs=1e-6)


def test_near_duplicates_are_the_pairs_that_numpy_finds(searched: Searched) -> None:
    workspace, vectors = searched
    vectors["aaaa-0"] = vectors["bbbb-3"] = vectors["aaaa-1"]
    write_embeddings(workspace, 1, load_med(workspace.round(1).filter).digest, vectors)
    uids = sorted(vectors)
    for threshold in (0.99, 0.2):
        pairs = {(a, b) for a in uids for b in uids if a < b and float(vectors[a] @ vectors[b]) >= threshold}
        found = run_query(workspace, f"SELECT uid, other FROM near_duplicates({threshold})").to_pylist()
        assert {(row["uid"], row["other"]) for row in found} == pairs
    assert {("aaaa-0", "aaaa-1"), ("aaaa-1", "bbbb-3")} <= pairs


def test_only_the_promoted_round_is_searched(searched: Searched) -> None:
    workspace, vectors = searched
    digest = save_filter(workspace.round(2).filter, seed=5)
    write_embeddings(workspace, 2, digest, {uid: -vector for uid, vector in vectors.items()})
    publish(workspace, 2)
    text = "SELECT uid FROM image_search('a red circle', 1)"
    other = embedded(workspace.round(2).filter, "a red circle")
    assert run_query(workspace, text)["uid"].to_pylist() == [max(vectors, key=lambda uid: -float(vectors[uid] @ other))]
    write_json(workspace.promoted, {"round": 1, "history": []})
    assert run_query(workspace, text)["uid"].to_pylist() == ["aaaa-1"]
    rounds = "SELECT round, count(*) AS images, count(DISTINCT shard) AS shards FROM embeddings GROUP BY ALL ORDER BY 1"
    assert [tuple(row.values()) for row in run_query(workspace, rounds).to_pylist()] == [(1, 10, 2), (2, 10, 2)]


def test_macros_of_noise_and_agreement_are_what_is_worked_out_by_hand(workspace: Workspace) -> None:
    rows = "(VALUES (0.9, 0.8), (0.7, 0.1), (0.2, 0.3), (0.1, 0.6), (0.8, 0.9), (NULL, 0.9)) AS t(itm, other)"
    sql = f"SELECT noise_rate(itm), agreement(itm > 0.5, other > 0.5), kappa(itm > 0.5, other > 0.5) FROM {rows}"
    # both yes 2, both no 1, one each way 1: 3 of 5 agree; by chance 0.6 * 0.6 + 0.4 * 0.4
    expected = [1 - 2.7 / 5, 3 / 5, (0.6 - 0.52) / (1 - 0.52)]
    assert list(run_query(workspace, sql).to_pylist()[0].values()) == pytest.approx(expected)
    same = "SELECT kappa(true, true) AS k, agreement(true, true) AS a, noise_rate(NULL::FLOAT) AS n"
    assert run_query(workspace, same).to_pylist() == [{"k": None, "a": 1.0, "n": None}]
    by_source = "SELECT source, noise_rate(itm_score) AS noise FROM annotations GROUP BY source ORDER BY source"
    # scores 0.0, 0.1 ... of each shard, the web texts' first; the last one has none
    assert [row["noise"] for row in run_query(workspace, by_source).to_pylist()] == pytest.approx([0.6, 0.6])


@pytest.mark.parametrize(
    "url",
    [
        "https://A.Example/b.jpg",
        "http://user:secret@a.example:8080/?at=c@d.example",
        "http://[2001:db8::1]:80/x",
        "https://a.example",
        "https://a.example?x=http://b.example/",
        "no url",
    ],
)
def test_the_host_of_a_url_is_what_the_standard_library_says(workspace: Workspace, url: str) -> None:
    host = run_query(workspace, f"SELECT host_of('{url}') AS host")["host"][0].as_py()
    assert host.strip("[]") == (urlsplit(url).hostname or "")
    assert run_query(workspace, "SELECT host_of(NULL) AS host")["host"].to_pylist() == [None]


def test_a_file_of_the_workspace_is_read_by_its_name_in_it(workspace: Workspace, tmp_path: Path) -> None:
    odd = Workspace.open(workspace.root.rename(tmp_path / "o'dd [1] *"))
    (odd.root / "mine.csv").write_text("uid,note\naaaa-1,mine\n", encoding="utf-8")
    (tmp_path / "secret.csv").write_text("secret\n1\n", encoding="utf-8")
    mine = "SELECT url, note FROM read_csv(in_workspace('mine.csv')) JOIN images USING (uid)"
    assert run_query(odd, mine).to_pylist() == [{"url": "http://web.test/aaaa/1.jpg", "note": "mine"}]
    build_catalog(odd)
    assert json.loads(plain(odd, mine).stdout) == [["http://web.test/aaaa/1.jpg", "mine"]]
    with pytest.raises(QueryError, match="Permission Error"):
        run_query(odd, "FROM read_csv(in_workspace('../secret.csv'))")


def plain(workspace: Workspace, sql: str) -> subprocess.CompletedProcess[str]:
    """A process that knows DuckDB alone, in the workspace's folder."""
    code = "import duckdb, json, sys; c = duckdb.connect('catalog.duckdb', read_only=True)\n"
    code += "print(json.dumps(c.execute(sys.argv[1]).fetchall()))"
    command = [sys.executable, "-I", "-c", code, sql]
    return subprocess.run(command, cwd=workspace.root, capture_output=True, text=True, check=False)


def test_a_plain_client_has_every_macro_and_is_told_where_texts_are_embedded(searched: Searched) -> None:
    workspace, vectors = searched
    build_catalog(workspace)
    nearest = plain(workspace, f"SELECT uid, url FROM nearest({vectors['aaaa-1'].tolist()}, 1)")
    assert json.loads(nearest.stdout) == [["aaaa-1", "http://web.test/aaaa/1.jpg"]]
    listed = plain(workspace, "SELECT function_name, comment FROM duckdb_functions() WHERE NOT internal")
    assert dict(json.loads(listed.stdout)) == {name: macro.meaning for name, macro in MACROS.items()}
    refused = plain(workspace, "FROM image_search('a red circle', 1)")
    assert refused.returncode == 1
    assert "embed_text is known to `capfilt query` alone" in refused.stderr
    assert "nearest(list, 20)" in refused.stderr


def test_torch_is_imported_by_no_query_that_embeds_no_text(searched: Searched) -> None:
    code = (
        "import sys\nfrom blip_core.corpus.query import run_query\nfrom blip_core.workspace import Workspace\n"
        "for sql in sys.argv[2:]:\n    run_query(Workspace.existing(sys.argv[1]), sql)\n"
        "    print('torch' in sys.modules)"
    )
    others = [
        "SELECT noise_rate(itm_score) FROM corpus",
        "FROM near_duplicates(0.9)",
        "SELECT embedding FROM embeddings",
    ]
    command = [sys.executable, "-c", code, str(searched[0].root), *others, "FROM image_search('a star', 1)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "False", "True"]
    assert done.stderr == ""


def test_a_round_without_embeddings_says_how_they_are_added(workspace: Workspace) -> None:
    publish(workspace, 1)
    for sql in (
        "FROM image_search('a star')",
        "FROM nearest([1.0])",
        "FROM near_duplicates(0.5)",
        "SELECT embed_text('a')",
    ):
        with pytest.raises(QueryError, match=r"round 1 has no embeddings; `capfilt annotate CONFIG\.yaml --round 1`"):
            run_query(workspace, sql)
    assert run_query(workspace, "FROM embeddings").num_rows == 0
    build_catalog(workspace)
    assert "round 1 has no embeddings" in plain(workspace, "FROM nearest([1.0])").stderr


def test_nothing_is_found_before_a_round_is_promoted(workspace: Workspace) -> None:
    assert run_query(workspace, "FROM image_search('a star')").num_rows == 0
    with pytest.raises(QueryError, match="no round is promoted yet"):
        run_query(workspace, "SELECT embed_text('a star')")


def test_a_filter_that_is_not_in_the_workspace_can_be_named_and_must_be_the_one(
    searched: Searched, tmp_path: Path
) -> None:
    workspace, _ = searched
    elsewhere = workspace.round(1).filter.rename(tmp_path / "filter")
    sql = "SELECT uid FROM image_search('a red circle', 1)"
    with pytest.raises(QueryError, match=r"^query: the embeddings of round 1 are of the Filter \w+, which no round of"):
        run_query(workspace, sql)
    assert run_query(workspace, sql, filter=str(elsewhere))["uid"].to_pylist() == ["aaaa-1"]
    save_filter(tmp_path / "other", seed=9)
    with pytest.raises(QueryError, match=r"other: its digest is \w+; the embeddings of round 1 are of the Filter"):
        run_query(workspace, sql, filter=str(tmp_path / "other"))


@pytest.mark.parametrize(
    "sql",
    [
        "FROM image_search((WITH a AS (COPY (SELECT 'x') TO '{inside}/evil') FROM a))",
        "FROM nearest((SELECT content FROM read_text('/etc/passwd')))",
        "SELECT embed_text((SELECT content FROM read_text('/etc/passwd')))",
        "CREATE MACRO evil() AS 1",
        "CREATE OR REPLACE MACRO embed_text(text) AS 1",
        "DROP MACRO nearest",
        "FROM macro_that_is_none('x')",
        "FROM query('FROM image_search(''a star'')')",
    ],
)
def test_macros_and_the_function_open_no_way_out(searched: Searched, sql: str) -> None:
    before = {str(path) for path in searched[0].root.parent.rglob("*")}
    with pytest.raises(QueryError) as caught:
        run_query(searched[0], sql.format(inside=searched[0].root))
    assert "\n" not in str(caught.value)
    assert {str(path) for path in searched[0].root.parent.rglob("*")} == before
