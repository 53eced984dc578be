"""Parts of decoders in float64, as their papers and published code have them: what `coded_zoo` is made of."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional

Tensor = torch.Tensor
SILU = functional.silu


def gelu(x: Tensor) -> Tensor:
    """The approximation by tanh."""
    return functional.gelu(x, approximate="tanh")


def relu2(x: Tensor) -> Tensor:
    return functional.relu(x).square()


def rms(x: Tensor, weight: Tensor | float = 1.0, eps: float = 1e-6) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return functional.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def heads(x: Tensor, count: int) -> Tensor:
    """``[t, count d]`` to ``[count, t, d]``."""
    return x.view(x.shape[0], count, -1).transpose(0, 1)


def rope(x: Tensor, theta: float = 10000.0, size: int | None = None, pairs: bool = False) -> Tensor:
    """Rotary positions of ``[h, t, d]``; ``pairs`` of neighbours, else of the halves of the first ``size`` numbers."""
    size = size or x.shape[-1]
    angles = torch.arange(x.shape[1]).double()[:, None] / theta ** (torch.arange(0, size, 2).double() / size)
    cos, sin = angles.cos(), angles.sin()
    own, rest = x[..., :size], x[..., size:]
    if pairs:
        a, b = own[..., 0::2], own[..., 1::2]
        return torch.cat((torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2), rest), -1)
    a, b = own.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


def alibi(count: int, length: int, largest: float = 8.0) -> Tensor:
    """``[count, length, length]``: what is added to scores for the distance, for a power of two of heads."""
    slopes = 2.0 ** (-largest / count * torch.arange(1, count + 1).double())
    at = torch.arange(length).double()
    return slopes[:, None, None] * (at[None, None, :] - at[None, :, None])


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    causal: bool = True,
    cap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """``[t, h d]``: attention of ``[h, t, d]`` to ``[g, t, d]``; each of g serves h / g heads that follow each other."""
    each, length = q.shape[0] // k.shape[0], q.shape[1]
    k, v = k.repeat_interleave(each, 0), v.repeat_interleave(each, 0)
    scores = q @ k.transpose(1, 2) * (scale if scale is not None else 1 / math.sqrt(q.shape[-1]))
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    scores = scores if bias is None else scores + bias
    at = torch.arange(length)
    hidden = at[None, :] > at[:, None] if causal else torch.zeros(length, length, dtype=torch.bool)
    if window is not None:
        hidden = hidden | (at[:, None] - at[None, :] >= window)
    found = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v
    return found.transpose(0, 1).reshape(length, -1)


def mlp(x: Tensor, w: dict[str, Tensor], gate: str, up: str, down: str, act: Any = SILU) -> Tensor:
    """A feed-forward network with a gate."""
    return linear(act(linear(x, w, gate)) * linear(x, w, up), w, down)


def moe(x: Tensor, weights: Tensor, expert: Any) -> Tensor:
    """The experts' outputs of ``[t, width]``, by ``[t, experts]`` weights of which most are 0."""
    found = torch.zeros_like(x)
    for index in range(weights.shape[-1]):
        found = found + weights[:, index : index + 1] * expert(index, x)
    return found


def chosen(scores: Tensor, count: int, by: Tensor | None = None, normed: bool = True) -> Tensor:
    """The ``count`` largest of ``scores`` (or of ``by``) and zeros; ``normed``: they add up to 1."""
    mask = torch.zeros_like(scores).scatter(-1, (scores if by is None else by).topk(count, -1).indices, 1.0)
    kept = scores * mask
    return kept / kept.sum(-1, keepdim=True) if normed else kept
