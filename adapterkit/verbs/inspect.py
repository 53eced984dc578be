"""`inspect`: what an adapter or a checkpoint is, and with ``health`` how it is."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.adapter import Adapter
from adapterkit.adapters.config import FLAT, PARTS
from adapterkit.adapters.edits import check_config, group_modules, method_of
from adapterkit.adapters.formats.plain import resolved
from adapterkit.adapters.load import is_adapter, load_adapter
from adapterkit.adapters.methods.lora import EMBEDDING_A, EMBEDDING_B, MAGNITUDE, A, B
from adapterkit.bases import open_model
from adapterkit.checkpoint.pipeline import components
from adapterkit.errors import AdapterError, counted
from adapterkit.places import readable
from adapterkit.values import dataclass

if TYPE_CHECKING:
    import torch

    from adapterkit.adapters.method import Module
    from adapterkit.checkpoint.checkpoint import Checkpoint


@dataclass(frozen=True)
class ModuleHealth:
    """How one module's factors are.

    Attributes:
        module: its path.
        rank: of the factors; of stacked experts, of each.
        norm: Frobenius norm of s B A; of stacked experts, of all of them together.
        effective_rank: exp of the entropy of its normalised singular values (Roy and Vetterli 2007); the mean over experts.
        problem: ``nan``, ``untrained`` (B is all zero) or empty.
        experts: how many are stacked; 0 for an ordinary module.
    """

    module: str
    rank: int
    norm: float
    effective_rank: float
    problem: str = ""
    experts: int = 0


@dataclass(frozen=True)
class Inspection:
    """What something is; fields that do not apply are empty.

    Attributes:
        kind: ``adapter`` or ``checkpoint``.
        method: of an adapter, with its variants.
        ranks, scalings: how often each occurs.
        targets: module name to how many layers have it.
        parameters: trainable ones of an adapter, all of a checkpoint.
        share: of the base's parameters, where the base is known.
        mergeable: empty when it is, else the reason why not.
        details: what a GGUF file says of itself.
    """

    ref: str
    kind: str
    parameters: int
    nbytes: int
    tensors: int
    dtypes: dict[str, int]
    method: str = ""
    ranks: dict[str, int] = field(default_factory=dict)
    scalings: dict[str, int] = field(default_factory=dict)
    targets: dict[str, int] = field(default_factory=dict)
    whole: tuple[str, ...] = ()
    base: str = ""
    revision: str = ""
    peft_version: str = ""
    share: float | None = None
    mergeable: str = ""
    architecture: str = ""
    details: dict[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    commit: str = ""
    health: tuple[ModuleHealth, ...] = ()
    notes: tuple[str, ...] = ()


def inspect(ref: str | Path, *, base: str | Path | None = None, health: bool = False) -> Inspection:
    """Look at an adapter or a checkpoint; only headers are read unless ``health`` is asked for.

    Args:
        ref: folder, file or Hub id.
        base: the adapter's base, to give its share of the parameters.
        health: read the factors: NaN, untrained modules, norms and effective ranks.

    Raises:
        NotFound, CheckpointError, AdapterError, UnsafeError, AuthError, HubError
        UsageError: an address that nothing is read from.
    """
    ref = readable(ref, "what is inspected")
    if is_adapter(ref):
        opened = None if base is None else open_model(base, headers_only=True)
        adapter = load_adapter(ref, headers_only=not health)
        if adapter.config.get(PARTS):
            adapter = resolved(adapter, opened) if opened is not None else _all_parts(adapter)
        return inspect_adapter(adapter, opened, health)
    return inspect_checkpoint(open_model(ref, headers_only=True))


def _all_parts(adapter: Adapter) -> Adapter:
    """A file for several parts of a pipeline as one adapter, its paths led by their parts."""
    from adapterkit.adapters.formats.contents import assembled

    contents = adapter.contents
    assert contents is not None
    led = [
        replace(one, path=f"{one.part}{'_' if one.flat else '.'}{one.path}".lstrip("._")) for one in contents.modules
    ]
    config, tensors = assembled(contents, led)
    return replace(adapter, config=config, tensors=tensors)


def _family(checkpoint: Checkpoint) -> str:
    """The family of a model of images, video or sound that has no config, and whose names it has."""
    from adapterkit.adapters.families.names import family_of

    told = family_of(checkpoint)
    return "" if told is None else f"{told[0].name} ({told[1]} layout)"


def _gguf_details(checkpoint: Checkpoint) -> dict[str, str]:
    """What a GGUF file says of itself; nothing for a checkpoint of another format."""
    if checkpoint.format != "gguf":
        return {}
    from adapterkit.gguf.describe import details

    return details(checkpoint)


# What trainers write of their settings, as people ask for it.
_SETTINGS = {
    "ss_base_model_version": "base model",
    "ss_sd_model_name": "base model file",
    "modelspec.architecture": "architecture",
    "modelspec.title": "title",
    "modelspec.trigger_phrase": "trigger",
    "ss_network_module": "network",
    "ss_network_dim": "dim",
    "ss_network_alpha": "alpha",
    "ss_learning_rate": "learning rate",
    "ss_unet_lr": "learning rate of the denoiser",
    "ss_text_encoder_lr": "learning rate of the text encoder",
    "ss_optimizer": "optimizer",
    "ss_steps": "steps",
    "ss_num_epochs": "epochs",
    "ss_resolution": "resolution",
    "software": "trainer",
    "ot_revision": "OneTrainer revision",
}
LONGEST_SETTING = 80  # characters that are shown of one


def _file_details(adapter: Adapter) -> dict[str, str]:
    """What a single file is: its family, whose keys it has, its parts, and what it says of its training."""
    contents = adapter.contents
    if contents is None:
        return {}
    parts = [f"{part} ({counted(len(contents.of(part)), 'module')})" for part in contents.parts if part]
    found = {
        "keys": f"{contents.style} style",
        "family": _file_family(adapter),
        "parts": ", ".join(parts),
        "embeddings": ", ".join(contents.apart[:3]),
    }
    said = {word: contents.metadata[name] for name, word in _SETTINGS.items() if contents.metadata.get(name)}
    return {name: value for name, value in found.items() if value} | {
        name: value[:LONGEST_SETTING] for name, value in said.items() if value != "None"
    }


# Modules that language models have too: of these names alone a file is of no family.
_LANGUAGE = re.compile(r"(?:^|\.)layers\.\d+\.(?:self_attn|mlp)\.")


def _file_family(adapter: Adapter) -> str:
    """The family of a file's modules and whose names they have; every family that it may be of where nothing tells."""
    from adapterkit.adapters.families.names import bare, family_of
    from adapterkit.adapters.families.told import SAID, module_of, names_of, sharing, told_family
    from adapterkit.adapters.formats.parts import KINDS, size_of, undotted

    contents = undotted(adapter).contents
    assert contents is not None
    denoisers = [one for one in contents.modules if KINDS.get(one.part, "denoiser") == "denoiser"] or contents.modules
    sizes = {one.path: size_of(one) or (0, 0) for one in denoisers if not one.flat}
    told = family_of(sizes) or _flat_family([one.path for one in denoisers if one.flat])
    said = [text for name in SAID if (text := contents.metadata.get(name))]
    families = sharing(map(bare, sizes))
    of_diffusers = any(module_of(family, bare(path)) for family in families for path in sizes)
    layout = told[1] if told is not None else "diffusers" if of_diffusers else "original"
    found, _ = told_family(sizes, "original" if layout == "diffusers" else "diffusers", said)
    if told is None and (not found or all(_LANGUAGE.search(path) for path in sizes)):
        return ""
    return f"{names_of(found) if found or told is None else told[0].name} ({layout} names)"


def _folder_details(adapter: Adapter, paths: list[str]) -> dict[str, str]:
    """What a folder says it is for: the class that was trained, and the sections or halves of the model that it changes."""
    if adapter.contents is not None:
        return {}
    from adapterkit.adapters.formats.narrow import SECTIONS, section_of

    auto = adapter.config.get("auto_mapping")
    trained = str(auto.get("base_model_class") or "") if isinstance(auto, dict) else ""
    counts = Counter(section_of(path) for path in paths)
    if counts.keys().isdisjoint(SECTIONS):
        counts = Counter(half for path in paths for half in ("encoder", "decoder") if half in path.split("."))
    parts = [f"{part} ({counted(count, 'module')})" for part, count in sorted(counts.items())]
    brought = {file.name for file in adapter.side_files}
    found = {
        "trained class": trained,
        "parts": ", ".join(parts),
        "library": "sentence-transformers" if "modules.json" in brought else "",
    }
    return {name: value for name, value in found.items() if value}


def _flat_family(paths: list[str]) -> tuple[Any, str] | None:
    """The family of names without dots, by the marks of every family without theirs."""
    from adapterkit.adapters.families.names import FAMILIES

    known = {re.sub(r"\d+", "#", path) for path in paths}
    best: tuple[int, Any, str] | None = None
    for family in FAMILIES:
        rows = family.rows
        for layout, marks, texts in (
            ("original", family.original, [row.original for row in rows]),
            ("diffusers", family.diffusers, [part for row in rows for part in row.parts]),
        ):
            flat = {re.sub(r"\d+|\{\}", "#", text.removesuffix(".*")).replace(".", "_") for text in (*marks, *texts)}
            own = {re.sub(r"\d+|\{\}", "#", text).replace(".", "_") for text in marks}
            count = len(known & flat)
            if known & own and (best is None or count > best[0]):
                best = (count, family, layout)
    return None if best is None else (best[1], best[2])


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    dtypes = Counter(str(tensor.dtype) for tensor in checkpoint.values())
    architectures = checkpoint.config.get("architectures") or [checkpoint.config.get("model_type", "")]
    if components(checkpoint.config):
        architectures = [checkpoint.config.get("_class_name", "")]
    elif not any(architectures):
        architectures = [_family(checkpoint)]
    return Inspection(
        ref=checkpoint.ref,
        kind="checkpoint",
        parameters=checkpoint.parameters,
        nbytes=checkpoint.nbytes,
        tensors=len(checkpoint),
        dtypes=dict(dtypes.most_common()),
        architecture=", ".join(map(str, architectures)),
        details=_gguf_details(checkpoint),
        files=tuple(source.name for source in checkpoint.sources),
        commit=checkpoint.commit or "",
        notes=checkpoint.notes,
    )


def inspect_adapter(adapter: Adapter, base: Checkpoint | None, health: bool) -> Inspection:
    config = adapter.config
    mergeable = ""
    modules: tuple[Module, ...] = ()
    whole: tuple[str, ...] = ()
    try:
        modules, plain = group_modules(adapter, method_of(adapter))
        whole = tuple(plain)
        check_config(adapter)
    except AdapterError as error:
        mergeable = str(error)
    pairs = [(module, pair) for module in modules if (pair := _pair(module)) is not None]
    ranks = Counter(str(a.shape[0] // (_experts(adapter, module, a) or 1)) for module, (a, _) in pairs)
    if config.get(FLAT) and not pairs:
        ranks = Counter(map(str, config.mapping("rank_pattern").values()))
    return Inspection(
        ref=adapter.ref,
        kind="adapter",
        parameters=adapter.parameters,
        nbytes=adapter.nbytes,
        tensors=len(adapter.tensors),
        dtypes=dict(Counter(str(tensor.dtype) for tensor in adapter.tensors.values()).most_common()),
        method=describe_method(adapter, modules),
        ranks=dict(ranks.most_common()),
        scalings=_scalings(adapter, pairs),
        targets=dict(sorted(Counter(_target(module, adapter) for module in modules).items())),
        whole=whole,
        base=config.base or "",
        revision=config.revision or "",
        peft_version=str(config.get("peft_version", "")),
        share=adapter.parameters / base.parameters if base is not None and base.parameters else None,
        mergeable=mergeable,
        details=_file_details(adapter) | _folder_details(adapter, [module.path for module in modules]),
        commit=adapter.commit or "",
        health=_health(adapter, pairs) if health else (),
        notes=adapter.notes,
    )


def describe_method(adapter: Adapter, modules: tuple[Module, ...]) -> str:
    """The method and its variants in a few words: ``LORA (rsLoRA, DoRA)``, ``LYCORIS (oft, tucker)``."""
    config = adapter.config
    if config.peft_type == "LYCORIS":
        from adapterkit.adapters.methods.single import algorithms

        return f"LYCORIS ({', '.join(sorted({word for module in modules for word in algorithms(module)}))})"
    init = config.get("init_lora_weights")
    said = {
        "rsLoRA": config.get("use_rslora"),
        "DoRA": any(MAGNITUDE in module.tensors for module in modules),
        "rank_pattern": config.get("rank_pattern") and not config.get(FLAT),  # a single file says it of every module
        "alpha_pattern": config.get("alpha_pattern") and not config.get(FLAT),
        "lora_bias": config.get("lora_bias"),
        "experts": config.get("target_parameters"),
        "tokens": config.get("trainable_token_indices"),
        str(init): isinstance(init, str) and init not in ("gaussian", "eva", "orthogonal", "mica"),
    }
    words = [name for name, value in said.items() if value]
    return f"{config.peft_type} ({', '.join(words)})" if words else config.peft_type


def _target(module: Module, adapter: Adapter) -> str:
    """The name of a module without its place; of a flat one, what follows its last number."""
    path = module.path
    return re.sub(r"^.*_\d+_", "", path) if adapter.config.get(FLAT) else path.rpartition(".")[2]


def _pair(module: Module) -> tuple[Any, Any] | None:
    for a, b in ((A, B), (EMBEDDING_A, EMBEDDING_B)):
        if a in module.tensors and b in module.tensors:
            return module.tensors[a], module.tensors[b]
    return None


def _scalings(adapter: Adapter, pairs: list[tuple[Module, tuple[Any, Any]]]) -> dict[str, int]:
    if adapter.config.peft_type != "LORA" or adapter.config.get("target_parameters"):
        return {}
    try:
        found = Counter(f"{adapter.config.scaling(module.path, a.shape[0]):g}" for module, (a, _) in pairs if a.numel)
    except AdapterError:
        return {}  # the reason stands in `mergeable` of a check against a base
    return dict(found.most_common())


def _experts(adapter: Adapter, module: Module, a: Any) -> int:
    """How many experts the factors of a module are stacked of; 0 when it is an ordinary one.

    The key does not say it: their rank does, which is that of one expert. Without a base there is nothing else to go by.
    """
    config = adapter.config
    leaves = _leaves(adapter)
    if not leaves or A not in module.tensors:
        return 0
    said = {config.pattern("rank_pattern", f"{module.path}.{leaf}") or config.get("r") for leaf in leaves}
    rank = said.pop()
    if said or not isinstance(rank, int) or rank < 1 or a.shape[0] % rank or a.shape[0] == rank:
        return 0
    return int(a.shape[0] // rank)


def _leaves(adapter: Adapter) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in adapter.config.names("target_parameters")})


def _factors(adapter: Adapter, module: Module, a: Any, b: Any, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """B and A in float32; of stacked experts ``[experts, rows, r]`` and ``[experts, r, columns]``."""
    from adapterkit.adapters.change import raw
    from adapterkit.adapters.experts import SLOWEST, stated_order

    left, right = raw(b).float().reshape(b.shape[0], -1), raw(a).float().reshape(a.shape[0], -1)
    if EMBEDDING_A in module.tensors:
        return raw(a).float().T, raw(b).float().T
    if not experts or left.shape[1] != right.shape[0]:
        return left, right
    rank = right.shape[0] // experts
    order = (experts, rank) if stated_order(adapter.config) == SLOWEST else (rank, experts)
    left = left.view(left.shape[0], *order)
    left = left.permute(1, 0, 2) if order == (experts, rank) else left.permute(2, 0, 1)
    return left, right.view(experts, rank, -1)


def _health(adapter: Adapter, pairs: list[tuple[Module, tuple[Any, Any]]]) -> tuple[ModuleHealth, ...]:
    import torch

    from adapterkit.adapters.half_saved import zero_rows

    found = []
    for module, (a, b) in pairs:
        experts = _experts(adapter, module, a)
        left, right = _factors(adapter, module, a, b, experts)
        rank = a.shape[0] // (experts or 1)
        if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
            found.append(ModuleHealth(module.path, rank, float("nan"), 0.0, "nan", experts))
            continue
        fits = left.shape[-1] == right.shape[-2]
        values = _singular_values(left, right) if fits else torch.zeros(1, dtype=torch.float64)
        total = values.sum(-1, keepdim=True)
        share = values / total.clamp_min(torch.finfo(values.dtype).tiny)
        entropy = -torch.special.xlogy(share, share).sum(-1)
        effective = torch.where(total[..., 0] > 0, entropy.exp(), 0.0).mean()
        leaf = f".{_leaves(adapter)[0]}" if experts else ""
        try:
            scale = adapter.config.scaling(module.path + leaf, rank)
        except AdapterError:
            scale = 1.0
        norm = scale * float(values.square().sum().sqrt())
        parts = (zero_rows("lora_A", a, b), zero_rows("lora_B", b))
        problem = "untrained" if not total.any() else next((f"half saved: {part}" for part in parts if part), "")
        found.append(ModuleHealth(module.path, rank, norm, float(effective), problem, experts))
    return tuple(found)


def _singular_values(left: Any, right: Any) -> Any:
    """Singular values of ``left @ right`` from the small core that QR leaves."""
    import torch

    _, upper = torch.linalg.qr(left.double())
    _, lower = torch.linalg.qr(right.double().mT)
    return torch.linalg.svdvals(upper @ lower.mT)
