"""The learning rate of an optimizer step. Pure."""

import math

from megarl.config import OptimizerConfig


def lr_at(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (counted from 0) of `total_steps`.

    Linear warm-up reaches `lr` in step `warmup_steps`; after it `schedule` holds, or decays so that the last step has
    `lr * min_lr_ratio`. Steps beyond the last keep the last one's rate. Source: semantics section 6; cosine after
    Loshchilov & Hutter (2017).
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    decay_steps = max(1, total_steps - 1 - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / decay_steps)
    part = (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * part)
