"""Files that hold several parts of a pipeline, and bases of one file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterkit.adapters.formats.keys import read_key
from adapterkit.adapters.load import load_adapter
from adapterkit.cli import main
from adapterkit.errors import AdapterError, TargetError
from adapterkit.verbs.combine import combine
from adapterkit.verbs.inspect import inspect
from adapterkit.verbs.merge import merge
from adapterkit.verbs.resize import resize

TE = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
TE2 = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("key", "part", "path"),
    [
        ("lora_te_text_model_x", "te", "text_model_x"),
        ("lora_te2_text_model_x", "te2", "text_model_x"),
        ("lora_unet_down_blocks_0", "unet", "down_blocks_0"),
        ("oft_unet_mid_block", "unet", "mid_block"),
        ("lycoris_layers_0_q", "", "layers_0_q"),
        ("lora_transformer_h_0", "transformer", "h_0"),
        ("lora_tell_me", "", "tell_me"),
        ("some_blocks_0_module", "", "some_blocks_0_module"),
    ],
)
def test_parts(key: str, part: str, path: str) -> None:
    found = read_key(f"{key}.lora_up.weight")
    assert (found.part, found.path, found.flat) == (part, path, True)


def ended(command: list[str]) -> object:
    """How a command line ends."""
    with pytest.raises(SystemExit) as done:
        main(command)
    return done.value.code


def written(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a merge, in the one file that its base has too."""
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def factors(module: str, seed: int) -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    up, down = torch.randn(32, 2, generator=drawn), torch.randn(2, 32, generator=drawn)
    return {f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": down, f"{module}.alpha": torch.tensor(2.0)}


def delta(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    return tensors[f"{module}.lora_up.weight"].double() @ tensors[f"{module}.lora_down.weight"].double()


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A folder with one file of three parts, two components of a pipeline, and a checkpoint of all of it."""
    ones = torch.ones(32, 32)
    save_file({**factors(TE, 1), **factors(TE2, 2), **factors(UNET, 3)}, tmp_path / "file.safetensors")
    for folder, name, config in (
        ("text", "text_model.encoder.layers.0.mlp.fc1.weight", {"model_type": "clip_text_model"}),
        (
            "unet",
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
            {"_class_name": "UNet2DConditionModel"},
        ),
    ):
        (tmp_path / folder).mkdir()
        save_file({name: ones}, tmp_path / folder / "model.safetensors")
        (tmp_path / folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    whole = {
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": ones,
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight": ones.clone(),
        "first_stage_model.decoder.conv_in.weight": ones.clone(),
    }
    (tmp_path / "whole").mkdir()
    save_file(whole, tmp_path / "whole" / "sd.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("part", "module", "base"), [("te1", TE, "text"), ("te2", TE2, "text"), ("unet", UNET, "unet")]
)
def test_one_part_of_a_file(part: str, module: str, base: str, pipeline: Path) -> None:
    merge(pipeline / base, [f"{pipeline}/file.safetensors#{part}"], pipeline / "out")
    (merged,) = written(pipeline / "out").values()
    exact = 1 + delta(load_file(pipeline / "file.safetensors"), module)
    assert float((merged - exact).abs().max()) <= 2e-6 * float(exact.abs().max())
    command = [
        "verify",
        f"{pipeline}/out",
        "--base",
        f"{pipeline / base}",
        "--adapter",
        f"{pipeline}/file.safetensors#{part}",
    ]
    assert ended(command) == 0
    assert inspect(f"{pipeline}/file.safetensors#{part}").parameters == 128


def test_a_checkpoint_of_one_file_takes_several_parts(pipeline: Path) -> None:
    """Stable Diffusion 1: modules of the UNet are trained under diffusers' names and stored under older ones."""
    tensors = load_file(pipeline / "file.safetensors")
    base = pipeline / "whole" / "sd.safetensors"
    merge(base, [f"{pipeline}/file.safetensors#te1+unet"], pipeline / "out")
    merged = written(pipeline / "out")
    for name, module in zip(sorted(merged), (TE, None, UNET), strict=True):
        exact = 1 + (0 if module is None else delta(tensors, module))
        assert float((merged[name] - exact).abs().max()) <= 1e-5


def test_what_is_said_without_a_part(pipeline: Path) -> None:
    file = pipeline / "file.safetensors"
    base = pipeline / "whole" / "sd.safetensors"
    report = merge(base, [file], pipeline / "out")  # Stable Diffusion 1 has no second text encoder
    assert any("left out: te2 (1 module): the base has no such part" in note for note in report.notes)
    assert report.touched == 2
    with pytest.raises(TargetError, match="the base has no place for 'te2'"):
        merge(base, [f"{file}#te2"], pipeline / "two")
    with pytest.raises(TargetError, match="its parts te1 and te2 have modules") as several:
        merge(pipeline / "text", [file], pipeline / "out")
    assert several.value.hint is not None
    assert several.value.hint.endswith("file.safetensors#te1+te2")
    with pytest.raises(AdapterError, match="the file has no part 'vae'") as none:
        load_adapter(f"{file}#vae")
    assert none.value.hint == "it holds te1, te2, unet"
    save_file({"lycoris_x.lora_up.weight": torch.ones(4, 2)}, pipeline / "one.safetensors")
    with pytest.raises(AdapterError, match="the file has no part 'te'"):
        load_adapter(f"{pipeline}/one.safetensors#te")


def test_other_verbs_find_the_part_of_the_base(pipeline: Path) -> None:
    combine(
        [f"{pipeline}/file.safetensors#te1", f"{pipeline}/file.safetensors#te2"],
        pipeline / "both",
        base=pipeline / "text",
    )
    tensors = load_file(pipeline / "file.safetensors")
    merge(pipeline / "text", [pipeline / "both"], pipeline / "out")
    (merged,) = written(pipeline / "out").values()
    assert float((merged - (1 + delta(tensors, TE) + delta(tensors, TE2))).abs().max()) <= 2e-5
    resize(pipeline / "file.safetensors", pipeline / "smaller", base=pipeline / "unet", rank=1)
    assert inspect(pipeline / "smaller").ranks == {"1": 1}


def test_a_part_of_a_diffusers_file(pipeline: Path) -> None:
    drawn = factors("x", 4)
    up, down = drawn["x.lora_up.weight"], drawn["x.lora_down.weight"]
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    both = {
        f"{part}.{path}.lora_{side}.weight": t
        for part in ("unet", "controlnet")
        for side, t in (("A", down), ("B", up))
    }
    save_file({name: tensor.clone() for name, tensor in both.items()}, pipeline / "two.safetensors")
    with pytest.raises(TargetError, match="its parts controlnet and unet have modules"):
        merge(pipeline / "unet", [pipeline / "two.safetensors"], pipeline / "out")
    merge(pipeline / "unet", [f"{pipeline}/two.safetensors#unet"], pipeline / "out")
    with pytest.raises(TargetError, match="its parts controlnet and unet have modules"):
        merge(pipeline / "unet", [f"{pipeline}/two.safetensors#unet+controlnet"], pipeline / "other")


def test_every_module_of_a_unet_under_its_older_name(tmp_path: Path) -> None:
    """The names as LyCORIS maps them, in a checkpoint of one file."""
    from lycoris.utils import convert_diffusers_name_to_compvis

    inner = {
        "resnets": ("conv1", "conv2", "time_emb_proj", "conv_shortcut"),
        "attentions": ("proj_in", "transformer_blocks_0_attn1_to_q"),
    }
    names = ["conv_in", "conv_out", "time_embedding_linear_1", "time_embedding_linear_2"]
    for kind, rests in inner.items():
        for rest in rests:
            names += [f"down_blocks_{i}_{kind}_{j}_{rest}" for i in range(4) for j in range(2)]
            names += [f"up_blocks_{i}_{kind}_{j}_{rest}" for i in range(4) for j in range(3)]
            names += [f"mid_block_{kind}_{j}_{rest}" for j in range(2 if kind == "resnets" else 1)]
    names += [f"down_blocks_{i}_downsamplers_0_conv" for i in range(3)]
    names += [f"up_blocks_{i}_upsamplers_0_conv" for i in range(3)]
    base: dict[str, torch.Tensor] = {}
    tensors: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    for index, name in enumerate(names):
        older = convert_diffusers_name_to_compvis(f"lora_unet_{name}").removeprefix("lora_unet_")
        assert older != name
        # Dots where the model has them: after every block's and list's number.
        stored = f"model.diffusion_model.{re.sub(r'_(?=[0-9])|(?<=[0-9])_', '.', older)}.weight"
        base[stored] = torch.ones(4, 4)
        tensors[f"lora_unet_{name}.diff"] = torch.full((4, 4), float(index))
        expected[stored] = torch.full((4, 4), 1.0 + index)
    assert len(base) == len(names)
    save_file(base, tmp_path / "sd.safetensors")
    save_file(tensors, tmp_path / "full.safetensors")
    merge(tmp_path / "sd.safetensors", [tmp_path / "full.safetensors"], tmp_path / "out")
    merged = written(tmp_path / "out")
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())


def test_a_recipe_names_a_part(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERKIT_HOME", str(pipeline / "home"))
    text = 'base = "unet"\n[adapters]\nx = "file.safetensors#unet"\n[outputs.merged]\npath = "out"\nadapters = ["x"]\n'
    (pipeline / "recipe.toml").write_text(text, encoding="utf-8")
    assert ended(["build", str(pipeline / "recipe.toml")]) == 0
    assert ended(["build", str(pipeline / "recipe.toml"), "--locked"]) == 0
    (merged,) = written(pipeline / "out").values()
    exact = 1 + delta(load_file(pipeline / "file.safetensors"), UNET)
    assert float((merged - exact).abs().max()) <= 1e-5
