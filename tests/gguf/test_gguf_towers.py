"""Projectors (mmproj): a real llama.cpp makes of an image, or of a sound, what transformers makes of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")
import tower_zoo as zoo
from gguf_files import random_array, write_gguf
from gguf_runtime import far
from models import load_model, make_adapter
from mtmd_c import seen

import adapterkit
from adapterkit.errors import CheckpointError, TargetError, UsageError
from adapterkit.verbs.convert import convert

CLOSE = 2e-3  # ggml takes GELU from a table and convolves in half precision
FAST = ("gemma3", "qwen2_vl")


@pytest.fixture(autouse=True)
def _vocab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterkit.gguf.vocab.read_vocab", zoo.read_vocab)


def of_runtime(text: Path, projector: Path, kind: str) -> Any:
    """What llama.cpp makes of `zoo.media`, without what ends rows of an image (Pixtral)."""
    import numpy as np

    found = seen(text, projector, **zoo.media(kind))[0]
    if kind not in ("pixtral", "mistral3"):
        return found
    across = round((len(found) + 1) ** 0.5 - 0.5)
    return np.stack([row for number, row in enumerate(found) if (number + 1) % (across + 1)])


@pytest.mark.parametrize("kind", [k if k in FAST else pytest.param(k, marks=pytest.mark.slow) for k in zoo.MODELS])
def test_the_runtime_sees_what_transformers_sees(kind: str, tmp_path: Path) -> None:
    wanted = zoo.expected(zoo.build(tmp_path / "hf", kind), kind)
    convert(tmp_path / "hf", tmp_path / "text.gguf")
    convert(tmp_path / "hf", tmp_path / "mmproj.gguf", to="mmproj")
    found = of_runtime(tmp_path / "text.gguf", tmp_path / "mmproj.gguf", kind)
    assert found.shape == wanted.shape
    assert far(found, wanted) < CLOSE


@pytest.mark.parametrize("kind", zoo.MODELS)
def test_every_tower_converts_to_what_the_runtime_loads(kind: str, tmp_path: Path) -> None:
    """Names, shapes and the keys that every tower has; the figures are those above."""
    import gguf

    zoo.build(tmp_path / "hf", kind)
    report = convert(tmp_path / "hf", tmp_path / "mmproj.gguf", to="mmproj")
    reader = gguf.GGUFReader(tmp_path / "mmproj.gguf")
    assert reader.fields["general.architecture"].contents() == "clip"
    assert reader.fields["general.type"].contents() == "mmproj"
    side = "audio" if kind == "qwen2_audio" else "vision"
    assert reader.fields[f"clip.has_{side}_encoder"].contents() is True
    assert reader.fields[f"clip.{side}.projection_dim"].contents() == 64
    assert report.tensors == len(reader.tensors)


def test_types(tmp_path: Path) -> None:
    import gguf

    zoo.build(tmp_path / "hf", "gemma3")
    for asked, wanted in (({"dtype": "f16"}, "F16"), ({"dtype": "bf16"}, "BF16"), ({"quant": "Q8_0"}, "Q8_0")):
        convert(tmp_path / "hf", tmp_path / "o.gguf", to="mmproj", force=True, **asked)
        kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "o.gguf").tensors}
        assert kinds["v.blk.0.attn_q.weight"] == wanted
        assert kinds["v.blk.0.ln1.weight"] == "F32"
        assert kinds["v.position_embd.weight"] == "F32"
        assert kinds["v.patch_embd.weight"] == ("F16" if wanted == "F16" else "F32")


def test_what_lacks_is_named(tmp_path: Path) -> None:
    zoo.build(tmp_path / "hf", "gemma3")
    (tmp_path / "hf" / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="image_mean"):
        convert(tmp_path / "hf", tmp_path / "no.gguf", to="mmproj")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(TargetError, match="tower of a LlamaForCausalLM"):
        convert(tmp_path / "hf", tmp_path / "no.gguf", to="mmproj")
    (tmp_path / "hf" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "vision_config"}))
    with pytest.raises(CheckpointError, match="vision_config"):
        convert(tmp_path / "hf", tmp_path / "no.gguf", to="mmproj")
    assert not (tmp_path / "no.gguf").exists()


def test_a_gguf_file_has_no_tower(tmp_path: Path) -> None:
    zoo.build(tmp_path / "hf", "gemma3")
    convert(tmp_path / "hf", tmp_path / "text.gguf")
    with pytest.raises(UsageError, match="holds no tower"):
        convert(tmp_path / "text.gguf", tmp_path / "no.gguf", to="mmproj")


def test_uneven_attention_of_qwen2_5_is_refused(tmp_path: Path) -> None:
    zoo.build(tmp_path / "hf", "qwen2_5_vl")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["vision_config"]["fullatt_block_indexes"] = [0, 3]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(TargetError, match="fullatt_block_indexes"):
        convert(tmp_path / "hf", tmp_path / "no.gguf", to="mmproj")


def of_tensors(file: Path) -> dict[str, bytes]:
    """The data of every tensor, by the gguf package."""
    import gguf

    return {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(file).tensors}


def adapter_of_both(folder: Path, base: Path) -> Path:
    """A LoRA on projections of the language model and of the tower."""
    from peft import LoraConfig

    return make_adapter(
        folder, base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "fc2"]), scale=0.5
    )


def test_a_merge_makes_the_tower_beside_it(tmp_path: Path) -> None:
    """The change on the tower goes into its file, that on the text into the other, in one pass."""
    from peft import PeftModel

    hf = tmp_path / "hf"
    plain = zoo.expected(zoo.build(hf, "gemma3"), "gemma3")
    adapter = adapter_of_both(tmp_path / "adapter", hf)
    trained = PeftModel.from_pretrained(load_model(hf), adapter).float().eval()
    wanted = zoo.expected(trained.base_model.model, "gemma3")
    assert far(wanted, plain) > 10 * CLOSE
    alone = adapterkit.merge(hf, [adapter], tmp_path / "text.gguf")
    assert any("vision" in note or "left out" in note for note in alone.notes)
    adapterkit.merge(hf, [adapter], tmp_path / "merged.gguf", mmproj="auto")
    found = of_runtime(tmp_path / "merged.gguf", tmp_path / "mmproj-merged.gguf", "gemma3")
    assert far(found, wanted) < CLOSE
    adapterkit.merge(hf, [adapter], tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "of-folder.gguf")
    assert of_tensors(tmp_path / "of-folder.gguf") == of_tensors(tmp_path / "merged.gguf")
    assert sorted(path.name for path in tmp_path.glob("*merged*.gguf")) == ["merged.gguf", "mmproj-merged.gguf"]


def test_both_or_neither(tmp_path: Path) -> None:
    """A tower's file that is there already stops the merge before its first byte."""
    from adapterkit.errors import OutputError

    zoo.build(tmp_path / "hf", "gemma3")
    adapter = adapter_of_both(tmp_path / "adapter", tmp_path / "hf")
    (tmp_path / "mmproj-merged.gguf").write_bytes(b"another")
    with pytest.raises(OutputError, match="mmproj-merged"):
        adapterkit.merge(tmp_path / "hf", [adapter], tmp_path / "merged.gguf", mmproj="auto")
    assert not (tmp_path / "merged.gguf").exists()
    with pytest.raises(UsageError, match="beside a GGUF file"):
        adapterkit.merge(tmp_path / "hf", [adapter], tmp_path / "folder", mmproj="auto")


def test_a_conversion_makes_it_too(tmp_path: Path) -> None:
    zoo.build(tmp_path / "hf", "gemma3")
    convert(tmp_path / "hf", tmp_path / "o.gguf", mmproj="auto")
    convert(tmp_path / "hf", tmp_path / "alone.gguf", to="mmproj")
    assert (tmp_path / "mmproj-o.gguf").read_bytes() == (tmp_path / "alone.gguf").read_bytes()
    with pytest.raises(UsageError, match="tower"):
        convert(tmp_path / "o.gguf", tmp_path / "again.gguf", mmproj="auto")


def test_a_saved_plan_keeps_what_stands_beside(tmp_path: Path) -> None:
    """A tower, a server's file and a statement are no part of the bytes; a plan of parts makes them all the same."""
    from adapterkit.checkpoint.plan import Plan
    from adapterkit.errors import OutputError
    from adapterkit.verbs.execute import OpenPlan, execute

    hf, plan_file, places = tmp_path / "hf", tmp_path / "p.json", {}
    zoo.build(hf, "gemma3")
    adapter = adapter_of_both(tmp_path / "adapter", hf)
    for name in ("whole", "parts"):
        places[name] = tmp_path / name
        places[name].mkdir()
    given: dict[str, Any] = {"mmproj": "auto", "server": "ollama", "attest": True}
    adapterkit.merge(hf, [adapter], places["whole"] / "m.gguf", **given)
    adapterkit.merge(hf, [adapter], places["parts"] / "m.gguf", **given, save_plan=plan_file)
    plan = Plan.from_json(plan_file.read_text())
    opened = OpenPlan(plan, places["parts"] / "m.gguf", 60_000)
    assert len(opened.parts) > 1
    for part in opened.parts:
        opened.execute(part.index)
    opened.finish()
    found = {name: {path.name: path.read_bytes() for path in place.iterdir()} for name, place in places.items()}
    assert set(found["whole"]) == {
        *("m.gguf", "m.gguf.Modelfile", "m.gguf.adapterkit.json"),
        *("m.gguf.adapterkit.intoto.json", "mmproj-m.gguf"),
    }
    assert found["parts"] == found["whole"]
    # One part, whose note in the hidden folder ends like the file: the record is the same, and so is the statement.
    execute(plan, tmp_path / "one.gguf", part=0)
    execute(plan, tmp_path / "one.gguf")
    assert (tmp_path / "one.gguf.adapterkit.json").read_bytes() == found["whole"]["m.gguf.adapterkit.json"]
    assert (tmp_path / "one.gguf.adapterkit.intoto.json").exists()
    (tmp_path / "mmproj-no.gguf").write_bytes(b"another")
    with pytest.raises(OutputError, match="mmproj-no"):
        OpenPlan(plan, tmp_path / "no.gguf").check()
    with pytest.raises(UsageError, match="min_cosine= is measured"):
        adapterkit.merge(hf, [adapter], tmp_path / "no.gguf", min_cosine=0.5, save_plan=tmp_path / "q.json")


def test_a_tower_of_an_end_that_was_cut_off_is_this_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the tower's name and the output's, the end is made again."""
    from adapterkit.checkpoint import parts
    from adapterkit.checkpoint.plan import Plan
    from adapterkit.verbs.execute import OpenPlan

    zoo.build(tmp_path / "hf", "gemma3")
    convert(tmp_path / "hf", tmp_path / "o.gguf", mmproj="auto", save_plan=tmp_path / "p.json")
    plan = Plan.from_json((tmp_path / "p.json").read_text())

    def gone(*given: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(parts, "finish", gone)
        first = OpenPlan(plan, tmp_path / "o.gguf")
        first.execute(0)
        first.finish()
    assert [path.name for path in tmp_path.glob("*.gguf")] == ["mmproj-o.gguf"]
    again = OpenPlan(plan, tmp_path / "o.gguf")
    again.check()
    again.finish()
    assert sorted(path.name for path in tmp_path.glob("*.gguf")) == ["mmproj-o.gguf", "o.gguf"]


def test_a_recipe_makes_the_tower_beside(tmp_path: Path) -> None:
    from adapterkit.recipe.report import UNCHANGED
    from adapterkit.recipe.run import build

    hf = tmp_path / "hf"
    zoo.build(hf, "qwen2_vl")
    text = f'base = "{hf}"\n[adapters]\na = "{tmp_path / "adapter"}"\n[outputs.m]\npath = "build/m.gguf"\nmmproj = "auto"\n'
    make_adapter(tmp_path / "adapter", hf, _tower_lora(), scale=0.1)
    path = tmp_path / "work" / "adapterkit.toml"
    path.parent.mkdir()
    path.write_text(text)
    report = build(path)
    assert "mmproj-m.gguf" in report.outputs[0].files
    adapterkit.merge(hf, [tmp_path / "adapter"], tmp_path / "by-hand.gguf", mmproj="auto")
    made = (path.parent / "build/mmproj-m.gguf").read_bytes()
    assert made == (tmp_path / "mmproj-by-hand.gguf").read_bytes()
    assert build(path).outputs[0].state == UNCHANGED
    path.write_text(text.replace('mmproj = "auto"\n', ""))
    assert build(path).changed == 1


def test_a_projector_of_another_model_is_refused(tmp_path: Path) -> None:
    """By its width, as llama.cpp refuses to load it, or by the one architecture that it was trained with; at every door."""
    from adapterkit.checkpoint.plan import Plan
    from adapterkit.errors import OutputError
    from adapterkit.recipe.run import build
    from adapterkit.verbs.execute import execute

    hf, base, out = tmp_path / "hf", tmp_path / "base.gguf", tmp_path / "made" / "o.gguf"
    out.parent.mkdir()
    zoo.build(hf, "qwen2_vl")
    convert(hf, base)
    adapter = make_adapter(tmp_path / "adapter", hf, _tower_lora(), scale=0.1)

    def projector(name: str, kind: str, width: int, rows: int, **more: Any) -> Path:
        said = {"clip.projector_type": kind, "clip.vision.projection_dim": width, **more}
        tensors = {"mm.2.weight": random_array(rows, 48), "v.patch_embd.weight": random_array(64, 48)}
        return write_gguf(tmp_path / name, tensors, arch="clip", metadata=said)

    new = {"general.type": "mmproj"}
    wide = projector("wide.gguf", "qwen2vl_merger", 96, 96, **new)
    other = projector("other.gguf", "gemma3", 64, 64, **new)
    odd = projector("odd.gguf", "mlp", 96, 96)
    doors = (
        lambda file: adapterkit.merge(base, [adapter], out, mmproj=file),
        lambda file: adapterkit.merge(hf, [adapter], out, mmproj=file, dry_run=True),
        lambda file: adapterkit.merge(hf, [adapter], out, mmproj=file, save_plan=out.with_name("p.json")),
        lambda file: convert(hf, out, mmproj=file),
        lambda file: convert(base, out, quant="Q8_0", mmproj=file, max_shard_size="20kB"),
        lambda file: build(_recipe(tmp_path, f'mmproj = "{file}"')),
    )
    for door in doors:
        with pytest.raises(UsageError, match=r"wide.gguf is the projector of a model of width 96, and the base has 64"):
            door(wide)
    with pytest.raises(UsageError, match=r"other.gguf is the projector of a gemma3, and the base is a qwen2vl"):
        doors[0](other)
    with pytest.raises(UsageError, match=r"odd.gguf is the projector of a model of width 96"):
        doors[0](odd)
    assert list(out.parent.iterdir()) == []
    # A saved plan asks again when it is finished, and replaces nothing that was there.
    good, plan_file = projector("later.gguf", "qwen2vl_merger", 64, 64, **new), tmp_path / "p.json"
    adapterkit.merge(base, [adapter], out, mmproj=good, save_plan=plan_file)
    plan = Plan.from_json(plan_file.read_text())
    (out.parent / "later.gguf").write_bytes(b"mine")
    execute(plan, out, part=0)
    with pytest.raises(OutputError, match=r"later.gguf exists"):
        execute(plan, out)
    (out.parent / "later.gguf").unlink()
    projector("later.gguf", "gemma3", 64, 64, **new)
    with pytest.raises(UsageError, match=r"later.gguf is the projector of a gemma3"):
        execute(plan, out)
    assert not out.exists()
    # Files of llama.cpp's first converters say the width of CLIP's own projection, and tensors that of the model.
    old = projector("old.gguf", "mlp", 768, 64)
    adapterkit.merge(base, [adapter], out, mmproj=old)
    assert (out.parent / "old.gguf").read_bytes() == old.read_bytes()


def _recipe(folder: Path, more: str) -> Path:
    path = folder / "adapterkit.toml"
    path.write_text(f'base = "base.gguf"\n[adapters]\na = "adapter"\n[outputs.m]\npath = "made/o.gguf"\n{more}\n')
    return path


def _tower_lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, target_modules=r".*(visual.*qkv|q_proj)")
