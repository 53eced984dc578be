"""Pipelines of diffusers in buckets: as bases and as outputs, the same files as on a disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from store_server import Proxy, client_of

import adapterkit
from adapterkit.errors import OutputError

TO_Q = "transformer_blocks.0.attn.to_q"
BUCKET = "models"  # of `conftest`
SHARDS = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]


def pipeline(folder: Path) -> Path:
    """A denoiser in two shards, and a text encoder."""
    torch.manual_seed(0)
    said = {"transformer": ["diffusers", "FluxTransformer2DModel"], "text_encoder": ["transformers", "CLIPTextModel"]}
    for name, config in (
        ("transformer", {"_class_name": "FluxTransformer2DModel"}),
        ("text_encoder", {"model_type": "clip_text_model"}),
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", **said}))
    save_file({f"{TO_Q}.weight": torch.randn(8, 8)}, folder / "transformer" / SHARDS[0], {"format": "pt"})
    save_file({"x_embedder.weight": torch.randn(8, 8)}, folder / "transformer" / SHARDS[1], {"format": "pt"})
    places = {f"{TO_Q}.weight": SHARDS[0], "x_embedder.weight": SHARDS[1]}
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 512}, "weight_map": places}))
    weights = {"text_model.encoder.layers.0.mlp.fc1.weight": torch.randn(8, 8)}
    save_file(weights, folder / "text_encoder" / "model.safetensors", {"format": "pt"})
    return folder


def file_of(path: Path) -> Path:
    modules = (f"transformer.{TO_Q}", "text_encoder.text_model.encoder.layers.0.mlp.fc1")
    tensors = {f"{one}.lora_A.weight": torch.randn(2, 8) for one in modules}
    save_file(tensors | {f"{one}.lora_B.weight": torch.randn(8, 2) for one in modules}, path)
    return path


def files(folder: Path) -> dict[str, bytes]:
    found = {str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*") if one.is_file()}
    return {name: data for name, data in found.items() if name != "adapterkit.json"}  # which has its minute


def fetched(server: str, prefix: str) -> dict[str, bytes]:
    client = client_of(server)
    listed = client.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/")["Contents"]
    found = {
        one["Key"].removeprefix(f"{prefix}/"): client.get_object(Bucket=BUCKET, Key=one["Key"])["Body"].read()
        for one in listed
    }
    assert "adapterkit.json" in found
    return {name: data for name, data in found.items() if name != "adapterkit.json"}


def test_a_pipeline_goes_into_a_bucket_and_comes_from_one(s3: Proxy, server: str, place: str, tmp_path: Path) -> None:
    base, file = pipeline(tmp_path / "pipe"), file_of(tmp_path / "lora.safetensors")
    for name, data in files(base).items():
        client_of(server).put_object(Bucket=BUCKET, Key=f"{place}/pipe/{name}", Body=data)
    adapterkit.merge(base, [file], tmp_path / "out")
    wanted = files(tmp_path / "out")
    assert f"transformer/{SHARDS[0]}" in wanted
    there, out = f"s3://{BUCKET}/{place}/pipe", f"s3://{BUCKET}/{place}/merged"
    adapterkit.merge(there, [file], tmp_path / "again")
    assert files(tmp_path / "again") == wanted
    adapterkit.merge(there, [file], out)
    assert fetched(server, f"{place}/merged") == wanted
    assert adapterkit.verify(out, base=there, adapters=[file]).ok
    with pytest.raises(OutputError, match="exists"):
        adapterkit.merge(base, [file], out)
    adapterkit.merge(base, [file], out, force=True)
    adapterkit.merge(base, [file], f"{out}-by-workers", on="local", workers=2)
    assert fetched(server, f"{place}/merged") == fetched(server, f"{place}/merged-by-workers") == wanted
