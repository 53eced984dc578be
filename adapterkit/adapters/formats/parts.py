"""Which modules of a file go into which base, and what they are called there.

A file may hold adapters of several parts of a pipeline, and a base may be one of them, or a checkpoint of one file that
holds several. Every part finds its place or is said to have none: a part that the base holds and that does not fit is an
error, one that the base has not is left out and told. ``FILE#PART``, ``only`` and ``skip`` say on purpose what to take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.config import FLAT, PARTS
from adapterkit.adapters.families.names import DENOISER, ENCODERS
from adapterkit.adapters.formats.contents import Contents, FileModule, assembled, moved
from adapterkit.adapters.formats.keys import DOWN, UP
from adapterkit.errors import AdapterError, TargetError, UsageError, counted, option

if TYPE_CHECKING:
    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.names import Names

# What each part of a pipeline is; parts of one kind go to the same place.
KINDS: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "unet",
            "transformer",
            "diffusion_model",
            "model.diffusion_model",
            "prior",
            "prior_unet",
            "conditional_transformer",
        ),
        "denoiser",
    ),
    **dict.fromkeys(
        (
            *("te", "te1", "text_encoder", "text_encoders.clip_l", "text_encoders.clip_h"),
            *(
                f"text_encoders.{one}"
                for one in ("gemma2_2b", "qwen3_06b", "qwen3_4b", "qwen25_7b", "umt5xxl", "pile_t5xl")
            ),
        ),
        "te1",
    ),
    **dict.fromkeys(("te2", "text_encoder_2", "text_encoders.clip_g"), "te2"),
    **dict.fromkeys(("te3", "text_encoder_3", "text_encoders.t5xxl"), "te3"),
}
# Other names of a text encoder's modules: how one version of its classes leads them and another does not.
_LEADS = (
    *("text_model_", "model_", "transformer_", "model_language_model_", "language_model_", "encoder_"),
    *("cond_stage_model_transformer_", "conditioner_embedders_0_transformer_", "text_encoder_"),
)


def opened(adapter: Adapter, contents: Contents, only: Sequence[str] = ()) -> Adapter:
    """The adapter of a file before a base is known: of one part whose paths have dots as it will be merged, of any
    other with what is to be settled in its config.

    Raises:
        AdapterError: there is no such part, or nothing is left.
        UnsupportedAdapter: see `assembled`.
    """
    check_parts(only, contents.parts, adapter.ref)
    if only:
        contents = replace(contents, modules=contents.of(*only))
    if len(contents.parts) == 1:
        config, tensors = assembled(contents, contents.modules)
        return replace(adapter, config=config, tensors=tensors, contents=contents, only=tuple(only))
    configs: dict[str, Mapping[str, Any]] = {}
    tensors = {}
    for part in contents.parts:
        config, found = assembled(contents, contents.of(part))
        configs[part] = config.raw
        tensors |= {f"{part}.{name}" if part else name: tensor for name, tensor in found.items()}
    kind = next(iter(configs.values()))["peft_type"]
    config = replace(adapter.config, raw={"peft_type": kind, PARTS: configs})
    return replace(adapter, config=config, tensors=tensors, contents=contents, only=tuple(only))


# The family of each kind of part, where a file is read without a base.
_TEXT_ENCODER = "OpenCLIP text encoder"


def undotted(adapter: Adapter) -> Adapter:
    """The adapter of a file with names without dots, under the names that the families' tables have for all of them; as it
    is where they have none, or several.
    """
    from adapterkit.adapters.families.flat import dotted
    from adapterkit.adapters.families.told import SAID

    contents = adapter.contents
    if contents is None or contents.placed or not any(module.flat for module in contents.modules):
        return adapter
    said = [text for name in SAID if (text := contents.metadata.get(name))]
    modules: list[FileModule] = []
    for part in contents.parts:
        own = contents.of(part)
        flat = {module.path: size for module in own if module.flat and (size := size_of(module)) is not None}
        encoder = KINDS.get(part, "").startswith("te")
        paths = dotted(flat, said, lambda family, encoder=encoder: (family.name == _TEXT_ENCODER) == encoder)  # type: ignore[misc]
        if paths is None or len(flat) < sum(module.flat for module in own):
            return adapter
        modules += [moved(module, paths[module.path]) if module.flat else module for module in own]
    return opened(adapter, replace(contents, modules=tuple(modules)), adapter.only)


def size_of(module: FileModule) -> tuple[int, int] | None:
    """The rows and columns that a LoRA changes; None of another method."""
    down, up = module.tensors.get(DOWN), module.tensors.get(UP)
    return None if down is None or up is None else (up.shape[0], down.shape[1])


def settled(adapter: Adapter, names: Names | None, fit: Callable[[Adapter], object] | None = None) -> Adapter:
    """The adapter for one base: its parts in their places, its paths with dots.

    Args:
        names: those of the base; None where there is none.
        fit: puts one part onto the base, and raises TargetError where it does not fit.

    Raises:
        TargetError: no part fits the base, one that the base holds does not, or a name stands for several modules.
        UsageError: the file needs a base to be understood, and none is given.
        AdapterError, UnsupportedAdapter: a part could not be merged into any base.
    """
    contents = adapter.contents
    if contents is None or contents.placed:
        return adapter
    parts = contents.parts
    if names is None:
        adapter = undotted(adapter)
        if len(parts) > 1:
            listed = ", ".join(part or "one without a name" for part in parts)
            raise UsageError(
                f"{adapter.ref} is for several parts of a pipeline ({listed})", f"name one with {option('base')}"
            )
        if adapter.config.get(FLAT):
            raise UsageError(
                f"{adapter.ref} names modules without dots, which only a base can tell",
                f"name it with {option('base')}",
            )
        return adapter
    places = _places(names)
    if places:
        return _placed(adapter, contents, names, places)
    if len(parts) == 1:
        return _made(adapter, contents, _resolved(contents.modules, names, adapter), ())
    assert fit is not None
    return _chosen(adapter, contents, names, fit)


def _places(names: Names) -> dict[str, str]:
    """Where the parts of a pipeline lie in a checkpoint of one file: kind and lead; empty where the base is one part."""
    leads = names.families.leads
    inside = names.components
    if inside:
        kinds = {KINDS.get(name, name): f"{name}." for name in reversed(inside)}
        if "te2" in kinds:
            kinds.setdefault("te3", kinds["te2"])  # sd-scripts calls Flux' T5 the third, diffusers the second
        return {**kinds, **{name: f"{name}." for name in inside}}
    found = {
        kind: lead for kind, known in ENCODERS.items() if (lead := next((one for one in known if one in leads), None))
    }
    denoiser = next((lead for lead in DENOISER if lead in leads), None)
    if found and denoiser is not None:
        found["denoiser"] = denoiser
    return found


def _placed(adapter: Adapter, contents: Contents, names: Names, places: Mapping[str, str]) -> Adapter:
    """Every part in its place of a checkpoint of one file."""
    modules: list[FileModule] = []
    left = []
    for part in contents.parts:
        own = contents.of(part)
        kind = KINDS.get(part, "")
        lead = places.get(part) or places.get(kind)
        if names.components and not part:
            lead = places.get("denoiser")
        if part and lead is None:
            if part in adapter.only or len(contents.parts) == 1:
                raise TargetError(
                    f"{adapter.ref}: the base has no place for '{part}' ({counted(len(own), 'module')})",
                    f"it holds {', '.join(names.components or sorted(places))}; name another part",
                )
            left.append(f"{part} ({counted(len(own), 'module')}): the base has no such part")
            continue
        modules += _resolved(own, names, adapter, lead or "")
    others = [name for name in names.components if name.startswith("transformer_")]
    denoised = {places.get(part) or places.get(KINDS.get(part, "denoiser")) for part in contents.parts}
    if others and places.get("denoiser") in denoised and not denoised & {f"{name}." for name in others}:
        said = f"{adapter.ref} goes into {places['denoiser'].removesuffix('.')}; {' and '.join(others)} stays as it is"
        adapter = replace(adapter, notes=(*adapter.notes, said))
    if not modules:
        raise TargetError(f"none of the parts of {adapter.ref} fits the base", "give the base it was trained on")
    return _made(adapter, contents, modules, left)


def _chosen(adapter: Adapter, contents: Contents, names: Names, fit: Callable[[Adapter], object]) -> Adapter:
    """The one part that the base is; several where each finds modules of its own."""
    fitting: dict[str, Adapter] = {}
    misfits: dict[str, str] = {}
    for part in contents.parts:
        try:
            own = _made(adapter, contents, _resolved(contents.of(part), names, adapter), ())
            fit(own)
            fitting[part] = own
        except TargetError as error:
            misfits[part] = error.message.removeprefix(f"{adapter.ref}: ")
    words = [f"of {part or 'the one without a name'}, {why}" for part, why in misfits.items()]
    if not fitting:
        raise TargetError(
            f"none of the parts of {adapter.source.name} fits the base: {'; '.join(words)}",
            "give the folder of one of these parts as the base",
        )
    held = {module.path for own in fitting.values() for module in _modules(own)}
    together = len(held) == sum(len(_modules(own)) for own in fitting.values())
    if len(fitting) > 1 and not together:
        raise TargetError(
            f"{adapter.source.name}: its parts {' and '.join(fitting)} have modules of the same names and shapes as the base",
            f"name the one to merge, as {adapter.ref}#{next(iter(fitting))}, or several that go together, as "
            f"{adapter.ref}#{'+'.join(fitting)}",
        )
    for part in misfits:
        _check_not_held(part, contents, names, fit, adapter, held)
    left = [
        f"{part or 'what names no part'} ({counted(len(contents.of(part)), 'module')}): not of this base"
        for part in misfits
    ]
    chosen = [module for own in fitting.values() for module in _modules(own)]
    return _made(adapter, contents, chosen, left)


def _modules(adapter: Adapter) -> tuple[FileModule, ...]:
    assert adapter.contents is not None
    return adapter.contents.modules


def _check_not_held(
    part: str,
    contents: Contents,
    names: Names,
    fit: Callable[[Adapter], object],
    adapter: Adapter,
    held: set[str],
) -> None:
    """A part that is left out must not be one that the base holds in the main.

    Raises:
        TargetError: most of its modules fit, and are no other part's.
    """
    fits, missing = 0, ""
    for module in contents.of(part):
        try:
            (one,) = _resolved([module], names, adapter)
            if one.path in held:
                return  # the same names as the part that fits: another text encoder
            fit(_made(adapter, contents, [one], ()))
            fits += 1
        except TargetError as error:
            missing = missing or error.message
    if 2 * fits > len(contents.of(part)):
        raise TargetError(
            f"{adapter.ref}: most of the part '{part}' is in the base, and some is not: {missing}",
            f"give the base it was trained on, or leave the part out by name ({option('skip')})",
        )


def check_parts(only: Iterable[str], parts: Iterable[str], where: str) -> None:
    """Whether a file has the parts that a user named.

    Raises:
        AdapterError: it has not.
    """
    held = [part for part in parts if part]
    lost = next((part for part in only if part not in held), None)
    if lost is not None:
        hint = f"it holds {', '.join(held)}" if held else "its keys name no part of a pipeline; leave it out"
        raise AdapterError(f"{where}: the file has no part '{lost}'", hint)


def _made(adapter: Adapter, contents: Contents, modules: Sequence[FileModule], left: Sequence[str]) -> Adapter:
    config, tensors = assembled(contents, modules)
    notes = (*adapter.notes, *(f"{adapter.ref}: left out: {one}" for one in left))
    return replace(
        adapter,
        config=config,
        tensors=tensors,
        notes=notes,
        contents=replace(contents, modules=tuple(modules), placed=True),
        left=(*adapter.left, *left),
    )


def led(adapter: Adapter, lead_of: Callable[[str], str]) -> Adapter:
    """The adapter of a file without a base, its modules led by what the parts of a pipeline are called.

    It is as it was where its names have no dots.

    Args:
        lead_of: gives the lead of a part.
    """
    contents = adapter.contents
    if contents is None or contents.placed or any(module.flat for module in contents.modules):
        return adapter
    return _made(
        adapter, contents, [moved(module, lead_of(module.part) + module.path) for module in contents.modules], ()
    )


def _resolved(modules: Sequence[FileModule], names: Names, adapter: Adapter, lead: str = "") -> list[FileModule]:
    """The modules under paths with dots, led as the base has them.

    Raises:
        TargetError: a flat name stands for no module of the base, or for several.
    """
    if not any(module.flat for module in modules):
        return [moved(module, lead + module.path) for module in modules]
    known = _flat_names(names, lead)
    return [
        moved(module, _unflat(module.path, known, adapter, names) if module.flat else lead + module.path)
        for module in modules
    ]


def _flat_names(names: Names, lead: str) -> Mapping[str, set[str]]:
    """The modules of a base by their names without dots, those of other layouts too."""
    cached = names.flat_names.get(lead)
    if cached is not None:
        return cached
    known: dict[str, set[str]] = {}
    for parameter in names.parameters():
        module = parameter.rpartition(".")[0]
        if module.startswith(lead):
            known.setdefault(module.removeprefix(lead).replace(".", "_"), set()).add(module)
            if parameter.count(".") and not lead:
                known.setdefault(parameter.replace(".", "_"), set()).add(parameter)
    real = {name: set(modules) for name, modules in known.items()}
    for alias, module in names.families.aliases():
        if module.startswith(lead):
            for name in {alias.replace(".", "_"), module.replace(".", "_")}:
                if name not in real:
                    known.setdefault(name, set()).add(module)
    names.flat_names[lead] = known
    return known


def _unflat(name: str, known: Mapping[str, set[str]], adapter: Adapter, names: Names) -> str:
    found = known.get(name) or {module for other in _aliases(name) for module in known.get(other, ())}
    # Two families may write one flat name with other dots, and mean the same rows.
    if len({_rows(names, module) for module in found}) != 1:
        words = "several modules" if found else "no module"
        raise TargetError(
            f"{adapter.source.name}: '{name}' stands for {words} of the base",
            "check that this is the model it was trained on, and that the file holds no other part of a pipeline",
        )
    return min(found)


def _rows(names: Names, module: str) -> object:
    targets = (names.find(f"{module}.weight"), names.find(module))
    return next((target.pieces for target in targets if target is not None), module)


def _aliases(name: str) -> Iterable[str]:
    """What a base may call a module of this flat name, the name itself aside."""
    yield from (name.removeprefix(lead) for lead in _LEADS if name.startswith(lead))
    yield from (lead + name for lead in _LEADS)
