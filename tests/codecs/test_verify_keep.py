"""`verify` of outputs in the base's own format: untouched weights are the base's bytes, touched ones within the format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stored_formats import FORMATS
from test_keep import OTHER, TOUCHED, adapter_of, base_of, shape_of

from adapterkit import check, merge, verify


def made(folder: Path, name: str, size: float = 0.02) -> tuple[Path, Path, Path]:
    base = base_of(folder, name)
    rows, columns = shape_of(base)
    tuned = adapter_of(folder, torch.randn(rows, 4, generator=torch.Generator().manual_seed(8)) * size, columns)
    merge(base, [tuned], folder / "out", quant="keep", yes_lossy=True)
    return base, tuned, folder / "out"


def change(out: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replace tensors of a finished output, or take them away."""
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        here = {name for name in change if name in tensors}
        if here:
            tensors.update({name: value for name in here if (value := change[name]) is not None})
            kept = {name: t.contiguous() for name, t in tensors.items() if name not in here or change[name] is not None}
            save_file(kept, file, metadata={"format": "pt"})
    (out / "adapterkit.json").unlink(missing_ok=True)
    index = out / "model.safetensors.index.json"
    for name, value in change.items():
        if value is None:
            import json

            found = json.loads(index.read_text())
            found["weight_map"].pop(name, None)
            index.write_text(json.dumps(found))


def kinds(report) -> set[str]:
    return {finding.kind for finding in report.findings if finding.severity in ("error", "warning")}


@pytest.mark.parametrize("name", FORMATS)
def test_what_merge_wrote_is_right(tmp_path: Path, name: str) -> None:
    base, tuned, out = made(tmp_path, name)
    report = verify(out, base=base, adapters=[tuned], level="tensors", min_retention=0.0)
    assert kinds(report) == set()
    assert report.ok
    level = report.tensors
    assert level.touched == 1
    assert level.untouched_equal == 3


def again(name: str, of: str, base: Path) -> dict[str, torch.Tensor]:
    """A weight quantized once more by its library, from its decoded values made a little larger."""
    from adapterkit.checkpoint.decoded import dequantized
    from adapterkit.checkpoint.open import open_checkpoint

    handle = dequantized(open_checkpoint(base))[f"{of}.weight"]
    w = handle.read_wide(0, handle.numel).view(handle.shape).float()
    return {f"{of}.{leaf}": tensor for leaf, tensor in FORMATS[name].encode(w * 1.003).items()}


@pytest.mark.parametrize("name", ["fp8 short blocks", "ct int4", "nf4", "gptq", "mlx"])
def test_untouched_weights_that_were_quantized_again(tmp_path: Path, name: str) -> None:
    base, tuned, out = made(tmp_path, name)
    change(out, dict(again(name, OTHER, base)))
    report = verify(out, base=base, adapters=[tuned], level="tensors", min_retention=0.0)
    assert kinds(report) == {"re-quantized"}
    assert not report.ok


@pytest.mark.parametrize(
    ("name", "leaf"), [("gptq", "qzeros"), ("awq", "qzeros"), ("ct int4 asym", "weight_zero_point")]
)
@pytest.mark.parametrize("module", [TOUCHED, OTHER])
def test_shifted_zero_points(tmp_path: Path, name: str, leaf: str, module: str) -> None:
    base, tuned, out = made(tmp_path, name)
    tensors = {n: t for file in out.glob("*.safetensors") for n, t in load_file(file).items()}
    zeros = tensors[f"{module}.{leaf}"]
    change(out, {f"{module}.{leaf}": zeros ^ 0x11111111})
    report = verify(out, base=base, adapters=[tuned], level="tensors", min_retention=0.0)
    assert kinds(report) == {"zero points shifted"}


def test_scales_that_are_gone(tmp_path: Path) -> None:
    base, tuned, out = made(tmp_path, "fp8 short blocks")
    change(out, {f"{OTHER}.weight_scale_inv": None})
    report = verify(out, base=base, adapters=[tuned], level="tensors", min_retention=0.0)
    assert kinds(report) == {"scales lost"}
    finding = next(one for one in report.findings if one.kind == "scales lost")
    assert finding.tensors == (f"{OTHER}.weight",)


def test_other_groups(tmp_path: Path) -> None:
    from stored_formats import compressed

    base, tuned, out = made(tmp_path, "ct int4")
    other = compressed("pack-quantized", (1, 64), num_bits=4, type="int", strategy="group", group_size=64)
    from adapterkit.checkpoint.decoded import dequantized
    from adapterkit.checkpoint.open import open_checkpoint

    handle = dequantized(open_checkpoint(base))[f"{OTHER}.weight"]
    w = handle.read_wide(0, handle.numel).view(handle.shape).float()
    change(out, {f"{OTHER}.{leaf}": tensor for leaf, tensor in other.encode(w).items()})
    report = verify(out, base=base, adapters=[tuned], level="tensors", min_retention=0.0)
    assert "other group size" in kinds(report)


@pytest.mark.parametrize("name", ["fp8 short blocks", "ct nvfp4", "nf4 double", "awq"])
def test_a_merge_that_was_not_applied(tmp_path: Path, name: str) -> None:
    base, tuned, out = made(tmp_path, name)
    before = {n: t for file in base.glob("*.safetensors") for n, t in load_file(file).items()}
    change(out, {n: t for n, t in before.items() if n.startswith(TOUCHED)})
    report = verify(out, base=base, adapters=[tuned], level="tensors", min_retention=0.0)
    assert "not applied" in kinds(report)


def test_weights_that_left_the_grid(tmp_path: Path) -> None:
    base = base_of(tmp_path, "fp8 short blocks")
    rows, columns = shape_of(base)
    tuned = adapter_of(tmp_path, torch.full((rows, 4), 0.01), columns)
    merge(base, [tuned], tmp_path / "out", quant="keep", keep_touched="bf16")
    report = verify(tmp_path / "out", base=base, adapters=[tuned])
    assert kinds(report) == set()
    assert report.ok


def test_check_measures_what_merge_would_write(tmp_path: Path) -> None:
    """The same figures without an output; a limit that does not hold fails it as it fails the merge."""
    base = base_of(tmp_path, "ct int4")
    rows, columns = shape_of(base)
    tuned = adapter_of(tmp_path, torch.randn(rows, 4, generator=torch.Generator().manual_seed(8)) * 0.005, columns)
    grids: tuple[dict[str, Any], ...] = ({"quant": "keep", "yes_lossy": True}, {"quant": "nf4", "yes_lossy": True})
    for asked in (*grids, {}):
        written = merge(base, [tuned], tmp_path / "out", fidelity=True, force=True, **asked)
        assert written.fidelity is not None
        least = written.fidelity.cosine
        more = min(1.0, least + 1e-4)
        good = check(base, [tuned], min_cosine=least - 1e-4, **asked)
        bad = check(base, [tuned], min_cosine=more, max_dead=0, **asked)
        assert good.ok
        assert next(one.message for one in good.findings if one.code == "fidelity") == written.fidelity.summary
        assert (bad.ok, bad.exit_code) == (False, 3)
        assert any(f"less than {more:g}" in one.message for one in bad.findings if one.code == "lost")
    (tmp_path / "small").mkdir()
    small = adapter_of(tmp_path / "small", torch.full((rows, 4), 1e-5), columns)
    stopped = check(base, [small], quant="keep")  # as the merge stops where nobody insists
    assert stopped.exit_code == 3
    assert any("of this change" in one.message for one in stopped.findings if one.level == "error")
