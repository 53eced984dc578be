"""Tiny random checkpoints and adapters, and PEFT in float64 as the oracle of what a merge must give."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

INDEX = "model.safetensors.index.json"


# ------------------------------------------------------------------ checkpoints without transformers


def random_tensors(shapes: Mapping[str, Sequence[int]], dtype: str = "float32", seed: int = 0) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    kind = getattr(torch, dtype)
    return {name: torch.randn(tuple(shape), generator=generator).to(kind) for name, shape in shapes.items()}


def write_checkpoint(
    folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None, shards: int = 1
) -> Path:
    """A Hugging Face folder by hand: one file, or that many shards and an index."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama", "hidden_size": 8}))
    names = list(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = names[index * len(names) // shards : (index + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return folder


def plain_base(folder: Path, *, layers: int = 3, width: int = 16, dtype: str = "bfloat16", shards: int = 1) -> Path:
    """A Llama-like checkpoint written by hand: an embedding, ``layers`` layers of two linears and a norm, a head."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (40, width)}
    for layer in range(layers):
        shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = (width, width)
        shapes[f"model.layers.{layer}.mlp.up_proj.weight"] = (3 * width, width)
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (width,)
    shapes["lm_head.weight"] = (40, width)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "num_attention_heads": 2,
        "num_hidden_layers": layers,
        "tie_word_embeddings": False,
        "vocab_size": 40,
    }
    return write_checkpoint(folder, random_tensors(shapes, dtype), config, shards)


def plain_adapter(
    folder: Path,
    base: Path,
    *,
    modules: Sequence[str] = ("q_proj", "up_proj"),
    rank: int = 4,
    seed: int = 7,
    dtype: str = "float32",
    **config: Any,
) -> Path:
    """A LoRA adapter for a `plain_base`, written by hand."""
    tensors = read_tensors(base)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in modules:
            rows, columns = tensor.shape
            shapes[f"base_model.model.{module}.lora_A.weight"] = (rank, columns)
            shapes[f"base_model.model.{module}.lora_B.weight"] = (rows, rank)
    return write_adapter(folder, random_tensors(shapes, dtype, seed), r=rank, target_modules=list(modules), **config)


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> Path:
    """An adapter folder by hand: LoRA with alpha 8 unless ``config`` says otherwise."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "peft_version": "0.21.2", **config}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's safetensors files, read by the safetensors library."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def read_bytes(folder: Path, *, record: bool = False) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too; its record, which names the inputs by digest, only when asked for."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    return found if record else {name: data for name, data in found.items() if name != "adapterkit.json"}


def edit_config(folder: Path, **fields: Any) -> Path:
    """Change fields of an adapter's config."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


# ------------------------------------------------------------------ tiny transformers models

_TEXT = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 96}
_MOE = {**_TEXT, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**_MOE, "tie_word_embeddings": False}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 96, "n_positions": 64}),
    "qwen2": ("Qwen2ForCausalLM", {**_MOE, "tie_word_embeddings": False}),
    "mixtral": ("MixtralForCausalLM", {**_MOE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {**_MOE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        {
            **_MOE,
            "intermediate_size": 32,  # as wide as the model, like the released ones: the expert matrices are square
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 8,
            "sliding_window": 8,
        },
    ),
    "jetmoe": (
        "JetMoeForCausalLM",
        {**_TEXT, "num_hidden_layers": 1, "num_key_value_heads": 2, "kv_channels": 8, "intermediate_size": 48}
        | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "llama4": (
        "Llama4ForCausalLM",
        {
            **_MOE,
            "intermediate_size": 24,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "head_dim": 8,
            "interleave_moe_layer_step": 1,
            "attention_chunk_size": 32,
        },
    ),
}
EXTRA_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def build_base(folder: Path, kind: str, dtype: str = "float32", **config: Any) -> Path:
    """Save a tiny model of ``kind`` with every weight random; gives its folder."""
    import torch
    import transformers

    name, defaults = KINDS[kind]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**defaults, **EXTRA_IDS, **config}))
    randomize(model)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def randomize(model: torch.nn.Module, seed: int = 1, scale: float = 0.2) -> None:
    """Random values for every parameter, also those that start as zeros or ones."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def load_model(folder: Path, double: bool = False) -> Any:
    """The model of a folder, as transformers loads it."""
    import torch
    import transformers

    config = json.loads((folder / "config.json").read_text())
    cls = getattr(transformers, config["architectures"][0])
    model = cls.from_pretrained(folder, dtype="auto", attn_implementation="eager").eval()
    return model.to(torch.float64) if double else model


def logits(model: Any, double: bool = True) -> torch.Tensor:
    """Logits on a fixed input that uses the whole tiny vocabulary, in float64 or float32."""
    import torch

    model = (model.double() if double else model.float()).eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(32).view(2, 16) * 3 % 96).logits


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, in standard deviations of the second."""
    return ((one - other).abs().max() / other.std()).item()


# ------------------------------------------------------------------ adapters by PEFT


def make_adapter(
    folder: Path,
    base: Path | Callable[[], torch.nn.Module],
    config: Any,
    *,
    seed: int = 5,
    scale: float = 0.3,
    trained: list[Any] | None = None,
) -> Path:
    """Save an adapter that PEFT makes of ``config``, every trainable value moved by a random amount.

    ``base`` is a folder or makes the module. The model as it was when it was saved is appended to ``trained``.
    """
    import torch
    from peft import get_peft_model

    model = load_model(base) if isinstance(base, Path) else base()
    peft = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * scale
                parameter.add_(noise.to(parameter.dtype))
    peft.save_pretrained(folder)
    if trained is not None:
        trained.append(peft)
    return folder


def live(base: Path | Callable[[], torch.nn.Module], adapter: Path) -> Any:
    """Base and adapter as PEFT loads them, in float64: the trained model."""
    from peft import PeftModel

    model = load_model(base) if isinstance(base, Path) else base()
    return PeftModel.from_pretrained(model, adapter).double().eval()


@dataclass(frozen=True)
class Expected:
    """What a merge must give, in float64, by the names in the checkpoint; ``rounded`` is PEFT's own merge in place."""

    exact: dict[str, torch.Tensor]


def peft_merged(base: Path | Callable[[], torch.nn.Module], adapter: Path, scratch: Path) -> Expected:
    """PEFT's merge in float64, saved and read back under checkpoint names."""
    merged = live(base, adapter).merge_and_unload()
    if isinstance(base, Path):
        merged.save_pretrained(scratch)
        return Expected(read_tensors(scratch))
    return Expected(dict(merged.state_dict()))


def save_module(folder: Path, module: torch.nn.Module, config: Mapping[str, Any] | None = None) -> Path:
    """A plain torch module as a checkpoint folder."""
    return write_checkpoint(folder, {k: v.contiguous() for k, v in module.state_dict().items()}, config or {})


# ------------------------------------------------------------------ comparison


def assert_merged(
    base: Path,
    out: Path,
    exact: Mapping[str, torch.Tensor],
    *,
    tolerance: float = 2e-6,
    flips: float = 0.0,
) -> None:
    """The merged folder holds ``exact``, correctly rounded, and everything else byte for byte from the base.

    A value may differ from ``exact`` by ``tolerance`` of the largest delta (float32 arithmetic) before the one rounding
    to the stored dtype: it must lie between the roundings of ``exact - slack`` and ``exact + slack``. Where training
    itself rounded something on the way, a share ``flips`` of the values may be one step of the stored dtype off.
    """
    import torch

    before, after = read_tensors(base), read_tensors(out)
    assert set(after) == set(exact), set(after) ^ set(exact)
    old = {name: before[name].double() for name in before}
    deltas = [
        (exact[name].double() - old[name]).abs().max().item()
        for name in exact
        if name in old and old[name].shape == exact[name].shape and old[name].numel()
    ]
    largest = max([*deltas, 1e-30])
    changed = 0
    for name, value in exact.items():
        got, wanted = after[name], value.double()
        assert got.shape == wanted.shape, name
        if name in old and old[name].shape == wanted.shape and torch.equal(old[name], wanted):
            assert got.dtype == before[name].dtype, name
            assert torch.equal(got.view(torch.uint8), before[name].view(torch.uint8)), f"{name} was not left alone"
            continue
        changed += 1
        slack = tolerance * largest
        low, high = ((wanted + sign * slack).to(got.dtype).double() for sign in (-1, 1))
        if got.dtype == torch.float32:  # the rounding of float32 itself is within the float32 arithmetic
            step = wanted.abs() * 2**-22
            low, high = wanted - slack - step, wanted + slack + step
        wrong = (got.double() < low) | (got.double() > high)
        step = wanted.abs() * torch.finfo(got.dtype).eps
        if wrong.sum() <= flips * wrong.numel():
            wrong &= (got.double() - wanted).abs() > 2 * step
        error = (got.double() - wanted).abs().max().item()
        assert not wrong.any(), f"{name}: {int(wrong.sum())} of {wrong.numel()} wrong, by {error:.3g} of {largest:.3g}"
    assert changed, "nothing was changed"
