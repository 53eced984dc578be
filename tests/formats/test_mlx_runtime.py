"""MLX adapters in mlx-lm itself, on its CPU build: the logits are those of the PEFT adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlx_child import MlxChild
from models import make_adapter

from adapterkit.verbs.convert import convert

pytest.importorskip("mlx_lm", reason="mlx-lm has no build for this machine")

IDS = [[1, 5, 9, 3, 7, 2]]
CHILD = """
import sys
from pathlib import Path
import mlx.core as mx
import numpy as np
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model
model, _ = load_model(Path(sys.argv[1]))
ids = mx.array(eval(sys.argv[4]))
before = model(ids)
model = load_adapters(model, sys.argv[2])
model.eval()
np.save(sys.argv[3], np.array(mx.stack([before, model(ids)])))
"""


def mlx_logits(mlx_lm: MlxChild, base: Path, adapter: Path, tmp_path: Path) -> torch.Tensor:
    """Logits of the base and of the base with the adapter, [2, 1, tokens, V]."""
    import numpy as np

    found = tmp_path / "logits.npy"
    mlx_lm.run(CHILD, base, adapter, found, IDS)
    return torch.from_numpy(np.load(found))


def peft_logits(base: Path, adapter: Path) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        before = model(torch.tensor(IDS)).logits
        after = PeftModel.from_pretrained(model, adapter).eval()(torch.tensor(IDS)).logits
    return torch.stack([before, after])


def configs() -> dict[str, Any]:
    from peft import LoraConfig

    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return {
        "plain": LoraConfig(r=4, lora_alpha=10, target_modules=every),
        "scalings": LoraConfig(
            r=4,
            lora_alpha=10,
            use_rslora=True,
            target_modules=every,
            rank_pattern={"q_proj": 2},
            alpha_pattern={"v_proj": 3},
        ),
        "dora": LoraConfig(r=4, lora_alpha=10, use_dora=True, target_modules=["q_proj", "down_proj"]),
    }


@pytest.mark.parametrize("kind", sorted(configs()))
def test_mlx_lm_gives_the_logits_that_peft_gives(
    kind: str, mlx_lm: MlxChild, make_base: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_base("llama")
    adapter = make_adapter(tmp_path / "adapter", base, configs()[kind])
    convert(adapter, tmp_path / "mlx", to="mlx", base=base)
    ours, theirs = mlx_logits(mlx_lm, base, tmp_path / "mlx", tmp_path), peft_logits(base, adapter)
    effect = float((theirs[1] - theirs[0]).abs().max())
    assert effect > 0.01
    assert float((ours[0] - theirs[0]).abs().max()) <= 1e-5
    assert float((ours[1] - theirs[1]).abs().max()) <= 2e-5


# What mlx-lm's trainer does around the steps themselves: wrap layers, train (here: random values), save.
TRAINED = """
import json, sys
from pathlib import Path
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model
base, out, kind = sys.argv[1:4]
model, _ = load_model(Path(base))
model.freeze()
settings = {"rank": 4, "scale": 7.5, "dropout": 0.0, "keys": json.loads(sys.argv[4])}
linear_to_lora_layers(model, 2, settings, use_dora=kind == "dora")
mx.random.seed(3)
model.update(tree_map(lambda x: x + 0.1 * mx.random.normal(x.shape), model.trainable_parameters()))
folder = Path(out)
folder.mkdir()
mx.save_safetensors(str(folder / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
config = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": settings, "model": "org/base"}
(folder / "adapter_config.json").write_text(json.dumps(config))
np.save(folder / "logits.npy", np.array(model(mx.array(eval(sys.argv[5])))))
"""


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_what_mlx_lm_trained_merges_into_the_same_model(
    kind: str, mlx_lm: MlxChild, make_base: Callable[..., Path], tmp_path: Path
) -> None:
    import json

    import numpy as np
    from transformers import AutoModelForCausalLM

    import adapterkit

    base, adapter = make_base("llama"), tmp_path / "adapter"
    keys = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]
    mlx_lm.run(TRAINED, base, adapter, kind, json.dumps(keys), IDS)
    theirs = torch.from_numpy(np.load(adapter / "logits.npy"))
    report = adapterkit.merge(base, [adapter], tmp_path / "merged")
    assert report.touched == 6
    with torch.no_grad():
        before, ours = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor(IDS)).logits
            for folder in (base, tmp_path / "merged")
        )
    assert float((theirs - before).abs().max()) > 0.05
    assert float((theirs - ours).abs().max()) <= 2e-5
