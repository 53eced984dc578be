"""The stored verdicts of ``tools/gguf_contract.py``: nothing is silently off, and the runtime still says the same."""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
STORED: dict[str, Any] = json.loads((HERE / "contract.json").read_text(encoding="utf-8"))


@cache
def _tool() -> Any:
    found = importlib.util.spec_from_file_location("gguf_contract", HERE.parents[1] / "tools" / "gguf_contract.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_nothing_is_silently_off() -> None:
    bad = ("silent", "no-load")
    off = {(kind, title) for kind, row in STORED.items() for title, word in row["fields"].items() if word in bad}
    assert off == set()
    assert sum(len(row["fields"]) for row in STORED.values()) > 3000


def test_weights_that_no_lora_acts_on_are_in_the_table() -> None:
    from arch_zoo import ENCODERS, ZOO

    from adapterkit.gguf.arch.config import Config
    from adapterkit.gguf.arch.table import spec_of
    from adapterkit.gguf.lora import ignores

    for kind, row in STORED.items():
        if kind not in ZOO and kind not in ENCODERS:
            continue
        spec = spec_of(Config({"architectures": [row["class"]], **_what_tells_rows_apart(kind)}))
        # A tied embedding has a sentence of its own; norms of heads are no matrices that an adapter changes.
        deaf = [
            stem
            for stem, word in row["lora"].items()
            if word == "ignored" and stem not in ("token_embd", "blk.attn_k_norm", "blk.attn_q_norm")
        ]
        assert [stem for stem in deaf if not ignores(f"{stem}.weight", spec.no_lora)] == [], kind


def _what_tells_rows_apart(kind: str) -> dict[str, Any]:
    from arch_zoo import ENCODERS, ZOO

    return {"num_hidden_layers": 2, **(ZOO | ENCODERS)[kind].config}


@pytest.mark.slow
@pytest.mark.parametrize("kind", STORED)
def test_the_runtime_says_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import adapterkit.gguf.vocab

    monkeypatch.setattr(adapterkit.gguf.vocab, "read_vocab", adapterkit.gguf.vocab.read_vocab)  # the tool replaces it
    tool = _tool()
    runtime = tool.Runtime()
    try:
        found = tool.measure(kind, runtime)
    finally:
        runtime.close()
    assert {title: row["verdict"] for title, row in found["fields"].items()} == STORED[kind]["fields"]
    assert found["lora"] == STORED[kind]["lora"]
