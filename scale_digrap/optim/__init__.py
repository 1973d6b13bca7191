"""The method: optimizers that know layers and tensors, never how either is sharded."""

from scale_digrap.optim.digrap import DiGraP
from scale_digrap.optim.telemetry import LayerStats

__all__ = ["DiGraP", "LayerStats"]
