from __future__ import annotations

import subprocess
import sys

import pytest
from gguf_oracle import library

from adapterkit.errors import UsageError
from adapterkit.gguf.types import BY_ID, TYPES, ggml_type


@pytest.mark.parametrize("name", TYPES)
def test_ids_and_sizes_are_those_of_ggml(name: str) -> None:
    row = TYPES[name]
    assert library().ggml_type_name(row.id).decode().upper() == name
    assert library().ggml_blck_size(row.id) == row.block
    assert library().ggml_type_size(row.id) == row.size
    assert BY_ID[row.id] is row


def test_row_bytes_and_names() -> None:
    assert ggml_type("q4_k").row_bytes(4096) == 2304
    assert ggml_type("F16").row_bytes(7) == 14
    assert not TYPES["BF16"].is_quantized
    assert TYPES["Q8_0"].is_quantized
    with pytest.raises(UsageError, match="row of 100 weights cannot be Q4_K; use a multiple of 256"):
        ggml_type("Q4_K").row_bytes(100)
    with pytest.raises(UsageError, match="no GGUF tensor type"):
        ggml_type("Q7_K")


def test_the_tables_import_nothing_heavy() -> None:
    code = "import sys, adapterkit.gguf.types, adapterkit.gguf.mixes, adapterkit.gguf.imatrix, adapterkit.gguf.encode\n"
    code += "print(sorted({'torch', 'numpy', 'numba', 'gguf'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
