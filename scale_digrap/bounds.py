"""The numbers that the optimizers accept, as data: their constructors and the configuration read the same."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Bound:
    """``low`` ≤ value ≤ ``high``; ``high`` itself is out where ``open``."""

    low: float
    high: float = math.inf
    open: bool = False

    def holds(self, value: float) -> bool:
        """Whether a value is within; NaN never is."""
        return self.low <= value and (value < self.high if self.open else value <= self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"must be at least {self.low:g}"
        return f"must be in [{self.low:g}, {self.high:g}{')' if self.open else ']'}"


OPTION_BOUNDS = {
    "lr": Bound(0),
    "betas": Bound(0, 1, open=True),
    "eps": Bound(0),
    "weight_decay": Bound(0),
    "omega_lr": Bound(0),
    "omega_betas": Bound(0, 1, open=True),
    "omega_max": Bound(0),
    "gamma_lr": Bound(0),
    "gamma_betas": Bound(0, 1, open=True),
    "k": Bound(0, 1),
    "strength": Bound(0),
}
"""By option of the optimizers; of betas, for each of the two."""
