"""Every reader of foreign bytes, with seeds for it: what the fuzzer feeds, in this process.

A reader takes bytes and a folder of its own. It may raise `AdapterkitError`, and nothing else.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import plain_adapter, plain_base

import adapterkit
from fuzz.later_readers import later

Read = Callable[[bytes, Path], object]


@dataclass(frozen=True)
class Reader:
    """``read`` is fed mutations of ``seeds``."""

    read: Read
    seeds: tuple[bytes, ...]


def readers(folder: Path) -> Mapping[str, Reader]:
    """All of them; ``folder`` holds small inputs that are made once."""
    base = plain_base(folder / "base", layers=1, width=8)
    sharded = plain_base(folder / "sharded", layers=1, width=8, shards=2)
    adapter = plain_adapter(folder / "adapter", base, rank=2)
    files = {path.name: path.read_bytes() for path in (*base.iterdir(), *adapter.iterdir())}
    index = (sharded / "model.safetensors.index.json").read_bytes()

    def beside(name: str, source: Path, use: Callable[[Path], object]) -> Read:
        """The file ``name`` of a folder is replaced; the rest of it stays."""

        def read(data: bytes, place: Path) -> object:
            at = place / source.name
            if not at.exists():
                at.mkdir()
                for path in source.iterdir():
                    (at / path.name).write_bytes(path.read_bytes())
            (at / name).write_bytes(data)
            return use(at)

        return read

    def plan(place: Path) -> object:
        adapterkit.inspect(place)
        return adapterkit.check(place, [adapter])

    def adapted(place: Path) -> object:
        adapterkit.inspect(place, base=base)
        return adapterkit.check(base, [place])

    return {
        "safetensors": Reader(_header, (files["model.safetensors"], _small())),
        "index": Reader(beside("model.safetensors.index.json", sharded, adapterkit.inspect), (index,)),
        "config.json": Reader(beside("config.json", base, plan), (files["config.json"],)),
        "adapter_config": Reader(
            beside("adapter_config.json", adapter, adapted), (files["adapter_config.json"], _config(files))
        ),
        "adapter weights": Reader(
            beside("adapter_model.safetensors", adapter, adapted), (files["adapter_model.safetensors"],)
        ),
        "gguf": Reader(_gguf, (_gguf_seed(),)),
        "tokenizer.json": Reader(_tokenizer, (json.dumps(_TOKENIZER).encode(),)),
        "tokenizer.model": Reader(_sentencepiece, (_piece_seed(),)),
        "tokenizer_config": Reader(_settings, (json.dumps(_SETTINGS).encode(),)),
        "recipe": Reader(_recipe, (_RECIPE,)),
        "lock": Reader(_lock, (_LOCK,)),
        "record": Reader(_record, (_record_seed(),)),
        "bundle": Reader(_bundle, (_bundle_seed(folder, adapter),)),
        "plan": Reader(_plan, (adapterkit.plan_merge(base, [adapter], headers_only=False).plan.to_json().encode(),)),
        "hub answer": Reader(_hub, (json.dumps(_INFO).encode(),)),
        "signature": Reader(_signature, (_SIGNATURE,)),
        "manifest": Reader(_manifest, (_MANIFEST,)),
        "statements": Reader(_statements, _sealed()),
        "statement": Reader(_statement, (_STATEMENT,)),
        "mergekit": Reader(_mergekit, _MERGEKIT),
        "imatrix": Reader(_imatrix, (_imatrix_seed(),)),
        **{name: Reader(read, seeds) for name, (read, seeds) in later(folder, base, adapter).items()},
    }


# ------------------------------------------------------------------ weights


def _small() -> bytes:
    head = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "empty": {"dtype": "BF16", "shape": [0, 4], "data_offsets": [16, 16]},
        "one": {"dtype": "I8", "shape": [], "data_offsets": [16, 17]},
    }
    raw = json.dumps(head).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + bytes(17)


def _config(files: Mapping[str, bytes]) -> bytes:
    config = json.loads(files["adapter_config.json"])
    more = {
        "rank_pattern": {"q_proj": 2, r"layers\.[0-9]+\.mlp": 2},
        "alpha_pattern": {"up_proj": 3},
        "layer_replication": [[0, 1], [0, 1]],
        "target_modules": r".*(q|up)_proj",
        "use_rslora": True,
        "modules_to_save": ["lm_head"],
    }
    return json.dumps({**config, **more}).encode()


def _header(data: bytes, place: Path) -> object:
    from adapterkit.checkpoint.header import parse_header

    return parse_header(lambda at, count: data[at : at + count], len(data), "x")


def _gguf(data: bytes, place: Path) -> object:
    from adapterkit.gguf.reader import parse_gguf

    found = parse_gguf(lambda at, count: data[at : at + count], len(data), "x")
    return [found.get(key, None) for key in found.keys]


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _gguf_seed() -> bytes:
    keys = [
        _text("general.architecture") + struct.pack("<I", 8) + _text("llama"),
        _text("general.alignment") + struct.pack("<II", 4, 32),
        _text("tokens") + struct.pack("<IIQ", 9, 8, 2) + _text("a") + _text("b"),
        _text("numbers") + struct.pack("<IIQ", 9, 4, 2) + bytes(8),
        _text("x") + struct.pack("<If", 6, 1.5),
    ]
    infos = [
        _text("a") + struct.pack("<IQQIQ", 2, 4, 2, 0, 0),
        _text("b") + struct.pack("<IQIQ", 1, 32, 8, 32),
    ]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(keys)) + b"".join(keys + infos)
    return head + bytes(-len(head) % 32 + 96)


def _imatrix(data: bytes, place: Path) -> object:
    from adapterkit.gguf.imatrix import parse_legacy

    return parse_legacy(data)


def _imatrix_seed() -> bytes:
    entry = struct.pack("<i", 3) + b"blk" + struct.pack("<ii", 2, 4) + struct.pack("<4f", 1, 2, 3, 4)
    return struct.pack("<i", 1) + entry + struct.pack("<ii", 2, 3) + b"set"


# ------------------------------------------------------------------ tokenizers

_VOCAB = {chr(33 + number): number for number in range(60)}
_TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [{"id": 60, "content": "<s>", "special": True}, {"id": 61, "content": "</s>", "special": True}],
    "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE", "vocab": _VOCAB, "merges": ["! #", ["a", "b"]]},
}
_SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": {"content": "</s>"},
    "add_bos_token": True,
    "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    "added_tokens_decoder": {"60": {"content": "<s>"}},
}


def _vocab(files: Mapping[str, bytes], kind: str = "auto") -> object:
    from adapterkit.gguf.vocab import read_vocab

    return read_vocab(files, {"vocab_size": 62, "model_type": "llama"}, kind=kind, rows=62)


def _tokenizer(data: bytes, place: Path) -> object:
    return _vocab({"tokenizer.json": data, "tokenizer_config.json": json.dumps(_SETTINGS).encode()})


def _settings(data: bytes, place: Path) -> object:
    return _vocab({"tokenizer.json": json.dumps(_TOKENIZER).encode(), "tokenizer_config.json": data})


def _sentencepiece(data: bytes, place: Path) -> object:
    return _vocab({"tokenizer.model": data})


def _piece_seed() -> bytes:
    def piece(text: str, kind: int) -> bytes:
        body = (
            b"\x0a" + bytes([len(text)]) + text.encode() + b"\x15" + struct.pack("<f", -1.0) + b"\x18" + bytes([kind])
        )
        return b"\x0a" + bytes([len(body)]) + body

    return piece("<unk>", 2) + piece("<s>", 3) + piece("</s>", 3) + piece("a", 1) + piece("<0x41>", 6)


# ------------------------------------------------------------------ recipes, plans, records


_RECIPE = b"""base = {ref = "base", as-trained = "nf4"}
[adapters]
a = {ref = "adapter", weight = 0.5}
[merge]
method = "ties"
parameters = {density = 0.4}
[verify]
level = "tensors"
html = "page.html"
[outputs.merged]
path = "build/merged"
adapters = ["a"]
register = {name = "x", alias = "prod", meta = {k = "v"}}
[outputs.small]
path = "build/small.gguf"
from = "merged"
quant = "Q4_K_M"
"""
_LOCK = json.dumps(
    {"format": 1, "recipe": "a" * 64, "versions": {"adapterkit": "1"}, "inputs": {}, "outputs": {}, "machine": "x"}
).encode()


def _recipe(data: bytes, place: Path) -> object:
    from adapterkit.recipe.parse import read_recipe
    from adapterkit.recipe.steps import check_inside, steps_of

    for name in ("base", "adapter"):
        (place / name).mkdir(exist_ok=True)
    (place / "adapterkit.toml").write_bytes(data)
    file = read_recipe(place / "adapterkit.toml")
    steps = steps_of(file)
    check_inside(file, steps)
    return steps


def _lock(data: bytes, place: Path) -> object:
    from adapterkit.recipe.lock import read_lock

    (place / "adapterkit.lock").write_bytes(data)
    return read_lock(place / "adapterkit.lock")


def _plan(data: bytes, place: Path) -> object:
    from adapterkit.checkpoint.plan import Plan

    return Plan.from_json(data.decode("utf-8", "replace"))


def _record(data: bytes, place: Path) -> object:
    from adapterkit.registry.record import read

    try:
        return read(data, "x")
    except adapterkit.AdapterkitError:
        return read(data, "x", exact=False)


def _record_seed() -> bytes:
    from adapterkit.registry.record import FileEntry, Record

    return Record("adapter", files=(FileEntry("a.safetensors", 8, "a" * 64),), method="lora").registered("x", 1).data


def _bundle(data: bytes, place: Path) -> object:
    import shutil

    from adapterkit.registry.bundle import import_bundle

    shutil.rmtree(place / "home", ignore_errors=True)
    (place / "x.bundle").write_bytes(data)
    return import_bundle(place / "x.bundle", home=place / "home")


def _bundle_seed(folder: Path, adapter: Path) -> bytes:
    from adapterkit.registry.bundle import export_bundle
    from adapterkit.registry.register import register

    register(adapter, "x", home=folder / "home")
    export_bundle(("x",), folder / "x.bundle", home=folder / "home")
    return (folder / "x.bundle").read_bytes()


# ------------------------------------------------------------------ the Hub, signatures

_INFO = {
    "_id": "o/m",
    "id": "o/m",
    "sha": "a" * 40,
    "siblings": [
        {"rfilename": "config.json", "size": 2, "blobId": "b" * 40},
        {"rfilename": "m.safetensors", "size": 9, "lfs": {"sha256": "c" * 64, "size": 9, "pointerSize": 130}},
    ],
    "tags": [],
    "lastModified": "2025-01-01T00:00:00.000Z",
}
_SIGNATURE = json.dumps(
    {
        "dsseEnvelope": {
            "payload": "eyJwcmVkaWNhdGUiOiB7InJlc291cmNlcyI6IFtdLCAic2VyaWFsaXphdGlvbiI6IHsibWV0aG9kIjogImZpbGVzIn19fQ==",
            "payloadType": "application/vnd.in-toto+json",
            "signatures": [{"sig": "AA=="}],
        }
    }
).encode()


def _hub(data: bytes, place: Path) -> object:
    from unittest import mock

    import huggingface_hub as hf

    from adapterkit.checkpoint.hub import hub_errors, repo_info
    from adapterkit.checkpoint.hub_bytes import stated_of

    def answer(self: Any, repo: str, **_: Any) -> Any:
        from huggingface_hub.hf_api import ModelInfo

        return ModelInfo(**json.loads(data))

    # What goes wrong while the client makes sense of an answer is as if it had gone wrong inside of it.
    answer.__globals__.setdefault("__name__", "huggingface_hub")
    with mock.patch.object(hf.HfApi, "model_info", answer), hub_errors("o/m"):
        try:
            info = repo_info("o/m", None)
        except (TypeError, ValueError, RecursionError, AttributeError, KeyError) as error:
            from adapterkit.checkpoint.hub import _inside_the_client

            trace = error.__traceback__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            ours = trace is not None and trace.tb_frame.f_code is answer.__code__
            if ours or _inside_the_client(error):
                return None
            raise
        return stated_of(info.siblings)


def _signature(data: bytes, place: Path) -> object:
    from adapterkit.provenance.dsse import read_envelopes

    return read_envelopes(data, "model.sig")


_EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
_MANIFEST = json.dumps(
    {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "out", "digest": {"sha256": _EMPTY}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {
            "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": ["x"]},
            "resources": [],
        },
    }
).encode()
_STATEMENT = json.dumps(
    {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "a", "digest": {"sha256": "ab" * 32}}, {"name": "b/c", "digest": {"sha256": "cd" * 32}}],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {"buildDefinition": {"buildType": "x", "resolvedDependencies": [{"annotations": {}}]}},
    }
).encode()


def _manifest(data: bytes, place: Path) -> object:
    """What a signature says that was verified: its key may be anybody's."""
    from adapterkit.provenance.signing import listed

    return listed(data, "x")


def _sealed() -> tuple[bytes, ...]:
    from cryptography.hazmat.primitives.asymmetric import ec

    from adapterkit.provenance.dsse import seal

    key = ec.derive_private_key(7, ec.SECP256R1())
    return (seal(_STATEMENT, key) + seal(b"{}", key), _SIGNATURE)


def _statements(data: bytes, place: Path) -> object:
    from cryptography.hazmat.primitives.asymmetric import ec

    from adapterkit.provenance.dsse import read_envelopes

    key = ec.derive_private_key(7, ec.SECP256R1()).public_key()
    return [one.signed_by(key) for one in read_envelopes(data, "x.intoto.jsonl")]


def _statement(data: bytes, place: Path) -> object:
    from adapterkit.provenance import attested

    return attested._statement(data, "x").words


# ------------------------------------------------------------------ mergekit

_MERGEKIT = (
    b"""merge_method: ties
base_model: org/base
models:
  - model: org/base+org/lora
    parameters: {weight: [0.1, 0.5], density: 0.5}
  - {model: ./b, parameters: {weight: 1}}
parameters: {normalize: true, int8_mask: true}
dtype: bfloat16
tokenizer_source: base
""",
)


def _mergekit(data: bytes, place: Path) -> object:
    from adapterkit.recipe.mergekit import read_mergekit

    (place / "mergekit.yaml").write_bytes(data)
    return read_mergekit(place / "mergekit.yaml")
