"""Adapters that are damaged, mixed up or not understood: one sentence that names what and where, and nothing merged."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from method_cases import Case, cases, make_net, merged_tensors, save_base, train
from safetensors.torch import load_file, save_file

from adapterkit.errors import AdapterError, AdapterkitError, TargetError, UnsupportedAdapter

PREFIX = "base_model.model."
Tensors = dict[str, torch.Tensor]


def rewritten(case: Case, folder: Path, change: Callable[[Tensors, dict[str, Any]], None]) -> None:
    """Train, save, change what was saved, and merge that."""
    save_base(make_net(), folder / "base")
    train(make_net(), case.config(), folder / "adapter", case.noise)
    weights, config = folder / "adapter" / "adapter_model.safetensors", folder / "adapter" / "adapter_config.json"
    tensors, fields = load_file(weights), json.loads(config.read_text())
    change(tensors, fields)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, weights)
    config.write_text(json.dumps(fields))
    merged_tensors(folder / "base", folder / "adapter")


def one_per_method() -> list[Case]:
    first: dict[str, Case] = {}
    for case in cases():
        first.setdefault(case.method, case)
    return list(first.values())


@pytest.mark.parametrize("case", one_per_method(), ids=lambda case: case.method)
def test_a_missing_tensor_is_named(case: Case, tmp_path: Path) -> None:
    """Every tensor in turn; what is left must not be merged as if nothing were missing."""
    save_base(make_net(), tmp_path / "base")
    train(make_net(), case.config(), tmp_path / "adapter", case.noise)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    first = case.modules[0]
    copies = ("randlora_A", "randlora_B")  # PEFT saves the shared tensors once more with every module
    mine = [name for name in tensors if f".{first}." in name and not name.endswith(copies)]
    alone = len(mine) == 1 or case.method in ("LNTuning", "Glora")
    for name in mine if not alone else ():
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, weights)
        with pytest.raises(AdapterkitError, match=re.escape(first)):
            merged_tensors(tmp_path / "base", tmp_path / "adapter")
    for name in (name for name in tensors if PREFIX not in name):
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, weights)
        with pytest.raises(AdapterError, match=re.escape(name.removeprefix("base_model."))):
            merged_tensors(tmp_path / "base", tmp_path / "adapter")


@pytest.mark.parametrize("case", one_per_method(), ids=lambda case: case.method)
def test_a_wrong_shape_is_named(case: Case, tmp_path: Path) -> None:
    """Every dimension of every tensor of a module, one element longer."""
    save_base(make_net(), tmp_path / "base")
    train(make_net(), case.config(), tmp_path / "adapter", case.noise)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    first = case.modules[0]
    for name, tensor in tensors.items():
        if f".{first}." not in name or "randlora_A" in name or "randlora_B" in name:
            continue
        for axis in range(tensor.ndim):
            longer = torch.cat((tensor, tensor.narrow(axis, 0, 1)), dim=axis)
            save_file({**tensors, name: longer}, weights)
            if "_spectrum" in name:  # their length is known to the file only
                continue
            with pytest.raises((TargetError, AdapterError), match=re.escape(first)):
                merged_tensors(tmp_path / "base", tmp_path / "adapter")


@pytest.mark.parametrize("case", one_per_method(), ids=lambda case: case.method)
def test_an_extra_tensor_is_named(case: Case, tmp_path: Path) -> None:
    def change(tensors: Tensors, fields: dict[str, Any]) -> None:
        tensors[f"{PREFIX}{case.modules[0]}.surprise"] = torch.ones(2)

    with pytest.raises(TargetError, match=r"'\S+\.surprise' has no target"):
        rewritten(case, tmp_path, change)


def test_two_methods_in_one_file(tmp_path: Path) -> None:
    def change(tensors: Tensors, fields: dict[str, Any]) -> None:
        tensors[f"{PREFIX}layers.0.wide.lora_A.weight"] = torch.ones(4, 32)

    with pytest.raises(
        AdapterError, match=r"'layers\.0\.wide\.lora_A\.weight' belongs to LORA and the config says LOHA"
    ):
        rewritten(Case("LoHa", "Linear", {"r": 4}), tmp_path, change)


def test_the_config_of_another_method(tmp_path: Path) -> None:
    def change(tensors: Tensors, fields: dict[str, Any]) -> None:
        for name in ("eps", "num_cayley_neumann_terms", "oft_block_size", "use_cayley_neumann"):
            del fields[name]
        fields["peft_type"] = "HRA"

    with pytest.raises(AdapterError, match="belongs to OFT and the config says HRA"):
        rewritten(Case("OFT", "Linear", {"r": 0, "oft_block_size": 8}), tmp_path, change)


def test_an_unknown_method(tmp_path: Path) -> None:
    def change(tensors: Tensors, fields: dict[str, Any]) -> None:
        fields["peft_type"] = "TELEPATHY"

    with pytest.raises(AdapterError, match="unknown type 'TELEPATHY'"):
        rewritten(Case("HRA", "Linear", {"r": 4}), tmp_path, change)


FIELDS = [
    (Case("Miss", "Linear", {"r": 8}), {"init_weights": "cat"}, AdapterError, "'init_weights' is 'cat'"),
    (Case("Road", "Linear", {"group_size": 8}), {"variant": "road_9"}, AdapterError, "'variant' is 'road_9'"),
    (Case("Road", "Linear", {"group_size": 8}), {"group_size": 7}, TargetError, "groups of 7"),
    (Case("Deft", "Linear", {"r": 4}), {"decomposition_method": "lu"}, AdapterError, "'decomposition_method' is 'lu'"),
    (Case("Peanut", "Linear", {"r": 4}), {"act_fn": "snake"}, AdapterError, "'act_fn' is 'snake'"),
    (
        Case("WaveFT", "Linear", {"n_frequency": 9}),
        {"wavelet_family": "coif5"},
        AdapterError,
        "'wavelet_family' is 'coif5'",
    ),
    (Case("OFT", "Linear", {"r": 4, "oft_block_size": 0}), {"coft": "maybe"}, AdapterError, "'coft' is 'maybe'"),
    (
        Case("OFT", "Linear", {"r": 4, "oft_block_size": 0}),
        {"peft_version": "x"},
        AdapterError,
        "'peft_version' is 'x'",
    ),
    (Case("LoHa", "Linear", {"r": 4}), {"r": 5}, AdapterError, "has rank 4 in the file and 5 in the config"),
    (Case("LoHa", "Linear", {"r": 4}), {"alpha": "much"}, AdapterError, "'alpha' is much"),
    (Case("Vera", "Linear", {"r": 8}), {"r": 9}, AdapterError, "for rank 9"),
    (Case("HRA", "Linear", {"r": 4}), {"apply_magic": 3}, AdapterError, "apply_magic"),
    (
        Case("Vera", "Linear", {"r": 8, "save_projection": False}),
        {"projection_prng_key": "x"},
        AdapterError,
        "prng_key",
    ),
    (Case("TinyLora", "Linear", {"r": 2, "u": 8}), {"projection_seed": 7}, AdapterError, "projection_seed 7"),
]


@pytest.mark.parametrize(("case", "fields", "kind", "words"), FIELDS, ids=lambda x: x if isinstance(x, str) else "")
def test_a_field_with_a_value_we_do_not_know(
    case: Case, fields: dict[str, Any], kind: type[Exception], words: str, tmp_path: Path
) -> None:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        config.update(fields)

    with pytest.raises(kind, match=re.escape(words)):
        rewritten(case, tmp_path, change)


REFUSED = [
    Case("RandLora", "Linear", {"r": 5, "save_projection": False}),
    Case("TinyLora", "Linear", {"r": 2, "u": 8, "save_projection": False}),
    Case("UniLora", "Linear", {"r": 4, "theta_d_length": 64}),
    Case("Frod", "Linear", {"sparse_rate": 0.05, "save_projection": False}),
    Case("Supertuning", "Linear", {"sparsity": 0.9, "save_precomputed_indices": False}),
    Case("Psoft", "Linear", {"r": 4}),
    Case("Adamss", "Linear", {"r": 8, "num_subspaces": 2}),
    Case("OFT", "Conv2d", {"r": 0, "oft_block_size": 8}),
]


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_cannot_be_known_is_refused_with_a_way_out(case: Case, tmp_path: Path) -> None:
    save_base(make_net(), tmp_path / "base")
    train(make_net(), case.config(), tmp_path / "adapter", case.noise)
    with pytest.raises(UnsupportedAdapter) as caught:
        merged_tensors(tmp_path / "base", tmp_path / "adapter")
    assert caught.value.hint


def test_oft_of_peft_before_0_16(tmp_path: Path) -> None:
    def change(tensors: Tensors, fields: dict[str, Any]) -> None:
        tensors.clear()
        tensors[f"{PREFIX}layers.0.square.oft_r"] = torch.zeros(4, 8, 8)

    with pytest.raises(UnsupportedAdapter, match=r"before 0\.16"):
        rewritten(Case("OFT", "Linear", {"r": 4, "oft_block_size": 0}), tmp_path, change)
