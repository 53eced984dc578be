"""Options that `merge`, `combine` and `convert` have, as keys of a recipe: each arrives, and none is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import plain_adapter, plain_base, read_bytes
from safetensors import safe_open

import adapterkit
from adapterkit.cli import main
from adapterkit.errors import AdapterkitError, OutputError, UsageError
from adapterkit.gguf.quantize import Quantization
from adapterkit.recipe.report import UNCHANGED
from adapterkit.recipe.run import build, plan_build
from adapterkit.requests import every


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the example: a base with a tokenizer, and two adapters."""
    root = tmp_path_factory.mktemp("options")
    script = Path(__file__).parents[2] / "examples/recipe/make_inputs.py"
    subprocess.run([sys.executable, str(script), str(root / "inputs")], check=True, timeout=900)
    return root / "inputs"


def recipe(inputs: Path, folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "adapterkit.toml"
    path.write_text(f'base = "{inputs / "base"}"\n[adapters]\nstyle = "{inputs / "style"}"\n{text}')
    return path


def test_keep_below_and_pre(inputs: Path, tmp_path: Path) -> None:
    keys = 'quant = "Q4_0"\nkeep-touched = "Q8_0"\nkeep-below = 0.8\npre = "llama-bpe"\n'
    build(recipe(inputs, tmp_path / "work", f'[outputs.q]\npath = "q.gguf"\n{keys}'))
    asked = Quantization("Q4_0", keep_touched="Q8_0", keep_below=0.8)
    base, adapter = inputs / "base", inputs / "style"
    adapterkit.merge(base, [adapter], tmp_path / "q.gguf", quantization=asked, pre="llama-bpe")
    made = (tmp_path / "work/q.gguf").read_bytes()
    assert made == (tmp_path / "q.gguf").read_bytes()
    for other in (
        {"pre": "llama-bpe", "quantization": Quantization("Q4_0", keep_touched="Q8_0")},
        {"quantization": asked},
    ):
        adapterkit.merge(base, [adapter], tmp_path / "other.gguf", force=True, **other)
        assert made != (tmp_path / "other.gguf").read_bytes()


def test_verify_computes_where_a_recipe_says(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = recipe(inputs, tmp_path / "work", '[outputs.out]\npath = "out"\nverify.device = "cuda"\n')
    with pytest.raises(UsageError, match="cuda cannot be used"):
        build(path)


def vision_tower(path: Path, value: float) -> Path:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "clip")
    writer.add_tensor("v.w", np.full((4, 32), value, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_mmproj_file_goes_beside(inputs: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    tower = vision_tower(work / "mmproj-F16.gguf", 1.0)
    path = recipe(inputs, work, '[outputs.q]\npath = "build/q.gguf"\nquant = "Q8_0"\nmmproj = "mmproj-F16.gguf"\n')
    report = build(path)
    assert set(report.outputs[0].files) == {"q.gguf", "q.gguf.adapterkit.json", "mmproj-F16.gguf"}
    assert (work / "build/mmproj-F16.gguf").read_bytes() == tower.read_bytes()
    assert "outputs.q.mmproj" in report.inputs
    assert build(path).outputs[0].state == UNCHANGED
    # Another tower is another output; what this recipe made of it before is replaced.
    vision_tower(tower, 2.0)
    assert build(path).changed == 1
    assert (work / "build/mmproj-F16.gguf").read_bytes() == tower.read_bytes()
    # What something else put there is not.
    (work / "build/mmproj-F16.gguf").write_bytes(b"mine")
    (work / ".adapterkit/adapterkit.json").unlink()
    (work / "build/q.gguf").unlink()
    with pytest.raises(OutputError, match=r"adapterkit.toml:4: .*mmproj-F16.gguf exists"):
        build(path)
    assert (work / "build/mmproj-F16.gguf").read_bytes() == b"mine"


def test_modules_of_a_converted_folder_stay(inputs: Path, tmp_path: Path) -> None:
    text = '[outputs.merged]\npath = "merged"\n[outputs.small]\npath = "small"\nto = "nf4"\nfrom = "merged"\n'
    build(recipe(inputs, tmp_path / "work", text + 'skip-modules = ["down_proj"]\n'))
    with safe_open(tmp_path / "work/small/model.safetensors", "pt") as file:
        dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys() if name.endswith("proj.weight")}  # noqa: SIM118
    assert {name for name, dtype in dtypes.items() if dtype == "BF16"} == {
        f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(2)
    }


def test_calibration_and_compressor(inputs: Path, tmp_path: Path) -> None:
    """The program is a stand-in that says what it was asked and stops; llm-compressor itself has an environment of its own."""
    work = tmp_path / "work"
    work.mkdir()
    program = work / "python"
    program.write_text(f"#!{sys.executable}\nimport sys\nif '-c' in sys.argv: sys.exit(0)\nsys.exit(sys.argv[-1])\n")
    program.chmod(0o755)
    (work / "text.txt").write_text("some words\n")
    text = '[outputs.merged]\npath = "merged"\n[outputs.small]\npath = "small"\nto = "awq"\nfrom = "merged"\n'
    path = recipe(
        inputs,
        work,
        text + 'calibration = "text.txt"\ncompressor = "./python"\nskip-modules = ["lm_head", "1.mlp.up_proj"]\n',
    )
    with pytest.raises(AdapterkitError) as caught:
        build(path)
    assert str((work / "text.txt").resolve()) in caught.value.message
    assert '"skip": ["lm_head", "1.mlp.up_proj", "model.layers.1.mlp.up_proj"]' in caught.value.message
    assert (work / "merged").is_dir()
    assert not (work / "small").exists()
    planned = next(row for row in plan_build(path).outputs if row.name == "small")
    assert "text.txt" in planned.reads
    path.write_text(path.read_text().replace('calibration = "text.txt"\n', ""))
    with pytest.raises(UsageError, match=r"adapterkit.toml:6: awq and gptq need a text"):
        build(path)


def test_a_full_record(inputs: Path, tmp_path: Path) -> None:
    build(recipe(inputs, tmp_path / "work", '[outputs.merged]\npath = "merged"\nfull-record = true\n'))
    adapterkit.merge(inputs / "base", [inputs / "style"], tmp_path / "merged", full_record=True)
    adapterkit.merge(inputs / "base", [inputs / "style"], tmp_path / "short")
    made = read_bytes(tmp_path / "work/merged", record=True)
    assert made == read_bytes(tmp_path / "merged", record=True)
    assert made != read_bytes(tmp_path / "short", record=True)


def test_a_device_is_part_of_what_is_made(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    plain_adapter(tmp_path / "style", base)
    path = tmp_path / "adapterkit.toml"
    text = 'base = "base"\nadapters.style = "style"\n[outputs.merged]\npath = "out"\n'
    for device, message in (("tpu", "'tpu' is no device"), ("cuda:99", "cuda:99")):
        path.write_text(f'{text}device = "{device}"\n')
        with pytest.raises(UsageError, match=rf"adapterkit.toml:3: .*{message}"):
            build(path)
    assert not (tmp_path / "out").exists()
    assert [row.state for row in plan_build(path).outputs] == ["new"]  # on a machine without it
    path.write_text(f'{text}device = "cpu"\n')
    build(path)
    path.write_text(text)  # the default, not said
    assert build(path).changed == 0


def test_the_command_line_builds_them(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe(inputs, tmp_path, '[outputs.q]\npath = "q.gguf"\npre = "llama-bpe"\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["build"])
    assert not end.value.code
    keys: dict[str, Any] = adapterkit.open("q.gguf").header.keys
    assert "tokenizer.ggml.pre" in keys


def test_the_page_names_every_key_of_an_output() -> None:
    page = (Path(__file__).parents[2] / "docs/recipes.md").read_text(encoding="utf-8")
    keys = {
        option.recipe.removeprefix("output.")
        for request in every()
        for option in request.options().values()
        if option.recipe.startswith("output.")
    }
    assert {"calibration", "dense-modules"} <= keys
    assert not {key for key in keys if f"`{key}`" not in page}


@pytest.mark.parametrize(("name", "quant"), [("merged", "nf4"), ("merged.gguf", "Q4_0")])
def test_a_residual_beside_an_output(inputs: Path, tmp_path: Path, name: str, quant: str) -> None:
    """It is made with the output, known with it, and goes when it is asked for no more."""
    text = f'[outputs.small]\npath = "{name}"\nquant = "{quant}"\n'
    path = recipe(inputs, tmp_path / "work", text + "residual = 3\n")
    (planned,) = plan_build(path).outputs
    assert f"write {name.replace('merged', 'merged-residual')}, the residual of rank 3" in planned.then
    build(path)
    whole = tmp_path / "whole" / name
    adapterkit.merge(inputs / "base", [inputs / "style"], whole, quant=quant, residual=3)
    beside = name.replace("merged", "merged-residual")
    made, wanted = tmp_path / "work" / beside, tmp_path / "whole" / beside
    weights = "" if quant == "Q4_0" else "adapter_model.safetensors"
    assert (made / weights).read_bytes() == (wanted / weights).read_bytes()
    (small,) = build(path).outputs
    assert small.state == UNCHANGED
    assert any("merged-residual" in file for file in small.files)
    assert "residual" in (path.with_name("adapterkit.lock")).read_text()
    # One that somebody changed is not written over; one that is missing is made again.
    changed = (made / weights).read_bytes()
    (made / weights).write_bytes(changed[:-1] + b"x")
    with pytest.raises(OutputError, match="exists"):
        build(path)
    (made / weights).write_bytes(changed)
    assert build(path).changed == 0
    path = recipe(inputs, tmp_path / "work", text)
    assert build(path).changed == 1
    assert not made.exists()
    taken = f'[outputs.other]\npath = "{beside}"\n'
    with pytest.raises(AdapterkitError, match="goes"):
        plan_build(recipe(inputs, tmp_path / "work", text + "residual = 3\n" + taken))
