"""Single files beside what LyCORIS writes today: sd-scripts' OFT, older GLoRA, mixed and broken files, other verbs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from method_cases import make_net, merged_tensors, save_base
from safetensors.torch import save_file

from adapterkit.adapters.load import load_adapter
from adapterkit.errors import AdapterError, TargetError, UnsupportedAdapter, UsageError
from adapterkit.verbs.combine import combine
from adapterkit.verbs.convert import convert
from adapterkit.verbs.inspect import inspect

SQUARE = "layers_0_square"  # 32 x 32 with a bias


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_base(make_net(), tmp_path / "base")
    return tmp_path / "base"


def folded(base: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a merge changes."""
    save_file(tensors, base.parent / "file.safetensors")
    before, after = make_net().state_dict(), merged_tensors(base, base.parent / "file.safetensors")
    return {name: after[name] for name in before if not torch.equal(before[name], after[name])}


def near(found: torch.Tensor, exact: torch.Tensor, before: torch.Tensor) -> bool:
    return bool((found - exact).abs().max() <= 2e-6 * (exact - before).abs().max())


@pytest.mark.parametrize("constraint", [1e-4, 1e-2, 10.0])
def test_oft_of_sd_scripts(constraint: float, base: Path) -> None:
    """networks/oft.py: y R for outputs y, Q = B - B^T clamped to alpha * out, R = (I + Q) (I - Q)^-1."""
    blocks = drawn(4, 8, 8)
    alpha = torch.tensor(constraint)
    found = folded(base, {"oft_unet_layers_0_square.oft_blocks": blocks, "oft_unet_layers_0_square.alpha": alpha})
    w = make_net().state_dict()["layers.0.square.weight"].double()
    q = (blocks - blocks.mT).double()
    q = q * (q.norm().clamp(max=alpha.double() * 32) + 1e-8) / (q.norm() + 1e-8)
    eye = torch.eye(8, dtype=torch.float64)
    exact = torch.block_diag(*((eye + q) @ torch.linalg.inv(eye - q))).T @ w
    assert list(found) == ["layers.0.square.weight"]
    # A constraint that leaves little of the delta leaves the rounding of W itself.
    difference = (found["layers.0.square.weight"] - exact).abs().max()
    assert difference <= 2e-6 * (exact - w).abs().max() + 6e-8


def test_glora_in_both_orders_and_with_a_core(base: Path) -> None:
    """ComfyUI tells the older order of the factors by their shapes: W + s (W a2 a1 + b2 b1)."""
    a1, a2, b1, b2 = drawn(32, 3), drawn(3, 32), drawn(32, 3, seed=1), drawn(3, 32, seed=2)
    w = make_net().state_dict()["layers.0.square.weight"]
    exact = (w.double() + 2 / 3 * (w.double() @ a1.double() @ a2.double() + b1.double() @ b2.double())).float()
    for names in (("a1", "a2", "b1", "b2"), ("a2", "a1", "b2", "b1")):
        tensors = {f"lora_te_{SQUARE}.{n}.weight": t for n, t in zip(names, (a1, a2, b1, b2), strict=True)}
        found = folded(base, {**tensors, f"lora_te_{SQUARE}.alpha": torch.tensor(2.0)})
        assert near(found["layers.0.square.weight"], exact, w)
    a1, a2, b1, b2, bm = drawn(8, 3, 1, 1), drawn(3, 8, 1, 1), drawn(16, 3, 1, 1), drawn(3, 8, 1, 1), drawn(3, 3, 3, 3)
    names = ("a1", "a2", "b1", "b2", "bm")
    found = folded(base, {f"lora_unet_conv2.{n}.weight": t for n, t in zip(names, (a1, a2, b1, b2, bm), strict=True)})
    w = make_net().state_dict()["conv2.weight"]
    inner = torch.einsum("oihw,ir,rj->ojhw", w.double(), a1[..., 0, 0].double(), a2[..., 0, 0].double())
    outer = torch.einsum("mnhw,im,nj->ijhw", bm.double(), b1[..., 0, 0].double(), b2[..., 0, 0].double())
    assert near(found["conv2.weight"], w.double() + inner + outer, w)


def test_a_file_of_several_algorithms(base: Path) -> None:
    tensors = {
        f"lora_unet_{SQUARE}.lora_up.weight": drawn(32, 2),
        f"lora_unet_{SQUARE}.lora_down.weight": drawn(2, 32),
        f"lora_unet_{SQUARE}.alpha": torch.tensor(0.0),  # 0 means that nothing is scaled
        f"lora_unet_{SQUARE}.diff_b": drawn(32),
        "lora_unet_layers_0_norm.w_norm": drawn(32, seed=4),
        "lora_unet_layers_0_norm.b_norm": drawn(32, seed=5),
        "lora_unet_layers_1_norm.diff": drawn(32, seed=6),
        "lora_unet_conv1.weight": drawn(1, 8, 1),
        "lora_unet_conv1.on_input": torch.tensor(1),
    }
    found = folded(base, tensors)
    before = make_net().state_dict()
    exact = {
        "layers.0.square.weight": tensors[f"lora_unet_{SQUARE}.lora_up.weight"].double()
        @ tensors[f"lora_unet_{SQUARE}.lora_down.weight"].double()
        + before["layers.0.square.weight"],
        "layers.0.square.bias": before["layers.0.square.bias"] + tensors[f"lora_unet_{SQUARE}.diff_b"],
        "layers.0.norm.weight": before["layers.0.norm.weight"] + tensors["lora_unet_layers_0_norm.w_norm"],
        "layers.0.norm.bias": before["layers.0.norm.bias"] + tensors["lora_unet_layers_0_norm.b_norm"],
        "layers.1.norm.weight": before["layers.1.norm.weight"] + tensors["lora_unet_layers_1_norm.diff"],
        "conv1.weight": before["conv1.weight"].double() * (1 + tensors["lora_unet_conv1.weight"].double()),
    }
    assert set(found) == set(exact)
    assert all(near(found[name], exact[name], before[name]) for name in exact)
    seen = inspect(base.parent / "file.safetensors", base=base)
    assert (seen.kind, seen.method, seen.ranks) == ("adapter", "LYCORIS (differences, ia3, lora)", {"2": 1})
    assert seen.targets == {"conv1": 1, "norm": 2, "square": 1}


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_an_extraction_with_what_it_leaves_out(sparsity: float, base: Path) -> None:
    """As LyCORIS extracts: low ranks and the largest entries of the rest, in float16; with no sparsity that is all of it."""
    from lycoris.utils import extract_diff

    before, tuned = make_net(), make_net()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            parameter += drawn(*parameter.shape, seed=len(name))
    how = {"linear_mode_param": 3, "conv_mode_param": 2, "use_bias": True, "sparsity": sparsity, "small_conv": False}
    found = extract_diff([], [], before, tuned, "fixed", **how)
    assert any(key.endswith("bias_indices") for key in found)
    save_file({key: tensor.contiguous() for key, tensor in found.items()}, base.parent / "file.safetensors")
    ours = merged_tensors(base, base.parent / "file.safetensors")
    exact, plain = tuned.state_dict(), make_net().state_dict()
    for name in ("layers.0.wide.weight", "layers.1.narrow.weight", "conv2.weight"):
        left = (ours[name] - exact[name]).norm() / (exact[name] - plain[name]).norm()
        flat = (exact[name] - plain[name]).flatten(1).double()
        values = torch.linalg.svdvals(flat)
        beyond = values[3 if "layers" in name else 2 :].norm() / values.norm()
        assert left < 1e-3 if sparsity == 0 else 0.5 * beyond < left < 0.95 * beyond


LORA = {"lora_up.weight": (32, 2), "lora_down.weight": (2, 32)}
BAD = [
    ({**LORA, "diff": (32, 32)}, AdapterError, "mixes algorithms"),
    ({**LORA, "oft_blocks": (4, 8, 8)}, AdapterError, "mixes algorithms"),
    ({**LORA, "bias_indices": (2, 5), "bias_values": (4,)}, TargetError, r"bias_indices' is \[2, 5\], not \[2, 4\]"),
    ({**LORA, "bias_values": (4,)}, AdapterError, "has no lycoris_bias_indices"),
    ({"oft_blocks": (4, 8, 8), "dora_scale": (32, 1)}, AdapterError, "dora_scale' stands without"),
    ({"dora_scale": (1, 32), "diff_b": (32,)}, AdapterError, "dora_scale' stands without"),
    ({**LORA, "dora_scale": (1, 31)}, TargetError, r"dora_scale' is \[1, 31\], not \[32, 1\]"),
    ({**LORA, "dora_scale": (2, 16)}, TargetError, r"dora_scale' is \[2, 16\], not \[32, 1\]"),
    ({**LORA, "lora_mid.weight": (3, 3, 3, 3)}, TargetError, r"lora_mid.weight' is \[3, 3, 3, 3\], not \[2, 2, 3, 3\]"),
    ({**LORA, "lora_mid.weight": (2, 2, 3, 3)}, TargetError, "is made for a weight of 32 x 288"),
    ({"lora_up.weight": (32, 2), "dora_scale": (1, 32)}, AdapterError, "has no lora_down.weight"),
    ({"diff": (32, 31)}, TargetError, r"diff' is \[32, 31\], not \[32, 32\]"),
    ({"diff": (0,)}, AdapterError, "is empty"),
    ({"oft_blocks": (4, 8)}, TargetError, "not of 3 dimensions"),
    ({"oft_blocks": (4, 7, 7)}, TargetError, "does not make a rotation of the 32 outputs"),
    ({"oft_blocks": (3, 3, 8, 8)}, TargetError, "does not make a rotation"),
    ({"oft_blocks": (4, 4, 8, 8)}, TargetError, "does not make a rotation"),
    ({"oft_blocks": (4, 8, 8), "rescale": (31, 1)}, TargetError, r"rescale' is \[31, 1\], not \[32, 1\]"),
    ({"rescale": (32, 1)}, AdapterError, "has no lycoris_oft_blocks"),
    ({"weight": (31,), "on_input": ()}, TargetError, r"is \[31\], not \[32\]"),
    ({"a1.weight": (32, 2), "a2.weight": (2, 32), "b1.weight": (32, 2)}, AdapterError, "has no lycoris_b2.weight"),
    (
        {"a1.weight": (32, 2), "a2.weight": (2, 32), "b1.weight": (31, 2), "b2.weight": (2, 32)},
        TargetError,
        "do not fit layers.0.square.weight",
    ),
]


@pytest.mark.parametrize(("shapes", "kind", "words"), BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_files_that_do_not_fit(
    shapes: dict[str, tuple[int, ...]], kind: type[Exception], words: str, base: Path
) -> None:
    with pytest.raises(kind, match=words):
        folded(base, {f"lora_te_{SQUARE}.{name}": torch.ones(shape) for name, shape in shapes.items()})


def test_a_bias_that_the_base_does_not_have(base: Path) -> None:
    with pytest.raises(TargetError, match=r"layers.0.narrow has no bias in the base, and .*diff_b' adds to it"):
        folded(base, {"lora_te_layers_0_narrow.diff_b": torch.ones(32)})


def test_a_difference_that_is_broken(base: Path) -> None:
    broken = drawn(32, 32)
    broken[31, 31] = torch.inf
    with pytest.raises(AdapterError, match="diff' holds NaN or infinite values"):
        folded(base, {f"lora_te_{SQUARE}.diff": broken})


def test_other_verbs(base: Path, tmp_path: Path) -> None:
    file, lora = tmp_path / "file.safetensors", tmp_path / "lora.safetensors"
    blocks = {f"lora_te_{SQUARE}.oft_blocks": drawn(4, 8, 8)}
    exact = folded(base, blocks)["layers.0.square.weight"]
    with pytest.raises(UnsupportedAdapter, match=r"holds what PEFT has no form for \(LYCORIS\)"):
        convert(file, tmp_path / "peft", to="peft", base=base)
    convert(file, tmp_path / "plain", to="peft", plain=True, rank=32, base=base)
    assert float((merged_tensors(base, tmp_path / "plain")["layers.0.square.weight"] - exact).abs().max()) <= 2e-6
    save_file({f"lora_te_{SQUARE}.{name}": drawn(*shape) for name, shape in LORA.items()}, lora)
    with pytest.raises(UsageError, match="names modules without dots"):
        combine([lora, lora], tmp_path / "none")
    combine([lora, file], tmp_path / "both", base=base, rank=32)
    weights = [
        make_net().state_dict()["layers.0.square.weight"],
        exact,
        merged_tensors(base, lora)["layers.0.square.weight"],
    ]
    both = merged_tensors(base, tmp_path / "both")["layers.0.square.weight"]
    assert float((both - (weights[1] + weights[2] - weights[0])).abs().max()) <= 5e-6
    assert inspect(lora).method == "LORA"
    assert load_adapter(file).config.peft_type == "LYCORIS"
