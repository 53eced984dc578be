"""16-bit weights in the layouts of compressed-tensors, against its own scales and compressors."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stored_formats import F8
from test_keep import adapter_of, same, stored

from adapterkit import convert, merge, verify
from adapterkit.checkpoint.decoded import dequantized
from adapterkit.checkpoint.open import open_checkpoint
from adapterkit.errors import CheckFailed, UsageError

ARGS = {
    "fp8-block": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
        (128, 128),
    ),
    "int4": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}, (1, 128)),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "scale_dtype": F8},
        (1, 16),
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
        (1, 32),
    ),
}
TOGETHER = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]


def library(
    kind: str, weight: torch.Tensor, largest: float, scale: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """What compressed-tensors stores of a weight whose fused partners reach up to ``largest``.

    With its own scales from the largest magnitude of each tile, or with those given.
    """
    form, args, (tall, wide) = ARGS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

        how = QuantizationArgs(**args)
        tiles = weight.view(weight.shape[0] // tall, tall, weight.shape[1] // wide, wide)
        over = generate_gparam(torch.tensor(-largest), torch.tensor(largest)) if kind == "nvfp4" else None
        if scale is None:
            scale, _ = calculate_qparams(tiles.amin((1, 3)), tiles.amax((1, 3)), how, over)
            scale = scale if kind.endswith("fp4") else scale.bfloat16()
        elif kind == "nvfp4":
            scale = scale.float()
        elif kind == "mxfp4":  # calculate_qparams gives powers of two, and the compressor stores their exponents
            scale = torch.exp2(scale.view(torch.uint8).float() - 127)
        state = {"weight": weight, "weight_scale": scale if kind.endswith("fp4") else scale.float()}
        if over is not None:
            state["weight_global_scale"] = over
        scheme = QuantizationScheme(targets=["Linear"], weights=how, format=form)
        found = BaseCompressor.get_value_from_registry(form).compress(state, scheme)
    if not kind.endswith("fp4"):
        found["weight_scale"] = scale
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    torch.manual_seed(0)
    small = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("new") / "base"
    transformers.LlamaForCausalLM(small).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ARGS)
def test_equals_compressed_tensors(base: Path, tmp_path: Path, kind: str) -> None:
    """FP8 blocks byte for byte; of four bits the codes of the scales that were searched, which are nearer than its own ones.

    NVFP4's global scale is shared by what servers run as one.
    """
    report = convert(base, tmp_path / "out", to=kind)
    assert report.to == kind
    before, after = stored(base), stored(tmp_path / "out")
    read = dequantized(open_checkpoint(tmp_path / "out"))
    seen = set()
    for group in TOGETHER:
        names = [name for name in before if name.split(".")[-2] in group]
        largest = max(float(before[name].abs().max()) for name in names)
        for name in names:
            w, module = before[name].float(), name.removesuffix("weight")
            own = library(kind, w, largest)
            scale = None if kind == "fp8-block" else after[f"{module}weight_scale"]
            for leaf, tensor in library(kind, w, largest, scale).items():
                key = f"{module}{leaf}"
                seen.add(key)
                assert same(after[key].view(tensor.shape), tensor), key
            off = (read[name].read_wide(0, w.numel()).view(w.shape).float() - w).norm()
            assert off <= error_of(kind, own, w) * (1 if kind == "fp8-block" else 0.999)
    assert set(after) - seen == {name for name in before if not name.endswith("_proj.weight")}
    said = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert said["format"] == ARGS[kind][0]
    assert said["ignore"] == ["lm_head"]


def error_of(kind: str, found: dict[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """|W - what compressed-tensors decodes its own to|."""
    form, args, _ = ARGS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args), format=form)
        decoded = BaseCompressor.get_value_from_registry(form).decompress(dict(found), scheme)["weight"]
    return (decoded.float() - weight).norm()


@pytest.mark.parametrize("kind", ["int4", "nvfp4", "mxfp4", "fp8-block"])
def test_transformers_loads_it(base: Path, tmp_path: Path, kind: str) -> None:
    import transformers

    convert(base, tmp_path / "out", to=kind)
    read = dequantized(open_checkpoint(tmp_path / "out"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
        plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        got = loaded(torch.arange(8)[None]).logits
        plain.load_state_dict({name: t.read(0, t.numel).view(t.shape) for name, t in read.items()}, strict=False)
        wanted = plain(torch.arange(8)[None]).logits
    assert torch.allclose(got, wanted, atol=0.1)


@pytest.mark.parametrize("kind", ["fp8-block", "int4"])
def test_a_width_that_no_program_runs_stays(tmp_path: Path, kind: str) -> None:
    """Inputs of 192: compressed-tensors computes what a layer reads in groups of 128, and fails on another width."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=192, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=32,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "base")
    convert(tmp_path / "base", tmp_path / "out", to=kind)
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert said["ignore"] == ["lm_head", "model.layers.0.mlp.down_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
        assert loaded(torch.arange(8)[None]).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["fp8", *ARGS])
def test_a_conv1d_is_refused(tmp_path: Path, kind: str) -> None:
    """transformers 5.24 reports these as UNEXPECTED or of another shape; only bitsandbytes' layers have a turned weight."""
    (tmp_path / "base").mkdir()
    save_file({"transformer.h.0.mlp.c_fc.weight": torch.randn(128, 512)}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text(
        json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    )
    with pytest.raises(UsageError, match=r"c_fc.weight' of .* is a Conv1D, .* write nf4, fp4, int8, 16 bits or GGUF"):
        convert(tmp_path / "base", tmp_path / "out", to=kind)
    convert(tmp_path / "base", tmp_path / "nf4", to="nf4")


@pytest.mark.parametrize("kind", ARGS)
def test_a_merge_is_verified(base: Path, tmp_path: Path, kind: str) -> None:
    tuned = adapter_of(tmp_path, torch.randn(128, 4, generator=torch.Generator().manual_seed(1)) * 0.01, 128)
    report = merge(base, [tuned], tmp_path / "out", quant=kind, fidelity=True)
    assert report.fidelity is not None
    assert report.fidelity.retention == pytest.approx(1.0, abs=0.1)
    assert verify(tmp_path / "out", base=base, adapters=[tuned]).ok
    # On its own grid a small change is lost, and that stops the run.
    convert(base, tmp_path / "stored", to=kind)
    again = merge(tmp_path / "stored", [tuned], tmp_path / "again", quant=kind, yes_lossy=True)
    assert any("the base's own format kept" in note for note in again.notes)


def test_weights_that_do_not_fit_stay(tmp_path: Path) -> None:
    tensors = {
        "model.layers.0.self_attn.q_proj.weight": torch.randn(64, 96).bfloat16(),
        "model.layers.0.self_attn.o_proj.weight": torch.randn(64, 128).bfloat16(),
    }
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base/model.safetensors")
    (tmp_path / "base/config.json").write_text(json.dumps({"model_type": "llama"}))
    convert(tmp_path / "base", tmp_path / "out", to="int4")
    got = load_file(tmp_path / "out/model.safetensors")
    assert "model.layers.0.self_attn.q_proj.weight" in got
    assert "model.layers.0.self_attn.o_proj.weight_packed" in got
    said = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert said["ignore"] == ["model.layers.0.self_attn.q_proj"]


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    torch.manual_seed(0)
    small = transformers.Qwen3MoeConfig(
        hidden_size=128, moe_intermediate_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=64, vocab_size=64, num_experts=3, num_experts_per_tok=2, mlp_only_layers=[],
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("moe") / "base"
    transformers.Qwen3MoeForCausalLM(small).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ARGS)
def test_experts_are_written_one_by_one(experts: Path, tmp_path: Path, kind: str) -> None:
    """As llm-compressor writes them (model_free/converter.py): each a linear layer; gate and up share NVFP4's global scale."""
    report = convert(experts, tmp_path / "out", to=kind)
    assert any("9 of them are experts" in note for note in report.notes)
    before, after = stored(experts), stored(tmp_path / "out")
    for number in range(3):
        for group in TOGETHER[2:]:
            names = [f"model.layers.0.mlp.experts.{number}.{one}.weight" for one in group]
            largest = max(float(before[name].abs().max()) for name in names)
            for name in names:
                module = name.removesuffix("weight")
                scale = None if kind == "fp8-block" else after[f"{module}weight_scale"]
                for leaf, tensor in library(kind, before[name].float(), largest, scale).items():
                    assert same(after[f"{module}{leaf}"].view(tensor.shape), tensor), name
    said = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert said["ignore"] == ["lm_head", "model.layers.0.mlp.gate"]
    assert same(after["model.layers.0.mlp.gate.weight"], before["model.layers.0.mlp.gate.weight"])
    # An adapter on attention keeps the experts' bytes, and one without a change all of them.
    tuned = adapter_of(tmp_path, torch.randn(128, 4, generator=torch.Generator().manual_seed(1)) * 0.1, 128)
    merge(tmp_path / "out", [tuned], tmp_path / "kept", quant="keep", yes_lossy=True)
    kept = stored(tmp_path / "kept")
    assert all(same(kept[name], tensor) for name, tensor in after.items() if "q_proj" not in name)


@pytest.mark.parametrize("kind", ARGS)
def test_transformers_loads_experts(experts: Path, tmp_path: Path, kind: str) -> None:
    """All but NVFP4's, whose global scale it leaves out; that is said."""
    import transformers

    report = convert(experts, tmp_path / "out", to=kind)
    right = not any("transformers (5.24) leaves out weight_global_scale" in note for note in report.notes)
    assert right == (kind != "nvfp4")
    read = dequantized(open_checkpoint(tmp_path / "out"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        how = transformers.CompressedTensorsConfig(dequantize=True)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", quantization_config=how, dtype=torch.bfloat16
        )
    got = loaded.state_dict()["model.layers.0.mlp.experts.down_proj"][1]
    handle = read["model.layers.0.mlp.experts.1.down_proj.weight"]
    assert torch.equal(got, handle.read(0, handle.numel).view(got.shape)) == right


@pytest.mark.parametrize("why", ["skipped", "all skipped", "narrow", "double", "stacked"])
def test_experts_that_stay_are_said(experts: Path, tmp_path: Path, why: str) -> None:
    """Of a layer all or none; stacks stay. They may be most of a model: the output is larger than its name lets expect."""
    base = tmp_path / "base"
    base.mkdir()
    tensors = {name: tensor for name, tensor in stored(experts).items() if why != "stacked" or ".experts." not in name}
    stem = "model.layers.0.mlp.experts"
    if why == "narrow":
        tensors[f"{stem}.2.down_proj.weight"] = torch.randn(128, 72).bfloat16()
    if why == "double":
        tensors[f"{stem}.2.down_proj.weight"] = torch.randn(128, 128).double()
    if why == "stacked":
        tensors |= {f"{stem}.gate_up_proj": torch.randn(3, 256, 128), f"{stem}.down_proj": torch.randn(3, 128, 72)}
    save_file(tensors, base / "model.safetensors")
    (base / "config.json").write_bytes((experts / "config.json").read_bytes())
    named = {"skipped": "experts.1.up_proj", "all skipped": "mlp.experts"}
    skip = ["lm_head", named[why]] if why in named else None
    report = convert(base, tmp_path / "out", to="nvfp4", skip_modules=skip)
    said_of = next(note for note in report.notes if "the experts stay in 16 bits" in note)
    assert ("that are stored one by one" in said_of) == (why == "stacked")
    assert ("only if each of them fits it and none is skipped" in said_of) == (why != "stacked")
    assert any("4 linear layers written in nvfp4" in note for note in report.notes)
    after = stored(tmp_path / "out")
    assert all(same(after[name], tensor) for name, tensor in tensors.items() if ".experts." in name)
    said = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert any(module.startswith(stem) for module in said["ignore"])


def stacked(base: Path, folder: Path) -> Path:
    """The same model with its experts in stacks, as transformers 5 has them in memory."""
    kept, stacks = {}, dict[str, list[torch.Tensor]]()
    words = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "w1": "gate_up_proj", "w3": "gate_up_proj"}
    for name, tensor in sorted(stored(base).items(), key=lambda item: [int(n) for n in re.findall(r"\d+", item[0])]):
        found = re.fullmatch(r"(.*)\.(?:block_sparse_moe|mlp)\.experts\.\d+\.(\w+)\.weight", name)
        if found is None:
            kept[name.replace("block_sparse_moe", "mlp")] = tensor
            continue
        stacks.setdefault(f"{found[1]}.mlp.experts.{words.get(found[2], 'down_proj')}", []).append(tensor)
    made = {}
    for name, tensors in stacks.items():
        if name.endswith("gate_up_proj"):
            tensors = [torch.cat(pair) for pair in zip(tensors[::2], tensors[1::2], strict=True)]
        made[name] = torch.stack(tensors)
    folder.mkdir()
    save_file({**kept, **made}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    return folder


@pytest.mark.parametrize(("model", "kind"), [("qwen3_moe", "fp8-block"), ("qwen3_moe", "nvfp4"), ("mixtral", "int4")])
def test_stacks_are_taken_apart(experts: Path, tmp_path: Path, model: str, kind: str) -> None:
    """The bytes are those of the same experts stored one by one, and the names are what transformers and servers read."""
    import transformers

    base = experts
    if model == "mixtral":
        torch.manual_seed(0)
        sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 64}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 11}
        base = tmp_path / "base"
        transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads)).bfloat16().save_pretrained(base)
    convert(base, tmp_path / "one", to=kind)
    stacks = stacked(base, tmp_path / "stacks")
    report = convert(stacks, tmp_path / "two", to=kind)
    assert any("stacks of experts are taken apart" in note for note in report.notes)
    one, two = stored(tmp_path / "one"), stored(tmp_path / "two")
    gate = ".gate.weight"
    plain = {name: tensor for name, tensor in one.items() if not name.endswith(gate)}
    assert plain.keys() == {name for name in two if not name.endswith(gate)}
    assert all(same(two[name], tensor) for name, tensor in plain.items())
    tuned = adapter_of(tmp_path, torch.randn(128, 4, generator=torch.Generator().manual_seed(1)) * 0.01, 128)
    config = json.loads((tuned / "adapter_config.json").read_text())
    factors = load_file(tuned / "adapter_model.safetensors")
    count = 11 if model == "mixtral" else 3
    stem = "base_model.model.model.layers.0.mlp.experts."
    factors |= {
        f"{stem}lora_A.weight": torch.randn(4 * count, 128) * 0.1,
        f"{stem}lora_B.weight": torch.randn(128, 4 * count) * 0.02,
    }
    (tuned / "adapter_config.json").write_text(json.dumps({**config, "target_parameters": ["mlp.experts.down_proj"]}))
    save_file(factors, tuned / "adapter_model.safetensors")
    merged = merge(stacks, [tuned], tmp_path / "merged", quant=kind, fidelity=True)
    assert merged.fidelity is not None
    assert {one.name for one in merged.fidelity.tensors} >= {"model.layers.0.mlp.experts.down_proj"}
    assert verify(tmp_path / "merged", base=stacks, adapters=[tuned]).ok
    with pytest.raises(UsageError, match="taken from a stack of experts"):
        merge(stacks, [tuned], tmp_path / "no", quant=kind, residual=4)
    if model == "mixtral" or kind == "nvfp4":  # whose global scale transformers leaves out
        return
    how = transformers.CompressedTensorsConfig(dequantize=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "two", quantization_config=how, dtype=torch.bfloat16
        )
    read = dequantized(open_checkpoint(tmp_path / "two"))
    handle = read["model.layers.0.mlp.experts.1.up_proj.weight"]
    got = loaded.state_dict()["model.layers.0.mlp.experts.gate_up_proj"][1, 128:]
    assert torch.equal(got, handle.read(0, handle.numel).view(got.shape))


@pytest.mark.parametrize("kind", ARGS)
def test_transformers_and_single_experts_that_stay(experts: Path, tmp_path: Path, kind: str) -> None:
    """It looks for packed weights of the experts; what the report says of it is so."""
    import transformers

    report = convert(experts, tmp_path / "out", to=kind, skip_modules=["lm_head", "mlp.experts"])
    said = any("does not load experts in 16 bits beside layers of this format" in note for note in report.notes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
            loaded = True
        except RuntimeError:
            loaded = False
    assert said == (not loaded) == (kind != "fp8-block")


@pytest.mark.parametrize("kind", ["int4", "mxfp4", "fp8-block"])
def test_transformers_and_experts_of_several_blocks(tmp_path: Path, kind: str) -> None:
    """What the report says of FP8 blocks is so; the formats that it names instead are loaded."""
    import transformers

    small = transformers.OlmoeConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=32, num_experts=2, num_experts_per_tok=1, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.OlmoeForCausalLM(small).bfloat16().save_pretrained(tmp_path / "base")
    report = convert(tmp_path / "base", tmp_path / "out", to=kind)
    assert any("does not load experts of more than one block" in note for note in report.notes) == (kind == "fp8-block")

    def load() -> dict[str, torch.Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
            held: dict[str, torch.Tensor] = model.state_dict()
            return held

    if kind == "fp8-block":
        with pytest.raises(RuntimeError, match="automatic conversion"):
            load()
        return
    handle = dequantized(open_checkpoint(tmp_path / "out"))["model.layers.0.mlp.experts.1.up_proj.weight"]
    got = load()["model.layers.0.mlp.experts.gate_up_proj"][1, 256:]
    assert torch.equal(got, handle.read(0, handle.numel).view(got.shape))


def test_a_stack_beside_one_of_another_name_stays(tmp_path: Path) -> None:
    """Of a layer all or none: Nemotron-H's stacks are `up_proj` and `down_proj`."""
    import transformers

    small = transformers.NemotronHConfig(
        hidden_size=128, intermediate_size=128, moe_intermediate_size=128, moe_shared_expert_intermediate_size=128,
        layers_block_type=["attention", "moe"], num_attention_heads=2, num_key_value_heads=2, head_dim=64, vocab_size=32,
        n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1,
    )  # fmt: skip
    model = transformers.NemotronHForCausalLM(small).bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stacks = [name for name, tensor in before.items() if tensor.dim() == 3]
    assert {name.rpartition(".")[2] for name in stacks} == {"up_proj", "down_proj"}
    (tmp_path / "base").mkdir()
    small.save_pretrained(tmp_path / "base")
    save_file(before, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    report = convert(tmp_path / "base", tmp_path / "out", to="int4")
    assert any("the experts stay in 16 bits" in note for note in report.notes)
    after = stored(tmp_path / "out")
    assert all(same(after[name], before[name]) for name in stacks)
    assert any(name.endswith("shared_experts.up_proj.weight_packed") for name in after)


@pytest.mark.parametrize("name", ["mlp.experts", "block_sparse_moe.experts", "mlp.experts.down_proj"])
def test_experts_are_skipped_by_the_file_s_name_and_by_the_model_s(name: str, tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads)).bfloat16()
    model.save_pretrained(tmp_path / "base")
    base = stored(tmp_path / "base")
    experts = [key for key in base if ".block_sparse_moe.experts." in key]
    assert len(experts) == 6
    convert(tmp_path / "base", tmp_path / "out", to="int4", skip_modules=["lm_head", name])
    after = stored(tmp_path / "out")
    assert all(same(after[key], base[key]) for key in experts)
    assert "model.layers.0.self_attn.q_proj.weight_packed" in after


@pytest.mark.parametrize("kind", ["int4", "fp8-block"])
def test_routers_that_are_linear_layers_stay(tmp_path: Path, kind: str) -> None:
    """AFMoE's router is an nn.Linear, and so is Hunyuan's: the config leaves them alone, so their values stay."""
    import transformers

    torch.manual_seed(0)
    small = transformers.AfmoeConfig(
        hidden_size=128, moe_intermediate_size=128, intermediate_size=128, num_hidden_layers=1, num_dense_layers=0,
        num_attention_heads=2, num_key_value_heads=2, head_dim=64, vocab_size=64, num_experts=3, num_experts_per_tok=2,
        num_shared_experts=1,
    )  # fmt: skip
    base, out = tmp_path / "base", tmp_path / "out"
    transformers.AfmoeForCausalLM(small).to(torch.bfloat16).save_pretrained(base)
    other = {"model.layers.0.mlp.gate.wg.weight": torch.randn(3, 128).bfloat16()}
    save_file({**stored(base), **other}, base / "model.safetensors")
    convert(base, out, to=kind)
    before, after = stored(base), stored(out)
    routers = ["model.layers.0.mlp.gate.wg", "model.layers.0.mlp.router.gate"]
    assert all(same(after[f"{name}.weight"], before[f"{name}.weight"]) for name in routers)
    # What the config leaves alone is not written, and the other way round.
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignored == ["lm_head", *routers]
    written = {name.rpartition(".")[0] for name in after if name.endswith(".weight_scale")}
    assert written.isdisjoint(ignored)
    assert "model.layers.0.mlp.shared_experts.down_proj" in written
    read = dequantized(open_checkpoint(out))
    assert {name: tensor.shape for name, tensor in read.items()} == {n: tuple(t.shape) for n, t in before.items()}


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    torch.manual_seed(0)
    small = transformers.GptOssConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=32,
        vocab_size=64, num_local_experts=3, num_experts_per_tok=2, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("oss") / "base"
    model = transformers.GptOssForCausalLM(small)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model.bfloat16().save_pretrained(folder)
    return folder


def test_gpt_oss_is_written_as_it_is_published(gpt_oss: Path, tmp_path: Path) -> None:
    """Experts in blocks and scales, all else in 16 bits; transformers' own loader decodes them to what we read."""
    import transformers
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    report = convert(gpt_oss, tmp_path / "out", to="mxfp4")
    assert any("4 stacks of experts written in mxfp4, as gpt_oss is published" in note for note in report.notes)
    before, after = stored(gpt_oss), stored(tmp_path / "out")
    said = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "mxfp4"
    assert "model.layers.*.self_attn" in said["modules_to_not_convert"]
    experts = [name for name in before if name.endswith(("gate_up_proj", "down_proj"))]
    assert len(experts) == 4
    assert all(same(after[name], tensor) for name, tensor in before.items() if name not in experts)
    read = dequantized(open_checkpoint(tmp_path / "out"))
    for name in experts:
        blocks, scales = after[f"{name}_blocks"], after[f"{name}_scales"]
        inside, out = before[name].shape[1:]
        assert blocks.shape == (3, out, inside // 32, 16)
        values = convert_moe_packed_tensors(blocks, scales)
        handle = read[name]
        assert torch.equal(values, handle.read(0, handle.numel).view(values.shape))
        # No worse than the smallest power of two that holds the largest value, which transformers takes.
        wanted = before[name].float().transpose(1, 2).reshape(3, out, inside // 32, 32)
        power = torch.exp2((wanted.abs().amax(-1, keepdim=True) / 6).log2().ceil())
        table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        nearest = table[((wanted / power).abs()[..., None] - table).abs().argmin(-1)] * power
        off = (values.float() - before[name].float()).norm()
        assert 0 < off <= (nearest - wanted.abs()).norm() * 1.0001
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).state_dict()
    for name in experts:
        assert torch.equal(loaded[name], read[name].read(0, loaded[name].numel()).view(loaded[name].shape)), name


def test_an_adapter_in_gpt_oss(gpt_oss: Path, tmp_path: Path) -> None:
    """Merged into MXFP4, verified, and merged again in the base's own format; layers can be left out of it."""
    tuned = adapter_of(tmp_path, torch.randn(64, 4, generator=torch.Generator().manual_seed(1)) * 0.1, 64)
    factors = load_file(tuned / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.1.mlp.experts."
    factors |= {f"{stem}lora_A.weight": torch.randn(12, 64) * 0.3, f"{stem}lora_B.weight": torch.randn(96, 12)}
    config = json.loads((tuned / "adapter_config.json").read_text())
    (tuned / "adapter_config.json").write_text(json.dumps({**config, "target_parameters": ["mlp.experts.down_proj"]}))
    save_file(factors, tuned / "adapter_model.safetensors")
    report = merge(gpt_oss, [tuned], tmp_path / "out", quant="mxfp4", fidelity=True)
    assert report.fidelity is not None
    by_name = {one.name: one for one in report.fidelity.tensors}
    assert by_name["model.layers.0.self_attn.q_proj.weight"].retention == pytest.approx(1, abs=0.01)
    assert 0.5 < by_name["model.layers.1.mlp.experts.down_proj"].cosine < 0.9999
    assert verify(tmp_path / "out", base=gpt_oss, adapters=[tuned]).ok
    again = merge(tmp_path / "out", [tuned], tmp_path / "again", quant="mxfp4", yes_lossy=True)
    assert any("the base's own format kept" in note for note in again.notes)
    # A folder that was decoded from MXFP4, as the 16-bit gpt-oss that is about, lies on that grid: known by its values.
    convert(tmp_path / "out", tmp_path / "decoded", to="bf16")
    (tmp_path / "decoded/adapterkit.json").unlink()
    factors[f"{stem}lora_A.weight"] *= 0.01
    save_file(factors, tuned / "adapter_model.safetensors")
    with pytest.raises(CheckFailed, match="a coarse grid already"):
        merge(tmp_path / "decoded", [tuned], tmp_path / "no", quant="mxfp4")
    assert merge(gpt_oss, [tuned], tmp_path / "yes", quant="mxfp4").touched == 2
    report = convert(gpt_oss, tmp_path / "some", to="mxfp4", skip_modules=["model.layers.0.mlp.experts"])
    assert any("the experts of 1 layer stay in 16 bits" in note for note in report.notes)
    after = stored(tmp_path / "some")
    assert "model.layers.0.mlp.experts.down_proj" in after
    assert "model.layers.1.mlp.experts.down_proj_blocks" in after
    said = json.loads((tmp_path / "some/config.json").read_text())["quantization_config"]
    assert "model.layers.0.mlp.experts" in said["modules_to_not_convert"]
