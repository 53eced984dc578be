"""Which linear layers transformers would give to bitsandbytes, for every model class, against adapterkit's tables.

    python -m bench proofs linear [--all]

Builds (nearly) every architecture of the installed transformers on the meta device, tiny, and compares
`quantized_modules` with `replace_with_bnb_linear`'s rules on the real module tree. Prints the classes that differ.
"""

from __future__ import annotations

import argparse
import os
import re
import warnings
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from adapterkit.adapters.linear import quantized_modules
from bench.common import results, zoo


def by_transformers(model: Any) -> set[str]:
    """The modules that transformers replaces in this model."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())]
    return {
        name
        for name, module in model.named_modules()
        if (isinstance(module, Conv1D) or type(module) is torch.nn.Linear) and should_convert_module(name, skipped)
    }


def by_adapterkit(model: Any) -> set[str]:
    # A tied output layer has no parameter of its own in named_parameters(), nor in a checkpoint.
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return set(quantized_modules(shapes, model.config.to_dict()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--all", action="store_true", help="also classes that are no language models")
    parser.add_argument("--only", action="append", default=[], help="a model type (may be given more than once)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    import transformers

    same = differ = 0
    for kind, types in zoo.kinds().items():
        for model_type, name in types.items():
            if options.only and model_type not in options.only:
                continue
            if not options.all and not re.search(r"ForCausalLM|LMHead|ForConditionalGeneration", name):
                continue
            try:
                with torch.device("meta"):
                    model = zoo.make(getattr(transformers, name))
            except Exception:
                continue
            wanted, got = by_transformers(model), by_adapterkit(model)
            if wanted == got:
                same += 1
            else:
                differ += 1
                print(
                    f"{name} ({model_type}, {kind}): too many {sorted(got - wanted)[:3]}, missing {sorted(wanted - got)[:3]}"
                )
    print(f"{same} classes agree")
    results.note(agree=same, differ=differ)


if __name__ == "__main__":
    main()
