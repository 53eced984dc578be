"""mlx-lm."""

from __future__ import annotations

from adapterkit.serving.server import Expectation, Server

_UTILS = "mlx-lm tuner/utils.py"
_MLX = "adapterkit convert {adapter} --to mlx --base {base} -o mlx"

SERVER = Server(
    "mlx",
    expectations=(
        Expectation("not_lora", "refused", "mlx-lm reads its own LoRA and DoRA files", _UTILS, _MLX),
        Expectation("rslora", "wrong", "the scale in its config must be given as a number", "mlx-vlm#986", _MLX),
        Expectation("alpha_pattern", "refused", "it has one scale for all modules", _UTILS, _MLX),
        Expectation("rank_pattern", "refused", "it has one rank for all modules", _UTILS, _MLX),
        Expectation("whole", "refused", "it has no place for whole modules beside factors", _UTILS),
        Expectation("experts", "refused", "it has its own layout of stacked experts", _UTILS),
    ),
)
