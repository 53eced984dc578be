"""Hashes that the metadata of a safetensors file state of the file itself, as image programs show them.

========================  =====================================================================================
``sshs_model_hash``       sha256 of all bytes behind the header
``sshs_legacy_hash``      first 8 digits of the sha256 of 64 KiB at 1 MiB of the file, were ``ss_*`` its only metadata
``modelspec.hash_sha256`` ``0x`` and the sha256 of all bytes behind the header
========================  =====================================================================================

The first two are the rule of kohya-ss/sd-scripts (`library/train_util.py`, `precalculate_safetensors_hashes`), the third that
of Stability-AI/ModelSpec (README, "hash_sha256"). They are known when the tensors are written, so a plan has zeros in their
place, of the same length, and `adapterkit.checkpoint.hashing.fill` puts them in before the file has its name. In a store no byte is written twice, so
`filled` there computes the tensors once more, ahead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

MODEL, LEGACY, SPEC = "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"
HASHES = {MODEL: "0" * 64, LEGACY: "0" * 8, SPEC: "0x" + "0" * 64}
"""The names, and what a plan has in their place."""
TRAINING = "ss_"
_SPEC = "modelspec."


def with_room(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata with room for the hashes that go with them; what they stated of another file's bytes is gone."""
    kept = {name: value for name, value in metadata.items() if name not in HASHES}
    asked = [MODEL, LEGACY] if any(name.startswith(TRAINING) for name in kept) else []
    asked += [SPEC] if any(name.startswith(_SPEC) for name in kept) else []
    return kept | {name: HASHES[name] for name in asked}
