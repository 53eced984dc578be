"""An output of several types, ``quant = "Q8_0,Q4_K_M"``, becomes an output for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from adapterkit.errors import UsageError
from adapterkit.places import address_of
from adapterkit.recipe.parse import Place, RecipeFile
from adapterkit.recipe.schema import OutputTable
from adapterkit.verbs.ladder import place_of, types_of


def spread(file: RecipeFile) -> RecipeFile:
    """The recipe with an output ``NAME-TYPE`` for each type that an output names; their keys stand where its keys stand.

    Raises:
        RecipeError: what is done with an output that is several, a type that is named twice, a name that is taken.
    """
    made: dict[str, OutputTable] = {}
    lines = dict(file.lines)
    for name, asked in file.recipe.outputs.items():
        place: Place = ("outputs", name)
        try:
            types = types_of(asked.quant)
        except UsageError as error:
            file.fail((*place, "quant"), f"'{asked.quant}' names a type twice or none", error.hint)
        if len(types) < 2:
            made[name] = asked
            continue
        if Path(asked.path).suffix != ".gguf" or asked.to not in (None, "gguf"):
            file.fail((*place, "quant"), f"'{asked.quant}' is for GGUF outputs", "give it a path like OUT.gguf")
        for key in ("register", "push"):
            if getattr(asked, key) is not None:
                file.fail((*place, key), f"'{key}' is of one file, and this output is several", "name each by itself")
        for number, one in enumerate(types):
            rung = f"{name}-{one.upper()}"
            if rung in file.recipe.outputs:
                file.fail((*place, "quant"), f"there is an output '{rung}' already", "give this one another name")
            options = {**asked.options, "quant": one}
            if number:
                options.pop("mmproj", None)
            made[rung] = replace(
                asked, path=str(place_of(address_of(asked.path) or Path(asked.path), one)), options=options
            )
            lines |= _renamed(lines, (*file.prefix, *place), (*file.prefix, "outputs", rung))
    return replace(file, recipe=replace(file.recipe, outputs=made), lines=lines)


def _renamed(lines: Mapping[Place, int], old: Place, new: Place) -> Iterator[tuple[Place, int]]:
    """The lines of a table's keys, under its other name."""
    found = [(place, line) for place, line in lines.items() if place[: len(old)] == old]
    return ((((*new, *place[len(old) :])), line) for place, line in found)
