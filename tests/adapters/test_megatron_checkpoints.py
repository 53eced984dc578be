"""LoRA out of checkpoints of Megatron-Bridge and NeMo 2.

Expected values: the fused weight of Megatron is made of the base's by megatron-bridge's own rule (0.3.1,
``models/conversion/param_mapping.py``: query groups of heads, a key head and a value head; gate, then up), the change is added
to it in float64 (``peft/lora.py``: ``alpha / dim * linear_out @ linear_in``), and the sum is taken apart by the same rule.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from models import random_tensors, read_tensors, write_checkpoint

import adapterkit
from adapterkit.adapters.formats.megatron import MegatronRun, as_peft
from adapterkit.adapters.names import Names
from adapterkit.bases import open_model
from adapterkit.errors import AdapterError, CheckpointError, NotFound, TargetError, UnsafeError, UnsupportedAdapter
from adapterkit.pickles import unpickled

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.usefixtures("warm_processes"),
]

if TYPE_CHECKING:
    from pathlib import Path

HEADS, GROUPS, WIDTH, HIDDEN, INNER, LAYERS = 4, 2, 6, 16, 10, 2
ALPHA, DIM = 12, 3
RUN = """peft:
  _target_: megatron.bridge.peft.lora.{kind}
  dim: 3
  alpha: 12
model:
  num_attention_heads: 4
  num_query_groups: 2
  kv_channels: 6
  expert_model_parallel_size: {ranks}
  chat: &a [x]
  again: *a
"""


def base_of(folder: Path, *, experts: int = 0, gate: bool = False, **config: Any) -> Path:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (20, HIDDEN), "lm_head.weight": (20, HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes[f"{at}.self_attn.q_proj.weight"] = (HEADS * WIDTH * (1 + gate), HIDDEN)
        shapes |= {f"{at}.self_attn.{one}_proj.weight": (GROUPS * WIDTH, HIDDEN) for one in "kv"}
        shapes[f"{at}.self_attn.o_proj.weight"] = (HIDDEN, HEADS * WIDTH)
        for place in [f"{at}.mlp.experts.{one}" for one in range(experts)] or [f"{at}.mlp"]:
            shapes |= {f"{place}.{one}_proj.weight": (INNER, HIDDEN) for one in ("gate", "up")}
            shapes[f"{place}.down_proj.weight"] = (HIDDEN, INNER)
        if experts:
            shapes[f"{at}.mlp.gate.weight"] = (experts, HIDDEN)
    kind = "qwen3_moe" if experts else "qwen3_next" if gate else "qwen3"
    own = {"num_experts": experts} if experts else {}
    fields = {
        "model_type": kind, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS,
        "head_dim": WIDTH, "num_hidden_layers": LAYERS, "vocab_size": 20, "tie_word_embeddings": False, **own, **config,
    }  # fmt: skip
    return write_checkpoint(folder, random_tensors(shapes), fields)


def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: bool = False) -> torch.Tensor:
    """q, k and v as Megatron keeps them, ``[rows, ...]``."""
    rest = q.shape[1:]
    heads = q.view(GROUPS, HEADS // GROUPS, 1 + gate, WIDTH, *rest).transpose(1, 2)  # a group's queries, then its gates
    parts = [heads.reshape(GROUPS, -1, *rest), k.view(GROUPS, WIDTH, *rest), v.view(GROUPS, WIDTH, *rest)]
    return torch.cat(parts, dim=1).reshape(-1, *rest)


def save(folder: Path, tensors: dict[str, torch.Tensor], run: str = RUN.format(kind="LoRA", ranks=1)) -> Path:
    place = folder / "iter_0000010"
    place.mkdir(parents=True)
    moments = {f"optimizer.state.exp_avg.{name}": torch.ones(2) for name in tensors}
    dcp.save({**tensors, **moments, "rng_state": torch.ones(3), "iteration": 10}, checkpoint_id=place, no_dist=True)
    (place / "run_config.yaml").write_text(run)
    (folder / "latest_checkpointed_iteration.txt").write_text("10")
    return place


def adapter_of(modules: dict[str, tuple[int, int]], seed: int = 3) -> dict[str, torch.Tensor]:
    """Factors of every layer, stacked as megatron-core saves layers of one kind."""
    shapes = {}
    for module, (rows, columns) in modules.items():
        shapes[f"decoder.layers.{module}.linear_in.weight"] = (LAYERS, DIM, columns)
        shapes[f"decoder.layers.{module}.linear_out.weight"] = (LAYERS, rows, DIM)
    return random_tensors(shapes, seed=seed)


def change(tensors: dict[str, torch.Tensor], module: str, layer: int) -> torch.Tensor:
    a, b = (tensors[f"decoder.layers.{module}.{leaf}.weight"][layer].double() for leaf in ("linear_in", "linear_out"))
    return ALPHA / DIM * (b @ a)


FUSED = HEADS * WIDTH + 2 * GROUPS * WIDTH
DENSE = {
    "self_attention.linear_qkv.adapter": (FUSED, HIDDEN),
    "self_attention.linear_proj.adapter": (HIDDEN, HEADS * WIDTH),
    "mlp.linear_fc1.adapter": (2 * INNER, HIDDEN),
    "mlp.linear_fc2.adapter": (HIDDEN, INNER),
}


def merged(base: Path, checkpoint: Path, out: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    adapterkit.convert(checkpoint, out / "peft", to="peft", base=base, allow_pickle=True)
    adapterkit.merge(base, [out / "peft"], out / "merged")
    return read_tensors(base), read_tensors(out / "merged")


def close(found: torch.Tensor, want: torch.Tensor) -> bool:
    return bool(torch.allclose(found.double(), want, atol=1e-5))


def test_a_dense_model(tmp_path: Path) -> None:
    """Stacked layers, without a number in the name; the folder of the run and that of the iteration."""
    base, tensors = base_of(tmp_path / "base"), adapter_of(DENSE)
    place = save(tmp_path / "run", tensors)
    (tmp_path / "run" / "iter_0000005").mkdir()  # an older one
    (tmp_path / "run" / "iter_0000005" / ".metadata").write_bytes(b"not read")
    was, got = merged(base, tmp_path / "run", tmp_path / "out")
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        names = [f"{at}.self_attn.{one}_proj.weight" for one in "qkv"]
        whole = fused(*(was[name].double() for name in names)) + change(
            tensors, "self_attention.linear_qkv.adapter", layer
        )
        assert close(fused(*(got[name] for name in names)), whole)
        names = [f"{at}.mlp.{one}_proj.weight" for one in ("gate", "up")]
        both = torch.cat([was[name].double() for name in names]) + change(tensors, "mlp.linear_fc1.adapter", layer)
        assert close(torch.cat([got[name] for name in names]), both)
        for module, name in (("self_attention.linear_proj", "self_attn.o_proj"), ("mlp.linear_fc2", "mlp.down_proj")):
            want = was[f"{at}.{name}.weight"].double() + change(tensors, f"{module}.adapter", layer)
            assert close(got[f"{at}.{name}.weight"], want)
    assert got["lm_head.weight"].equal(was["lm_head.weight"])
    config = json.loads((tmp_path / "out" / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], len(config["target_modules"])) == (DIM, ALPHA, 7 * LAYERS)
    refused(tmp_path, base, place)


def refused(tmp_path: Path, base: Path, place: Path) -> None:
    """What the same checkpoint is refused for."""
    with pytest.raises(UnsafeError, match="Megatron"):
        adapterkit.merge(base, [place], tmp_path / "no")

    def stops(error: type[Exception], words: str, **more: Any) -> None:
        with pytest.raises(error, match=words):
            adapterkit.convert(place, tmp_path / "no", to="peft", allow_pickle=True, **({"base": base} | more))

    stops(adapterkit.errors.UsageError, "needs the base", base=None)
    stops(TargetError, "num_query_groups 2", base=base_of(tmp_path / "other", num_key_value_heads=4, head_dim=3))
    run = place / "run_config.yaml"
    text = run.read_text()
    for changed, error, words in (
        (text.replace("dim: 3", "dim: 4"), AdapterError, "has rank 3"),
        (text.replace("  alpha: 12\n", ""), AdapterError, "says no alpha"),
        (text.replace("lora.LoRA", "other.Houlsby"), UnsupportedAdapter, "Houlsby"),
        (text + "a: &b {c: 1}\nd: {<<: [*b, *b]}\n", AdapterError, "no YAML"),
        (text + "!!python/object/apply:os.system [id]\n", AdapterError, "no YAML"),
        ("[" * 5000, AdapterError, "no YAML"),
    ):
        run.write_text(changed)
        stops(error, words)
    run.unlink()
    stops(NotFound, "alpha is in none of its tensors")
    (place.parent / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(CheckpointError, match="several iterations"):
        adapterkit.convert(place.parent, tmp_path / "no", to="peft", allow_pickle=True, base=base)
    (place / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": ALPHA, "r": DIM}))
    adapterkit.convert(place, tmp_path / "by-hand", to="peft", allow_pickle=True, base=base)
    for name, part in read_tensors(tmp_path / "by-hand").items():
        assert part.equal(read_tensors(tmp_path / "out" / "peft")[name])


@pytest.mark.slow
def test_experts_and_router_of_nemo(tmp_path: Path) -> None:
    """One adapter of all experts of a layer, numbered layers, NeMo's folders; one layer has an adapter."""
    base = base_of(tmp_path / "base", experts=3)
    shapes = {
        "mlp.experts.experts.linear_fc1": (2 * INNER, HIDDEN),
        "mlp.experts.experts.linear_fc2": (HIDDEN, INNER),
        "mlp.router": (3, HIDDEN),
    }
    stacked = adapter_of({f"{name}.adapter": size for name, size in shapes.items()})
    numbered = {f"module.{name.replace('layers.', 'layers.1.')}": tensor[1].clone() for name, tensor in stacked.items()}
    folder = tmp_path / "nemo"
    dcp.save(numbered, checkpoint_id=folder / "weights", no_dist=True)
    (folder / "context").mkdir()
    run = "model_transform: {_target_: nemo.collections.llm.peft.lora.LoRA, dim: 3, alpha: 12}\nconfig: {kv_channels: null}\n"
    (folder / "context" / "model.yaml").write_text(run)
    was, got = merged(base, folder, tmp_path / "out")
    fc1, fc2 = (change(stacked, f"mlp.experts.experts.linear_fc{one}.adapter", 1) for one in (1, 2))
    for expert in range(3):
        at = f"model.layers.1.mlp.experts.{expert}"
        want = {"gate": fc1[:INNER], "up": fc1[INNER:], "down": fc2}
        for name, delta in want.items():
            assert close(got[f"{at}.{name}_proj.weight"], was[f"{at}.{name}_proj.weight"].double() + delta)
    router = was["model.layers.1.mlp.gate.weight"].double() + change(stacked, "mlp.router.adapter", 1)
    assert close(got["model.layers.1.mlp.gate.weight"], router)
    assert all(got[name].equal(was[name]) for name in was if name.startswith("model.layers.0."))

    def rewritten() -> Any:
        (folder / "context" / "model.yaml").write_text(run.replace("alpha: 12", "alpha: 24"))
        return open_model(base)

    with pytest.raises(CheckpointError, match=r"model\.yaml.* changed"), unpickled(folder, tmp_path, rewritten):
        pass
    several = run.replace("kv_channels: null", "expert_model_parallel_size: 2")
    (folder / "context" / "model.yaml").write_text(several)
    with pytest.raises(UnsupportedAdapter, match="expert_model_parallel_size 2"):
        adapterkit.convert(folder, tmp_path / "no", to="peft", allow_pickle=True, base=base)
    (folder / "context" / "model.yaml").unlink()  # what stands for it says nothing of ranks
    said = {"peft_type": "LORA", "lora_alpha": ALPHA, "r": DIM}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    with pytest.raises(UnsupportedAdapter, match="does not say whether the run had several ranks"):
        adapterkit.convert(folder, tmp_path / "no", to="peft", allow_pickle=True, base=base)


class Held:
    """A tensor of a checkpoint."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        from adapterkit.dtypes import F32

        self.name, self.dtype, self.shape, self._flat = name, F32, tuple(tensor.shape), tensor.reshape(-1)

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self._flat[start:stop]


def placed(base: Path, tensors: dict[str, torch.Tensor], parts: dict[str, int] | None = None, **run: Any) -> Any:
    opened = open_model(base)
    held: Any = {name: Held(name, tensor) for name, tensor in tensors.items()}
    names = Names(opened.shapes, opened.config)
    config, made = as_peft(held, parts or {}, MegatronRun("run", ALPHA, DIM, **run), names, opened.config)
    lead = "base_model.model.model.layers.0."
    return config, {n.removeprefix(lead): t.read(0, t.numel).view(t.shape) for n, t in made.items()}


def test_one_adapter_for_each_and_dora(tmp_path: Path) -> None:
    """`CanonicalLoRA` and `DoRA`, from one and from several ranks of tensor parallelism."""
    base = base_of(tmp_path / "base")
    lead = "decoder.layers.0.mlp.linear_fc1.adapter"
    b = random_tensors({"b": (2 * INNER, DIM), "a": (DIM, HIDDEN), "m": (2 * INNER,)})
    halves = {f"{lead}.adapter_up.linear_in.weight": b["a"]}
    up = b["b"][:INNER]
    name = f"{lead}.adapter_up.linear_out.weight"
    assert placed(base, {**halves, name: up}, {name: 2})[1]["mlp.up_proj.lora_B.weight"].equal(up)
    five = up.view(5, 2, DIM)  # five ranks of two rows: the first of each, then the second of each
    saved = five.transpose(0, 1).reshape(INNER, DIM)
    assert placed(base, {**halves, name: saved}, {name: 10})[1]["mlp.up_proj.lora_B.weight"].equal(up)
    with pytest.raises(UnsupportedAdapter, match="saved in 3 parts"):
        placed(base, {**halves, name: saved}, {name: 3})

    dora = {f"{lead}.linear_in.weight": b["a"], f"{lead}.linear_out.weight": b["b"]}
    norm = f"{lead}.weight_magnitude"
    for ranks in (1, 2, 5):  # each rank's gate and up stand together in the magnitudes, and not in the factors
        gate, rows = (half.view(ranks, -1) for half in b["m"].view(2, -1))
        kept = torch.cat([gate, rows], dim=1).reshape(-1)
        config, found = placed(base, {**dora, norm: kept}, {norm: ranks}, dora=True)
        assert config["use_dora"]
        assert found["mlp.gate_proj.lora_magnitude_vector"].equal(b["m"][:INNER])
        assert found["mlp.up_proj.lora_magnitude_vector"].equal(b["m"][INNER:])
        assert found["mlp.up_proj.lora_B.weight"].equal(b["b"][INNER:])
    with pytest.raises(AdapterError, match="says LoRA"):
        placed(base, {**dora, norm: b["m"]})
    with pytest.raises(AdapterError, match="no weight_magnitude"):
        placed(base, dora, dora=True)


def test_gates_of_attention_and_what_has_no_place(tmp_path: Path) -> None:
    """Attention with an output gate: each head's gate stands behind its query in transformers."""
    base = base_of(tmp_path / "base", gate=True)
    rows = random_tensors({"q": (2 * HEADS * WIDTH, DIM), "k": (GROUPS * WIDTH, DIM), "v": (GROUPS * WIDTH, DIM)})
    lead = "model.decoder.layers.0.self_attention.linear_qkv.adapter"
    a = torch.ones(DIM, HIDDEN)
    tensors = {f"{lead}.linear_in.weight": a, f"{lead}.linear_out.weight": fused(rows["q"], rows["k"], rows["v"], True)}
    found = placed(base, tensors)[1]
    assert all(found[f"self_attn.{one}_proj.lora_B.weight"].equal(rows[one]) for one in "qkv")
    for name, error in (
        ("vision_model.decoder.layers.0.self_attention.linear_proj.adapter.linear_in.weight", UnsupportedAdapter),
        ("mtp.layers.0.transformer_layer.mlp.linear_fc2.adapter.linear_in.weight", UnsupportedAdapter),
        ("decoder.layers.0.self_attention.linear_proj.adapter.linear_in.weight", AdapterError),
        ("decoder.layers.self_attention.linear_proj.adapter.linear_in.weight", AdapterError),
    ):
        with pytest.raises(error):
            placed(base, {**tensors, name: a})
    for module in ("self_attention.in_proj", "cross_attention.linear_q"):
        pair = {f"decoder.layers.0.{module}.adapter.{leaf}.weight": a for leaf in ("linear_in", "linear_out")}
        with pytest.raises(UnsupportedAdapter, match="no module with the same rows"):
            placed(base, pair)


def test_what_is_no_adapter_alone(tmp_path: Path) -> None:
    base, tensors = base_of(tmp_path / "base"), adapter_of(DENSE)
    place = save(tmp_path / "run", {**tensors, "embedding.word_embeddings.weight": torch.ones(4, 4)})
    with pytest.raises(CheckpointError, match=r"embedding\.word_embeddings\.weight"):
        adapterkit.convert(place, tmp_path / "no", to="peft", allow_pickle=True, base=base)
