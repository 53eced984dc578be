"""To the folder that PEFT loads."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from adapterkit.bases import open_model
from adapterkit.errors import UsageError, option
from adapterkit.requests.convert import ConvertRequest
from adapterkit.verbs.conversions.adapters import laid_out, open_adapter, planned_files, planned_tensors
from adapterkit.verbs.conversions.conversion import Conversion, gguf_file

if TYPE_CHECKING:
    from adapterkit.gguf.checkpoint import GGUFCheckpoint


def plan(asked: ConvertRequest, jobs: int) -> Conversion:
    """An adapter of any format as PEFT adapter: as it is, or as plain LoRA of one rank and one alpha."""
    from adapterkit.adapters.formats.write import as_peft, as_plain
    from adapterkit.adapters.methods.expert_factors import in_three_dimensions

    if not asked.plain and (asked.rank or asked.energy):
        raise UsageError(
            "a rank or a share of energy is for deltas that are decomposed", f"add {option('plain', True)}"
        )
    opened = gguf_file(asked.src)
    if opened is not None:
        return _of_gguf(opened, asked)
    adapter, base = open_adapter(asked)
    if asked.plain or in_three_dimensions(adapter):  # PEFT has no form for those, so the stacks are computed
        return laid_out(adapter, base, asked, "peft", as_plain)
    return planned_files(adapter, as_peft(adapter, base), "peft")


def _of_gguf(opened: GGUFCheckpoint, asked: ConvertRequest) -> Conversion:
    from adapterkit.adapters.adapter import WEIGHTS
    from adapterkit.adapters.formats.write import AdapterFiles
    from adapterkit.checkpoint.folder import ADAPTER_CONFIG
    from adapterkit.gguf.lora import left_out
    from adapterkit.gguf.peft import to_peft

    tensors, config = to_peft(opened, open_model(asked.need_base("peft"), headers_only=True))
    side = {ADAPTER_CONFIG: (json.dumps(config, indent=2) + "\n").encode()}
    files = AdapterFiles(WEIGHTS, {tensor.name: tensor for tensor in tensors}, side)
    return planned_tensors(opened.ref, files, opened.sources, "peft", left_out(opened.tensors))
