"""Linear regression from running sums: as small for a million tokens as for one."""

from __future__ import annotations

import torch
from torch import Tensor

from ltepass.threads import one_thread

RIDGE = 1e-2  # relative to the mean variance of x; the fit is flat between 1e-3 and 1e-1


class RidgeSums:
    """Least squares y = x W^T + b with a small penalty on W, from running sums about the first rows' means.

    x [n, d], y [n, k] in any number of parts; d^2 + d k numbers are kept, in fp32.
    """

    def __init__(self) -> None:
        self.count = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        if len(x) == 0:
            return  # no rows have no mean to begin from
        if self.count == 0:
            self.origin = x.mean(0), y.mean(0)  # sums about it cancel little
            self.x_sum, self.y_sum = torch.zeros_like(x[0]), torch.zeros_like(y[0])
            self.gram, self.cross = x.new_zeros(x.shape[1], x.shape[1]), x.new_zeros(x.shape[1], y.shape[1])
        x, y = x - self.origin[0], y - self.origin[1]
        self.count += len(x)
        self.x_sum += x.sum(0)
        self.y_sum += y.sum(0)
        with one_thread():
            self.gram.addmm_(x.T, x)
            self.cross.addmm_(x.T, y)

    def solve(self) -> tuple[Tensor, Tensor]:
        """W [k, d], b [k]."""
        x_mean, y_mean = self.x_sum / self.count, self.y_sum / self.count
        gram = self.gram - self.count * x_mean[:, None] * x_mean
        cross = self.cross - self.count * x_mean[:, None] * y_mean
        gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp_min(1e-12))
        with one_thread():
            weight = torch.linalg.solve(gram, cross).T
        return weight, self.origin[1] + y_mean - weight @ (self.origin[0] + x_mean)
