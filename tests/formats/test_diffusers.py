"""Single files of diffusers: what diffusers itself makes of them when it loads and fuses them is the oracle."""

from __future__ import annotations

import copy
import json
import logging
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from models import read_tensors, write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.adapters.fold import fold
from adapterkit.adapters.load import is_adapter, load_adapter
from adapterkit.checkpoint.open import open_checkpoint
from adapterkit.errors import AdapterError, NotFound, TargetError, UnsupportedAdapter, UsageError
from adapterkit.provenance.register import register

FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def diffusers() -> Any:
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        from diffusers import UNet2DConditionModel  # noqa: F401
    return diffusers


@pytest.fixture(scope="module")
def unet(diffusers: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A UNet with attention and convolutions, and its folder."""
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    folder = tmp_path_factory.mktemp("pipeline") / "unet"
    model.save_pretrained(folder)
    return model, folder


def saved(model: Any, out: Path, config: Any, seed: int = 1) -> Path:
    """An adapter of that config with random values, as the model saves it itself: config in the metadata, no part."""
    model = copy.deepcopy(model)
    model.add_adapter(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1 + ("magnitude" in name)
    model.save_lora_adapter(out)
    return out / FILE


def written_again(
    file: Path,
    out: Path,
    rename: Callable[[str], str],
    *,
    config: bool,
    extra: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """The same tensors under other keys, with or without the config in the metadata."""
    out.parent.mkdir(parents=True, exist_ok=True)
    tensors = {rename(key): tensor for key, tensor in load_file(file).items()}
    with safe_open(file, "pt") as opened:
        fields = json.loads(opened.metadata()["lora_adapter_metadata"])
    metadata = {"format": "pt"}
    if config:
        metadata["lora_adapter_metadata"] = json.dumps({f"unet.{key}": value for key, value in fields.items()})
    save_file({**tensors, **(extra or {})}, out, metadata)
    return out


def fused(
    model: Any, file: Path, prefix: str | None, alphas: Mapping[str, float] | None = None
) -> dict[str, torch.Tensor]:
    """What diffusers makes of the file, in float64."""
    model = copy.deepcopy(model).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state, metadata = load_file(file), None
        with safe_open(file, "pt") as opened:
            text = opened.metadata().get("lora_adapter_metadata")
        if text is not None:
            metadata = json.loads(text)
        state = {key: tensor.double() for key, tensor in state.items() if not key.endswith(".alpha")}
        model.load_lora_adapter(state, prefix=prefix, metadata=metadata, network_alphas=alphas)
        model.fuse_lora()
        model.unload_lora()
    return dict(model.state_dict())


def check(base: Path, file: Path, wanted: Mapping[str, torch.Tensor]) -> None:
    found = fold(open_checkpoint(base), [load_adapter(file)]).checkpoint
    before = read_tensors(base)
    changed = 0
    for name, tensor in found.tensors.items():
        got = tensor.read(0, tensor.numel).view(tensor.shape).double()
        delta = (wanted[name] - before[name].double()).abs().max()
        changed += bool(delta > 0)
        assert (got - wanted[name]).abs().max() <= 2e-6 * delta + 1e-7 * bool(delta > 0)
    assert changed


def lora(**fields: Any) -> Any:
    import peft

    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["to_q", "to_out.0", "conv1"], **fields})


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {"rank_pattern": {"conv1": 2}, "alpha_pattern": {"to_q": 3}},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True, "target_modules": ["to_q", "to_k"]},
    "bias": {"lora_bias": True, "target_modules": ["to_out.0"]},  # diffusers' to_q has no bias to add to
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_as_the_model_saves_it(kind: str, unet: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = unet
    file = saved(model, tmp_path / "lora", lora(**CONFIGS[kind]))
    check(folder, file, fused(model, file, None))


@pytest.mark.parametrize("config", [True, False])
def test_as_a_pipeline_saves_it(config: bool, unet: tuple[Any, Path], tmp_path: Path) -> None:
    """With the part's name in front, with and without the config; without it every scale is 1, also of mixed ranks."""
    model, folder = unet
    own = saved(model, tmp_path / "own", lora(rank_pattern={"conv1": 2}))
    file = written_again(own, tmp_path / "pipeline" / FILE, lambda key: f"unet.{key}", config=config)
    check(folder, file, fused(model, file, "unet"))
    assert ("no alpha" in " ".join(load_adapter(file).notes)) is not config


def _old(key: str) -> str:
    return "unet." + re.sub(r"\.lora_([AB])", lambda m: f".lora.{'down' if m[1] == 'A' else 'up'}", key)


def _processor(key: str) -> str:
    kind = "down" if "lora_A" in key else "up"
    path = key.split(".lora_")[0]
    parent, _, leaf = path.removesuffix(".0").rpartition(".")
    return f"unet.{parent}.processor.{leaf}_lora.{kind}.weight"


@pytest.mark.parametrize("style", [_old, _processor])
def test_older_keys(style: Callable[[str], str], unet: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = unet
    own = saved(model, tmp_path / "own", lora(target_modules=["to_q", "to_out.0"], lora_alpha=4))
    file = written_again(own, tmp_path / "old" / FILE, style, config=False)
    check(folder, file, fused(model, own, None))
    assert load_adapter(file).tensors.keys() == load_adapter(own).tensors.keys()


def test_alphas_of_modules(unet: tuple[Any, Path], tmp_path: Path) -> None:
    """``alpha`` tensors as other trainers write them beside dotted keys."""
    model, folder = unet
    own = saved(model, tmp_path / "own", lora(target_modules=["to_q", "to_k"]))
    paths = sorted({key.split(".lora_")[0] for key in load_file(own)})
    alphas = {f"unet.{path}.alpha": float(index + 1) for index, path in enumerate(paths)}
    extra = {name: torch.tensor(value) for name, value in alphas.items()}
    file = written_again(own, tmp_path / "alpha" / FILE, lambda key: f"unet.{key}", config=False, extra=extra)
    wanted = fused(model, file, "unet", alphas)
    check(folder, file, wanted)
    down = written_again(
        own,
        tmp_path / "down" / FILE,
        lambda key: "diffusion_model." + key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
        config=False,
        extra={name.replace("unet.", "diffusion_model."): value for name, value in extra.items()},
    )
    check(folder, down, wanted)


def test_the_part_that_the_base_is(unet: tuple[Any, Path], tmp_path: Path) -> None:
    """A file for a UNet and a text encoder: each base takes its own, and the notes tell of both."""
    model, folder = unet
    own = saved(model, tmp_path / "own", lora())
    paths = [f"text_model.encoder.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")]
    encoder = {f"{path}.weight": torch.randn(8, 8) for path in paths}
    text = write_checkpoint(tmp_path / "text_encoder", encoder, {"model_type": "clip_text_model", "hidden_size": 8})
    factors = {
        f"text_encoder.{path}.lora_linear_layer.{kind}.weight": torch.randn(shape)
        for path in paths
        for kind, shape in (("down", (2, 8)), ("up", (8, 2)))
    }
    file = written_again(own, tmp_path / "both" / FILE, lambda key: f"unet.{key}", config=False, extra=factors)
    alone = written_again(own, tmp_path / "alone" / FILE, lambda key: f"unet.{key}", config=False)
    check(folder, file, fused(model, alone, "unet"))
    merged = fold(open_checkpoint(text), [load_adapter(file)]).checkpoint
    for name, w in encoder.items():
        lead = f"text_encoder.{name.removesuffix('.weight')}.lora_linear_layer"
        wanted = w.double() + factors[f"{lead}.up.weight"].double() @ factors[f"{lead}.down.weight"].double()
        assert torch.allclose(merged[name].read(0, 64).view(8, 8).double(), wanted, atol=1e-6)
    assert any("tensors of unet" in note and "8 tensors of text_encoder" in note for note in load_adapter(file).notes)
    told = adapterkit.inspect(file)
    assert "unet (24 modules)" in told.details["parts"]
    assert "text_encoder (4 modules)" in told.details["parts"]
    assert told.details["family"] == "Stable Diffusion UNet (diffusers names)"
    assert adapterkit.inspect(file, base=str(text)).ranks == {"2": 4}
    other = write_checkpoint(tmp_path / "other", {"blocks.0.weight": torch.randn(8, 8)})
    with pytest.raises(
        TargetError, match=r"none of the parts .* of unet, 'down_blocks.* no target .*; give the folder"
    ):
        fold(open_checkpoint(other), [load_adapter(file)])


def test_two_parts_of_one_shape_are_not_guessed(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "text_encoder", {"layers.0.q_proj.weight": torch.randn(8, 8)})
    tensors = {
        f"{part}.layers.0.q_proj.lora_{side}.weight": torch.randn((2, 8) if side == "A" else (8, 2))
        for part in ("text_encoder", "text_encoder_2")
        for side in "AB"
    }
    save_file(tensors, tmp_path / "two.safetensors")
    with pytest.raises(TargetError, match="text_encoder and text_encoder_2 have modules of the same names and shapes"):
        fold(open_checkpoint(base), [load_adapter(tmp_path / "two.safetensors")])


def test_a_module_that_the_base_lacks_is_named(unet: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = unet
    own = saved(model, tmp_path / "own", lora())
    extra = {f"unet.mid_block.nowhere.lora_{s}.weight": torch.randn((4, 8) if s == "A" else (8, 4)) for s in "AB"}
    file = written_again(own, tmp_path / "x" / FILE, lambda key: f"unet.{key}", config=False, extra=extra)
    with pytest.raises(TargetError, match=r"mid_block\.nowhere"):
        fold(open_checkpoint(folder), [load_adapter(file)])


def test_a_folder_of_the_hub(unet: tuple[Any, Path], tmp_path: Path) -> None:
    """A repository that holds this file and no adapter_config.json is an adapter; its output keeps diffusers' names."""
    model, folder = unet
    file = saved(model, tmp_path / "lora", lora())
    (file.parent / "README.md").write_text("a card")
    assert [is_adapter(path) for path in (file.parent, file, folder)] == [True, True, False]
    report = adapterkit.merge(folder, [file.parent], tmp_path / "merged")
    assert report.touched == len({key.split(".lora_")[0] for key in load_file(file)})
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == [
        "adapterkit.json",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    wanted = fused(model, file, None)
    got = type(model).from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.allclose(got[name].double(), wanted[name], atol=1e-5) for name in wanted)


def test_a_base_in_shards(diffusers: Any, unet: tuple[Any, Path], tmp_path: Path) -> None:
    model, _ = unet
    base = tmp_path / "sharded" / "unet"
    model.save_pretrained(base, max_shard_size="60KB")
    assert (base / "diffusion_pytorch_model.safetensors.index.json").is_file()
    file = saved(model, tmp_path / "lora", lora())
    check(base, file, fused(model, file, None))
    adapterkit.merge(base, [file], tmp_path / "merged")
    adapterkit.merge(base, [file], tmp_path / "smaller", max_shard_size="40KB")
    for out in ("merged", "smaller"):
        assert not (tmp_path / out / "model.safetensors.index.json").exists()
        again = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / out).state_dict()
        assert all(torch.equal(again[name], tensor) for name, tensor in read_tensors(tmp_path / out).items())


def test_a_pipeline_that_names_no_component(unet: tuple[Any, Path]) -> None:
    _, folder = unet
    (folder.parent / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(NotFound, match=r"names no component .*; name one of its folders as the base \(unet\)"):
        open_checkpoint(folder.parent)


@pytest.mark.parametrize(
    ("tensors", "metadata", "error", "words"),
    [
        (
            {"unet.a.lora_A.weight": (2, 8), "unet.a.oft_diag": (8, 8)},
            {},
            UnsupportedAdapter,
            r"'unet\.a\.oft_diag' belongs to an algorithm that is not read",
        ),
        ({"unet.a.lora_A.weight": (2, 8), "unet.a.lora.down.weight": (2, 8)}, {}, AdapterError, "two tensors for"),
        ({"unet.a.lora_A.weight": (8,), "unet.a.lora_B.weight": (8, 2)}, {}, AdapterError, "no factor"),
        ({"unet.a.lora_A.weight": (2, 8)}, {"lora_adapter_metadata": "[1]"}, AdapterError, "is no config"),
        ({"unet.a.lora_A.weight": (2, 8)}, {"lora_adapter_metadata": "{" * 9999}, AdapterError, "is no config"),
        ({"unet.a.base_layer.weight": (8, 8)}, {}, AdapterError, "give the folder with adapter_config.json"),
    ],
)
def test_bad_input(
    tensors: dict[str, tuple[int, ...]], metadata: dict[str, str], error: type[Exception], words: str, tmp_path: Path
) -> None:
    file = tmp_path / "bad.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, file, metadata)
    with pytest.raises(error, match=words):
        load_adapter(file)


def test_it_is_registered_and_converted_as_an_adapter(
    unet: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = unet
    monkeypatch.setenv("ADAPTERKIT_HOME", str(tmp_path / "registry"))
    file = saved(model, tmp_path / "lora", lora())
    record = register(file.parent, "mine", base=folder).record
    assert (record.kind, record.method) == ("adapter", "lora")
    adapterkit.convert(file, tmp_path / "peft", to="peft")
    check(folder, tmp_path / "peft", fused(model, file, None))


def test_a_convolution_goes_into_files_and_is_named_where_it_does_not(unet: tuple[Any, Path], tmp_path: Path) -> None:
    import peft

    model, folder = unet
    words = r"down_blocks\.0\.resnets\.0\.conv1 is a convolution, and a LoRA of convolutions is not written as mlx"
    file = saved(model, tmp_path / "lora", lora())
    wanted = fused(model, file, None)
    for base in (None, folder):
        for style in ("kohya", "comfyui", "lycoris", "diffusers"):
            out = tmp_path / f"{style}.safetensors"
            adapterkit.convert(file, out, to=style, base=base, force=True)
            check(folder, out, wanted)
        with pytest.raises(UnsupportedAdapter, match=words):
            adapterkit.convert(file, tmp_path / "out", to="mlx", base=base)
    assert fused(model, tmp_path / "diffusers.safetensors", "unet").keys() == wanted.keys()  # diffusers loads it
    with pytest.raises(UsageError, match=r"conv1 is a convolution; what it adds has to be computed against its base"):
        adapterkit.convert(file, tmp_path / "out", to="peft", plain=True)
    loha = peft.get_peft_model(copy.deepcopy(model), peft.LoHaConfig(r=2, target_modules=["conv1"], init_weights=False))
    loha.save_pretrained(tmp_path / "loha")
    adapterkit.convert(tmp_path / "loha", tmp_path / "loha.safetensors", to="kohya", base=folder)
    assert any(one.ndim == 4 for one in load_file(tmp_path / "loha.safetensors").values())
    check(folder, tmp_path / "loha.safetensors", loha.merge_and_unload().state_dict())


def test_a_config_of_one_part_says_nothing_of_another(tmp_path: Path) -> None:
    """The UNet's config is in the metadata, the text encoder's is not, and only one of them has biases."""
    shapes = {"lora_A.weight": (2, 8), "lora_B.weight": (8, 2), "lora_B.bias": (8,)}
    parts = ("unet", "text_encoder")
    tensors = {f"{part}.a.to_q.{leaf}": torch.randn(shape) for part in parts for leaf, shape in shapes.items()}
    del tensors["text_encoder.a.to_q.lora_B.bias"]
    told = {"unet.r": 2, "unet.lora_alpha": 5, "unet.lora_bias": True}
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(told)})
    adapter = load_adapter(tmp_path / "x.safetensors")
    configs = adapter.config.raw["pipeline_parts"]
    assert [configs[part]["lora_alpha"] for part in parts] == [5, 2]
    assert [configs[part].get("lora_bias", False) for part in parts] == [True, False]
    assert adapter.notes[1] == "the file tells no alpha of text_encoder, so every scale is 1, as diffusers takes it"
