"""Results that are computed before the files of an output can be planned, as tensors of bytes.

How large the files of some outputs are is known when their values are: the ranks of an adapter, say. What has to be computed
first is a plan of its own then: one file, in which every result has a tensor of bytes, as large as the result can be. So it
is cut into parts, executed by workers, journaled, resumed and sent to a store as any other plan. Whoever makes the output
reads the results back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from adapterkit.checkpoint.files import fingerprint
from adapterkit.checkpoint.header import parse_header
from adapterkit.checkpoint.plan import Plan, plan_file
from adapterkit.checkpoint.tensor import Tensor
from adapterkit.dtypes import DTYPES
from adapterkit.errors import AdapterkitError, CheckpointError
from adapterkit.foreign import json_value

if TYPE_CHECKING:
    import torch

    from adapterkit.checkpoint.files import Source
    from adapterkit.checkpoint.write import Stage
    from adapterkit.dtypes import DType

T = TypeVar("T")

STAGED, IN_PARTS = "staged", "results"  # in the request of a plan: its files hold results
FILE = ".results.safetensors"
_LENGTH = 8  # bytes that say how long the JSON is


@dataclass(eq=False)
class Result(Tensor):
    """One result: JSON, and bytes after it.

    Attributes:
        name: of the result.
        room: the most bytes of its JSON.
        data: the most bytes that follow.
        input_bytes: bytes that are read for it.
        words: a few for the plan.
        compute: gives both.
        held: bytes of memory that are held meanwhile, beside the result.
    """

    name: str
    room: int
    data: int
    input_bytes: int
    words: str
    compute: Callable[[], tuple[Any, Sequence[bytes]]]
    held: int = 0
    dtype: DType = field(default=DTYPES["U8"], init=False)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (_LENGTH + self.room + self.data,)

    @property
    def block(self) -> int:
        return self.numel  # a result is computed at once

    @property
    def reads(self) -> int:
        return self.input_bytes

    @property
    def memory(self) -> int:
        return self.held + 2 * self.numel

    @property
    def how(self) -> str:
        return self.words

    def read(self, start: int, stop: int) -> torch.Tensor:
        import torch

        found, data = self.compute()
        text = json.dumps(found, separators=(",", ":")).encode()
        made = torch.zeros(self.shape, dtype=torch.uint8)
        if len(text) > self.room or sum(map(len, data)) > self.data:
            raise AdapterkitError(
                f"the result of {self.name} is larger than the plan has room for", "carry it out whole, and report it"
            )
        at = _LENGTH + self.room
        for place, one in ((0, len(text).to_bytes(_LENGTH, "little")), (_LENGTH, text)):
            made[place : place + len(one)] = torch.frombuffer(bytearray(one), dtype=torch.uint8)
        for one in data:
            if one:
                made[at : at + len(one)] = torch.frombuffer(bytearray(one), dtype=torch.uint8)
            at += len(one)
        return made[start:stop]


@dataclass(frozen=True)
class Results:
    """What the stage of a job computes, as a plan of its own.

    Attributes:
        plan: of the file of results, with the request that makes the job again.
        tensors: each computes one result.
        stage: the stage of the job, with results that lie in a file instead of computing them.
    """

    plan: Plan
    tensors: Mapping[str, Result]
    stage: Callable[[ResultFile], Stage]


def planned_results(
    results: Sequence[Result],
    sources: Sequence[Source],
    request: Mapping[str, Any],
    stage: Callable[[ResultFile], Stage],
) -> Results:
    """Results as a plan.

    Args:
        sources: files that they are computed from.
        request: what makes the job again.
        stage: see `Results`.
    """
    made = plan_file(FILE, results, {})
    inputs = {source.name: fingerprint(source) for source in sources}
    plan = replace(made, inputs=inputs, request={**request, STAGED: IN_PARTS})
    return Results(plan, {one.name: one for one in results}, stage)


class ResultFile:
    """Results that are there.

    Raises:
        CheckpointError: the file is damaged.
    """

    def __init__(self, source: Source, tensors: Mapping[str, Result]) -> None:
        self._source, self._tensors = source, tensors
        header = parse_header(source.read, source.size, source.name)
        self._starts = {name: info.start for name, info in header.tensors.items()}
        if self._starts.keys() != tensors.keys():
            raise self._damaged()

    def made(self, name: str, make: Callable[[Any], T]) -> T:
        """What ``make`` makes of the JSON of a result.

        Raises:
            CheckpointError: it is not what a result of this kind says.
        """
        try:
            return make(self.said(name))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise self._damaged() from None

    def said(self, name: str) -> Any:
        """The JSON of a result."""
        start, most = self._starts[name], self._tensors[name].numel
        length = int.from_bytes(self._source.read(start, _LENGTH), "little")
        if not 0 < length <= most - _LENGTH:
            raise self._damaged()
        try:
            return json_value(self._source.read(start + _LENGTH, length))
        except ValueError:
            raise self._damaged() from None

    def data(self, name: str, offset: int, nbytes: int) -> bytes:
        """Some of the bytes of a result."""
        one = self._tensors[name]
        if offset < 0 or nbytes < 0 or offset + nbytes > one.data:
            raise self._damaged()
        found = self._source.read(self._starts[name] + _LENGTH + one.room + offset, nbytes)
        if len(found) != nbytes:
            raise self._damaged()
        return found

    def _damaged(self) -> CheckpointError:
        return CheckpointError(f"the results in {self._source.name} are damaged", "remove them, and run it again")
