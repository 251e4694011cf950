"""What one training is told: size of the steps, schedule, objectives' settings, augmentation, and how it is run."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from blip_core.errors import ConfigError
from blip_core.settings import Settings, setting


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Settings of one training."""

    steps: int = setting(1000, "optimiser steps", ge=1)
    batch_size: int = setting(64, "pairs of a step, over all processes and micro-batches", ge=2)
    accumulation: int = setting(1, "micro-batches that a step is computed in; the pairs of one are contrasted", ge=1)
    image_size: int | None = setting(
        None, "side of the images, positions interpolated; null: the model's", ge=16, le=1024
    )

    learning_rate: float = setting(3e-4, "peak of the schedule", gt=0, le=1)
    warmup_steps: int = setting(100, "steps of linear warm-up", ge=0)
    warmup_learning_rate: float = setting(0.0, "where the warm-up begins", ge=0, le=1)
    schedule: Literal["cosine", "exponential"] = setting(
        "cosine", "how the rate falls: along a cosine to `final_learning_rate`, or by `decay` each epoch down to it"
    )
    final_learning_rate: float = setting(0.0, "lowest rate after the warm-up", ge=0, le=1)
    decay: float = setting(0.9, "exponential: factor of an epoch", gt=0, le=1)
    epoch_steps: int = setting(
        0, "steps of an epoch, within which the rate does not fall; 0: a cosine falls by step", ge=0
    )
    weight_decay: float = setting(0.05, "AdamW's, on every parameter as the official code has it", ge=0, le=1)
    clip_norm: float = setting(1.0, "largest norm of the gradient; 0: any", ge=0)

    momentum: float = setting(0.995, "of the momentum encoders", ge=0, lt=1)
    queue_size: int = setting(57600, "embeddings in the ITC queue", ge=1)
    alpha: float = setting(0.4, "weight of ITC's soft targets", ge=0, le=1)
    alpha_ramp_steps: int = setting(0, "steps over which alpha rises from zero", ge=0)
    negatives: Literal["process", "all"] = setting(
        "all", "where ITM's hard negatives are drawn: in the process's own pairs, or in those of all processes"
    )
    prompt: str = setting("", "Captioner: text before every caption, which is given and not predicted")

    crop_scale: float = setting(0.5, "smallest share of the area that a random crop keeps; 1 is no crop", gt=0, le=1)
    flip: bool = setting(True, "mirror half of the images; turn off where captions say left and right")
    augment: bool = setting(False, "BLIP's RandomAugment: two random changes of light and geometry, each in half")
    max_tokens: int | None = setting(
        None,
        "longest text in tokens, [CLS], prompt and [SEP] counted; the rest is cut; null: the tokenizer's",
        ge=4,
        le=512,
    )

    precision: Literal["fp32", "bf16"] = setting("fp32", "bf16 computes in mixed precision")
    parallel: Literal["ddp", "fsdp"] = setting(
        "ddp", "many processes: each holds the whole model (DDP), or a share of it (FSDP2)"
    )
    gradient_checkpointing: bool = setting(False, "computes activations again instead of keeping them: less memory")
    compile: bool = setting(False, "compiles the transformers' layers with torch.compile")
    workers: int = setting(0, "processes that decode images, for each training process; 0: none", ge=0, le=64)
    lanes: int = setting(
        8, "parallel readers of the data, a multiple of processes times workers; they decide the order", ge=1, le=4096
    )
    save_every: int = setting(500, "steps between saved states that a killed run resumes from", ge=1)
    log_every: int = setting(20, "steps between rows of the metrics file", ge=1)
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = setting((), "where the metrics are logged as well")


# What changes how a training runs, and not what comes out of it.
RUNNING = ("parallel", "gradient_checkpointing", "workers", "save_every", "log_every", "trackers")


def identity(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide the weights: a training may go on with others of the rest."""
    return {name: value for name, value in asdict(config).items() if name not in RUNNING}


def check_recipe(name: str, config: TrainConfig) -> None:
    """Raises ConfigError, naming the keys of the section `name`, for settings that do not fit together."""
    if config.batch_size % config.accumulation:
        raise ConfigError(
            f"{name}.batch_size {config.batch_size} must be a multiple of {name}.accumulation {config.accumulation}"
        )
    if config.schedule == "exponential" and not config.epoch_steps:
        raise ConfigError(f"{name}.schedule exponential needs {name}.epoch_steps, the steps of an epoch; it is 0")
