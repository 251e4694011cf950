"""Decoding in fixed shapes, so that each token of a batch is one run of the same graph: on a GPU, a CUDA graph.

The text's keys and values have a place for every token of the longest caption. Which place is next, which rows are
finished and what was chosen are tensors, written in place; the host asks only now and then whether all rows are
finished. The captions are those that `generation.sample` and `generation.greedy` give.
"""

from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from blip_core.med.decoding import Caption, GenerationConfig
from blip_core.med.med import MED
from blip_core.med.next_token import restrict
from blip_core.med.sampling import nucleus
from blip_core.med.text_transformer import CrossKeys, KeysValues

ASK_EVERY = 4  # tokens between two questions of the host whether all rows are finished
WARM_UP_RUNS = 3  # on the stream of the capture, as torch.cuda.make_graphed_callables has it


class Plan(NamedTuple):
    """What the captions of all batches share. `prompt` begins with [DEC]."""

    prompt: tuple[int, ...]
    end_id: int
    pad_id: int
    config: GenerationConfig

    @property
    def given(self) -> int:
        """Tokens of the prompt, [DEC] not counted: the place after which captions are free."""
        return len(self.prompt) - 1


class State(NamedTuple):
    """What a step reads and writes, of R rows and P = max_length places, at addresses that stay."""

    image: CrossKeys  # of B images; R / B rows, one after the other, look at each
    text: tuple[KeysValues, ...]  # of each layer, (R, H, P, D / H); places to come are masked
    tokens: Tensor  # (R, 1 + P) int64, [DEC] first, [PAD] after a caption's [SEP]
    logprobs: Tensor  # (R, P) float32, of the token after each place
    uniforms: Tensor  # (R, P) float64, of the token after each place
    finished: Tensor  # (R,) bool
    place: Tensor  # (1,) int64, of the last token there is


def step(med: MED, state: State, plan: Plan) -> None:
    """One more token for every row, and everything that follows from it. Never waits for the host."""
    place, end_id, config = state.place, plan.end_id, plan.config
    logits = _logits(med, state)
    scores = restrict(logits, _said(state), place, end_id, config)
    if config.method == "greedy":
        chosen = scores.argmax(dim=-1)
    else:
        chosen = nucleus(scores, state.uniforms.index_select(1, place).squeeze(1), config, by_search=True)
    logprob = F.log_softmax(logits, dim=-1).gather(1, chosen[:, None])
    free = (place >= plan.given) & ~state.finished  # (R,)
    prompted = state.tokens.index_select(1, place + 1).squeeze(1)  # [PAD] after the prompt
    tokens = torch.where(free, chosen, prompted)
    state.tokens.index_copy_(1, place + 1, tokens[:, None])
    state.logprobs.index_copy_(1, place, logprob.where(free[:, None], 0.0))
    state.finished.logical_or_(free & (chosen == end_id))
    place.add_(1)


def _logits(med: MED, state: State) -> Tensor:
    """Logits (R, V) float32 after the last token, whose keys and values are written to its place."""
    place, image_mask = state.place, state.image.mask
    hidden = med.text.embed(state.tokens.index_select(1, place), place)  # (R, 1, D)
    seen = (torch.arange(state.text[0][0].shape[2], device=place.device) <= place)[None, None, None, :]
    shown = None if image_mask is None else image_mask[:, None, None, :]
    for layer, text, image in zip(med.text.layers, state.text, state.image.layers, strict=True):
        for kept, new in zip(text, layer.text_keys_values(hidden, "decoder"), strict=True):
            kept.index_copy_(2, place, new)
        hidden = layer(hidden, "decoder", seen, text, image, shown)
    return med.text.predict(hidden[:, -1]).float()


def _said(state: State) -> Tensor:
    """The tokens so far (R, 1 + P); at places to come stands [DEC], which was said as well."""
    places = torch.arange(state.tokens.shape[1], device=state.place.device)
    return state.tokens.where(places <= state.place, state.tokens[:, :1])


class StaticDecoder:
    """Captions for batch after batch of up to B images, `captions` of each, all by one graph.

    The model's weights must stay where they are, and one thread at a time may use it.

    Args:
        image: of a whole batch; others may have fewer images, of the same shape and type.
        captions: rows that each image has, one after the other.
    """

    def __init__(self, med: MED, image: CrossKeys, captions: int, plan: Plan) -> None:
        med.require("decoder")
        self.plan = plan
        self.captions = captions
        self.state = _empty_state(image, captions, plan)
        self._replay: Callable[[], None] | None = None

    def fits(self, image: CrossKeys, captions: int, plan: Plan) -> bool:
        """Whether it can decode such a batch."""
        kept = self.state.image
        return (
            (captions, plan) == (self.captions, self.plan) and len(image) <= len(kept) and _kind(image) == _kind(kept)
        )

    def decode(self, med: MED, image: CrossKeys, uniforms: Tensor | None) -> list[Caption]:
        """Captions of the rows, `captions` for each image.

        Args:
            med: the one it was made for.
            uniforms: (R, max_length) in [0, 1), the rows' random numbers; None for greedy.
        """
        rows = len(image) * self.captions
        run = self._graph(med) if image.device.type == "cuda" else lambda: step(med, self.state, self.plan)
        self._begin(image, uniforms, rows)
        for place in range(self.plan.config.max_length):
            run()
            if place % ASK_EVERY == ASK_EVERY - 1 and self.state.finished.all():
                break
        return self._captions(rows)

    def _begin(self, image: CrossKeys, uniforms: Tensor | None, rows: int) -> None:
        state = self.state
        for kept, new in zip(state.image.layers, image.layers, strict=True):
            kept[0][: len(image)].copy_(new[0])
            kept[1][: len(image)].copy_(new[1])
        if state.image.mask is not None and image.mask is not None:
            state.image.mask[: len(image)].copy_(image.mask)
        if uniforms is not None:
            # the first number is for the token after the prompt
            places = uniforms.shape[1]
            given = min(self.plan.given, places)
            state.uniforms[:rows, given:].copy_(uniforms[:, : places - given])
        _rewind(state, self.plan)
        state.finished[rows:] = True

    def _graph(self, med: MED) -> Callable[[], None]:
        if self._replay is None:
            compiled = torch.compile(step, fullgraph=True, dynamic=False)
            self._replay = _captured(
                lambda: compiled(med, self.state, self.plan), lambda: _rewind(self.state, self.plan)
            )
        return self._replay

    def _captions(self, rows: int) -> list[Caption]:
        first = self.plan.given
        texts, logprobs = self.state.tokens[:rows, 1 + first :].tolist(), self.state.logprobs[:rows, first:].tolist()
        return [_caption(text, own, self.plan.end_id) for text, own in zip(texts, logprobs, strict=True)]


_decoders: WeakKeyDictionary[MED, StaticDecoder] = WeakKeyDictionary()


def static_decoder(med: MED, image: CrossKeys, captions: int, plan: Plan) -> StaticDecoder:
    """The decoder that the model's last batch had, where it fits this one too: a graph is captured once."""
    decoder = _decoders.get(med)
    if decoder is None or not decoder.fits(image, captions, plan):
        _decoders.pop(med, None)  # its memory is free before the new one takes its own
        decoder = None
        decoder = _decoders[med] = StaticDecoder(med, image, captions, plan)
    return decoder


def _empty_state(image: CrossKeys, captions: int, plan: Plan) -> State:
    places = plan.config.max_length
    device, rows = image.device, len(image) * captions

    def text(like: Tensor) -> Tensor:
        return like.new_zeros(rows, like.shape[1], places, like.shape[3])

    state = State(
        image=CrossKeys(
            tuple((keys.clone(), values.clone()) for keys, values in image.layers),
            None if image.mask is None else image.mask.clone(),
        ),
        text=tuple((text(keys), text(values)) for keys, values in image.layers),
        tokens=torch.zeros(rows, 1 + max(places, plan.given), dtype=torch.int64, device=device),
        logprobs=torch.zeros(rows, places, device=device),
        uniforms=torch.zeros(rows, places, dtype=torch.float64, device=device),
        finished=torch.zeros(rows, dtype=torch.bool, device=device),
        place=torch.zeros(1, dtype=torch.int64, device=device),
    )
    _rewind(state, plan)
    return state


def _rewind(state: State, plan: Plan) -> None:
    """Every row back to the prompt."""
    state.tokens.fill_(plan.pad_id)
    state.tokens[:, : len(plan.prompt)] = torch.tensor(plan.prompt, device=state.tokens.device)
    state.logprobs.zero_()
    state.finished.fill_(False)
    state.place.zero_()


def _kind(image: CrossKeys) -> tuple[object, ...]:
    shapes = tuple((tensor.shape[1:], tensor.dtype) for layer in image.layers for tensor in layer)
    return shapes, image.device, image.mask is None


def _caption(text: list[int], logprobs: list[float], end_id: int) -> Caption:
    ended = end_id in text
    length = text.index(end_id) if ended else len(text)
    return Caption(text[:length], sum(logprobs[: length + ended]) / max(1, length + ended))


def _captured(run: Callable[[], None], rewind: Callable[[], None]) -> Callable[[], None]:
    """Replays `run` as a CUDA graph; before the capture it is called a few times, each time after `rewind`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_RUNS):
            rewind()
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # other threads may copy pictures to the device meanwhile
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        run()
    return graph.replay
