"""Adapters in another trainer's files: laid out from headers where factors and scalings are all there is, else computed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.bases import open_model
from adapterkit.errors import UsageError
from adapterkit.verbs.conversions.conversion import Conversion, ConvertOptions, Recorder, Ref, Run, count_types

if TYPE_CHECKING:
    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.formats.plain import PlainFactors
    from adapterkit.adapters.formats.write import AdapterFiles
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.checkpoint.files import Source
    from adapterkit.checkpoint.tensor import Tensor

    Layout = Callable[[Adapter, list[PlainFactors], Mapping[str, Tensor]], AdapterFiles]


def open_adapter(src: Ref, options: ConvertOptions) -> tuple[Adapter, Checkpoint | None]:
    """The adapter with module paths that need no base, and the base where one is given; no tensor is read.

    Raises:
        NotFound, AdapterError, TargetError, UsageError, UnsafeError, AuthError, HubError
    """
    from adapterkit.adapters.formats.plain import resolved
    from adapterkit.adapters.load import load_adapter

    base = None if options.base is None else open_model(options.base, headers_only=True)
    return resolved(load_adapter(src), base), base


def planned_files(adapter: Adapter, files: AdapterFiles, to: str) -> Conversion:
    """The plan of an adapter's files."""
    return planned_tensors(adapter.ref, files, adapter.sources, to, adapter.notes)


def planned_tensors(
    ref: str, files: AdapterFiles, sources: tuple[Source, ...], to: str, notes: tuple[str, ...] = ()
) -> Conversion:
    """The same for handles of any origin."""
    from adapterkit.checkpoint.plan import plan_file

    plan = plan_file(files.weights, list(files.tensors.values()), {"format": "pt"})
    types = count_types(files.tensors)
    return Conversion(ref, to, plan, files.tensors, sources, types, dict(files.side), (*notes, *files.notes))


def laid_out(adapter: Adapter, base: Checkpoint | None, options: ConvertOptions, to: str, layout: Layout) -> Conversion:
    """An adapter as plain LoRA in the files of ``layout``.

    Raises:
        UsageError: its deltas have to be computed against a base, and none is given.
    """
    from adapterkit.adapters.formats.plain import scaled_factors

    found = scaled_factors(adapter)
    if found is None:
        return _computed(adapter, base, options, to, layout)
    if options.rank or options.energy:
        raise UsageError(
            f"{adapter.ref} is LoRA already, whose factors are kept as they are", "change its rank with resize"
        )
    return planned_files(adapter, layout(adapter, *found), to)


def _computed(
    adapter: Adapter, base: Checkpoint | None, options: ConvertOptions, to: str, layout: Layout
) -> Conversion:
    from adapterkit.adapters.edits import method_of
    from adapterkit.checkpoint.plan import plan_file
    from adapterkit.verbs.combine import check_rank
    from adapterkit.verbs.family import open_family

    if base is None:
        name = method_of(adapter).title.split(",")[0]
        raise UsageError(
            f"{adapter.ref} is {name} with more than scalings, which is computed against its base",
            "name the base with --base",
        )
    notes = check_rank(options.rank, options.energy, open_family([adapter], base).slots.values())
    nothing = plan_file("nothing", [], {})
    return Computed(
        adapter.ref, to, nothing, {}, adapter.sources, {}, {}, (*adapter.notes, *notes),
        adapter=adapter, options=options, layout=layout,
    )  # fmt: skip


@dataclass(frozen=True)
class Computed(Conversion):
    """Deltas become factors first: exact where they have a low rank, else by singular value decomposition of W' - W.

    Ranks are known only when the deltas have been computed, so the plan has no bytes.
    """

    adapter: Adapter = field(kw_only=True)
    options: ConvertOptions = field(kw_only=True)
    layout: Layout = field(kw_only=True)

    def write(self, out: Path, run: Run) -> dict[str, Any]:
        from adapterkit.adapters.adapter import WEIGHTS
        from adapterkit.adapters.bound_rule import BoundRule
        from adapterkit.adapters.load import load_adapter
        from adapterkit.verbs.combine import make_adapter
        from adapterkit.verbs.family import open_family

        options = self.options
        family = open_family([self.adapter], open_model(options.need_base(self.to)))
        bounds: dict[str, Any] = {"rank": options.rank, "energy": options.energy, "full": True}

        def made(target: Path, record: Recorder | None) -> dict[str, Any]:
            written = record or (lambda folder: {})
            how: dict[str, Any] = {"jobs": run.jobs, "force": run.force, "progress": run.progress, **bounds}
            found = make_adapter(family, BoundRule(), [1.0], target, record=written, **how)
            kept = {"modules": found.modules, "notes": (*self.notes, *found.notes)}
            plain = load_adapter(target)
            return kept | {
                "files": (WEIGHTS,),
                "nbytes": found.nbytes,
                "tensors": len(plain.tensors),
                "types": count_types(plain.tensors),
            }

        if self.to == "peft":
            return made(out, run.record)
        from adapterkit.adapters.formats.plain import scaled_factors
        from adapterkit.checkpoint.publish import check_target

        check_target(out, [], 0, force=run.force)
        with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.") as folder:
            kept = made(Path(folder) / "plain", None)
            plain = load_adapter(Path(folder) / "plain")
            factors = scaled_factors(plain)
            assert factors is not None
            files = planned_files(plain, self.layout(plain, *factors), self.to)
            files.write(out, Run(run.record, run.jobs, run.force))
            shown = files.report(out)
            return kept | {"files": shown.files, "nbytes": shown.nbytes, "types": shown.types}
