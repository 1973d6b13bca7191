"""The method: optimizers that know layers and tensors, never how either is sharded."""

from scale_digrap.optim.digrap import DiGraP
from scale_digrap.optim.ftp import AdamFTP
from scale_digrap.optim.l2sp import AdamL2SP
from scale_digrap.optim.spd import AdamSPD
from scale_digrap.optim.telemetry import LayerStats

__all__ = ["AdamFTP", "AdamL2SP", "AdamSPD", "DiGraP", "LayerStats"]
