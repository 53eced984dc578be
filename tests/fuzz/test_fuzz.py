"""Every reader of foreign bytes on mutations of good ones: an error of ours or none, soon, and with little memory.

Here for some seconds; for hours by ``python tests/fuzz/run.py --seconds 3600``, which adds what it finds to the corpus.
"""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from adapterkit.errors import AdapterkitError
from fuzz.mutate import mutated
from fuzz.readers import Reader, readers

CORPUS = Path(__file__).with_name("corpus")
FIRST = (
    *("safetensors", "index", "config.json", "adapter_config", "adapter weights", "gguf", "tokenizer.json"),
    *("tokenizer.model", "tokenizer_config", "recipe", "lock", "record", "bundle", "plan", "hub answer", "signature"),
    *("imatrix", "manifest", "statements", "statement", "mergekit"),
)
LATER = (
    *("oci manifest", "oci referrers", "oci headers", "bucket manifest", "bucket tag", "bucket listing"),
    *(
        "claim of a store",
        "results",
        "policy",
        "imatrix.gguf",
        "tensor types",
        "metadata file",
        "prompts",
        "model card",
    ),
    *("files beside a base", "said of training", "adapter of mlx", "metadata of an adapter", "quantization", "login"),
    *("state of a recipe", "journal", "tekken.json", "vocab.txt", "rwkv vocabulary", "question of the UI"),
    *("config of LLaMA-Factory", "file of an adapter", "index of an adapter", "pipeline", "run of megatron"),
)
NAMES = (*FIRST, *LATER)
EXAMPLES = {
    **dict.fromkeys(LATER, 50),
    **dict.fromkeys(("files beside a base", "metadata of an adapter", "oci headers"), 20),
    **dict.fromkeys(("index of an adapter", "pipeline", "file of an adapter"), 30),
    "bucket listing": 5,
    "bundle": 30,
    "config.json": 40,
    "adapter_config": 40,
    "adapter weights": 40,
    "index": 60,
}
MOST = 200 << 20  # bytes that one input may make a reader take
PATIENCE = 20.0  # seconds of CPU; a second is what is promised of a quiet machine, and `run.py` measures it


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    return dict(readers(tmp_path_factory.mktemp("fuzz")))


def feed(reader: Reader, data: bytes, place: Path) -> None:
    place.mkdir(parents=True, exist_ok=True)
    started = time.thread_time()
    said = ""
    try:
        reader.read(data, place)
    except AdapterkitError as error:
        said = str(error)
    assert len(said) < 20_000
    assert time.thread_time() - started < PATIENCE


def test_there_is_a_reader_for_each_name(known: dict[str, Reader]) -> None:
    assert set(known) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_seeds_are_read(name: str, known: dict[str, Reader], tmp_path: Path) -> None:
    """A fuzzer whose seeds are refused tests one sentence only."""
    for number, one in enumerate(known[name].seeds):
        (tmp_path / str(number)).mkdir()
        known[name].read(one, tmp_path / str(number))


@pytest.mark.parametrize("name", NAMES)
def test_mutations(name: str, known: dict[str, Reader], tmp_path: Path) -> None:
    reader = known[name]

    @seed(1)
    @settings(
        max_examples=EXAMPLES.get(name, 150),
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**32))
    def inner(number: int) -> None:
        random = Random(number)
        feed(reader, mutated(random.choice(reader.seeds), random), tmp_path / "place")

    inner()


@pytest.mark.parametrize("path", sorted(CORPUS.iterdir()), ids=lambda path: path.name)
def test_corpus(path: Path, known: dict[str, Reader], tmp_path: Path) -> None:
    """Inputs on which a reader once broke."""
    tracemalloc.start()
    try:
        named = {name.replace(" ", "_"): reader for name, reader in known.items()}
        feed(named[path.name.partition("--")[0]], path.read_bytes(), tmp_path / "place")
        assert tracemalloc.get_traced_memory()[1] < MOST
    finally:
        tracemalloc.stop()
