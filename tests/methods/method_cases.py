"""Every mergeable tuner of PEFT on every kind of layer it takes, with the switches of its config: the table and one run.

Shared by the tests beside it and by ``bench/proofs/methods.py``.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapterkit.adapters.fold import fold
from adapterkit.adapters.load import load_adapter
from adapterkit.checkpoint.open import open_checkpoint

# What a kind of layer stands for in the net below, and an input for a module of it.
KINDS: dict[str, tuple[str, ...]] = {
    "Linear": ("layers.0.wide", "layers.1.wide", "layers.0.square", "layers.1.narrow"),
    "Linear with bias": ("layers.0.wide", "layers.1.square"),
    "Conv1D": ("layers.0.turned", "layers.1.turned_square"),
    "Conv1d": ("conv1",),
    "Conv2d": ("conv2", "conv2_square"),
    "Conv2d 1x1": ("conv2_point",),
    "Conv2d groups": ("conv2_groups",),
    "Conv3d": ("conv3",),
    "Embedding": ("embed",),
    "LayerNorm": ("layers.0.norm", "layers.1.norm"),
}


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width, bias=False)
        self.square = nn.Linear(width, width)
        self.turned = Conv1D(2 * width, width)
        self.turned_square = Conv1D(width, width)


class Net(nn.Module):
    """One layer of every kind; it has no forward of its own, since merging asks for none."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(48, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(2))
        self.conv1 = nn.Conv1d(8, 16, 3)
        self.conv2 = nn.Conv2d(8, 16, 3)
        self.conv2_square = nn.Conv2d(8, 8, 3)
        self.conv2_point = nn.Conv2d(8, 16, 1)
        self.conv2_groups = nn.Conv2d(8, 16, 3, groups=2)
        self.conv3 = nn.Conv3d(4, 8, 3)


def make_net(seed: int = 0, width: int = 32) -> Net:
    torch.manual_seed(seed)
    net = Net(width)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net


@dataclass(frozen=True)
class Case:
    """One tuner on one kind of layer with one set of switches.

    Attributes:
        method: PEFT's config class without ``Config``.
        kind: of layer.
        switches: config fields.
        noise: size of the perturbation of every trained tensor.
        tolerance: of the largest error, as a part of the largest delta.
    """

    method: str
    kind: str
    switches: dict[str, Any] = field(default_factory=dict)
    noise: float = 0.2
    tolerance: float = 2e-6

    def __str__(self) -> str:
        words = ",".join(f"{k}={v}" for k, v in self.switches.items())
        return f"{self.method}-{self.kind}" + (f"-{words}" if words else "")

    @property
    def modules(self) -> tuple[str, ...]:
        return KINDS[self.kind]

    def config(self) -> Any:
        import peft

        return getattr(peft, f"{self.method}Config")(target_modules=list(self.modules), **self.switches)


def cases() -> list[Case]:
    """The table."""
    found: list[Case] = []

    def add(method: str, kinds: str, *switches: dict[str, Any], **more: Any) -> None:
        for kind in kinds.split(","):
            found.extend(Case(method, kind, one, **more) for one in switches or ({},))

    pattern = {"rank_pattern": {"wide": 6}, "alpha_pattern": {"layers.0.*": 3}}
    add("AdaLora", "Linear,Conv1D", {"init_r": 6, "total_step": 9, "lora_alpha": 12})
    add("AdaLora", "Linear", {"init_r": 6, "total_step": 9, "lora_alpha": 0})
    add("AdaLora", "Conv2d", {"init_r": 6, "total_step": 9})
    add("Vera", "Linear,Conv1D", {"r": 8}, {"r": 8, "save_projection": False, "projection_prng_key": 5})
    add("Vera", "Linear", {"r": 8, "bias": "vera_only"}, {"r": 8, "d_initial": 0.7})
    add("Pvera", "Linear,Conv1D", {"r": 8}, {"r": 8, "save_projection": False})
    for inner in ({}, {"feedforward_modules": []}):
        rest = inner or {"feedforward_modules": None}
        for kind in ("Linear", "Conv1D", "Conv2d", "Conv2d groups", "Conv3d"):
            add("IA3", kind, rest if inner else {"feedforward_modules": list(KINDS[kind])})
    add("LoHa", "Linear", {"r": 4, "alpha": 6}, {"r": 4, "alpha": 6, **pattern})
    add("LoHa", "Conv1d,Conv2d,Conv2d groups", {"r": 4})
    add("LoHa", "Conv1d,Conv2d,Conv2d groups", {"r": 4, "use_effective_conv2d": True}, noise=0.5)
    add("LoHa", "Conv2d 1x1", {"r": 4, "use_effective_conv2d": True})
    add("LoKr", "Linear", {"r": 2, "alpha": 3}, {"r": 2, "decompose_both": True}, {"r": 64}, {"r": 2, **pattern})
    add("LoKr", "Linear", {"r": 2, "decompose_factor": 4}, {"r": 2, "init_weights": "lycoris"})
    add("LoKr", "Conv1d,Conv2d,Conv2d groups", {"r": 1}, {"r": 16})
    add("LoKr", "Conv2d,Conv2d groups", {"r": 1, "use_effective_conv2d": True})
    add("LoKr", "Conv2d 1x1", {"r": 1, "use_effective_conv2d": True})
    blocks = {"r": 0, "oft_block_size": 8}
    exact = {"use_cayley_neumann": False}
    add(
        "OFT",
        "Linear,Embedding",
        blocks,
        {**blocks, **exact},
        *({**blocks, "num_cayley_neumann_terms": terms} for terms in (2, 3, 4, 7)),
        {**blocks, "block_share": True},
        {**blocks, "coft": True, "eps": 0.6},
        {**blocks, "coft": True, "eps": 0.6, "block_share": True, **exact},
        {"r": 2, "oft_block_size": 0},
    )
    add("OFT", "Conv2d 1x1", {**blocks}, {"r": 0, "oft_block_size": 4, **exact, "block_share": True})
    add("BOFT", "Linear,Conv2d", {"boft_block_size": 8}, {"boft_block_size": 0, "boft_block_num": 4})
    add("BOFT", "Linear", {"boft_block_size": 8, "bias": "boft_only"})
    add("HRA", "Linear,Conv2d", {"r": 4}, {"r": 5, "apply_GS": True}, {"r": 3, "init_weights": False})
    add("Miss", "Linear", {"r": 4}, {"r": 6}, {"r": 8, "mini_r": 4, "init_weights": "mini"})
    add("Miss", "Linear", {"r": 8, "init_weights": "bat"}, {"r": 5, "init_weights": False})
    add("C3A", "Linear", {"block_size": 8}, {"block_size": 8, "block_size_pattern": {"wide": 4}}, noise=3.0)
    add("FourierFT", "Linear,Conv1D", {"n_frequency": 90}, {"n_frequency": 90, "random_loc_seed": 3, "scaling": 9.0})
    add("FourierFT", "Linear", {"n_frequency": 90, "n_frequency_pattern": {"wide": 50}})
    for family in ("db1", "db4", "sym5", "coif2"):
        add("WaveFT", "Linear", {"n_frequency": 300, "wavelet_family": family})
    add("WaveFT", "Linear,Conv1D", {"n_frequency": 90, "use_idwt": False}, {"n_frequency": 90, "wavelet_family": "db3"})
    add("WaveFT", "Linear", {"n_frequency": 90, "proportional_parameters": True, "random_loc_seed": 11})
    add("Hira", "Linear", {"r": 4}, {"r": 4, "rank_pattern": {"wide": 6}})
    add("Hira", "Conv1D", {"r": 4, "fan_in_fan_out": True})
    add("Hira", "Embedding,Conv1d,Conv2d,Conv2d 1x1,Conv3d", {"r": 4})
    add("Delora", "Linear", {"r": 4}, {"r": 4, "rank_pattern": {"wide": 6}, "lambda_pattern": {"wide": 9}})
    add("Gralora", "Linear,Conv1D", {"r": 8, "gralora_k": 2}, {"r": 8, "gralora_k": 4, "hybrid_r": 3, "alpha": 9})
    for weight, inside, bias in (
        ("lora", "lora", "constant"),
        ("vector", "vector", "vector"),
        ("constant", "none", "none"),
    ):
        add("Glora", "Linear", {"r": 4, "config_A_B": weight, "config_C": inside, "config_D_E": bias})
    add("Glora", "Linear with bias", {"r": 4, "config_A_B": "none", "config_C": "vector", "config_D_E": "constant"})
    bases = {"r": 5, "randlora_alpha": 20}
    add("RandLora", "Linear,Conv1D", bases, {**bases, "sparse": True}, tolerance=1e-5)
    for kind in ("sparse", "very_sparse"):
        add("RandLora", "Linear", {**bases, kind: True, "save_projection": False}, tolerance=1e-5)
    bank = {"r": 4, "num_vectors": 20, "vector_length": 8}
    add("VBLoRA", "Linear,Conv1D", bank, {**bank, "topk": 3, "save_only_topk_weights": True})
    add("Road", "Linear", *({"variant": f"road_{n}", "group_size": 8} for n in (1, 2, 4)))
    add("Road", "Linear", {"variant": "road_1", "group_size": 32})
    add("Shira", "Linear", {"r": 2}, {"r": 2, "random_seed": 4})
    add("LNTuning", "LayerNorm,Linear")
    add("OSF", "Linear", {}, {"effective_rank": 5}, {"effective_rank": 5, "rank_pattern": {"wide": 20}})
    add("Deft", "Linear,Conv1D", {"r": 4}, {"r": 4, "decomposition_method": "qr"}, {"r": 4, "alpha": 8})
    add("Deft", "Linear", {"r": 4, "para": True}, {"r": 4, "para": True, "decomposition_method": "qr"})
    for depth, activation in ((0, "relu"), (1, "silu"), (2, "gelu"), (3, "tanh")):
        add("Peanut", "Linear", {"r": 4, "depth": depth, "act_fn": activation, "scaling": 0.7})
    add("TinyLora", "Linear,Conv1D,Embedding", {"r": 2, "u": 8}, {"r": 3, "u": 8, "weight_tying": 1.0})
    add("TinyLora", "Linear", {"r": 2, "u": 8, "weight_tying": 0.5})
    add("UniLora", "Linear,Conv1D", {"r": 4, "theta_d_length": 64, "save_indices": True}, noise=1.0)
    add("Beft", "Linear with bias")
    add("Frod", "Linear,Conv1D", {"sparse_rate": 0.05})
    add(
        "Supertuning",
        "Linear",
        {"sparsity": 0.9},
        {"sparsity": 0.9, "r": 3, "lora_alpha": 6},
        {"sparsity": 0.9, "select_top": False},
    )
    add("TrainableTokens", "Embedding", {"token_indices": [1, 5, 40]})
    return found


@dataclass(frozen=True)
class Outcome:
    """Errors as parts of the largest delta.

    Attributes:
        merge: of our weights against PEFT's merged ones.
        forward: of the outputs of modules with our weights against those of PEFT's unmerged adapter.
        delta: the largest delta.
        changed: how many parameters the adapter changed.
    """

    merge: float
    forward: float
    delta: float
    changed: int


def example(module: nn.Module) -> torch.Tensor:
    """An input for one module."""
    generator = torch.Generator().manual_seed(3)
    if isinstance(module, nn.Embedding):
        return torch.arange(module.num_embeddings)
    if isinstance(module, Conv1D):
        shape: tuple[int, ...] = (5, module.weight.shape[0])
    elif isinstance(module, nn.Linear):
        shape = (5, module.in_features)
    elif isinstance(module, nn.LayerNorm):
        shape = (5, module.normalized_shape[0])
    else:
        assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        shape = (2, module.in_channels, *([5] * len(module.kernel_size)))
    return torch.randn(shape, generator=generator, dtype=next(module.parameters()).dtype)


def save_base(net: nn.Module, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """The net as a checkpoint folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: t.detach().to(dtype).contiguous() for name, t in net.state_dict().items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "custom", "vocab_size": 48}), encoding="utf-8")


def train(net: nn.Module, config: Any, folder: Path, noise: float, seed: int = 1) -> Any:
    """A PEFT model with every trained tensor moved, saved into ``folder``."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = get_peft_model(net, config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += noise * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(str(folder))
    return model.eval()


def merged_tensors(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What adapterkit makes of base and adapter."""
    found = fold(open_checkpoint(base), [load_adapter(adapter)]).checkpoint
    return {name: tensor.read(0, tensor.numel).view(tensor.shape) for name, tensor in found.tensors.items()}


def run(case: Case, folder: Path) -> Outcome:
    """One case: PEFT trains, saves, loads and merges; adapterkit merges the same files."""
    from peft import PeftModel

    base, adapter = folder / "base", folder / "adapter"
    net = make_net()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    save_base(net, base)
    train(net, case.config(), adapter, case.noise)
    ours = merged_tensors(base, adapter)

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(make_net(), str(adapter)).eval()
        inner = model.get_base_model()
        plain = make_net()
        examples = {path: example(plain.get_submodule(path)) for path in case.modules}
        trained = {path: inner.get_submodule(path)(x) for path, x in examples.items()}
        forward = 0.0
        untouched = {path: plain.get_submodule(path)(x) for path, x in examples.items()}
        plain.load_state_dict(ours)
        for path, x in examples.items():
            moved = (trained[path] - untouched[path]).abs().max()
            forward = max(forward, float((plain.get_submodule(path)(x) - trained[path]).abs().max() / moved))
        delta = max(float((ours[name] - before[name]).abs().max()) for name in before)
        changed = sum(not torch.equal(ours[name], before[name]) for name in before)
        theirs = model.merge_and_unload().state_dict()
        merge = max(float((ours[name] - theirs[name]).abs().max()) for name in before) / delta
    return Outcome(merge, forward, delta, changed)


def correctly_rounded(case: Case, folder: Path, width: int = 256) -> float:
    """The share of bfloat16 entries that are the float64 result, rounded; the changed tensors only."""
    from peft import PeftModel

    base, adapter = folder / "base", folder / "adapter"

    def rounded() -> Net:
        net = make_net(width=width)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(parameter.bfloat16())
        return net

    save_base(rounded(), base, torch.bfloat16)
    before = rounded().state_dict()
    train(rounded(), case.config(), adapter, case.noise)
    ours = merged_tensors(base, adapter)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        exact = PeftModel.from_pretrained(rounded(), str(adapter)).eval().double().merge_and_unload().state_dict()
    right = total = 0
    for name, tensor in ours.items():
        if not torch.equal(tensor, before[name].bfloat16()):
            right += int((tensor == exact[name].bfloat16()).sum())
            total += tensor.numel()
    return right / total
