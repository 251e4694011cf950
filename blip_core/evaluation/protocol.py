"""How a trained MED is evaluated: the settings."""

from dataclasses import dataclass

from blip_core.settings import Settings, setting


@dataclass(frozen=True)
class EvaluationConfig(Settings):
    """How a trained MED is evaluated."""

    rerank: int = setting(
        32, "candidates of each query that ITM re-ranks; officially 256 on COCO and 128 on Flickr30K", ge=1
    )
    max_images: int = setting(1000, "held-out images used, the first of the table", ge=2)
    batch_size: int = setting(64, "images encoded at a time", ge=1)
    beam_size: int = setting(3, "beams of a caption; 1 is greedy", ge=1, le=32)
    max_length: int = setting(20, "longest caption in tokens, prompt counted, [DEC] and [SEP] not", ge=1, le=500)
    min_length: int = setting(2, "shortest caption in tokens, prompt counted, [DEC] and [SEP] not", ge=0, le=500)
    repetition_penalty: float = setting(
        1.0, "above 1, tokens already in prompt or caption become less likely", ge=1, le=10
    )
    prompt: str = setting("", "text that every caption begins with; left out of the result")
    examples: int = setting(12, "pictures in each grid of the report", ge=1, le=200)
