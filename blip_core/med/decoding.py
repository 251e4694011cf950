"""What decoding is asked for, and what it gives.

Lengths are those of a caption; in transformers' generate, on which the official code relies, they count [DEC] as well.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from blip_core.settings import Settings, setting


@dataclass(frozen=True)
class GenerationConfig(Settings):
    """How captions are decoded."""

    method: Literal["nucleus", "beam", "greedy"] = setting("nucleus", "how the next token is chosen")
    p: float = setting(0.9, "nucleus: the smallest set of tokens with this probability is sampled from", gt=0, le=1)
    temperature: float = setting(1.0, "nucleus: divides the logits before sampling", gt=0, le=10)
    top_k: int = setting(
        0, "nucleus: the so many most probable tokens, and those equal to the last, are all that p sees; 0: any", ge=0
    )
    beams: int = setting(3, "beam: how many texts are kept at each step", ge=1, le=32)
    max_length: int = setting(20, "longest caption in tokens, prompt counted, [DEC] and [SEP] not", ge=1, le=500)
    min_length: int = setting(5, "shortest caption in tokens, prompt counted, [DEC] and [SEP] not", ge=0, le=500)
    repetition_penalty: float = setting(
        1.0, "above 1, tokens already in prompt or caption become less likely", ge=1, le=10
    )
    prompt: str = setting("", "text that every caption begins with; left out of the result")


class Caption(NamedTuple):
    """A decoded text without prompt and [SEP], and the mean log-probability of its tokens ([SEP] counted).

    The log-probability is the model's own, whatever penalties and limits were put on it.
    """

    tokens: list[int]
    logprob: float
