"""The table of methods, by ``peft_type``; a family's file is imported when one of its methods is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from functools import cached_property

from adapterkit.adapters.method import Method
from adapterkit.adapters.methods.unmergeable import REASONS as UNMERGEABLE
from adapterkit.rows import brought

# file: the methods that it registers
FAMILIES: dict[str, tuple[str, ...]] = {
    "lora": ("LORA",),
    "adalora": ("ADALORA",),
    "vera": ("VERA", "PVERA"),
    "vectors": ("IA3", "LN_TUNING", "BEFT"),
    "lycoris": ("LOHA", "LOKR"),
    "rotations": ("OFT", "BOFT", "HRA", "ROAD"),
    "blocks": ("MISS", "BONE", "C3A", "GRALORA"),
    "lowrank": ("HIRA", "DELORA", "GLORA", "RANDLORA", "VBLORA"),
    "spectral": ("FOURIERFT", "WAVEFT"),
    "sparse": ("SHIRA", "SUPERTUNING"),
    "decomposed": ("OSF", "DEFT", "PEANUT", "FROD"),
    "pooled": ("TINYLORA", "UNILORA"),
    "tokens": ("TRAINABLE_TOKENS",),
    "single": ("LYCORIS",),
}


class _Methods(Mapping[str, Method]):
    def __init__(self) -> None:
        self._family = {kind: family for family, kinds in FAMILIES.items() for kind in kinds}

    def __getitem__(self, kind: str) -> Method:
        if kind not in self._family:
            return self._others[kind]
        module = importlib.import_module(f"adapterkit.adapters.methods.{self._family[kind]}")
        found: Method = next(method for method in module.METHODS if method.peft_type == kind)
        return found

    @cached_property
    def _others(self) -> dict[str, Method]:
        """Methods of files that no family above names; they are looked for when a kind is not known otherwise."""
        files = brought(__name__, __path__, "METHODS", FAMILIES)
        return {method.peft_type: method for methods in files for method in methods}

    def __iter__(self) -> Iterator[str]:
        return iter({**self._family, **self._others})

    def __len__(self) -> int:
        return len(self._family) + len(self._others)

    def __contains__(self, kind: object) -> bool:
        return kind in self._family or kind in self._others


METHODS: Mapping[str, Method] = _Methods()

__all__ = ["FAMILIES", "METHODS", "UNMERGEABLE"]
