"""To the folder that mlx-lm loads."""

from __future__ import annotations

from adapterkit.checkpoint.folder import ADAPTER_CONFIG
from adapterkit.checkpoint.open import locate
from adapterkit.errors import NotFound, UsageError, option
from adapterkit.requests.convert import ConvertRequest
from adapterkit.verbs.conversions.adapters import laid_out, open_adapter
from adapterkit.verbs.conversions.conversion import Conversion

CONFIG = "config.json"


def plan(asked: ConvertRequest, jobs: int) -> Conversion:
    """An adapter as MLX LoRA with one scale and one rank; what is not LoRA becomes it on the way.

    Raises:
        UsageError: a whole model, which mlx-lm converts itself.
    """
    from adapterkit.adapters.formats.write import as_mlx

    try:
        adapter, base = open_adapter(asked)
    except NotFound:
        if not _is_model(asked):
            raise
        raise UsageError(
            f"{asked.src} is a whole model, and mlx is a format of adapters",
            f"convert it with mlx-lm's own mlx_lm.convert; into what that writes, merge with {option('quant', 'keep')}",
        ) from None
    return laid_out(adapter, base, asked, "mlx", as_mlx)


def _is_model(asked: ConvertRequest) -> bool:
    """Whether a folder or Hub id holds a model, and no adapter below it either."""
    from adapterkit.adapters.load import file_and_parts

    path, _ = file_and_parts(asked.src)
    names = frozenset() if path.is_file() else locate(asked.src, headers_only=True).names
    return CONFIG in names and not any(name.endswith(ADAPTER_CONFIG) for name in names)
