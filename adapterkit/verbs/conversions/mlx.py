"""To the folder that mlx-lm loads."""

from __future__ import annotations

from adapterkit.requests.convert import ConvertRequest
from adapterkit.verbs.conversions.adapters import laid_out, open_adapter
from adapterkit.verbs.conversions.conversion import Conversion


def plan(asked: ConvertRequest, jobs: int) -> Conversion:
    """An adapter as MLX LoRA with one scale and one rank; what is not LoRA becomes it on the way."""
    from adapterkit.adapters.formats.write import as_mlx

    adapter, base = open_adapter(asked)
    return laid_out(adapter, base, asked, "mlx", as_mlx)
