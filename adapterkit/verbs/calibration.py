"""`--rounding feedback --calibration FILE`: what goes into each linear layer on a text.

The model that is wanted (base + adapters, before it is rounded) reads the text once, with the weights of one module in memory
at a time, and the inputs X of the layers that are written on a grid wait in a file without a name. Each weight makes its
second moments X'X of them when it is encoded: see `adapterkit.codecs.feedback`. The file goes with the process.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit import disk
from adapterkit.checkpoint.plan import BASELINE_MEMORY, default_jobs
from adapterkit.codecs.feedback import Fed, Shared
from adapterkit.errors import AdapterkitError, CheckpointError, UsageError, option
from adapterkit.places import Address
from adapterkit.stores.files import brought, called
from adapterkit.verbs.plain_text import read_text, text_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from adapterkit.adapters.target import Target
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.codecs.encode import Encoder

TOKENS = 4096  # of the text, at most: they are read in one batch
CHUNK = 512  # of a row of the batch
FEWEST = 64  # tokens of a text that says anything
MOST_TEXT = 1 << 20  # characters, of which so many tokens are taken


@dataclass(frozen=True)
class _Rows:
    """Inputs of a layer, as they lie in the file: bfloat16 ``[tokens, columns]``."""

    file: int
    at: int
    tokens: int
    columns: int

    def rows(self) -> torch.Tensor:
        import torch

        size = 2 * self.tokens * self.columns
        data = bytearray()
        while len(data) < size:
            data += os.pread(self.file, size - len(data), self.at + len(data))
        return torch.frombuffer(data, dtype=torch.bfloat16).view(self.tokens, self.columns).float()


class Calibration:
    """The inputs of a model's linear layers on a text.

    Args:
        view: opens the model that reads, with handles of its own; before any rounding.
        text: the file.
        near: where the output goes; the inputs wait on the disk that it is on.

    Attributes:
        tokens: that were read; 0 before that.
    """

    def __init__(self, view: Callable[[], Checkpoint], text: str | Path | Address, near: Path | Address | None) -> None:
        self._view, self._text, self._near = view, text, near
        self._path = brought(text)
        self._wanted: dict[str, tuple[int, ...]] = {}
        self._found: dict[str, _Rows] | None = None
        self._lock = threading.Lock()
        self._shared, self.tokens = Shared(), 0

    def fed(self, name: str, encoder: Encoder, shape: tuple[int, ...], how: str) -> Encoder:
        """The encoder of a weight with feedback.

        Args:
            how: what its format is called.

        Raises:
            UsageError: the format is none that is rounded so.
        """
        from adapterkit.codecs.columns import by_columns

        form = by_columns(encoder, shape)
        if form is None:
            why = "a stack of experts" if len(shape) != 2 else f"{list(shape)} in {how}"
            raise UsageError(
                f"{option('rounding', 'feedback')} is for matrices whose columns share scales in groups, and '{name}' is {why}",
                f"leave out {option('rounding')}, or keep what rounding takes beside the output ({option('residual', '16')})",
            )
        self._wanted[name] = shape
        return Fed(name, encoder, form, (shape[0], shape[1]), lambda: self._inputs(name), self._shared)

    def check(self, ref: str, config: Any) -> None:
        """What can be refused before anything is read.

        Raises:
            NotFound, UsageError: no such text, no library that runs the model, or a model that it does not know.
        """
        from adapterkit.packages import need

        need(
            "transformers",
            "tokenizers",
            what=f"{option('rounding', 'feedback')} runs the model in transformers",
            extra="demo",
        )
        if not self._read().strip():
            raise UsageError(f"{self._text} is empty", "give text like the model's own")
        if not config.get("model_type"):
            raise UsageError(
                f"{ref} has no config.json that names a model, so nothing can read the text",
                f"leave out {option('rounding')}",
            )

    @property
    def disk(self) -> int:
        """Bytes that the inputs of all layers take while the output is written, at most: projections share theirs."""
        return sum(2 * TOKENS * shape[1] for shape in self._wanted.values())

    @property
    def memory(self) -> int:
        """About what the model that reads takes: some activations of the widest layer, and its weight."""
        widest = max((sum(shape) for shape in self._wanted.values()), default=0)
        largest = max((shape[0] * shape[1] for shape in self._wanted.values()), default=0)
        return BASELINE_MEMORY + 16 * TOKENS * widest + 8 * largest

    def digest(self) -> str:
        """What tells this text from others, for a plan that is carried out later."""
        import hashlib

        return hashlib.sha256(self._read().encode()).hexdigest()

    @property
    def figures(self) -> dict[str, float]:
        """The error in the outputs of layers on the text beside what the change does to them, and that of nearest values."""
        change, left, nearest = self._shared.lost.sums()
        if not change:
            return {}
        return {"left": sqrt(left / change), "nearest": sqrt(nearest / change)}

    def _inputs(self, name: str) -> _Rows:
        """
        Raises:
            CheckpointError: the model cannot be run, or nothing was multiplied by this weight.
        """
        with self._lock:
            if self._found is None:
                self._found = self._run()
        found = self._found.get(name)
        if found is None:
            raise CheckpointError(
                f"'{name}' is the weight of no linear layer that the text went through, so nothing says how to round it",
                f"leave out {option('rounding')}, or the adapter's change to it",
            )
        return found

    def _run(self) -> dict[str, _Rows]:
        """The inputs of all layers, from one pass."""
        import torch

        from adapterkit.verbs.streamed import run_streamed
        from adapterkit.verbs.verify.answers import check_known, empty_model

        view = self._view()
        check_known(view.config, view.ref)
        batch = self._batch(view)
        file = self._file()
        found: dict[str, _Rows] = {}
        end = 0
        last: tuple[Any, _Rows] | None = None

        def seen(module: Any, weight: Target, x: torch.Tensor) -> None:
            nonlocal end, last
            turned = type(module).__name__ == "Conv1D"
            if weight.stacked or len(weight.shape) != 2 or x.shape[-1] != weight.matrix[0 if turned else 1]:
                return
            names = [name for name in weight.tensors if name in self._wanted]
            if not names or isinstance(module, torch.nn.Embedding):
                return
            if last is None or last[0] is not x:  # projections share what goes into them
                rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
                kept = _Rows(file, end, len(rows), rows.shape[1])
                _write(file, rows, end, self._near)
                end += 2 * rows.numel()
                last = (x, kept)
            found.update(dict.fromkeys(names, last[1]))

        try:
            with _all_cores():
                run_streamed(empty_model(view.config), view, [batch], seen)
        except AdapterkitError:
            raise
        except (
            RuntimeError,
            ValueError,
            TypeError,
            KeyError,
            IndexError,
            AttributeError,
            NotImplementedError,
        ) as error:
            # Classes of a library that may do anything in their forward pass.
            why = " ".join(str(error).split())[:160]
            raise CheckpointError(
                f"{view.ref} cannot be run layer by layer, which {option('rounding', 'feedback')} needs ({why})",
                f"leave out {option('rounding')}",
            ) from None
        return found

    def _batch(self, view: Checkpoint) -> list[list[int]]:
        """Rows of tokens of one length.

        Raises:
            UsageError: no tokenizer, or too little text.
        """
        tokenizer = _tokenizer(view)
        if tokenizer is None:
            raise UsageError(
                f"{view.ref} has no tokenizer, which the calibration text needs", "copy the base's beside it"
            )
        first, ids = text_ids(tokenizer, self._read()[:MOST_TEXT])
        if len(ids) < FEWEST:
            raise UsageError(
                f"{self._text} has {len(ids)} tokens, which says too little of the layers' inputs",
                f"give at least {FEWEST}",
            )
        width = min(CHUNK, len(ids))
        rows = [ids[at : at + width] for at in range(0, min(len(ids), TOKENS) // width * width, width)]
        if first is not None:
            rows = [[first, *row[1:]] for row in rows]
        self.tokens = width * len(rows)
        return rows

    def _read(self) -> str:
        with called(self._path, self._text):
            return read_text(self._path)

    def _file(self) -> int:
        """A file without a name, which goes when nothing holds it any more, also after a kill."""
        near = self._near.absolute().parent if isinstance(self._near, Path) else None
        with tempfile.TemporaryFile(dir=near if near is not None and near.is_dir() else None) as made:
            file = os.dup(made.fileno())
        weakref.finalize(self, os.close, file)
        return file


def _tokenizer(view: Checkpoint) -> Any:
    """The tokenizer of a model, None where it has none. For a model in a store its small files are lent a folder."""
    from adapterkit.checkpoint.pipeline import folder_of
    from adapterkit.verbs.verify.answers import open_tokenizer

    folder = folder_of(view)
    if folder is not None:
        return open_tokenizer([folder])
    with tempfile.TemporaryDirectory(prefix="adapterkit-") as lent, disk.writing("a temporary folder", Path(lent)):
        (Path(lent) / "config.json").write_text(json.dumps(view.config))
        for file in view.side_files:
            if "/" not in file.name:
                (Path(lent) / file.name).write_bytes(file.bytes())
        with called(Path(lent), view.ref):
            return open_tokenizer([lent])


def _write(file: int, rows: torch.Tensor, at: int, near: Path | Address | None) -> None:
    """
    Raises:
        OutputError: the disk is full.
    """
    import torch

    from adapterkit import disk

    data = memoryview(rows.view(torch.uint8).numpy().data).cast("B")
    try:
        while len(data):
            count = os.pwrite(file, data, at)
            data, at = data[count:], at + count
    except OSError as error:
        where = near.absolute().parent if isinstance(near, Path) else Path(tempfile.gettempdir())
        raise disk.refused(error, "the inputs of layers", where) from error


@contextmanager
def _all_cores() -> Iterator[None]:
    """The same number of threads wherever this runs, so that the bytes do not depend on the number of jobs."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(default_jobs())
    try:
        yield
    finally:
        torch.set_num_threads(before)
