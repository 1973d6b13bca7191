"""What an anchored optimizer tells about each layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerStats:
    """One layer's figures of the last step, equal on all ranks; δ = θ − θ0 is the drift before that step's update.

    Attributes:
        omega: projection strength ω after the step, in [0, omega_max]; NaN for a method without it.
        conflict: whether <g, δ> < 0: descent leads away from the anchor.
        conflict_rate: the share of all steps so far that were in conflict, in [0, 1].
        drift: ‖δ‖.
        relative_drift: ‖δ‖ / ‖θ0‖; NaN for a zero anchor.
        cosine: cos(g, δ), in [-1, 1]; 0 where either is zero.
        grad_norm: ‖g‖ of the gradient that the optimizer was given (after any clipping).
    """

    omega: float
    conflict: bool
    conflict_rate: float
    drift: float
    relative_drift: float
    cosine: float
    grad_norm: float
