"""The LoRA family: plain, rsLoRA, DoRA, block-diagonal, PiSSA, OLoRA, KaSA, QA-LoRA and what shares their files.

W' = W + s B A, s = alpha/r or alpha/sqrt(r) (arXiv:2106.09685, arXiv:2312.03732). The variants differ in three places:
how A and B are put together from what is stored, what training did to W before it began, and whether rows are brought to
a trained norm afterwards. Every combination is one `LoraChange`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.change import ALONE, SCALED, SUM, Change, LowRank, matrix
from adapterkit.adapters.experts import FIELDS as EXPERT_FIELDS
from adapterkit.adapters.method import GIVE_BASE, Context, Edit, Method, Module, check_matrix
from adapterkit.adapters.methods.expert_factors import expert_edits
from adapterkit.adapters.methods.stacked import stacked_edit, wrapped_leaves
from adapterkit.adapters.methods.tokens import KEY as TOKENS
from adapterkit.adapters.methods.tokens import token_edits
from adapterkit.adapters.orientation import is_turned
from adapterkit.adapters.target import transposed
from adapterkit.dtypes import F32
from adapterkit.errors import AdapterError, TargetError, option
from adapterkit.values import dataclass

if TYPE_CHECKING:
    from adapterkit.adapters.change import Kernel, Weights
    from adapterkit.adapters.config import AdapterConfig
    from adapterkit.checkpoint.tensor import Tensor

A, B, B_BIAS, MAGNITUDE, DIAGONAL = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_B.bias",
    "lora_magnitude_vector",
    "lora_diag",
)
EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"

# What `init_lora_weights` did to W: named inits leave it alone, these take B0 A0 out of it first. The ones that can be
# repeated from W alone are repeated; the others are refused unless the base given is already the residual.
_RESIDUAL = {"pissa": "pissa", "olora": "olora"}
_LOST = {
    "pissa_niter": "its initial factors came from an unseeded randomized SVD",
    "corda": "its initial factors came from calibration data",
    "lora_ga": "its initial factors came from gradients",
    "loftq": "it was trained on LoftQ's own quantized base",
}


@dataclass(frozen=True)
class LoraChange:
    """How the change of one matrix is computed; tensors are handles until the kernel is loaded."""

    a: Tensor
    b: Tensor
    scale: float
    blocks: int = 1  # of block-diagonal LoRA
    pool: int = 0  # QA-LoRA: inputs pooled in groups of this size
    diagonal: Tensor | None = None
    magnitude: Tensor | None = None
    residual: str = ""
    embedding: bool = False
    turned: bool = False  # the module stores its weight as [in, out]

    def load(self, weights: Weights) -> Kernel:
        """Read the factors (and W, where a residual or a column norm needs it) and give the kernel."""
        from adapterkit.adapters.methods.normed import Normed, column_norms
        from adapterkit.ops import lora as ops

        # What PEFT itself repeats in float32 (see `ops.residual`), and norms over rows, stay in float32.
        beside = F32 if self.residual or (self.embedding and self.magnitude is not None) else weights.dtype
        a, b = matrix(self.a, beside), matrix(self.b, beside)
        if self.embedding:
            left, right = a.T.contiguous(), b.T.contiguous()
        else:
            # A convolution's B is [out, r, 1, ...]; its A [r, in, *kernel].
            right, left = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
        # Of the two, the factor that is narrower than its place is the one stored as blocks.
        if self.blocks > 1 and left.shape[1] < right.shape[0]:
            left = ops.block_diagonal(left, self.blocks)
        elif self.blocks > 1 and right.shape[1] < weights.shape[1]:
            right = ops.block_diagonal(right, self.blocks)
        if self.pool and right.shape[1] < weights.shape[1]:
            right = ops.pooled(right, self.pool)
        if self.diagonal is not None:
            left = left * matrix(self.diagonal, beside)
        added = LowRank(left, right, self.scale)
        if self.magnitude is None and not self.residual:
            return added
        shift = None
        if self.residual:
            w = weights.read(0, weights.shape[0])
            shift = ops.residual(self.residual, w, right.shape[0], self.scale, self.turned)
        magnitude = None if self.magnitude is None else matrix(self.magnitude, beside).flatten()
        norms = column_norms(weights, added) if magnitude is not None and self.embedding else None
        return Normed(added, shift, magnitude, norms, weights.dtype)


def lora_edits(module: Module, context: Context) -> Iterator[Edit]:
    """The edits of one module: its weight, its bias, its trained token rows."""
    yield from token_edits(module, context)
    if context.config.flag("use_mora"):
        from adapterkit.adapters.methods.mora import mora_edits

        yield from mora_edits(module, context)
    elif EMBEDDING_A in module.tensors or EMBEDDING_B in module.tensors:
        yield _embedding_edit(module, context)
    elif A in module.tensors or B in module.tensors:
        experts = expert_edits(module, context)
        yield from _weight_edits(module, context) if experts is None else experts
    elif TOKENS not in module.tensors:
        key = f"{module.path}.{next(iter(module.tensors))}"
        raise AdapterError(f"{context.where}: '{key}' stands without lora_A and lora_B", "save the adapter again")


def _weight_edits(module: Module, context: Context) -> Iterator[Edit]:
    a, b = (module.tensor(name, context.where) for name in (A, B))
    key = f"{module.path}.{A}"
    _check_pair(a, b, f"{module.path}.lora_A/lora_B", context.where)
    parameter = f"{module.path}.weight"
    leaves = wrapped_leaves(module, context)
    wrapped = "weight" in leaves
    found = context.names.find(parameter)
    if leaves and (len(found.shape) == 3 if wrapped and found is not None else found is None):
        yield stacked_edit(module, context, a, b)
        return
    if context.names.find(parameter) is None and context.names.find(f"{module.path}.in_proj_weight") is not None:
        parameter = f"{module.path}.in_proj_weight"  # torch.nn.MultiheadAttention keeps q, k and v in one parameter
    target = context.target(parameter, key)
    blocks = _blocks(context.config)
    if len(a.shape) == 2 and b.shape[1] not in (a.shape[0], a.shape[0] / blocks):
        raise AdapterError(
            f"{context.where}: '{key}' has rank {a.shape[0]} and its lora_B {b.shape[1]}", "save the adapter again"
        )
    pool = int(context.config.number("qalora_group_size", 16)) if context.config.flag("use_qalora") else 0
    turned = any(
        is_turned(context, target, _expected(a, b, blocks, pool, shape[1]))
        for shape in (target.matrix, target.matrix[::-1])
    )
    if turned:
        target = transposed(target)
    rank = a.shape[0]
    scaled_as = parameter if wrapped else module.path
    expected = _expected(a, b, blocks, pool, target.matrix[1])
    check_matrix(target, expected, key, context.where)
    if len(a.shape) > 2 and len(target.shape) > 2 and a.shape[1:] != target.shape[1:]:
        raise TargetError(
            f"{context.where}: '{key}' spans {list(a.shape[1:])} of a convolution {list(target.shape)}",
            GIVE_BASE,
        )
    if len(b.shape) > 2 and b.shape[1] != rank:
        raise AdapterError(f"{context.where}: '{key}' has rank {rank} and its lora_B {b.shape[1]}", "save it again")
    scale = context.config.scaling(scaled_as, rank) * times_applied(module, context)
    recipe = LoraChange(
        a,
        b,
        scale,
        blocks=blocks,
        pool=pool,
        diagonal=module.tensors.get(DIAGONAL),
        magnitude=module.tensors.get(MAGNITUDE),
        residual=_residual(context, module),
        turned=turned,
    )
    _check_vector(recipe.magnitude, expected[0], f"{module.path}.{MAGNITUDE}", context.where)
    _check_vector(recipe.diagonal, rank, f"{module.path}.{DIAGONAL}", context.where)
    yield Edit(target, _change(recipe, rank, expected))
    if B_BIAS in module.tensors:
        yield _bias_edit(module, context, scale)


def times_applied(module: Module, context: Context) -> int:
    """How often PEFT adds the delta of this module, in training as in its own merge.

    Its wrapper of ``torch.nn.MultiheadAttention`` adds that of ``out_proj`` itself and then calls ``out_proj.merge()``,
    which adds it again (measured with 0.21.2: forward and merge agree on twice). That is what was trained.
    """
    parent, _, leaf = module.path.rpartition(".")
    inside = leaf == "out_proj" and any(other.path == parent for other in context.siblings)
    return 2 if inside and context.names.find(f"{parent}.in_proj_weight") is not None else 1


def _expected(a: Tensor, b: Tensor, blocks: int, pool: int, wanted: int) -> tuple[int, int]:
    """The matrix that factors of these shapes are made for, where the target has ``wanted`` columns."""
    rows, columns = b.shape[0], a.numel // a.shape[0]
    if blocks > 1 and columns * blocks == wanted and b.numel // rows == a.shape[0]:
        columns = wanted
    if pool and columns * pool == wanted:
        columns = wanted
    return rows, columns


def _embedding_edit(module: Module, context: Context) -> Edit:
    a, b = (module.tensor(name, context.where) for name in (EMBEDDING_A, EMBEDDING_B))
    key = f"{module.path}.{EMBEDDING_A}"
    _check_pair(a, b, f"{module.path}.{EMBEDDING_A}/B", context.where)
    target = context.target(f"{module.path}.weight", key)
    rank, rows, columns = a.shape[0], a.shape[1], b.shape[0]
    if b.shape[1] != rank:
        raise AdapterError(
            f"{context.where}: '{key}' has rank {rank} and its other factor {b.shape[1]}", "save the adapter again"
        )
    override = module.tensors.get("base_layer.weight")
    if override is None or override.shape != (rows, columns):
        check_matrix(target, (rows, columns), key, context.where)
    magnitude = module.tensors.get(MAGNITUDE)
    _check_vector(magnitude, columns, f"{module.path}.{MAGNITUDE}", context.where)
    scale = context.config.scaling(module.path, rank)
    recipe = LoraChange(a, b, scale, magnitude=magnitude, embedding=True)
    return Edit(target, _change(recipe, rank, (rows, columns)))


def _bias_edit(module: Module, context: Context, scale: float) -> Edit:
    """b' = b + s * lora_B.bias."""
    bias = module.tensors[B_BIAS]
    key = f"{module.path}.{B_BIAS}"
    if context.names.find(f"{module.path}.bias") is None:
        raise TargetError(
            f"{context.where}: '{key}' is added to a bias, and {module.path} has none in the base",
            "serve the adapter unmerged, or train it without lora_bias",
        )
    target = context.target(f"{module.path}.bias", key)
    check_matrix(target, (bias.numel, 1), key, context.where)

    def load(weights: Weights) -> Kernel:
        import torch

        return LowRank(matrix(bias, weights.dtype).view(-1, 1), torch.ones(1, 1), scale)

    return Edit(target, Change("lora bias", load, bias.nbytes, bias.numel * 4, scale=scale))


def _change(recipe: LoraChange, rank: int, shape: tuple[int, int]) -> Change:
    words = ["dora" if recipe.magnitude is not None else recipe.residual or "lora", f"r={rank}"]
    held = 4 * (recipe.a.numel + recipe.b.numel) * max(recipe.blocks, recipe.pool, 1)
    if recipe.residual:
        held += 4 * 3 * shape[0] * shape[1]  # W and its decomposition
    plain = recipe.magnitude is None and recipe.diagonal is None and not recipe.residual and recipe.blocks == 1
    pair = (recipe.a, recipe.b) if recipe.embedding else (recipe.b, recipe.a)
    factors = tuple((tensor, recipe.embedding) for tensor in pair) if plain and not recipe.pool else ()
    return Change(
        " ".join(words),
        recipe.load,
        recipe.a.nbytes + recipe.b.nbytes,
        held,
        factors=factors,
        scale=recipe.scale,
        composes=ALONE if recipe.residual else SUM if recipe.magnitude is None else SCALED,
    )


def _check_pair(a: Tensor, b: Tensor, key: str, where: str) -> None:
    if a.numel == 0 or b.numel == 0:
        raise AdapterError(
            f"{where}: '{key}' is empty, as when ZeRO-3 or FSDP shards are saved without gathering them",
            "save the adapter again with the full state dict",
        )
    if len(a.shape) < 2 or len(b.shape) < 2:
        raise AdapterError(f"{where}: '{key}' has a factor that is no matrix", "save the adapter again")


def _check_vector(vector: Tensor | None, size: int, key: str, where: str) -> None:
    if vector is not None and vector.numel != size:
        raise TargetError(f"{where}: '{key}' has {vector.numel} entries, not {size}", "save the adapter again")


def _blocks(config: AdapterConfig) -> int:
    settings = config.get("use_bdlora")
    if not settings:
        return 1
    blocks = settings.get("nblocks", 1) if isinstance(settings, dict) else None
    if type(blocks) is not int or blocks < 1:
        raise AdapterError(f"{config.where}: 'use_bdlora' has no number of blocks", "correct the config")
    return blocks


def _residual(context: Context, module: Module) -> str:
    if context.residual_base:
        return ""
    if DIAGONAL in module.tensors:
        return "kasa"
    init: Any = context.config.get("init_lora_weights")
    return _RESIDUAL.get(init.lower(), "") if isinstance(init, str) else ""


def refuse(config: AdapterConfig, residual_base: bool) -> tuple[str, str] | None:
    """Why a LoRA adapter cannot be merged: detected from the config, for the keys look the same."""
    if config.get("alora_invocation_tokens"):
        return "it is an activated LoRA, which acts only after its invocation tokens", "serve it with PEFT or vLLM"
    if config.get("arrow_config"):
        return "Arrow routes every token to other adapters", "merge one of its member adapters instead"
    init = config.get("init_lora_weights")
    if isinstance(init, str) and not residual_base:
        reason = next((why for name, why in _LOST.items() if init.lower().startswith(name)), None)
        if reason is not None:
            way_out = (
                "convert it with PEFT's path_initial_model_for_weight_conversion, or give the base that training saved"
            )
            return (
                f"it was initialised with {init} and {reason}, so the base it belongs to cannot be rebuilt",
                f"{way_out} and add {option('residual_base', True)}",
            )
    return None


METHODS = (
    Method(
        peft_type="LORA",
        title="LoRA, rsLoRA, DoRA, PiSSA, OLoRA, KaSA, BD-LoRA, QA-LoRA, MiCA, EVA, VeLoRA, MonteCLoRA, LoRA+, LoRA-FA, MoRA",
        formula="W' = W + s B A (DoRA: rows then brought to norm m; MoRA: one square matrix between counts)",
        source="arXiv:2106.09685, 2312.03732, 2402.09353, 2404.02948, 2406.01775, 2412.06071",
        suffixes=(A, B, B_BIAS, MAGNITUDE, MAGNITUDE + ".weight", DIAGONAL, EMBEDDING_A, EMBEDDING_B, TOKENS),
        ignored=("lora_velora_embed", "lora_monteclora_sampler"),
        edits=lora_edits,
        fields=frozenset(
            {
                "r",
                "lora_alpha",
                "lora_dropout",
                "fan_in_fan_out",
                "use_rslora",
                "init_lora_weights",
                "rank_pattern",
                "alpha_pattern",
                "loftq_config",
                "eva_config",
                "corda_config",
                "lora_ga_config",
                "use_dora",
                "velora_config",
                "alora_invocation_tokens",
                "use_qalora",
                "qalora_group_size",
                "monteclora_config",
                "layer_replication",
                "lora_bias",
                "use_bdlora",
                "arrow_config",
                "kasa_config",
                "ensure_weight_tying",
                "use_mora",
                "mora_type",
            }
        )
        | EXPERT_FIELDS,
        refuse=refuse,
        low_rank=True,
    ),
)
