"""`convert` from folder to folder: quantized as transformers saves it, and plain again as transformers decodes it."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch
from codec_reads import values
from safetensors.torch import load_file
from test_as_trained import model, saved_quantized
from test_gptq import gptq

from adapterkit.cli import main
from adapterkit.errors import CheckpointError
from adapterkit.registry.beside import read_beside
from adapterkit.verbs.convert import convert, plan_convert

BNB = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(one) for one in arguments])
    return int(ended.value.code or 0)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """Rows of whole blocks: bitsandbytes' AVX-512 kernel mistakes the scales of others (see test_bitsandbytes)."""
    import transformers

    torch.manual_seed(0)
    small = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=1, vocab_size=64
    )
    transformers.LlamaForCausalLM(small).to(torch.bfloat16).save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        return loaded(torch.arange(1, 17).view(2, 8)).logits.detach()


@pytest.mark.parametrize("to", BNB)
def test_quantized_as_transformers_saves_it(bnb, tmp_path: Path, base: Path, to: str) -> None:
    """The same tensors, the same config, and in transformers and bitsandbytes the same answers."""
    theirs = saved_quantized(
        base, tmp_path / "theirs", torch.bfloat16, bnb_4bit_compute_dtype=torch.bfloat16, **BNB[to]
    )
    report = convert(base, tmp_path / "ours", to=to)
    got, wanted = stored(tmp_path / "ours"), stored(theirs)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], tensor) and got[name].dtype is tensor.dtype for name, tensor in wanted.items())
    one, two = config(tmp_path / "ours")["quantization_config"], config(theirs)["quantization_config"]
    assert {**one, "bnb_4bit_compute_dtype": ""} == {**two, "bnb_4bit_compute_dtype": ""}
    assert torch.equal(logits(tmp_path / "ours"), logits(theirs))
    assert (report.to, report.tensors) == (to, len(wanted))
    assert report.nbytes == (tmp_path / "ours/model.safetensors").stat().st_size
    record = read_beside(tmp_path / "ours")
    assert record is not None
    assert (record.kind, record.method, record.operation.name) == ("quantized", to, "convert")
    assert record.parents[0].label == "llama"


@pytest.mark.parametrize("how", [{}, {"bnb_4bit_use_double_quant": True}], ids=["single", "double"])
def test_plain_again_as_transformers_decodes_it(bnb, tmp_path: Path, wide: Path, how: dict) -> None:
    from transformers import AutoModelForCausalLM

    theirs = saved_quantized(wide, tmp_path / "q", torch.bfloat16, **BNB["nf4"], **how)
    assert run("convert", theirs, "--to", "bf16", "-o", tmp_path / "plain") == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = AutoModelForCausalLM.from_pretrained(theirs).dequantize(torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, oracle[name]) for name, tensor in stored(tmp_path / "plain").items())
    assert "quantization_config" not in config(tmp_path / "plain")
    assert logits(tmp_path / "plain").isfinite().all()
    record = read_beside(tmp_path / "plain")
    assert record is not None
    assert record.kind == "converted"


def test_fp8_becomes_the_float32_that_transformers_has(tmp_path: Path, wide: Path) -> None:
    """Not rounded to the bfloat16 that the config names on its way to float32."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    assert run("convert", wide, "--to", "fp8", "--skip-module", "lm_head", "-o", tmp_path / "fp8") == 0
    assert run("convert", tmp_path / "fp8", "--to", "f32", "-o", tmp_path / "f32") == 0
    quantized, plain = stored(tmp_path / "fp8"), stored(tmp_path / "f32")
    names = [name for name in quantized if name + "_scale_inv" in quantized]
    assert len(names) == 7
    for name in names:
        oracle = Fp8Dequantize(None)._dequantize_one(
            quantized[name], quantized[name + "_scale_inv"], output_dtype=torch.float32
        )
        assert torch.equal(plain[name], oracle)
        assert not torch.equal(plain[name].bfloat16().float(), oracle)
    assert all(tensor.dtype is torch.float32 for tensor in plain.values())
    assert config(tmp_path / "f32")["dtype"] == "float32"
    assert logits(tmp_path / "f32").dtype is torch.float32


def test_from_any_codec(store, tmp_path: Path, capsys) -> None:
    tensors, settings, wanted = gptq(4, 1, 32, True)
    checkpoint = store({**tensors, "a.bias": torch.zeros(64)}, settings, dtype="float16")
    convert(checkpoint.ref, tmp_path / "f16", to="f16")
    assert torch.equal(stored(tmp_path / "f16")["a.weight"], wanted)
    assert torch.equal(stored(tmp_path / "f16")["a.weight"], values(checkpoint, "a.weight"))
    assert run("convert", checkpoint.ref, "--to", "bf16", "--dry-run") == 0
    assert "decoded 1 weight in gptq 4 bit" in capsys.readouterr().err


def test_one_grid_to_another_says_what_it_costs(bnb, tmp_path: Path, base: Path, capsys) -> None:
    convert(base, tmp_path / "nf4", to="nf4", double_quant=True)
    assert run("convert", tmp_path / "nf4", "--to", "int8", "-o", tmp_path / "int8") == 0
    assert "had lost stays lost, and int8 adds its own error" in capsys.readouterr().err
    assert run("convert", tmp_path / "nf4", "--to", "nf4", "-o", tmp_path / "again") == 2
    assert "is nf4 already; copy it, or give the 16-bit original" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_same_bytes_and_shards(bnb, tmp_path: Path, base: Path) -> None:
    convert(base, tmp_path / "one", to="nf4", jobs=1, double_quant=True, skip_modules=("lm_head", "q_proj"))
    convert(base, tmp_path / "two", to="nf4", jobs=3, double_quant=True, skip_modules=("lm_head", "q_proj"))
    for name in os.listdir(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert stored(tmp_path / "one")["model.layers.0.self_attn.q_proj.weight"].dtype is torch.bfloat16
    report = convert(base, tmp_path / "three", to="nf4", double_quant=True, max_shard_size="50KB")
    assert len(report.files) > 1
    assert torch.equal(logits(tmp_path / "three"), logits(convert_whole(base, tmp_path / "four")))


@pytest.mark.parametrize("calls", [1, 5, 9])
def test_a_resumed_conversion_has_the_same_bytes(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """Scales that were found before the interruption are found again."""
    from adapterkit.checkpoint.encoded import Encoding

    convert(base, tmp_path / "whole", to="nf4", double_quant=True)
    codes, done = Encoding.codes, [0]

    def failing(self: Encoding, start: int) -> torch.Tensor:
        done[0] += 1
        if done[0] > calls:
            raise CheckpointError("interrupted")
        return codes(self, start)

    with monkeypatch.context() as patched:
        patched.setattr(Encoding, "codes", failing)
        with pytest.raises(CheckpointError, match="interrupted"):
            convert(base, tmp_path / "out", to="nf4", double_quant=True, resume=True, jobs=1)
    assert not (tmp_path / "out").exists()
    report = convert(base, tmp_path / "out", to="nf4", double_quant=True, resume=True)
    assert report.reused >= calls - 1
    for name in os.listdir(tmp_path / "whole"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert sorted(os.listdir(tmp_path)) == ["llama", "out", "whole"]


def convert_whole(base: Path, out: Path) -> Path:
    convert(base, out, to="nf4", double_quant=True)
    return out


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--to", "nf3"], 2, "'nf3' is no format to convert to"),
        (["--to", "int8", "--double-quant"], 2, "--double-quant does not apply to --to int8"),
        (["--to", "bf16", "--skip-module", "x"], 2, "--skip-module does not apply to --to bf16"),
        (["--to", "nf4", "--quant", "Q4_K_M"], 2, "--quant does not apply to --to nf4"),
        (["--to", "nf4", "--base", "x"], 2, "--base does not apply to --to nf4"),
        (["--to", "nf4", "--skip-module", "("], 2, "no pattern"),
        (
            ["--to", "nf4", "--skip-module", "lm_head", "--skip-module", "down_pro"],
            2,
            "has nothing that 'down_pro' names",
        ),
        (["--to", "int4", "--skip-module", "model.layers.7"], 2, "has nothing that 'model.layers.7' names"),
        # The end of a name that is around layers: transformers would skip nothing.
        (["--to", "nf4", "--skip-module", "layers.0.mlp"], 2, "has nothing that 'layers.0.mlp' names"),
        (["--to", "fp8"], 2, "no linear layer that fp8 fits"),
        (["--to", "awq"], 2, "need a text to calibrate on"),
        (["--to", "awq", "--calibration", "nowhere.txt"], 7, "does not exist"),
    ],
)
def test_what_is_refused(tmp_path: Path, base: Path, capsys, arguments: list[str], code: int, sentence: str) -> None:
    assert run("convert", base, *arguments, "-o", tmp_path / "out") == code
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


def test_merging_straight_to_a_calibrated_format(base: Path, tmp_path: Path, capsys) -> None:
    assert run("merge", base, tmp_path, "-o", tmp_path / "out", "--quant", "awq") == 2
    assert "then convert that --to awq --calibration FILE" in capsys.readouterr().err


def test_sources_that_are_no_folder(tmp_path: Path, capsys) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("token_embd.weight", torch.zeros(4, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert run("convert", tmp_path / "m.gguf", "--to", "nf4", "-o", tmp_path / "out") == 2
    assert "nf4 is a format of Hugging Face folders" in capsys.readouterr().err
    assert run("convert", tmp_path / "nowhere", "--to", "nf4", "-o", tmp_path / "out") == 7


# ---- llm-compressor


def fake(folder: Path, body: str) -> Path:
    """A program in the place of the Python that has llm-compressor: it says that it has it, then does ``body``."""
    path = folder / "python"
    head = "import json, os, shutil, sys\nif '-c' in sys.argv: sys.exit(0)\nasked = json.loads(sys.argv[-1])\n"
    path.write_text(f"#!{sys.executable}\n{head}{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def calibrated(tmp_path: Path, base: Path) -> list[object]:
    (base / "tokenizer.json").write_text("{}")
    (tmp_path / "text.txt").write_text("some words\n")
    return [base, "--calibration", tmp_path / "text.txt", "-o", tmp_path / "out"]


def test_without_llm_compressor(calibrated, capsys) -> None:
    for program in ([], ["--compressor", "/nowhere/python"]):
        assert run("convert", *calibrated, "--to", "gptq", *program) == 2
        said = capsys.readouterr().err
        assert "which" in said
        assert "install 'adapterkit[llmcompressor]', or name another environment's Python with --compressor" in said
        assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("body", "code", "sentence"),
    [
        ("sys.exit('Traceback\\nValueError: no such layer')", 1, "of .*llama: ValueError: no such layer;"),
        ("os.kill(os.getpid(), 9)", 1, "it was ended by signal 9, perhaps since memory ran out"),
        ("sys.exit(0)", 7, "holds no safetensors weights"),
        ("shutil.copytree(asked['src'], asked['out'], dirs_exist_ok=True)", 1, "quantized nothing of .*llama;"),
    ],
)
def test_a_compressor_that_fails_leaves_nothing(tmp_path: Path, calibrated, capsys, body, code, sentence) -> None:
    import re

    program = fake(tmp_path, body)
    before = sorted(tmp_path.iterdir())
    assert run("convert", *calibrated, "--to", "awq", "--compressor", program) == code
    said = capsys.readouterr().err
    assert re.search(sentence, said), said
    assert "Traceback" not in said
    assert sorted(tmp_path.iterdir()) == before


def test_what_calibration_needs(bnb, tmp_path: Path, calibrated, base: Path, capsys) -> None:
    program = fake(tmp_path, "sys.exit(1)")
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe")
    assert run("convert", *calibrated, "--to", "awq", "--compressor", program) == 2
    assert "is not a text" in capsys.readouterr().err
    (tmp_path / "text.txt").write_text("some words")
    (base / "tokenizer.json").unlink()
    assert run("convert", *calibrated, "--to", "awq", "--compressor", program) == 7
    assert "has no tokenizer" in capsys.readouterr().err
    convert(base, tmp_path / "nf4", to="nf4")
    assert run("convert", tmp_path / "nf4", *calibrated[1:], "--to", "awq", "--compressor", program) == 2
    assert "convert it with --to bf16 first" in capsys.readouterr().err
    assert plan_convert(base, to="bf16").plan.nbytes > 0


@pytest.mark.slow
@pytest.mark.parametrize("to", ["gptq", "awq"])
def test_llm_compressor_itself(tmp_path: Path, to: str) -> None:
    """The whole road: calibrated by llm-compressor, loaded by transformers, decoded here to the same bits."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    program = os.environ.get("ADAPTERKIT_LLMCOMPRESSOR")
    if not program:
        pytest.skip("ADAPTERKIT_LLMCOMPRESSOR names no Python that has llm-compressor")
    text = (Path(__file__).parents[2] / "docs/architecture.md").read_text()
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    made.train_from_iterator([text], trainers.BpeTrainer(vocab_size=256, special_tokens=["<unk>", "<s>"]))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>")
    torch.manual_seed(0)
    small = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(tokenizer), max_position_embeddings=128,
    )  # fmt: skip
    base = tmp_path / "base"
    transformers.LlamaForCausalLM(small).to(torch.bfloat16).save_pretrained(base, max_shard_size="200KB")
    tokenizer.save_pretrained(base)
    (tmp_path / "text.txt").write_text(text)
    convert(base, tmp_path / "q", to=to, calibration=tmp_path / "text.txt", compressor=Path(program))
    convert(tmp_path / "q", tmp_path / "plain", to="bf16")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        how = transformers.CompressedTensorsConfig(run_compressed=False)
        oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q", quantization_config=how).state_dict()
    plain = stored(tmp_path / "plain")
    original = transformers.AutoModelForCausalLM.from_pretrained(base).state_dict()
    for name, tensor in plain.items():
        assert torch.equal(tensor, oracle[name]), name
        if name.endswith("_proj.weight") and to == "gptq":
            assert 0.01 < (tensor.float() - original[name].float()).norm() / original[name].float().norm() < 0.3
    assert (tmp_path / "q/tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
