"""What mlx-lm makes of a model's tensors, by model type: from the table ``mlx_models.json``.

Which layers it quantizes, which of them otherwise than the rest (routers of experts in 8 bits), what it calls tensors, and
which experts it stacks. The table is made from mlx-lm by ``tools/make_mlx_models.py``; mlx is never imported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import field
from functools import cache
from pathlib import Path
from typing import Any

from adapterkit.values import dataclass

GIVEN: dict[str, Any] = {}
"""Rows in the place of the table's, while the table is made."""


@dataclass(frozen=True)
class MlxModel:
    """A row. Names of modules and tensors have ``*`` for each number of a layer or an expert.

    Attributes:
        layers: modules, by mlx-lm's names, that are quantized as asked.
        apart: modules that are not, or in other numbers: False, or what `quantization` says of them.
        renamed: a tensor's name in the file to mlx-lm's.
        stacked: the name of one expert's tensor to that of the stack.
    """

    layers: frozenset[str]
    apart: Mapping[str, Any] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    stacked: Mapping[str, str] = field(default_factory=dict)

    def called(self, name: str) -> tuple[str, int | None]:
        """mlx-lm's name of a tensor; of an expert's the stack's, and the expert."""
        form, numbers = _form(name)
        if form in self.stacked:
            return _named(self.stacked[form], numbers[:-1]), numbers[-1]
        return _named(self.renamed.get(form, form), numbers), None

    def numbers(self, name: str) -> Mapping[str, Any] | bool:
        """How the layer with this weight is quantized: as asked (True), not (False), or in numbers of its own."""
        module = _form(name)[0].removesuffix(".weight")
        if not name.endswith(".weight"):
            return False
        found: Mapping[str, Any] | bool = self.apart.get(module, module in self.layers)
        return found


def _form(name: str) -> tuple[str, list[int]]:
    words = name.split(".")
    numbers = [int(word) for word in words if word.isdecimal()]
    return ".".join("*" if word.isdecimal() else word for word in words), numbers


def _named(form: str, numbers: list[int]) -> str:
    left = iter(numbers)
    return re.sub(r"(?<=\.)\*(?=\.|$)", lambda _: str(next(left)), form)


@cache
def rows() -> Mapping[str, MlxModel]:
    """Every row by its model type."""
    return dict(_rows())


def _rows() -> Iterator[tuple[str, MlxModel]]:
    found: Mapping[str, Any] = GIVEN
    if not found:
        found = json.loads(Path(__file__).with_name("mlx_models.json").read_text(encoding="utf-8"))["types"]
    for name, row in found.items():
        more = {key: row.get(key, {}) for key in ("apart", "renamed", "stacked")}
        yield name, MlxModel(frozenset(row["layers"]), **more)
