"""Options of the types of a GGUF output, shared by the verbs that write one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from adapterkit.gguf.quantize import Quantization

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--quant",
        "mix",
        metavar="MIX",
        help="Types of a GGUF output, as llama-quantize gives (Q4_K_M, Q8_0); of a merged folder: nf4, fp4, int8, fp8.",
    ),
    click.option(
        "--imatrix", type=click.Path(path_type=Path), metavar="FILE", help="Importance matrix (GGUF or .dat)."
    ),
    click.option("--pure", is_flag=True, help="Every tensor the mix's default type."),
    click.option("--tensor-type", "tensor_types", multiple=True, metavar="REGEX=TYPE", help="Type of these tensors."),
    click.option("--output-type", metavar="TYPE", help="Type of the output layer."),
    click.option("--token-embd-type", "token_embedding_type", metavar="TYPE", help="Type of the token embedding."),
    click.option("--leave-output", is_flag=True, help="Do not quantize the output layer."),
    click.option("--yes-lossy", is_flag=True, help="Go on although the change would hardly survive."),
)
NAMES = ("mix", "imatrix", "pure", "tensor_types", "output_type", "token_embedding_type", "leave_output", "yes_lossy")


def quantization_options(command: F) -> F:
    """Add the options to a command; it gets them as keywords, for `quantization`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def quantization(given: dict[str, Any]) -> Quantization | None:
    """The options as a value, or None when none was given."""
    if not any(given.values()):
        return None
    from adapterkit.gguf.quantize import Quantization, parse_tensor_type

    pairs = tuple(parse_tensor_type(text) for text in given["tensor_types"])
    found = Quantization(**{**given, "tensor_types": pairs})
    return None if found == Quantization() else found
