"""Bases of the tests with stores."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "gguf"))


def gguf_base(folder: Path) -> Path:
    """A small GGUF model."""
    from gguf_files import write_gguf
    from test_gguf_outputs import HEADS, OTHERS, tensors

    return write_gguf(folder / "base.gguf", tensors(), metadata={**HEADS, **OTHERS})
