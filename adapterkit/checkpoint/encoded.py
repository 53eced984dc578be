"""`encoded`: the handles of the tensors that an encoder makes of one weight, in one pass over it.

Streamed codes are a function of each range alone; what their encoding finds on the way (scales) is kept for the handles
that come after them, and found again where it is missing, after a resume. Where all codes have to be held, the workers
that ask for any of them fill the ranges together.
"""

from __future__ import annotations

import threading
from math import gcd, isfinite
from typing import TYPE_CHECKING

from adapterkit.checkpoint.tensor import BLOCK, Tensor
from adapterkit.errors import CheckpointError
from adapterkit.ops.device import CPU, larger, opened

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from adapterkit.codecs.encode import Encoder, TensorSpec

    # A range of a weight, new values and those that are stored now: flat, both.
    Both = Callable[[int, int], tuple[torch.Tensor, torch.Tensor | None]]
    # Told of each range: the element it starts at, the values that are stored now, the new ones, and what was written.
    Witness = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]


class _Pass:
    """One run over all ranges, shared by the threads that need it finished."""

    def __init__(self, starts: range, task: Callable[[int], None]) -> None:
        self._starts, self._task = iter(starts), task
        self._left, self._lock = len(starts), threading.Condition()
        self._failure: BaseException | None = None

    def run(self) -> None:
        while True:
            with self._lock:
                start = None if self._failure else next(self._starts, None)
            if start is None:
                break
            try:
                self._task(start)
            except BaseException as error:
                with self._lock:
                    self._failure = error
                    self._lock.notify_all()
                raise
            with self._lock:
                self._left -= 1
                self._lock.notify_all()
        with self._lock:
            self._lock.wait_for(lambda: not self._left or self._failure is not None)
            if self._failure is not None:
                raise self._failure


class Encoding:
    """What the handles of one weight share.

    Attributes:
        weight: the floats that are encoded.
        words: what the format is called.
        witness: told of every range that is encoded.
        device: where it is encoded.
    """

    def __init__(self, weight: Tensor, encoder: Encoder, both: Both | None = None, words: str = "") -> None:
        self.weight, self.encoder, self._both, self.words = weight, encoder, both, words
        factor = encoder.unit // gcd(encoder.unit, weight.block)
        self.step = weight.block * factor if factor <= 4 else max(1, BLOCK // encoder.unit) * encoder.unit
        self.witness: Witness | None = None
        self.device = CPU
        self._lock = threading.Lock()
        self._users = len(encoder.made)
        self._clear()

    def _clear(self) -> None:
        self._kept: dict[int, tuple[torch.Tensor, ...]] = {}
        self._rest: dict[str, torch.Tensor] | None = None
        self._first: _Pass | None = None
        self._second: _Pass | None = None
        self._looks: dict[int, torch.Tensor] = {}
        self._looked = not self.encoder.twice

    def place_on(self, device: str) -> None:
        """Encode on a device, in larger ranges; before anything is read."""
        if device != CPU and self.encoder.anywhere:
            self.device, self.step = device, larger(self.step)

    @property
    def again(self) -> bool:
        """Whether a stored weight is written again, so that the values that are stored now are known."""
        return self._both is not None

    @property
    def starts(self) -> range:
        return range(0, self.weight.numel, self.step)

    def codes(self, start: int) -> torch.Tensor:
        """The streamed codes of the range that starts at element ``start``."""
        encoded = self._encode(start)
        with self._lock:
            self._kept[start] = encoded[1:]
        return encoded[0]

    def rest(self, name: str) -> torch.Tensor:
        """Another tensor, flat."""
        if self._rest is None:
            if self.encoder.streams:
                for start in self.starts:
                    if start not in self._kept and self._rest is None:
                        self.codes(start)
            else:
                with self._lock:
                    self._second = self._second or _Pass(self.starts, self._hold)
                self._second.run()
        with self._lock:
            if self._rest is None:
                self._settle()
                self._rest = self.encoder.finish(_together([self._kept[start] for start in self.starts]))
                self._kept = {}
            return self._rest[name]

    def measure(self, most: int | None = None) -> None:
        """Encode ranges for the witness alone: at most ``most`` of them, spread over the weight; None for all."""
        starts = self.starts
        count = len(starts) if most is None else min(most, len(starts))
        for index in range(count):
            self._encode(starts[index * len(starts) // count])
        self.encoder.end()
        self._clear()

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users <= 0:
                self._clear()
                self.encoder.end()
                self.weight.release()

    def _hold(self, start: int) -> None:
        encoded = self._encode(start)
        with self._lock:
            self._kept[start] = encoded

    def _encode(self, start: int) -> tuple[torch.Tensor, ...]:
        if not self._looked:
            with self._lock:
                self._first = self._first or _Pass(self.starts, self._look)
            self._first.run()
            with self._lock:
                self._settle()
        new, old = self._read(start)
        device = opened(self.device)
        with device.at_work():
            self._check(start, new)
            encoded = self.encoder.encode(start, new, old)
            if self.witness is not None and old is not None:
                self.witness(start, old, new, self.encoder.values(start, encoded))
        return tuple(device.down(part) for part in encoded)

    def _check(self, start: int, values: torch.Tensor) -> None:
        """
        Raises:
            CheckpointError: NaN or an infinity, which would spread over all values that share its scale.
        """
        import torch

        if isfinite(float(values.sum())):  # a sum may overflow where no value does
            return
        bad = torch.nonzero(~torch.isfinite(values.reshape(-1)))
        if len(bad):
            raise CheckpointError(
                f"'{self.weight.name}' cannot be {self.words or 'quantized'}: its value at {start + int(bad[0])} is not "
                "finite, and would spread over all that share its scale",
                "use a sound checkpoint",
            )

    def _settle(self) -> None:
        if not self._looked:
            self.encoder.settle([self._looks[start] for start in self.starts])
            self._looks, self._looked = {}, True

    def _look(self, start: int) -> None:
        new, old = self._read(start)
        device = opened(self.device)
        with device.at_work():
            found = device.down(self.encoder.look(start, new, old))
        with self._lock:
            self._looks[start] = found

    def _read(self, start: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        stop = min(start + self.step, self.weight.numel)
        device = opened(self.device)
        if self._both is not None:
            new, old = self._both(start, stop)
            return device.up(new), None if old is None else device.up(old)
        # Before a merge's rounding to 16 bits, where there is one: the grid is the only rounding.
        return self.weight.read_on(device, start, stop), None


def _together(kept: list[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    import torch

    return tuple(torch.cat(found) if len(found) > 1 else found[0] for found in zip(*kept, strict=True))


class Encoded(Tensor):
    """One of the tensors that an encoder makes of a weight."""

    def __init__(self, made: TensorSpec, shared: Encoding, *, streams: bool) -> None:
        self.name, self.dtype, self.shape = made.name, made.dtype, made.shape
        self.shared, self._streams = shared, streams

    @property
    def weight(self) -> Tensor:
        """The floats that are encoded."""
        return self.shared.weight

    @property
    def first(self) -> bool:
        """Whether these are the codes."""
        return self.name == self.shared.encoder.made[0].name

    @property
    def block(self) -> int:
        encoder = self.shared.encoder
        return self.shared.step // encoder.unit * encoder.unit_codes if self._streams else BLOCK

    @property
    def reads(self) -> int:
        return self.shared.weight.reads * (2 if self.shared.encoder.twice else 1) if self.first else 0

    @property
    def memory(self) -> int:
        return self.shared.weight.memory + self.shared.encoder.memory

    @property
    def how(self) -> str:
        inner = self.shared.weight.how
        return f"{'' if inner == 'copy' else inner + ', '}to {self.dtype}"

    def read(self, start: int, stop: int) -> torch.Tensor:
        import torch

        if not self._streams:
            return self.shared.rest(self.name).reshape(-1)[start:stop]
        encoder, block = self.shared.encoder, self.block
        first = start - start % block
        starts = (at // encoder.unit_codes * encoder.unit for at in range(first, stop, block))
        parts = [self.shared.codes(at) for at in starts]
        found = parts[0] if len(parts) == 1 else torch.cat(parts)
        return found[start - first : stop - first]

    def place_on(self, device: str) -> None:
        if self.first:
            self.shared.place_on(device)

    @property
    def on_cpu(self) -> frozenset[str]:
        stayed = self.shared.weight.on_cpu
        return stayed if self.shared.encoder.anywhere else stayed | {self.shared.encoder.called}

    def release(self) -> None:
        self.shared.release()


def encoded(weight: Tensor, encoder: Encoder, both: Both | None = None) -> list[Tensor]:
    """The handles of what ``encoder`` makes of ``weight``, codes first.

    Args:
        weight: the values to be stored.
        encoder: how.
        both: reads a range of the values to be stored and of those that are stored now, where ``weight`` is written again.
    """
    shared = Encoding(weight, encoder, both)
    first = encoder.made[0]
    return [Encoded(made, shared, streams=encoder.streams and made is first) for made in encoder.made]
