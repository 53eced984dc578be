"""A scan of what an adapter changes: what stands out of its own layers, out of other adapters, or has no place in it.

Every module's change is reduced to a few numbers (`ModuleFigures`): how large it is, how much of it is one direction, and how
much of it is one row or one column of the weight. A module stands out where such a number is far from what the other modules
of its kind have, by a robust line over depth (Theil and Sen) and the median of what is left. It is a scan for oddities, not
for intent: docs/scan.md says what it finds and what it cannot.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.load import is_trained_whole
from adapterkit.errors import AdapterkitError, counted

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.checkpoint.checkpoint import Checkpoint

LIMIT = 6.0
"""Robust deviations from which a module stands out; docs/scan.md has the rates of false alarms."""
LARGEST = 1 << 22
"""Elements of a change without factors that is still looked into."""
FEW = 6  # modules of a kind, or other adapters, below which nothing can stand out
_FLOOR = {"norm": 0.1, "top": 0.1, "row": 0.12, "column": 0.12}
"""Deviations below these are what training leaves: of the logarithm of the size, and of logits of shares."""
_WORDS = {
    "norm": "the size of its change",
    "top": "the share of its change that is one direction",
    "row": "the share of its change that is one output row",
    "column": "the share of its change that is one input column",
}
_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.)")
_BELONG = re.compile(
    r"(?:adapter_config\.json|adapter_model(?:-\d+-of-\d+)?\.safetensors|adapter_model\.safetensors\.index\.json"
    r"|adapters\.safetensors|README\.md|LICENSE.*|NOTICE.*|USE_POLICY\.md|\.gitattributes|adapterkit\.json"
    r"|adapterkit\.intoto\.json|.*\.sig|.*\.sigstore(?:\.json)?|tokenizer.*\.(?:json|model)|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.(?:json|txt)|merges\.txt|chat_template\.(?:jinja|json)|generation_config\.json|config\.json"
    r"|trainer_state\.json|all_results\.json|train_results\.json|eval_results\.json|training_loss\.png)",
    re.IGNORECASE,
)
_CODE = re.compile(r".*\.(?:py|pyc|so|dll|dylib|exe|sh|bat|ps1|js|jar|wasm|pth)", re.IGNORECASE)
_PICKLE = re.compile(r".*\.(?:bin|pt|pkl|pickle|ckpt|joblib|npy|npz)", re.IGNORECASE)


@dataclass(frozen=True)
class ModuleFigures:
    """What is kept of one module's change.

    Attributes:
        parameter: the weight that it changes.
        kind: of module, as ``q_proj``: modules of one kind are compared.
        layer: its number, -1 where it has none.
        norm: Frobenius norm of the change.
        top: share of the squared norm in the largest singular direction.
        row, column: share of it in the largest output row and input column.
        rank: singular values above a millionth of the largest.
        whole: it is no low-rank product but a whole parameter.
    """

    parameter: str
    kind: str
    layer: int
    norm: float
    top: float
    row: float
    column: float
    rank: int
    whole: bool = False

    def value(self, what: str) -> float:
        """A figure on a scale on which modules can be compared: logarithms of sizes, logits of shares."""
        found = float(getattr(self, what))
        if what == "norm":
            return math.log(max(found, 1e-30))
        share = min(max(found, 1e-9), 1 - 1e-9)
        return math.log(share / (1 - share))


@dataclass(frozen=True)
class Oddity:
    """Something that stands out.

    Attributes:
        level: ``error`` (it has no place in an adapter), ``warning`` or ``note``.
        code: a stable word for scripts.
        message, hint: what, and what to do.
        score: robust deviations; 0 where nothing is measured.
        parameter: the weight that it is about, if one.
    """

    level: str
    code: str
    message: str
    hint: str
    score: float = 0.0
    parameter: str = ""


@dataclass(frozen=True)
class ScanReport:
    """What a scan found; ``score`` is the largest deviation of any module, ``peers`` how many adapters it was held against."""

    ref: str
    oddities: tuple[Oddity, ...]
    figures: tuple[ModuleFigures, ...]
    score: float
    peers: int = 0
    left_out: str = ""


def scan_adapter(
    adapter: Adapter,
    base: Checkpoint | None = None,
    peers: Sequence[Mapping[str, ModuleFigures]] = (),
    *,
    limit: float = LIMIT,
) -> ScanReport:
    """Scan one adapter.

    Args:
        adapter: of any method; those whose change depends on the base's weights need ``base``.
        peers: figures of other adapters on the same base, by parameter.
        limit: robust deviations from which a module stands out.
    """
    found = [*_files(adapter), *_declared(adapter)]
    left = ""
    figures: tuple[ModuleFigures, ...] = ()
    try:
        figures, more = module_figures(adapter, base)
        found += more
    except AdapterkitError as error:
        left = error.message
        found.append(Oddity("note", "scan-not-read", f"its change was not looked at: {error.message}", error.hint))
    own = _among_own(figures)
    among = _among_peers(figures, peers) if len(peers) >= FEW else []
    scored = own + among
    found += [_standing_out(*one) for one in _worst(scored) if one[0] > limit]
    score = max((one[0] for one in scored), default=0.0)
    order = {"error": 0, "warning": 1, "note": 2}
    ranked = sorted(found, key=lambda one: (order[one.level], -one.score, one.code))
    return ScanReport(adapter.ref, tuple(ranked), figures, score, len(peers), left)


def module_figures(adapter: Adapter, base: Checkpoint | None = None) -> tuple[tuple[ModuleFigures, ...], list[Oddity]]:
    """The figures of every module, and what is odd about single tensors.

    Raises:
        AdapterkitError: the adapter cannot be taken apart.
    """
    from adapterkit.adapters.factors import take_apart
    from adapterkit.ops.lowrank import Factors

    parts = take_apart(adapter, base, allow_unknown=True, bare=True)
    figures: list[ModuleFigures] = []
    odd: list[Oddity] = []
    for parameter, delta in parts.deltas.items():
        for place, matrix in enumerate(delta.load()):
            name = parameter if delta.slot.count == 1 else f"{parameter}[{place}]"
            if isinstance(matrix, Factors):
                figures.append(_of_factors(name, matrix))
            elif matrix.shape[0] * matrix.shape[1] <= LARGEST:
                figures.append(_of_rows(name, matrix.rows(0, matrix.shape[0])))
            else:
                text = f"{name} is changed by no low-rank product, and is too large for the scan to look into"
                odd.append(Oddity("note", "scan-large", text, "", 0.0, name))
    for module, (ids, tensor) in parts.tokens.items():
        odd += _token_rows(module, ids, tensor.read(0, tensor.numel).reshape(tensor.shape).float())
    odd += _whole(adapter, parts.whole)
    return tuple(figures), odd


def _names(parameter: str) -> tuple[str, int]:
    path = re.sub(r"\.weight(\[\d+\])?$", "", parameter)
    numbers = _LAYER.findall(path)
    kind = re.sub(r"\[\d+\]$", "", path).rpartition(".")[2]
    return kind, int(numbers[0]) if numbers else -1


def _of_factors(parameter: str, factors: Any) -> ModuleFigures:
    from adapterkit.ops.lowrank import spectrum

    s = spectrum(factors)
    b, a = factors.b.double(), factors.a.double()
    rows = ((b @ (a @ a.T)) * b).sum(1).clamp_min(0)
    columns = ((b.T @ b @ a) * a).sum(0).clamp_min(0)
    return _figures(parameter, s, rows, columns)


def _of_rows(parameter: str, delta: torch.Tensor) -> ModuleFigures:
    import torch

    delta = delta.double()
    return _figures(parameter, torch.linalg.svdvals(delta), delta.square().sum(1), delta.square().sum(0), True)


def _figures(
    parameter: str, s: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, whole: bool = False
) -> ModuleFigures:
    total = float(s.square().sum())
    kind, layer = _names(parameter)
    if total <= 0:
        return ModuleFigures(parameter, kind, layer, 0.0, 0.0, 0.0, 0.0, 0, whole)
    rank = int((s > 1e-6 * s[0]).sum())
    return ModuleFigures(
        parameter,
        kind,
        layer,
        math.sqrt(total),
        float(s[0]) ** 2 / total,
        float(rows.max()) / total,
        float(columns.max()) / total,
        rank,
        whole,
    )


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _residuals(points: Sequence[tuple[float, float]]) -> list[float]:
    """What a line through (depth, value) leaves: the median of all slopes (Theil 1950, Sen 1968), then the median."""
    slopes = [(y2 - y1) / (x2 - x1) for k, (x1, y1) in enumerate(points) for x2, y2 in points[k + 1 :] if x1 != x2]
    slope = _median(slopes) if slopes else 0.0
    height = _median([y - slope * x for x, y in points])
    return [y - slope * x - height for x, y in points]


def _trust(count: int) -> float:
    """A median of few deviations is often far too small, so among few nothing stands out as easily."""
    return count / (count + FEW)


def _among_own(figures: Iterable[ModuleFigures]) -> list[tuple[float, str, ModuleFigures, str]]:
    """(deviations, which figure, module, compared with what) within the adapter."""
    kinds: dict[str, list[ModuleFigures]] = {}
    for one in figures:
        if one.norm > 0:
            kinds.setdefault(one.kind, []).append(one)
    found = []
    for kind, some in kinds.items():
        if len(some) < FEW:
            continue
        for what, floor in _FLOOR.items():
            left = _residuals([(float(one.layer), one.value(what)) for one in some])
            spread = max(1.4826 * _median([abs(value) for value in left]), floor)
            spread /= _trust(len(some))
            found += [(value / spread, what, one, f"the other {kind}") for value, one in zip(left, some, strict=True)]
    return found


def _among_peers(
    figures: Iterable[ModuleFigures], peers: Sequence[Mapping[str, ModuleFigures]]
) -> list[tuple[float, str, ModuleFigures, str]]:
    """The same against other adapters: of the size, only how it is spread over the modules counts."""
    own = {one.parameter: one for one in figures if one.norm > 0}
    shift = _median([one.value("norm") for one in own.values()]) if own else 0.0
    shifts = [_median([one.value("norm") for one in peer.values() if one.norm > 0] or [0.0]) for peer in peers]
    found = []
    for parameter, one in own.items():
        others = [(peer[parameter], at) for peer, at in zip(peers, shifts, strict=True) if parameter in peer]
        if len(others) < FEW:
            continue
        for what, floor in _FLOOR.items():
            values = [other.value(what) - (at if what == "norm" else 0) for other, at in others]
            middle = _median(values)
            spread = max(1.4826 * _median([abs(value - middle) for value in values]), 2 * floor)
            spread /= _trust(len(others))
            value = one.value(what) - (shift if what == "norm" else 0)
            found.append(((value - middle) / spread, what, one, f"{counted(len(others), 'other adapter')} here"))
    return found


def _worst(found: Iterable[tuple[float, str, ModuleFigures, str]]) -> list[tuple[float, str, ModuleFigures, str]]:
    """The furthest figure of each module."""
    best: dict[str, tuple[float, str, ModuleFigures, str]] = {}
    for one in found:
        if one[2].parameter not in best or one[0] > best[one[2].parameter][0]:
            best[one[2].parameter] = one
    return sorted(best.values(), key=lambda one: -one[0])


def _standing_out(score: float, what: str, one: ModuleFigures, others: str) -> Oddity:
    value = f"{one.norm:.3g}" if what == "norm" else f"{getattr(one, what):.0%}"
    return Oddity(
        "warning",
        f"scan-{ {'norm': 'size', 'top': 'spike', 'row': 'row', 'column': 'column'}[what] }",
        f"{one.parameter}: {_WORDS[what]} is {value}, {score:.0f} robust deviations above {others}",
        "ask whoever trained it why; compare it with the checkpoint before",
        score,
        one.parameter,
    )


def _token_rows(module: str, ids: Sequence[int], rows: torch.Tensor) -> list[Oddity]:
    """Trained token rows that are far larger than the others."""
    norms = [float(row.norm()) for row in rows]
    if len(norms) < FEW:
        return []
    values = [math.log(max(norm, 1e-30)) for norm in norms]
    middle = _median(values)
    spread = max(1.4826 * _median([abs(value - middle) for value in values]), 0.1)
    found = []
    for token, value, norm in zip(ids, values, norms, strict=False):
        if (score := (value - middle) / spread) > LIMIT:
            text = f"{module}: the row of token {token} has length {norm:.3g}, {score:.0f} robust deviations above the others"
            found.append(
                Oddity("warning", "scan-token", text, "see what the token is and who trained it", score, module)
            )
    return found


def _whole(adapter: Adapter, whole: Mapping[str, Any]) -> list[Oddity]:
    """Whole parameters: declared ones are a note, others were hidden among the factors."""
    declared = adapter.config.raw.get("modules_to_save") or ()
    found = []
    for key, tensor in whole.items():
        path = key.removesuffix(".weight").removesuffix(".bias")
        said = any(path == one or path.endswith(f".{one}") for one in declared if isinstance(one, str))
        said = said or is_trained_whole(tensor)
        if said:
            text = f"{key} is a whole parameter, which the scan does not look into"
            found.append(Oddity("note", "scan-whole", text, "compare it with the base's own", 0.0, key))
        else:
            text = f"{key} is a whole parameter that its config does not declare (modules_to_save)"
            found.append(Oddity("error", "scan-hidden-whole", text, "do not use it before you know why", 0.0, key))
    return found


def _declared(adapter: Adapter) -> list[Oddity]:
    """Factors of a higher rank than the config says for their module."""
    found = []
    raw = adapter.config.raw
    ranks = [raw.get("r"), *(raw.get("rank_pattern") or {}).values()]
    most = max((rank for rank in ranks if isinstance(rank, int)), default=0)
    if raw.get("peft_type") != "LORA" or not most:
        return []
    for key, tensor in adapter.tensors.items():
        if key.endswith("lora_A.weight") and len(tensor.shape) == 2 and tensor.shape[0] > most:
            text = f"{key} has rank {tensor.shape[0]}, and its config declares at most {most}"
            found.append(Oddity("error", "scan-hidden-rank", text, "do not use it before you know why", 0.0, key))
    return found


def _files(adapter: Adapter) -> list[Oddity]:
    folder = adapter.folder
    return [] if folder is None or not folder.is_dir() else scan_files(folder)


def scan_files(folder: Path) -> list[Oddity]:
    """Files of an adapter folder that do not belong there: code and pickles are errors, what is unknown is a warning."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            continue
        name = path.relative_to(folder).as_posix()
        if _CODE.fullmatch(path.name):
            found.append(Oddity("error", "scan-code", f"{name} is code, and an adapter has none", "take it out"))
        elif _PICKLE.fullmatch(path.name):
            text = f"{name} is a pickle or an archive, which can run code when it is loaded"
            found.append(Oddity("error", "scan-pickle", text, "take it out"))
        elif not _BELONG.fullmatch(path.name):
            found.append(Oddity("warning", "scan-file", f"{name} does not belong to an adapter", "see what it is"))
    return found
