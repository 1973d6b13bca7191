"""A Gaussian fitted to a stream of vectors on many ranks, and the Mahalanobis distance to it. Everything in float64."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scale_digrap.errors import ScaleDigrapError


class ShiftError(ScaleDigrapError):
    """A shift score that cannot be computed."""


class StreamingGaussian:
    """Mean and covariance of vectors that come in batches, without keeping them.

    Batches and ranks are put together by their counts, means and centred sums of products (Chan, Golub and LeVeque
    1979), which does not cancel as sums of squares do.

    Attributes:
        count: vectors so far.
        mean: float64 [d].
        scatter: Σ (x − mean)(x − mean)ᵀ, float64 [d, d].
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, vectors: Tensor) -> None:
        """Take in a batch, [n, d] of any float dtype; n may be 0."""
        if len(vectors) == 0:
            return
        batch = vectors.to(self.mean)
        mean = batch.mean(dim=0)
        centred = batch - mean
        self._merge(len(batch), mean, centred.T @ centred)

    def merge(self, other: StreamingGaussian) -> None:
        """Take in all that another one has seen."""
        if other.count:
            self._merge(other.count, other.mean.to(self.mean), other.scatter.to(self.scatter))

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        delta = mean - self.mean
        self.scatter += scatter
        self.scatter.addr_(delta, delta, alpha=self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Make this the Gaussian of all ranks' vectors, the same bits on each. Two all-reduces, of d + 1 and d²
        numbers."""
        sums = torch.cat([self.mean * self.count, self.mean.new_tensor([self.count])])
        dist.all_reduce(sums, group=group)
        total = int(sums[-1])
        if total == 0:
            return
        mean = sums[:-1] / total
        delta = self.mean - mean
        self.scatter.addr_(delta, delta, alpha=self.count)
        dist.all_reduce(self.scatter, group=group)
        self.count, self.mean = total, mean

    @property
    def covariance(self) -> Tensor:
        """Unbiased (n − 1), float64 [d, d]."""
        if self.count < 2:
            raise ShiftError(f"a covariance of {self.count} vectors: the training data must hold at least two")
        return self.scatter / (self.count - 1)


class Mahalanobis:
    """Distance √((x − μ)ᵀ Σ⁻¹ (x − μ)) to a Gaussian, Σ made invertible.

    Args:
        gaussian: mean and covariance S of n vectors.
        regularization: how Σ is made of S.
            ``oas``: (1 − ρ) S + ρ (tr S / d) I with ρ of the oracle approximating shrinkage estimator (Chen, Wiesel,
            Eldar and Hero 2010, eq. 23), which depends on n, d, tr S and tr S² alone.
            A number in [0, 1]: the same with this ρ.
            ``pinv``: the pseudo-inverse of S + 1e-8 I; singular values up to d · ε of the largest one count as zero, ε
            of float64 (2.2e-16): directions in which the vectors do not vary stay, and weigh 1e8.
            ``frames``: the same of S rounded to float32 with ε of float32 (1.2e-7), as ``torch.linalg.pinv`` does in
            the code of the FRAMES-VQA authors: such directions are left out. The authors multiply in the embeddings'
            own dtype, bfloat16; here it is float64.

    Raises:
        ShiftError: an unknown regularization, fewer than two vectors, all vectors equal, or a matrix that stays
            singular (ρ = 0).
    """

    def __init__(self, gaussian: StreamingGaussian, regularization: str | float = "oas") -> None:
        check_regularization(regularization)
        covariance, dim = gaussian.covariance, len(gaussian.mean)
        trace = float(covariance.diagonal().sum())
        if not math.isfinite(trace):
            raise ShiftError("the training embeddings hold infinite or undefined values: compute them in float32")
        if trace <= 0.0:
            raise ShiftError(
                f"all {gaussian.count} training embeddings are equal: name training shards with different samples"
            )
        self._mean = gaussian.mean
        self.shrinkage: float | None = None
        """ρ; None for ``pinv`` and ``frames``."""
        self._factor: Tensor | None = None
        if regularization in ("pinv", "frames"):
            dtype = torch.float32 if regularization == "frames" else torch.float64
            loaded = covariance.to(dtype) + 1e-8 * torch.eye(dim, dtype=dtype, device=covariance.device)
            # eigenvalues are the singular values: the negative ones that rounding makes are below the limit
            values, vectors = torch.linalg.eigh(loaded.double())
            keep = values > dim * torch.finfo(dtype).eps * values.max()
            self._whitener = vectors[:, keep] / values[keep].sqrt()
            return
        if regularization == "oas":
            self.shrinkage = _oas(covariance, gaussian.count)
        else:
            self.shrinkage = float(regularization)
        shrunk = (1.0 - self.shrinkage) * covariance
        shrunk.diagonal().add_(self.shrinkage * trace / dim)
        self._factor, failed = torch.linalg.cholesky_ex(shrunk)
        if int(failed):
            raise ShiftError(
                f"the covariance of {gaussian.count} embeddings of size {dim} is singular with regularization="
                f"{regularization!r}: use oas, pinv, frames or a larger number"
            )

    def distances(self, vectors: Tensor) -> Tensor:
        """Distances of [n, d] vectors, float64 [n]."""
        delta = vectors.to(self._mean) - self._mean
        if self._factor is None:
            return (delta @ self._whitener).norm(dim=1)
        return torch.linalg.solve_triangular(self._factor, delta.T, upper=False).norm(dim=0)


def check_regularization(regularization: Any) -> None:
    """Raises `ShiftError` for anything that `Mahalanobis` does not know."""
    if isinstance(regularization, str):
        known = regularization in ("oas", "pinv", "frames")
    else:
        known = isinstance(regularization, (int, float)) and not isinstance(regularization, bool)
        known = known and 0.0 <= regularization <= 1.0
    if not known:
        raise ShiftError(f"regularization must be oas, pinv, frames or a number in [0, 1], got {regularization!r}")


def _oas(covariance: Tensor, count: int) -> float:
    dim = len(covariance)
    square, trace_square = float(covariance.square().sum()), float(covariance.diagonal().sum()) ** 2
    denominator = (count + 1 - 2 / dim) * (square - trace_square / dim)
    if denominator <= 0.0:  # already a multiple of the identity
        return 1.0
    return min(1.0, ((1 - 2 / dim) * square + trace_square) / denominator)
