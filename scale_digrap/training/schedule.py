"""Learning rate over the run."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from scale_digrap.config import ScheduleConfig


def lr_ratio(config: ScheduleConfig, total_steps: int) -> Callable[[int], float]:
    """Step number (0 is the first step) → fraction of the peak learning rate.

    The warm-up rises linearly and reaches the peak with step ``warmup_steps - 1``, so that no step is taken at zero;
    cosine and linear then fall to ``min_lr_ratio`` at ``total_steps``.
    """
    warmup, start, end = config.warmup_steps, config.warmup_init_ratio, config.min_lr_ratio

    def ratio(step: int) -> float:
        if step < warmup:
            return start + (1.0 - start) * (step + 1) / warmup
        if config.name == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        falling = 0.5 * (1.0 + math.cos(math.pi * progress)) if config.name == "cosine" else 1.0 - progress
        return end + (1.0 - end) * falling

    return ratio


def build_schedule(optimizer: Optimizer, config: ScheduleConfig, total_steps: int) -> LambdaLR:
    """A scheduler to step once after every optimizer step."""
    return LambdaLR(optimizer, lr_ratio(config, total_steps))
