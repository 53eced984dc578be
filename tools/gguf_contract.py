"""What llama.cpp makes of every config field: ``tools/gguf_contract.py [--write FILE] [--stored FILE] [KIND ...]``.

For each architecture of ``tests/gguf/arch_zoo.py`` a tiny random model is made with transformers. Then, one at a time, each
field of its config gets another value, the model is built and converted again, and llama.cpp (the xllamacpp wheel) says the
log-probabilities of the token after a prompt that is longer than the windows; transformers says its own. Verdicts:

* ``agrees``: the file computes what transformers computes, and the field does something there;
* ``idle``: both agree and the field changes nothing in transformers either;
* ``refused``: the conversion says no (the sentence is kept);
* ``noted``: the file differs, and the conversion said what it does not say of the unchanged model;
* ``silent``: the file differs, and nothing was said. A fault;
* ``no-load``: llama.cpp does not load the file. A fault;
* ``no-model``: transformers itself does not build or run such a model.

Of every kind of weight it is also tried whether llama.cpp applies a LoRA to it (``lora``: ``applied`` or ``ignored``).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for place in ("tests/gguf", "tests", ""):
    sys.path.insert(0, str(ROOT / place))

PROMPTS = ([1] + [(7 * i + 3) % 256 for i in range(1, 60)], [1, 260, 33, 7, 90, 271, 3])
VOCAB = 288
MOVED = 1e-5  # a difference of log-probabilities that is no rounding

# Fields that say how a model is trained, stored or generated with, and sizes that the tensors say themselves.
_LEFT_OUT_WORDS = """
architectures model_type transformers_version dtype torch_dtype vocab_size pad_token_id bos_token_id eos_token_id
return_dict output_hidden_states output_attentions problem_type id2label label2id name_or_path use_cache
chunk_size_feed_forward is_encoder_decoder add_cross_attention cross_attention_hidden_size tie_encoder_decoder
initializer_range initializer_factor max_position_embeddings n_positions n_ctx sep_token_id decoder_start_token_id
finetuning_task task_specific_params tokenizer_class prefix summary_type summary_use_proj summary_activation
summary_proj_to_labels summary_first_dropout gradient_checkpointing pretraining_tp output_router_logits
router_aux_loss_coef router_jitter_noise aux_loss_alpha seq_aux rescale_prenorm_residual cls_token_id
max_window_layers seq_length ep_size tie_word_embeddings base_model_tp_plan base_model_pp_plan
"""
LEFT_OUT = frozenset(_LEFT_OUT_WORDS.split())
_PARTS = ("text_config", "thinker_config")
ACTIVATIONS = ("relu", "gelu", "silu", "gelu_pytorch_tanh", "relu2")


def perturbations(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Title -> the fields that differ; of a model that sees or hears, those of its text part."""
    for part in _PARTS:
        if isinstance(config.get(part), dict):
            inner = perturbations(config[part])
            return {f"{part}.{title}": {part: change} for title, change in inner.items()}
    found: dict[str, dict[str, Any]] = {}
    for name, value in config.items():
        if name in LEFT_OUT or "dropout" in name or name.endswith("_pdrop") or name.startswith("_"):
            continue
        if name in ("rope_parameters", "rope_scaling"):
            continue
        for other in _others(name, value):
            change = {name: other}
            if name == "layer_types" and config.get("sliding_window"):
                change["sliding_window"] = 8
            shown = json.dumps(other) if not isinstance(other, str) else other
            found[f"{name}={shown}"] = change
    found |= {f"rope:{title}": {"rope_parameters": rope} for title, rope in _ropes(config).items()}
    if "tie_word_embeddings" in config:
        found["tie_word_embeddings"] = {"tie_word_embeddings": not config["tie_word_embeddings"]}
    if "sliding_window" in config and config.get("sliding_window") is None:
        found["sliding_window=8"] = {"sliding_window": 8}
    if "use_sliding_window" in config:
        found["use_sliding_window"] = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    return found


def _others(name: str, value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, str):
        if value in ACTIVATIONS or value in ("gelu_new", "gelu_fast", "swish"):
            return [one for one in ("relu", "silu", "gelu") if one != value][:2]
        return {"greedy": ["group_limited_greedy"], "softmax": ["sigmoid"], "sigmoid": ["softmax"]}.get(value, [])
    if isinstance(value, float):
        return [0.03] if 0 < value < 1e-3 else [value * 1.7 if value else 0.5]
    if isinstance(value, int):
        if name in ("sliding_window", "attention_chunk_size", "local_attention"):
            return [8]
        if name in ("num_key_value_heads", "num_kv_heads"):
            return [4 if value != 4 else 2, 1]
        if "layers" in name or name in ("n_layer",):
            return [value + 1]
        if "per_tok" in name or name in ("moe_k", "topk_group", "n_shared_experts"):
            return [value + 1]
        return [2 * value] if value > 2 else [value + 1]
    if isinstance(value, list) and len(value) > 1 and value != value[::-1]:
        return [value[::-1]]
    if isinstance(value, list) and value and isinstance(value[0], str):
        swap = {"full_attention": "sliding_attention", "sliding_attention": "full_attention"}
        return [[swap.get(value[0], value[0]), *value[1:]]] if value[0] in swap else []
    return []


def _ropes(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary embeddings of every kind, with each of their numbers."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or not rope:
        return {}
    if any(isinstance(one, dict) for one in rope.values()):
        return {
            f"{kind} {title}": {**rope, kind: changed}
            for kind, one in rope.items()
            if isinstance(one, dict)
            for title, changed in _ropes({**config, "rope_parameters": one}).items()
        }
    head = config.get("qk_rope_head_dim") or config.get("head_dim") or 64 // config.get("num_attention_heads", 4)
    half = int(head * rope.get("partial_rotary_factor", 1.0)) // 2
    plain = {k: v for k, v in rope.items() if k in ("rope_theta", "partial_rotary_factor", "mrope_section")}
    plain.setdefault("rope_theta", 10000.0)
    yarn = {**plain, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    llama3 = {**plain, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 32
    long = {**plain, "rope_type": "longrope", "original_max_position_embeddings": 32}
    long |= {"short_factor": [1.0] * half, "long_factor": [2.0 + i for i in range(half)]}
    found = {
        "theta": {**rope, "rope_theta": 500.0},
        "linear": {**plain, "rope_type": "linear", "factor": 4.0},
        "dynamic": {**plain, "rope_type": "dynamic", "factor": 4.0},
        "yarn": yarn,
        "yarn attention_factor": {**yarn, "attention_factor": 1.7},
        "yarn beta": {**yarn, "beta_fast": 16.0, "beta_slow": 2.0},
        "yarn mscale": {**yarn, "mscale": 0.7, "mscale_all_dim": 1.0},
        "yarn mscale equal": {**yarn, "mscale": 1.0, "mscale_all_dim": 1.0},
        "yarn truncate": {**yarn, "truncate": False},
        "llama3": llama3,
        "longrope": long,
        "longrope factor": {**long, "factor": 4.0},
        "longrope attention_factor": {**long, "attention_factor": 1.3},
    }
    if plain.get("partial_rotary_factor", 1.0) == 1.0:
        found["partial"] = {**rope, "partial_rotary_factor": 0.5}
    return found


_SERVER = """
import json, sys
import xllamacpp as x
for line in sys.stdin:
    file, prompts, vocab, lora, pool = json.loads(line)
    p = x.CommonParams()
    p.model.path = file
    p.n_ctx = 128; p.n_parallel = 1; p.n_gpu_layers = 0; p.warmup = False; p.fit_params = False
    p.cpuparams.n_threads = 1; p.verbosity = -1; p.port = 0
    p.cache_type_k = p.cache_type_v = x.ggml_type.GGML_TYPE_F32
    p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if lora:
        p.lora_adapters = [x.CommonAdapterLoraInfo(lora, 1.0)]
    if pool:
        p.embedding = True
        p.pooling_type = x.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    try:
        server = x.Server(p)
        rows = []
        for prompt in prompts:
            if pool:
                rows.append(server.handle_embeddings({"input": prompt})["data"][0]["embedding"])
                continue
            asked = {"prompt": prompt, "n_predict": 1, "n_probs": vocab, "temperature": 0.0}
            asked |= {"cache_prompt": False, "ignore_eos": True, "logit_bias": [[10, 1000.0]]}
            answer = server.handle_completions(asked)
            top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            rows.append([lp for _, lp in sorted((t["id"], t["logprob"]) for t in top)])
        del server
        print("RESULT" + json.dumps(rows), flush=True)
    except Exception as err:
        print("FAILED" + str(err)[:200].replace(chr(10), " "), flush=True)
"""


class Runtime:
    """llama.cpp in a process of its own, started again where a file brings it down."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, file: Path, lora: Path | str = "", pool: bool = False) -> Any:
        """Float64 ``[prompts, vocab]`` (or ``[prompts, width]``), or a sentence on what went wrong."""
        import numpy as np

        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SERVER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps([str(file), PROMPTS, VOCAB, str(lora), pool]) + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("RESULT"):
                return np.array(json.loads(line.removeprefix("RESULT")))
            if line.startswith("FAILED"):
                return line.removeprefix("FAILED").strip()
        return f"it stops ({self._process.wait()})"

    def close(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()


def of_model(model: Any, encoder: bool) -> Any:
    """What `Runtime.run` should say."""
    import numpy as np
    import torch

    rows = []
    with torch.no_grad():
        for prompt in PROMPTS:
            out = model(input_ids=torch.tensor([prompt]))
            if encoder:
                mean = out.last_hidden_state[0].double().mean(0)
                rows.append((mean / mean.norm()).numpy())
            else:
                rows.append(torch.log_softmax(out.logits[0, -1].double(), -1).numpy())
    return np.array(rows)


def measure(kind: str, runtime: Runtime, only: set[str] | None = None) -> dict[str, Any]:
    """The verdicts of one kind by perturbation; ``only`` limits them."""
    import arch_zoo as zoo
    import transformers

    import adapterkit.gguf.vocab

    adapterkit.gguf.vocab.read_vocab = zoo.read_vocab
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    tiny = (zoo.ZOO | zoo.ENCODERS)[kind]
    encoder = kind in zoo.ENCODERS
    found: dict[str, Any] = {"class": tiny.cls, "fields": {}}
    with tempfile.TemporaryDirectory(prefix="contract-") as folder:
        at = Path(folder)
        base, said = _one(at / "base", kind, tiny, {}, encoder, runtime, None)
        found["plain"] = said
        config = json.loads((at / "base" / "config.json").read_text())
        for title, change in perturbations(config).items():
            if only is not None and title not in only:
                continue
            _, verdict = _one(at / "other", kind, tiny, change, encoder, runtime, base, said.get("notes", ()))
            found["fields"][title] = verdict
        if only is None:
            found["lora"] = loras(at / "base.gguf", at, encoder, runtime)
    return found


def _changed(config: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    parts = {name: _changed(config[name], value) for name, value in change.items() if name in _PARTS and name in config}
    return {**config, **change, **parts}


def _one(
    folder: Path,
    kind: str,
    tiny: Any,
    change: dict[str, Any],
    encoder: bool,
    runtime: Runtime,
    base: Any,
    usual: Collection[str] = (),
) -> tuple[Any, dict[str, Any]]:
    """Transformers' own answer (with the shapes of its weights), and the verdict."""
    import shutil

    import arch_zoo as zoo

    from adapterkit.errors import AdapterkitError
    from adapterkit.verbs.convert import convert

    shutil.rmtree(folder, ignore_errors=True)
    file = folder.with_suffix(".gguf")
    file.unlink(missing_ok=True)
    zoo.ZOO["perturbed"] = replace(tiny, config=_changed(tiny.config, change))
    try:
        model = zoo.build(folder, "perturbed")
        expected = of_model(model, encoder)
    except Exception as err:  # whatever transformers raises for a config that it does not like
        return None, {"verdict": "no-model", "why": f"{type(err).__name__}: {err}"[:160]}
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found: dict[str, Any] = {}
    if base is not None:
        same = shapes == base[1]
        found["moves"] = float(f"{abs(expected - base[0]).max():.2g}") if same else "other shapes"
    try:
        report = convert(folder, file, force=True)
    except AdapterkitError as err:
        return (expected, shapes), {"verdict": "refused", **found, "why": f"{err}".replace(str(folder), "MODEL")[:300]}
    got = runtime.run(file, pool=encoder)
    notes = [note for note in report.notes if "no token" not in note and note not in usual]
    if isinstance(got, str):
        return (expected, shapes), {"verdict": "no-load", **found, "why": got}
    far = float(f"{abs(got - expected).max():.2g}")
    verdict = "agrees" if found.get("moves", 1) == "other shapes" or found.get("moves", 1) > MOVED else "idle"
    if far > max(tiny.tolerance, 5e-4):
        verdict = "noted" if notes else "silent"
    return (expected, shapes), {"verdict": verdict, **found, "far": far, **({"notes": notes} if notes else {})}


def loras(file: Path, at: Path, encoder: bool, runtime: Runtime) -> dict[str, str]:
    """For every kind of weight: whether a LoRA on it changes what llama.cpp computes."""
    import numpy as np
    from gguf import GGUFReader, GGUFWriter

    reader = GGUFReader(str(file))
    plain = runtime.run(file, pool=encoder)
    arch = reader.fields["general.architecture"].contents()
    kinds: dict[str, list[Any]] = {}
    for tensor in reader.tensors:
        if len(tensor.shape) > 1 and tensor.name.endswith(".weight"):
            stem = ".".join(part for part in tensor.name.removesuffix(".weight").split(".") if not part.isdigit())
            kinds.setdefault(stem, []).append(tensor)
    found = {}
    rng = np.random.default_rng(0)
    for stem, tensors in kinds.items():
        lora = at / "lora.gguf"
        writer = GGUFWriter(str(lora), arch)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 4.0)
        for tensor in tensors:
            *lead, out, width = (int(size) for size in reversed(tensor.shape))
            if stem == "token_embd":
                out, width = width, out
            a = rng.normal(0, 0.3, (*lead, 4, width)).astype(np.float32)
            b = rng.normal(0, 0.3, (*lead, out, 4)).astype(np.float32)
            if stem == "token_embd":
                a, b = np.ascontiguousarray(a.T), b
                a, b = a, b
            writer.add_tensor(tensor.name + ".lora_a", a)
            writer.add_tensor(tensor.name + ".lora_b", b)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        got = runtime.run(file, lora, encoder)
        if isinstance(got, str):
            found[stem] = f"fails: {got}"
        else:
            found[stem] = "applied" if abs(got - plain).max() > 1e-4 else "ignored"
    return found


def words(found: dict[str, Any]) -> dict[str, Any]:
    """The verdicts of a kind without their figures."""
    fields = {title: one["verdict"] for title, one in found["fields"].items()}
    return {"class": found["class"], "fields": fields, "lora": found["lora"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--write", type=Path, help="where the verdicts go, as JSON; kinds not named are kept")
    parser.add_argument(
        "--stored", type=Path, help="the same with the words alone, as tests/gguf/contract.json has them"
    )
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import arch_zoo as zoo
    import torch

    torch.set_num_threads(1)
    kept = json.loads(asked.write.read_text()) if asked.write and asked.write.is_file() else {}
    runtime = Runtime()
    for kind in asked.kinds or [*zoo.ZOO, *zoo.ENCODERS]:
        try:
            kept[kind] = measure(kind, runtime)
        except Exception as err:  # one kind must not lose the others
            kept[kind] = {"error": f"{type(err).__name__}: {err}"[:300]}
        bad = [t for t, v in kept[kind].get("fields", {}).items() if v["verdict"] in ("silent", "no-load")]
        lost = [stem for stem, word in kept[kind].get("lora", {}).items() if word != "applied"]
        print(f"{kind}: silent or not loaded: {bad}; no LoRA on: {lost} {kept[kind].get('error', '')}", flush=True)
        if asked.write:
            asked.write.write_text(json.dumps(kept, indent=1) + "\n")
        if asked.stored and "error" not in kept[kind]:
            stored = json.loads(asked.stored.read_text()) if asked.stored.is_file() else {}
            stored[kind] = words(kept[kind])
            lines = (f"{json.dumps(name)}: {json.dumps(one)}" for name, one in stored.items())
            asked.stored.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    runtime.close()


if __name__ == "__main__":
    main()
