"""JSON and numbers of strangers are read at one place, which raises nothing but `ValueError`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import adapterkit
from adapterkit.errors import CheckpointError, ServerError
from adapterkit.foreign import is_whole, json_value
from adapterkit.gguf.general import read_card
from adapterkit.gguf.vocab.table import TokenTable
from adapterkit.web import parts_of

ROOT = Path(adapterkit.__file__).parent
# Who calls the standard library's reader, and why that is no file of a stranger, or a reader with limits of its own.
OWN = {
    "adapters/classes.py": "a table of the package",
    "adapters/families/told.py": "a table of the package",
    "adapters/methods/spectral.py": "a table of the package",
    "adapters/mlx_models.py": "a table of the package",
    "adapters/renamings.py": "a table of the package",
    "checkpoint/header.py": "limits of its own",
    "registry/canonical.py": "limits of its own",
    "foreign.py": "the reader",
    "gguf/vocab/render.py": "what a process of its own says and is told",
    "pickles/apart.py": "what a process of its own says",
    "pickles/child.py": "what a process of its own is told",
    "pickles/gather.py": "what a process of its own is told",
    "provenance/attested.py": "a copy of a value",
    "verbs/arrow.py": "what was written here",
    "verbs/conversions/adapters.py": "what was written here",
    "verbs/conversions/folder.py": "a copy of a value",
    "verbs/conversions/oneshot.py": "what a process of its own is told",
    "verbs/engines/local.py": "what a process of its own says",
    "verbs/evaluate.py": "what a process of its own is told",
    "verbs/outputs.py": "what was written here",
    "verbs/verify/in_parts.py": "a copy of a value",
    "verbs/verify/decode_child.py": "what a process of its own is told",
    "verbs/verify/runtime.py": "what a process of its own is told",
}


def test_json_of_strangers_is_read_at_one_place() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.py")
        if re.search(r"\bjson\.loads?\(", path.read_text(encoding="utf-8"))
    }
    assert found == set(OWN)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000,
        "[" * 200 + "]" * 200,
        '{"a": ' * 200 + "1" + "}" * 200,
        "9" * 5000,
        '"\\ud800"',
        "{",
        "",
        b"\xff",
        "nul",
    ],
)
def test_what_no_sensible_file_holds(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        json_value(text)


def test_whole_numbers_are_those_of_files() -> None:
    assert [one for one in ("7", "007", "9" * 18) if not is_whole(one)] == []
    assert [one for one in ("", "²", "٣", "-1", "1.0", "9" * 19, " 1") if is_whole(one)] == []


@pytest.mark.parametrize("url", ["http://[", "https://h:port/", "http://h:99999/", "http://[::1"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ServerError, match="no address"):
        parts_of(url)


def test_an_embedding_of_a_billion_rows_has_no_tokens() -> None:
    """Without columns it takes no byte of its file."""
    with pytest.raises(CheckpointError, match="1,000,000,000 tokens"):
        TokenTable().fit(10**9, ())


def test_a_card_with_a_date_that_is_none(tmp_path: Path) -> None:
    from unittest import mock

    (tmp_path / "README.md").write_text("---\nlicense: mit\ndate: 2025-13-45\n---\n")
    base = mock.Mock(sources=[mock.Mock(path=tmp_path / "model.safetensors")])
    assert read_card(base) == {}
