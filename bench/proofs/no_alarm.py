"""No false alarm: right merges of many architectures, by adapterkit and by PEFT, have to pass `verify`.

    python -m bench proofs no_alarm                    # every causal type of `zoo`, and some of every other kind
    python -m bench proofs no_alarm --only gpt2        # some of them

For each type a tiny random model is saved in float32 and in bfloat16; PEFT puts a LoRA on all its linear layers and
stacked experts; PEFT merges it, and adapterkit does. All four merges are verified at the level of tensors. Types that
could not be built, or whose merge adapterkit refuses, are counted apart.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path

from bench.common import results

OTHERS = 8  # types of every kind but causal


def examine(model_type: str) -> tuple[list[str], list[str]]:
    """What was verified, and what was wrong with it."""
    import torch

    import adapterkit
    from adapterkit.verbs.verify import verify
    from bench.common import zoo
    from bench.proofs import sweep

    done, wrong = [], []
    with tempfile.TemporaryDirectory(prefix="no-alarm-") as name:
        for dtype in ("float32", "bfloat16"):
            folder = Path(name) / dtype
            model, _ = zoo.build(model_type)
            model = model.to(getattr(torch, dtype))
            model.save_pretrained(folder / "base")
            wrapped = sweep.lora(model)
            wrapped.save_pretrained(folder / "adapter", save_embedding_layers=False)
            adapterkit.merge(folder / "base", [folder / "adapter"], folder / "adapterkit")
            wrapped.merge_and_unload().save_pretrained(folder / "PEFT")
            for tool in ("adapterkit", "PEFT"):
                report = verify(folder / tool, base=folder / "base", adapters=[folder / "adapter"])
                counts = " ".join(f"{number} {status}" for status, number in report.tensors.counts.items())
                done.append(f"{dtype} {tool}: {counts}")
                warned = [finding for finding in report.findings if finding.severity != "note"]
                wrong += [f"{dtype} {tool}: {finding.kind}: {finding.text}" for finding in warned]
    return done, wrong


def main() -> int:
    import transformers

    from bench.common import zoo

    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--every", type=int, default=1, help="one type in so many")
    options = parser.parse_args()
    kinds = zoo.kinds()
    types = [t for kind, found in kinds.items() for t in (list(found) if kind == "causal" else list(found)[:OTHERS])]
    types = [t for t in types if not options.only or t in options.only][:: options.every]
    right = alarms = skipped = verified = 0
    for model_type in types:
        started = time.monotonic()
        try:
            done, wrong = examine(model_type)
        except Exception as error:
            skipped += 1
            print(f"skipped  {model_type:<24} {type(error).__name__}: {' '.join(str(error).split())[:140]}", flush=True)
            continue
        verified += len(done)
        right += not wrong
        alarms += bool(wrong)
        for text in wrong:
            print(f"ALARM    {model_type:<24} {text}")
        print(
            f"{'ok' if not wrong else '':<8} {model_type:<24} {time.monotonic() - started:4.1f} s  {'; '.join(done)}",
            flush=True,
        )
    print(f"{right} of {right + alarms} architectures without an alarm ({verified} merges), {skipped} skipped")
    results.note(right=right, alarms=alarms, merges=verified, skipped=skipped)
    return 1 if alarms else 0


if __name__ == "__main__":
    raise SystemExit(main())
