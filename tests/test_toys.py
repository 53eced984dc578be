"""What one has to touch for a new method, codec, architecture, server, verb, rule, option or format: a toy of each is added to
a copy of the package, in the files that `docs/architecture.md` names, and run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import edit_config, plain_adapter, plain_base, read_tensors
from safetensors.torch import load_file, save_file
from warm import WarmProcesses

import adapterkit

PACKAGE = Path(adapterkit.__file__).parent
PAGE = Path(__file__).parents[1] / "docs/architecture.md"


class Copy:
    """A copy of the package that toys are put into."""

    def __init__(self, folder: Path, processes: WarmProcesses) -> None:
        self.folder, self.touched, self.processes = folder, set[str](), processes
        shutil.copytree(PACKAGE, folder / "adapterkit")  # with what Python compiled, as nearly all stays as it was

    def add(self, name: str, text: str) -> None:
        """A new file."""
        path = self.folder / "adapterkit" / name
        assert not path.exists()
        path.write_text(text)
        self.touched.add(name)

    def insert(self, name: str, before: str, text: str) -> None:
        """Text into a file, before the one place where ``before`` stands."""
        path = self.folder / "adapterkit" / name
        old = path.read_text()
        assert old.count(before) == 1, (name, before, old.count(before))
        path.write_text(old.replace(before, text + before))
        self.touched.add(name)

    def run(self, *arguments: Any, code: int = 0) -> str:
        """Run the command line of the copy."""
        done = self.processes.package("adapterkit", [*map(str, arguments)], self.folder)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path: Path, warm: WarmProcesses) -> Copy:
    return Copy(tmp_path, warm)


def said(what: str) -> int:
    """How many files the page says."""
    found = re.search(rf"^\| {re.escape(what)} \| (\d) \|", PAGE.read_text(), re.MULTILINE)
    assert found is not None, what
    return int(found[1])


def inputs(folder: Path) -> tuple[Path, Path]:
    base = plain_base(folder / "base")
    return base, plain_adapter(folder / "adapter", base)


def test_an_option_of_a_merge(copy: Copy) -> None:
    base, adapter = inputs(copy.folder)
    copy.insert(
        "requests/merge.py",
        "    full_record: bool = field(\n",
        "    toy: float = field(\n        default=1.0,\n        kw_only=True,\n"
        '        metadata=opt("A toy.", "number", role=VALUES, group=OUTPUT, recipe="output.toy"),\n    )\n',
    )
    copy.insert(
        "verbs/merge.py",
        "    return Merge(asked, opened,",
        "    loaded = tuple(replace(a, notes=(*a.notes, f'toy {asked.toy:g}')) for a in loaded)\n"
        "    opened = replace(opened, notes=(*opened.notes, f'toy {asked.toy:g}'))\n",
    )
    assert "toy 3" in copy.run("merge", base, adapter, "-o", "one", "--toy", "3")
    assert json.loads((copy.folder / "one/adapterkit.json").read_text())["operation"]["parameters"]["toy"] == 3
    (copy.folder / "adapterkit.toml").write_text(
        'base = "base"\nadapters.a = "adapter"\noutputs.two = {path = "two", toy = 3.0}\n'
    )
    copy.run("build")
    assert (copy.folder / "two/adapterkit.json").read_bytes() == (copy.folder / "one/adapterkit.json").read_bytes()
    assert "--toy FLOAT" in copy.run("merge", "--help")
    assert len(copy.touched) == said("an option of a merge")


def test_a_verb(copy: Copy) -> None:
    copy.add(
        "cli/toy.py",
        '"""`adapterkit toy`"""\n\nimport click\n\nfrom adapterkit.cli.output import say\n\n\n'
        '@click.command(name="toy")\ndef command() -> None:\n    """Say it."""\n    say("a toy")\n',
    )
    copy.insert("cli/__init__.py", '        "demo": Verb(', '        "toy": Verb("adapterkit.cli.toy", "Be a toy."),\n')
    assert "a toy" in copy.run("toy")
    assert "Be a toy." in copy.run("--help")
    assert len(copy.touched) == said("a verb")


def test_a_server(copy: Copy) -> None:
    base, adapter = inputs(copy.folder)
    text = (PACKAGE / "serving/servers/tgi.py").read_text().replace('"tgi"', '"toyserve"')
    copy.add("serving/servers/toyserve.py", text)
    edit_config(adapter, use_rslora=True)
    copy.run("check", base, adapter, "--for", "toyserve")
    assert "toyserve" in copy.run("check", base, adapter, "--for", "nothing", code=2)
    assert len(copy.touched) == said("a server")


def test_a_combination_rule(copy: Copy) -> None:
    base, adapter = inputs(copy.folder)
    copy.insert(
        "ops/rules/elementwise.py",
        '@rule(paper="2306.01708", space="dense")\ndef ties(',
        '@rule(paper="none", space="dense")\ndef toy(deltas: Sequence[DeltaRows], *, density: Density = 0.2) -> DeltaRows:\n'
        '    """Twice the first delta."""\n    return _streamed(deltas, lambda rows, _: 2 * rows[0])\n\n\n',
    )
    copy.run("merge", base, adapter, "-o", "toy", "--method", "toy", "--dtype", "f32")
    copy.run("merge", base, adapter, "-o", "twice", "--weight", "2", "--dtype", "f32")
    one, other = read_tensors(copy.folder / "toy"), read_tensors(copy.folder / "twice")
    assert all(torch.allclose(one[name].float(), other[name].float(), atol=1e-6) for name in other)
    assert "toy" in copy.run("merge", "--methods")
    assert len(copy.touched) == said("a combination rule")


def test_an_adapter_method(copy: Copy) -> None:
    base, adapter = inputs(copy.folder)
    text = (PACKAGE / "adapters/methods/adalora.py").read_text()
    copy.add("adapters/methods/toy.py", text.replace('"ADALORA"', '"TOY"').replace("start + 1e-5", "2 * start"))
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors |= {
        key.replace("lora_A.weight", "lora_E"): torch.ones(len(one), 1)
        for key, one in tensors.items()
        if key.endswith("lora_A.weight")
    }
    save_file({key.removesuffix(".weight"): one for key, one in tensors.items()}, file)
    edit_config(adapter, peft_type="TOY", init_r=4, target_r=4)
    copy.run("merge", base, adapter, "-o", "toy", "--allow-unknown")
    assert read_tensors(copy.folder / "toy").keys() == read_tensors(base).keys()
    assert len(copy.touched) == said("an adapter method")


CODEC = '''"""A toy: whole numbers that are thirds."""

from adapterkit.codecs.codec import Codec, Weight
from adapterkit.dtypes import F32


def find(parts, config):
    for name in sorted(parts):
        if name.endswith(".thirds"):
            yield weight(name.removesuffix(".thirds"), parts[name])


def weight(stem, part):
    def load():
        return lambda start, stop: part.read(start, stop).float() / 3

    return Weight(f"{stem}.weight", part.shape, F32, (part,), "thirds", 1, load)


CODEC = Codec("toy", ("toy",), (".thirds",), find, True, "nowhere", what="a toy", test="none")
'''


def test_a_codec_that_is_read(copy: Copy) -> None:
    base, adapter = inputs(copy.folder)
    tensors = read_tensors(base)
    name = "model.layers.0.self_attn.q_proj.weight"
    thirds = {name.replace(".weight", ".thirds"): (tensors.pop(name) * 3).round().to(torch.int8)}
    for shard in base.glob("*.safetensors*"):
        shard.unlink()
    save_file(tensors | thirds, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "toy"}}))
    copy.add("codecs/toy.py", CODEC)
    copy.run("convert", base, "--to", "f32", "-o", "plain")
    made = read_tensors(copy.folder / "plain")
    assert torch.equal(made[name], next(iter(thirds.values())).float() / 3)
    copy.run("merge", base, adapter, "-o", "merged")
    assert len(copy.touched) == said("a codec that is read")


def test_a_codec_that_is_written(copy: Copy) -> None:
    """Another word for int8 of bitsandbytes, by the functions of that."""
    base, adapter = inputs(copy.folder)
    copy.add(
        "codecs/toy.py",
        "from dataclasses import replace\n\nfrom adapterkit.codecs.bnb8 import BNB8\n\n"
        'KIND = replace(BNB8.kinds[0], name="toy8", what="a toy of eight bits")\n'
        'CODEC = replace(BNB8, name="toy", methods=("toy",), marks=(), find=lambda parts, config: iter(()), kinds=(KIND,))\n',
    )
    for word in ("toy8", "int8"):
        copy.run("merge", base, adapter, "-o", f"merged-{word}", "--quant", word)
        copy.run("convert", base, "--to", word, "-o", f"converted-{word}")
    assert "toy8" in copy.run("convert", "--help")
    assert "toy8" in copy.run("merge", "--help")
    for made in ("merged", "converted"):
        one, other = (read_tensors(copy.folder / f"{made}-{word}") for word in ("toy8", "int8"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in other)
    assert len(copy.touched) == said("a codec that is written")


def test_an_output_format_of_convert(copy: Copy) -> None:
    base, _ = inputs(copy.folder)
    copy.add(
        "verbs/conversions/toy.py",
        "from functools import partial\n\nfrom adapterkit.dtypes import F16\n"
        "from adapterkit.requests.formats import Format\n"
        "from adapterkit.verbs.conversions.folder import _plain\n\nplan = partial(_plain, F16)\n"
        'FORMAT = Format("toy", "toy:plan", "a toy", frozenset({"max_shard_size"}))\n',
    )
    assert "toy" in copy.run("convert", "--help")
    copy.run("convert", base, "--to", "toy", "-o", "toy")
    copy.run("convert", base, "--to", "f16", "-o", "f16")
    one, other = read_tensors(copy.folder / "toy"), read_tensors(copy.folder / "f16")
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert "--quant does not apply to --to toy" in copy.run(
        "convert", base, "--to", "toy", "-o", "x", "--quant", "Q8_0", code=2
    )
    assert len(copy.touched) == said("an output format of `convert`")


def test_an_architecture_of_gguf(copy: Copy) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    base = plain_base(copy.folder / "base")
    tensors = read_tensors(base)
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(base / "tokenizer.json"))
    width = tensors["model.embed_tokens.weight"].shape[1]
    tensors |= {name: torch.randn(len(letters), width) for name in tensors if name in EMBEDDINGS}
    tensors["model.norm.weight"] = torch.ones(width)
    for shard in base.glob("*.safetensors*"):
        shard.unlink()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text()) | {"vocab_size": len(letters)}
    config |= {"max_position_embeddings": 128, "rms_norm_eps": 1e-6}
    for word, row in (("llama", "LlamaForCausalLM"), ("toy", "ToyForCausalLM")):
        (base / "config.json").write_text(json.dumps(config | {"architectures": [row], "model_type": word}))
        if word == "toy":
            copy.insert(
                "gguf/arch/dense.py",
                '    ArchSpec("smollm3",',
                '    ArchSpec("llama", ("ToyForCausalLM",), "toy", _LLAMA, (VOCAB_SIZE, ROPE_DIM)),\n',
            )
        copy.run("convert", base, "-o", f"{word}.gguf", "--pre", "llama-bpe")
    assert (copy.folder / "toy.gguf").stat().st_size == (copy.folder / "llama.gguf").stat().st_size
    assert len(copy.touched) == said("an architecture of GGUF")


EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
