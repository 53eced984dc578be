"""Adapters as trainers save them: keys with wrappers in them, files in shards, fields of their own."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from models import edit_config, plain_adapter, plain_base, read_tensors, write_adapter
from safetensors.torch import save_file

import adapterkit
from adapterkit.adapters.keys import plain_keys
from adapterkit.adapters.load import load_adapter
from adapterkit.adapters.methods import METHODS
from adapterkit.adapters.scan import scan_adapter
from adapterkit.errors import AdapterError, CheckpointError, NotFound, UnsafeError, UnsupportedAdapter
from adapterkit.lint.folders import check_folder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("warm_processes")

INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module")


def _below(wrapper: str, module: str) -> Callable[[str], str]:
    return lambda key: key.replace(f".{module}.", f".{module}.{wrapper}.")


def _in_front(lead: str) -> Callable[[str], str]:
    return lambda key: lead + key


FORMS: dict[str, Callable[[str], str]] = {
    **{f"{name} below a layer": _below(name, "self_attn") for name in INSIDE},
    **{f"{name} below a linear": _below(name, "q_proj") for name in INSIDE},
    **{f"{name} in front": _in_front(f"{name}.") for name in INSIDE},
    **{f"{name} inside": lambda key, name=name: key.replace("model.", f"model.{name}.", 1) for name in INSIDE},
    "module in front": _in_front("module."),
    "module twice": _in_front("module.module."),
    "compiled data parallel": _in_front("module._orig_mod."),
    "module inside": lambda key: key.replace("base_model.model.", "base_model.model.module.", 1),
    "value head": _in_front("pretrained_model."),
    "training class": _in_front("model."),
    "a name of the trainer's": _in_front("actor.module."),
    "prefix twice": _in_front("base_model.model."),
    "no prefix": lambda key: key.removeprefix("base_model.model."),
    "no prefix, module": lambda key: "module." + key.removeprefix("base_model.model."),
    "names of adapters": lambda key: key.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
}
KEYS = [
    f"base_model.model.model.layers.{layer}.{module}.lora_{side}.weight"
    for layer in (0, 1)
    for module in ("self_attn.q_proj", "mlp.up_proj")
    for side in "AB"
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_keys_means_the_same(form: str) -> None:
    found, notes = plain_keys({FORMS[form](key): key for key in KEYS}, "file", METHODS["LORA"])
    assert found == {key.removeprefix("base_model.model."): key for key in KEYS}
    assert notes  # what was dropped is said


def test_keys_as_peft_writes_them_need_no_note() -> None:
    found, notes = plain_keys(dict.fromkeys(KEYS), "file")
    assert set(found) == {key.removeprefix("base_model.model.") for key in KEYS}
    assert notes == ()


def test_a_module_called_module_is_kept_where_others_are_beside_it() -> None:
    keys = ["base_model.model.module.fc.lora_A.weight", "base_model.model.head.lora_A.weight"]
    assert set(plain_keys(dict.fromkeys(keys), "file")[0]) == {"module.fc.lora_A.weight", "head.lora_A.weight"}


def test_two_keys_that_become_one_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"two tensors for 'model.layers.0.self_attn.q_proj.lora_A.weight'"):
        plain_keys(dict.fromkeys([KEYS[0], "_orig_mod." + KEYS[0]]), "file")


METHOD_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "ADALORA": ("AdaLoraConfig", {"total_step": 10, "init_r": 4}),
    "VERA": ("VeraConfig", {"r": 4}),
    "IA3": ("IA3Config", {"feedforward_modules": []}),
    "LOHA": ("LoHaConfig", {"r": 4}),
    "LOKR": ("LoKrConfig", {"r": 4}),
    "OFT": ("OFTConfig", {"r": 0, "oft_block_size": 8}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 8}),
    "HRA": ("HRAConfig", {"r": 4}),
    "ROAD": ("RoadConfig", {"group_size": 8}),
    "MISS": ("MissConfig", {"r": 4}),
    "C3A": ("C3AConfig", {"block_size": 8}),
    "GRALORA": ("GraloraConfig", {"r": 8, "gralora_k": 2, "hybrid_r": 4}),
    "HIRA": ("HiraConfig", {"r": 4}),
    "DELORA": ("DeloraConfig", {"r": 4}),
    "GLORA": ("GloraConfig", {"r": 4}),
    "RANDLORA": ("RandLoraConfig", {"r": 4}),
    "VBLORA": ("VBLoRAConfig", {"r": 4, "num_vectors": 8, "vector_length": 8}),
    "FOURIERFT": ("FourierFTConfig", {"n_frequency": 10}),
    "OSF": ("OSFConfig", {}),
    "DEFT": ("DeftConfig", {"r": 4}),
    "PEANUT": ("PeanutConfig", {"r": 4}),
    "TINYLORA": ("TinyLoraConfig", {"r": 2}),
    "UNILORA": ("UniLoraConfig", {"r": 4, "theta_d_length": 64}),
    "LORA": ("LoraConfig", {"r": 4, "use_dora": True, "modules_to_save": ["head"]}),
}


@pytest.mark.filterwarnings("ignore")
def test_an_adapters_name_in_the_keys_of_every_method() -> None:
    """What PEFT's own state dict and PEFT's own file call a tensor is the same here."""
    import peft
    import torch

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(32, 32) for _ in range(2)])
            self.head = torch.nn.Linear(32, 8)

    for kind, (name, given) in METHOD_CONFIGS.items():
        config = getattr(peft, name)(target_modules=["layers.0", "layers.1"], **given)
        model = peft.get_peft_model(Model(), config, adapter_name="my-run")
        raw = {key: key for key in model.state_dict() if ".my-run" in key}
        method = METHODS[kind]
        saved = {
            key: key
            for key in peft.get_peft_model_state_dict(model, adapter_name="my-run")
            if not any("layers." in key and f".{part}" in key for part in method.ignored)
        }
        found, notes = plain_keys(raw, "file", method)
        found = {key: value for key, value in found.items() if not any(f".{part}" in key for part in method.ignored)}
        assert set(found) == set(plain_keys(saved, "file", method)[0]), kind
        assert any("carry an adapter's name" in note for note in notes), kind


def test_wrapped_keys_merge_as_plain_ones(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    adapter = plain_adapter(tmp_path / "a", base)
    wrapped = {f"module._orig_mod.{key}": value for key, value in read_tensors(adapter).items()}
    other = write_adapter(tmp_path / "b", wrapped)
    adapterkit.merge(base, [adapter], tmp_path / "one")
    report = adapterkit.merge(base, [other], tmp_path / "two")
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert any("_orig_mod (torch.compile)" in note and "module" in note for note in report.notes)


# ------------------------------------------------------------------ shards


def split(adapter: Path, shards: int = 3, lead: str = "") -> dict[str, str]:
    """The adapter's file in several, with an index, as transformers' ``model.save_pretrained(max_shard_size=)`` does."""
    from safetensors.torch import save_file

    tensors = read_tensors(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    where = {}
    for at in range(shards):
        file = f"adapter_model-{at + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[at::shards]}
        save_file(part, adapter / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(part, lead + file))
    write_index(adapter, where)
    return where


def write_index(adapter: Path, where: dict[str, str]) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (adapter / "adapter_model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def sharded(tmp_path: Path) -> tuple[Path, Path, Path]:
    base = plain_base(tmp_path / "base")
    whole = plain_adapter(tmp_path / "whole", base)
    shutil.copytree(whole, tmp_path / "a")
    split(tmp_path / "a")
    return base, whole, tmp_path / "a"


@pytest.mark.parametrize("lead", ["", "./"])
def test_a_sharded_adapter_merges_as_a_whole_one(sharded: tuple[Path, Path, Path], tmp_path: Path, lead: str) -> None:
    base, whole, adapter = sharded
    if lead:
        shutil.rmtree(adapter)
        shutil.copytree(whole, adapter)
        split(adapter, lead=lead)
    adapterkit.merge(base, [whole], tmp_path / "one")
    adapterkit.merge(base, [adapter], tmp_path / "two")
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert len(load_adapter(adapter).sources) == 3
    assert not [problem for problem in check_folder(adapter) if problem.code == "no-weights"]


def test_a_shard_that_changed_is_another_input(sharded: tuple[Path, Path, Path]) -> None:
    base, _, adapter = sharded
    before = adapterkit.plan_merge(base, [adapter]).plan.inputs
    last = adapter / "adapter_model-00003-of-00003.safetensors"
    last.write_bytes(last.read_bytes()[:8] + last.read_bytes()[8:].replace(b'"pt"', b'"tp"'))
    assert adapterkit.plan_merge(base, [adapter]).plan.inputs != before


def test_a_sharded_adapter_converts_to_one_file(sharded: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, whole, adapter = sharded
    adapterkit.convert(adapter, tmp_path / "out", to="peft")
    found, want = read_tensors(tmp_path / "out"), read_tensors(whole)
    assert set(found) == set(want)
    assert all(found[name].equal(want[name]) for name in want)


def test_a_missing_shard_is_named(sharded: tuple[Path, Path, Path]) -> None:
    _, _, adapter = sharded
    (adapter / "adapter_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(NotFound, match=r"lacks adapter_model-00002-of-00003.safetensors, one of the 3 files"):
        load_adapter(adapter)


def test_an_index_that_leads_elsewhere_is_refused(sharded: tuple[Path, Path, Path]) -> None:
    _, _, adapter = sharded
    write_index(adapter, {"x": "../base/model.safetensors"})
    with pytest.raises(UnsafeError, match="out of its folder"):
        load_adapter(adapter)


# ------------------------------------------------------------------ fields of other trainers

OTHERS: list[dict[str, Any]] = [
    {"lora_dtype": "float32", "lorap_lr_ratio": None, "lorap_emb_lr": 1e-6},
    {"lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-6, "model_key_mapping": {"arch_name": "llama"}},
    {"nvfp4_merge_aware": {"scale_mode": "fresh", "encoder": "torchao-0.16"}},
    {"enable_lora": None, "merge_weights": True},
    {"dropout_position": "post", "lora_A_init_method": "xavier", "lora_B_init_method": "zero", "use_triton": True},
    {"loraplus_lr_ratio": 16.0, "library_name": "peft", "trainer_version": "1.2"},
    {"auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True}},
]


@pytest.mark.parametrize("fields", OTHERS, ids=lambda fields: next(iter(fields)))
def test_fields_about_training_do_not_stop_a_merge(tmp_path: Path, fields: dict[str, Any]) -> None:
    base = plain_base(tmp_path / "base", layers=1)
    adapter = edit_config(plain_adapter(tmp_path / "a", base), **fields)
    assert adapterkit.plan_merge(base, [adapter], fingerprints=False).folded.touched


def test_a_field_that_may_change_the_formula_stops_it(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base", layers=1)
    adapter = edit_config(plain_adapter(tmp_path / "a", base), enable_lora=[True, False, True])
    with pytest.raises(AdapterError, match="enable_lora"):
        adapterkit.plan_merge(base, [adapter], fingerprints=False)


def test_an_index_that_leaves_a_numbered_file_out_is_refused(tmp_path: Path) -> None:
    """The tensors of that file would be lost without a word."""
    base = plain_base(tmp_path / "base", shards=3)
    adapter = plain_adapter(tmp_path / "a", base)
    index = base / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    last = max(said["weight_map"].values())
    said["weight_map"] = {name: f"././{file}" for name, file in said["weight_map"].items() if file != last}
    index.write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=f"does not name {last}"):
        adapterkit.merge(base, [adapter], tmp_path / "out")
    (base / last).unlink()  # and that every tensor of the model is there is the business of who saved it
    adapterkit.merge(base, [plain_adapter(tmp_path / "b", base)], tmp_path / "out")


def test_what_llava_trained_whole_beside_the_adapter_does_not_vanish(tmp_path: Path) -> None:
    """It keeps it in a pickle of its own, which PEFT does not read."""
    base = plain_base(tmp_path / "base")
    adapter = plain_adapter(tmp_path / "adapter", base)
    name = "non_lora_trainables.bin"
    (adapter / name).write_bytes(b"")
    with pytest.raises(UnsupportedAdapter, match=f"half of what was trained: {name} beside it holds the"):
        adapterkit.merge(base, [adapter], tmp_path / "out")
    with pytest.raises(UnsupportedAdapter, match=name):
        adapterkit.convert(adapter, tmp_path / "mlx", to="mlx")
    assert not (tmp_path / "out").exists()


def test_a_vision_tower_that_ms_swift_trained_whole_replaces_the_bases(tmp_path: Path) -> None:
    """`vit.safetensors`, under the keys of PEFT's wrapper; ms-swift 4.6, tuner_plugin/lora_llm.py."""
    base = plain_base(tmp_path / "base", width=32)
    adapter = plain_adapter(tmp_path / "adapter", base, modules=("q_proj",))
    new = {f"model.layers.{layer}.{name}": tensor for layer, name, tensor in _trained()}
    save_file({f"base_model.model.{name}": one for name, one in new.items()}, adapter / "vit.safetensors")
    report = adapterkit.merge(base, [adapter], tmp_path / "out")
    assert any("4 parameters that ms-swift trained whole" in note for note in report.notes)
    merged, before = read_tensors(tmp_path / "out"), read_tensors(base)
    assert all(torch.equal(merged[name], one) for name, one in new.items())
    changed = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(merged[changed], before[changed])
    assert adapterkit.verify(tmp_path / "out", base=base, adapters=[adapter], level="tensors").ok
    assert not any(one.code == "scan-hidden-whole" for one in scan_adapter(load_adapter(adapter)).oddities)
    twice = {"base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight": torch.zeros(32, 32)}
    save_file(twice, adapter / "vit.safetensors")
    with pytest.raises(AdapterError, match=r"base_layer.weight' of vit.safetensors has an adapter in adapter_model"):
        load_adapter(adapter)


def _trained() -> list[tuple[int, str, torch.Tensor]]:
    one = {"mlp.up_proj.weight": torch.randn(96, 32), "input_layernorm.weight": torch.randn(32)}
    return [(layer, name, tensor.bfloat16()) for layer in (0, 2) for name, tensor in one.items()]


def test_modules_and_heads_that_a_trainer_saves_beside_the_adapter_go_along(tmp_path: Path) -> None:
    """The pooling and dense layers of sentence-transformers, and the value head of LLaMA-Factory, of which the base has others
    or none."""
    base = plain_base(tmp_path / "base")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    adapter = plain_adapter(tmp_path / "adapter", base)
    files = {
        "modules.json": "[]",
        "config_sentence_transformers.json": '{"similarity_fn_name": "dot"}',
        "1_Pooling/config.json": '{"pooling_mode_cls_token": true}',
        "2_Dense/config.json": "{}",
    }
    for name, text in files.items():
        (adapter / name).parent.mkdir(exist_ok=True)
        (adapter / name).write_text(text)
    save_file({"linear.weight": torch.ones(2, 2)}, adapter / "2_Dense" / "model.safetensors")
    save_file({"v_head.summary.weight": torch.ones(1, 16)}, adapter / "value_head.safetensors")
    report = adapterkit.merge(base, [adapter], tmp_path / "out")
    assert any("sentence-transformers' modules, value head taken from" in note for note in report.notes)
    for name in (*files, "2_Dense/model.safetensors", "value_head.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (adapter / name).read_bytes(), name
    assert adapterkit.verify(tmp_path / "out", base=base, adapters=[adapter], level="tensors").ok
