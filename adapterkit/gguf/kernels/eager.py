"""The encoders run by torch, operation by operation, on any device: the fallback on CPUs, the fast path on GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from adapterkit.gguf.kernels import wide

if TYPE_CHECKING:
    from adapterkit.gguf.kernels.layouts import BlockLayout

STEP = {"cpu": 1 << 18}
"""Weights per step: on a CPU what the caches hold, elsewhere enough to hide the launches of small kernels."""
STEP_ELSEWHERE = 1 << 25


def _row_means(x: torch.Tensor) -> torch.Tensor:
    """Mean square of each row, summed left to right in float32."""
    total = torch.zeros(x.shape[0], dtype=torch.float32, device=x.device)
    for column in x.t().contiguous():
        total += column * column
    return torch.div(total, torch.full_like(total, x.shape[1]))


def run(layout: BlockLayout, x: torch.Tensor, importance: torch.Tensor | None, out: torch.Tensor) -> None:
    """Encode rows ``x`` float32 [rows, columns] into ``out`` uint8 [rows, bytes], on the tensors' device."""
    n, subs = layout.n, layout.subs
    block = layout.plain
    if importance is not None and layout.given is not None:
        block = layout.given
    per_row = x.shape[1] // n
    blocks = x.reshape(-1, n)
    target = out.reshape(-1, layout.size)
    means = _row_means(x).repeat_interleave(per_row) if layout.row_mean and importance is not None else None
    step = max(1, STEP.get(x.device.type, STEP_ELSEWHERE) // n)
    for first in range(0, blocks.shape[0], step):
        part = blocks[first : first + step]
        lanes = part.shape[0]

        def shaped(values: torch.Tensor, lanes: int = lanes) -> torch.Tensor:
            return values.view(lanes, subs, n // subs).permute(2, 1, 0).contiguous()

        given = None
        if importance is not None:
            columns = torch.arange(first, first + lanes, device=x.device) % per_row
            given = shaped(importance.view(per_row, n)[columns])
        rows = shaped(part)
        scratch = (
            torch.empty_like(rows),
            torch.empty_like(rows),
            torch.empty_like(rows, dtype=torch.int32),
            tuple(torch.zeros(1, subs, lanes, dtype=torch.float32, device=x.device) for _ in range(7)),
        )
        packed = torch.empty(layout.size, lanes, dtype=torch.uint8, device=x.device)
        sigma = None if means is None else means[first : first + lanes]
        block(rows, given, sigma, scratch, packed, (slice(None),))
        target[first : first + lanes] = packed.t()
    wide.forget()
