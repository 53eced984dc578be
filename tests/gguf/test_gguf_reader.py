"""The header reader: real files as gguf reads them, everything else refused in a sentence, at once."""

from __future__ import annotations

import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from files import random_array, sample, write_gguf
from mutants import as_gguf_reads, as_we_read, mutants

from adapterkit.errors import AdapterkitError, CheckpointError, UnsafeError
from adapterkit.gguf.reader import GGUFHeader, parse_gguf


def read(data: bytes) -> GGUFHeader:
    return parse_gguf(lambda at, count: data[at : at + count], len(data), "m.gguf")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample(tmp_path_factory.mktemp("gguf") / "sample.gguf")


def test_reads_a_file_as_gguf_does(file: Path) -> None:
    header = read(file.read_bytes())
    assert as_we_read(header) == as_gguf_reads(file)
    assert header.version == 3
    assert header["general.architecture"] == "llama"
    assert header["tokenizer.ggml.tokens"] == ["<unk>", "a", "ä", "x" * 40]
    assert header["tokenizer.ggml.scores"] == [0.0, -1.0, -2.5, 3.0]
    assert header["tokenizer.ggml.add_bos_token"] is True
    assert header.get("nothing", 5) == 5


def test_every_type_of_value_as_gguf_has_it(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    kinds = gguf.GGUFValueType
    given = {
        "u8": (200, kinds.UINT8),
        "i8": (-100, kinds.INT8),
        "u16": (60000, kinds.UINT16),
        "i16": (-30000, kinds.INT16),
        "i32": (-5, kinds.INT32),
        "u64": (2**63, kinds.UINT64),
        "i64": (-(2**40), kinds.INT64),
        "f64": (0.1, kinds.FLOAT64),
        "no": (False, kinds.BOOL),
    }
    for key, (value, kind) in given.items():
        writer.add_key_value(key, value, kind)
        writer.add_key_value(key + "s", [value] * 3, kinds.ARRAY, sub_type=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = read((tmp_path / "v.gguf").read_bytes())
    for key, (value, _) in given.items():
        assert header[key] == value
        assert header[key + "s"] == [value] * 3


def test_other_alignments(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", {"a": random_array(3, 5), "b": random_array(7)}, alignment=256)
    assert as_we_read(read(path.read_bytes())) == as_gguf_reads(path)


def test_damaged_headers_are_refused_or_read_as_gguf_reads_them(file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    header = read(data).data_start
    slowest, read_well = 0.0, 0
    sentences: list[str] = []
    tracemalloc.start()
    for number, mutant in enumerate(mutants(data, header, 1000)):
        started = time.thread_time()
        try:
            found = read(mutant)
        except AdapterkitError as error:
            sentences.append(str(error))
            found = None
        slowest = max(slowest, time.thread_time() - started)
        if found is not None:
            read_well += 1
            path = tmp_path / f"{number}.gguf"
            path.write_bytes(mutant)
            assert as_we_read(found) == as_gguf_reads(path)
            path.unlink()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 50 < read_well < 950
    assert all("m.gguf" in sentence and len(sentence) < 400 for sentence in sentences)
    assert slowest < 1
    assert peak < 200e6


def build(version: int = 3, tensors: int = 0, keys: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def info(name: str, dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


PAD = b"\0" * 4096
BAD = {
    "not gguf": (b"PK\x03\x04" + PAD, "does not begin with GGUF"),
    "cut in the counts": (b"GGUF\x03\0\0\0\1", "past the end"),
    "version 1": (build(1) + PAD, "version 1"),
    "version 9": (build(9) + PAD, "version 9"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + PAD, "big-endian"),
    "many keys": (build(keys=2**63) + PAD, "9223372036854775808 keys"),
    "many tensors": (build(tensors=1000) + PAD, "1000 tensors"),
    "long key": (build(keys=1, rest=struct.pack("<Q", 2**60)) + PAD, "claims"),
    "long string": (build(keys=1, rest=text("k") + struct.pack("<IQ", 8, 2**50)) + PAD, "claims"),
    "long array": (build(keys=1, rest=text("k") + struct.pack("<IIQ", 9, 0, 2**62)) + PAD, "claims"),
    "array of strings": (build(keys=1, rest=text("k") + struct.pack("<IIQQ", 9, 8, 2, 2**62)) + PAD, "past the end"),
    "nested array": (build(keys=1, rest=text("k") + struct.pack("<IIQ", 9, 9, 1)) + PAD, "items of type 9"),
    "unknown value": (build(keys=1, rest=text("k") + struct.pack("<I", 77)) + PAD, "value type 77"),
    "key twice": (build(keys=2, rest=(text("k") + struct.pack("<IB", 0, 1)) * 2) + PAD, "'k' appears twice"),
    "key not utf-8": (build(keys=1, rest=struct.pack("<Q", 2) + b"\xff\xfe") + PAD, "UTF-8"),
    "alignment 0": (build(keys=1, rest=text("general.alignment") + struct.pack("<II", 4, 0)) + PAD, "power of two"),
    "alignment 48": (build(keys=1, rest=text("general.alignment") + struct.pack("<II", 4, 48)) + PAD, "power of two"),
    "alignment 2^30": (build(keys=1, rest=text("general.alignment") + struct.pack("<II", 4, 2**30)) + PAD, "1048576"),
    "alignment u64": (build(keys=1, rest=text("general.alignment") + struct.pack("<IQ", 10, 32)) + PAD, "uint32"),
    "five dims": (build(tensors=1, rest=info("w", (2, 2, 2, 2, 2))) + PAD, "5 dimensions"),
    "no dims": (build(tensors=1, rest=info("w", ())) + PAD, "0 dimensions"),
    "dim zero": (build(tensors=1, rest=info("w", (0, 4))) + PAD, "shape"),
    "product": (build(tensors=1, rest=info("w", (2**32, 2**32))) + PAD, "shape"),
    "type 200": (build(tensors=1, rest=info("w", kind=200)) + PAD, "type 200"),
    "retired type": (build(tensors=1, rest=info("w", kind=31)) + PAD, "Q4_0_4_4"),
    "rows": (build(tensors=1, rest=info("w", (100, 2), 12)) + PAD, "multiple of the 256 of Q4_K"),
    "offset": (build(tensors=1, rest=info("w", offset=7)) + PAD, "multiple of 32"),
    "offset far": (build(tensors=1, rest=info("w", offset=2**63)) + PAD, "truncated"),
    "tensor twice": (build(tensors=2, rest=info("w") + info("w", offset=128)) + PAD, "appears twice"),
    "overlap": (build(tensors=2, rest=info("v") + info("w", offset=32)) + PAD, "overlaps 'v'"),
    "truncated": (build(tensors=1, rest=info("w", (64, 64))) + PAD, "truncated"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_headers_are_named(name: str) -> None:
    data, sentence = BAD[name]
    with pytest.raises(CheckpointError, match=sentence):
        read(data)


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "a\x1b[31m", "/abs", "a\\b"])
def test_names_that_are_no_names(name: str) -> None:
    with pytest.raises(UnsafeError):
        read(build(tensors=1, rest=info(name)) + PAD)


def test_a_large_header_is_read_in_pieces() -> None:
    tokens = b"".join(text(f"token{i}") for i in range(50_000))
    data = build(keys=1, rest=text("tokens") + struct.pack("<IIQ", 9, 8, 50_000) + tokens)
    asked = []

    def some(at: int, count: int) -> bytes:
        asked.append(count)
        return data[at : at + count]

    header = parse_gguf(some, len(data), "m.gguf")
    assert header["tokens"][-1] == "token49999"
    assert sum(asked) == len(data)
    assert len(asked) > 2


def test_a_header_over_the_limit_is_refused() -> None:
    data = build(keys=1, rest=text("k") + struct.pack("<IIQ", 9, 0, 70 << 20))
    with pytest.raises(CheckpointError, match="longer than 64 MB"):
        parse_gguf(lambda at, count: data[at : at + count].ljust(count, b"\0"), 80 << 20, "m.gguf")


def test_reading_needs_nothing_heavy(file: Path) -> None:
    script = (
        "import sys\nfrom adapterkit.bases import open_model\n"
        f"assert len(open_model({str(file)!r})) == 5\n"
        "print(sorted({'torch', 'numpy', 'gguf', 'numba'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
