"""`combine --method arrow`: what PEFT's own Arrow makes of the folder, against PEFT on the adapters themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import load_model, make_adapter, read_tensors
from peft import ArrowConfig, LoraConfig, create_arrow_model
from safetensors.torch import load_file

from adapterkit import combine
from adapterkit.cli import main
from adapterkit.errors import TargetError, UnsupportedAdapter, UsageError

IDS = torch.tensor([[1, 5, 17, 80, 33, 9]])


@pytest.fixture
def base(make_base: Callable[..., Path]) -> Path:
    return make_base("llama")


def adapter(folder: Path, base: Path, seed: int, **config: Any) -> Path:
    torch.manual_seed(seed)  # PEFT's own first values
    said = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], **config}
    return make_adapter(folder, base, LoraConfig(**said), seed=seed)


def routed(base: Path, folders: list[Path], top: int) -> Any:
    model = create_arrow_model(
        load_model(base), [str(folder) for folder in folders], ArrowConfig(top_k=top, rng_seed=0)
    )
    with torch.no_grad():
        return model, model.eval()(input_ids=IDS).logits


def test_peft_routes_between_them_as_between_the_adapters_themselves(base: Path, tmp_path: Path) -> None:
    given = [adapter(tmp_path / f"a{seed}", base, seed) for seed in (1, 2, 3)]
    report = combine(given, tmp_path / "out", method="arrow", parameters={"top_k": 2})
    folders = [tmp_path / "out" / f"task_{number}" for number in range(3)]
    _, expected = routed(base, given, 2)
    model, found = routed(base, folders, 2)
    assert torch.allclose(found, expected, atol=1e-4), (found - expected).abs().max()
    said = json.loads((tmp_path / "out" / "arrow.json").read_text())
    assert (said["top_k"], said["rank"], report.rank) == (2, 4, 4)
    assert [row["made_of"] for row in said["adapters"]] == ["a1", "a2", "a3"]
    record = json.loads((tmp_path / "out" / "adapterkit.json").read_text())
    assert (record["kind"], record["operation"]["parameters"]["method"], len(record["parents"])) == (
        "combined",
        "arrow",
        3,
    )
    assert {file["path"] for file in record["files"]} >= {"prototypes.safetensors", "task_2/adapter_model.safetensors"}
    assert not any(file["path"].startswith(".") for file in record["files"])
    # The prototypes are what PEFT's power iteration of 15 steps is on its way to.
    prototypes = load_file(tmp_path / "out" / "prototypes.safetensors")
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_arrow")}
    assert len(layers) == len(prototypes) == 4
    for name, module in layers.items():
        theirs = module.lora_arrow["arrow_router"].prototypes
        mine = prototypes[f"base_model.model.{name.removeprefix('base_model.model.')}"]
        assert mine.shape == theirs.shape
        assert torch.allclose(mine.norm(dim=-1), torch.ones(3), atol=1e-5)
        for number in range(3):
            delta = module.lora_B[f"task_{number}"].weight @ module.lora_A[f"task_{number}"].weight
            far, theirs_far = (float((delta @ one[number]).norm()) for one in (mine, theirs))
            assert far * 1.00001 >= theirs_far > 0.9 * far  # where two singular values are close, 15 steps mix them


def test_prototypes_are_right_singular_vectors(base: Path, tmp_path: Path) -> None:
    given = [adapter(tmp_path / f"a{seed}", base, seed) for seed in (1, 2)]
    combine(given, tmp_path / "out", method="arrow")
    prototypes = load_file(tmp_path / "out" / "prototypes.safetensors")
    for number, folder in enumerate(given):
        tensors = read_tensors(folder)
        for key, mine in prototypes.items():
            delta = tensors[f"{key}.lora_B.weight"].double() @ tensors[f"{key}.lora_A.weight"].double()
            first = torch.linalg.svd(delta).Vh[0]
            assert abs(float(first @ mine[number].double())) == pytest.approx(1, abs=1e-6)


def test_other_ranks_scalings_and_modules_are_brought_together(base: Path, tmp_path: Path) -> None:
    given = [
        adapter(tmp_path / "a1", base, 1),
        adapter(tmp_path / "a2", base, 2, r=2, use_rslora=True, target_modules=["q_proj"]),
    ]
    combine(given, tmp_path / "out", method="arrow")
    folders = [tmp_path / "out" / f"task_{number}" for number in range(2)]
    routed(base, folders, 1)
    from peft import PeftModel

    for one, folder in zip(given, folders, strict=True):
        logits = []
        for path in (one, folder):
            model = PeftModel.from_pretrained(load_model(base), path).eval()
            with torch.no_grad():
                logits.append(model(input_ids=IDS).logits)
        assert torch.allclose(logits[0], logits[1], atol=1e-4)
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4


def test_what_arrow_has_no_use_for(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (adapter(tmp_path / f"a{seed}", base, seed) for seed in (1, 2))
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="one was given"):
        combine([one], out, method="arrow")
    with pytest.raises(UsageError, match="has no meaning"):
        combine([one, two], out, method="arrow", weights=[0.5, 0.5])
    with pytest.raises(UsageError, match="has no meaning"):
        combine([one, two], out, method="arrow", rank=2)
    for parameters in ({"top_k": 3}, {"top_k": 0}, {"temperature": 0.0}, {"density": 0.5}):
        with pytest.raises(UsageError):
            combine([one, two], out, method="arrow", parameters=parameters)
    other = adapter(tmp_path / "other", base, 4)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/other"}))
    with pytest.raises(TargetError, match="on org/other"):
        combine([one, other], out, method="arrow")
    whole = adapter(tmp_path / "whole", base, 3, modules_to_save=["lm_head"])
    with pytest.raises(UnsupportedAdapter, match="arrow routes"):
        combine([one, whole], out, method="arrow")
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(SystemExit) as end:
        main(["combine", str(one), str(two), "-o", str(out), "--method", "arrow"])
    assert (end.value.code or 0) == 0, capsys.readouterr()
    assert (out / "prototypes.safetensors").is_file()
