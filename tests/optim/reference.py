"""DiGraP in float64, written from the formulas, one whole layer at a time, with the projection stored.

Independent of the package: it shares no code with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Layer:
    theta: Tensor
    anchor: Tensor | None  # None: no anchor
    normalization: str = "row"
    project_when: str = "conflict"
    omega_lr: float = 0.5
    omega_betas: tuple[float, float] = (0.9, 0.999)
    omega_max: float = 1.0
    weight_decay: float = 0.0
    omega: float = 0.0
    a: float = 0.0
    b: float = 0.0
    t: int = 0
    projection: Tensor | None = None
    conflicts: int = 0
    omegas: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.theta = self.theta.double().clone()
        self.anchor = None if self.anchor is None else self.anchor.double().clone()
        self.m, self.v = torch.zeros_like(self.theta), torch.zeros_like(self.theta)

    def step(self, gradient: Tensor, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        g = gradient.double()
        self.t += 1
        if self.anchor is not None:
            g = self._project(g)
        self.theta = self.theta * (1 - lr * self.weight_decay)
        self.m = betas[0] * self.m + (1 - betas[0]) * g
        self.v = betas[1] * self.v + (1 - betas[1]) * g * g
        m_hat, v_hat = self.m / (1 - betas[0] ** self.t), self.v / (1 - betas[1] ** self.t)
        self.theta = self.theta - lr * m_hat / (v_hat.sqrt() + eps)

    def _project(self, g: Tensor) -> Tensor:
        delta = self.theta - self.anchor
        d, n = (g * delta).sum().item(), (delta * delta).sum().item()
        c = d / n if n > 0 else 0.0
        if self.t > 1:
            h = self._cosine(g, self.projection)
            beta1, beta2 = self.omega_betas
            self.a = beta1 * self.a + (1 - beta1) * h
            self.b = beta2 * self.b + (1 - beta2) * h * h
            move = (self.a / (1 - beta1**self.t)) / (math.sqrt(self.b / (1 - beta2**self.t)) + 1e-8)
            self.omega = min(max(self.omega - self.omega_lr * move, 0.0), self.omega_max)
        self.omegas.append(self.omega)
        self.projection = c * delta
        self.conflicts += d < 0
        if d < 0 if self.project_when == "conflict" else d > 0:
            return g - self.omega * c * delta
        return g

    def _cosine(self, g: Tensor, projection: Tensor) -> float:
        if self.normalization == "tensor" or g.dim() < 2:
            pairs = [(g.flatten(), projection.flatten())]
        else:
            pairs = list(zip(g.reshape(g.shape[0], -1), projection.reshape(g.shape[0], -1), strict=True))
        total = 0.0
        for x, y in pairs:
            norm = x.norm().item() * y.norm().item()
            total += (x * y).sum().item() / norm if norm > 0 else 0.0
        return total
