"""Adapters in another trainer's files: laid out from headers where factors and scalings are all there is, else computed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.bases import open_model
from adapterkit.checkpoint.write import Room, Writing
from adapterkit.errors import UnsupportedAdapter, UsageError, option
from adapterkit.places import Address
from adapterkit.requests.convert import ConvertRequest
from adapterkit.verbs.conversions.conversion import Conversion, count_types

if TYPE_CHECKING:
    from pathlib import Path

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.formats.plain import PlainFactors
    from adapterkit.adapters.formats.write import AdapterFiles
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.checkpoint.files import Source
    from adapterkit.checkpoint.plan import Plan
    from adapterkit.checkpoint.tensor import Tensor

    Layout = Callable[[Adapter, list[PlainFactors], Mapping[str, Tensor]], AdapterFiles]


def open_adapter(asked: ConvertRequest) -> tuple[Adapter, Checkpoint | None]:
    """The adapter with module paths that need no base, and the base where one is given; no tensor is read.

    Raises:
        NotFound, AdapterError, TargetError, UsageError, UnsafeError, AuthError, HubError
    """
    from adapterkit.adapters.formats.plain import resolved
    from adapterkit.adapters.load import load_adapter

    base = None if asked.base is None else open_model(asked.base, headers_only=True)
    return resolved(load_adapter(asked.src), base), base


def planned_files(adapter: Adapter, files: AdapterFiles, to: str) -> Conversion:
    """The plan of an adapter's files."""
    return planned_tensors(adapter.ref, files, adapter.sources, to, adapter.notes)


def planned_tensors(
    ref: str, files: AdapterFiles, sources: tuple[Source, ...], to: str, notes: tuple[str, ...] = ()
) -> Conversion:
    """The same for handles of any origin."""
    from adapterkit.checkpoint.plan import plan_file

    plan = plan_file(files.weights, list(files.tensors.values()), files.metadata)
    types = count_types(files.tensors)
    return Conversion(ref, to, plan, files.tensors, sources, types, dict(files.side), (*notes, *files.notes))


def laid_out(adapter: Adapter, base: Checkpoint | None, asked: ConvertRequest, to: str, layout: Layout) -> Conversion:
    """An adapter as plain LoRA in the files of ``layout``.

    Raises:
        UsageError: its deltas have to be computed against a base, and none is given.
        UnsupportedAdapter: it is of convolutions, which this format is not written with.
    """
    from adapterkit.adapters.formats.plain import scaled_factors
    from adapterkit.adapters.formats.write_single import STYLES

    found = scaled_factors(adapter, convolutions=to in STYLES)
    if found is None:
        return _computed(adapter, base, asked, to, layout)
    if asked.rank or asked.energy:
        raise UsageError(
            f"{adapter.ref} is LoRA already, whose factors are kept as they are", "change its rank with resize"
        )
    return planned_files(adapter, layout(adapter, *found), to)


def _computed(adapter: Adapter, base: Checkpoint | None, asked: ConvertRequest, to: str, layout: Layout) -> Conversion:
    from adapterkit.adapters.formats.plain import why_not_scaled
    from adapterkit.adapters.formats.write_single import STYLES
    from adapterkit.checkpoint.plan import plan_file
    from adapterkit.verbs.combine import check_rank
    from adapterkit.verbs.family import open_family

    if to != "peft" and to not in STYLES:
        check_convolutions(adapter, to)
    if base is None:
        raise UsageError(
            f"{adapter.ref}: {why_not_scaled(adapter, convolutions=to in STYLES)}; what it adds has to be computed "
            "against its base",
            f"name the base with {option('base')}",
        )
    notes = check_rank(asked.rank, asked.energy, open_family([adapter], base).slots.values())
    nothing = plan_file("nothing", [], {})
    notes = [*notes, "ranks are known when the deltas are computed, so the plan has no bytes"]
    stage = Computed(adapter, asked, to, layout).run
    return Conversion(adapter.ref, to, nothing, {}, adapter.sources, {}, {}, (*adapter.notes, *notes), stage=stage)


def check_convolutions(adapter: Adapter, to: str) -> None:
    """Refuse a LoRA of convolutions, whose factors are no two matrices, with or without the base.

    Raises:
        UnsupportedAdapter: it is one.
    """
    from adapterkit.adapters.formats.plain import convolution

    if path := convolution(adapter):
        raise UnsupportedAdapter(
            f"{adapter.ref}: {path} is a convolution, and a LoRA of convolutions is not written as {to}",
            f"convert it with {option('to', 'peft')}, kohya or diffusers, which keep it, or merge it into the model",
        )


@dataclass(frozen=True)
class Computed:
    """Deltas become factors first: exact where they have a low rank, else by singular value decomposition of W' - W."""

    adapter: Adapter
    asked: ConvertRequest
    to: str
    layout: Layout

    def run(self, room: Room) -> Writing:
        """Compute the factors; a plain LoRA of them, in the files of the layout."""
        from adapterkit.adapters.adapter import WEIGHTS
        from adapterkit.adapters.bound_rule import BoundRule
        from adapterkit.verbs.combine import Making
        from adapterkit.verbs.family import open_family

        asked = self.asked
        target = asked.target
        assert target is not None
        family = open_family([self.adapter], open_model(asked.need_base(self.to)))
        making = Making(family, BoundRule(), (1.0,), target, rank=asked.rank, energy=asked.energy, full=True)
        made = making.run(room)
        plain = _opened(self.adapter, made)
        facts: dict[str, Any] = {
            "modules": made.facts["modules"],
            "types": count_types(made.tensors),
            "files": (WEIGHTS,),
        }
        if self.to != "peft":
            from adapterkit.adapters.formats.plain import scaled_factors
            from adapterkit.adapters.formats.write_single import STYLES

            factors = scaled_factors(plain, convolutions=self.to in STYLES)
            if factors is None:
                check_convolutions(plain, self.to)
                raise UnsupportedAdapter(
                    f"{self.adapter.ref} changes whole stacks of experts, which are no modules of {self.to}",
                    "merge it into the model, in the layout that the server loads",
                )
            files = planned_files(plain, self.layout(plain, *factors), self.to)
            made = replace(made, plan=filed(files.plan, target), tensors=files.tensors, side_files=files.side)
            facts |= {"types": files.types, "files": tuple(file.name for file in files.plan.files)}
        return replace(made, facts=facts)


def filed(plan: Plan, target: Path | Address | None) -> Plan:
    """The plan of a file that is the output itself, where the output has a file's name."""
    return replace(plan, layout="file") if target is not None and target.suffix == ".safetensors" else plan


def _opened(adapter: Adapter, made: Writing) -> Adapter:
    """What will be written, as an adapter."""
    from adapterkit.adapters.config import AdapterConfig
    from adapterkit.adapters.keys import PREFIX
    from adapterkit.checkpoint.folder import ADAPTER_CONFIG

    config = AdapterConfig(json.loads(made.side_files[ADAPTER_CONFIG]), adapter.ref)
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in made.tensors.items()}
    return replace(adapter, config=config, tensors=tensors, side_files=(), notes=())
