"""Quantized bases that are not what they say: at the command line one sentence and an exit code, and nothing is written."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_as_trained import adapter, model, saved_quantized
from test_gptq import gptq
from test_hqq import CONFIG as HQQ
from test_hqq import hqq
from test_torchao import CONFIG as TORCHAO
from test_torchao import tensors as torchao

from adapterkit.checkpoint.decoded import dequantized
from adapterkit.checkpoint.open import open_checkpoint
from adapterkit.cli import main
from adapterkit.codecs.bnb4 import FourBit
from adapterkit.codecs.grid import Grid
from adapterkit.dtypes import BF16
from adapterkit.errors import AdapterkitError

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, the same in NF4 by transformers, and an adapter."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("made")
    model("llama").to(torch.bfloat16).save_pretrained(folder / "llama")
    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    saved_quantized(folder / "llama", folder / "nf4", torch.bfloat16, **how)
    adapter(folder / "adapter")
    return folder


def no_tensors(tensors: dict[str, torch.Tensor], config: dict[str, Any], plain: dict[str, torch.Tensor]) -> None:
    tensors.clear()
    tensors.update(plain)


def half(tensors: dict[str, torch.Tensor], config: dict[str, Any], plain: dict[str, torch.Tensor]) -> None:
    for end in (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4"):
        del tensors[Q + end]


def blocksize(tensors: dict[str, torch.Tensor], config: dict[str, Any], plain: dict[str, torch.Tensor]) -> None:
    key = f"{Q}.quant_state.bitsandbytes__nf4"
    text = bytes(tensors[key].tolist()).replace(b'"blocksize": 64', b'"blocksize": 65')
    tensors[key] = torch.tensor(list(text), dtype=torch.uint8)


def gptq_without_config(tensors: dict[str, torch.Tensor], config: dict[str, Any], plain: dict[str, Any]) -> None:
    tensors.clear()
    tensors.update(gptq(4, 1, 32, True)[0])
    del config["quantization_config"]


BAD = {
    "config without tensors": (no_tensors, "says bitsandbytes 4-bit or bitsandbytes int8, and no tensor is stored so"),
    "tensors without config": (gptq_without_config, "a part of GPTQ weights, and no quantization_config"),
    "truncated absmax": (lambda t, c, p: t.update({f"{Q}.absmax": t[f"{Q}.absmax"][:-1]}), "absmax' is [143]"),
    "no absmax": (lambda t, c, p: t.pop(f"{Q}.absmax"), "absmax' is missing"),
    "a block size that is none": (blocksize, "says blocks of 65, which bitsandbytes does not have"),
    "unknown scheme": (
        lambda t, c, p: c.update(quantization_config={"quant_method": "aqlm"}),
        "is quantized by 'aqlm', which adapterkit does not read; it reads auto-round, autoround, awq, bitsandbytes,",
    ),
    "half quantized": (half, f"is only partly bitsandbytes 4-bit or bitsandbytes int8: '{Q}'"),
    "another format's tensors": (
        lambda t, c, p: c.update(quantization_config={"quant_method": "gptq", "bits": 4}),
        "is only partly GPTQ",
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("verb", ["merge", "convert"])
def test_one_sentence_and_nothing_written(made: Path, tmp_path: Path, capsys, case: str, verb: str) -> None:
    change, sentence = BAD[case]
    tensors, config = load_file(made / "nf4/model.safetensors"), json.loads((made / "nf4/config.json").read_text())
    change(tensors, config, load_file(made / "llama/model.safetensors"))
    (tmp_path / "bad").mkdir()
    save_file(tensors, tmp_path / "bad/model.safetensors")
    (tmp_path / "bad/config.json").write_text(json.dumps(config))
    more = [made / "adapter"] if verb == "merge" else ["--to", "bf16"]
    for arguments in ([], ["--dry-run"]):
        with pytest.raises(SystemExit) as ended:
            main([str(one) for one in (verb, tmp_path / "bad", *more, "-o", tmp_path / "out", *arguments)])
        said = capsys.readouterr()
        assert ended.value.code == 1
        assert sentence in said.err
        assert said.err.startswith("error: ")
        assert said.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_a_16_bit_merge_says_nothing_of_quantization(made: Path, tmp_path: Path) -> None:
    """Neither its config nor a file of an older tool beside it."""
    base = tmp_path / "base"
    base.mkdir()
    for path in (made / "nf4").iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    (base / "quantize_config.json").write_text("{}")
    (base / "hf_quant_config.json").write_text("{}")
    with pytest.raises(SystemExit) as ended:
        main(["merge", str(base), str(made / "adapter"), "-o", str(tmp_path / "out")])
    assert not ended.value.code
    assert "quantization_config" not in (tmp_path / "out/config.json").read_text()
    assert not {path.name for path in (tmp_path / "out").iterdir()} & {"quantize_config.json", "hf_quant_config.json"}


def test_without_bitsandbytes(made: Path, tmp_path: Path) -> None:
    """Everything is computed here, so nothing is missing when it is not installed."""
    script = (
        "import sys; sys.modules['bitsandbytes'] = None\n"
        "import adapterkit\n"
        f"folder, out = {str(made)!r}, {str(tmp_path)!r}\n"
        "adapterkit.merge(f'{folder}/nf4', [f'{folder}/adapter'], f'{out}/decoded')\n"
        "adapterkit.merge(f'{folder}/llama', [f'{folder}/adapter'], f'{out}/trained', as_trained='nf4', double_quant=True)\n"
        "adapterkit.merge(f'{folder}/llama', [f'{folder}/adapter'], f'{out}/nf4', quant='nf4')\n"
        "adapterkit.convert(f'{folder}/llama', f'{out}/int8', to='int8')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=900)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decoded", "int8", "nf4", "trained"]


# ---- configs and headers that nobody wrote

VALUES = st.sampled_from(
    [None, True, -1, 0, 3, 10**9, 1.5, "", "x", "4", [], [1], [128, 128], {}, {"a": 1}, [None], [[]]]
)


def words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=torch.Generator().manual_seed(0)).int()


def compressed() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    tensors = {
        "a.weight_packed": words(24, 12),
        "a.weight_scale": torch.full((24, 3), 0.01),
        "a.weight_shape": torch.tensor([24, 96]),
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    return tensors, {**config, "sparsity_config": {"format": "dense"}}


def fp8() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    codes = words(128, 256).float().mul(2.0**-24).to(torch.float8_e4m3fn)
    tensors = {"a.weight": codes, "a.weight_scale_inv": torch.tensor([[0.001, 0.002]])}
    return tensors, {"quant_method": "fp8", "weight_block_size": [128, 128]}


def awq() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    packed = {"a.qweight": words(96, 8), "a.qzeros": words(3, 8)}
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    return {**packed, "a.scales": torch.full((3, 64), 0.01).half()}, config


def nf4() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    encoder = FourBit("a.weight", (32, 96), Grid("nf4", double=True), BF16)
    codes, scales = encoder.encode(0, torch.randn(32 * 96), None)
    shapes = {made.name: made.shape for made in encoder.made}
    others = {name: t.view(shapes[name]) for name, t in encoder.finish((scales,)).items()}
    return {"a.weight": codes.view(-1, 1), **others}, {"quant_method": "bitsandbytes", "load_in_4bit": True}


def int8() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors = {"a.weight": (words(24, 48) >> 24).to(torch.int8), "a.SCB": torch.full((24,), 0.2)}
    layout = {"a.weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors | layout, {"quant_method": "bitsandbytes", "load_in_8bit": True}


def mxfp4() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    blocks = torch.zeros(2, 24, 3, 16, dtype=torch.uint8)
    tensors = {"a.down_proj_blocks": blocks, "a.down_proj_scales": torch.full((2, 24, 3), 120, dtype=torch.uint8)}
    return tensors, {"quant_method": "mxfp4"}


SOURCES: dict[str, Any] = {
    "nf4": nf4,
    "int8": int8,
    "mxfp4": mxfp4,
    "gptq": lambda: gptq(4, 1, 32, True)[:2],
    "awq": awq,
    "hqq": lambda: (hqq(4, 1)[0], HQQ),
    "torchao": lambda: (torchao((24, 48), torch.int8), TORCHAO),
    "compressed": compressed,
    "fp8": fp8,
}


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    found = [path] if path else []
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        found += places(value, (*path, key))
    return found


@pytest.mark.parametrize("source", SOURCES)
@settings(max_examples=40)
@given(data=st.data())
def test_any_config_is_read_or_refused(tmp_path_factory, source: str, data: st.DataObject) -> None:
    """One value of a good config replaced, one tensor missing, or of another dtype or shape: no traceback."""
    tensors, config = SOURCES[source]()
    tensors, config = dict(tensors), copy.deepcopy(config)
    what = data.draw(st.sampled_from(["config", "missing", "dtype", "shape"]))
    if what == "config":
        place = data.draw(st.sampled_from(places(config)))
        node = config
        for key in place[:-1]:
            node = node[key]
        node[place[-1]] = data.draw(VALUES)
    else:
        name = data.draw(st.sampled_from(sorted(tensors)))
        if what == "missing":
            del tensors[name]
        elif what == "dtype":
            kind = data.draw(st.sampled_from([torch.uint8, torch.int32, torch.int64, torch.float16, torch.float32]))
            tensors[name] = tensors[name].float().to(kind)
        else:
            tensors[name] = tensors[name].reshape(-1)[: data.draw(st.integers(0, 3))]
    folder = tmp_path_factory.mktemp("any")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16", "quantization_config": config}))
    read_or_refused(folder)


def read_or_refused(folder: Path) -> None:
    try:
        view = dequantized(open_checkpoint(folder))
        for tensor in view.values():
            tensor.read(0, tensor.numel)
    except AdapterkitError:
        pass


@settings(max_examples=40)
@given(data=st.data())
def test_any_state_is_read_or_refused(tmp_path_factory, data: st.DataObject) -> None:
    """The JSON that bitsandbytes keeps in a tensor, with one value of another kind."""
    tensors, config = nf4()
    key = "a.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[key].tolist()))
    state[data.draw(st.sampled_from(sorted(state)))] = data.draw(VALUES)
    tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    folder = tmp_path_factory.mktemp("state")
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    read_or_refused(folder)
