"""PEFT as the oracle: what it merges, and what its unmerged adapter computes, for every tuner, layer and switch."""

from __future__ import annotations

from pathlib import Path

import pytest
from method_cases import Case, cases, run

from adapterkit.adapters.methods import METHODS, UNMERGEABLE


@pytest.mark.parametrize("case", cases(), ids=str)
def test_merges_as_peft_does(case: Case, tmp_path: Path) -> None:
    found = run(case, tmp_path)
    assert found.changed >= len(case.modules)
    assert found.merge <= case.tolerance
    assert found.forward <= 2e-5  # float32 matmuls of the layer, beside the delta's


def test_every_method_of_peft_is_known() -> None:
    from peft import PeftType

    known = {*METHODS, *UNMERGEABLE}
    assert {kind.value for kind in PeftType} - known == set()


def test_every_mergeable_method_is_swept() -> None:
    swept = {case.config().peft_type.value for case in cases()}
    # LoRA has its own suite; PEFT can no longer load Bone; LyCORIS's own forms are held against LyCORIS.
    elsewhere = {"LORA", "BONE", "LYCORIS"}
    assert set(METHODS) - swept == elsewhere


def test_every_config_field_of_peft_is_known() -> None:
    """A field that a method does not know stops a merge, so none of those PEFT writes may be missing."""
    import dataclasses

    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from adapterkit.adapters.config import COMMON_FIELDS

    missing = {}
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        if kind.value in METHODS:
            fields = {field.name for field in dataclasses.fields(config)}
            missing[kind.value] = fields - METHODS[kind.value].fields - COMMON_FIELDS
    assert {kind: fields for kind, fields in missing.items() if fields} == {}


def test_every_family_registers_what_the_table_says() -> None:
    import importlib

    from adapterkit.adapters.methods import FAMILIES

    for family, kinds in FAMILIES.items():
        module = importlib.import_module(f"adapterkit.adapters.methods.{family}")
        assert tuple(method.peft_type for method in module.METHODS) == kinds
