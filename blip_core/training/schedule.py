"""The learning rate of a step: linear warm-up, then along a cosine or falling by a factor an epoch (BLIP, 4.1).

The official code warms up within the first epoch alone, so that a short epoch never reaches the peak; here the
warm-up is a number of steps.
"""

import math

from blip_core.training.recipe import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate at `step`, 0..steps - 1.

    Warm-up from `warmup_learning_rate` reaches the peak with its last step. With `epoch_steps` the rate after it is
    that of the epoch's first step, as in the official code; the epochs are counted from the first step of all.
    """
    if step < config.warmup_steps:
        share = (step + 1) / config.warmup_steps
        return config.warmup_learning_rate + (config.learning_rate - config.warmup_learning_rate) * share
    if config.schedule == "exponential":
        return max(config.final_learning_rate, config.learning_rate * config.decay ** (step // config.epoch_steps))
    return _cosine(step, config)


def _cosine(step: int, config: TrainConfig) -> float:
    if config.epoch_steps:
        step = max(config.warmup_steps, step - step % config.epoch_steps)
    share = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    fall = (1 + math.cos(math.pi * min(1.0, share))) / 2
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * fall
