"""Parameter names of tiny real models against what transformers holds in memory and writes to disk."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from adapterkit.adapters.names import Names
from adapterkit.adapters.renamings import table
from bench.common import zoo
from bench.proofs import sweep

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]


def load(folder: str, name: str) -> Any:
    """A script of this repository, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# one for each way in which a file and a module tree differ
TYPES = [
    "bert",  # nothing but prefixes
    "gpt2",  # transposed kernels, stored as they are
    "llama",
    "gpt_neox",  # another name for the output layer
    "gpt_oss",  # stacked in the file too, with biases
    "llama4",
    "mixtral",  # experts stacked and joined
    "qwen2_moe",
    "qwen3_moe",
    "phimoe",
    "jamba",  # some layers have experts, some a state space
    "granitemoe",  # stacked, renamed
    "gemma3",  # a language model inside another
    "qwen2_5_vl",
    "ernie4_5_vl_moe",  # experts dealt to text and vision; transposed routers
    "inkling_mm_model",  # interleaved gate and up, some of them stacked
    "kimi_k25",  # fused attention, permuted for rotary positions
    "molmo2",  # fused attention with fewer keys than queries
    "nomic_bert",  # fused attention
    "vit",
    "zamba2",  # blocks that recur
    "t5",
]


class Saved:
    """A tiny model in memory, its file, and the names in it."""

    def __init__(self, model_type: str, folder: Path) -> None:
        model, _ = zoo.build(model_type)
        self.memory: dict[str, Tensor] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.save_pretrained(folder / "old")
        model.save_pretrained(folder / "new", save_original_format=False)
        self.old, self.new = sweep.read(folder / "old"), sweep.read(folder / "new")
        self.config: dict[str, Any] = sweep.config(folder / "old")
        self.names = names_of(self.old, self.config)


def names_of(tensors: dict[str, Tensor], config: dict[str, Any]) -> Names:
    return Names({name: tuple(tensor.shape) for name, tensor in tensors.items()}, config)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    kept: dict[str, Saved] = {}

    def get(model_type: str) -> Saved:
        if model_type not in kept:
            kept[model_type] = Saved(model_type, tmp_path_factory.mktemp(model_type))
        return kept[model_type]

    return get


@pytest.mark.parametrize("model_type", TYPES)
def test_every_parameter_is_found_where_it_is_stored(model_type: str, saved: Any) -> None:
    model = saved(model_type)
    for name, tensor in model.memory.items():
        if model.names.find(name) is None:
            other = model.names.tied(name)
            assert other is not None, name
            assert sweep.same(other, model.names, model.old, tensor), name
        else:
            assert sweep.same(name, model.names, model.old, tensor), name


@pytest.mark.parametrize("model_type", TYPES)
def test_old_names_are_found_in_a_file_of_the_new_format(model_type: str, saved: Any) -> None:
    model = saved(model_type)
    names = names_of(model.new, model.config)
    for name, tensor in model.old.items():
        assert sweep.same(name, names, model.new, tensor), name


@pytest.mark.parametrize("model_type", ["llama", "bert", "mixtral", "vit", "gpt2"])
def test_a_base_model_and_a_model_with_a_head_know_each_other(model_type: str, saved: Any, tmp_path: Path) -> None:
    model, _ = zoo.build(model_type)
    prefix = model.base_model_prefix + "."
    model.base_model.save_pretrained(tmp_path)
    files = sweep.read(tmp_path)
    names = names_of(files, sweep.config(tmp_path))
    whole = saved(model_type)
    inside = model.base_model.state_dict()
    assert inside
    for name, tensor in inside.items():
        assert sweep.same(prefix + name, names, files, tensor), name
        assert sweep.same(name, whole.names, whole.old, whole.memory[prefix + name]), name


def test_experts_stored_the_older_way_round(saved: Any) -> None:
    """Before version 5, Qwen3-VL-MoE kept ``[experts, in, out]`` under the same names."""
    model = saved("qwen3_vl_moe")
    experts = [name for name in model.old if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert len(experts) == 4
    files = {**model.old, **{name: model.old[name].transpose(1, 2).contiguous() for name in experts}}
    names = names_of(files, model.config)
    for name in experts:
        assert all(piece.transposed for piece in names.find(name).pieces)
        assert sweep.same(name, names, files, model.memory[name])


def test_layer_norms_of_the_first_checkpoints(saved: Any) -> None:
    model = saved("bert")

    def older(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    files = {older(name): tensor for name, tensor in model.old.items()}
    assert files.keys() != model.old.keys()
    names = names_of(files, model.config)
    for name, tensor in model.old.items():
        assert sweep.same(name, names, files, tensor), name


@pytest.mark.parametrize("start", ["model.", "model.language_model.", "language_model.model."])
def test_a_language_model_is_found_inside_a_bigger_one(start: str, saved: Any) -> None:
    model = saved("gemma3")
    name = "layers.1.self_attn.k_proj.weight"
    assert sweep.same(start + name, model.names, model.old, model.memory["model.language_model." + name])
    llama = saved("llama")
    assert sweep.same(start + name, llama.names, llama.old, llama.memory["model." + name])


def test_the_trained_part_of_an_any_to_any_model(tmp_path: Path) -> None:
    """Adapters are made on the thinker alone, which is published as a part of the whole."""
    model, _ = zoo.build("qwen2_5_omni")
    model.save_pretrained(tmp_path)
    files = sweep.read(tmp_path)
    names = names_of(files, sweep.config(tmp_path))
    layer = "layers.0.self_attn.q_proj.weight"
    text = model.state_dict()[f"thinker.model.language_model.{layer}"]
    for start in ("thinker.model.language_model.", "model.language_model.", "thinker.model.", "model."):
        assert sweep.same(start + layer, names, files, text), start


@pytest.mark.parametrize(("model_type", "turned"), [("gpt_oss", True), ("llama4", False), ("mixtral", False)])
def test_experts_stored_input_first(model_type: str, turned: bool, saved: Any) -> None:
    """``is_transposed`` of the module; Llama 4 stores its experts so too but does not say it, and PEFT goes by that."""
    model, _ = zoo.build(model_type)
    experts = [(name, module) for name, module in model.named_modules() if hasattr(module, "gate_up_proj")]
    experts = [(name, module) for name, module in experts if getattr(module.gate_up_proj, "ndim", 0) == 3]
    assert experts
    for name, module in experts:
        assert bool(getattr(module, "is_transposed", False)) == turned
        assert saved(model_type).names.turned(f"{name}.down_proj") == turned


def test_a_name_never_slips_into_another_tower(saved: Any) -> None:
    """A text layer that is not there is not the vision tower's layer of the same name."""
    names = saved("gemma3").names
    assert names.find("model.vision_tower.encoder.layers.0.self_attn.q_proj.weight") is not None
    assert names.find("model.layers.0.self_attn.out_proj.weight") is None
    assert names.find("encoder.layers.0.self_attn.q_proj.weight") is None


def test_two_candidates_are_none() -> None:
    shapes = {
        "model.language_model.layers.0.q_proj.weight": (4, 4),
        "model.text_model.layers.0.q_proj.weight": (4, 4),
        "model.text_model.layers.1.q_proj.weight": (4, 4),
    }
    names = Names(shapes, {})
    assert names.find("model.layers.0.q_proj.weight") is None
    assert names.find("model.layers.1.q_proj.weight") is not None
    assert names.find("model.language_model.layers.0.q_proj.weight") is not None


def test_names_that_shift() -> None:
    """What an old file calls norm0 and norm1 is called norm1 and norm2 now; a new file must not be shifted again."""
    config = {"architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25"}
    old = "vision_tower.encoder.blocks.0.norm{}.weight"
    new = "model.vision_tower.layers.0.norm{}.weight"
    names = Names({old.format(i): (4,) for i in (0, 1)}, config)
    for index in (1, 2):
        found = names.find(new.format(index))
        assert found is not None
        assert found.tensors == (old.format(index - 1),)
    names = Names({new.format(i): (4,) for i in (1, 2)}, config)
    for index in (1, 2):
        found = names.find(new.format(index))
        assert found is not None
        assert found.tensors == (new.format(index),)


def test_experts_that_are_not_all_there() -> None:
    config = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    start = "model.layers.0.block_sparse_moe.experts."
    shapes = {f"{start}{i}.{w}.weight": (6, 4) for i in range(2) for w in ("w1", "w3")}
    shapes |= {f"{start}{i}.w2.weight": (4, 6) for i in range(2)}
    found = Names(shapes, config).find("model.layers.0.mlp.experts.gate_up_proj")
    assert found is not None
    assert found.shape == (2, 12, 4)
    less = {name: shape for name, shape in shapes.items() if ".w3." not in name}
    assert Names(less, config).find("model.layers.0.mlp.experts.gate_up_proj") is None
    assert Names(less, config).find("model.layers.0.mlp.experts.down_proj") is not None
    odd = {**shapes, f"{start}1.w1.weight": (5, 4)}
    assert Names(odd, config).find("model.layers.0.mlp.experts.gate_up_proj") is None
    assert Names(odd, config).find(f"{start}1.w1.weight") is not None


@pytest.mark.parametrize(
    ("model_type", "parameter", "stored"),
    [
        ("gpt2", "lm_head.weight", "transformer.wte.weight"),
        ("t5", "decoder.embed_tokens.weight", "shared.weight"),
        ("bert", "cls.predictions.decoder.bias", "cls.predictions.bias"),
        ("llama", "lm_head.weight", None),
        ("zamba2", "model.layers.2.shared_transformer.self_attn.q_proj.weight",
         "model.layers.1.shared_transformer.self_attn.q_proj.weight"),
    ],
)  # fmt: skip
def test_tied(model_type: str, parameter: str, stored: str | None, saved: Any) -> None:
    names = saved(model_type).names
    assert names.tied(parameter) == stored
    assert (names.find(parameter) is None) == (stored is not None)


def test_without_a_config_only_the_names_themselves() -> None:
    names = Names({"a.weight": (3, 2), "b.conv.weight": (4, 2, 3), "b.scale": ()}, {})
    assert names.find("a.weight").matrix == (3, 2)  # type: ignore[union-attr]
    assert names.find("b.conv.weight").matrix == (4, 6)  # type: ignore[union-attr]
    assert names.find("b.scale").matrix == (1, 1)  # type: ignore[union-attr]
    assert names.find("c.weight") is None


def test_find_module() -> None:
    shapes = {"attn.in_proj_weight": (12, 4), "attn.in_proj_bias": (12,), "attn.out_proj.weight": (4, 4)}
    names = Names(shapes, {})
    assert names.find_module("attn") == ("attn.in_proj_bias", "attn.in_proj_weight")
    assert names.find_module("attn.out_proj") == ("attn.out_proj.weight",)
    assert names.find_module("missing") == ()


def test_find_module_by_another_name(saved: Any) -> None:
    assert saved("llama").names.find_module("layers.0.mlp.up_proj") == ("layers.0.mlp.up_proj.weight",)
    names = saved("mixtral").names
    experts = "model.layers.0.mlp.experts"
    assert names.find_module(experts) == (f"{experts}.down_proj", f"{experts}.gate_up_proj")
    old = "model.layers.0.block_sparse_moe.experts.1.w3"
    assert names_of(saved("mixtral").new, saved("mixtral").config).find_module(old) == (f"{old}.weight",)


def test_nearest(saved: Any) -> None:
    names = saved("llama").names
    assert names.nearest("model.layers.1.attn.q_proj.weight")[0] == "model.layers.1.self_attn.q_proj.weight"
    assert names.nearest("model.layers.99.self_attn.q_proj.weight", 1)[0].endswith("self_attn.q_proj.weight")
    assert names.nearest("???") == []


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "a..b",
        "model." * 50_000,
        "9" * 10_000 + ".weight",
        "layers.٣.weight",
        "x.777707777.y",
        "\\1",
        "(" * 300,
    ],
)
def test_hostile_names_are_data(name: str) -> None:
    config = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"}
    names = Names({name: (2, 2), "model.layers.0.q_proj.weight": (2, 2)}, config)
    found = names.find(name)
    assert found is not None
    assert found.tensors == (name,)
    assert names.find("model.language_model.layers.0.q_proj.weight") is not None
    assert names.find(name + ".other") is None
    names.tied(name)
    names.nearest(name + "x")


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": "Mixtral", "model_type": 7, "text_config": []},
        {"architectures": [3], "model_type": None},
        {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": {"model_type": {}}},
        {"architectures": ["LlavaForConditionalGeneration"], "text_config": {"model_type": "mixtral"}},
    ],
)
def test_a_config_may_be_anything(config: dict[str, Any]) -> None:
    assert Names({"model.q.weight": (2, 2)}, config).find("model.q.weight") is not None


def test_the_table_is_that_of_the_installed_transformers() -> None:
    """When this fails after an update: ``python tools/make_names.py``."""
    from importlib.metadata import version

    from transformers import conversion_mapping

    if version("transformers") not in table()["about"]["source"]:
        pytest.skip("another version of transformers is installed")
    make = load("tools", "make_names")
    made = conversion_mapping._build_checkpoint_conversion_mapping()
    for key, entries in made.items():
        stored = table()["rules"][table()["same"].get(key, key)]
        assert stored == json.loads(json.dumps([make.rule(entry) for entry in entries])), key
    assert table()["rules"].keys() | table()["same"].keys() == made.keys()
