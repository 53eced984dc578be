"""Single files as LyCORIS itself writes them, held against LyCORIS's own weights in float64 and its forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from method_cases import Net, example, make_net, merged_tensors, save_base
from safetensors.torch import save_file

LINEAR = ("layers.0.wide", "layers.1.square", "layers.1.narrow")
CONVS = ("conv1", "conv2", "conv2_groups", "conv3")
POINT = ("conv2_point",)


@dataclass(frozen=True)
class Case:
    """One algorithm of LyCORIS with its switches, on some layers.

    Attributes:
        name: of the class in ``lycoris.modules``.
        modules: layers of the net.
        switches: arguments of the class.
        noise: of the trained tensors.
        kind: the type that the file is read as.
    """

    name: str
    modules: tuple[str, ...]
    switches: dict[str, Any] = field(default_factory=dict)
    noise: float = 0.2
    kind: str = "LYCORIS"

    def __str__(self) -> str:
        words = ",".join(f"{name}={value}" for name, value in self.switches.items())
        return f"{self.name}-{self.modules[0]}" + (f"-{words}" if words else "")


R = {"lora_dim": 3, "alpha": 5}
IN = {"weight_decompose": True, "wd_on_out": False}
OUT = {"weight_decompose": True}
TUCKER = {"use_tucker": True}
CASES = [
    Case("LoConModule", LINEAR, R, kind="LORA"),
    Case("LoConModule", (*CONVS, *POINT), R, kind="LORA"),
    Case("LoConModule", LINEAR, {**R, **OUT}, kind="LORA"),
    Case("LoConModule", LINEAR, {**R, "rs_lora": True}, kind="LORA"),
    Case("LoConModule", LINEAR, {**R, "use_scalar": True}, kind="LORA"),
    Case("LoConModule", LINEAR, {**R, **IN}),
    Case("LoConModule", (*CONVS, *POINT), {**R, **IN}),
    Case("LoConModule", CONVS, {**R, **TUCKER}),
    Case("LoConModule", CONVS, {**R, **TUCKER, **OUT}),
    Case("LoConModule", CONVS, {**R, **TUCKER, **IN}),
    Case("LohaModule", LINEAR, R, kind="LOHA"),
    Case("LohaModule", CONVS, R, kind="LOHA"),
    Case("LohaModule", LINEAR, {**R, **OUT}),
    Case("LohaModule", LINEAR, {**R, **IN}),
    Case("LohaModule", CONVS, {**R, **TUCKER}, kind="LOHA"),
    Case("LohaModule", CONVS, {**R, **TUCKER, **IN}),
    Case("LokrModule", LINEAR, R, kind="LOKR"),
    Case("LokrModule", LINEAR, {**R, "lora_dim": 1, "decompose_both": True}, kind="LOKR"),
    Case("LokrModule", LINEAR, {**R, "full_matrix": True}, kind="LOKR"),
    Case("LokrModule", LINEAR, {**R, "factor": 4, "unbalanced_factorization": True, **IN}),
    Case("LokrModule", LINEAR, {**R, **OUT}),
    Case("LokrModule", CONVS, {**R, "lora_dim": 1, **TUCKER}, kind="LOKR"),
    Case("LokrModule", CONVS, {**R, "lora_dim": 1, **TUCKER, **OUT}),
    Case("LokrModule", CONVS, {**R, "lora_dim": 1}, kind="LOKR"),
    Case("LokrModule", CONVS, {"full_matrix": True}),
    Case("FullModule", (*LINEAR, *CONVS)),
    Case("NormModule", ("layers.0.norm", "layers.1.norm")),
    Case("DiagOFTModule", (*LINEAR, *CONVS, *POINT), {"lora_dim": 4}),
    Case("DiagOFTModule", (*LINEAR, *CONVS), {"lora_dim": 4, "rescaled": True}),
    Case("DiagOFTModule", (*LINEAR, *CONVS), {"lora_dim": 2, "constraint": 1e-2}),
    Case("ButterflyOFTModule", (*LINEAR, *CONVS, *POINT), {"lora_dim": 4}),
    Case("ButterflyOFTModule", (*LINEAR, *CONVS), {"lora_dim": 8, "rescaled": True}),
    Case("ButterflyOFTModule", (*LINEAR, *CONVS), {"lora_dim": 4, "constraint": 1e-2}),
    Case("IA3Module", (*LINEAR, "conv1", "conv2", "conv3"), {"train_on_input": True}),
    Case("IA3Module", (*LINEAR, *CONVS), {"train_on_input": False}),
    Case("GLoRAModule", LINEAR, R),
    Case("GLoRAModule", ("conv1", "conv2", "conv3", *POINT), {**R, "use_scalar": True}),
]


def train(case: Case, net: Net) -> dict[str, Any]:
    """LyCORIS modules on layers of a net, every trained tensor moved."""
    import lycoris.modules as library

    kind = getattr(library, case.name, None) or getattr(_module_of(case.name), case.name)
    found = {}
    generator = torch.Generator().manual_seed(5)
    for path in case.modules:
        module = kind(f"lycoris_{path.replace('.', '_')}", net.get_submodule(path), **case.switches)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += case.noise * torch.randn(parameter.shape, generator=generator)
        found[path] = module.eval()
    return found


def _module_of(name: str) -> Any:
    import importlib

    files = {"FullModule": "full", "NormModule": "norms", "IA3Module": "ia3", "GLoRAModule": "glora"}
    files |= {"DiagOFTModule": "diag_oft", "ButterflyOFTModule": "boft"}
    return importlib.import_module(f"lycoris.modules.{files[name]}")


def rotated(module: Any) -> torch.Tensor:
    """R^T W of OFT and M_f ... M_1 W of BOFT in float64, as whole matrices; LyCORIS inverts in float32."""
    from einops import rearrange

    blocks = module.oft_blocks.double()
    q = blocks - blocks.mT
    if module.constraint > 0:
        assert q.norm() > module.constraint
        q = q * module.constraint / q.norm()
    eye = torch.eye(q.shape[-1], dtype=torch.float64)
    r = (eye + q) @ torch.linalg.inv(eye - q)
    w = module.org_weight.double().flatten(1)
    if r.ndim == 3:
        w = torch.block_diag(*r.mT) @ w
    else:
        for stage, mixed in enumerate(r):
            k = 2**stage * r.shape[-1] // 2
            order = rearrange(torch.eye(len(w), dtype=torch.float64), "(c g k) x -> (c k g) x", g=2, k=k)
            w = order.T @ torch.block_diag(*mixed) @ order @ w
    return (w * module.rescale.double().view(-1, 1) if module.rescaled else w).view(module.org_weight.shape)


def trained(module: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight that a module computes with, in float64, and its bias if that changes."""
    if type(module).__name__ in ("LohaModule", "LokrModule"):
        # Its merge (get_diff_weight) multiplies by alpha/r a second time; this is what its forward does.
        w = module.org_weight + module.get_weight(module.shape) * module.scalar
        return (module.apply_weight_decompose(w) if module.wd else w), None
    weight, bias = module.get_merged_weight()
    return weight, bias


def written(modules: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What LyCORIS saves of them; a full difference is only told once the module is in the net's place."""
    tensors = {}
    for path, module in modules.items():
        if type(module).__name__ == "FullModule":
            module.apply_to()
        for name, tensor in module.state_dict().items():
            kept = tensor if not tensor.is_floating_point() else tensor.float()
            tensors[f"lycoris_{path.replace('.', '_')}.{name}"] = kept.detach().contiguous().clone()
    return tensors


@pytest.mark.parametrize("case", CASES, ids=str)
def test_merges_what_lycoris_trained(case: Case, tmp_path: Path) -> None:
    from adapterkit.adapters.load import load_adapter

    turns = "OFT" in case.name
    net = make_net() if turns else make_net().double()
    save_base(net, tmp_path / "base")
    modules = train(case, net)
    for module in modules.values():
        module.to(net.embed.weight.dtype)
    with torch.no_grad():
        exact = {path: (rotated(module), None) if turns else trained(module) for path, module in modules.items()}
        inputs = {path: example(net.get_submodule(path)) for path in modules}
        outputs = {path: module(inputs[path]) for path, module in modules.items()}
        save_file(written(modules), tmp_path / "file.safetensors")
    assert load_adapter(tmp_path / "file.safetensors").config.peft_type == case.kind
    ours = merged_tensors(tmp_path / "base", tmp_path / "file.safetensors")
    before = make_net().state_dict()
    touched = set()
    for path, (weight, bias) in exact.items():
        for name, tensor in ((f"{path}.weight", weight), (f"{path}.bias", bias)):
            if tensor is None:
                continue
            delta = float((tensor - before[name]).abs().max())
            assert delta > 1e-3
            assert float((ours[name] - tensor).abs().max()) <= 2e-6 * delta, name
            touched.add(name)
    assert {name for name in before if not torch.equal(ours[name], before[name])} == touched
    plain = make_net().double()
    plain.load_state_dict(ours)
    with torch.no_grad():
        for path, expected in outputs.items():
            found = plain.get_submodule(path)(inputs[path].double())
            assert float((found - expected).abs().max()) <= 5e-6 * float(expected.abs().max()), path


@pytest.mark.parametrize("name", ["LohaModule", "LokrModule"])
def test_what_lycoris_merges_itself_is_not_what_it_trained(name: str) -> None:
    """Why its training is followed: the day this fails, the note in docs/methods.md goes."""
    net = make_net().double()
    module = train(Case(name, LINEAR[:1], R), net)[LINEAR[0]].double()
    with torch.no_grad():
        delta = trained(module)[0] - module.org_weight
        own = module.get_merged_weight()[0] - module.org_weight
    torch.testing.assert_close(own, delta * 5 / 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("algorithm", "switches"), [("lokr", {"factor": 4}), ("boft", {}), ("ia3", {})])
def test_a_whole_network_as_lycoris_saves_it(
    algorithm: str, switches: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    """Its own wrapper, with norms beside the algorithm and its own names, saved and applied by its own functions."""
    from lycoris import LycorisNetwork, create_lycoris

    base = make_net()
    save_base(base, tmp_path / "base")
    LycorisNetwork.apply_preset({"target_module": ["Layer", "Conv2d"]})
    net = make_net()
    network = create_lycoris(net, 1.0, linear_dim=4, linear_alpha=2, algo=algorithm, train_norm=True, **switches)
    generator = torch.Generator().manual_seed(2)
    network.apply_to()
    with torch.no_grad():
        for parameter in network.parameters():
            # What is saved rounded must be what was trained.
            parameter.copy_((parameter + 0.1 * torch.randn(parameter.shape, generator=generator)).to(dtype))
    network.save_weights(str(tmp_path / "net.safetensors"), dtype, {})
    ours = merged_tensors(tmp_path / "base", tmp_path / "net.safetensors")
    changed = {name for name, tensor in base.state_dict().items() if not torch.equal(tensor, ours[name])}
    assert {"layers.0.norm.weight", "layers.1.norm.bias", "layers.0.wide.weight", "conv2.weight"} <= changed
    plain = make_net()
    plain.load_state_dict(ours)
    with torch.no_grad():
        for path in ("layers.0.norm", "layers.0.wide", "layers.1.narrow", "conv2"):
            x = example(plain.get_submodule(path))
            torch.testing.assert_close(plain.get_submodule(path)(x), net.get_submodule(path)(x), rtol=2e-5, atol=2e-5)
