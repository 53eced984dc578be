"""`--rounding feedback`: GPTQ's rule in every format, held against the paper's column loop in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stored_formats import FORMATS
from test_keep import TOUCHED, base_of, shape_of, stored

from adapterkit.checkpoint.open import open_checkpoint
from adapterkit.codecs import feedback
from adapterkit.codecs.columns import by_columns
from adapterkit.codecs.encode import Encoder
from adapterkit.codecs.feedback import Fed, Shared
from adapterkit.codecs.table import find_weights
from adapterkit.errors import CheckpointError

UNEVEN = "gptq uneven"
ROUNDED = tuple(name for name in FORMATS if name not in ("int8", "fp8 plain", UNEVEN))


class Text:
    """Inputs of a layer, correlated as those of models are."""

    def __init__(self, columns: int) -> None:
        made = torch.Generator().manual_seed(3)
        mixed = torch.randn(columns, columns, generator=made) / columns**0.5 + torch.eye(columns) * 0.3
        self._x = torch.randn(300, columns, generator=made) @ mixed

    def rows(self) -> torch.Tensor:
        return self._x


def gptq(w: torch.Tensor, x: torch.Tensor, grid: list[torch.Tensor], decoded: list[torch.Tensor]) -> torch.Tensor:
    """Frantar et al. 2022, algorithm 1, without blocks: Q[:, i] = quant(W[:, i]), then W[:, i:] -= E Hinv[i, i:].

    Args:
        grid: for each column the values that its rows may take, ``[rows, values]``.
        decoded: what they are decoded to.
    """
    w, h = w.double().clone(), x.double().T @ x.double()
    h += 0.01 * h.diagonal().mean() * torch.eye(len(h))
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    out = torch.empty_like(w)
    for i in range(w.shape[1]):
        near = (grid[i].double() - w[:, i : i + 1]).abs().argmin(1, keepdim=True)
        out[:, i] = decoded[i].double().gather(1, near)[:, 0]
        w[:, i:] -= ((w[:, i] - out[:, i]) / upper[i, i])[:, None] * upper[i, i:]
    return out


def fed_of(folder: Path) -> tuple[Fed, Encoder, torch.Tensor, Text]:
    """What writes a stored weight with feedback and without, the values that are stored now, and the inputs."""
    stored = open_checkpoint(folder)
    weight = next(w for w in find_weights(stored.tensors, stored.config, "") if w.name == f"{TOUCHED}.weight")
    assert weight.encoder is not None
    old = weight.load()(0, weight.shape[0] * weight.shape[1]).float()
    encoder, plain = weight.encoder(), weight.encoder()
    form = by_columns(encoder, weight.shape)
    assert form is not None
    text = Text(weight.shape[1])
    rows, columns = weight.shape
    return Fed(weight.name, encoder, form, (rows, columns), lambda: text, Shared()), plain, old, text


def changed(old: torch.Tensor, shape: tuple[int, int], size: float) -> torch.Tensor:
    made = torch.Generator().manual_seed(5)
    delta = torch.randn(shape[0], 4, generator=made) @ torch.randn(4, shape[1], generator=made)
    return old + (delta * (size * old.norm() / delta.norm())).view(-1)


@pytest.mark.parametrize("name", ROUNDED)
def test_outputs_are_nearer_than_those_of_the_nearest_values(tmp_path: Path, name: str) -> None:
    base = base_of(tmp_path, name)
    fed, plain, old, text = fed_of(base)
    new = changed(old, shape_of(base), 0.1)
    encoded = fed.encode(0, new, old)
    step = plain.unit
    if plain.twice:
        plain.settle([plain.look(at, new[at : at + step], old[at : at + step]) for at in range(0, new.numel(), step)])
    near = [
        plain.values(at, plain.encode(at, new[at : at + step], old[at : at + step]))
        for at in range(0, new.numel(), step)
    ]
    x = text.rows()

    def off(values: torch.Tensor) -> float:
        return float((x @ (values - new).view(shape_of(base)).T).norm())

    assert off(fed.values(0, encoded)) < 0.9 * off(torch.cat(near))
    # What did not change keeps its codes and its scales, whatever decoding rounds.
    kept, again = fed.encode(0, old, old), plain.encode(0, old[: plain.unit], old[: plain.unit])
    assert all(torch.equal(raw(one)[: len(raw(two))], raw(two)) for one, two in zip(kept, again, strict=True))


def test_groups_of_different_sizes_are_refused(tmp_path: Path) -> None:
    base = base_of(tmp_path, UNEVEN)
    fed, _, old, _ = fed_of(base)
    with pytest.raises(CheckpointError, match="groups of different sizes"):
        fed.encode(0, changed(old, shape_of(base), 0.1), old)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


# NF4 of QLoRA (arXiv:2305.14314, appendix E).
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
F8 = tuple(v for v in torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float().tolist() if abs(v) <= 448)


@pytest.mark.parametrize(
    ("name", "values", "scale", "width"),
    [
        ("nf4", NF4, "weight.absmax", 64),
        ("ct int4", tuple(range(-8, 8)), "weight_scale", 32),
        ("fp8 blocks", F8, "weight_scale_inv", 128),
    ],
)
def test_the_columns_of_the_paper(
    tmp_path: Path, name: str, values: tuple[float, ...], scale: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the scales that are stored, code for code what algorithm 1 gives in float64, but where two are as near."""
    monkeypatch.setattr(feedback, "SEARCHED", ())
    base = base_of(tmp_path, name)
    fed, _, old, text = fed_of(base)
    rows, columns = shape_of(base)
    new = changed(old, (rows, columns), 0.1)
    found = fed.values(0, fed.encode(0, new, old)).view(rows, columns)
    scales = stored(base)[f"{TOUCHED}.{scale}"].float().view(-1, columns // width)
    scales = scales.repeat_interleave(rows // len(scales), 0)
    grid = [torch.tensor(values) * scales[:, i // width, None] for i in range(columns)]
    # bitsandbytes decodes to the dtype of the model.
    decoded = [one.bfloat16().float() if name == "nf4" else one for one in grid]
    expected = gptq(new.view(rows, columns), text.rows(), grid, decoded)
    assert ((found - expected).abs() > 1e-2 * scales[:, :1]).float().mean() < 0.01
