"""A part of an adapter, named on purpose: a part of a pipeline, a section of a model, or modules by a pattern."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from adapterkit.errors import AdapterError, option

if TYPE_CHECKING:
    from adapterkit.adapters.adapter import Adapter

# Sections of a model of several senses, by the modules that they are.
SECTIONS: Mapping[str, re.Pattern[str]] = {
    "vision": re.compile(
        r"(?:^|\.)(?:visual|vision\w*|image_\w+|multi_?modal_projector|mm_projector|mlp1|vit|img_\w+|aligner|connector)"
        r"(?:\.|$)"
    ),
    "audio": re.compile(
        r"(?:^|\.)(?:audio\w*|speech_\w+|code2wav|token2wav|codec_\w+|depth_decoder|talker|code_predictor)(?:\.|$)"
    ),
}
TEXT = "text"  # whatever is of no other section


def section_of(path: str) -> str:
    """The section of a model that a module is of."""
    return next((name for name, pattern in SECTIONS.items() if pattern.search(path)), TEXT)


def named_by(word: str, part: str, path: str) -> bool:
    """Whether a word names a module: its part of a pipeline, its section of a model, or a pattern of its path or of a
    piece of it between dots (in flat names, underscores)."""
    if word == part:
        return True
    if word == TEXT or word in SECTIONS:
        return section_of(path) == word
    flat = word.replace(".", "_")
    patterns = [word, f"*.{word}", f"{word}.*", f"*.{word}.*"]
    if "." not in path:
        patterns += [flat, f"*_{flat}", f"{flat}_*", f"*_{flat}_*"]
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def narrowed(adapter: Adapter, only: Sequence[str], skip: Sequence[str]) -> Adapter:
    """The adapter with what ``only`` names, without what ``skip`` names; its notes and `left` say what was left out.

    Raises:
        AdapterError: a word names nothing of it, or nothing is left.
        UnsupportedAdapter: see `adapterkit.adapters.formats.contents.assembled`.
    """
    contents = adapter.contents
    if contents is None:
        paths = list(adapter.tensors)
        kept = set(_kept([("", path) for path in paths], only, skip, adapter.ref))
        tensors = {path: tensor for place, (path, tensor) in enumerate(adapter.tensors.items()) if place in kept}
        return _said(replace(adapter, tensors=tensors), len(paths) - len(kept), "tensors", only, skip)
    from adapterkit.adapters.formats.parts import opened

    places = _kept([(module.part, module.path) for module in contents.modules], only, skip, adapter.ref)
    modules = tuple(contents.modules[place] for place in places)
    parts = {module.part for module in modules}
    smaller = opened(adapter, replace(contents, modules=modules))
    smaller = replace(smaller, only=tuple(word for word in only if word in parts) or adapter.only)
    return _said(smaller, len(contents.modules) - len(modules), "modules", only, skip)


def _kept(places: Sequence[tuple[str, str]], only: Sequence[str], skip: Sequence[str], where: str) -> list[int]:
    def among(words: Sequence[str]) -> Callable[[tuple[str, str]], bool]:
        for word in words:
            if not any(named_by(word, *place) for place in places):
                parts = ", ".join(dict.fromkeys(part for part, _ in places if part))
                hint = f"it holds {parts}" if parts else "name modules by a pattern, as '*.k_img'"
                raise AdapterError(f"{where} has nothing that '{word}' names", hint)
        return lambda place: any(named_by(word, *place) for word in words)

    wanted, unwanted = among(only), among(skip)
    kept = [at for at, place in enumerate(places) if (not only or wanted(place)) and not unwanted(place)]
    if not kept:
        raise AdapterError(f"{where}: nothing is left of it", "skip less of it")
    return kept


def _said(adapter: Adapter, count: int, what: str, only: Sequence[str], skip: Sequence[str]) -> Adapter:
    words = [f"{option('only', word)}" for word in only] + [f"{option('skip', word)}" for word in skip]
    left = f"{count} {what} ({', '.join(words)})"
    return replace(adapter, notes=(*adapter.notes, f"{adapter.ref}: left out: {left}"), left=(*adapter.left, left))
