"""The hashes that a file's metadata state of it, beside sd-scripts' and ModelSpec's rules applied to what was written."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

import adapterkit
from adapterkit.checkpoint.hashes import fill, without_room
from adapterkit.checkpoint.header import HASHES, with_room
from adapterkit.checkpoint.plan import Plan, plan_file
from adapterkit.errors import OutputError

SAID = {
    "ss_base_model_version": "flux1",
    "ss_output_name": 'Häfen "a"\n',
    "ss_tag_frequency": '{"a": 1}',
    "modelspec.title": "mine",
    "other": "kept",
}
STALE = {"sshs_model_hash": "1", "sshs_legacy_hash": "2", "modelspec.hash_sha256": "0x3"}


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


def by_rule(file: Path) -> dict[str, str]:
    """The file's tensors saved again by safetensors with the training metadata alone, and hashed."""
    said = {name: value for name, value in metadata_of(file).items() if name.startswith("ss_")}
    data = save(load_file(file), said)
    behind = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    legacy = hashlib.sha256(data[1 << 20 : (1 << 20) + (1 << 16)]).hexdigest()[:8]
    return {"sshs_model_hash": behind, "sshs_legacy_hash": legacy, "modelspec.hash_sha256": f"0x{behind}"}


def lora(folder: Path, wide: int, dtype: torch.dtype = torch.float32, said: dict[str, str] = SAID | STALE) -> Path:
    torch.manual_seed(0)
    paths = [f"diffusion_model.double_blocks.0.{side}_attn.proj" for side in ("img", "txt")]
    tensors = {}
    for path in paths:
        tensors[f"{path}.lora_down.weight"] = torch.randn(4, wide).to(dtype)
        tensors[f"{path}.lora_up.weight"] = torch.randn(wide, 4).to(dtype)
        tensors[f"{path}.alpha"] = torch.tensor(2.0)
    save_file(tensors, folder / "lora.safetensors", said)
    return folder / "lora.safetensors"


@pytest.mark.parametrize(("to", "wide", "dtype"), [
    ("comfyui", 24_000, torch.float32),  # 1.5 MB: the legacy hash is of bytes of the tensors
    ("kohya", 36_000, torch.float16),  # alphas of another type are stored before the factors
    ("diffusers", 16, torch.float32),  # under 1 MiB the legacy hash is that of nothing
])  # fmt: skip
def test_a_converted_lora_states_its_own_hashes(to: str, wide: int, dtype: torch.dtype, tmp_path: Path) -> None:
    source, out = lora(tmp_path, wide, dtype), tmp_path / "out.safetensors"
    adapterkit.convert(source, out, to=to)
    said = metadata_of(out)
    assert {name: said[name] for name in HASHES} == by_rule(out)
    assert (said["ss_output_name"], said["other"]) == (SAID["ss_output_name"], "kept")
    adapterkit.convert(source, tmp_path / "again.safetensors", to=to)
    assert out.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_a_resized_lora_and_a_merge_in_parts_state_theirs(tmp_path: Path) -> None:
    out = tmp_path / "small.safetensors"
    adapterkit.resize(lora(tmp_path, 64), out, rank=2)
    assert {name: metadata_of(out)[name] for name in HASHES} == by_rule(out)
    names = [f"double_blocks.0.{side}_attn.proj.weight" for side in ("img", "txt")]
    base = tmp_path / "flux.safetensors"
    save_file(
        {name: torch.randn(64, 64) for name in names}, base, SAID | STALE | {"modelspec.hash_sha256": "0x" + "5" * 64}
    )
    merged, parted = tmp_path / "merged.safetensors", tmp_path / "parted.safetensors"
    adapterkit.merge(base, [out], merged)
    assert {name: metadata_of(merged)[name] for name in HASHES} == by_rule(merged)
    assert adapterkit.verify(merged, base=base, adapters=[out]).ok
    plan_path = tmp_path / "plan.json"
    adapterkit.merge(base, [out], parted, save_plan=plan_path)
    plan = adapterkit.Plan.from_json(plan_path.read_text())
    adapterkit.execute(plan, parted, part=0)
    adapterkit.execute(plan, parted)
    assert parted.read_bytes() == merged.read_bytes()


def test_what_a_file_does_not_say_is_not_made() -> None:
    assert with_room({"format": "pt"} | STALE) == {"format": "pt"}
    assert set(with_room({"modelspec.title": "a"})) == {"modelspec.title", "modelspec.hash_sha256"}
    assert set(with_room({"ss_seed": "1"})) == {"ss_seed", "sshs_model_hash", "sshs_legacy_hash"}


def test_a_plan_for_a_store_has_none(tmp_path: Path) -> None:
    from adapterkit.checkpoint.open import open_checkpoint

    view = open_checkpoint(lora(tmp_path, 16))
    made = plan_file("lora.safetensors", [*view.values()][:3], SAID)
    stripped = without_room(made)
    expected = plan_file("lora.safetensors", [*view.values()][:3], {"other": "kept", "format": "pt"})
    assert set(stripped.metadata) == set(SAID)
    assert stripped.files[0].steps[0].offset == len(stripped.header(stripped.files[0]))
    assert made.nbytes - stripped.nbytes == len(made.header(made.files[0])) - len(stripped.header(stripped.files[0]))
    assert without_room(expected) is expected


def test_a_file_that_ended_early_is_no_output(tmp_path: Path) -> None:
    from adapterkit.checkpoint.open import open_checkpoint

    view = open_checkpoint(lora(tmp_path, 16))
    made = plan_file("cut.safetensors", [*view.values()][:3], SAID)
    (tmp_path / "cut.safetensors").write_bytes(bytes(made.nbytes - 1))
    with pytest.raises(OutputError, match="not written to its end"):
        fill(made, tmp_path)


def test_a_run_that_is_killed_beside_its_hashes_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "flux.safetensors"
    names = [f"double_blocks.0.{side}_attn.proj.weight" for side in ("img", "txt")]
    save_file({name: torch.randn(64, 64) for name in names}, base, SAID)
    whole, out = tmp_path / "whole.safetensors", tmp_path / "out.safetensors"
    adapterkit.merge(base, [lora(tmp_path, 64)], whole)

    def before(plan: Plan, folder: Path) -> None:
        raise KeyboardInterrupt

    def after(plan: Plan, folder: Path) -> None:
        fill(plan, folder)
        raise KeyboardInterrupt

    for killed in (before, after):
        with monkeypatch.context() as patched:
            patched.setattr("adapterkit.checkpoint.write.fill", killed)
            with pytest.raises(KeyboardInterrupt):
                adapterkit.merge(base, [tmp_path / "lora.safetensors"], out, resume=True)
        assert not out.exists()
    report = adapterkit.merge(base, [tmp_path / "lora.safetensors"], out, resume=True)
    assert report.reused == 2
    assert out.read_bytes() == whole.read_bytes()
