"""Every mergeable tuner of the installed PEFT x layer x switches: adapterkit's merge beside PEFT's, and ``docs/methods.md``.

    python -m bench proofs methods            # the sweep, one line per case
    python -m bench proofs methods --write    # and docs/methods.md, from the registrations and the sweep
    python -m bench proofs methods --speed    # a bfloat16 layer pair of a 1B model instead, one thread, beside PEFT's merge

Errors are parts of the largest delta. ``forward`` compares outputs of the layers with adapterkit's weights to those of
PEFT's adapter before any merge.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from method_cases import Case, Outcome, cases, run

from adapterkit.adapters.methods import METHODS, UNMERGEABLE
from bench.common import results
from tools import figures

ROOT = Path(__file__).resolve().parents[2]

# Methods that PEFT's sweep cannot hold, and the test that does.
ELSEWHERE = {
    "LORA": "tests/adapters",
    "BONE": "tests/methods/test_beyond_peft.py",
    "LYCORIS": "tests/methods/test_single.py",
}
SWEEP = "tests/methods/test_sweep.py"

HEAD = """# Methods

What adapterkit folds into weights, and what it refuses. This page is written by `python -m bench proofs methods --write` from
the registrations in `adapterkit/adapters/methods/` and a sweep against the installed PEFT.

s is the scaling; `*` is elementwise; W is `[out, in]`, whichever way it is stored. Every adapter may also bring whole
parameters (`modules_to_save`, biases, resized embeddings), which replace those of the base.
"""

MATRIX = """
## PEFT's own tests
Each row of the tables of models and configs in the tests of PEFT's source release (`bench/proofs/peft_matrix.py`): base + live
adapter beside the merged file, loaded by the model's own class; outputs within 1e-5 of their spread. Modules of no library are
bases without a config. "Twice" is two adapters of one config, both active. "No adapter": PEFT itself cannot make, save, load or
run it. Of <!--peft_matrix.rows:,-->1,312<!--/--> rows <!--peft_matrix.equal:,-->1,044<!--/--> are equal,
and <!--peft_matrix.refused-->203<!--/--> are refused, of which PEFT
merges <!--peft_matrix.refused_that_peft_merges-->86<!--/-->; <!--peft_matrix.wrong-->0<!--/--> are wrong.

<!-- figures peft_matrix.main -->

<!-- /figures -->

Why what is refused is refused; the last column counts the rows that PEFT merges. Of these, PSOFT and AdaMSS compute again, when
they are loaded, what was not saved (signs of singular vectors, a clustering), UniLora its indices from the order of modules.

<!-- figures peft_matrix.table2 -->

<!-- /figures -->
"""

LORA_FILES = """
## Files
| format | read | written | what |
|---|---|---|---|
| PEFT folder | all of the above | `convert --to peft` | as it is |
| plain PEFT | | `convert --to peft --plain` | LoRA of one rank and one alpha; others by SVD of W' - W |
| MLX folder (mlx-lm) | LoRA, DoRA, stacked experts, full | `convert --to mlx` | LoRA; others as with `--plain` |
| single file (kohya, LyCORIS) | LoRA, DoRA, LoHa, LoKr and LYCORIS, mixed or not | | as the base names them |
| single file, or a folder of it, of diffusers | LoRA, DoRA | | the part that the base is, like `unet` |

A single file whose modules are all LoRA, DoRA, LoHa or LoKr as PEFT has them is an adapter of that type and converts to PEFT
as it is. Anything else that LyCORIS 4.1.3 or sd-scripts write is of type LYCORIS: Tucker cores (`lora_mid`, also under DoRA),
`dora_scale` over inputs or on LoHa and LoKr, `diff` and `diff_b`, `w_norm` and `b_norm`, `oft_blocks` of OFT and BOFT with
`rescale` and the constraint in `alpha`, (IA)^3 over inputs or outputs, GLoRA in both orders of its factors, and files that mix
these; so are extractions with a sparse remainder (`bias_indices`). `convert --to peft --plain` makes LoRA of it. The OFT of
sd-scripts is LyCORIS's, under `oft_unet_`. Not read: T-LoRA (its rank depends on the timestep), a `scalar` beside factors
(LyCORIS folds it into them).

A file with several parts of a pipeline gives each base its own; `FILE#te`, `FILE#te1`, `FILE#unet` names one where several fit,
and `FILE#te+unet` several that one base holds. That is a checkpoint of a whole pipeline in one file: the UNet of Stable
Diffusion 1 and 2 is found there under its older names, CLIP under its lead (SDXL's second text encoder is not: it has
OpenCLIP's fused weights there; give its own folder).

## Training recipes that write LoRA files
LoRA+ (learning rates), LoRA-FA (frozen A), EVA, MiCA, CorDA, LoRA-GA and LoftQ (initialisations), rsLoRA (scaling), VeLoRA,
MonteCLoRA, `lora_bias`, `trainable_token_indices` and `target_parameters` (stacked experts) all have the keys of LoRA; what of
it changes the formula stands in the config. What the initialisation took out of W (PiSSA, OLoRA, KaSA) is taken out again;
where that cannot be repeated (`pissa_niter`, CorDA, LoRA-GA, LoftQ) the adapter is refused unless the base given is the
residual one (`--residual-base`). MoRA (arXiv:2405.12130) writes LoRA's keys from a fork of PEFT: a square matrix between a
compression of the input and its inverse, types 1 to 4 and 6 (`tests/methods/test_mora.py`).

Unsloth kept the experts of a stacked `lora_B` in another order than PEFT until 2026-09-17 (unsloth-zoo#1269): its
`lora_B_layout` in the config is followed, and where a config does not say, `merge --expert-order slowest` does
(`tests/adapters/test_expert_order.py`). Other verbs follow the config: add `"lora_B_layout": "grouped_by_expert"` to it.

## Speed
Whole merges of a 1B Llama shape in bfloat16, adapters on all linear layers, two cores, beside PEFT's own load, merge and
save of the same files in the same run (`bench/speed/method_merge.py`, imports not counted):

<!-- figures method_merge.main -->

TABLE

<!-- /figures -->
""".replace("TABLE", results.shown(results.read("method_merge")["tables"]["main"]))


def registry_table() -> str:
    """One row per registered method."""
    lines = ["| type | method | formula | source | status | test |", "|---|---|---|---|---|---|"]
    for kind, method in METHODS.items():
        status = f"merged; {method.notes}" if method.notes else "merged"
        row = (kind, method.title, f"`{method.formula}`", method.source, status, f"`{ELSEWHERE.get(kind, SWEEP)}`")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join(lines)


def refused_table() -> str:
    """One row per type that cannot be merged."""
    lines = ["| type | why not | instead |", "|---|---|---|"]
    lines += [f"| {kind} | {why} | {instead} |" for kind, (why, instead) in UNMERGEABLE.items()]
    return "\n".join(lines)


def sweep_table(results: Iterable[tuple[Case, Outcome]]) -> str:
    """One row per tuner and kind of layer."""
    grouped: dict[tuple[str, str], list[tuple[Case, Outcome]]] = {}
    for case, outcome in results:
        grouped.setdefault((case.config().peft_type.value, case.kind), []).append((case, outcome))
    lines = ["| type | layer | switches | worst error | allowed |", "|---|---|---|---|---|"]
    for (kind, layer), found in grouped.items():
        names = sorted({name for case, _ in found for name in case.switches})
        worst = max(outcome.merge for _, outcome in found)
        words = f"{len(found)} cases: {', '.join(names)}" if names else "1 case"
        lines.append(f"| {kind} | {layer} | {words} | {worst:.0e} | {found[0][0].tolerance:.0e} |")
    return "\n".join(lines)


def page(results: Iterable[tuple[Case, Outcome]]) -> str:
    import peft

    return (
        f"{HEAD}\n{registry_table()}\n{LORA_FILES}\n## Refused\n{refused_table()}\n{figures.filled(MATRIX)}\n"
        f"## The sweep\nFloat32, PEFT {peft.__version__}: the largest difference to PEFT's merged weights, as a part of "
        f"the largest delta. bfloat16 bases: at least 99.99 % of entries are the float64 result, correctly rounded "
        f"(`tests/methods/test_precision.py`). Where PEFT cannot merge or merges something else than was trained: "
        f"`tests/methods/test_beyond_peft.py`.\n\n{sweep_table(results)}\n"
    )


SPEED = {
    "Lora": {"r": 16, "use_dora": True},
    "Vera": {"r": 256},
    "LoHa": {"r": 16},
    "LoKr": {"r": 16},
    "OFT": {"r": 0, "oft_block_size": 32},
    "BOFT": {"boft_block_size": 32},
    "HRA": {"r": 8},
    "FourierFT": {"n_frequency": 1000},
    "WaveFT": {},
    "Hira": {"r": 32},
    "Road": {"group_size": 64},
    "RandLora": {"r": 32},
}


def speed() -> None:
    """Times of one merge of W 8192 x 2048 and 2048 x 2048, both tools on the same files, side by side."""
    import time
    import warnings

    import peft
    import torch
    from method_cases import save_base, train

    from adapterkit.adapters.fold import fold
    from adapterkit.adapters.load import load_adapter
    from adapterkit.checkpoint.open import open_checkpoint

    class Pair(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.Linear(2048, 8192, bias=False)
            self.q = torch.nn.Linear(2048, 2048, bias=False)

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return Pair().bfloat16()

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name, switches in SPEED.items():
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            base, adapter = Path(folder) / "base", Path(folder) / "adapter"
            save_base(model(), base, torch.bfloat16)
            train(model(), getattr(peft, f"{name}Config")(target_modules=["up", "q"], **switches), adapter, 0.02)
            started = time.perf_counter()
            for tensor in fold(open_checkpoint(base), [load_adapter(adapter)]).checkpoint.tensors.values():
                for start in range(0, tensor.numel, tensor.block):  # as the writer reads, block by block
                    tensor.read(start, min(tensor.numel, start + tensor.block))
            ours = time.perf_counter() - started
            loaded = peft.PeftModel.from_pretrained(model(), str(adapter))
            started = time.perf_counter()
            loaded.merge_and_unload()
            theirs = time.perf_counter() - started
        print(f"{name:10} adapterkit {ours:5.2f} s   PEFT {theirs:5.2f} s   {theirs / ours:4.1f} x")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/methods.md")
    parser.add_argument("--speed", action="store_true", help="time merges instead")
    parser.add_argument("--only", action="append", default=[], help="a tuner (may be given more than once)")
    arguments = parser.parse_args()
    if arguments.speed:
        speed()
        return 0
    found, bad = [], 0
    for case in cases():
        if arguments.only and case.method not in arguments.only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            outcome = run(case, Path(folder))
        found.append((case, outcome))
        wrong = outcome.merge > case.tolerance
        bad += wrong
        print(f"{'WRONG' if wrong else 'ok':5} merge {outcome.merge:.1e}  forward {outcome.forward:.1e}  {case}")
    print(f"{len(found)} cases, {bad} wrong")
    results.note(cases=len(found), wrong=bad)
    if arguments.write:
        (ROOT / "docs" / "methods.md").write_text(page(found), encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
