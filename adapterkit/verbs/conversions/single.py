"""To one file, as diffusers, kohya's scripts, ComfyUI or LyCORIS load a LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.adapters.config import FLAT
from adapterkit.errors import option
from adapterkit.verbs.conversions.adapters import laid_out, open_adapter, planned_tensors
from adapterkit.verbs.conversions.conversion import Conversion

if TYPE_CHECKING:
    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.formats.contents import FileModule
    from adapterkit.adapters.formats.plain import PlainFactors
    from adapterkit.adapters.formats.write import AdapterFiles
    from adapterkit.adapters.formats.write_single import Style
    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.requests.convert import ConvertRequest


def _plan(asked: ConvertRequest, jobs: int, name: str) -> Conversion:
    """An adapter of any format as a file of this style: as it is where it is LoRA, else by the factors of its deltas.

    A whole model goes into the layout that this style names.
    """
    from adapterkit.adapters.formats.write_single import STYLES, as_single
    from adapterkit.adapters.load import is_adapter
    from adapterkit.adapters.names import Names

    if not is_adapter(asked.src):
        from adapterkit.verbs.conversions import layouts

        return layouts.plan(asked, jobs, name)
    style = STYLES[name]
    parts = _parts(asked)
    if parts:
        notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
        return planned_tensors(parts[0].ref, _together(parts, style), parts[0].sources, name, notes)
    adapter, base = open_adapter(asked)
    names = None if base is None else Names(base.shapes, base.config)

    def layout(adapter: Adapter, factors: list[PlainFactors], whole: Mapping[str, Tensor]) -> AdapterFiles:
        return as_single(adapter, factors, whole, style, names)

    return laid_out(adapter, base, asked, name, layout)


def _parts(asked: ConvertRequest) -> list[Adapter]:
    """Of a file for several parts of a pipeline, and no base: each part, where their paths need no base."""
    from adapterkit.adapters.formats.parts import opened, undotted
    from adapterkit.adapters.load import load_adapter

    if asked.base is not None:
        return []
    adapter = undotted(load_adapter(asked.src))
    contents = adapter.contents
    flat = contents is not None and any(module.flat for module in contents.modules)
    if contents is None or len(contents.parts) < 2 or flat or adapter.config.get(FLAT):
        return []
    return [opened(adapter, contents, (part,)) for part in contents.parts]


def _together(parts: list[Adapter], style: Style) -> AdapterFiles:
    from adapterkit.adapters.formats.plain import scaled_factors, why_not_scaled
    from adapterkit.adapters.formats.write_single import as_single, component_lead
    from adapterkit.errors import UsageError

    factors: list[PlainFactors] = []
    whole: dict[str, Tensor] = {}
    modules: list[FileModule] = []
    for part in parts:
        found = scaled_factors(part, convolutions=True)
        if found is None or part.contents is None:
            raise UsageError(
                f"{part.ref}: {why_not_scaled(part)}; what it adds has to be computed against its base",
                f"name the base with {option('base')}",
            )
        modules += part.contents.modules
        lead = component_lead(part.contents.modules[0].part)
        factors += [replace(one, path=lead + one.path) for one in found[0]]
        whole |= found[1]
    first = parts[0]
    assert first.contents is not None
    return as_single(replace(first, contents=replace(first.contents, modules=tuple(modules))), factors, whole, style)


def diffusers(asked: ConvertRequest, jobs: int) -> Conversion:
    """See `_plan`."""
    return _plan(asked, jobs, "diffusers")


def kohya(asked: ConvertRequest, jobs: int) -> Conversion:
    """See `_plan`."""
    return _plan(asked, jobs, "kohya")


def comfyui(asked: ConvertRequest, jobs: int) -> Conversion:
    """See `_plan`."""
    return _plan(asked, jobs, "comfyui")


def lycoris(asked: ConvertRequest, jobs: int) -> Conversion:
    """See `_plan`."""
    return _plan(asked, jobs, "lycoris")
