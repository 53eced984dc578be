"""Readers of what servers answer, of files of other tools, and of what adapterkit keeps for itself; see `fuzz.readers`."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

Read = Callable[[bytes, Path], object]
Rows = Mapping[str, tuple[Read, tuple[bytes, ...]]]

_DIGEST = "a" * 64


def later(folder: Path, base: Path, adapter: Path) -> Rows:
    """By name, what reads and its seeds; ``folder`` holds small inputs that are made once."""
    return {
        "oci manifest": (_oci_manifest, (_json(_OCI),)),
        "oci referrers": (_oci_referrers, (_json({"manifests": [{**_LAYER, "artifactType": "x"}]}), _json(_OCI))),
        "oci headers": (_oci_headers, _HEADERS),
        "bucket manifest": (_bucket_manifest, (_json(_BUCKET),)),
        "bucket tag": (_bucket_tag, (_json({"manifest": _DIGEST}),)),
        "bucket listing": (_bucket_listing, _XML),
        "claim of a store": (_claim, (_json({"plan": "p", "run": "r"}), _json({"key": "made/a", "id": "7"}))),
        "results": (_results, tuple(map(_json, _RESULTS))),
        "policy": (_policy, (b'require = ["verification=held", "acc >= 0.7"]\n',)),
        "imatrix.gguf": (_imatrix, (_imatrix_seed(folder),)),
        "tensor types": (_tensor_types, (b"attn_v=Q8_0\nblk.[0-9]+.ffn=Q4_K\n",)),
        "metadata file": (_metadata, (_json({"general.author": "a", "general.tags": ["x"], "general.n": 1.5}),)),
        "prompts": (_prompts, (b'"a"\n{"messages": [{"role": "user", "content": "x"}]}\n{"ids": [1, 2]}\n',)),
        "model card": (_card, (_CARD,)),
        "files beside a base": (_beside_of(base), tuple(map(_json, _BESIDE))),
        "said of training": (_training_of(base, adapter), tuple(_TRAINING)),
        "adapter of mlx": (_mlx_of(folder), (_json(_MLX),)),
        "metadata of an adapter": (_single_of(folder), (_json({"transformer.r": 2, "transformer.lora_alpha": 4}),)),
        "file of an adapter": (_file, _files()),
        "index of an adapter": _indexed_of(folder, adapter),
        "pipeline": _pipeline_of(folder, base),
        "run of megatron": (_megatron, tuple(_RUNS)),
        "quantization": (_quantization, tuple(map(_json, _QUANTS))),
        "login": (_login, (_json({"auths": {"h": {"auth": "eDp5"}, "i": {"username": "x"}}, "credsStore": "y"}),)),
        "state of a recipe": (_state, (_json(_STATE),)),
        "journal": (_journal, (b'{"a": 1}\n{"file": "a", "tensor": "b", "digest": "c"}\n',)),
        "tekken.json": (_vocab_of("tekken.json"), (_json(_TEKKEN),)),
        "vocab.txt": (_vocab_of("vocab.txt"), (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n##b\n",)),
        "rwkv vocabulary": (_vocab_of("rwkv_vocab_v20230424.txt"), (b"1 'a' 1\n2 b'\\xff' 1\n3 '\\n' 1\n",)),
        "question of the UI": (_question, (b"q=x&kind=merged&page=2&figure=acc&least=0.5&sort=name",)),
        "config of LLaMA-Factory": (
            _factory,
            (b"model_name_or_path: x\nstage: sft\nadapterkit_name: y\nlist: [1, 2]\n",),
        ),
    }


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _put(place: Path, name: str, data: bytes) -> Path:
    path = place / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# ------------------------------------------------------------------ registries and stores

_LAYER = {
    "mediaType": "application/vnd.cncf.model.weight.v1.raw",
    "digest": f"sha256:{_DIGEST}",
    "size": 9,
    "annotations": {"org.cncf.model.filepath": "sub/a.safetensors"},
}
_OCI = {
    "schemaVersion": 2,
    "mediaType": "application/vnd.oci.image.manifest.v1+json",
    "config": {"mediaType": "application/vnd.cncf.model.config.v1+json", "digest": f"sha256:{_DIGEST}", "size": 2},
    "layers": [_LAYER, {**_LAYER, "annotations": {"org.opencontainers.image.title": "b.json"}}],
}
_HEADERS = (
    b'401\nwww-authenticate: Bearer realm="https://h/token",service="s",scope="repository:n:pull"\n\n{"token": "t"}',
    b'302\nlocation: https://other:5000/v2/x?y=1\ncontent-length: 9\n\n{"errors": [{"code": "X", "message": "y"}]}',
    b"202\nlocation: /v2/n/blobs/uploads/7\ncontent-length: 9\ndocker-content-digest: sha256:00\n\n{}",
)
_BUCKET = {"schema": 1, "files": [{"path": "sub/a.safetensors", "sha256": _DIGEST, "size": 9}]}
_UPLOADS = (
    b"<?xml version='1.0'?><ListMultipartUploadsResult xmlns='http://s3.amazonaws.com/doc/2006-03-01/'>"
    b"<IsTruncated>false</IsTruncated><Upload><Key>made/a</Key><UploadId>7</UploadId>"
    b"<Initiated>2025-01-01T00:00:00.000Z</Initiated></Upload></ListMultipartUploadsResult>"
)
_PARTS = (
    b"<ListPartsResult><IsTruncated>true</IsTruncated><NextPartNumberMarker>1</NextPartNumberMarker>"
    b"<Part><PartNumber>1</PartNumber><ETag>x</ETag><Size>5</Size></Part></ListPartsResult>"
)
_XML = (_UPLOADS, _PARTS, b"<Error><Code>NoSuchKey</Code><Message>gone</Message></Error>")


def _registry() -> Any:
    from adapterkit.oci.client import OciRegistry
    from adapterkit.oci.reference import parse_oci

    return OciRegistry(parse_oci("oci://h/n:t"))


def _oci_manifest(data: bytes, place: Path) -> object:
    from adapterkit.oci.modelpack import files_of
    from adapterkit.web import WebAnswer

    with mock.patch("adapterkit.oci.client.ask", return_value=WebAnswer(200, {}, data)):
        made = _registry().manifest("t")
    return None if made is None else files_of(made, "oci://h/n:t")


def _oci_referrers(data: bytes, place: Path) -> object:
    from adapterkit.web import WebAnswer

    with mock.patch("adapterkit.oci.client.ask", return_value=WebAnswer(200, {}, data)):
        return _registry().referrers(_DIGEST, "x")


def _oci_headers(data: bytes, place: Path) -> object:
    """A status, headers and a body: as an answer to reading, to asking for a blob and to beginning an upload."""
    from adapterkit.errors import AdapterkitError
    from adapterkit.web import WebAnswer, WebStream

    head, _, body = data.partition(b"\n\n")
    status, *rows = head.decode("latin-1").split("\n")
    number = int(status) if status.isascii() and status.isdecimal() and len(status) < 4 else 200
    pairs = (row.partition(": ") for row in rows)
    answer = WebAnswer(number, {name.lower(): value for name, _, value in pairs}, body, "https://h/x")
    token = WebAnswer(200, {}, body)
    asked = iter((answer, token, answer, token))

    def answered(*_: Any, **__: Any) -> WebAnswer:
        return next(asked, token)

    def streamed(*_: Any, **__: Any) -> Any:
        stream = WebStream(answer.status, answer.headers, mock.Mock(read1=lambda *_: b""), float("inf"), "h", False)
        return mock.MagicMock(__enter__=lambda _: stream, __exit__=lambda *_: None)

    with (
        mock.patch("adapterkit.oci.client.ask", answered),
        mock.patch("adapterkit.oci.client.stream", streamed),
    ):
        ended: AdapterkitError | None = None
        for use in (
            lambda: _registry().manifest("t"),
            lambda: _registry().put_blob(_DIGEST, 9, b"x"),
            lambda: _registry().read_blob(_DIGEST, 9),
        ):
            asked = iter((answer, token, answer, token))
            try:
                use()
            except AdapterkitError as error:
                ended = error
    if ended is not None and data not in _HEADERS:
        raise ended
    return None


def _bucket_manifest(data: bytes, place: Path) -> object:
    from adapterkit.bucket.layout import BucketReference, read_manifest
    from adapterkit.places import Address

    where = BucketReference(Address("s3", "b", "x"), "", hashlib.sha256(data).hexdigest())
    return read_manifest(data, where)


class _Objects:
    """A store in which every object has these bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def head(self, key: str) -> Any:
        from adapterkit.stores.store import StoredObject

        return StoredObject(key, len(self._data), "etag")

    def read(self, key: str, start: int, nbytes: int, etag: str = "") -> bytes:
        return self._data[start : start + nbytes]


def _bucket_tag(data: bytes, place: Path) -> object:
    from adapterkit.bucket.layout import BucketReference, found_tag
    from adapterkit.places import Address

    store: Any = _Objects(data)
    return found_tag(store, BucketReference(Address("s3", "b", "x"), "t"))


_S3: list[Any] = []


def _bucket_listing(data: bytes, place: Path) -> object:
    """An answer of S3 as boto3 and we make sense of it."""
    import botocore.awsrequest
    import botocore.session

    from adapterkit.errors import AdapterkitError
    from adapterkit.places import Address
    from adapterkit.stores.s3 import S3, Client

    if not _S3:
        session = botocore.session.Session()
        session.set_credentials("a", "b")
        s3 = session.create_client("s3", region_name="us-east-1", endpoint_url="http://127.0.0.1:9")
        answered: list[tuple[int, bytes]] = [(200, b"")]
        left = [0]

        def before(**_: Any) -> Any:
            left[0] -= 1  # a listing that never ends is cut off by an answer without a body
            status, body = answered[0] if left[0] > 0 else (200, b"<a/>")
            raw = mock.Mock(stream=lambda *_, **__: iter([body]), read=lambda *_: body)
            return botocore.awsrequest.AWSResponse("http://x", status, {}, raw)

        s3.meta.events.register_first("before-send.s3", before)
        made = Client(session, "b", s3, None, "http://127.0.0.1:9", "us-east-1", True)
        _S3.extend([S3(Address("s3", "b", ""), made, lambda: None), answered, left])
    store, answered, left = _S3
    ended: AdapterkitError | None = None
    for status in (200, 404):
        answered[0] = (status, data)
        for use in (lambda: store.uploads(""), lambda: store.resumed("a", "7").parts(), lambda: store.delete(["a"])):
            left[0] = 20
            try:
                with mock.patch("adapterkit.stores.faults.time.sleep"):
                    use()
            except AdapterkitError as error:
                ended = error
    if ended is not None and data not in _XML:
        raise ended
    return None


def _claim(data: bytes, place: Path) -> object:
    from adapterkit.checkpoint.store_claim import note_says
    from adapterkit.stores.store import StoredObject

    held: Any = _Objects(data)
    return note_says(held, StoredObject("x", len(data), "e"))


# ------------------------------------------------------------------ files of other tools

_FIGURES = {"acc,none": 0.71, "acc_stderr,none": 0.02, "sample_len": 9}
_RESULTS: tuple[Any, ...] = (
    {
        "results": {"arc": _FIGURES},
        "configs": {"arc": {}},
        "n-shot": {"arc": 5},
        "n-samples": {"arc": {"effective": 9}},
        "date": 1700000000.5,
        "config": {"limit": None},
    },
    {
        "config_general": {"x": 1},
        "results": {"leaderboard|arc|25": {"acc": 0.5, "acc_stderr": 0.1}, "all": {"acc": 0.5}},
        "config_tasks": {"leaderboard|arc": {"effective_num_docs": 3}},
        "versions": {"leaderboard|arc|25": 0},
    },
    {
        "status": "success",
        "eval": {"task": "t", "packages": {"inspect_ai": "1"}, "created": "2025-01-01T00:00:00+00:00"},
        "results": {"completed_samples": 4, "scores": [{"name": "m", "metrics": {"acc": {"value": 0.5}}}]},
        "stats": {"completed_at": "2025-01-01T00:00:00Z"},
    },
    [
        {"name": {"name": "em", "split": "test", "perturbation": {"name": "p"}}, "count": 1, "mean": 0.5},
        {"name": {"name": "num_instances", "split": "test"}, "count": 1, "mean": 9},
    ],
    {"task": "t", "date": "2026-01-31", "n": 5, "metrics": {"acc": 0.7}, "slices": {"lang=de": {"n": 2, "acc": 0.6}}},
)


def _results(data: bytes, place: Path) -> object:
    from adapterkit.results import read_results

    return read_results(_put(place, "results.json", data))


def _policy(data: bytes, place: Path) -> object:
    from adapterkit.registry.policies import read_policy
    from adapterkit.registry.policy import parse_policy

    return parse_policy(read_policy(str(_put(place, "policy.toml", data))))


def _imatrix(data: bytes, place: Path) -> object:
    from adapterkit.gguf.importance import add_up, load_importance

    path = _put(place, "imatrix.gguf", data)
    load_importance(path)
    return add_up([path, path])


def _imatrix_seed(folder: Path) -> bytes:
    import gguf
    import numpy

    writer = gguf.GGUFWriter(folder / "imatrix.gguf", "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["x"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 8)
    writer.add_tensor("blk.0.attn_q.weight.in_sum2", numpy.ones((1, 32), numpy.float32))
    writer.add_tensor("blk.0.attn_q.weight.counts", numpy.ones((1, 1), numpy.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return (folder / "imatrix.gguf").read_bytes()


def _tensor_types(data: bytes, place: Path) -> object:
    from adapterkit.gguf.said import read_pairs

    return read_pairs(_put(place, "types.txt", data))


def _metadata(data: bytes, place: Path) -> object:
    from adapterkit.gguf.said import _of_file

    return _of_file(_put(place, "metadata.json", data))


def _prompts(data: bytes, place: Path) -> object:
    from adapterkit.verbs.verify.prompts import read_prompts

    return read_prompts(_put(place, "prompts.jsonl", data))


_CARD = b"""---
license: apache-2.0
base_model: [org/base]
tags: [a, "b"]
date: 2025-01-01
model-index:
- name: x
  results: []
---
# x

text
"""


def _card(data: bytes, place: Path) -> object:
    from adapterkit.hub.card import card
    from adapterkit.lint.folders import _card as linted
    from adapterkit.registry.record import FileEntry, Record

    path = _put(place, "README.md", data)
    linted(path)
    record = Record("adapter", files=(FileEntry("a.safetensors", 8, "a" * 64),), method="lora").registered("x", 1)
    return card(record, "org/x", data, "README.md")


_BESIDE: tuple[Any, ...] = (
    {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1, "do_sample": True},
    [{"idx": 0, "path": "", "type": "x.Transformer"}, {"idx": 1, "path": "1_Pooling", "type": "x.Pooling"}],
    {"image_processor": {"image_mean": [0.5], "patch_size": 14}, "added_tokens_decoder": {"7": {"content": "<x>"}}},
    {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}},
)
_NAMES = (
    "generation_config.json",
    "modules.json",
    "1_Pooling/config.json",
    "preprocessor_config.json",
    "hf_quant_config.json",
)


def _beside_of(base: Path) -> Read:
    """The same bytes as every file that may lie beside a base."""
    from adapterkit.checkpoint.open import open_checkpoint

    config = json.loads((base / "config.json").read_bytes())

    def read(data: bytes, place: Path) -> object:
        from adapterkit.adapters.wider import patched_record
        from adapterkit.checkpoint.files import BytesFile
        from adapterkit.checkpoint.folder import SideFile
        from adapterkit.errors import AdapterkitError
        from adapterkit.gguf.arch import pooling
        from adapterkit.gguf.general import _sampling, read_card
        from adapterkit.gguf.towers.rows import _break_token, _preprocessor
        from adapterkit.serving.handover import _generation

        files = dict.fromkeys((*_NAMES, "tokenizer.json", "tokenizer_config.json"), data)
        said: Any = mock.Mock(files=files, ref="x", classes=())
        for name in _NAMES:
            _put(place, name, data)
        _put(place, "README.md", b"---\n" + data + b"\n---\n")
        card: Any = mock.Mock(sources=[mock.Mock(path=place / "model.safetensors")])
        read_card(card)
        _generation(place)
        patched_record(SideFile("hf_quant_config.json", BytesFile("x", data)), ["a"])
        for use in (
            lambda: _sampling(files),
            lambda: pooling.pooling(said),
            lambda: pooling.left_out(said),
            lambda: _preprocessor(files, "x"),
            lambda: _break_token(said),
        ):
            try:
                use()
            except AdapterkitError:
                continue
        return config, open_checkpoint

    return read


_TRAINING = (
    b"load_in_4bit: true\nbnb_4bit_quant_type: nf4\nbnb_4bit_use_double_quant: true\nquantization_bit: 4\n",
    b'{"quant_method": "bnb", "quant_bits": 4, "load_in_8bit": false}',
)


def _training_of(base: Path, adapter: Path) -> Read:
    from adapterkit.adapters.load import load_adapter

    def read(data: bytes, place: Path) -> object:
        from adapterkit.adapters.trained_base import trained_base

        at = place / "adapter"
        if not at.exists():
            at.mkdir()
            for path in adapter.iterdir():
                (at / path.name).write_bytes(path.read_bytes())
        for name in ("README.md", "args.json", "training_args.yaml"):
            (at / name).write_bytes(data)
        return trained_base(load_adapter(at))

    return read


_MLX = {
    "fine_tune_type": "lora",
    "model": "org/base",
    "num_layers": 1,
    "lora_parameters": {"rank": 2, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]},
}


def _mlx_of(folder: Path) -> Read:
    from safetensors.torch import save_file
    from torch import ones

    at = folder / "mlx"
    at.mkdir()
    name = "model.layers.0.self_attn.q_proj"
    save_file({f"{name}.lora_a": ones(8, 2), f"{name}.lora_b": ones(2, 8)}, at / "adapters.safetensors")

    def read(data: bytes, place: Path) -> object:
        import adapterkit

        (at / "adapter_config.json").write_bytes(data)
        return adapterkit.inspect(at)

    return read


def _single_of(folder: Path) -> Read:
    """A file of Diffusers, with the configs in its metadata."""
    from safetensors.torch import save
    from torch import ones

    name = "transformer.blocks.0.attn.to_q"
    tensors = {f"{name}.lora_A.weight": ones(2, 8), f"{name}.lora_B.weight": ones(8, 2)}

    def read(data: bytes, place: Path) -> object:
        import adapterkit

        said = data.decode("utf-8", "replace")
        path = _put(place, "lora.safetensors", save(tensors, metadata={"lora_adapter_metadata": said, "format": "pt"}))
        return adapterkit.inspect(path)

    return read


def _files() -> tuple[bytes, ...]:
    """One file each of kohya's scripts, of ComfyUI, of LyCORIS and of Diffusers."""
    from safetensors.torch import save
    from torch import ones, tensor

    flat = "lora_unet_double_blocks_0_img_attn_qkv"
    dotted = "diffusion_model.double_blocks.0.img_attn.qkv"
    up, down = ones(24, 2), ones(2, 8)
    return (
        save({f"{flat}.lora_up.weight": up, f"{flat}.lora_down.weight": down, f"{flat}.alpha": tensor(2.0)}),
        save({f"{dotted}.lora_B.weight": up, f"{dotted}.lora_A.weight": down, f"{dotted}.alpha": tensor(2.0)}),
        save({f"{flat}.hada_{name}": ones(8, 8) for name in ("w1_a", "w1_b", "w2_a", "w2_b")}),
        save({"unet.down_blocks.0.attentions.0.to_q.lora.up.weight": up, "text_encoder.a.lora_A.weight": down}),
    )


def _file(data: bytes, place: Path) -> object:
    import adapterkit

    return adapterkit.inspect(_put(place, "lora.safetensors", data))


def _indexed_of(folder: Path, adapter: Path) -> tuple[Read, tuple[bytes, ...]]:
    from safetensors.torch import load_file, save_file

    at = folder / "indexed"
    at.mkdir()
    (at / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    tensors = load_file(adapter / "adapter_model.safetensors")
    names = {name: f"adapter_model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for file in set(names.values()):
        save_file({name: tensors[name] for name, other in names.items() if other == file}, at / file)

    def read(data: bytes, place: Path) -> object:
        import adapterkit

        (at / "adapter_model.safetensors.index.json").write_bytes(data)
        return adapterkit.inspect(at)

    return read, (_json({"metadata": {"total_size": 9}, "weight_map": names}),)


def _pipeline_of(folder: Path, base: Path) -> tuple[Read, tuple[bytes, ...]]:
    at = folder / "pipeline"
    (at / "text_encoder").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (at / "text_encoder" / name).write_bytes((base / name).read_bytes())

    def read(data: bytes, place: Path) -> object:
        import adapterkit

        (at / "model_index.json").write_bytes(data)
        return adapterkit.inspect(at)

    said = {
        "_class_name": "XPipeline",
        "text_encoder": ["transformers", "LlamaModel"],
        "scheduler": [None, None],
        "n": 1,
    }
    return read, (_json(said),)


_RUNS = (
    b"peft:\n  _target_: x.peft.lora.LoRA\n  alpha: 16\n  dim: 8\nmodel:\n  num_attention_heads: 4\n  num_query_groups: 2\n",
    b"model_transform: {_target_: x.DoRA, alpha: 1.5, dim: 4}\nconfig: &c {kv_channels: 8}\nother: *c\n",
)


def _megatron(data: bytes, place: Path) -> object:
    from adapterkit.checkpoint.sharded import sharded_checkpoint
    from adapterkit.pickles.megatron import _of_run

    for step in (1, 2):
        _put(place, f"iter_000000{step}/.metadata", b"x")
    _put(place, "latest_checkpointed_iteration.txt", data[:7] if data[:1].isdigit() else b"2")
    sharded_checkpoint(place)
    return _of_run(_put(place, "run_config.yaml", data))


_QUANTS: tuple[Any, ...] = (
    {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False, "dynamic": {"-:x": {}}},
    {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "llm_int8_skip_modules": ["x"],
    },
    {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}}},
        "ignore": ["re:.*lm_head", "lm_head"],
    },
    {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}},
    {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}},
    {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"], "group_size": 16},
)


def _quantization(data: bytes, place: Path) -> object:
    """As the config of a base that stores nothing so: what the config says is read before that is seen."""
    from adapterkit.checkpoint.json_data import parse_json
    from adapterkit.codecs import table
    from adapterkit.errors import CheckpointError

    config = {"quantization_config": parse_json(data, "config.json"), "model_type": "llama"}
    if table.quantization(config) is None:
        return None
    table.method_of(config)
    table.absent_modules({}, config)
    try:
        table.find_weights({}, config, "x")
    except CheckpointError as error:
        if "no tensor is stored so" not in str(error):
            raise
    return table.without_quantization(config)


def _login(data: bytes, place: Path) -> object:
    from adapterkit.oci.client import login_of

    with mock.patch.dict("os.environ", {"REGISTRY_AUTH_FILE": str(_put(place, "auth.json", data))}):
        return [login_of(host) for host in ("h", "i")]


_FACTORY = "train.yaml"


def _factory(data: bytes, place: Path) -> object:
    from adapterkit.integrations.llamafactory import _yaml

    return _yaml(data, _FACTORY)


# ------------------------------------------------------------------ what is kept here

_STATE = {
    "format": 1,
    "hashes": {"/x": [1, 2, 3, 4, "a"]},
    "made": {},
    "pages": {"p": _DIGEST},
    "coming": {},
}


def _state(data: bytes, place: Path) -> object:
    from adapterkit.recipe.state import FOLDER, State

    _put(place, f"{FOLDER}/adapterkit.json", data)
    return State(place / "adapterkit.toml").made


def _journal(data: bytes, place: Path) -> object:
    from adapterkit.checkpoint.journal import JOURNAL, Journal

    journal = Journal(place, "x")
    _put(place, JOURNAL, journal._first() + b"\n" + data)
    return journal.read()


def _question(data: bytes, place: Path) -> object:
    from adapterkit.ui.server import read_query

    return read_query(data.decode("latin-1"))


# ------------------------------------------------------------------ more tokenizers

_TEKKEN = {
    "config": {"pattern": "x", "default_vocab_size": 1002, "default_num_special_tokens": 1000},
    "vocab": [
        {"rank": 0, "token_bytes": base64.b64encode(b"a").decode(), "token_str": "a"},
        {"rank": 1, "token_bytes": base64.b64encode(b"b").decode(), "token_str": "b"},
    ],
    "special_tokens": [{"rank": 0, "token_str": "<unk>", "is_control": True}],
}


def _vocab_of(name: str) -> Read:
    def read(data: bytes, place: Path) -> object:
        from adapterkit.gguf.vocab import read_vocab

        kind = {"vocab.txt": "wordpiece", "tekken.json": "auto"}.get(name, "world")
        pre = "tekken" if name == "tekken.json" else None
        return read_vocab({name: data}, {"model_type": "llama"}, kind=kind, rows=1002, pre=pre)

    return read
