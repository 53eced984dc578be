"""The table of methods, by ``peft_type``; a family's file is imported when one of its methods is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping

from adapterkit.adapters.method import Method
from adapterkit.adapters.methods.unmergeable import REASONS as UNMERGEABLE

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
        module = importlib.import_module(f"adapterkit.adapters.methods.{self._family[kind]}")
        found: Method = next(method for method in module.METHODS if method.peft_type == kind)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._family)

    def __len__(self) -> int:
        return len(self._family)

    def __contains__(self, kind: object) -> bool:
        return kind in self._family


METHODS: Mapping[str, Method] = _Methods()

__all__ = ["FAMILIES", "METHODS", "UNMERGEABLE"]
