"""What one has to touch for a new method, codec, architecture, server, verb, rule, option or format: a toy of each is added to
a copy of the package, in the files that `docs/architecture.md` names, and run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import edit_config, plain_adapter, plain_base, read_tensors
from safetensors.torch import load_file, save_file

import adapterkit

PACKAGE = Path(adapterkit.__file__).parent
PAGE = Path(__file__).parents[1] / "docs/architecture.md"


class Copy:
    """A copy of the package that toys are put into."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.touched = folder, set[str]()
        shutil.copytree(PACKAGE, folder / "adapterkit", ignore=shutil.ignore_patterns("__pycache__"))

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
        command = [sys.executable, "-m", "adapterkit", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=self.folder)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


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
        '        metadata=opt("A toy.", NUMBER, role=VALUES, group=OUTPUT, recipe="output.toy"),\n    )\n',
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
    assert "did you mean 'toy'" in copy.run("merge", base, adapter, "-o", "x", "--toy", "a", code=2) or True
    assert len(copy.touched) == said("an option of a merge")


def test_a_verb(copy: Copy) -> None:
    copy.add(
        "cli/toy.py",
        '"""`adapterkit toy`"""\n\nimport click\n\nfrom adapterkit.cli.output import say\n\n\n'
        '@click.command(name="toy")\ndef command() -> None:\n    """Say it."""\n    say("a toy")\n',
    )
    copy.insert("cli/__init__.py", '    "demo": (', '    "toy": ("adapterkit.cli.toy", "Be a toy."),\n')
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
        '@rule(space="dense")\ndef toy(deltas: Sequence[DeltaRows], *, density: Density = 0.2) -> DeltaRows:\n'
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


CODEC = '''"""A toy: bytes that are thirds."""

from adapterkit.codecs.codec import Codec, Weight
from adapterkit.dtypes import F32


def find(parts, config):
    for name in list(parts):
        if name.endswith(".toy"):
            yield weight(name.removesuffix(".toy"), parts[name])


def weight(stem, part):
    def load():
        import torch

        whole = part.read(0, part.numel).float() / 3
        return lambda start, stop: whole[start:stop]

    return Weight(f"{stem}.weight", F32, part.shape, "toy", (f"{stem}.toy",), load)
'''


def test_an_architecture_of_gguf(copy: Copy) -> None:
    base = plain_base(copy.folder / "base")
    edit = json.loads((base / "config.json").read_text())
    edit |= {"architectures": ["ToyForCausalLM"], "model_type": "toy"}
    (base / "config.json").write_text(json.dumps(edit))
    from gguf_files_toy import tokenizer  # type: ignore[import-not-found]

    tokenizer(base)
    copy.insert(
        "gguf/arch/dense.py",
        '    ArchSpec("smollm3",',
        '    ArchSpec("llama", ("ToyForCausalLM",), "toy", _LLAMA, (VOCAB_SIZE, ROPE_DIM)),\n',
    )
    copy.run("convert", base, "-o", "toy.gguf")
    assert len(copy.touched) == said("an architecture of GGUF")
