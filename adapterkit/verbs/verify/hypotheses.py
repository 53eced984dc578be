"""Why a weight is off, as a table: each hypothesis says what would have been added to W, and the best fit is named.

A hypothesis is a function of a `Suspect`. It gives a `Verdict` with the share of what is wrong that it leaves
unexplained (0: it explains everything but noise), or None where it does not apply.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isclose, sqrt
from typing import TYPE_CHECKING, Any

from adapterkit.errors import option
from adapterkit.verbs.verify.report import ERROR, WARNING
from adapterkit.verbs.verify.suspect import NUMBER, SKETCH, Suspect, values

if TYPE_CHECKING:
    import torch

    from adapterkit.verbs.verify.subject import Item

EXPLAINED = 0.1  # of what is wrong, at most this may be left
SURE = 1e-3
LOOKED_AT = 256  # rows and columns of which singular values are taken


@dataclass(frozen=True)
class Verdict:
    """What a weight suffers from.

    Attributes:
        kind: the plain name.
        left: share of what is wrong that stays unexplained.
        detail: what goes with it, as ``factor 2.00``; verdicts of one kind and detail are one finding.
        says: the middle of a sentence: "{tensors} {says}", in the plural.
        alike: the same for several weights, where ``says`` is about one.
        hint: what to do.
        figure: the number that shows it.
    """

    kind: str
    left: float
    says: str
    hint: str
    detail: str = ""
    figure: float | None = None
    severity: str = ERROR
    alike: str = ""


def diagnose(suspect: Suspect) -> Verdict:
    """The hypothesis that leaves least; of those that explain all, the first of the table."""
    best: Verdict | None = None
    for hypothesis in HYPOTHESES:
        found = hypothesis(suspect)
        if found is None or found.left > EXPLAINED:
            continue
        if best is None or found.left < best.left - SURE:
            best = found
        if best.left <= SURE:
            break
    return best or _unexplained(suspect)


# ------------------------------------------------------------------ values that are no weights


def not_finite(s: Suspect) -> Verdict | None:
    import torch

    bad = int((~torch.isfinite(s.there)).sum())
    if not bad or not torch.isfinite(s.base).all():
        return None
    says = f"hold NaN or infinity ({bad} of the first {s.there.numel():,} values)"
    return Verdict("not finite", 0.0, says, "the merge overflowed its dtype: write bf16 or f32")


def zeros(s: Suspect) -> Verdict | None:
    if s.there.any() or not s.base.any():
        return None
    return Verdict("zeros", 0.0, "are all zeros", "the file was cut, or never written: merge again")


# ------------------------------------------------------------------ the base's own format

ZEROS = ("qzeros", "zero_point", "biases", ".zero")
FORMAT_ERROR = 3.0  # relative error of a format with b bits is at most this times 2^-b


def zero_points(s: Suspect) -> Verdict | None:
    different = s.judged.parts
    if not s.judged.item.own or not different or not all(name.endswith(ZEROS) for name in different):
        return None
    says = "have the codes and scales that they should have, and other zero points"
    hint = "the tool stores zero points less one where the base does not (GPTQ versions 1 and 2), or the reverse"
    return Verdict("zero points shifted", 0.0, says, hint)


def quantized_again(s: Suspect) -> Verdict | None:
    item = s.judged.item
    if not item.own or item.touched:
        return None
    size = float(s.base.double().square().sum())
    off = sqrt(float((s.there.double() - s.base.double()).square().sum()) / size) if size else 0.0
    if off > FORMAT_ERROR * 2.0**-item.bits:
        return None
    says = "are not changed by any adapter and were quantized again: other codes or scales stand for nearly the same values"
    hint = f"copy what no adapter touches: merge again with {option('quant')} keep"
    return Verdict("re-quantized", 0.0, says, hint, figure=off)


# ------------------------------------------------------------------ how strongly the change was applied


def not_applied(s: Suspect) -> Verdict | None:
    if not s.change.any():
        return None
    left = 0.0 if not s.beyond.any() else s.left(s.beyond * 0)
    says = "equal the base: the adapter was not applied"
    return Verdict("not applied", left, says, "merge again, with every module the adapter trained", figure=0.0)


def other_strength(s: Suspect) -> Verdict | None:
    """One factor on the whole change, named by what gives such a factor."""
    dd = float((s.change * s.change).sum())
    if not dd:
        return None
    factor = float((s.beyond * s.change).sum()) / dd
    if abs(factor - 1) < 0.02:
        return None
    left = s.left(s.change * factor)
    if abs(factor) < 0.02:
        return None
    for kind, expected, says, hint in _factors(s):
        if isclose(factor, expected, rel_tol=0.02) and abs(expected - 1) > 0.02:
            return Verdict(kind, left, says, hint, f"{expected:.4g}", factor)
    says = f"hold the change {factor:.3g} times as strongly as it was trained"
    hint = f"look for another lora_alpha, or a weight of the merge that was not given here ({option('weights')})"
    return Verdict("other scaling", left, says, hint, f"{factor:.2g}", factor)


def _factors(s: Suspect) -> Iterator[tuple[str, float, str, str]]:
    """(kind, factor, what it means, hint) of the mistakes that scale a change."""
    yield "applied twice", 2.0, "hold the change twice", "fold the adapter onto the base, not onto a merge of it"
    yield "subtracted", -1.0, "hold the change with the wrong sign", "give the weight its sign"
    for number in s.owners[:1]:
        config = s.family.subject.adapters[number].config
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if not isinstance(rank, int) or not isinstance(alpha, (int, float)) or rank < 1 or not alpha:
            continue
        if config.get("use_rslora"):
            says = f"hold the change scaled by alpha/r in the place of alpha/sqrt(r) (rsLoRA was ignored; r={rank})"
            yield "rsLoRA ignored", 1 / sqrt(rank), says, "use a tool that reads use_rslora"
            scaling = alpha / sqrt(rank)
        else:
            says = f"hold the change scaled by alpha/sqrt(r), and this is no rsLoRA (r={rank})"
            yield "taken for rsLoRA", sqrt(rank), says, "use a tool that reads use_rslora"
            scaling = alpha / rank
        says = f"hold the change without its scaling ({scaling:.4g}: alpha {alpha:g}, r {rank})"
        yield "scaling ignored", 1 / scaling, says, "use a tool that reads lora_alpha"
        yield "scaling applied twice", scaling, f"hold the change with its scaling ({scaling:.4g}) twice", "merge again"


def other_mixture(s: Suspect) -> Verdict | None:
    """Several adapters, each with a factor of its own."""
    import torch

    owners = s.owners
    if len(owners) < 2 or s.item.merged is None or s.family.subject.options.get("method", "linear") != "linear":
        return None
    parts = [s.alone(number) for number in owners]
    flat = torch.stack([part.reshape(-1) for part in parts], 1).double()
    gram = flat.T @ flat
    factors = torch.linalg.lstsq(gram, flat.T @ s.beyond.reshape(-1).double()).solution.tolist()
    left = s.left(sum((part * factor for part, factor in zip(parts, factors, strict=True)), s.beyond * 0))
    refs = [s.family.subject.adapters[number].ref for number in owners]
    lost = [ref for ref, factor in zip(refs, factors, strict=True) if abs(factor) < 0.05]
    if lost:
        says = f"hold nothing of {' and '.join(lost)}"
        return Verdict("adapter missing", left, says, "merge again with all adapters", ",".join(lost))
    shown = ", ".join(f"{ref} {factor:.2g}" for ref, factor in zip(refs, factors, strict=True))
    says = f"hold the adapters with other weights than were given ({shown} times as strongly)"
    return Verdict("other weights", left, says, f"give the weights of the merge with {option('weights')}", shown)


# ------------------------------------------------------------------ the right change in the wrong place


def transposed(s: Suspect) -> Verdict | None:
    """A square matrix that got the change on its side."""
    _, rows, columns = s.change.shape
    if rows != columns or not s.change.any():
        return None
    turned = s.change.transpose(1, 2)
    left = s.left(turned)
    says = "hold the change transposed"
    return Verdict("transposed", left, says, "use a tool that reads fan_in_fan_out, and the kernel's own layout")


def expert_order(s: Suspect) -> Verdict | None:
    """A stack whose experts got each other's changes, or lie in another order."""
    import torch

    count = s.there.shape[0]
    found: list[Verdict] = []
    for what, mine, theirs in (("changes", s.beyond, s.change), ("weights", s.there, s.base + s.change)):
        if count < 2 or not theirs.any():
            continue
        one, other = (t.reshape(count, -1).double() for t in (mine, theirs))
        nearest = torch.cdist(one, other).argmin(1)
        moved = [f"{i} has that of {int(n)}" for i, n in enumerate(nearest) if i != int(n)]
        if moved:
            left = s.left(theirs[nearest] - (0 if what == "changes" else s.base))
            says = f"have the {what} of their experts in another order (expert {', '.join(moved[:3])})"
            found.append(Verdict("wrong expert order", left, says, "sort experts by number, not by name", what))
    return min(found, key=lambda one: one.left) if found else None


def rotary_order(s: Suspect) -> Verdict | None:
    """Rows of q or k with the halves of each head interleaved, or not, as the other format has them."""
    rows = s.item.floats.shape[0] if len(s.item.floats.shape) == 2 else 0
    if not rows:
        return None
    found: list[Verdict] = []
    seen = s.there.shape[1]
    for heads in _heads(s):
        width = rows // heads if rows % heads == 0 else 0
        if not width or width % 2 or seen < width or width < 4:
            continue
        whole = seen // width * width
        for turn in (_interleaved, _halves):
            order = turn(width, whole)
            for what, explained in (("changes", s.change), ("weights", s.base + s.change)):
                moved = explained.clone()
                moved[:, :whole] = explained[:, :whole][:, order]
                left = s.left(moved if what == "changes" else moved - s.base)
                says = f"have the {'change' if what == 'changes' else 'weight'} with the rows of each head in another order"
                if what == "weights":
                    says += f" ({heads} heads of {width}, {'interleaved' if turn is _interleaved else 'in halves'})"
                hint = "convert with the number of heads of q and k that the config states"
                found.append(Verdict("wrong q/k order", left, says, hint, what))
    return min(found, key=lambda one: one.left) if found else None


def _heads(s: Suspect) -> list[int]:
    base = s.family.subject.found
    counts: list[Any] = []
    if base.format == "gguf":
        from adapterkit.gguf.checkpoint import GGUFCheckpoint

        if isinstance(base, GGUFCheckpoint):
            counts = [base.number(f"attention.{key}") for key in ("head_count", "head_count_kv")]
    else:
        parts = [base.config, *(part for part in base.config.values() if hasattr(part, "get"))]
        keys = ("num_attention_heads", "num_key_value_heads", "n_head", "num_heads")
        counts = [part.get(key) for part in parts for key in keys]
    return sorted({count for count in counts if isinstance(count, int) and count > 0})


def _interleaved(width: int, rows: int) -> list[int]:
    """The row order that takes rows of the first and the second half of each head in turn."""
    one = [i // 2 + (i % 2) * (width // 2) for i in range(width)]
    return [start + i for start in range(0, rows, width) for i in one]


def _halves(width: int, rows: int) -> list[int]:
    """The row order that undoes `_interleaved`."""
    one = [(i % (width // 2)) * 2 + i // (width // 2) for i in range(width)]
    return [start + i for start in range(0, rows, width) for i in one]


def other_place(s: Suspect) -> Verdict | None:
    """The change, or the whole weight, of another module of the same shape."""
    best: tuple[float, Item, str] | None = None
    small_w, small_f = s.family.base_sketch(s.item), values(s.item.values, SKETCH)
    small_e = small_f - small_w
    family = s.family
    for other in s.relatives:
        tries = [("weight", family.wanted_sketch(other) - small_w)]
        if other.touched:
            tries.append(("change", family.change_sketch(other)))
        for what, explained in tries:
            if not explained.any():
                continue
            rest = float((small_e - explained).double().square().sum())
            rest -= 4 * s.noise * small_e.numel() / s.base.numel()
            whole = float((small_e - (family.change_sketch(s.item))).double().square().sum())
            left = max(0.0, rest) / whole if whole else 1.0
            if best is None or left < best[0]:
                best = (left, other, what)
    if best is None or best[0] > EXPLAINED:
        return None
    left, other, what = best
    kind, hint = _misplaced(s, other)
    return Verdict(
        kind, left, f"hold the {what} that belongs to {other.name}", hint, _relation(s.name, other.name, what)
    )


def _misplaced(s: Suspect, other: Item) -> tuple[str, str]:
    from adapterkit.adapters.names import Names

    if _is_expert(s.name) and NUMBER.sub("*", s.name) == NUMBER.sub("*", other.name):
        mine, theirs = NUMBER.findall(s.name), NUMBER.findall(other.name)
        if mine[:-1] == theirs[:-1]:
            return "wrong expert order", "sort experts by number, not by name"
    floats = s.family.subject.folded.checkpoint
    pairs = [set(pair) for pair in Names(floats.shapes, floats.config).declared_ties()]
    pairs.append({"token_embd.weight", "output.weight"})
    if {s.name, other.name} in pairs or any(
        {s.name.rpartition(".")[0].rpartition(".")[2], other.name.rpartition(".")[0].rpartition(".")[2]}
        == {name.rpartition(".")[0].rpartition(".")[2] for name in pair}
        for pair in pairs
    ):
        return "tied head", "write the embedding and the output layer as two tensors, tie_word_embeddings: false"
    return "wrong module", "merge again with a tool that knows this architecture's names"


def _is_expert(name: str) -> bool:
    return ".experts." in name or "_exps." in name


def _relation(mine: str, theirs: str, what: str) -> str:
    if NUMBER.sub("*", mine) == NUMBER.sub("*", theirs):
        return f"{what} of another number"
    return f"{what} of {NUMBER.sub('*', theirs)}"


# ------------------------------------------------------------------ other values under the change


def on_a_grid(s: Suspect) -> Verdict | None:
    """What is there lies on a quantization grid: it was quantized again after the merge."""
    if s.item.format is not None:
        return None
    for kind in ("nf4", "fp4", "int8"):
        through = _round_trip(s, kind)
        if through is None:
            return None
        rest = float((through(s.there) - s.there).double().square().sum())
        own = float((through(s.base) - s.base).double().square().sum())
        if own <= 1e-6 * float(s.base.double().square().sum()):
            continue  # the base itself lies there
        if rest <= 1e-3 * own + s.noise:
            says = f"lie on the {kind} grid: the merge was quantized to {kind} and decoded again"
            hint = "fold onto 16-bit weights and write 16 bits; quantize once, at the end"
            return Verdict("re-quantized", 0.0, says, hint, kind)
    return None


def as_trained(s: Suspect) -> Verdict | None:
    """Folded onto the values that quantized training saw, where the stored ones were asked for; and the other way."""
    from adapterkit.adapters.merged import Merged

    inner = s.item.merged.base if s.item.merged is not None else None
    if isinstance(inner, Merged):
        plain = values(inner.base, s.base.numel())
        if plain.shape != s.base.shape:
            return None
        left = s.left(plain - s.base + s.change)
        says = "were folded onto the base as it is stored, not as training saw it"
        return Verdict("other base values", left, says, f"leave out {option('as_trained')}, or merge with it")
    if s.item.format is not None or not s.change.any():
        return None
    for kind in ("nf4", "fp4", "int8"):
        through = _round_trip(s, kind)
        if through is None:
            return None
        left = s.left(through(s.base) - s.base + s.change)
        if left <= EXPLAINED:
            says = f"were folded onto the base as {kind} training saw it, not as it is stored"
            return Verdict(
                "other base values", left, says, f"if that was meant, verify with {option('as_trained', kind)}", kind
            )
    return None


def _round_trip(s: Suspect, kind: str) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """decode(encode(.)) on a grid of bitsandbytes, for the part that is looked at; None where blocks do not fit."""
    from adapterkit.adapters.fidelity import through_format

    columns = s.base.shape[-1]
    if len(s.item.floats.shape) != 2 or columns % 64:
        return None
    through = through_format(kind, (s.base.shape[1], columns))
    dtype = s.item.values.dtype.torch
    if through is None:
        return None
    return lambda t: through(t[0].to(dtype)).view(t.shape).to(dtype).float()


def rounded_through(s: Suspect) -> Verdict | None:
    """All is there, in fewer bits than the dtype has."""
    import torch

    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        if s.item.format is not None or s.item.values.dtype.bits <= 16:
            return None
        if (
            torch.equal(s.there.to(dtype).float(), s.there)
            and s.left((s.base + s.change).to(dtype).float() - s.base) <= EXPLAINED
        ):
            says = f"went through {name} and are stored wider than that"
            hint = f"merge in float32, or write {option('dtype', name)} and save the space"
            return Verdict("rounded through " + name, 0.0, says, hint, severity=WARNING)
    return None


def same_grid(s: Suspect) -> Verdict | None:
    """Put back on the grid that the base sits on: the format cannot hold the change, however it is encoded."""
    if s.item.format is None or s.item.merged is None or s.judged.sums.retention >= 0.5:
        return None
    if s.item.encoding is not None and s.judged.ours.retention >= 0.5:
        return None  # this format, written as adapterkit does it, holds the change
    # A base of this very format, whose values are its own grid points.
    if not s.item.merged.base.how.startswith(f"{s.item.format.lower()} "):
        return None
    says = f"lie on the {s.item.format} grid of the base again, and the change fell between its points"
    hint = f"start from the 16-bit base ({option('base16')}), keep these tensors at 8 bits, or keep the adapter beside the base"
    return Verdict("swallowed", 0.0, says, hint, figure=s.judged.sums.retention)


def swallowed(s: Suspect) -> Verdict | None:
    """What is large against a step of the dtype is there, what is small is not: it was added in parts, or in that dtype."""
    import torch

    dtype = s.item.values.dtype
    if s.item.format is not None or dtype.bits > 16 or not s.change.any():
        return None
    kept, ours = s.judged.sums.retention, s.judged.ours.retention
    still = s.beyond == 0
    if not 0 <= kept < ours - 0.05 or not still.any() or still.all():
        return None
    step = torch.finfo(dtype.torch).eps * s.base.abs().clamp(min=1e-30)
    size = s.change.abs() / step
    moved = size[~still & (s.change != 0)]
    if not moved.numel() or float(size[still].median()) > 0.5 * float(moved.median()):
        return None
    says = f"hold {kept:.0%} of the change, where one rounding keeps {ours:.0%}: the rest was swallowed by {dtype}"
    alike = (
        f"hold only what is large of the change: the rest was swallowed by {dtype} (in '{s.name}' {kept:.0%} is left)"
    )
    return Verdict("swallowed", EXPLAINED, says, "sum in float32 and round once", figure=kept, alike=alike)


def other_adapter(s: Suspect) -> Verdict | None:
    """A change of low rank, as an adapter's is, that has nothing to do with this one's."""
    import torch

    if not s.change.any():
        return None
    beyond, change = s.beyond[0], s.change[0]
    beyond, change = (t[:LOOKED_AT, :LOOKED_AT].double() for t in (beyond, change))
    if min(beyond.shape) < 8 or not beyond.any():
        return None
    overlap = float((beyond * change).sum() / (beyond.norm() * change.norm() or 1.0))
    energy = torch.linalg.svdvals(beyond).square()
    few = max(1, min(beyond.shape) // 4)
    share = float(energy[:few].sum() / energy.sum())
    if abs(overlap) > 0.3 or share < 0.9 or float(s.beyond.norm()) < 0.1 * float(s.change.norm()):
        return None
    rank = int((energy.cumsum(0) < 0.99 * energy.sum()).sum()) + 1
    says = f"hold another change of low rank (about {rank}) in the place of this adapter's (cosine {overlap:.2f})"
    return Verdict("other adapter", EXPLAINED, says, "give the adapter that was folded in", figure=overlap)


def other_base(s: Suspect) -> Verdict | None:
    """The weights are close to this base but belong to a sibling of it."""
    w, rest = s.base.double(), (s.beyond - s.change).double()
    ww = float((w * w).sum())
    if not ww:
        return None
    f = s.there.double()
    alike = float((f * w).sum()) / sqrt(ww * float((f * f).sum()) or 1.0)
    size = sqrt(float((rest * rest).sum()) / ww)
    if alike < 0.3:
        return None
    dd = float((s.change.double() ** 2).sum())
    overlap = float((s.beyond.double() * s.change.double()).sum()) / dd if dd else 1.0
    if dd and abs(overlap - 1) > max(0.3, 5 * size * sqrt(ww / dd / s.base.numel())):
        return None
    says = f"are those of another base: beyond the change they differ by {size:.2g} of their size (cosine {alike:.3f})"
    return Verdict("other base", EXPLAINED, says, "give the base that MERGED was made from", figure=size)


def _unexplained(s: Suspect) -> Verdict:
    wrong = sqrt(s.wrong / float(s.base.double().square().sum() or 1.0))
    says = f"differ from the formula by {wrong:.2g} of their size, in a way that is none of the usual mistakes"
    return Verdict("unexplained", 1.0, says, "compare the tool's version and the adapter's config", figure=wrong)


Hypothesis = Callable[[Suspect], Verdict | None]
HYPOTHESES: tuple[Hypothesis, ...] = (
    not_finite,
    zeros,
    zero_points,
    quantized_again,
    same_grid,
    not_applied,
    rounded_through,
    other_strength,
    other_mixture,
    transposed,
    expert_order,
    rotary_order,
    other_place,
    as_trained,
    on_a_grid,
    swallowed,
    other_adapter,
    other_base,
)
