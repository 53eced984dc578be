"""What users script: a name and other metadata, types from a file, parts of an importance matrix, several types at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("gguf")
import arch_zoo as zoo
from gguf_runtime import lora
from models import make_adapter

import adapterkit
from adapterkit.errors import NotFound, OutputError, UsageError
from adapterkit.verbs.convert import convert

gguf = pytest.importorskip("gguf")
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(autouse=True)
def _vocab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterkit.gguf.vocab.read_vocab", zoo.read_vocab)


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A llama whose matrices hold whole super-blocks."""
    from dataclasses import replace

    zoo.ZOO["llama_256"] = replace(zoo.ZOO["llama"], config={**zoo.ZOO["llama"].config, **WIDE})
    zoo.build(tmp_path / "hf", "llama_256")
    return tmp_path / "hf"


def key(file: Path, name: str) -> Any:
    field = gguf.GGUFReader(file).fields.get(name)
    return None if field is None else field.contents()


def kinds(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}


def test_metadata_from_a_file_a_name_and_single_keys(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "said.json").write_text(
        json.dumps({"general.author": "A. N. Author", "general.name": "from the file", "general.tags": ["one", "two"]})
    )
    convert(
        hf,
        tmp_path / "o.gguf",
        metadata=tmp_path / "said.json",
        model_name="My Model",
        override_kv=[
            "llama.rope.freq_base=float:123.5",
            "llama.context_length=int:77",
            "own.flag=bool:true",
            "own.s=str:a:b",
        ],
    )
    for name, wanted in {
        "general.author": "A. N. Author",
        "general.name": "My Model",
        "general.tags": ["one", "two"],
        "llama.rope.freq_base": 123.5,
        "llama.context_length": 77,
        "own.flag": True,
        "own.s": "a:b",
    }.items():
        assert key(tmp_path / "o.gguf", name) == wanted, name
    convert(tmp_path / "o.gguf", tmp_path / "again.gguf", model_name="Another")
    assert key(tmp_path / "again.gguf", "general.name") == "Another"
    assert key(tmp_path / "again.gguf", "general.author") == "A. N. Author"
    adapter = make_adapter(tmp_path / "a", hf, lora(), scale=0.1)
    for number, base in enumerate((hf, tmp_path / "o.gguf")):
        adapterkit.merge(base, [adapter], tmp_path / f"m{number}.gguf", model_name="Merged")
        assert key(tmp_path / f"m{number}.gguf", "general.name") == "Merged"
    with pytest.raises(UsageError, match="folder"):
        adapterkit.merge(hf, [adapter], tmp_path / "folder", model_name="Merged")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("llama.x", "KEY=TYPE:VALUE"),
        ("llama.x=int:many", "is no int"),
        ("llama.x=int:-1", "is no int"),
        ("llama.x=bool:perhaps", "is no bool"),
        ("llama.x=list:1", "'list'"),
        ("general.architecture=str:llama", "what the file is"),
        ("split.count=int:3", "what the file is"),
    ],
)
def test_a_key_that_cannot_be_given_is_named(given: str, named: str, hf: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=named):
        convert(hf, tmp_path / "o.gguf", override_kv=given)
    assert not (tmp_path / "o.gguf").exists()


def test_a_file_of_metadata_that_is_none(hf: Path, tmp_path: Path) -> None:
    file = tmp_path / "said.json"
    with pytest.raises(NotFound):
        convert(hf, tmp_path / "o.gguf", metadata=file)
    for content, named in (
        ("{", "not JSON"),
        ("[1]", "not an object"),
        ('{"llama.x": 1}', "general"),
        ('{"general.x": {}}', "none"),
    ):
        file.write_text(content)
        with pytest.raises(UsageError, match=named):
            convert(hf, tmp_path / "o.gguf", metadata=file)


def test_types_from_a_file(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "types.txt").write_text("attn_v=Q8_0\nffn_down=Q6_K\n")
    convert(
        hf, tmp_path / "o.gguf", quant="Q4_K_S", tensor_type_file=tmp_path / "types.txt", tensor_types=["ffn_down=Q5_K"]
    )
    found = kinds(tmp_path / "o.gguf")
    assert found["blk.0.attn_v.weight"] == "Q8_0"
    assert found["blk.0.ffn_down.weight"] == "Q5_K"
    assert found["blk.0.attn_q.weight"] == "Q4_K"
    (tmp_path / "types.txt").write_text("attn_v\n")
    with pytest.raises(UsageError, match="REGEX=TYPE"):
        convert(hf, tmp_path / "no.gguf", quant="Q4_K_S", tensor_type_file=tmp_path / "types.txt")


def test_a_part_of_an_importance_matrix(hf: Path, tmp_path: Path) -> None:
    """Tensors that are left out come out as without a matrix, the others as with it."""
    import numpy as np

    writer = gguf.GGUFWriter(tmp_path / "imatrix.gguf", "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    generator = np.random.default_rng(0)
    for name in ("blk.0.attn_q.weight", "blk.0.attn_output.weight"):
        writer.add_tensor(f"{name}.in_sum2", generator.random((1, 256), dtype=np.float32) * 100)
        writer.add_tensor(f"{name}.counts", np.ones((1, 1), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    def data(**how: Any) -> dict[str, bytes]:
        convert(hf, tmp_path / "o.gguf", quant="Q4_K_S", force=True, **how)
        return {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(tmp_path / "o.gguf").tensors}

    q, out = "blk.0.attn_q.weight", "blk.0.attn_output.weight"
    matrix = tmp_path / "imatrix.gguf"
    without, whole = data(), data(imatrix=matrix)
    assert without[q] != whole[q]
    assert without[out] != whole[out]
    for how in ({"include_weights": "attn_q"}, {"exclude_weights": ["attn_output"]}):
        found = data(imatrix=matrix, **how)
        assert found[q] == whole[q]
        assert found[out] == without[out]
    with pytest.raises(UsageError, match="no tensor with 'attn_x'"):
        data(imatrix=matrix, include_weights="attn_x")
    with pytest.raises(UsageError, match="contradict"):
        data(imatrix=matrix, include_weights="attn_q", exclude_weights="attn_q")


@pytest.mark.parametrize("verb", ["convert", "merge"])
def test_several_types_in_one_pass(verb: str, hf: Path, tmp_path: Path) -> None:
    """Each file is the one that a run for it alone writes."""
    adapter = make_adapter(tmp_path / "a", hf, lora(), scale=0.1)

    def write(out: str, quant: str) -> Any:
        if verb == "convert":
            return convert(hf, tmp_path / out, quant=quant)
        return adapterkit.merge(hf, [adapter], tmp_path / out, quant=quant)

    report = write("o.gguf", "Q8_0,q5_k_m")
    beside = tmp_path / "o-Q5_K_M.gguf"
    assert f"written in the same pass: {beside} ({beside.stat().st_size:,} bytes)" in report.notes
    for name in ("Q8_0", "Q5_K_M"):
        write(f"alone-{name}.gguf", name)
        assert (tmp_path / f"o-{name}.gguf").read_bytes() == (tmp_path / f"alone-{name}.gguf").read_bytes()
    assert not (tmp_path / "o.gguf").exists()


def test_a_ladder_appears_whole_or_not_at_all(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "o-Q5_K_M.gguf").write_bytes(b"another")
    with pytest.raises(OutputError, match="o-Q5_K_M"):
        convert(hf, tmp_path / "o.gguf", quant="Q8_0,Q5_K_M")
    assert not (tmp_path / "o-Q8_0.gguf").exists()
    for quant, named in (("Q8_0,Q8_0", "twice"), ("Q8_0,", "twice or none"), ("Q8_0,Q9_X", "Q9_X")):
        with pytest.raises(UsageError, match=named):
            convert(hf, tmp_path / "p.gguf", quant=quant)
    assert not list(tmp_path.glob("p*"))
    with pytest.raises(UsageError, match="GGUF outputs"):
        convert(hf, tmp_path / "folder", to="hf", quant="Q8_0,Q5_K_M")


def test_a_ladder_is_a_plan_for_each_type(hf: Path, tmp_path: Path) -> None:
    """Each plan is carried out by itself, and gives the file that the pass of all gives."""
    from adapterkit.checkpoint.plan import Plan
    from adapterkit.verbs.execute import execute

    adapter = make_adapter(tmp_path / "a", hf, lora(), scale=0.1)
    adapterkit.merge(hf, [adapter], tmp_path / "o.gguf", quant="Q8_0,q4_0")
    adapterkit.merge(hf, [adapter], tmp_path / "o2.gguf", quant="Q8_0,q4_0", save_plan=tmp_path / "p.json")
    assert sorted(path.name for path in tmp_path.glob("p*")) == ["p-Q4_0.json", "p-Q8_0.json"]
    assert not list(tmp_path.glob("o2*"))
    for name in ("Q8_0", "Q4_0"):
        plan = Plan.from_json((tmp_path / f"p-{name}.json").read_bytes())
        execute(plan, tmp_path / f"done-{name}.gguf", part=0)
        execute(plan, tmp_path / f"done-{name}.gguf")
        assert (tmp_path / f"done-{name}.gguf").read_bytes() == (tmp_path / f"o-{name}.gguf").read_bytes()
    convert(hf, to="gguf", quant="Q8_0,Q4_0", save_plan=tmp_path / "c.json")
    assert len(list(tmp_path.glob("c-*.json"))) == 2


LADDER = """\
base = "hf"
adapters = {one = "a"}

[outputs.all]
path = "all.gguf"
quant = "Q8_0,q4_0"

[outputs.plain]
path = "plain.gguf"
dtype = "f32"

[outputs.again]
path = "again.gguf"
quant = "Q8_0,Q4_0"
from = "plain"
yes-lossy = true
"""


def test_a_ladder_in_a_recipe_is_an_output_for_each_type(hf: Path, tmp_path: Path) -> None:
    from adapterkit.errors import RecipeError
    from adapterkit.recipe.run import build, plan_build

    assert hf == tmp_path / "hf"
    adapter = make_adapter(tmp_path / "a", hf, lora(), scale=0.1)
    (tmp_path / "adapterkit.toml").write_text(LADDER)
    plan = plan_build(tmp_path)
    assert [row.name for row in plan.outputs] == ["all-Q8_0", "all-Q4_0", "plain", "again-Q8_0", "again-Q4_0"]
    report = build(tmp_path)
    assert report.passes == 2  # one over the base, one over the float32 file
    adapterkit.merge(hf, [adapter], tmp_path / "o.gguf", quant="Q8_0,Q4_0")
    for name in ("Q8_0", "Q4_0"):
        assert (tmp_path / f"all-{name}.gguf").read_bytes() == (tmp_path / f"o-{name}.gguf").read_bytes()
        assert (tmp_path / f"again-{name}.gguf").is_file()
    assert build(tmp_path).passes == 0
    for line, said, words in (
        ('quant = "Q8_0,Q8_0"', 'quant = "Q8_0,q4_0"', "adapterkit.toml:6.*twice or none"),
        ('path = "all.gguf"\nregister = "x"', 'path = "all.gguf"', "adapterkit.toml:6.*'register' is of one file"),
        ('path = "all"', 'path = "all.gguf"', "for GGUF outputs"),
        ("[outputs.all-Q8_0]", "[outputs.plain]", "there is an output 'all-Q8_0' already"),
    ):
        (tmp_path / "adapterkit.toml").write_text(LADDER.replace(said, line))
        with pytest.raises(RecipeError, match=words):
            plan_build(tmp_path)
