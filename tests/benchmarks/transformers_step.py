"""BLIP's pre-training step written on transformers' BLIP modules, what `train_step.py` measures ours against.

The official pre-training (salesforce/BLIP, models/blip_pretrain.py) line by line, with a separate forward pass for
ITC, for ITM's matched pairs, for ITM's negatives and for LM. As transformers' BLIP models are called, each of them
begins at the pixels; with `image_once` they share one encoding of the images, as in the official code. The text
encoder has the decoder's weights but for self-attention, as the official code ties them.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BlipConfig, BlipForConditionalGeneration, BlipForImageTextRetrieval

from blip_core.med.architecture import Architecture
from blip_core.med.lm import LABEL_SMOOTHING
from blip_core.med.med import MED, TEMPERATURE_RANGE
from blip_core.med.transformers_names import TRANSFORMERS


class TransformersPretraining(nn.Module):
    """BLIP_Pretrain of the official code, from transformers' modules."""

    def __init__(
        self, med: MED, architecture: Architecture, queue_size: int, momentum: float, alpha: float, end_id: int
    ) -> None:
        super().__init__()
        self.enc_id, self.dec_id = med.encode_id, med.decode_id
        self.momentum, self.alpha = momentum, alpha
        config = _config(architecture, med, end_id)
        retriever, captioner = BlipForImageTextRetrieval(config), BlipForConditionalGeneration(config)
        self.vision_model, self.vision_proj = retriever.vision_model, retriever.vision_proj
        self.text_encoder, self.text_proj = retriever.text_encoder, retriever.text_proj
        self.itm_head = retriever.itm_head
        self.text_decoder = captioner.text_decoder
        self.temp = nn.Parameter(torch.ones(1))
        _tie(self.text_encoder, self.text_decoder.bert, "")
        self._take_weights(med)
        self.vision_model_m, self.vision_proj_m = copy.deepcopy(self.vision_model), copy.deepcopy(self.vision_proj)
        self.text_encoder_m, self.text_proj_m = copy.deepcopy(self.text_encoder), copy.deepcopy(self.text_proj)
        self.pairs = [
            (self.vision_model, self.vision_model_m),
            (self.vision_proj, self.vision_proj_m),
            (self.text_encoder, self.text_encoder_m),
            (self.text_proj, self.text_proj_m),
        ]
        for _, slow in self.pairs:
            slow.requires_grad_(False)
        self.register_buffer("image_queue", F.normalize(torch.randn(architecture.projection, queue_size), dim=0))
        self.register_buffer("text_queue", F.normalize(torch.randn(architecture.projection, queue_size), dim=0))
        self.pointer = 0

    def _take_weights(self, med: MED) -> None:
        ours = med.state_dict()
        names = TRANSFORMERS.pairs(med.faces, len(med.image_encoder.vit.blocks), len(med.text.layers))
        weights = {theirs: ours[name] for name, theirs in names} | {"temp": ours["temperature"]}
        report = self.load_state_dict(weights, strict=False)
        if report.unexpected_keys or report.missing_keys:
            raise ValueError(f"weights do not match: {report}")

    @torch.no_grad()
    def momentum_update(self) -> None:
        for fast, slow in self.pairs:
            for param, param_m in zip(fast.parameters(), slow.parameters(), strict=True):
                param_m.data = param_m.data * self.momentum + param.data * (1.0 - self.momentum)

    @torch.no_grad()
    def enqueue(self, image: Tensor, text: Tensor) -> None:
        batch, size = len(image), self.image_queue.shape[1]
        self.image_queue[:, self.pointer : self.pointer + batch] = image.T
        self.text_queue[:, self.pointer : self.pointer + batch] = text.T
        self.pointer = (self.pointer + batch) % size

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor, image_once: bool) -> dict[str, Tensor]:
        with torch.no_grad():
            self.temp.clamp_(*TEMPERATURE_RANGE)
        embeds = self.vision_model(images).last_hidden_state
        image = F.normalize(self.vision_proj(embeds[:, 0]), dim=-1)
        text = self.text_encoder(ids, attention_mask=mask).last_hidden_state
        text = F.normalize(self.text_proj(text[:, 0]), dim=-1)
        with torch.no_grad():
            self.momentum_update()
            image_m = F.normalize(self.vision_proj_m(self.vision_model_m(images).last_hidden_state[:, 0]), dim=-1)
            text_m = self.text_encoder_m(ids, attention_mask=mask).last_hidden_state
            text_m = F.normalize(self.text_proj_m(text_m[:, 0]), dim=-1)
            every_image = torch.cat([image_m.T, self.image_queue], dim=1)
            every_text = torch.cat([text_m.T, self.text_queue], dim=1)
        itc, sim_i2t, sim_t2i = self._itc(image, text, image_m, text_m, every_image, every_text)
        self.enqueue(image_m, text_m)
        matched = self._matched(embeds if image_once else self.vision_model(images).last_hidden_state, ids, mask)
        negative = self._negative(
            embeds if image_once else self.vision_model(images).last_hidden_state, ids, mask, sim_i2t, sim_t2i
        )
        logits = self.itm_head(torch.cat([matched, negative]))
        labels = torch.cat([torch.ones(len(ids), dtype=torch.long), torch.zeros(2 * len(ids), dtype=torch.long)])
        lm = self._lm(embeds if image_once else self.vision_model(images).last_hidden_state, ids, mask)
        return {"itc": itc, "itm": F.cross_entropy(logits, labels.to(logits.device)), "lm": lm}

    def _itc(
        self, image: Tensor, text: Tensor, image_m: Tensor, text_m: Tensor, every_image: Tensor, every_text: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            hard = torch.zeros(len(image), every_text.shape[1], device=image.device)
            hard.fill_diagonal_(1)
            to_text = self.alpha * F.softmax(image_m @ every_text / self.temp, dim=1) + (1 - self.alpha) * hard
            to_image = self.alpha * F.softmax(text_m @ every_image / self.temp, dim=1) + (1 - self.alpha) * hard
        sim_i2t, sim_t2i = image @ every_text / self.temp, text @ every_image / self.temp
        loss_i2t = -torch.sum(F.log_softmax(sim_i2t, dim=1) * to_text, dim=1).mean()
        loss_t2i = -torch.sum(F.log_softmax(sim_t2i, dim=1) * to_image, dim=1).mean()
        return (loss_i2t + loss_t2i) / 2, sim_i2t, sim_t2i

    def _matched(self, embeds: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        ids = ids.clone()
        ids[:, 0] = self.enc_id
        return self.text_encoder(
            ids, attention_mask=mask, encoder_hidden_states=embeds, encoder_attention_mask=_ones(embeds)
        ).last_hidden_state[:, 0]

    def _negative(self, embeds: Tensor, ids: Tensor, mask: Tensor, sim_i2t: Tensor, sim_t2i: Tensor) -> Tensor:
        batch = len(ids)
        ids = ids.clone()
        ids[:, 0] = self.enc_id
        with torch.no_grad():
            weights_t2i = F.softmax(sim_t2i[:, :batch].float(), dim=1) + 1e-4
            weights_t2i.fill_diagonal_(0)
            weights_i2t = F.softmax(sim_i2t[:, :batch].float(), dim=1) + 1e-4
            weights_i2t.fill_diagonal_(0)
        other_images = [int(torch.multinomial(weights_t2i[row], 1).item()) for row in range(batch)]
        other_texts = [int(torch.multinomial(weights_i2t[row], 1).item()) for row in range(batch)]
        every_image = torch.cat([torch.stack([embeds[row] for row in other_images]), embeds])
        return self.text_encoder(
            torch.cat([ids, torch.stack([ids[row] for row in other_texts])]),
            attention_mask=torch.cat([mask, torch.stack([mask[row] for row in other_texts])]),
            encoder_hidden_states=every_image,
            encoder_attention_mask=_ones(every_image),
        ).last_hidden_state[:, 0]

    def _lm(self, embeds: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        ids = ids.clone()
        ids[:, 0] = self.dec_id
        return self.text_decoder(
            ids,
            attention_mask=mask,
            encoder_hidden_states=embeds,
            encoder_attention_mask=_ones(embeds),
            labels=ids.masked_fill(mask == 0, -100),
        ).loss


def _ones(embeds: Tensor) -> Tensor:
    return torch.ones(embeds.shape[:-1], dtype=torch.long, device=embeds.device)


def _config(architecture: Architecture, med: MED, end_id: int) -> BlipConfig:
    text = {
        "vocab_size": med.text.words.num_embeddings,
        "hidden_size": architecture.text_width,
        "encoder_hidden_size": architecture.image_width,
        "intermediate_size": 4 * architecture.text_width,
        "num_hidden_layers": architecture.text_depth,
        "num_attention_heads": architecture.text_heads,
        "hidden_dropout_prob": architecture.dropout,
        "attention_probs_dropout_prob": architecture.dropout,
        "bos_token_id": med.decode_id,
        "eos_token_id": end_id,
        "sep_token_id": end_id,
        "pad_token_id": 0,
        "label_smoothing": LABEL_SMOOTHING,
    }
    vision = {
        "hidden_size": architecture.image_width,
        "intermediate_size": 4 * architecture.image_width,
        "num_hidden_layers": architecture.image_depth,
        "num_attention_heads": architecture.image_heads,
        "image_size": architecture.image_size,
        "patch_size": architecture.patch_size,
        "layer_norm_eps": 1e-6,
    }
    return BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=architecture.projection)


def _tie(encoder: nn.Module, decoder: nn.Module, path: str) -> None:
    """Gives the encoder the decoder's weights outside self-attention (`attention`, not `crossattention`)."""
    for name, module in encoder.named_children():
        if name != "attention":
            _tie(module, getattr(decoder, name), f"{path}.{name}")
    for name, _ in list(encoder.named_parameters(recurse=False)):
        setattr(encoder, name, getattr(decoder, name))
