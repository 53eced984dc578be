"""FourierFT and WaveFT: a few trained coefficients of the delta in another basis, at places drawn from a seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.adapters.change import RowMap, matrix
from adapterkit.adapters.method import Context, Edit, Method, Module
from adapterkit.adapters.methods.common import dims, edit, matrix_of, oriented, take
from adapterkit.errors import AdapterError, TargetError

if TYPE_CHECKING:
    import torch

    from adapterkit.adapters.change import Kernel, Weights
    from adapterkit.adapters.config import AdapterConfig

    Places = tuple[torch.Tensor, torch.Tensor]
    Delta = Callable[[torch.Tensor, Places, tuple[int, int], torch.Tensor], torch.Tensor]


def _sparse(module: Module, context: Context, name: str, scale: float, delta: Delta) -> Edit:
    """The edit that adds ``scale * delta(...)`` of coefficients at seeded places."""
    (spectrum,) = take(module, context, name)
    (count,) = dims(spectrum, 1, name, module, context)
    target = oriented(module, context, matrix_of(module, context))
    shape = target.matrix
    seed = context.config.get("random_loc_seed", 777)
    if type(seed) is not int or count > shape[0] * shape[1]:
        raise TargetError(
            f"{context.where}: '{module.path}.{name}' has {count} coefficients (seed {seed!r}) for {target.parameter}, "
            f"{shape[0]} x {shape[1]}",
            "restore the config that was saved with the weights",
        )

    def load(weights: Weights) -> Kernel:
        import torch

        from adapterkit.ops.spectral import permutation_prefix

        drawn = permutation_prefix(shape[0] * shape[1], count, seed)
        values = matrix(spectrum) * scale
        places = drawn // shape[1], drawn % shape[1]

        def new(w: torch.Tensor, here: range) -> torch.Tensor:
            return w + delta(values, places, shape, torch.arange(here.start, here.stop, here.step))

        return RowMap(new)

    return edit(target, f"{name.partition('_')[0]} n={count}", load, (spectrum,), 4 * count)


def _fourier(module: Module, context: Context) -> Iterator[Edit]:
    def delta(values: torch.Tensor, places: Places, shape: tuple[int, int], rows: torch.Tensor) -> torch.Tensor:
        from adapterkit.ops.spectral import fourier_rows

        return fourier_rows(values, places, shape, rows)

    yield _sparse(module, context, "fourierft_spectrum", context.config.number("scaling", 150.0), delta)


@lru_cache(maxsize=1)
def wavelets() -> dict[str, tuple[float, ...]]:
    """The low-pass synthesis filters by name."""
    data = json.loads(Path(__file__).with_name("wavelets.json").read_text(encoding="utf-8"))
    return {name: tuple(values) for name, values in data["filters"].items()}


def _taps(config: AdapterConfig) -> tuple[float, ...]:
    """The filter, empty when coefficients are entries of W themselves."""
    if "use_idwt" in config.raw and not config.flag("use_idwt"):
        return ()
    family = str(config.get("wavelet_family", "db1")).lower()
    if family not in wavelets():
        raise AdapterError(
            f"{config.where}: 'wavelet_family' is {family!r}; known are {', '.join(wavelets())}",
            "PEFT has no working filter of that name either",
        )
    return wavelets()[family]


def _wave(module: Module, context: Context) -> Iterator[Edit]:
    taps = _taps(context.config)

    def delta(values: torch.Tensor, places: Places, shape: tuple[int, int], rows: torch.Tensor) -> torch.Tensor:
        import torch

        from adapterkit.ops.spectral import wavelet_rows

        if taps:
            return wavelet_rows(values, places, shape, taps, rows)
        out = torch.zeros(len(rows), shape[1])
        step = int(rows[1] - rows[0]) if len(rows) > 1 else 1
        here = (places[0] >= rows[0]) & (places[0] <= rows[-1]) & ((places[0] - rows[0]) % step == 0)
        out[(places[0][here] - rows[0]) // step, places[1][here]] = values[here]
        return out

    yield _sparse(module, context, "waveft_spectrum", context.config.number("scaling", 25.0), delta)


_FIELDS = frozenset({"n_frequency", "scaling", "random_loc_seed", "fan_in_fan_out", "n_frequency_pattern"})

METHODS = (
    Method(
        peft_type="FOURIERFT",
        title="FourierFT",
        formula="W' = W + scaling Re(ifft2(F)), F sparse at seeded places",
        source="arXiv:2405.03003",
        suffixes=("fourierft_spectrum",),
        edits=_fourier,
        fields=_FIELDS,
        notes="the seeded places are found without the permutation of all of W",
    ),
    Method(
        peft_type="WAVEFT",
        title="WaveFT",
        formula="W' = W + scaling idwt2(F), F sparse at seeded places",
        source="arXiv:2505.12532",
        suffixes=("waveft_spectrum",),
        edits=_wave,
        fields=_FIELDS | {"wavelet_family", "use_idwt", "proportional_parameters"},
        notes="coif4 is PEFT's filter, which is 2 % off a wavelet: adapters were trained with it; coif5 is refused: PEFT 0.21 "
        "has 48 taps for it instead of 30 and cannot run it",
    ),
)
