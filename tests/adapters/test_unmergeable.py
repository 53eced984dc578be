"""What cannot be folded into weights is refused: with its reason, the way out, and nothing written."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from models import edit_config, make_adapter, plain_adapter, plain_base, read_bytes, read_tensors

import adapterkit
from adapterkit.errors import AdapterError, AdapterkitError, UnsupportedAdapter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base = plain_base(tmp_path / "base")
    return base, plain_adapter(tmp_path / "adapter", base)


def refused(base: Path, adapter: Path, tmp_path: Path) -> AdapterkitError:
    before = read_bytes(tmp_path)
    with pytest.raises(AdapterkitError) as caught:
        adapterkit.merge(base, [adapter], tmp_path / "out")
    assert read_bytes(tmp_path) == before
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    ("init", "why"),
    [
        ("pissa_niter_4", "unseeded randomized SVD"),
        ("corda", "calibration data"),
        ("lora_ga", "gradients"),
        ("loftq", "quantized base"),
    ],
)
def test_base_that_cannot_be_rebuilt(init: str, why: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """peft#2184, transformers#34468: these change the base before training starts."""
    base, adapter = pair
    edit_config(adapter, init_lora_weights=init)
    error = refused(base, adapter, tmp_path)
    assert isinstance(error, UnsupportedAdapter)
    assert error.exit_code == 1
    assert why in error.message
    assert "residual_base=True" in error.hint
    adapterkit.merge(base, [adapter], tmp_path / "residual", residual_base=True)
    edit_config(adapter, init_lora_weights=True)
    adapterkit.merge(base, [adapter], tmp_path / "plain")
    assert read_bytes(tmp_path / "residual") == read_bytes(tmp_path / "plain")


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"alora_invocation_tokens": [1, 2]}, "activated LoRA"),
        ({"arrow_config": {"top_k": 2}}, "Arrow routes every token"),
    ],
)
def test_detected_by_config_though_the_keys_look_like_lora(
    fields: dict[str, Any], why: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    edit_config(pair[1], **fields)
    error = refused(*pair, tmp_path)
    assert isinstance(error, UnsupportedAdapter)
    assert why in error.message


PROMPTS = {
    "PROMPT_TUNING": "PromptTuningConfig",
    "PREFIX_TUNING": "PrefixTuningConfig",
    "P_TUNING": "PromptEncoderConfig",
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompt_methods_as_peft_saves_them(kind: str, make_base: Callable[..., Path], tmp_path: Path) -> None:
    import peft

    base = make_base("llama")
    config = getattr(peft, PROMPTS[kind])(task_type="CAUSAL_LM", num_virtual_tokens=4)
    adapter = make_adapter(tmp_path / "adapter", base, config)
    assert json.loads((adapter / "adapter_config.json").read_text())["peft_type"] == kind
    error = refused(base, adapter, tmp_path)
    assert isinstance(error, UnsupportedAdapter)
    assert "changes no weight" in error.message


KINDS = [
    *("MULTITASK_PROMPT_TUNING", "CPT", "CARTRIDGE", "ADAPTION_PROMPT"),
    *("XLORA", "POLY", "LILY", "SHADOW"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_other_methods_without_a_merge(kind: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    edit_config(pair[1], peft_type=kind)
    error = refused(*pair, tmp_path)
    assert isinstance(error, UnsupportedAdapter)
    assert kind in error.message


@pytest.mark.parametrize("kind", ["NEXT_BIG_THING", "lora2", "", None, 7])
def test_method_nobody_knows(kind: Any, pair: tuple[Path, Path], tmp_path: Path) -> None:
    edit_config(pair[1], peft_type=kind)
    assert isinstance(refused(*pair, tmp_path), AdapterError)


def test_every_method_of_the_installed_peft_is_known() -> None:
    """Merged, or refused with a reason: a method that PEFT has and we never heard of fails here."""
    from peft import PeftType

    from adapterkit.adapters.methods import METHODS, UNMERGEABLE

    assert {kind.value for kind in PeftType} <= {*METHODS, *UNMERGEABLE}
    assert not set(METHODS) & set(UNMERGEABLE)


def test_quantized_base_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """unsloth#2749: integers are no weights that a delta can be added to."""
    from models import write_checkpoint

    tensors = read_tensors(pair[0])
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].mul(10).to(torch.int8)
    write_checkpoint(pair[0], tensors)
    error = refused(*pair, tmp_path)
    assert "quantized weight" in error.message
