"""`--quant keep`: a quantized base comes out in its own format, and what no adapter touches keeps its bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stored_formats import FORMATS, e2m1, modelopt_nvfp4
from test_hqq import CONFIG as HQQ
from test_hqq import PACKINGS, hqq

from adapterkit import convert, merge
from adapterkit.checkpoint.checkpoint import Checkpoint
from adapterkit.checkpoint.decoded import dequantized
from adapterkit.checkpoint.open import open_checkpoint
from adapterkit.cli import main
from adapterkit.codecs.table import find_weights
from adapterkit.errors import CheckFailed, CheckpointError, UsageError

OUT, IN = 160, 192
ATTENTION = "model.layers.0.self_attn."
TOUCHED, OTHER = f"{ATTENTION}q_proj", f"{ATTENTION}o_proj"


# One scale for the whole weight, or scales that are quantized together: what did not change is not told apart.
WHOLE = {"fp8 tensor", "ct fp8 tensor", "nf4 double", "comfy", "comfy scale_weight"}


def weight(seed: int, shape: tuple[int, int] = (OUT, IN)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def base_of(folder: Path, name: str) -> Path:
    """Two quantized layers, one of them with zeros of both signs, norms and embeddings, over two files."""
    made = FORMATS[name]
    shape = (256, 256) if name == "fp8 blocks" else (OUT, IN)
    first = {f"{TOUCHED}.{leaf}": tensor for leaf, tensor in made.encode(weight(0, shape)).items()}
    second = {f"{OTHER}.{leaf}": tensor for leaf, tensor in made.encode(weight(1, shape)).items()}
    plain = {
        "model.embed_tokens.weight": weight(2, (32, shape[1])).bfloat16(),
        "model.norm.weight": torch.ones(shape[1]),
    }
    base = folder / "base"
    base.mkdir()
    files = {"model-00001-of-00002.safetensors": {**plain, **first}, "model-00002-of-00002.safetensors": second}
    for file, tensors in files.items():
        contiguous = {key: value.contiguous() for key, value in tensors.items()}
        save_file(contiguous, base / file, metadata={"format": "pt", "made": "here"})
    index = {
        "metadata": {"total_parameters": 1, "total_size": 2},
        "weight_map": {n: f for f, t in files.items() for n in t},
    }
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "llama", "torch_dtype": made.dtype}
    if made.config is not None:
        config["quantization_config"] = made.config
    (base / "config.json").write_text(json.dumps(config, indent=1))
    (base / "hf_quant_config.json").write_text("{}")
    return base


def adapter_of(folder: Path, b: torch.Tensor, inside: int) -> Path:
    made = folder / "adapter"
    made.mkdir()
    key = f"base_model.model.{TOUCHED}.lora_"
    a = torch.randn(4, inside, generator=torch.Generator().manual_seed(9))
    save_file({f"{key}A.weight": a, f"{key}B.weight": b}, made / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "b",
    }
    (made / "adapter_config.json").write_text(json.dumps(config))
    return made


def shape_of(base: Path) -> tuple[int, int]:
    return dequantized(open_checkpoint(base))[f"{TOUCHED}.weight"].shape  # type: ignore[return-value]


def raw(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "adapterkit.json"}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype is other.dtype and one.shape == other.shape and bytes_of(one) == bytes_of(other)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())


@pytest.mark.parametrize("name", FORMATS)
def test_an_adapter_that_changes_nothing_gives_the_folder_again(tmp_path: Path, name: str) -> None:
    base = base_of(tmp_path, name)
    rows, columns = shape_of(base)
    tuned = adapter_of(tmp_path, torch.zeros(rows, 4), columns)
    report = merge(base, [tuned], tmp_path / "out", quant="keep", yes_lossy=True)
    assert report.touched == 1
    assert raw(tmp_path / "out") == raw(base)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_not_touched_keeps_its_bytes(tmp_path: Path, name: str) -> None:
    base = base_of(tmp_path, name)
    rows, columns = shape_of(base)
    b = torch.randn(rows, 4, generator=torch.Generator().manual_seed(8)) * 0.02
    b[128:] = 0  # the rest is not changed
    tuned = adapter_of(tmp_path, b, columns)
    handle = dequantized(open_checkpoint(base))[f"{TOUCHED}.weight"]
    w = handle.read_wide(0, handle.numel).view(rows, columns).float()
    merge(base, [tuned], tmp_path / "out", quant="keep", yes_lossy=True)
    before, after = stored(base), stored(tmp_path / "out")
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        if not key.startswith(TOUCHED):
            assert same(after[key], tensor), key
    assert (tmp_path / "out/config.json").read_bytes() == (base / "config.json").read_bytes()
    read = dequantized(open_checkpoint(tmp_path / "out"))[f"{TOUCHED}.weight"]
    got = read.read_wide(0, read.numel).view(rows, columns).float()
    if name not in WHOLE:
        assert torch.equal(got[128:], w[128:])
    assert not torch.equal(got[:128], w[:128])


@pytest.mark.parametrize("name", FORMATS)
def test_touched_weights_are_encoded_as_their_library_does_it(tmp_path: Path, name: str) -> None:
    """Byte for byte what the library makes of the float32 sum."""
    base = base_of(tmp_path, name)
    rows, columns = shape_of(base)
    b = torch.randn(rows, 4, generator=torch.Generator().manual_seed(8)) * 0.02
    tuned = adapter_of(tmp_path, b, columns)
    handle = dequantized(open_checkpoint(base))[f"{TOUCHED}.weight"]
    w = handle.read_wide(0, handle.numel).view(rows, columns).float()
    a = load_file(tuned / "adapter_model.safetensors")[f"base_model.model.{TOUCHED}.lora_A.weight"]
    wanted = FORMATS[name].encode(torch.addmm(w, b, a))
    merge(base, [tuned], tmp_path / "out", quant="keep", yes_lossy=True)
    after = stored(tmp_path / "out")
    for leaf, tensor in wanted.items():
        got = after[f"{TOUCHED}.{leaf}"]
        if "quant_state" in leaf:
            said, meant = (json.loads(bytes(t.tolist())) for t in (got, tensor))
            assert said.pop("nested_offset", 0) == pytest.approx(meant.pop("nested_offset", 0), rel=1e-7)
            assert said == meant
        else:
            assert same(got, tensor), (leaf, (got.float() != tensor.float()).float().mean())


def written_again(checkpoint: Checkpoint, name: str, delta: torch.Tensor) -> dict[str, torch.Tensor]:
    """The stored tensors of a weight after a change, through its encoder alone."""
    weight = find_weights(checkpoint.tensors, checkpoint.config, checkpoint.ref)[0]
    assert weight.name == name
    assert weight.encoder is not None
    old = dequantized(checkpoint)[name]
    values = old.read_wide(0, old.numel).float()
    encoder = weight.encoder()
    made = encoder.encode(0, values + delta.view(-1), values)
    rest = encoder.finish(made[1:] if encoder.streams else made)
    found = {**rest, encoder.made[0].name: made[0]} if encoder.streams else rest
    return {one.name: found[one.name].view(one.shape) for one in encoder.made}


def test_stacked_experts_in_mxfp4(store) -> None:
    """gpt-oss: every scale the smallest power of two that keeps its 32 values within 6 (triton_kernels, downcast_to_mxfp)."""
    generator = torch.Generator().manual_seed(4)
    blocks = torch.randint(0, 256, (3, 40, 4, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 125, (3, 40, 4), generator=generator, dtype=torch.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    checkpoint = store({f"{name}_blocks": blocks, f"{name}_scales": scales}, {"quant_method": "mxfp4"})
    delta = torch.zeros(3, 128, 40)
    same_again = written_again(checkpoint, name, delta)
    assert torch.equal(same_again[f"{name}_blocks"], blocks)
    assert torch.equal(same_again[f"{name}_scales"], scales)
    delta[1] = torch.randn(128, 40, generator=generator) * 0.01
    got = written_again(checkpoint, name, delta)
    for part, before in (("blocks", blocks), ("scales", scales)):
        after = got[f"{name}_{part}"]
        assert torch.equal(after[0], before[0])
        assert torch.equal(after[2], before[2])
    old = dequantized(checkpoint)[name]
    new = (old.read_wide(0, old.numel).float().view(3, 128, 40) + delta)[1].T.reshape(40, 4, 32)
    exponent = torch.ceil(torch.log2(new.abs().amax(2) / 6))
    assert torch.equal(got[f"{name}_scales"][1], (exponent + 127).to(torch.uint8))
    codes = e2m1(new * torch.exp2(-exponent)[:, :, None])
    assert torch.equal(got[f"{name}_blocks"][1], codes[:, :, ::2] | codes[:, :, 1::2] << 4)


@pytest.mark.parametrize("bits", PACKINGS)
@pytest.mark.parametrize("axis", [0, 1])
def test_hqq(store, bits: int, axis: int) -> None:
    """Unchanged groups keep their bytes; changed ones come nearer to what they should be than their old codes.

    With hqq 0.2.8 beside it every tensor of 2, 3, 4 and 8 bits was equal, on both axes.
    """
    tensors, _ = hqq(bits, axis)
    checkpoint = store(tensors, HQQ)
    shape = (64, 96)
    same_again = written_again(checkpoint, "a.weight", torch.zeros(shape))
    for part in ("W_q", "scale", "zero"):
        assert torch.equal(same_again[f"a.{part}"], tensors[f"a.{part}"]), part
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.05
    got = written_again(checkpoint, "a.weight", delta)
    old = dequantized(checkpoint)["a.weight"]
    wanted = old.read_wide(0, old.numel).float() + delta.view(-1)
    again = dequantized(store({**tensors, **got}, HQQ))["a.weight"]
    off = again.read_wide(0, again.numel).float() - wanted
    assert off.norm() < (1.2 if bits == 1 else 0.8) * delta.norm()


@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        ("fp8 blocks", "weight_scale_inv", "NaN or infinite"),
        ("ct int4", "weight_scale", "NaN or infinite"),
        ("gptq", "scales", "NaN or infinite"),
        ("mlx", "scales", "NaN or infinite"),
        ("nf4", "weight.absmax", "NaN or infinite"),
        ("int8", "SCB", "NaN or infinite"),
    ],
)
def test_scales_that_are_no_numbers(store, name: str, part: str, message: str) -> None:
    made = FORMATS[name]
    tensors = {f"a.{leaf}": tensor.contiguous() for leaf, tensor in made.encode(weight(0, (256, 256))).items()}
    tensors[f"a.{part}"].view(-1)[3] = torch.nan
    handle = dequantized(store(tensors, made.config))["a.weight"]
    with pytest.raises(CheckpointError, match=message) as error:
        handle.read(0, handle.numel)
    assert f"a.{part}" in str(error.value)


@pytest.mark.parametrize("name", ["fp8 blocks", "ct int4", "ct nvfp4", "fp8 tensor", "mlx"])
def test_a_scale_of_zero_over_other_numbers(store, name: str) -> None:
    made = FORMATS[name]
    tensors = {f"a.{leaf}": tensor.contiguous() for leaf, tensor in made.encode(weight(0, (256, 256))).items()}
    part = next(leaf for leaf in tensors if "weight_scale" in leaf or leaf.endswith("scales"))
    tensors[part] = torch.zeros_like(tensors[part])
    handle = dequantized(store(tensors, made.config))["a.weight"]
    with pytest.raises(CheckpointError, match="is zero where its numbers are not"):
        handle.read(0, handle.numel)


def test_two_scales_where_one_belongs(store) -> None:
    """A list of scales has one for each row; two of them are not taken for blocks of 128 rows."""
    made = FORMATS["fp8 tensor"]
    tensors = {f"a.{leaf}": tensor for leaf, tensor in made.encode(weight(0, (256, 256))).items()}
    tensors["a.weight_scale"] = torch.ones(2)
    with pytest.raises(CheckpointError, match=r"'a.weight_scale' is \[2\], which covers no 256x256 weight"):
        dequantized(store(tensors, made.config))


def test_a_base_of_16_bits_has_no_format_to_keep(tmp_path: Path) -> None:
    base = base_of(tmp_path, "fp8 tensor")
    merge(base, [adapter_of(tmp_path, torch.ones(OUT, 4) * 0.1, IN)], tmp_path / "plain")
    with pytest.raises(UsageError, match="is not quantized"):
        merge(tmp_path / "plain", [tmp_path / "adapter"], tmp_path / "out", quant="keep")


def test_what_is_lost_stops_the_run(tmp_path: Path) -> None:
    base = base_of(tmp_path, "nf4")
    tuned = adapter_of(tmp_path, torch.full((OUT, 4), 1e-4), IN)
    with pytest.raises(CheckFailed, match=r"nf4 64 already, and of this change -?\d\.\d% would survive"):
        merge(base, [tuned], tmp_path / "out", quant="keep")
    assert not (tmp_path / "out").exists()
    report = merge(base, [tuned], tmp_path / "out", quant="keep", yes_lossy=True, fidelity=True)
    assert report.fidelity is not None
    assert report.fidelity.format == "nf4 64"
    # Measured on what was encoded, not on a guess: the file says the same.
    read = dequantized(open_checkpoint(tmp_path / "out"))[f"{TOUCHED}.weight"]
    before = dequantized(open_checkpoint(base))[f"{TOUCHED}.weight"]
    old = before.read_wide(0, before.numel).double()
    a = load_file(tuned / "adapter_model.safetensors")[f"base_model.model.{TOUCHED}.lora_A.weight"]
    delta = (torch.full((OUT, 4), 1e-4).double() @ a.double()).view(-1)
    got = read.read_wide(0, read.numel).double() - old
    assert report.fidelity.retention == pytest.approx(float(got @ delta / (delta @ delta)), abs=1e-3)


def test_threads_and_interruptions_do_not_change_the_bytes(tmp_path: Path) -> None:
    for name in ("gptq act order", "ct fp8 tensor"):
        folder = tmp_path / name
        folder.mkdir()
        base = base_of(folder, name)
        tuned = adapter_of(folder, torch.randn(OUT, 4, generator=torch.Generator().manual_seed(8)), IN)
        merge(base, [tuned], folder / "one", quant="keep", yes_lossy=True, jobs=1)
        merge(base, [tuned], folder / "four", quant="keep", yes_lossy=True, jobs=4)
        assert raw(folder / "one") == raw(folder / "four")


@pytest.mark.parametrize("name", ["fp8 short blocks", "comfy", "torchao int8", "int8"])
def test_a_config_without_a_dtype_never_means_float32(tmp_path: Path, name: str) -> None:
    """FP8 and integers decode to float32; they are written as the other tensors are, and that is said."""
    base = base_of(tmp_path, name)
    said = json.loads((base / "config.json").read_text())
    del said["torch_dtype"]
    (base / "config.json").write_text(json.dumps(said))
    rows, columns = shape_of(base)
    report = merge(base, [adapter_of(tmp_path, torch.ones(rows, 4) * 0.01, columns)], tmp_path / "out")
    assert {t.dtype for n, t in stored(tmp_path / "out").items() if n.endswith("_proj.weight")} == {torch.bfloat16}
    assert any("names no dtype; weights are decoded to bf16" in note for note in report.notes)
    assert any("quant='keep' writes the base's own format" in note for note in report.notes)
    said = next(note for note in report.notes if "quant='keep' would write" in note)
    kept = merge(base, [tmp_path / "adapter"], tmp_path / "kept", quant="keep", yes_lossy=True, fidelity=True)
    assert kept.fidelity is not None
    assert f"keep about {kept.fidelity.retention:.0%} of the change (cosine {kept.fidelity.cosine:.2f})" in said


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = base_of(tmp_path, "ct fp8 blocks")
    tuned = adapter_of(tmp_path, torch.full((OUT, 4), 0.05), IN)
    how = ["merge", str(base), str(tuned), "-o", str(tmp_path / "out"), "--quant", "keep"]
    with pytest.raises(SystemExit) as ended:
        main([*how, "--dry-run", "--json"])
    planned = json.loads(capsys.readouterr().out)
    assert not ended.value.code
    assert planned["nbytes"] == sum(file.stat().st_size for file in base.glob("*.safetensors"))
    with pytest.raises(SystemExit) as ended:
        main([*how, "--keep-touched", "bf16", "--json"])
    assert not ended.value.code
    found = json.loads(capsys.readouterr().out)
    assert any("left it and is bf16" in note for note in found["notes"])
    assert TOUCHED in json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["ignore"]


def torchao_nvfp4(weight: torch.Tensor, over: torch.Tensor) -> dict[str, torch.Tensor]:
    """torchao 0.18, prototype/mx_formats/nvfp4_tensor.py: nvfp4_quantize with a given scale of the whole tensor."""
    groups = weight.view(weight.shape[0], -1, 16)
    scale = (groups.abs().amax(2) / 6 / over).clamp(min=2.0**-6, max=448).to(torch.float8_e4m3fn)
    codes = e2m1(groups * ((1.0 / over) / scale.float())[:, :, None]).view(weight.shape)
    return {"weight": codes[:, ::2] | codes[:, 1::2] << 4, "weight_scale": scale, "weight_scale_2": over}


def test_axolotl_3822_an_adapter_that_was_trained_on_the_grid(tmp_path: Path) -> None:
    """Training saw NVFP4(W + delta) with fresh scales under the base's own scale: the same bytes are written, unasked."""
    base = base_of(tmp_path, "modelopt nvfp4")
    b = torch.randn(OUT, 4, generator=torch.Generator().manual_seed(8)) * 1e-3
    tuned = adapter_of(tmp_path, b, IN)
    config = json.loads((tuned / "adapter_config.json").read_text())
    said = {"scale_mode": "fresh", "pts_policy": "base_fused_max", "encoder": "torchao-0.16.0", "start_step": None}
    handle = dequantized(open_checkpoint(base))[f"{TOUCHED}.weight"]
    w = handle.read_wide(0, handle.numel).view(OUT, IN).float()
    a = load_file(tuned / "adapter_model.safetensors")[f"base_model.model.{TOUCHED}.lora_A.weight"]
    wanted = torchao_nvfp4(torch.addmm(w, b, a), stored(base)[f"{TOUCHED}.weight_scale_2"])
    with pytest.raises(CheckFailed):  # an ordinary adapter of this size is lost there
        merge(base, [tuned], tmp_path / "out", quant="keep")
    (tuned / "adapter_config.json").write_text(json.dumps({**config, "nvfp4_merge_aware": said}))
    report = merge(base, [tuned], tmp_path / "out", quant="keep")
    assert any("what is written is what training saw" in note for note in report.notes)
    after = stored(tmp_path / "out")
    for leaf, tensor in wanted.items():
        assert same(after[f"{TOUCHED}.{leaf}"], tensor), leaf
    plain = merge(base, [tuned], tmp_path / "plain")
    assert any("this is not it" in note for note in plain.notes)
    with pytest.raises(UsageError, match="alone and with weight 1"):
        merge(base, [tuned], tmp_path / "half", quant="keep", weights=[0.5])
    (tuned / "adapter_config.json").write_text(
        json.dumps({**config, "nvfp4_merge_aware": {**said, "scale_mode": "reuse"}})
    )
    with pytest.raises(UsageError, match="by a rule that is not known here"):
        merge(base, [tuned], tmp_path / "half", quant="keep")


@pytest.mark.parametrize(
    ("name", "to"), [("nf4", "nf4"), ("fp4", "fp4"), ("ct mxfp4", "mxfp4"), ("gptq act order", "nf4")]
)
def test_a_folder_that_was_decoded_from_four_bits_is_known_by_its_values(tmp_path: Path, name: str, to: str) -> None:
    """Without a record and without a config that says so."""
    base = base_of(tmp_path, name)
    tuned = adapter_of(tmp_path, torch.full((OUT, 4), 1e-4), IN)
    convert(base, tmp_path / "plain", to="bf16")
    for file in (tmp_path / "plain").glob("adapterkit*"):
        file.unlink()
    with pytest.raises(CheckFailed, match=r"on a coarse grid already, and of this change -?\d+\.\d% would survive"):
        merge(tmp_path / "plain", [tuned], tmp_path / "out", quant=to)
    merge(tmp_path / "plain", [tuned], tmp_path / "eight", quant="int8")
    merge(tmp_path / "plain", [tuned], tmp_path / "out", quant=to, yes_lossy=True)


def test_repeated_layers_are_refused(tmp_path: Path) -> None:
    """The second copy of a layer has no stored form of its own."""
    base = base_of(tmp_path, "ct fp8 blocks")
    tuned = adapter_of(tmp_path, torch.full((OUT, 4), 0.05), IN)
    config = json.loads((tuned / "adapter_config.json").read_text())
    (tuned / "adapter_config.json").write_text(json.dumps({**config, "layer_replication": [[0, 1], [0, 1]]}))
    with pytest.raises(UsageError, match="other quantized layers than the base"):
        merge(base, [tuned], tmp_path / "out", quant="keep")


def test_a_weight_that_an_adapter_brings_whole(tmp_path: Path) -> None:
    """modules_to_save of a quantized layer: its own values in the base's format."""
    base = base_of(tmp_path, "ct int4")
    tuned = adapter_of(tmp_path, torch.zeros(OUT, 4), IN)
    saved = load_file(tuned / "adapter_model.safetensors")
    own = weight(7).bfloat16()
    saved[f"base_model.model.{OTHER}.weight"] = own
    save_file(saved, tuned / "adapter_model.safetensors")
    config = json.loads((tuned / "adapter_config.json").read_text())
    (tuned / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["o_proj"]}))
    merge(base, [tuned], tmp_path / "out", quant="keep", yes_lossy=True)
    after = stored(tmp_path / "out")
    for leaf, tensor in FORMATS["ct int4"].encode(own.float()).items():
        assert same(after[f"{OTHER}.{leaf}"], tensor), leaf


@pytest.mark.parametrize(
    ("name", "key"),
    [("fp8 short blocks", "modules_to_not_convert"), ("ct int4", "ignore"), ("nf4", "llm_int8_skip_modules")],
)
def test_a_config_that_names_modules_that_are_not_there(tmp_path: Path, name: str, key: str) -> None:
    """None of them: it belongs to other weights. Some: a note. Patterns, heads and names of fused modules are left alone."""
    base = base_of(tmp_path, name)
    said = json.loads((base / "config.json").read_text())
    gone, usual = (
        "model.layers.7.mlp.gone_proj",
        ["lm_head", "re:.*gate$", "model.layers.0.self_attn.qkv_proj", "model.mtp.1.a.b"],
    )
    for names, refused, noted in (
        ([*usual, gone], True, False),
        ([*usual, gone, "model.layers.0.self_attn"], False, True),
        ([*usual, "language_model.layers.0.self_attn.q_proj"], False, False),
    ):
        said["quantization_config"][key] = names
        (base / "config.json").write_text(json.dumps(said))
        if refused:
            with pytest.raises(CheckpointError, match=f"leaves '{gone}' in 16 bits"):
                dequantized(open_checkpoint(base))
        else:
            notes = dequantized(open_checkpoint(base)).notes
            assert any(gone in note for note in notes) is noted


def test_what_keep_cannot_write_does_not_stop_a_merge_to_16_bits(tmp_path: Path) -> None:
    """float8 with zero points is decoded; the report says that `keep` could not write it."""
    base = base_of(tmp_path, "ct fp8 rows")
    tuned = adapter_of(tmp_path, torch.full((OUT, 4), 0.05), IN)
    file = base / "model-00001-of-00002.safetensors"
    tensors = load_file(file)
    tensors[f"{TOUCHED}.weight_zero_point"] = torch.zeros_like(tensors[f"{TOUCHED}.weight_scale"])
    save_file(tensors, file, metadata={"format": "pt"})
    report = merge(base, [tuned], tmp_path / "out")
    assert any("quant='keep' could not write this: " in note for note in report.notes)
    with pytest.raises(UsageError, match="per row, which adapterkit does not write"):
        merge(base, [tuned], tmp_path / "kept", quant="keep", yes_lossy=True)


@pytest.mark.parametrize("name", ["ModelOpt", "compressed-tensors"])
def test_stacked_experts_in_nvfp4_have_a_scale_each(store, name: str) -> None:
    """The second scale is one number per expert; each is written as the library writes that expert alone."""
    modelopt = name == "ModelOpt"
    over = torch.tensor([1.0 / 4096, 1.0 / 900, 1.0 / 20000])
    leaves = (
        ("weight", "weight_scale", "weight_scale_2")
        if modelopt
        else ("weight_packed", "weight_scale", "weight_global_scale")
    )

    def stacked(weights: torch.Tensor) -> dict[str, torch.Tensor]:
        found = [modelopt_nvfp4(one, scale) for one, scale in zip(weights, over, strict=True)]
        parts = {leaf: torch.stack([one[leaf] for one in found]) for leaf in ("weight", "weight_scale")}
        return dict(
            zip((f"a.{leaf}" for leaf in leaves), (*parts.values(), over if modelopt else 1 / over), strict=True)
        )

    weights = torch.stack([weight(seed, (48, 64)) * 10**-seed for seed in range(3)])
    tensors = stacked(weights)
    config = FORMATS["modelopt nvfp4" if modelopt else "ct nvfp4"].config
    checkpoint = store(tensors, config)
    before = dequantized(checkpoint)["a.weight"]
    w = before.read_wide(0, before.numel).float().view(3, 48, 64)
    delta = torch.zeros(3, 48, 64)
    assert all(torch.equal(t, tensors[n]) for n, t in written_again(checkpoint, "a.weight", delta).items())
    delta[1] = weight(5, (48, 64)) * 0.05
    got = written_again(checkpoint, "a.weight", delta)
    for leaf, tensor in stacked(w + delta).items():
        if leaf in got:
            assert torch.equal(got[leaf][1], tensor[1])
            assert torch.equal(got[leaf][::2], tensors[leaf][::2])
    again = (
        dequantized(store({**tensors, **got}, config))["a.weight"].read_wide(0, before.numel).float().view(3, 48, 64)
    )
    assert (again - w - delta)[1].norm() < 0.2 * w[1].norm()
    assert torch.equal(again[::2], w[::2])
