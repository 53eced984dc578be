"""What is fetched ahead of a plan: a window holds the bytes of its own range, whatever was expected before."""

from __future__ import annotations

import pytest

from adapterkit.checkpoint.objects import ObjectFile
from adapterkit.places import Address
from adapterkit.stores.store import StoredObject

MB = 1 << 20
CONTENT = bytes(range(251)) * (2 * MB // 251 + 1)


class _Reads:
    """What `ObjectFile` asks of a store."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def place(self, key: str) -> Address:
        return Address("s3", "bucket", key)

    def read(self, key: str, start: int, nbytes: int, etag: str = "") -> bytes:
        self.asked.append((start, start + nbytes))
        return CONTENT[start : start + nbytes]


@pytest.mark.parametrize("second", [(MB, MB + 1000), (100_000, 101_000), (150_000, 400_000)])
def test_a_window_is_of_what_is_expected_now(second: tuple[int, int]) -> None:
    """A worker executes one part after the other; of the first it did not read everything that it had fetched."""
    store = _Reads()
    file = ObjectFile(store, StoredObject("base.bin", 2 * MB, "e"), "base.bin")  # type: ignore[arg-type]
    file.expect([(120_000, 200_000)])
    assert file.read(120_000, 1000) == CONTENT[120_000:121_000]
    file.expect([second])
    fetched = len(store.asked)
    start, stop = second
    found = b"".join(file._some(at, min(500, stop - at)) for at in range(start, stop, 500))
    assert found == CONTENT[start:stop]
    assert store.asked[fetched:] == [second]


def test_what_a_file_fetched_goes_with_it() -> None:
    """Also after its run has said that it expects nothing more."""
    from adapterkit.checkpoint.objects import _windows

    store = _Reads()
    file = ObjectFile(store, StoredObject("base.bin", 2 * MB, "e"), "base.bin")  # type: ignore[arg-type]
    before = len(_windows._held)
    file.expect([(120_000, 200_000)])
    file.read(120_000, 1000)
    assert len(_windows._held) == before + 1
    file.expect(())
    del file
    assert len(_windows._held) == before


def test_files_that_expect_the_same_share_what_is_fetched() -> None:
    """Two outputs of one pass open an object each for itself; an object of another version is another one."""
    from adapterkit.checkpoint.objects import _windows

    store = _Reads()
    first, second, other = (
        ObjectFile(store, StoredObject("base.bin", 2 * MB, version), "base.bin")  # type: ignore[arg-type]
        for version in ("e", "e", "f")
    )
    for file in (first, second, other):
        file.expect([(120_000, 200_000)])
    for file in (first, second):
        assert b"".join(file.read(at, 40_000) for at in (120_000, 160_000)) == CONTENT[120_000:200_000]
    assert store.asked == [(120_000, 200_000)]
    assert (120_000, 200_000) not in {key[1:] for key in _windows._held}
    other.read(120_000, 40_000)
    assert store.asked == [(120_000, 200_000)] * 2


def test_files_may_be_collected_while_windows_are_looked_through() -> None:
    """As the garbage collector does it, at any moment, in the thread that is at the windows."""
    store = _Reads()
    file, *others = (
        ObjectFile(store, StoredObject("base.bin", 2 * MB, "e"), "base.bin")  # type: ignore[arg-type]
        for _ in range(40)
    )

    class Stop(int):
        """The end of a window; whenever it is looked up, a file is gone."""

        def __hash__(self) -> int:
            del others[-1:]
            return hash(int(self))

    for other in others:
        other.expect([(150_000, 200_000)])
    del other
    file.expect([(120_000, Stop(200_000))])
    assert b"".join(file.read(at, 20_000) for at in range(120_000, 200_000, 20_000)) == CONTENT[120_000:200_000]
    assert store.asked == [(120_000, 200_000)]
    assert len(others) < 39
