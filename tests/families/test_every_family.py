"""A LoRA of every module that a family's published model has: into the original layout and back, with the same products."""

from __future__ import annotations

import pytest
import torch

from adapterkit.adapters.families.names import FAMILIES
from adapterkit.adapters.families.told import published
from adapterkit.adapters.formats.plain import PlainFactors
from adapterkit.adapters.formats.relaid import relaid
from adapterkit.adapters.formats.views import FunctionTensor
from adapterkit.dtypes import F32

SMALLER, RANK = 64, 2  # how many times smaller than the published model; of each module


def stored(name: str, tensor: torch.Tensor) -> FunctionTensor:
    return FunctionTensor(name, F32, tuple(tensor.shape), lambda: tensor, "drawn", 0)


def drawn(path: str, rows: int, columns: int, scale: float) -> PlainFactors:
    pair = stored("A", torch.randn(RANK, columns)), stored("B", torch.randn(rows, RANK))
    return PlainFactors(path, RANK, scale, lambda: (torch.empty(0), torch.empty(0)), pair)


def product(one: PlainFactors) -> torch.Tensor:
    a, b = (tensor.read(0, tensor.numel).view(tensor.shape).double() for tensor in one.stored)
    return one.scale * b @ a


@pytest.mark.parametrize("name", list(published()))
def test_a_lora_of_every_module_goes_and_comes_back(name: str) -> None:
    """Fused rows keep their order, halves that change places change back, and nothing is left out or named twice."""
    torch.manual_seed(0)
    family = next(one for one in FAMILIES if one.name == name)
    before: dict[str, PlainFactors] = {}
    for several in published()[name].values():
        for pattern, one in several:
            path = pattern.text.replace("{}", "1" if one.blocks > 1 else "0", 1).replace("{}", "0")
            rows, columns = (max(1, size // SMALLER) for size in one.sizes[0])
            before[path] = drawn(path, rows, columns, 1.0 + len(before) % 3)
    there = relaid(list(before.values()), "original", family)
    assert len({one.path for one in there}) == len(there) <= len(before)
    back = {one.path: one for one in relaid(there, "diffusers", family)}
    assert back.keys() == before.keys()
    for path, one in before.items():
        wanted = product(one)
        assert (product(back[path]) - wanted).abs().max() <= 2e-6 * wanted.abs().max(), path
    if any(not row.alias for row in family.rows) and name != "Qwen-Image":
        assert {one.path for one in there} != before.keys()
