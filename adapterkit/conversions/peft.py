"""To the folder that PEFT loads."""

from __future__ import annotations

import json
from dataclasses import replace

from adapterkit.bases import open_model
from adapterkit.conversions.conversion import Conversion, ConvertOptions, Ref, count_types, gguf_file
from adapterkit.errors import UsageError


def plan(src: Ref, options: ConvertOptions, jobs: int) -> Conversion:
    """A GGUF LoRA as PEFT adapter."""
    from adapterkit.adapters.adapter import WEIGHTS
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.checkpoint.folder import ADAPTER_CONFIG
    from adapterkit.checkpoint.plan import plan_safetensors
    from adapterkit.gguf.peft import to_peft

    base = options.need_base("peft")
    opened = gguf_file(src)
    if opened is None:
        raise UsageError(f"{src} is not a GGUF LoRA", "give the .gguf file")
    tensors, config = to_peft(opened, open_model(base, headers_only=True))
    handles = {tensor.name: tensor for tensor in tensors}
    view = Checkpoint(opened.ref, handles, dict.fromkeys(handles, WEIGHTS), sources=opened.sources)
    planned = plan_safetensors(view, jobs=jobs, request={"verb": "convert", "to": "peft"})
    planned = replace(planned, files=(replace(planned.files[0], name=WEIGHTS),))
    side = {ADAPTER_CONFIG: (json.dumps(config, indent=2) + "\n").encode()}
    return Conversion(opened.ref, "peft", planned, handles, opened.sources, count_types(handles), side)
