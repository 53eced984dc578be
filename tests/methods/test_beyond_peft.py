"""Where PEFT cannot merge, merges something else than was trained, or cannot load: each against a formula of its own, or
against PEFT's forward pass."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from method_cases import Case, example, make_net, merged_tensors, save_base, train

from adapterkit.errors import UnsupportedAdapter


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def trained(case: Case, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], Path]:
    """The base's weights, the adapter's tensors by key, and the folder they were saved in."""
    from safetensors.torch import load_file

    net = make_net()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    save_base(net, folder / "base")
    train(net, case.config(), folder / "adapter", case.noise)
    return before, load_file(folder / "adapter" / "adapter_model.safetensors"), folder / "adapter"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}), encoding="utf-8")


def skew(vectors: torch.Tensor, size: int) -> torch.Tensor:
    q = torch.zeros(len(vectors), size, size, dtype=torch.float64)
    place = 0
    for i in range(size):
        for j in range(i + 1, size):
            q[:, i, j], q[:, j, i] = vectors[:, place], -vectors[:, place]
            place += 1
    return q


@pytest.mark.parametrize("version", ["0.17.1", None])
def test_oft_of_peft_before_0_18_has_its_own_series(version: str | None, tmp_path: Path) -> None:
    """PEFT 0.18 halved the last term of the series; 0.21 loads older adapters with a warning and merges the new one."""
    case = Case("OFT", "Linear", {"r": 0, "oft_block_size": 8}, noise=0.3)
    before, tensors, adapter = trained(case, tmp_path)
    edit_config(adapter, peft_version=version if version else ...)
    ours = merged_tensors(tmp_path / "base", adapter)
    name = "layers.0.wide"
    q = skew(tensors[f"base_model.model.{name}.oft_R.weight"].double(), 8)
    turn = torch.eye(8, dtype=torch.float64) + 2 * (q + q @ q + q @ q @ q + q @ q @ q @ q)
    expected = before[f"{name}.weight"].double() @ torch.block_diag(*turn).T
    assert (ours[f"{name}.weight"] - expected).abs().max() <= 2e-6
    newer = expected - before[f"{name}.weight"].double() @ torch.block_diag(*(q @ q @ q @ q)).T
    assert (newer - expected).abs().max() > 1e-2


def test_oft_of_convolutions_is_no_convolution_in_peft(tmp_path: Path) -> None:
    """Its forward pass sums overlapping patches: even an untrained adapter changes the model, so nothing can stand for it."""
    case = Case("OFT", "Conv2d", {"r": 0, "oft_block_size": 8}, noise=0.0)
    net = make_net()
    x = example(net.conv2)
    plain = net.conv2(x).detach()
    save_base(net, tmp_path / "base")
    model = train(net, case.config(), tmp_path / "adapter", 0.0)
    with quiet():
        assert (model.get_base_model().conv2(x) - plain).abs().max() > plain.abs().max()
    with pytest.raises(UnsupportedAdapter, match="sums overlapping patches"):
        merged_tensors(tmp_path / "base", tmp_path / "adapter")


@pytest.mark.parametrize("factors", [2, 3])
def test_boft_of_several_factors(factors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT needs a CUDA extension for them; with its block-diagonal step replaced it is the oracle on a CPU."""
    from peft.tuners.boft import layer

    class Blocks:
        @staticmethod
        def apply(turns: torch.Tensor) -> torch.Tensor:
            return torch.stack([torch.block_diag(*factor) for factor in turns])

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer, "FastBlockDiag", Blocks)
    switches = {"boft_block_size": 4, "boft_n_butterfly_factor": factors}
    for kind in ("Linear", "Conv2d", "Conv2d 1x1")[: 3 if factors == 2 else 1]:
        folder = tmp_path / kind
        save_base(make_net(), folder / "base")
        model = train(make_net(), Case("BOFT", kind, switches).config(), folder / "adapter", 0.3)
        with quiet():
            theirs = model.merge_and_unload().state_dict()
        ours = merged_tensors(folder / "base", folder / "adapter")
        assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) <= 2e-6


def test_lokr_core_of_a_1d_convolution(tmp_path: Path) -> None:
    """PEFT's own product fails on it (a view of a strided tensor); the formula is that of LyCORIS."""
    case = Case("LoKr", "Conv1d", {"r": 1, "alpha": 3, "use_effective_conv2d": True}, noise=0.5)
    before, tensors, adapter = trained(case, tmp_path)
    w1, a, b, core = (tensors[f"base_model.model.conv1.lokr_{name}"].double() for name in ("w1", "w2_a", "w2_b", "t2"))
    w2 = torch.einsum("ijkl,ip,jr->prkl", core, a, b)
    delta = 3 * torch.einsum("ab,cdkl->acbdkl", w1, w2).reshape(before["conv1.weight"].shape)
    ours = merged_tensors(tmp_path / "base", adapter)["conv1.weight"]
    assert (ours - before["conv1.weight"] - delta).abs().max() <= 2e-6 * delta.abs().max()
    assert delta.abs().max() > 0.05


@pytest.mark.parametrize("variant", [True, "bat"])
def test_bone_is_miss_by_its_former_name(variant: bool | str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    case = Case("Miss", "Linear", {"r": 8, "init_weights": variant})
    _, tensors, adapter = trained(case, tmp_path)
    as_miss = merged_tensors(tmp_path / "base", adapter)
    renamed = {name.replace("miss_block", "bone_block"): tensor for name, tensor in tensors.items()}
    save_file(renamed, adapter / "adapter_model.safetensors")
    edit_config(adapter, peft_type="BONE", miss_dropout=..., mini_r=...)
    as_bone = merged_tensors(tmp_path / "base", adapter)
    assert all(torch.equal(as_miss[name], as_bone[name]) for name in as_miss)


def test_hira_on_a_square_conv1d_whose_config_does_not_say_so(tmp_path: Path) -> None:
    """HiRA leaves fan_in_fan_out false in the config it saves; GPT-2's square c_proj is known by the architecture."""
    from peft import HiraConfig, PeftModel
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20, n_positions=8)
    model = GPT2LMHeadModel(config)
    with quiet():
        model.save_pretrained(tmp_path / "base")
    train(model, HiraConfig(target_modules=["attn.c_proj", "c_attn"], r=3), tmp_path / "adapter", 0.3)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["fan_in_fan_out"] is False
    ours = merged_tensors(tmp_path / "base", tmp_path / "adapter")
    with quiet():
        base = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
        theirs = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload().state_dict()
    for name in ("attn.c_proj.weight", "attn.c_attn.weight"):
        assert (ours[f"transformer.h.0.{name}"] - theirs[f"transformer.h.0.{name}"]).abs().max() <= 1e-7


def test_ia3_of_a_square_convolution_reads_the_config(tmp_path: Path) -> None:
    """Inputs or outputs: the vector has one shape for both, so the config's pattern decides, as a whole-path match."""
    from peft import IA3Config, PeftModel

    for named in ("conv2_square", ".*square", "square"):
        folder = tmp_path / named.strip(".*")
        save_base(make_net(), folder / "base")
        config = IA3Config(target_modules="conv2_square", feedforward_modules=["conv1"])
        model = train(make_net(), config, folder / "adapter", 0.4)
        del model
        edit_config(folder / "adapter", feedforward_modules=named)
        ours = merged_tensors(folder / "base", folder / "adapter")
        with quiet():
            theirs = PeftModel.from_pretrained(make_net(), str(folder / "adapter")).merge_and_unload().state_dict()
        assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) <= 1e-7
