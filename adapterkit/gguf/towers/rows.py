"""Rows: towers for images and sounds with what joins them to the text, as llama.cpp's mmproj files have them.

A row is an `ArchSpec` like those of language models, its architecture ``clip``; names and keys are those of llama.cpp's
converter. The config that a row's keys ask is that of the tower, with a few fields of the whole model under other names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from adapterkit.errors import CheckpointError, TargetError
from adapterkit.foreign import json_value
from adapterkit.gguf.arch.config import Config
from adapterkit.gguf.arch.ops import Add, Column, FirstLast, Frames, Interleave, OneRow, Op, Pixels, Split
from adapterkit.gguf.arch.spec import ArchSpec, Key, Rule, rule

CLIP = "clip"
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
_PARTS = {"vision": ("vision_config",), "audio": ("audio_config",)}


class TowerConfig(Config):
    """The part of a ``config.json`` that describes a tower.

    Args:
        config: the file as data.
        kind: ``vision`` or ``audio``.
        ref: what the checkpoint is called.
        files: the files beside it.
    """

    def __init__(self, config: Mapping[str, Any], kind: str, ref: str, files: Mapping[str, bytes]) -> None:
        super().__init__(config, ref, files)
        own = next((config[name] for name in _PARTS[kind] if isinstance(config.get(name), Mapping)), None)
        if own is None:
            raise CheckpointError(
                f"{ref}: its config.json has no '{_PARTS[kind][0]}'", "complete it from the base model"
            )
        self.whole = Config(config, ref, files)
        self.text = {**_renamed(own), **{f"whole.{name}": value for name, value in config.items()}}
        self.preprocessor = _preprocessor(files, ref)

    def pixels(self, name: str) -> list[float]:
        """Three numbers of the preprocessor: ``image_mean`` or ``image_std``.

        Raises:
            CheckpointError: it does not say them.
        """
        found = self.preprocessor.get(name)
        if not isinstance(found, list) or len(found) < 3:
            raise CheckpointError(
                f"{self.ref}: no preprocessor_config.json beside it says '{name}'", "add the one of the base model"
            )
        return [float(one) for one in found]


_SPELLINGS = {
    "num_heads": "num_attention_heads",
    "depth": "num_hidden_layers",
    "encoder_layers": "num_hidden_layers",
    "encoder_attention_heads": "num_attention_heads",
    "encoder_ffn_dim": "intermediate_size",
    "d_model": "hidden_size",
}


def _renamed(own: Mapping[str, Any]) -> dict[str, Any]:
    found = {_SPELLINGS.get(name, name): value for name, value in own.items()}
    if "embed_dim" in own:  # Qwen2-VL, whose hidden_size is the text's
        found |= {"hidden_size": own["embed_dim"]}
        found.setdefault("intermediate_size", int(own["embed_dim"] * own.get("mlp_ratio", 4)))
    for name in ("image_size", "patch_size"):
        if isinstance(found.get(name), list):
            found[name] = found[name][0]
    return found


def _preprocessor(files: Mapping[str, bytes], ref: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in PREPROCESSORS:
        if name not in files:
            continue
        try:
            said = json_value(files[name])
        except ValueError:
            raise CheckpointError(f"{ref}: {name} is damaged", "download it again") from None
        if isinstance(said, dict):
            inner = said.get("image_processor")
            found |= {**said, **(inner if isinstance(inner, dict) else {})}
    return found


@dataclass(frozen=True)
class Tower:
    """A family of projectors.

    Attributes:
        classes: of the whole model's ``architectures``.
        kind: ``vision`` or ``audio``.
        row: the row for a config, whose rules may depend on it.
        when: whether a config of these classes is of this family.
    """

    classes: tuple[str, ...]
    kind: str
    row: Callable[[TowerConfig], ArchSpec]
    when: Callable[[Mapping[str, Any]], bool] = lambda config: True


# ------------------------------------------------------------------ keys


def _text_width(config: Config) -> int:
    assert isinstance(config, TowerConfig)
    return config.whole.number("hidden")


def _field(name: str, default: Any = None) -> Callable[[Config], Any]:
    """A field of the whole model."""
    return lambda config: config.get(f"whole.{name}", default=default)


def _mean(name: str) -> Callable[[Config], Any]:
    def find(config: Config) -> list[float]:
        assert isinstance(config, TowerConfig)
        return config.pixels(name)

    return find


def _asked(name: str, default: Any = None) -> Callable[[Config], Any]:
    """A field of the preprocessor."""

    def find(config: Config) -> Any:
        assert isinstance(config, TowerConfig)
        return config.preprocessor.get(name, default)

    return find


def _vision(
    projector: str, *, act: str | None, eps: float | None = 1e-6, image: Callable[[Config], int] | None = None
) -> tuple[Key, ...]:
    """The keys that towers for images share.

    Args:
        projector: ``clip.projector_type``.
        act: ``gelu`` or ``silu``; None reads ``hidden_act``.
        eps: of norms where the config does not say it.
        image: the side of an image, by default ``image_size``.
    """
    return (
        Key("has_vision_encoder", lambda c: True),
        Key("projector_type", lambda c: projector),
        Key("vision.projection_dim", _text_width),
        Key("vision.image_size", image or (lambda c: c.number("image_size"))),
        Key("vision.patch_size", "patch_size", needed=True),
        Key("vision.embedding_length", "hidden_size", needed=True),
        Key("vision.feed_forward_length", "intermediate_size", needed=True),
        Key("vision.block_count", lambda c: c.number("layers")),
        Key("vision.attention.head_count", "num_attention_heads", needed=True),
        Key("vision.image_mean", _mean("image_mean")),
        Key("vision.image_std", _mean("image_std")),
        *(() if eps is None else (Key("vision.attention.layer_norm_epsilon", "layer_norm_eps", eps),)),
        Key("use_gelu", lambda c: True if (act or _act(c)) == "gelu" else None),
        Key("use_silu", lambda c: True if (act or _act(c)) == "silu" else None),
    )


def _act(config: Config) -> str:
    """llama.cpp's word for an activation of the config.

    Raises:
        TargetError: it has none.
    """
    found = str(config.get("hidden_act", default="gelu"))
    words = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu", "silu": "silu", "quick_gelu": "quick"}
    if found not in words:
        raise TargetError(f"{config.ref}: llama.cpp's towers have no '{found}'", "take the mmproj that is published")
    return words[found]


# ------------------------------------------------------------------ rules


def _siglip(at: str) -> tuple[Rule, ...]:
    """SigLIP's and CLIP's encoder under a root, and under the same with ``vision_model.`` that older files have."""
    found = [
        rule(f"{at}embeddings.patch_embedding", "v.patch_embd"),
        rule(f"{at}embeddings.position_embedding", "v.position_embd"),
        rule(f"{at}post_layernorm", "v.post_ln"),
    ]
    for gguf, hf in {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_out": "self_attn.out_proj",
        "ln1": "layer_norm1",
        "ln2": "layer_norm2",
        "ffn_up": "mlp.fc1",
        "ffn_down": "mlp.fc2",
    }.items():
        found.append(rule(f"{at}encoder.layers.{{i}}.{hf}", f"v.blk.{{i}}.{gguf}"))
    return tuple(found)


def _both(at: str, rules: Callable[[str], tuple[Rule, ...]]) -> tuple[Rule, ...]:
    return (*rules(at), *rules(f"{at}vision_model."))


def _layers(
    at: str, names: Mapping[str, str], ops: Mapping[str, tuple[Op, ...]] | None = None, side: str = "v"
) -> tuple[Rule, ...]:
    return tuple(
        rule(f"{at}{hf}", f"{side}.blk.{{i}}.{gguf}", ops=(ops or {}).get(gguf, ())) for gguf, hf in names.items()
    )


_EYES = ("vision_tower", "vision_model", "visual", "multi_modal_projector", "connector", "patch_merger")
_EARS = ("audio_tower", "multi_modal_projector")


def _rest(parts: tuple[str, ...], *also: str) -> tuple[str, ...]:
    """What is no part of a tower: the language model; and parts of a tower that are not used."""
    return (rf"^(?!(model\.)?({'|'.join(parts)})\b)", *also)


def _spec(
    model_type: str,
    rules: tuple[Rule, ...],
    keys: tuple[Key, ...],
    *drops: str,
    parts: tuple[str, ...] = _EYES,
    needs: str = "v.patch_embd.weight",
) -> ArchSpec:
    return ArchSpec(
        CLIP,
        (),
        model_type,
        rules,
        keys,
        common=False,
        drops=_rest(parts, *drops),
        needs=(needs,),
        uneven=True,
        vocab="none",
    )


# ------------------------------------------------------------------ families


def _gemma3(config: TowerConfig) -> ArchSpec:
    per_image = int(config.whole.raw.get("mm_tokens_per_image") or config.preprocessor.get("image_seq_length") or 256)
    step = (config.number("image_size") // config.number("patch_size")) // max(int(per_image**0.5), 1)
    return _spec(
        "gemma3",
        (
            *_both("model.vision_tower.", _siglip),
            rule("model.multi_modal_projector.mm_input_projection_weight", "mm.input_projection.weight"),
            rule("model.multi_modal_projector.mm_soft_emb_norm.weight", "mm.soft_emb_norm.weight", ops=[Add(1.0)]),
        ),
        (
            *_vision("gemma3", act="gelu"),
            Key("vision.projector.scale_factor", lambda c: step if step not in (0, 4) else None),
        ),
        r"\bhead\.",
    )


def _idefics3(config: TowerConfig) -> ArchSpec:
    return _spec(
        "idefics3",
        (
            *_siglip("model.vision_model."),
            rule("model.connector.modality_projection.proj", "mm.model.fc"),
        ),
        (
            *_vision("idefics3", act="gelu"),
            Key("vision.projector.scale_factor", _field("scale_factor", 2)),
            Key(
                "vision.preproc_image_size",
                lambda c: (_asked("size")(c) or {}).get("longest_edge", c.number("image_size")),
            ),
        ),
    )


_PIXTRAL_LAYER = {
    "attn_q": "attention.q_proj",
    "attn_k": "attention.k_proj",
    "attn_v": "attention.v_proj",
    "attn_out": "attention.o_proj",
    "ln1": "attention_norm",
    "ln2": "ffn_norm",
    "ffn_gate": "feed_forward.gate_proj",
    "ffn_up": "feed_forward.up_proj",
    "ffn_down": "feed_forward.down_proj",
}


def _break_token(config: TowerConfig) -> int:
    """The token that ends a row of an image, by its text."""
    for name, part in (("tokenizer_config.json", "added_tokens_decoder"), ("tokenizer.json", "added_tokens")):
        try:
            said = json_value(config.files.get(name, b"{}")).get(part) or {}
        except (ValueError, AttributeError):
            raise CheckpointError(f"{config.ref}: {name} is damaged", "download it again") from None
        listed = [(one.get("id"), one) for one in said if isinstance(one, dict)] if isinstance(said, list) else []
        for number, entry in said.items() if isinstance(said, dict) else listed:
            if isinstance(entry, dict) and entry.get("content") == "[IMG_BREAK]" and str(number).isdecimal():
                return int(str(number))
    raise CheckpointError(
        f"{config.ref}: its tokenizer has no token [IMG_BREAK]", "add the tokenizer of the base model"
    )


def _pixtral(config: TowerConfig) -> ArchSpec:
    at = "model.vision_tower."
    return _spec(
        "pixtral",
        (
            rule(f"{at}patch_conv", "v.patch_embd"),
            rule(f"{at}ln_pre", "v.pre_ln"),
            *_layers(
                f"{at}transformer.layers.{{i}}.",
                _PIXTRAL_LAYER,
                {"attn_q": (Interleave("heads"),), "attn_k": (Interleave("heads"),)},
            ),
            rule("model.multi_modal_projector.linear_1", "mm.1"),
            rule("model.multi_modal_projector.linear_2", "mm.2"),
            rule("model.multi_modal_projector.norm", "mm.input_norm"),
            rule("model.multi_modal_projector.patch_merger.merging_layer", "mm.patch_merger"),
            rule("model.embed_tokens.weight", "v.token_embd.img_break", ops=[OneRow(_break_token(config))]),
        ),
        (
            *_vision("pixtral", act=None, eps=1e-5),
            Key("vision.spatial_merge_size", _field("spatial_merge_size")),
        ),
    )


def _intern_layers(at: str) -> tuple[Rule, ...]:
    return (
        rule(f"{at}embeddings.cls_token", "v.class_embd"),
        # llama.cpp puts the class token behind the patches, and takes positions in the order of the file.
        rule(f"{at}embeddings.position_embeddings", "v.position_embd.weight", ops=[FirstLast()]),
        rule(f"{at}embeddings.patch_embeddings.projection", "v.patch_embd"),
        *_layers(
            f"{at}encoder.layer.{{i}}.",
            {
                "attn_q": "attention.q_proj",
                "attn_k": "attention.k_proj",
                "attn_v": "attention.v_proj",
                "attn_out": "attention.projection_layer",
                "attn_q_norm": "attention.q_norm",
                "attn_k_norm": "attention.k_norm",
                "ln1": "layernorm_before",
                "ln2": "layernorm_after",
                "ffn_up": "mlp.fc1",
                "ffn_down": "mlp.fc2",
                "ls1.weight": "lambda_1",
                "ls2.weight": "lambda_2",
            },
        ),
    )


def _internvl(config: TowerConfig) -> ArchSpec:
    """InternVL as transformers saves it."""
    at = "model.multi_modal_projector."
    return _spec(
        "internvl",
        (
            *_intern_layers("model.vision_tower."),
            rule(f"{at}layer_norm", "mm.model.mlp.0"),
            rule(f"{at}linear_1", "mm.model.mlp.1"),
            rule(f"{at}linear_2", "mm.model.mlp.3"),
        ),
        (
            *_vision("internvl", act=None),
            Key(
                "vision.projector.scale_factor", lambda c: int(1 / float(c.get("whole.downsample_ratio", default=0.5)))
            ),
            Key("vision.preproc_min_tiles", lambda c: _asked("min_patches")(c) or _field("min_dynamic_patch")(c)),
            Key("vision.preproc_max_tiles", lambda c: _asked("max_patches")(c) or _field("max_dynamic_patch")(c)),
        ),
        r"\bmask_token$",
    )


def _intern_remote(config: TowerConfig) -> ArchSpec:
    """InternVL as its own code saves it."""
    at = "vision_model."
    return _spec(
        "internvl",
        (
            rule(f"{at}embeddings.class_embedding", "v.class_embd"),
            rule(f"{at}embeddings.position_embedding", "v.position_embd.weight", ops=[FirstLast()]),
            rule(f"{at}embeddings.patch_embedding", "v.patch_embd"),
            *_layers(
                f"{at}encoder.layers.{{i}}.",
                {
                    "attn_out": "attn.proj",
                    "attn_q_norm": "attn.q_norm",
                    "attn_k_norm": "attn.k_norm",
                    "ln1": "norm1",
                    "ln2": "norm2",
                    "ffn_up": "mlp.fc1",
                    "ffn_down": "mlp.fc2",
                    "ls1.weight": "ls1",
                    "ls2.weight": "ls2",
                },
            ),
            rule(
                f"{at}encoder.layers.{{i}}.attn.qkv",
                *(f"v.blk.{{i}}.attn_{one}" for one in "qkv"),
                ops=[Split(parts=3)],
            ),
            *(rule(f"mlp1.{number}", f"mm.model.mlp.{number}") for number in (0, 1, 3)),
        ),
        (
            *_vision("internvl", act=None),
            Key(
                "vision.projector.scale_factor", lambda c: int(1 / float(c.get("whole.downsample_ratio", default=0.5)))
            ),
            Key("vision.preproc_min_tiles", _field("min_dynamic_patch")),
            Key("vision.preproc_max_tiles", _field("max_dynamic_patch")),
        ),
        parts=("vision_model", "mlp1"),
    )


def _text_eps(default: float) -> Callable[[Config], float]:
    def find(config: Config) -> float:
        assert isinstance(config, TowerConfig)
        return float(config.whole.get("rms_norm_eps", default=default))

    return find


def _qwen_side(config: Config) -> int:
    places = config.get("num_position_embeddings")
    patch = config.number("patch_size")
    return int(int(places) ** 0.5 * patch) if places else int(config.get("image_size", default=560))


def _wa_pattern(config: Config) -> int:
    """Every so many-th layer attends to the whole image.

    Raises:
        TargetError: no number says which do.
    """
    found = config.get("fullatt_block_indexes", default=[])
    step = int(found[0]) + 1 if found else 0
    if any(index != step * (number + 1) - 1 for number, index in enumerate(found)) or not found:
        raise TargetError(
            f"{config.ref}: llama.cpp has every n-th layer of a Qwen2.5-VL attend to the whole image, and here "
            f"'fullatt_block_indexes' is {found}",
            "take the mmproj that is published",
        )
    return step


def _qwen(config: TowerConfig) -> ArchSpec:
    """Qwen2-VL and Qwen2.5-VL."""
    at, newer = "model.visual.", "fullatt_block_indexes" in config.text
    mlp = (
        {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
        if newer
        else {"ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"}
    )
    keys = _vision(
        "qwen2.5vl_merger" if newer else "qwen2vl_merger", act="silu" if newer else "quick", eps=None, image=_qwen_side
    )
    return _spec(
        "qwen2_vl",
        (
            rule(f"{at}patch_embed.proj.weight", "v.patch_embd.weight", "v.patch_embd.weight.1", ops=[Frames()]),
            *_layers(f"{at}blocks.{{i}}.", {"attn_out": "attn.proj", "ln1": "norm1", "ln2": "norm2", **mlp}),
            rule(f"{at}blocks.{{i}}.attn.qkv", *(f"v.blk.{{i}}.attn_{one}" for one in "qkv"), ops=[Split(parts=3)]),
            rule(f"{at}merger.ln_q", "v.post_ln"),
            rule(f"{at}merger.mlp.0", "mm.0"),
            rule(f"{at}merger.mlp.2", "mm.2"),
        ),
        (
            *keys,
            Key("vision.attention.layer_norm_epsilon", _text_eps(1e-6)),
            Key("vision.spatial_merge_size", "spatial_merge_size"),
            *((Key("vision.n_wa_pattern", _wa_pattern),) if newer else ()),
        ),
    )


def _qwen3(config: TowerConfig) -> ArchSpec:
    """Qwen3-VL and Qwen3.5."""
    at = "model.visual."
    deep = config.get("deepstack_visual_indexes", default=[]) or []
    stacked = []
    for number, layer in enumerate(deep):
        for hf, gguf in (("norm", "norm"), ("linear_fc1", "fc1"), ("linear_fc2", "fc2")):
            stacked.append(rule(f"{at}deepstack_merger_list.{number}.{hf}", f"v.deepstack.{int(layer)}.{gguf}"))
    return _spec(
        "qwen3_vl",
        (
            rule(f"{at}patch_embed.proj.weight", "v.patch_embd.weight", "v.patch_embd.weight.1", ops=[Frames()]),
            rule(f"{at}patch_embed.proj.bias", "v.patch_embd.bias"),
            rule(f"{at}pos_embed", "v.position_embd"),
            *_layers(
                f"{at}blocks.{{i}}.",
                {
                    "attn_qkv": "attn.qkv",
                    "attn_out": "attn.proj",
                    "ln1": "norm1",
                    "ln2": "norm2",
                    "ffn_up": "mlp.linear_fc1",
                    "ffn_down": "mlp.linear_fc2",
                },
            ),
            rule(f"{at}merger.norm", "v.post_ln"),
            rule(f"{at}merger.linear_fc1", "mm.0"),
            rule(f"{at}merger.linear_fc2", "mm.2"),
            *stacked,
        ),
        (
            *_vision("qwen3vl_merger", act="gelu", eps=None, image=_qwen_side),
            Key("vision.spatial_merge_size", "spatial_merge_size"),
            Key("vision.attention.layer_norm_epsilon", _text_eps(1e-6)),
            Key("vision.is_deepstack_layers", lambda c: [i in deep for i in range(c.number("layers"))]),
        ),
    )


def _lfm2(config: TowerConfig) -> ArchSpec:
    at = "model.vision_tower."

    def tower(root: str) -> tuple[Rule, ...]:
        patch = rule(f"{root}embeddings.patch_embedding.weight", "v.patch_embd.weight", ops=[Pixels("patch_size")])
        bias = rule(f"{root}embeddings.patch_embedding.bias", "v.patch_embd.bias")
        return (patch, bias, *(one for one in _siglip(root) if "patch_embedding" not in one.hf))

    last = int(config.get("whole.vision_feature_layer", default=-1))
    return _spec(
        "lfm2_vl",
        (
            *tower(at),
            *tower(f"{at}vision_model."),
            rule("model.multi_modal_projector.layer_norm", "mm.input_norm"),
            rule("model.multi_modal_projector.linear_1", "mm.1"),
            rule("model.multi_modal_projector.linear_2", "mm.2"),
        ),
        (
            *_vision("lfm2", act="gelu", image=lambda c: 256),
            Key("vision.projector.scale_factor", _field("downsample_factor", 2)),
            Key("vision.block_count", lambda c: c.number("layers") + last + 1),
        ),
        r"\bhead\.",
    )


def _whisper(projector: str, *more: Key, rules: tuple[Rule, ...]) -> Callable[[TowerConfig], ArchSpec]:
    at = "model.audio_tower."
    tower = (
        *(rule(f"{at}conv{n}.weight", f"a.conv1d.{n}.weight") for n in (1, 2)),
        *(rule(f"{at}conv{n}.bias", f"a.conv1d.{n}.bias", ops=[Column()]) for n in (1, 2)),
        rule(f"{at}embed_positions", "a.position_embd"),
        rule(f"{at}layer_norm", "a.post_ln"),
        *_layers(
            f"{at}layers.{{i}}.",
            {
                "attn_q": "self_attn.q_proj",
                "attn_k": "self_attn.k_proj",
                "attn_v": "self_attn.v_proj",
                "attn_out": "self_attn.out_proj",
                "ln1": "self_attn_layer_norm",
                "ln2": "final_layer_norm",
                "ffn_up": "fc1",
                "ffn_down": "fc2",
            },
            side="a",
        ),
    )
    keys = (
        Key("has_audio_encoder", lambda c: True),
        Key("projector_type", lambda c: projector),
        Key("audio.projection_dim", _text_width),
        Key("audio.embedding_length", "hidden_size", needed=True),
        Key("audio.feed_forward_length", "intermediate_size", needed=True),
        Key("audio.block_count", lambda c: c.number("layers")),
        Key("audio.attention.head_count", "num_attention_heads", needed=True),
        Key("audio.num_mel_bins", "num_mel_bins", needed=True),
        Key("audio.attention.layer_norm_epsilon", "layer_norm_eps", 1e-5),
        *more,
    )
    return lambda config: _spec(projector, (*tower, *rules), keys, parts=_EARS, needs="a.conv1d.1.weight")


_JOIN = "model.multi_modal_projector."
TOWERS: tuple[Tower, ...] = (
    Tower(("Gemma3ForConditionalGeneration",), "vision", _gemma3),
    Tower(("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"), "vision", _idefics3),
    Tower(
        ("LlavaForConditionalGeneration", "Mistral3ForConditionalGeneration"),
        "vision",
        _pixtral,
        lambda config: (config.get("vision_config") or {}).get("model_type") == "pixtral",
    ),
    Tower(("InternVLForConditionalGeneration",), "vision", _internvl),
    Tower(("InternVLChatModel",), "vision", _intern_remote),
    Tower(("Qwen2VLForConditionalGeneration", "Qwen2VLModel", "Qwen2_5_VLForConditionalGeneration"), "vision", _qwen),
    Tower(
        (
            "Qwen3VLForConditionalGeneration",
            "Qwen3VLMoeForConditionalGeneration",
            "Qwen3_5ForConditionalGeneration",
            "Qwen3_5MoeForConditionalGeneration",
        ),
        "vision",
        _qwen3,
    ),
    Tower(("Lfm2VlForConditionalGeneration",), "vision", _lfm2),
    Tower(
        ("Qwen2AudioForConditionalGeneration",),
        "audio",
        _whisper("qwen2a", rules=(rule(f"{_JOIN}linear", "mm.a.fc"),)),
    ),
)


def has_tower(config: Mapping[str, Any]) -> bool:
    """Whether an mmproj file is made of a model with this config."""
    return _found(config) is not None


def _found(config: Mapping[str, Any]) -> Tower | None:
    names = config.get("architectures") or []
    return next((one for one in TOWERS if any(name in one.classes for name in names) and one.when(config)), None)


def tower_of(config: Mapping[str, Any], ref: str) -> Tower:
    """The family of a model's projector.

    Raises:
        TargetError: none is known; the sentence names those that are.
    """
    names = config.get("architectures") or []
    tower = _found(config)
    if tower is not None:
        return tower
    known = ", ".join(sorted({name for tower in TOWERS for name in tower.classes}))
    raise TargetError(
        f"{ref}: how an mmproj file stores the tower of a {next(iter(names), None) or 'model without architectures'} is not "
        "known here",
        f"take the mmproj that is published beside it; known are {known}",
    )
