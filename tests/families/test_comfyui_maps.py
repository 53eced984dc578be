"""ComfyUI's own maps between diffusers' names and the original ones, as data, beside the families' tables, both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapterkit.adapters.families.names import FamilyNames

MAPS: dict[str, Any] = json.loads((Path(__file__).parent / "comfyui_maps.json").read_text(encoding="utf-8"))
WIDTH = 8
LAST = "joint_blocks.1.context_block.adaLN_modulation.1.weight"  # the one block of SD3 with two rows of six


def shape_of(tensor: str, rows: list[list[Any]]) -> tuple[int, ...]:
    """A tensor of the original layout, as large as its parts need."""
    whole = WIDTH * max((row[2] + row[3] for row in rows if row[1] == tensor and len(row) == 4), default=1)
    if "adaLN_modulation" in tensor or "_mod" in tensor or "modF" in tensor:
        whole = WIDTH * (2 if tensor == LAST or "final_layer" in tensor or "modF" in tensor else 6)
    return (whole,) if tensor.endswith((".scale", ".bias")) or "norm" in tensor else (whole, WIDTH)


def placed(
    rows: list[list[Any]],
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]], dict[str, list[Any]]]:
    """Shapes of the original tensors and of diffusers', and where the rows of these are: (first row, tensor, at, count)."""
    stored = {row[1]: shape_of(row[1], rows) for row in rows}
    own: dict[str, tuple[int, ...]] = {}
    places: dict[str, list[Any]] = {}
    for row in rows:
        name, tensor = row[:2]
        total, rest = stored[tensor][0], stored[tensor][1:]
        if len(row) == 4:
            places[name] = [(0, tensor, row[2] * WIDTH, row[3] * WIDTH)]
        elif len(row) == 3:
            places[name] = [(0, tensor, total // 2, total // 2), (total // 2, tensor, 0, total // 2)]
        else:
            places[name] = [(0, tensor, 0, total)]
        own[name] = (sum(place[3] for place in places[name]), *rest)
    return stored, own, places


@pytest.mark.parametrize("family", [name for name in MAPS if name != "source"])
def test_every_row_is_where_comfyui_has_it(family: str) -> None:
    stored, own, places = placed(MAPS[family])
    into_original, into_diffusers = FamilyNames(stored), FamilyNames(own)
    for name, wanted in places.items():
        found = into_original.find(name)
        assert found is not None, name
        assert [(p.row, p.tensor, p.at, p.count) for p in found.pieces] == wanted, name
        for row, tensor, at, count in wanted:
            layout = into_diffusers.find(tensor)
            assert layout is not None, tensor
            here = next(p for p in layout.pieces if p.tensor == name and p.row == at)
            assert (here.at, here.count) == (row, count), tensor
