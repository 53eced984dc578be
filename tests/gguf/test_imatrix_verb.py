"""`imatrix`: the sums are those of a float64 formula, for dense layers and for experts, and quantizing takes the file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import load_model
from safetensors.torch import load_file, save_file
from vocab_zoo import byte_level

from adapterkit.cli import main
from adapterkit.errors import AdapterkitError, CheckpointError, NotFound, OutputError, UnsafeError, UsageError
from adapterkit.gguf.checkpoint import open_gguf
from adapterkit.gguf.importance import load_importance
from adapterkit.gguf.quantize import Quantization
from adapterkit.gguf.vocab import pretokenizers
from adapterkit.verbs.convert import convert
from adapterkit.verbs.imatrix import _by_library, added, imatrix
from adapterkit.verbs.stored_model import load_stored

CHUNK = 32
COMMON: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module")
def tokenizer() -> str:
    row = pretokenizers.row_of("qwen2")
    assert row is not None
    return str(byte_level(pretokenizers.as_json(row), size=280).to_str())


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over 12 lazy dogs, and they do not mind.\n" * 12)
    return path


def build(folder: Path, cls: str, tokenizer: str, **config: Any) -> Path:
    import transformers

    torch.manual_seed(5)
    made = getattr(transformers, cls.replace("ForCausalLM", "Config"))(**COMMON, **config)
    made._experts_implementation = "eager"
    model = getattr(transformers, cls)(made).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1) if parameter.dim() > 1 else None
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer)
    return folder


def chunks(folder: Path, words: Path) -> list[list[int]]:
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(words.read_text(), add_special_tokens=False).ids
    return [ids[at : at + CHUNK] for at in range(0, len(ids) - CHUNK + 1, CHUNK)]


def values(path: Path) -> dict[str, Any]:
    return {name: tensor.read(0, tensor.numel).view(tensor.shape).numpy() for name, tensor in open_gguf(path).items()}


def inputs_of(model: Any, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """The squares of what each linear layer was given, summed, in float64, by module."""
    sums: dict[str, torch.Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def add(_: Any, given: Any, name: str = name) -> None:
                squares = given[0].reshape(-1, given[0].shape[-1]).square().sum(0)
                sums[name] = sums.get(name, 0) + squares

            hooks.append(module.register_forward_pre_hook(add))
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row]))
    for hook in hooks:
        hook.remove()
    return sums


def test_a_file_that_transformers_would_not_load(tmp_path: Path, tokenizer: str, words: Path) -> None:
    """Two models in a folder: the sums would be of model.safetensors, whichever file was named."""
    folder = build(tmp_path / "hf", "LlamaForCausalLM", tokenizer)
    (folder / "other.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(UsageError, match=r"other.safetensors: .* it loads model.safetensors"):
        imatrix(folder / "other.safetensors", words, tmp_path / "no.gguf", chunk=CHUNK)
    with pytest.raises(UsageError, match=r"other.safetensors: .* it loads model.safetensors"):
        imatrix("s3://bucket/hf/other.safetensors", words, tmp_path / "no.gguf", chunk=CHUNK)
    assert imatrix(folder / "model.safetensors", words, tmp_path / "yes.gguf", chunk=CHUNK, chunks=1).tensors == 14


def test_dense_layers(tmp_path: Path, tokenizer: str, words: Path) -> None:
    folder = build(tmp_path / "hf", "LlamaForCausalLM", tokenizer)
    rows = chunks(folder, words)
    report = imatrix(folder, words, tmp_path / "imatrix.gguf", chunk=CHUNK)
    assert (report.chunks, report.tensors, report.missing) == (len(rows), 14, ())
    found = values(tmp_path / "imatrix.gguf")
    assert len(found) == 28
    sums = inputs_of(load_model(folder).double(), rows)
    theirs = {
        "q_proj": "attn_q",
        "v_proj": "attn_v",
        "o_proj": "attn_output",
        "down_proj": "ffn_down",
        "up_proj": "ffn_up",
    }
    for layer in range(2):
        for module, name in theirs.items():
            part = "self_attn" if module in ("q_proj", "v_proj", "o_proj") else "mlp"
            expected = sums[f"model.layers.{layer}.{part}.{module}"].numpy()
            np.testing.assert_allclose(found[f"blk.{layer}.{name}.weight.in_sum2"], expected, rtol=1e-5)
            assert found[f"blk.{layer}.{name}.weight.counts"] == [len(rows) * CHUNK]
    convert(folder, tmp_path / "model.gguf")
    of_file = imatrix(tmp_path / "model.gguf", words, tmp_path / "of_file.gguf", chunk=CHUNK)
    assert (of_file.model, of_file.tensors) == (str(tmp_path / "model.gguf"), 14)
    for name, value in values(tmp_path / "of_file.gguf").items():
        np.testing.assert_array_equal(value, found[name])
    assert sorted(one.name for one in tmp_path.iterdir() if one.name.startswith(".")) == []
    header = open_gguf(tmp_path / "imatrix.gguf").header
    assert header["general.type"] == "imatrix"
    assert (header["imatrix.datasets"], header["imatrix.chunk_count"]) == ([str(words)], len(rows))
    assert header["imatrix.chunk_size"] == CHUNK


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        ("LlamaForCausalLM", {"tie_word_embeddings": True}),
        ("Qwen3MoeForCausalLM", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}),
    ],
)
def test_weights_of_16_bits_compute_in_float32(
    cls: str, config: dict[str, Any], tmp_path: Path, tokenizer: str, words: Path
) -> None:
    """Byte for byte what a model of float32 weights gives, also where norms are stored wider; unless a dtype is asked for."""
    folder = build(tmp_path / "hf", cls, tokenizer, **config)
    tensors = load_file(folder / "model.safetensors")
    stored = {name: value if "norm" in name else value.bfloat16() for name, value in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    computed = {}
    for dtype in ("auto", "f32", "bf16"):
        computed[dtype] = imatrix(
            folder, words, tmp_path / f"{dtype}.gguf", chunk=CHUNK, chunks=2, dtype=dtype
        ).computed
    assert computed == {"auto": "f32", "f32": "f32", "bf16": "bf16"}
    auto, wide, narrow = ((tmp_path / f"{dtype}.gguf").read_bytes() for dtype in computed)
    assert auto == wide != narrow


def test_a_model_is_quantized_wherever_its_config_says_so() -> None:
    how = {"quant_method": "compressed-tensors"}
    said = ({"quantization_config": how}, {"compression_config": how}, {"text_config": {"quantization_config": how}})
    assert all(map(_by_library, said))
    assert not _by_library({"text_config": {}, "quantization_config": None})


def test_a_model_is_loaded_with_the_dtypes_that_are_asked_for(tmp_path: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    model = load_stored(tmp_path, lambda name: torch.float32 if "norm" in name else torch.bfloat16)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.dtype == torch.float32
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "norm" in name else torch.bfloat16), name
    assert {buffer.dtype for buffer in model.buffers() if buffer.is_floating_point()} == {torch.float32}


def test_experts_apart(tmp_path: Path, tokenizer: str, words: Path) -> None:
    import transformers

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True}
    folder = build(tmp_path / "hf", "Qwen3MoeForCausalLM", tokenizer, **experts)
    rows = chunks(folder, words)
    imatrix(folder, words, tmp_path / "imatrix.gguf", chunk=CHUNK)
    found = values(tmp_path / "imatrix.gguf")

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").double()
    up, down, counts = torch.zeros(4, 256), torch.zeros(4, 256), torch.zeros(4)
    module = model.model.layers[1].mlp.experts

    def add(_: Any, given: Any) -> None:
        hidden, chosen = given[0].reshape(-1, 256), given[1].reshape(-1, 2)
        for expert in range(4):
            rows = hidden[(chosen == expert).any(-1)]
            gate, linear = (rows @ module.gate_up_proj[expert].T).chunk(2, -1)
            counts[expert] += len(rows)
            up[expert] += rows.square().sum(0).float()
            down[expert] += (torch.nn.functional.silu(gate) * linear).square().sum(0).float()

    module.register_forward_pre_hook(add)
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row]))
    assert sum(counts) == 2 * len(rows) * CHUNK
    for name, expected in (("ffn_gate_exps", up), ("ffn_up_exps", up), ("ffn_down_exps", down)):
        np.testing.assert_allclose(found[f"blk.1.{name}.weight.in_sum2"], expected.numpy(), rtol=1e-4)
        assert found[f"blk.1.{name}.weight.counts"].reshape(-1).tolist() == counts.tolist()


def test_a_kernel_on_its_side(tmp_path: Path, tokenizer: str, words: Path) -> None:
    """GPT-2 multiplies from the other side, and its fused projection is one tensor in both formats."""
    import transformers

    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=1
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text(tokenizer)
    rows = chunks(tmp_path / "hf", words)
    imatrix(tmp_path / "hf", words, tmp_path / "imatrix.gguf", chunk=CHUNK, dtype="f32")
    found = values(tmp_path / "imatrix.gguf")
    model = load_model(tmp_path / "hf").double()
    seen = torch.zeros(64, dtype=torch.float64)

    def add(_: Any, given: Any) -> None:
        seen.add_(given[0].square().sum((0, 1)))

    model.transformer.h[1].attn.c_attn.register_forward_pre_hook(add)
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row]))
    np.testing.assert_allclose(found["blk.1.attn_qkv.weight.in_sum2"], seen.numpy(), rtol=1e-5)


def test_quantizing_takes_the_file(
    tmp_path: Path, tokenizer: str, words: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = build(tmp_path / "hf", "LlamaForCausalLM", tokenizer)
    capsys.readouterr()
    command = ["imatrix", folder, "--text", words, "-o", tmp_path / "im.gguf", "--chunk", 32, "--json"]
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in command])
    out, err = capsys.readouterr()
    assert not ended.value.code, err
    assert json.loads(out)["tensors"] == 14
    assert load_importance(tmp_path / "im.gguf").of("blk.0.ffn_down.weight", (256, 256)).shape == (1, 256)
    for name, more in (("with", {"imatrix": tmp_path / "im.gguf"}), ("without", {})):
        convert(folder, tmp_path / f"{name}.gguf", quantization=Quantization("Q4_K_M", **more))
    both = [open_gguf(tmp_path / f"{name}.gguf")["blk.0.ffn_up.weight"] for name in ("with", "without")]
    assert both[0].dtype == both[1].dtype
    assert not torch.equal(both[0].read(0, 65536), both[1].read(0, 65536))


def test_refused(tmp_path: Path, tokenizer: str, words: Path) -> None:
    folder = build(tmp_path / "hf", "LlamaForCausalLM", tokenizer)
    out = tmp_path / "im.gguf"
    cases: list[tuple[type[AdapterkitError], str, dict[str, Any]]] = [
        (NotFound, "does not exist", {"text": tmp_path / "no.txt"}),
        (UsageError, "fewer than one chunk", {"chunk": 5000}),
        (UnsafeError, "is a folder, not a file", {"text": tmp_path}),
        (UsageError, "says nothing", {"chunk": 1}),
    ]
    for kind, says, more in cases:
        with pytest.raises(kind, match=says):
            imatrix(folder, **{"text": words, "out": out, **more})
        assert not out.exists()
    out.write_bytes(b"x")
    with pytest.raises(OutputError):
        imatrix(folder, words, out)
    assert out.read_bytes() == b"x"
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="transformers cannot load"):
        imatrix(folder, words, tmp_path / "other.gguf", chunk=CHUNK)
    assert not (tmp_path / "other.gguf").exists()


@pytest.mark.parametrize("option", ["--chunk=8", "--chunks=2", "--dtype=f32", "--device=cpu"])
def test_options_of_running_a_model_are_refused_where_none_is_run(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["imatrix", "--in-file", "a.gguf", "--in-file", "b.gguf", option, "-o", str(tmp_path / "both.gguf")])
    assert ended.value.code == 2
    assert f"{option.partition('=')[0]} has no meaning with --in-file" in capsys.readouterr().err


def test_matrices_added_up(tmp_path: Path, tokenizer: str, words: Path) -> None:
    """Sums and counts of two texts, of dense layers and of stacks, as a runtime reads them."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True}
    folder = build(tmp_path / "hf", "Qwen3MoeForCausalLM", tokenizer, **experts)
    (tmp_path / "other.txt").write_text("def add(a, b):\n    return a + b  # nothing is like this\n" * 9)
    one, other, both = tmp_path / "one.gguf", tmp_path / "other.gguf", tmp_path / "both.gguf"
    imatrix(folder, words, one, chunk=CHUNK)
    imatrix(folder, tmp_path / "other.txt", other, chunk=CHUNK, chunks=3)
    command = [sys.executable, "-m", "adapterkit", "imatrix", "--in-file", one, "--in-file", other]
    done = subprocess.run([*command, "-o", both, "--json"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    parts, sums = (values(one), values(other)), values(both)
    assert list(sums) == list(parts[0])
    for name, found in sums.items():
        np.testing.assert_allclose(found, parts[0][name] + parts[1][name], rtol=1e-6)
    heads = [open_gguf(path).header for path in (one, other, both)]
    assert heads[2]["imatrix.chunk_count"] == heads[0]["imatrix.chunk_count"] + 3
    assert heads[2]["imatrix.datasets"] == [str(words), str(tmp_path / "other.txt")]
    assert load_importance(both).of("blk.0.ffn_down_exps.weight", (4, 256, 256)).shape == (4, 256)

    dense = build(tmp_path / "narrow", "Qwen3ForCausalLM", tokenizer)
    convert(dense, tmp_path / "model.gguf")
    (tmp_path / "old.dat").write_bytes(b"\1\0\0\0")
    cases = [
        (UsageError, "nothing to add", [one]),
        (NotFound, "does not exist", [one, tmp_path / "no.gguf"]),
        (CheckpointError, "not an importance matrix", [one, tmp_path / "model.gguf"]),
        (CheckpointError, "is no GGUF file", [one, tmp_path / "old.dat"]),
        (OutputError, "exists", [one, other]),
    ]
    for kind, says, files in cases:
        with pytest.raises(kind, match=says):
            added(files, both)
