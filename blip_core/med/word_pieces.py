"""What is known of word pieces before they are read: settings, special tokens, and the files that hold them."""

from dataclasses import dataclass
from typing import cast

from huggingface_hub.errors import HfHubHTTPError

from blip_core.settings import Settings, setting

PAD, UNKNOWN, START, END, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
DECODE, ENCODE = "[DEC]", "[ENC]"
FILES = ("tokenizer.json", "vocab.txt")
HUB_FILES = [*FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"]
# the last is what the library beneath raises: its name differs between versions
HUB_ERRORS = (OSError, ValueError, cast(type[Exception], HfHubHTTPError.__base__))


@dataclass(frozen=True)
class TokenizerConfig(Settings):
    """Where the word pieces come from."""

    source: str = setting(
        "bert-base-uncased", "'train' learns word pieces from the training texts; else a name on the hub or a folder"
    )
    vocabulary: int = setting(30522, "word pieces to learn, when source is 'train'", ge=64, le=100_000)
    max_tokens: int = setting(35, "longest text in tokens, [CLS] and [SEP] counted; the rest is cut", ge=4, le=512)
