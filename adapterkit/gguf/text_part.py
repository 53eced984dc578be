"""The part of an adapter that a GGUF model has: a vision or audio tower is a file of its own there."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.adapters.formats.narrow import TEXT, section_of
from adapterkit.errors import UnsupportedAdapter, counted

if TYPE_CHECKING:
    from adapterkit.adapters.adapter import Adapter


def text_part(adapter: Adapter) -> tuple[Adapter, tuple[str, ...]]:
    """An adapter without its factors for towers of images and sound, and a note on those.

    Raises:
        UnsupportedAdapter: nothing else is in it.
    """
    sections = {key: section_of(key) for key in adapter.tensors}
    counts = Counter(section for section in sections.values() if section != TEXT)
    if not counts or adapter.contents is not None:
        return adapter, ()
    road = "merge them into the Hugging Face base and make a projector of that"
    words = " and ".join(f"{counted(count, section + ' tensor')}" for section, count in counts.items())
    if sum(counts.values()) == len(sections):
        raise UnsupportedAdapter(
            f"{adapter.ref} changes the {' and '.join(counts)} part alone, which is no part of this file", road
        )
    kept = {key: tensor for key, tensor in adapter.tensors.items() if sections[key] == TEXT}
    return replace(adapter, tensors=kept), (
        f"{adapter.ref}: left out: {words}; a GGUF model is the text part ({road})",
    )
