"""BERT's WordPiece with two more tokens: [DEC] opens a decoded text, [ENC] an image-grounded encoding (BLIP, 3.1).

Loaded by name, from a folder, or trained on the project's own texts, which needs no network.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download
from tokenizers import Tokenizer as WordPieceTokenizer
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from blip_core import stores
from blip_core.copies import local_copy
from blip_core.errors import CheckpointError, InputError, first_line
from blip_core.med.word_pieces import DECODE, ENCODE, END, FILES, HUB_ERRORS, HUB_FILES, MASK, PAD, START, UNKNOWN
from blip_core.texts import candidate_text


class TokenBatch(NamedTuple):
    """Texts as token ids, padded on the right to the longest of the batch."""

    ids: Tensor  # (B, L) int64
    mask: Tensor  # (B, L) bool, False where padding


class Tokenizer:
    """WordPiece over cleaned captions; every text becomes [CLS] pieces [SEP].

    [DEC] and [ENC] are added, behind all words, where they are not known yet; `added` names those.
    """

    def __init__(self, pieces: PreTrainedTokenizerFast) -> None:
        self.added = [token for token in (DECODE, ENCODE) if token not in pieces.get_vocab()]
        pieces.add_special_tokens({"bos_token": DECODE, "additional_special_tokens": [ENCODE]})
        self.pieces = pieces
        self.pad_id = self._id(PAD)
        self.start_id = self._id(START)
        self.end_id = self._id(END)
        self.decode_id = self._id(DECODE)
        self.encode_id = self._id(ENCODE)

    def _id(self, token: str) -> int:
        found = self.pieces.convert_tokens_to_ids(token)
        if not isinstance(found, int) or (found == self.pieces.unk_token_id and token != UNKNOWN):
            raise CheckpointError(f"tokenizer: has no {token} token; a BERT WordPiece tokenizer is needed")
        return found

    def __len__(self) -> int:
        return len(self.pieces)

    @property
    def max_tokens(self) -> int:
        """The longest text in tokens, [CLS] and [SEP] counted; kept with the tokenizer."""
        return self.pieces.model_max_length

    def __call__(
        self, texts: Iterable[str], max_tokens: int | None = None, fixed: bool = False, prompt: str = ""
    ) -> TokenBatch:
        """Token ids of B texts, which are cleaned first.

        Args:
            max_tokens: where they are cut; None for the tokenizer's own limit.
            fixed: pads all of them to that length, for programs that are compiled for one shape.
            prompt: stands before every text, as it is.
        """
        cleaned = [f"{prompt} {clean_caption(text)}".strip() for text in texts]
        encoded = self.pieces(
            cleaned,
            truncation=True,
            max_length=max_tokens,
            padding="max_length" if fixed else "longest",
            return_tensors="pt",
        )
        return TokenBatch(encoded["input_ids"], encoded["attention_mask"].bool())

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens left out."""
        return str(self.pieces.decode(list(ids), skip_special_tokens=True)).strip()

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which transformers reads as well."""
        self.pieces.save_pretrained(folder)

    @classmethod
    def load(cls, source: str | Path, max_tokens: int | None = None) -> "Tokenizer":
        """From a folder, or by a name that transformers knows. Raises CheckpointError where there is none.

        Args:
            max_tokens: replaces the limit that was saved with it.
        """
        folder = _folder(source)
        if not any((folder / name).is_file() for name in FILES):
            # without its files, some classes of transformers make a tokenizer of no words
            raise CheckpointError(f"tokenizer {source}: the folder has neither {' nor '.join(FILES)}")
        try:
            pieces: Any = AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # what reads tokenizer.json raises nothing narrower
            raise CheckpointError(f"tokenizer {source}: cannot be read ({first_line(error)})") from error
        if not isinstance(pieces.model_max_length, int | float):
            raise CheckpointError(f"tokenizer {source}: model_max_length is {pieces.model_max_length!r}, not a number")
        if max_tokens:
            pieces.model_max_length = max_tokens
        return cls(pieces)

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary: int, max_tokens: int) -> "Tokenizer":
        """Learns word pieces from texts: every letter, then the most frequent whole words (ties by spelling).

        Frequent words are kept whole and rare ones fall back to letters, so the outcome depends on the texts
        alone, in whatever order they come. Raises InputError where the texts hold no word.
        """
        counts = _word_counts(texts)
        if not counts:
            raise InputError("tokenizer: the training texts hold no word to learn from")
        letters = sorted({letter for word in counts for letter in word})
        units = [PAD, UNKNOWN, START, END, MASK, *letters, *(f"##{letter}" for letter in letters)]
        known = set(units)
        by_count = sorted((word for word in counts if word not in known), key=lambda word: (-counts[word], word))
        units += by_count[: max(0, vocabulary - len(units))]
        return cls(_pieces({unit: index for index, unit in enumerate(units)}, max_tokens))


def _folder(source: str | Path) -> Path:
    """The folder itself, or one with the files of that name on the hub.

    They are fetched first, and then read: transformers would ask a missing network over and over.
    """
    if stores.is_url(source):
        return local_copy(stores.located(source))
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(str(source), allow_patterns=HUB_FILES))
    except HUB_ERRORS as error:
        raise CheckpointError(
            f"tokenizer {source}: neither a tokenizer folder nor a name that can be loaded ({first_line(error)}); "
            f"where there is no network, give the path of a folder that holds {' or '.join(FILES)}"
        ) from error


def _word_counts(texts: Iterable[str]) -> dict[str, int]:
    normalize, split = BertNormalizer(lowercase=True), BertPreTokenizer()
    counts: dict[str, int] = {}
    for text in texts:
        for word, _ in split.pre_tokenize_str(normalize.normalize_str(clean_caption(text))):
            counts[word] = counts.get(word, 0) + 1
    return counts


def _pieces(vocabulary: dict[str, int], max_tokens: int) -> PreTrainedTokenizerFast:
    word_pieces = WordPieceTokenizer(WordPiece(vocabulary, unk_token=UNKNOWN, max_input_chars_per_word=100))
    word_pieces.normalizer = BertNormalizer(lowercase=True)
    word_pieces.pre_tokenizer = BertPreTokenizer()
    word_pieces.decoder = WordPieceDecoder(prefix="##")
    word_pieces.post_processor = TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, vocabulary[START]), (END, vocabulary[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=word_pieces,
        model_max_length=max_tokens,
        pad_token=PAD,
        unk_token=UNKNOWN,
        cls_token=START,
        sep_token=END,
        mask_token=MASK,
    )


def clean_caption(text: str, max_words: int = 30) -> str:
    """The official `pre_caption`: lower case, some punctuation to spaces, at most `max_words` words.

    Of what can be seen, and of so many characters as a caption may have (blip_core.texts).
    Source: salesforce/BLIP, data/utils.py.
    """
    lowered = re.sub(r"([.!\"()*#:;~])", " ", candidate_text(text).text.lower())
    return " ".join(lowered.split()[:max_words])
