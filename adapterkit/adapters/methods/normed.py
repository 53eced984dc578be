"""The kernel of the variants that need more of W than its sum with a delta: DoRA and residual bases."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from adapterkit.adapters.change import Kernel, Weights
from adapterkit.ops.lora import to_norm

if TYPE_CHECKING:
    from adapterkit.dtypes import DType


class Normed(Kernel):
    """m * V / ||V|| with V = W0 + delta, where W0 is W or what the initialisation left of it.

    Args:
        added: what makes V of W0, as a low-rank addition does.
        shift: factors of what was taken out of W, or None. Training kept W0 in W's dtype, so it is rounded to that.
        magnitude: m, one per row, or per column when ``norms`` is given; None leaves V as it is.
        norms: ||V|| per column, where norms go over rows (embeddings).
        dtype: of the stored W.
    """

    def __init__(
        self,
        added: Kernel,
        shift: tuple[torch.Tensor, torch.Tensor] | None,
        magnitude: torch.Tensor | None,
        norms: torch.Tensor | None,
        dtype: DType,
    ) -> None:
        self._added, self._shift, self._magnitude, self._norms, self._dtype = added, shift, magnitude, norms, dtype
        self.wide = added.wide and shift is None and norms is None
        self.anywhere = added.anywhere

    def new(self, w: torch.Tensor, rows: range) -> torch.Tensor:
        return self._scaled(self._summed(w, rows), None, rows)

    def on(self, w: torch.Tensor, v: torch.Tensor, rows: range) -> torch.Tensor:
        """m * (v + delta) / ||W0 + delta||: PEFT takes the norm of the unmerged W and scales what is there already."""
        summed = self._summed(w, rows)
        return self._scaled(summed, v + (summed - w), rows)

    def _summed(self, w: torch.Tensor, rows: range) -> torch.Tensor:
        """V."""
        if self._shift is not None:
            left, right = (
                one.to(w.device) for one in (self._shift[0][rows.start : rows.stop : rows.step], self._shift[1])
            )
            w = torch.addmm(w, left, right, alpha=-1)
            w = w.to(self._dtype.torch).to(w.dtype)
        return self._added.new(w, rows)

    def _scaled(self, v: torch.Tensor, other: torch.Tensor | None, rows: range) -> torch.Tensor:
        """m / ||V|| times V, or times ``other``."""
        found = v if other is None else other
        if self._magnitude is None:
            return found
        if self._norms is not None:
            return to_norm(found, self._magnitude.to(v.device), self._norms.to(v.device))
        magnitude = self._magnitude[rows.start : rows.stop : rows.step, None].to(v.device)
        return to_norm(found, magnitude, torch.linalg.vector_norm(v, dim=1, keepdim=True))


def column_norms(weights: Weights, added: Kernel, group: int = 1) -> torch.Tensor:
    """||V|| of every column, streamed; ``[columns]``, those of each ``group`` taken together (a convolution's input)."""
    total = torch.zeros(weights.shape[1], dtype=torch.float64)
    for start, w in weights.blocks():
        v = added.new(w, range(start, start + len(w)))
        total += v.double().square().sum(0)
    return total.view(-1, group).sum(1).sqrt().float().repeat_interleave(group)
