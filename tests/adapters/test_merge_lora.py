"""Every LoRA variant on linear layers, embeddings and whole parameters, against PEFT's own merge in float64."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from models import (
    apart,
    assert_merged,
    edit_config,
    live,
    load_model,
    logits,
    make_adapter,
    peft_merged,
    read_tensors,
    write_adapter,
)

import adapterkit
from adapterkit.errors import TargetError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IN, OUT = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], ["o_proj", "down_proj"]

# name -> (config fields, options of the base, dtypes)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora_rslora": {"use_dora": True, "use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "olora": {"init_lora_weights": "olora"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "kasa": {"kasa_config": {}},
    "velora": {"velora_config": {}},
    "monteclora": {"monteclora_config": {}},
    "bdlora_a": {"use_bdlora": {"target_modules_bd_a": OUT, "target_modules_bd_b": IN, "nblocks": 2}},
    "bdlora_4": {"use_bdlora": {"target_modules_bd_a": LINEARS, "target_modules_bd_b": [], "nblocks": 4}},
    "lm_head": {"target_modules": [*LINEARS, "lm_head"]},
    "modules_to_save": {"modules_to_save": ["lm_head", "input_layernorm"]},
    "modules_to_save_embedding": {"modules_to_save": ["embed_tokens"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "embedding_dora": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "trainable_tokens": {"trainable_token_indices": [3, 95, 0]},
    "trainable_tokens_two": {"trainable_token_indices": {"embed_tokens": [1, 7], "lm_head": [2]}},
    "layers": {"layers_to_transform": [1]},
}
SUB_CONFIGS = {
    "kasa_config": "KasaConfig",
    "velora_config": "VeloraConfig",
    "monteclora_config": "MontecloraConfig",
    "use_bdlora": "BdLoraConfig",
}


def lora(**fields: Any) -> Any:
    import peft
    import peft.tuners.lora.config as configs

    for name, cls in SUB_CONFIGS.items():
        if name in fields:
            fields[name] = getattr(configs, cls)(**fields[name])
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": LINEARS, **fields})


def check(
    base: Path, config: Any, tmp_path: Path, edit: dict[str, Any] | None = None, flips: float = 0.0
) -> adapterkit.MergeReport:
    adapter = make_adapter(tmp_path / "adapter", base, config)
    edit_config(adapter, **(edit or {}))
    expected = peft_merged(base, adapter, tmp_path / "peft")
    report = adapterkit.merge(base, [adapter], tmp_path / "out")
    assert_merged(base, tmp_path / "out", expected.exact, flips=flips)
    return report


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name: str, dtype: str, make_base: Callable[..., Path], tmp_path: Path) -> None:
    # What is left of W after an SVD or QR is rounded to bf16 before training starts.
    rounded = dtype == "bfloat16" and name.startswith(("pissa", "olora", "kasa"))
    check(make_base("llama", dtype), lora(**VARIANTS[name]), tmp_path, flips=0.002 if rounded else 0.0)


def test_float16(make_base: Callable[..., Path], tmp_path: Path) -> None:
    check(make_base("llama", "float16"), lora(), tmp_path)


# ------------------------------------------------------------------ scaling per module

PATTERNS: dict[str, dict[str, Any]] = {
    "name": {"q_proj": 8},
    "class": {"[qk]_proj": 8},
    "star": {".*q_proj": 8},
    "layer": {"layers.1.self_attn.*": 8},
    "anchored": {"^model.layers.1.self_attn.q_proj": 8},
    "no_dot_boundary": {"proj": 8, "_proj": 8},
    "not_at_the_end": {"model.layers.1": 8},
    "anchored_past_the_start": {"^layers.1.self_attn.q_proj": 8},
    "alternation": {"q_proj|down_proj": 8},
    "group": {r"layers\.(0|1)\.mlp\.up_proj": 8},
}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("rslora", [False, True])
def test_patterns(name: str, rslora: bool, make_base: Callable[..., Path], tmp_path: Path) -> None:
    pattern = PATTERNS[name]
    alphas = {key: value * 3 for key, value in pattern.items()}
    check(make_base("llama"), lora(rank_pattern=pattern, alpha_pattern=alphas, use_rslora=rslora), tmp_path)


def test_alpha_pattern_alone(make_base: Callable[..., Path], tmp_path: Path) -> None:
    check(make_base("llama"), lora(alpha_pattern={"v_proj": 40, "o_proj": 1}), tmp_path)


@pytest.mark.parametrize("special_first", [True, False])
def test_first_pattern_in_the_file_wins(special_first: bool, make_base: Callable[..., Path], tmp_path: Path) -> None:
    """Not the most specific one; and PEFT sorts the keys when it saves, so the file's order is not the trainer's."""
    pairs = [(r".*\.0\.self_attn\.q_proj", 30), ("q_proj", 20)]
    pattern = dict(pairs if special_first else pairs[::-1])
    check(make_base("llama"), lora(), tmp_path, edit={"alpha_pattern": pattern})


def test_pattern_with_a_back_reference_counts_groups_as_peft_does(
    make_base: Callable[..., Path], tmp_path: Path
) -> None:
    check(make_base("llama"), lora(alpha_pattern={r"u(p)_\3roj": 40}), tmp_path)


# ------------------------------------------------------------------ biases


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fields", [{"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True}], ids=str)
def test_bias(fields: dict[str, Any], dtype: str, make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("qwen2", dtype)  # its q, k and v have biases
    check(base, lora(target_modules=["q_proj", "v_proj"], **fields), tmp_path)


# ------------------------------------------------------------------ weights that are stored the other way round


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True, "rank_pattern": {"c_proj": 2}},
        {"init_lora_weights": "pissa"},
    ],
    ids=["plain", "dora", "rslora", "pissa"],
)
def test_conv1d_with_square_weights(
    fields: dict[str, Any], dtype: str, make_base: Callable[..., Path], tmp_path: Path
) -> None:
    """GPT-2: ``attn.c_proj`` is square, so only the flag tells how it is stored."""
    base = make_base("gpt2", dtype)
    config = lora(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, **fields)
    check(base, config, tmp_path, flips=0.002 if dtype == "bfloat16" and "init_lora_weights" in fields else 0.0)


def test_olora_on_a_square_conv1d(make_base: Callable[..., Path], tmp_path: Path) -> None:
    """PEFT decomposes the weight as it is stored; only square ones can be trained so."""
    config = lora(target_modules=r".*attn\.c_proj", fan_in_fan_out=True, init_lora_weights="olora")
    check(make_base("gpt2"), config, tmp_path)


def test_conv1d_and_embedding(make_base: Callable[..., Path], tmp_path: Path) -> None:
    """``fan_in_fan_out`` speaks of linear layers: an embedding in the same adapter is not turned round."""
    base = make_base("gpt2", tie_word_embeddings=False)
    check(base, lora(target_modules=["c_attn", "wte", "wpe"], fan_in_fan_out=True), tmp_path)


# ------------------------------------------------------------------ vocabulary


def grown(base: Path, folder: Path, rows: int) -> Path:
    """The base after ``resize_token_embeddings``."""
    model = load_model(base)
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.save_pretrained(folder)
    return folder


def test_llamafactory_3125_half_a_resized_vocabulary_is_refused(make_base: Callable[..., Path], tmp_path: Path) -> None:
    """PEFT saves the resized embedding that LoRA targets, and not the output layer that was resized with it."""
    base = make_base("llama")
    bigger = grown(base, tmp_path / "grown", 104)
    adapter = make_adapter(tmp_path / "adapter", bigger, lora(target_modules=["q_proj", "embed_tokens"]))
    with pytest.raises(
        TargetError, match=r"brings 104 rows for 'model.embed_tokens.weight' and leaves 'lm_head.weight'"
    ):
        adapterkit.merge(base, [adapter], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "grown"]
    exact = peft_merged(bigger, adapter, tmp_path / "peft").exact
    adapterkit.merge(bigger, [adapter], tmp_path / "out")
    assert_merged(bigger, tmp_path / "out", exact)


def test_unsloth_3444_resized_vocabulary_of_both_sides(make_base: Callable[..., Path], tmp_path: Path) -> None:
    """``save_embedding_layers``: both come in their new size without being asked for, and replace the base's."""
    base = make_base("llama")
    bigger = grown(base, tmp_path / "grown", 104)
    adapter = make_adapter(tmp_path / "adapter", bigger, lora())
    edit_config(adapter, base_model_name_or_path=str(base))
    tensors = read_tensors(adapter)
    names = {"model.embed_tokens.weight", "lm_head.weight"}
    tensors.update({f"base_model.model.{n}": t for n, t in read_tensors(bigger).items() if n in names})
    write_adapter(adapter, tensors, **json.loads((adapter / "adapter_config.json").read_text()))
    adapterkit.merge(base, [adapter], tmp_path / "out")
    exact = peft_merged(bigger, adapter, tmp_path / "peft").exact
    assert_merged(bigger, tmp_path / "out", exact)
    assert load_model(tmp_path / "out").config.vocab_size == 104


def test_vllm_9280_modules_to_save_with_a_resized_vocabulary(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("llama", "bfloat16")
    bigger = grown(base, tmp_path / "grown", 112)
    config = lora(modules_to_save=["embed_tokens", "lm_head"])
    adapter = make_adapter(tmp_path / "adapter", bigger, config)
    adapterkit.merge(base, [adapter], tmp_path / "out")
    merged = load_model(tmp_path / "out")
    assert merged.config.vocab_size == 112
    theirs = logits(live(bigger, adapter))
    assert apart(logits(merged), theirs) < 0.05


def test_standalone_trainable_tokens(make_base: Callable[..., Path], tmp_path: Path) -> None:
    from peft import TrainableTokensConfig

    base = make_base("llama", "bfloat16")
    check(base, TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[5, 2, 90]), tmp_path)


# ------------------------------------------------------------------ depth


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peft_1707_layer_replication(dtype: str, make_base: Callable[..., Path], tmp_path: Path) -> None:
    """PEFT folds all copies onto one shared weight; the merged model must answer as the live one does."""
    import torch

    base = make_base("llama", dtype, num_hidden_layers=3)
    config = lora(layer_replication=[[0, 2], [1, 3], [2, 3]])
    adapter = make_adapter(tmp_path / "adapter", base, config)
    adapterkit.merge(base, [adapter], tmp_path / "out")
    merged = load_model(tmp_path / "out")
    assert merged.config.num_hidden_layers == 5
    theirs = logits(live(base, adapter))
    bound = 1e-5 if dtype == "float32" else 0.03
    assert apart(logits(merged), theirs) < bound
    out, old = read_tensors(tmp_path / "out"), read_tensors(base)
    for new, layer in enumerate([0, 1, 1, 2, 2]):
        name = "model.layers.{}.input_layernorm.weight"
        assert torch.equal(out[name.format(new)], old[name.format(layer)])


# ------------------------------------------------------------------ output dtype


def test_torchtune_1101_dtype_of_the_output_is_one_rounding(make_base: Callable[..., Path], tmp_path: Path) -> None:
    import torch

    base = make_base("llama")
    adapter = make_adapter(tmp_path / "adapter", base, lora())
    exact = peft_merged(base, adapter, tmp_path / "peft").exact
    adapterkit.merge(base, [adapter], tmp_path / "out", dtype="bf16")
    out, old = read_tensors(tmp_path / "out"), read_tensors(base)
    for name, tensor in out.items():
        assert tensor.dtype == torch.bfloat16
        if torch.equal(old[name].double(), exact[name]):
            assert torch.equal(tensor, old[name].bfloat16()), name
        else:
            low, high = ((exact[name] + sign * 1e-6).bfloat16() for sign in (-1, 1))
            assert ((tensor >= low) & (tensor <= high)).all(), name
