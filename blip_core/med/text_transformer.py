"""One text transformer with three faces (BLIP, figure 2).

A layer owns two self-attentions, one for the encoders and one for the decoder, and one cross-attention and one
feed-forward that all faces use: what BLIP shares is shared by construction, and nothing is tied afterwards.
BERT's shape: post-norm, LayerNorm epsilon 1e-12, exact GELU, learned positions, no token types.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blip_core.med.architecture import FACES, Face

KeysValues = tuple[Tensor, Tensor]
LAYER_NORM_EPSILON = 1e-12


@dataclass(frozen=True)
class CrossKeys:
    """Keys and values of an image batch for every layer's cross-attention: computed once, used by every face.

    Attributes:
        layers: for each layer (keys, values), both (B, H, N, D / H).
        mask: (B, N) bool, False where an image feature is padding; None where nothing is padded.
    """

    layers: tuple[KeysValues, ...]
    mask: Tensor | None = None

    def __len__(self) -> int:
        return self.layers[0][0].shape[0]

    @property
    def device(self) -> torch.device:
        return self.layers[0][0].device

    def select(self, rows: Tensor | slice) -> "CrossKeys":
        """Those of `rows`, (B',) int64 or a slice: an image may come more than once, or not at all."""
        layers = tuple((_rows(keys, rows), _rows(values, rows)) for keys, values in self.layers)
        return CrossKeys(layers, None if self.mask is None else _rows(self.mask, rows))


@dataclass
class DecoderCache:
    """Keys and values of one decoding: the image's, computed once, and the text's, which grow by each step.

    Attributes:
        image: of R rows.
        text: for each layer (keys, values) of the tokens seen so far, both (R, H, length, D / H).
    """

    image: CrossKeys
    text: list[KeysValues] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Text tokens seen so far."""
        return self.text[0][0].shape[2] if self.text else 0

    def select(self, rows: Tensor) -> None:
        """Keeps `rows` (R',) int64 in that order: finished captions leave, beams are reordered."""
        self.image = self.image.select(rows)
        self.text = [(_rows(keys, rows), _rows(values, rows)) for keys, values in self.text]

    def grow(self, layer: int, new: KeysValues) -> KeysValues:
        """The layer's keys and values with those of the new tokens after them, which are kept."""
        if layer == len(self.text):
            self.text.append(new)
        else:
            seen_keys, seen_values = self.text[layer]
            self.text[layer] = (torch.cat([seen_keys, new[0]], dim=2), torch.cat([seen_values, new[1]], dim=2))
        return self.text[layer]


class Attention(nn.Module):
    """Multi-head attention with its output projection and post-norm residual, over text or image features."""

    def __init__(self, width: int, heads: int, dropout: float, source_width: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        source_width = source_width or width
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width, width)
        self.value = nn.Linear(source_width, width)
        self.output = nn.Linear(width, width)
        self.output_dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPSILON)

    def _split(self, features: Tensor) -> Tensor:
        batch, length, width = features.shape
        return features.view(batch, length, self.heads, width // self.heads).transpose(1, 2)  # (B, H, L, D / H)

    def keys_values(self, source: Tensor) -> KeysValues:
        """Keys and values (B, H, N, D / H) of a source (B, N, source width)."""
        return self._split(self.key(source)), self._split(self.value(source))

    def forward(self, hidden: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Hidden (B, L, D) attends to keys and values; `mask`, broadcast to (B, H, L, N), is True where it may.

        Keys and values of B / T rows serve T rows of `hidden` each, which stand one after the other; `mask` is theirs.
        """
        asked = self.query(hidden).view(len(keys), -1, hidden.shape[2])  # (B / T, T L, D)
        attended = F.scaled_dot_product_attention(
            self._split(asked),
            keys,
            values,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        merged = attended.transpose(1, 2).reshape(hidden.shape)
        return self.norm(hidden + self.output_dropout(self.output(merged)))


class FeedForward(nn.Module):
    """Two linear layers with exact GELU between, dropout, and the post-norm residual."""

    def __init__(self, width: int, hidden_width: int, dropout: float) -> None:
        super().__init__()
        self.expand = nn.Linear(width, hidden_width)
        self.contract = nn.Linear(hidden_width, width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPSILON)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden + self.dropout(self.contract(F.gelu(self.expand(hidden)))))


class TextLayer(nn.Module):
    """One layer; `image_width=None` leaves the cross-attention out (the momentum text encoder needs none)."""

    def __init__(
        self, width: int, heads: int, dropout: float, image_width: int | None, faces: tuple[Face, ...]
    ) -> None:
        super().__init__()
        self.self_attention = nn.ModuleDict({face: Attention(width, heads, dropout) for face in faces})
        self.cross_attention = Attention(width, heads, dropout, image_width) if image_width else None
        self.feed_forward = FeedForward(width, 4 * width, dropout)

    def forward(
        self,
        hidden: Tensor,
        face: Face,
        mask: Tensor | None,
        text: KeysValues | None = None,
        image: KeysValues | None = None,
        image_mask: Tensor | None = None,
        first: bool = False,
    ) -> Tensor:
        """Hidden (B, L, D) through self-attention, cross-attention to `image` if there is one, and feed-forward.

        Args:
            mask: what self-attention may look at, broadcast to (B, H, L, L).
            first: the first token's alone, (B, 1, D); `mask` must then be the same for every token.
            text: keys and values of self-attention; None for those of `hidden` alone.
            image: keys and values of cross-attention.
            image_mask: which of them it may look at, broadcast to (B, H, L, N).
        """
        attention = self._attention(face)
        keys, values = attention.keys_values(hidden) if text is None else text
        hidden = attention(hidden[:, :1] if first else hidden, keys, values, mask)
        if image is not None and self.cross_attention is not None:
            hidden = self.cross_attention(hidden, *image, image_mask)
        return self.feed_forward(hidden)

    def text_keys_values(self, hidden: Tensor, face: Face) -> KeysValues:
        """Keys and values of hidden states (B, L, D), for this layer's self-attention."""
        return self._attention(face).keys_values(hidden)

    def image_keys_values(self, image_features: Tensor) -> KeysValues:
        """Keys and values of image features (B, N, image width), for this layer's cross-attention."""
        if self.cross_attention is None:
            raise ValueError("this text transformer has no cross-attention; it was built with image_width=None")
        keys, values = self.cross_attention.keys_values(image_features)
        # they are read many times, by every text; and FSDP2 wants no views of what it gathered
        return keys.contiguous(), values.contiguous()

    def _attention(self, face: Face) -> Attention:
        return cast(Attention, self.self_attention[face])


class TextTransformer(nn.Module):
    """Token ids to hidden states, through the encoder's or the decoder's self-attention, with or without an image."""

    def __init__(
        self,
        vocabulary: int,
        width: int,
        depth: int,
        heads: int,
        image_width: int | None,
        positions: int = 512,
        dropout: float = 0.1,
        faces: tuple[Face, ...] = FACES,
    ) -> None:
        super().__init__()
        self.width = width
        self.faces = faces
        self.checkpointing = False
        self.words = nn.Embedding(vocabulary, width, padding_idx=0)
        self.positions = nn.Embedding(positions, width)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPSILON)
        self.dropout = nn.Dropout(dropout)
        layers = [TextLayer(width, heads, dropout, image_width, faces) for _ in range(depth)]
        self.layers = cast(list[TextLayer], nn.ModuleList(layers))
        if "decoder" in faces:
            self.head_transform = nn.Linear(width, width)
            self.head_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPSILON)
            self.head_bias = nn.Parameter(torch.zeros(vocabulary))
        self.apply(partial(_initialise, width=width))

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None,
        face: Face,
        image: CrossKeys | None = None,
        cache: DecoderCache | None = None,
        first: bool = False,
    ) -> Tensor:
        """Hidden states (B, L, D).

        Args:
            ids: (B, L) int64.
            mask: (B, L) bool, False where padding; None where nothing is padded.
            face: 'encoder' attends both ways, 'decoder' to the left.
            image: keys and values of B images, or of B / T that serve T texts each, one after the other; None skips
                the cross-attention.
            cache: of a decoding under way; replaces `image`, and `ids` are then the new tokens alone.
            first: the encoder's first token alone, (B, 1, D), for which the last layer has less to do.
        """
        past = cache.length if cache is not None else 0
        image = cache.image if cache is not None else image
        hidden = self.embed(ids, torch.arange(past, past + ids.shape[1], device=ids.device))
        allowed = attention_mask(ids.shape[1], past, mask, causal=face == "decoder", device=ids.device)
        image_mask = None if image is None or image.mask is None else image.mask[:, None, None, :]
        for index, layer in enumerate(self.layers):
            text = cache.grow(index, layer.text_keys_values(hidden, face)) if cache is not None else None
            run = partial(checkpoint, layer, use_reentrant=False) if self._recomputes() else layer
            seen = None if image is None else image.layers[index]
            hidden = run(hidden, face, allowed, text, seen, image_mask, first and layer is self.layers[-1])
        return hidden

    def embed(self, ids: Tensor, places: Tensor) -> Tensor:
        """What the layers read of token ids (B, L) at places (L,) of the text: (B, L, D)."""
        return self.dropout(self.norm(self.words(ids) + self.positions(places)))

    def cross_keys(self, image_features: Tensor, image_mask: Tensor | None = None) -> CrossKeys:
        """Keys and values of image features (B, N, image width); `image_mask` (B, N) is False where padding."""
        return CrossKeys(tuple(layer.image_keys_values(image_features) for layer in self.layers), image_mask)

    def predict(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of the next token; the output matrix is the word embedding."""
        transformed = self.head_norm(F.gelu(self.head_transform(hidden)))
        return F.linear(transformed, self.words.weight, self.head_bias)

    def _recomputes(self) -> bool:
        return self.checkpointing and self.training and torch.is_grad_enabled()


def attention_mask(length: int, past: int, mask: Tensor | None, causal: bool, device: torch.device) -> Tensor | None:
    """True where a token may look: (B or 1, 1, length, past + length), or None where it may look everywhere.

    With `past` tokens cached, new token i stands at place past + i and sees all places up to its own.
    """
    allowed = None
    if causal and length > 1:
        ones = torch.ones(length, past + length, dtype=torch.bool, device=device)
        allowed = ones.tril(diagonal=past)[None, None]
    if mask is not None:
        padding = mask[:, None, None, :]
        allowed = padding if allowed is None else allowed & padding
    return allowed


def _rows(tensor: Tensor, rows: Tensor | slice) -> Tensor:
    # the gradient of index_select is faster than that of indexing
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)


def _initialise(module: nn.Module, width: int) -> None:
    """BERT's: normal with deviation 0.02, biases zero.

    0.02 belongs to a width of 768; other widths get the deviation that keeps the same share of the signal, since a
    narrow model with BERT's would hardly look at the image at first.
    """
    deviation = 0.02 * (768 / width) ** 0.5
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=deviation)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
