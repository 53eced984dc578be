"""A gallery of broken merges: each is made as it goes wrong in the field, and `verify` has to call it by its name.

    python -m bench proofs gallery                 # a table: what was broken, what verify says, how far the outputs moved
    python -m bench proofs gallery --only tied     # some of them
    python -m bench proofs gallery --answers       # also lets the models answer: how far a mistake moves them

Nothing here is made with adapterkit: bases and adapters by transformers and PEFT, merges by PEFT, numpy and torch, GGUF
files by the gguf package. A case is a function of an empty folder that gives MERGED, the base, the adapters, and the name
that `verify` must give.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.common import results

ROOT = Path(__file__).resolve().parents[2]

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 288,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Broken:
    """One exhibit.

    Attributes:
        kind: the name that a finding must have.
        options: of the verification.
        moved: whether the outputs of the model must be other than the trained one's.
    """

    merged: Path
    base: Path
    adapters: tuple[Path, ...]
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    moved: bool = True


Case = Callable[[Path], Broken]


# ------------------------------------------------------------------ parts, by other libraries


def base_model(
    folder: Path, cls: str = "LlamaForCausalLM", dtype: str = "float32", scale: float = 0.15, **config: Any
) -> Path:
    """A random model as transformers saves it."""
    import torch
    import transformers
    from models import randomize

    made = getattr(transformers, cls)
    torch.manual_seed(0)
    model = made(made.config_class(**{**TEXT, **config}))
    randomize(model, scale=scale)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def lora(folder: Path, base: Path, scale: float = 0.1, seed: int = 5, **fields: Any) -> Path:
    """A LoRA with random factors, as PEFT saves it."""
    from models import make_adapter
    from peft import LoraConfig

    return make_adapter(
        folder,
        base,
        LoraConfig(**{"r": 8, "lora_alpha": 12, "target_modules": "all-linear", **fields}),
        scale=scale,
        seed=seed,
    )


def peft_merge(base: Path, adapters: list[Path], out: Path, dtype: str | None = None) -> Path:
    """PEFT's own merge, adapter after adapter."""
    import torch
    from models import load_model
    from peft import PeftModel

    model = load_model(base)
    if dtype is not None:
        model = model.to(getattr(torch, dtype))
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.save_pretrained(out)
    return out


def tensors_of(folder: Path) -> dict[str, Any]:
    from models import read_tensors

    return read_tensors(folder)


def save(folder: Path, base: Path, tensors: dict[str, Any], **config: Any) -> Path:
    """A folder with these tensors and the base's config."""
    from models import write_checkpoint

    said = json.loads((base / "config.json").read_text())
    return write_checkpoint(folder, {name: tensor.contiguous() for name, tensor in tensors.items()}, {**said, **config})


def deltas(adapter: Path) -> dict[str, Any]:
    """Each module's delta in float64, from the file: (alpha / r) B A, by the name of its weight."""
    import numpy as np
    import torch
    from safetensors.torch import load_file

    said = json.loads((adapter / "adapter_config.json").read_text())
    rank = np.sqrt(said["r"]) if said.get("use_rslora") else said["r"]
    stored = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for key, a in stored.items():
        if key.endswith("lora_A.weight"):
            b = stored[key.replace("lora_A", "lora_B")]
            name = key.removeprefix("base_model.model.").replace("lora_A.", "")
            found[name] = torch.from_numpy(b.double().numpy() @ a.double().numpy() * (said["lora_alpha"] / rank))
    return found


def added(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """W + delta in float64, rounded once."""
    return {n: (w.double() + changes[n]).to(w.dtype) if n in changes else w for n, w in base.items()}


def edited(adapter: Path, out: Path, **fields: Any) -> Path:
    """A copy of an adapter with another config."""
    from models import edit_config

    shutil.copytree(adapter, out)
    return edit_config(out, **fields)


# ------------------------------------------------------------------ the exhibits


def skipped(root: Path) -> Broken:
    """The base was saved in the place of the merged model."""
    base = base_model(root / "base")
    adapter = lora(root / "adapter", base)
    shutil.copytree(base, root / "merged")
    return Broken(root / "merged", base, (adapter,), "not applied")


def twice(root: Path) -> Broken:
    """The adapter was folded onto a model that held it already."""
    base = base_model(root / "base")
    adapter = lora(root / "adapter", base)
    return Broken(peft_merge(base, [adapter, adapter], root / "merged"), base, (adapter,), "applied twice")


def alpha(root: Path) -> Broken:
    """The config had another lora_alpha when it was merged."""
    base = base_model(root / "base")
    adapter = lora(root / "adapter", base)
    other = edited(adapter, root / "other", lora_alpha=5)
    return Broken(peft_merge(base, [other], root / "merged"), base, (adapter,), "other scaling")


def rslora(root: Path) -> Broken:
    """A tool that does not know use_rslora."""
    base = base_model(root / "base")
    adapter = lora(root / "adapter", base, use_rslora=True)
    other = edited(adapter, root / "other", use_rslora=False)
    return Broken(peft_merge(base, [other], root / "merged"), base, (adapter,), "rsLoRA ignored")


def layer(root: Path) -> Broken:
    """One layer was left out."""
    base = base_model(root / "base")
    adapter = lora(root / "adapter", base)
    changes = {name: delta for name, delta in deltas(adapter).items() if ".layers.1." not in name}
    return Broken(save(root / "merged", base, added(tensors_of(base), changes)), base, (adapter,), "layer missing")


def sibling(root: Path) -> Broken:
    """Folded onto the instruct model, where the adapter was trained on its base."""
    import torch

    base = base_model(root / "base")
    adapter = lora(root / "adapter", base)
    generator = torch.Generator().manual_seed(3)
    other = {n: w + 0.02 * torch.randn(w.shape, generator=generator) for n, w in tensors_of(base).items()}
    sister = save(root / "sister", base, other)
    return Broken(peft_merge(sister, [adapter], root / "merged"), base, (adapter,), "other base")


def tied(root: Path) -> Broken:
    """An adapter on the embedding of a tied model, merged by PEFT: the output layer changes with it."""
    base = base_model(root / "base", tie_word_embeddings=True)
    adapter = lora(root / "adapter", base, target_modules=["q_proj", "embed_tokens"])
    return Broken(peft_merge(base, [adapter], root / "merged"), base, (adapter,), "tied head")


def tied_flag(root: Path) -> Broken:
    """Both tensors are there, and the config says that there is one."""
    base = base_model(root / "base", tie_word_embeddings=True)
    adapter = lora(root / "adapter", base, target_modules=["lm_head"])
    stored = tensors_of(base)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    return Broken(
        save(root / "merged", base, added(stored, deltas(adapter))), base, (adapter,), "tied head", moved=False
    )


def bf16_steps(root: Path) -> Broken:
    """A small change, added to bfloat16 weights in 32 parts, none of which moves them."""
    base = base_model(root / "base", dtype="bfloat16")
    adapter = lora(root / "adapter", base, scale=0.012)
    merged = tensors_of(base)
    for name, delta in deltas(adapter).items():
        for _ in range(32):
            merged[name] = merged[name] + (delta / 32).to(merged[name].dtype)
    return Broken(save(root / "merged", base, merged), base, (adapter,), "swallowed")


def bf16_small(root: Path) -> Broken:
    """A change that bfloat16 cannot hold, rounded as well as can be: right by the formula, and not what was trained."""
    base = base_model(root / "base", dtype="bfloat16")
    adapter = lora(root / "adapter", base, scale=0.0004)
    return Broken(save(root / "merged", base, added(tensors_of(base), deltas(adapter))), base, (adapter,), "swallowed")


def nf4(values: Any, blocksize: int = 64) -> Any:
    """decode(encode(.)) in NF4, from the definition (QLoRA, appendix E)."""
    import torch

    quantiles = [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
    table = torch.tensor(quantiles)
    blocks = values.float().reshape(-1, blocksize)
    largest = blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)
    return (table[(blocks[..., None] / largest[..., None] - table).abs().argmin(-1)] * largest).view(values.shape)


def requantized(root: Path) -> Broken:
    """Merged in 4 bits and decoded for the server."""
    base = base_model(root / "base")
    adapter = lora(root / "adapter", base)
    stored, changes = tensors_of(base), deltas(adapter)
    merged = {n: nf4(stored[n].double() + changes[n]) if n in changes else w for n, w in stored.items()}
    return Broken(save(root / "merged", base, merged), base, (adapter,), "re-quantized")


def nf4_again(root: Path) -> Broken:
    """Folded onto an NF4 base and written on the same grid again: the values fall back where they were."""
    import torch
    import transformers
    from peft import PeftModel

    plain = base_model(root / "plain", dtype="bfloat16")
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, quantization_config=how, device_map="cpu")
    model.save_pretrained(root / "base")
    adapter = lora(root / "adapter", plain, scale=0.012)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(root / "merged")
    return Broken(root / "merged", root / "base", (adapter,), "swallowed")


def experts(root: Path) -> Broken:
    """Experts sorted by name (0, 1, 10, 11, 2, ...) when their changes were folded in."""
    base = base_model(
        root / "base", "MixtralForCausalLM", num_local_experts=12, num_experts_per_tok=2, num_hidden_layers=2
    )
    adapter = lora(
        root / "adapter",
        base,
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    right = tensors_of(peft_merge(base, [adapter], root / "right"))
    stored = tensors_of(base)
    order = sorted(range(12), key=str)
    merged = dict(right)
    for name, tensor in right.items():
        head, found, tail = name.partition(".experts.")
        if found:
            number, _, leaf = tail.partition(".")
            source = f"{head}.experts.{order[int(number)]}.{leaf}"
            merged[name] = stored[name] + (right[source] - stored[source])
            assert merged[name].shape == tensor.shape
    return Broken(save(root / "merged", base, merged), base, (adapter,), "wrong expert order")


def transposed(root: Path) -> Broken:
    """Changes of square matrices were added on their side."""
    base = base_model(root / "base")
    adapter = lora(root / "adapter", base, target_modules=["q_proj", "o_proj"])
    changes = {name: delta.T for name, delta in deltas(adapter).items()}
    return Broken(save(root / "merged", base, added(tensors_of(base), changes)), base, (adapter,), "transposed")


def one_adapter(root: Path) -> Broken:
    """Two adapters were to be folded in, and one was."""
    base = base_model(root / "base")
    one, two = lora(root / "one", base), lora(root / "two", base, seed=6)
    return Broken(peft_merge(base, [two], root / "merged"), base, (one, two), "adapter missing")


def other_adapter(root: Path) -> Broken:
    """The adapter of another run was folded in."""
    base = base_model(root / "base")
    adapter, other = lora(root / "adapter", base), lora(root / "other", base, seed=6)
    return Broken(peft_merge(base, [other], root / "merged"), base, (adapter,), "other adapter")


def shifted(root: Path) -> Broken:
    """Each layer got the change of the one before it."""
    base = base_model(root / "base")
    adapter = lora(root / "adapter", base)
    changes = {}
    for name, delta in deltas(adapter).items():
        for number in range(3):
            if f".layers.{number}." in name:
                changes[name.replace(f".layers.{number}.", f".layers.{(number + 1) % 3}.")] = delta
    return Broken(save(root / "merged", base, added(tensors_of(base), changes)), base, (adapter,), "wrong module")


def leftover(root: Path) -> Broken:
    """The adapter's files lie in the merged folder, where transformers finds and applies them."""
    base = base_model(root / "base")
    adapter = lora(root / "adapter", base)
    merged = peft_merge(base, [adapter], root / "merged")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, merged)
    return Broken(merged, base, (adapter,), "applied twice", moved=False)


def as_gguf(folder: Path, path: Path, wrong: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> Path:
    """A Llama folder as a GGUF file, by the gguf package; ``wrong`` changes the tensors before their rows are sorted."""
    import gguf_zoo

    kinds = dict(gguf_zoo.KINDS)
    config = {**TEXT, **json.loads((folder / "config.json").read_text())}
    gguf_zoo.KINDS["gallery"] = ("LlamaForCausalLM", config, "llama")
    converted = gguf_zoo.converted
    turn = wrong or (lambda stored: stored)
    gguf_zoo.converted = lambda stored, kind, config: turn(converted(stored, "llama", config))  # type: ignore[assignment]
    try:
        return gguf_zoo.to_gguf(folder, "gallery", path)
    finally:
        gguf_zoo.converted = converted
        gguf_zoo.KINDS.clear()
        gguf_zoo.KINDS.update(kinds)


def gguf_rows(root: Path) -> Broken:
    """q and k were written to GGUF as they lie in the checkpoint, without their rows being interleaved."""
    base = base_model(root / "hf", num_hidden_layers=2)
    adapter = lora(root / "adapter", base)
    merged = peft_merge(base, [adapter], root / "merged")
    stored = {name: tensor.numpy() for name, tensor in tensors_of(merged).items()}

    def wrong(tensors: dict[str, Any]) -> dict[str, Any]:
        return {n: stored[n] if ".q_proj." in n or ".k_proj." in n else t for n, t in tensors.items()}

    found = as_gguf(merged, root / "merged.gguf", wrong)
    return Broken(found, as_gguf(base, root / "base.gguf"), (adapter,), "wrong q/k order")


def gguf_delta(root: Path) -> Broken:
    """The change of q and k was added to a GGUF file's tensors in the order of the checkpoint."""
    base = base_model(root / "hf", num_hidden_layers=2)
    adapter = lora(root / "adapter", base)
    changes = {name: delta.float().numpy() for name, delta in deltas(adapter).items()}

    def wrong(tensors: dict[str, Any]) -> dict[str, Any]:
        return {name: tensor + changes.get(name, 0) for name, tensor in tensors.items()}

    found = as_gguf(base, root / "merged.gguf", wrong)
    return Broken(found, as_gguf(base, root / "base.gguf"), (adapter,), "wrong q/k order")


def gguf_experts(root: Path) -> Broken:
    """A stack of experts put together in the order of their names."""
    import gguf_zoo
    import numpy as np

    before, converted, metadata = gguf_zoo.KINDS["mixtral"], gguf_zoo.converted, gguf_zoo.metadata
    order = sorted(range(12), key=str)

    def wrong(stored: Any, kind: str, config: Any) -> Any:
        found = converted(stored, kind, config)
        return {n: np.ascontiguousarray(t[order]) if ".experts." in n else t for n, t in found.items()}

    try:
        config = {**gguf_zoo._BASE, "num_local_experts": 12, "num_experts_per_tok": 2}
        gguf_zoo.KINDS["mixtral"] = ("MixtralForCausalLM", config, "llama")
        gguf_zoo.metadata = lambda kind, config: {**metadata(kind, config), ".expert_count": 12}  # type: ignore[assignment]
        gguf_zoo.build(root / "hf", "mixtral")
        names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        adapter = lora(root / "adapter", root / "hf", target_modules=[], target_parameters=names)
        merged = peft_merge(root / "hf", [adapter], root / "merged")
        base = gguf_zoo.to_gguf(root / "hf", "mixtral", root / "base.gguf")
        gguf_zoo.converted = wrong
        found = gguf_zoo.to_gguf(merged, "mixtral", root / "merged.gguf")
    finally:
        gguf_zoo.KINDS["mixtral"], gguf_zoo.converted, gguf_zoo.metadata = before, converted, metadata
    return Broken(found, base, (adapter,), "wrong expert order")


CASES: dict[str, Case] = {
    "adapter skipped": skipped,
    "applied twice": twice,
    "alpha wrong": alpha,
    "rsLoRA ignored": rslora,
    "layer missing": layer,
    "sibling base": sibling,
    "tied head": tied,
    "tied in the config": tied_flag,
    "bf16-swallowed, in steps": bf16_steps,
    "bf16-swallowed, at once": bf16_small,
    "NF4 re-quantized": requantized,
    "NF4 on NF4": nf4_again,
    "wrong expert order": experts,
    "transposed": transposed,
    "one of two adapters": one_adapter,
    "another adapter": other_adapter,
    "layers shifted": shifted,
    "adapter files left": leftover,
    "GGUF: q/k not interleaved": gguf_rows,
    "GGUF: change of q/k not interleaved": gguf_delta,
    "GGUF: wrong expert order": gguf_experts,
}


def prompts(folder: Path) -> Path:
    """Token numbers: a random model has no words."""
    import random

    draw = random.Random(1)
    lines = [json.dumps({"ids": [1, *(draw.randrange(3, 288) for _ in range(11))]}) for _ in range(8)]
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(lines))
    return path


# What a mistake brings along: a tied head also leaves the shared tensor with a change that is not its own.
FOLLOWS: dict[str, set[str]] = {}


def main() -> None:
    import warnings

    import transformers

    from adapterkit.verbs.verify import verify

    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", help="cases whose name holds this")
    parser.add_argument("--answers", action="store_true", help="also the level of the model")
    options = parser.parse_args()
    seen = wrong = 0
    for name, case in CASES.items():
        if options.only and not any(part in name for part in options.only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            broken = case(Path(folder))
            how: dict[str, Any] = {"base": broken.base, "adapters": broken.adapters, **broken.options}
            if options.answers:
                how |= {"level": "model", "prompts": prompts(Path(folder))}
            report = verify(broken.merged, **how)
            kinds = [finding.kind for finding in report.errors]
            caught = not report.ok and broken.kind in kinds
            seen += 1
            wrong += not caught
            every = "; ".join(f"{one.kind}: {one.text}" for one in report.errors)
            said = next((one.text for one in report.errors if one.kind == broken.kind), every)
            moved = ""
            if report.model is not None:
                model = report.model
                moved = (
                    f"KL {model.merged.mean_kl:8.1e} top-1 {model.merged.top1:6.1%} (base {model.base.mean_kl:7.1e})  "
                )
            told = f"{'ok' if caught else 'MISSED':<7} {name:<36} {', '.join(dict.fromkeys(kinds)):<20} {moved}{said}"
            print(told.replace(folder, ""), flush=True)
    results.note(broken=seen, missed=wrong)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
