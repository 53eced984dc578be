"""A config that contradicts its tensors, or says no number where one belongs, is one sentence and no file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import arch_zoo as zoo
import pytest
from gguf import GGUFWriter

import adapterkit
import adapterkit.gguf.vocab
from adapterkit.errors import AdapterkitError
from adapterkit.gguf.arch.wellformed import well_formed
from adapterkit.verbs.convert import convert

GONE = object()
ROPE = {"rope_type": "default"}
# What a config of 2 layers, width 64, 4 heads and 2 of keys of 16 numbers says instead, and a word of the sentence.
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "fewer layers": ({"num_hidden_layers": 1}, "says 1 layer, and 'model.layers.1"),
    "more layers": ({"num_hidden_layers": 3}, "'blk.2.attn_k.weight' is missing"),
    "half a layer": ({"num_hidden_layers": 2.5}, "'num_hidden_layers' .* is 2.5, where a whole number"),
    "layers in words": ({"num_hidden_layers": "2"}, "'num_hidden_layers' .* is '2', where a whole number"),
    "no heads": ({"num_attention_heads": 0}, "'num_attention_heads' .* above 0"),
    "three heads": ({"num_attention_heads": 3}, "not a multiple of 3 heads"),
    "eight heads": ({"num_attention_heads": 8}, "attn_q.weight' has 64 rows, .* says 128"),
    "one head of keys": ({"num_key_value_heads": 1}, "attn_k.weight' has 32 rows, .* says 16"),
    "eight heads of keys": ({"num_key_value_heads": 8}, "attn_k.weight' has 32 rows, .* says 128"),
    "larger heads": ({"head_dim": 32}, "attn_k.weight' has 32 rows, .* says 64"),
    "narrower": ({"hidden_size": 32}, "token_embd.weight' has 64 columns, .* says 32"),
    "narrower networks": ({"intermediate_size": 64}, "ffn_down.weight' has 96 columns, .* says 64"),
    "an epsilon in words": ({"rms_norm_eps": "small"}, "'rms_norm_eps' .* is 'small', where a number"),
    "no epsilon": ({"rms_norm_eps": GONE, "model_type": "other"}, "does not say 'rms_norm_eps'"),
    "an epsilon below nothing": ({"rms_norm_eps": -1}, "is negative"),
    "an epsilon that is none": ({"rms_norm_eps": float("nan")}, "'rms_norm_eps' .* is nan, where a number"),
    "rotation in words": ({"rope_parameters": "x"}, "no table"),
    "a base in words": ({"rope_parameters": {**ROPE, "rope_theta": "big"}}, "gives 'big' for 'rope.freq_base'"),
    "a base of nothing": ({"rope_parameters": {**ROPE, "rope_theta": 0}}, "gives 0 for 'rope.freq_base'"),
    "no context": ({"max_position_embeddings": GONE, "model_type": "other"}, "does not say 'max_position_embeddings'"),
    "a context of nothing": ({"max_position_embeddings": 0}, "gives 0 for 'context_length'"),
    "a context beyond counting": ({"max_position_embeddings": 2**40}, "no count"),
    "a class in words": ({"architectures": "LlamaForCausalLM"}, "list of class names"),
    "a list of activations": ({"hidden_act": ["silu"]}, "hidden_act"),
    "yarn without a factor": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
    "no width": ({"hidden_size": GONE, "model_type": "other"}, "does not say 'hidden_size'"),
    "a width of words": ({"hidden_size": [1, "a"]}, "'hidden_size' .* where a whole number"),
    "heads that are true": ({"num_attention_heads": True}, "is True, where a whole number"),
    "no heads at all": ({"num_attention_heads": []}, "is \\[\\], where a whole number above 0"),
    "a table of heads": ({"num_key_value_heads": {}}, "'num_key_value_heads' .* where a whole number"),
    "heads of nothing": ({"head_dim": 0}, "'head_dim' .* above 0"),
    "networks of nothing": ({"intermediate_size": 0}, "does not say 'intermediate_size'"),
    "a table of epsilons": ({"rms_norm_eps": {}}, "'rms_norm_eps' .* where a number"),
    "kinds of layers in numbers": ({"layer_types": 3}, "'layer_types' .* where a list of words"),
    "a vocabulary of nothing": ({"vocab_size": 0}, "'vocab_size' .* above 0"),
    "a list of windows": ({"sliding_window": []}, "'sliding_window' .* where a whole number"),
    "heads that nobody says": (
        {"num_attention_heads": GONE, "head_dim": 16, "model_type": "other"},
        "num_attention_heads",
    ),
    "networks that nobody says": ({"intermediate_size": GONE, "model_type": "other"}, "'intermediate_size'"),
    "a vocabulary in words": ({"vocab_size": "many"}, "'vocab_size' .* where a whole number"),
    "an unknown rotation": ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "spiral"),
}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("contradictions") / "hf"
    zoo.build(folder, "llama")
    return folder


@pytest.fixture(autouse=True)
def _no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapterkit.gguf.vocab, "read_vocab", zoo.read_vocab)


def test_contradictions_are_refused_by_name(hf: Path, tmp_path: Path) -> None:
    base = tmp_path / "hf"
    shutil.copytree(hf, base)
    config = json.loads((hf / "config.json").read_text())
    for name, (change, words) in WRONG.items():
        said = {key: value for key, value in {**config, **change}.items() if value is not GONE}
        (base / "config.json").write_text(json.dumps(said))
        with pytest.raises(AdapterkitError, match=words) as raised:
            convert(base, tmp_path / "o.gguf")
        assert len(str(raised.value)) < 400, name
        assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"], name


def test_fields_of_other_meanings_are_no_counts() -> None:
    """As Phi-4-multimodal, Mamba, Hunyuan, Step and LFM2 say them."""
    well_formed(
        {
            "embd_layer": {"embedding_cls": "image_audio"},
            "time_step_rank": "auto",
            "moe_topk": [8, 8],
            "num_shared_expert": [1, 1],
            "rope_theta": [5e6, 1e4],
            "mlp_only_layers": [],
            "block_auto_adjust_ff_dim": True,
            "num_key_value_heads": [4, None, 2],
            "sliding_window": None,
            "head_dim": None,
            "vision_feature_layer": -2,
        },
        "config.json",
    )


def test_a_context_and_an_epsilon_that_are_left_out_are_the_classs(hf: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    base = tmp_path / "hf"
    shutil.copytree(hf, base)
    config = json.loads((hf / "config.json").read_text())
    del config["max_position_embeddings"], config["rms_norm_eps"]
    (base / "config.json").write_text(json.dumps(config))
    convert(base, tmp_path / "o.gguf")
    fields = GGUFReader(str(tmp_path / "o.gguf")).fields
    assert fields["llama.context_length"].contents() == 2048
    assert fields["llama.attention.layer_norm_rms_epsilon"].contents() == pytest.approx(1e-6)


def test_layers_after_the_last_are_left_out_where_the_config_says_that_they_predict(hf: Path, tmp_path: Path) -> None:
    base = tmp_path / "hf"
    shutil.copytree(hf, base)
    config = json.loads((hf / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1, "num_nextn_predict_layers": 1}))
    convert(base, tmp_path / "o.gguf")
    assert (tmp_path / "o.gguf").is_file()


def test_norms_of_a_lora_file_are_said_to_be_left_out(hf: Path, tmp_path: Path) -> None:
    import numpy as np

    writer = GGUFWriter(str(tmp_path / "lora.gguf"), "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    rng = np.random.default_rng(0)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", rng.normal(0, 1, (4, 64)).astype(np.float32))
    writer.add_tensor("blk.0.attn_q.weight.lora_b", rng.normal(0, 1, (64, 4)).astype(np.float32))
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = adapterkit.merge(hf, [tmp_path / "lora.gguf"], tmp_path / "o.gguf")
    assert any("left out, as llama.cpp does: 1 norm" in note for note in report.notes)
