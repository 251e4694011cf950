"""The tokenizer: learnt from texts, the same whatever their order, and kept with a checkpoint."""

from pathlib import Path

import huggingface_hub
import pytest
import torch
from tokenizers import Tokenizer as WordPieceTokenizer
from tokenizers.models import WordPiece
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from blip_core.errors import CheckpointError, InputError
from blip_core.med import tokenizer
from blip_core.med.tokenizer import Tokenizer, clean_caption

WORDS = ["a red circle", "a red square, under a circle", "two red rings; a star?", "café au lait", "no. 42"]


@pytest.fixture(scope="module")
def learnt() -> Tokenizer:
    return Tokenizer.train(WORDS, vocabulary=200, max_tokens=12)


def test_texts_become_start_pieces_end_and_come_back(learnt: Tokenizer) -> None:
    for text in ("a red circle", "two rings under a square", "café au lait", "a quaint star"):
        ids, mask = learnt([text])
        assert ids[0, 0] == learnt.start_id
        assert ids[0, -1] == learnt.end_id
        assert mask.all()
        assert learnt.decode(ids[0].tolist()) == clean_caption(text).replace("é", "e")


def test_frequent_words_are_one_piece_and_others_fall_back_to_letters(learnt: Tokenizer) -> None:
    assert learnt(["red"]).ids.shape == (1, 3)
    assert learnt(["dare"]).ids.shape == (1, 2 + 4)
    small = Tokenizer.train(["aa aa bb bb bb cc", "ab"], vocabulary=5 + 6 + 2, max_tokens=12)
    assert [len(small([word]).ids[0]) - 2 for word in ("bb", "aa", "cc", "ab")] == [1, 1, 2, 2]


def test_a_letter_never_seen_is_unknown(learnt: Tokenizer) -> None:
    ids = learnt(["a 茶"]).ids[0].tolist()
    assert learnt.pieces.convert_ids_to_tokens(ids) == ["[CLS]", "a", "[UNK]", "[SEP]"]


def test_the_order_of_the_texts_does_not_matter(learnt: Tokenizer) -> None:
    other = Tokenizer.train(reversed(WORDS), vocabulary=200, max_tokens=12)
    assert other.pieces.get_vocab() == learnt.pieces.get_vocab()


def test_dec_and_enc_are_two_more_tokens_of_their_own(learnt: Tokenizer) -> None:
    special = [learnt.pad_id, learnt.start_id, learnt.end_id, learnt.decode_id, learnt.encode_id]
    assert len(set(special)) == 5
    assert learnt.pieces.convert_ids_to_tokens(special) == ["[PAD]", "[CLS]", "[SEP]", "[DEC]", "[ENC]"]
    assert {learnt.decode_id, learnt.encode_id} == {len(learnt) - 2, len(learnt) - 1}
    assert learnt.decode([learnt.decode_id, *learnt(["red star"]).ids[0].tolist(), learnt.encode_id]) == "red star"


def test_a_text_cannot_smuggle_special_tokens_in(learnt: Tokenizer) -> None:
    ids = learnt(["[SEP] red [DEC] [ENC] [PAD]"]).ids[0].tolist()
    assert not {learnt.decode_id, learnt.encode_id, learnt.pad_id, learnt.start_id, learnt.end_id} & set(ids[1:-1])


def test_a_batch_is_padded_to_its_longest_and_cut_at_the_limit(learnt: Tokenizer) -> None:
    ids, mask = learnt(["red", "a red circle"])
    assert ids.shape == (2, 5)
    assert mask.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert ids[0, 3:].tolist() == [learnt.pad_id] * 2
    long = learnt(["a " * 25]).ids
    assert long.shape == (1, 12)
    assert long[0, -1] == learnt.end_id


def test_an_empty_text_is_start_and_end(learnt: Tokenizer) -> None:
    assert learnt(["", "..."]).ids.tolist() == [[learnt.start_id, learnt.end_id]] * 2


def test_a_saved_tokenizer_is_loaded_the_same(learnt: Tokenizer, tmp_path: Path) -> None:
    learnt.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert (len(loaded), loaded.max_tokens) == (len(learnt), 12)
    assert (loaded.decode_id, loaded.encode_id) == (learnt.decode_id, learnt.encode_id)
    texts = [*WORDS, "a " * 25, "unheard of"]
    assert torch.equal(loaded(texts).ids, learnt(texts).ids)
    assert [loaded.decode(row) for row in loaded(texts).ids.tolist()] == [
        learnt.decode(row) for row in learnt(texts).ids.tolist()
    ]
    assert Tokenizer.load(tmp_path, max_tokens=6)(texts).ids.shape[1] == 6
    again = tmp_path / "again"
    loaded.save(again)
    assert sorted(path.name for path in again.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert AutoTokenizer.from_pretrained(again).decode(learnt(["red star"]).ids[0]) == "[CLS] red star [SEP]"


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: neither a tokenizer folder nor a name that can be loaded"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has neither tokenizer\.json nor vocab\.txt"):
        Tokenizer.load(tmp_path)


def test_a_name_is_fetched_from_the_hub_without_the_model(
    learnt: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt.save(tmp_path)

    def fetch(name: str, allow_patterns: list[str]) -> str:
        assert name == "bert-base-somehow"
        assert not [pattern for pattern in allow_patterns if "model" in pattern or "*" in pattern]
        return str(tmp_path)

    monkeypatch.setattr(tokenizer, "snapshot_download", fetch)
    assert torch.equal(Tokenizer.load("bert-base-somehow")(["a red star"]).ids, learnt(["a red star"]).ids)


def test_a_name_without_a_network_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        CheckpointError, match=r"no-such-bert: neither a tokenizer folder nor a name that can be loaded"
    ):
        Tokenizer.load("no-such-bert")


def test_a_tokenizer_without_bert_s_tokens_is_refused() -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=WordPieceTokenizer(WordPiece({"[UNK]": 0}, unk_token="[UNK]")))
    with pytest.raises(CheckpointError, match=r"has no \[PAD\] token"):
        Tokenizer(plain)


def test_texts_without_a_word_teach_nothing() -> None:
    with pytest.raises(InputError, match="no word"):
        Tokenizer.train(["", " ... "], vocabulary=100, max_tokens=12)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("A Red  Circle.", "a red circle"),
        ('"Quoted" (really!): yes; no~', "quoted really yes no"),
        ("tabs\tand\nlines ", "tabs and lines"),
        ("it's a well-known star, isn't it?", "it's a well-known star, isn't it?"),
        ("#hash *bold*", "hash bold"),
        (" ".join(map(str, range(40))), " ".join(map(str, range(30)))),
        ("!!!", ""),
    ],
)
def test_captions_are_cleaned_as_the_official_code_does(text: str, cleaned: str) -> None:
    assert clean_caption(text) == cleaned


def test_cleaning_keeps_as_many_words_as_asked() -> None:
    assert clean_caption("one two three", max_words=2) == "one two"
