"""Methods that need all of W: its singular value decomposition, a projection of it, a function of it.

Weights are ``[out, in]``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def low_part(w: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The ``count`` smallest singular triples of W, as left vectors, values and right vectors (OSF, arXiv:2504.07097)."""
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    return u[:, len(s) - count :], s[len(s) - count :], v[len(s) - count :]


def projection(p: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """DEFT's left and right projectors from P ``[out, r]`` (PEFT 0.21): P and relu(P), or twice Q of P = Q R."""
    if kind == "relu":
        return p, p.relu()
    q = torch.linalg.qr(p)[0]
    return q, q


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "relu6": torch.nn.functional.relu6,
    "leaky_relu": torch.nn.functional.leaky_relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": torch.nn.functional.silu,
    "swish": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_pytorch_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "gelu_new": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "mish": torch.nn.functional.mish,
    "linear": lambda x: x,
}


def peanut(
    through: torch.Tensor, encoders: list[torch.Tensor], decoders: list[torch.Tensor], activation: str
) -> torch.Tensor:
    """PEANuT's hidden state (arXiv:2410.01870; PEFT 0.21): a small network applied to each column of W.

    Args:
        through: A W transposed, ``[in, r]``.
        encoders, decoders: ``[r, r]`` each; a decoder's output is added to the input of the encoder opposite to it.

    Returns:
        ``[in, r]``; the delta is ``scaling * B @ hidden.T``.
    """
    act = ACTIVATIONS[activation]
    hidden = act(through)
    kept = []
    for encoder in encoders:
        kept.append(hidden)
        hidden = act(hidden @ encoder.T)
    for decoder in decoders:
        hidden = act(hidden @ decoder.T) + kept.pop()
    return hidden


def frod_basis(w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """FRoD's U (PEFT 0.21): the columns of W V^-T at length 1, in float64; a column that vanishes stays zero."""
    w, v = w.double(), v.double()
    try:
        u = torch.linalg.solve(v, w.T).T
    except RuntimeError:  # a singular V
        u = w @ torch.linalg.pinv(v, rtol=1e-6).T
    length: torch.Tensor = torch.linalg.vector_norm(u, dim=0)
    return torch.where(length > 1e-12, u / length.clamp(min=1e-12), torch.zeros_like(u)).float()
