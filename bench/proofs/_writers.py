"""Every verb that writes, on tiny inputs, as what the proofs ``faults`` and ``kills`` do to it: start, run, look.

The Hub and the store are servers on the loopback interface, those of the tests.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import adapterkit
from adapterkit.disk import recover
from adapterkit.registry.bundle import export_bundle, import_bundle
from adapterkit.registry.checkout import checkout
from adapterkit.registry.fsck import fsck
from adapterkit.registry.register import register

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

BUCKET = "models"
RECIPE = """\
base = "base"

[adapters]
style = "adapter"

[outputs.merged]
path = "merged"
adapters = ["style"]

[outputs.half]
path = "half"
dtype = "f16"
adapters = ["style"]
register = "made"
"""


def inputs(folder: Path) -> tuple[Path, Path]:
    """A base of two layers and an adapter."""
    torch.manual_seed(0)
    names = [f"model.layers.{layer}.self_attn.{leaf}_proj" for layer in range(2) for leaf in "qkv"]
    tensors = {f"{name}.weight": torch.randn(16, 16).bfloat16() for name in names}
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapter.mkdir()
    factors = {}
    for name in names:
        factors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, 16)
        factors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(16, 2)
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "k_proj", "v_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return base, adapter


def gguf_base(path: Path) -> Path:
    """A GGUF file with the layers of the other base."""
    import gguf
    import numpy

    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (("block_count", 2), ("head_count", 2), ("head_count_kv", 2)):
        name = key if key == "block_count" else f"attention.{key}"
        writer.add_uint32(f"llama.{name}", value)
    rng = numpy.random.default_rng(0)
    writer.add_tensor("token_embd.weight", rng.standard_normal((8, 16)).astype(numpy.float32))
    writer.add_tensor("output_norm.weight", numpy.ones(16, numpy.float32))
    for layer in range(2):
        for leaf in "qkv":
            values = rng.standard_normal((16, 16)).astype(numpy.float32)
            writer.add_tensor(f"blk.{layer}.attn_{leaf}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def state(out: Path) -> str | None:
    """A digest of everything at the target; None where there is nothing."""
    if not os.path.lexists(out):
        return None
    files = [out] if out.is_file() else sorted(path for path in out.rglob("*") if path.is_file())
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(out.parent)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


class Writer:
    """A verb, and the place that it writes to."""

    def start(self) -> None:
        """Bring the place to what it is before a run."""
        raise NotImplementedError

    def run(self) -> object:
        """The verb."""
        raise NotImplementedError

    def again(self) -> object:
        """The verb, as one runs it after a run that was cut off."""
        return self.run()

    def warm(self) -> None:
        """Import what the verb imports, so that a forked run spends its time on the work."""
        self.start()
        self.run()

    def state(self) -> str | None:
        """What is at the target; None where it is not there, or as it was at the start."""
        raise NotImplementedError

    def beside(self) -> list[str]:
        """What lies around the target, itself too."""
        raise NotImplementedError

    def mend(self) -> None:
        """What the next look at the target does."""

    def take_away(self) -> None:
        """What a user does who wants the target made again, where the verb does not go on by itself."""


@dataclass
class File(Writer):
    """A file or a folder."""

    verb: Callable[[Path], object]
    out: Path
    old: bool = False  # something is there, which is replaced
    found: str | None = None

    def start(self) -> None:
        shutil.rmtree(self.out.parent, ignore_errors=True)
        self.out.parent.mkdir()
        if self.old:
            self.out.mkdir()
            (self.out / "old").write_text("old")
            self.found = state(self.out)

    def run(self) -> object:
        return self.verb(self.out)

    def state(self) -> str | None:
        now = state(self.out)
        return None if now == self.found else now

    def beside(self) -> list[str]:
        return sorted(os.listdir(self.out.parent))

    def mend(self) -> None:
        recover(self.out)

    def take_away(self) -> None:
        remove(self.out)
        if self.old:
            self.start()


@dataclass
class Home(Writer):
    """A home of a registry and one name in it."""

    verb: Callable[[Path], object]
    home: Path
    name: str

    def start(self) -> None:
        shutil.rmtree(self.home, ignore_errors=True)

    def run(self) -> object:
        return self.verb(self.home)

    def state(self) -> str | None:
        if not self.home.exists():
            return None
        problems = [one.sentence for one in fsck(home=self.home).problems]
        there = any((self.home / "records" / self.name).glob("*.json"))
        return f"damaged: {problems}" if problems else "there" if there else None

    def beside(self) -> list[str]:
        return []  # what a killed run left in staging is swept by age


@dataclass
class Project(Writer):
    """A recipe of two outputs, one of which is registered."""

    base: Path
    adapter: Path
    place: Path
    kept: dict[str, str | None] = field(default_factory=dict)

    def start(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        shutil.copytree(self.base, self.place / "base")
        shutil.copytree(self.adapter, self.place / "adapter")
        (self.place / "adapterkit.toml").write_text(RECIPE)

    def run(self) -> object:
        os.environ["ADAPTERKIT_HOME"] = str(self.place / "home")
        return adapterkit.build(self.place / "adapterkit.toml", jobs=1)

    def state(self) -> str | None:
        """Outputs are right one by one: the run that comes next makes the others."""
        now = {name: state(self.place / name) for name in ("merged", "half")}
        if None not in now.values() and not self.kept:
            self.kept = dict(now)
        home = self.place / "home"
        problems = [one.sentence for one in fsck(home=home).problems] if home.exists() else []
        wrong = [name for name, found in now.items() if found not in (None, self.kept.get(name))]
        if problems or wrong:
            return f"damaged: {problems} {wrong}"
        whole = None not in now.values() and (self.place / "adapterkit.lock").exists()
        whole = whole and any((home / "records").rglob("*.json"))
        return json.dumps(now) if whole else None

    def beside(self) -> list[str]:
        inner = self.place / ".adapterkit"
        return sorted(os.listdir(self.place)) + (sorted(os.listdir(inner)) if inner.is_dir() else [])


@dataclass
class Repository(Writer):
    """A repository on the Hub."""

    home: Path
    hub: Any

    def start(self) -> None:
        self.hub.repos.clear()
        self.hub.tags.clear()
        self.hub.uploads.clear()
        self.hub.blobs.clear()

    def run(self) -> object:
        import pytest
        from hub import without_waits

        with pytest.MonkeyPatch.context() as patch:
            without_waits(patch)
            return adapterkit.push("x", "org/made", tag="v1", home=self.home)

    def state(self) -> str | None:
        repo = self.hub.repos.get("org/made")
        files = self.hub.files("org/made") if repo is not None and repo.commits else {}
        if not any(name.endswith(".safetensors") for name in files):
            return None if set(files) <= {".gitattributes"} else f"half: {sorted(files)}"
        parts = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        return json.dumps(parts, sort_keys=True)

    def beside(self) -> list[str]:
        """A commit that has no tag yet is whole; the next push sets it."""
        return sorted(self.hub.tags.get("org/made", {}))


@dataclass
class Bucket(Writer):
    """An output in a store."""

    base: Path
    adapter: Path
    client: Any

    def _keys(self) -> dict[str, str]:
        found = self.client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
        return {one["Key"]: one["ETag"] for one in found}

    def _uploads(self) -> list[str]:
        return [one["Key"] for one in self.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])]

    def start(self) -> None:
        for key in self._keys():
            self.client.delete_object(Bucket=BUCKET, Key=key)
        for one in self.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", []):
            self.client.abort_multipart_upload(Bucket=BUCKET, Key=one["Key"], UploadId=one["UploadId"])

    def run(self) -> object:
        return adapterkit.merge(self.base, [self.adapter], f"s3://{BUCKET}/made", jobs=1)

    def again(self) -> object:
        """In a store nobody can tell a run that was killed from a slow one: the next is told to go on with it."""
        return adapterkit.merge(self.base, [self.adapter], f"s3://{BUCKET}/made", jobs=1, resume=True)

    def warm(self) -> None:
        """The client of a store has threads, which a fork does not take along: it is imported, and not used. A merge to a
        folder imports the rest."""
        import boto3
        import obstore.store  # noqa: F401

        import adapterkit.checkpoint.store_sink
        import adapterkit.stores.s3

        boto3.session.Session().client("s3")
        with tempfile.TemporaryDirectory() as folder:
            adapterkit.merge(self.base, [self.adapter], Path(folder) / "made", jobs=1)

    def state(self) -> str | None:
        """A folder in a store is there when its config is: it is written last."""
        keys = [key for key in self._keys() if key.startswith("made/")]
        if "made/config.json" not in keys:
            return None
        parts = {}
        for key in sorted(keys):
            body = self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
            parts[key] = hashlib.sha256(body).hexdigest()
        return json.dumps(parts)

    def beside(self) -> list[str]:
        return sorted(key for key in self._keys() if not key.startswith("made/")) + self._uploads()

    def take_away(self) -> None:
        self.start()


@contextlib.contextmanager
def loopback(top: Path, *, hub: bool, store: bool) -> Iterator[tuple[Any, Any]]:
    """A Hub that can be written to, and a client of a store; None where it is not asked for."""
    import pytest

    with contextlib.ExitStack() as held:
        patch, served, client = held.enter_context(pytest.MonkeyPatch.context()), None, None
        if hub:
            from hub import TOKEN, client_of
            from hub_writes import WritableHub
            from huggingface_hub import hf_api

            served = held.enter_context(WritableHub())
            held.enter_context(client_of(served, top / "cache", patch, TOKEN))
            defaults = (served.url, *(hf_api.HfApi.__init__.__defaults__ or ())[1:])
            patch.setattr(hf_api.HfApi.__init__, "__defaults__", defaults)
        if store:
            import store_server

            endpoint = held.enter_context(store_server.serving(top / "weed"))
            client = store_server.client_of(endpoint)
            client.create_bucket(Bucket=BUCKET)
            patch.setenv("AWS_ENDPOINT_URL", endpoint)
            patch.setenv("AWS_ACCESS_KEY_ID", store_server.KEY)
            patch.setenv("AWS_SECRET_ACCESS_KEY", store_server.SECRET)
            patch.setenv("AWS_REGION", "us-east-1")
            patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield served, client


NAMES = (
    *("merge", "merge --force", "merge --quant nf4", "merge of a GGUF base", "merge in a store"),
    *("convert", "combine", "resize", "checkout", "export", "import", "register", "build", "push"),
)


@contextlib.contextmanager
def writers(top: Path, only: list[str] | None = None) -> Iterator[dict[str, Writer]]:
    """The verbs, all or some, with their inputs made below ``top``."""
    chosen = [name for name in NAMES if not only or name in only]
    base, adapter = inputs(top)
    home = top / "home"
    register(adapter, "x", home=home)
    bundle = top / "x.bundle"
    export_bundle(("x",), bundle, home=home)
    file = gguf_base(top / "base.gguf")
    adapters = [adapter]
    files: dict[str, Callable[[Path], object]] = {
        "merge": lambda out: adapterkit.merge(base, adapters, out, jobs=1),
        "merge --force": lambda out: adapterkit.merge(base, adapters, out, force=True, jobs=1),
        "merge --quant nf4": lambda out: adapterkit.merge(base, adapters, out, quant="nf4", jobs=1),
        "merge of a GGUF base": lambda out: adapterkit.merge(file, adapters, out, jobs=1),
        "convert": lambda out: adapterkit.convert(base, out, to="f16", jobs=1),
        "combine": lambda out: adapterkit.combine([adapter, adapter], out, jobs=1),
        "resize": lambda out: adapterkit.resize(adapter, out, rank=1, jobs=1),
        "export": lambda out: export_bundle(("x",), out, home=home),
        "checkout": lambda out: checkout("x", to=out, home=home),
    }
    with loopback(top, hub="push" in chosen, store="merge in a store" in chosen) as (hub, client):
        made: dict[str, Writer] = {}
        for name in chosen:
            place = top / f"place-{name.replace(' ', '-')}"
            if name in files:
                leaf = "right.gguf" if "GGUF" in name else "right"
                made[name] = File(files[name], place / leaf, name == "merge --force")
            elif name == "register":
                made[name] = Home(lambda where: register(adapter, "y", home=where), place, "y")
            elif name == "import":
                made[name] = Home(lambda where: import_bundle(bundle, home=where), place, "x")
            elif name == "build":
                made[name] = Project(base, adapter, place)
            elif name == "push":
                made[name] = Repository(home, hub)
            else:
                made[name] = Bucket(base, adapter, client)
        yield made
