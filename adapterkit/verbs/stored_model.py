"""A model in transformers that computes in float32, with its weights in memory as its files store them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch


def load_stored(folder: Path, stored: Callable[[str], torch.dtype], **more: Any) -> Any:
    """Load a model as float32, but for the parameters that are stored in fewer bits: these keep their dtype.

    The class is built as for float32, so buffers and what the config says are those of a float32 model. Then the
    parameters get their dtypes, while they have no values yet; the library loads each into the dtype that it has.

    Args:
        folder: of the model.
        stored: the dtype to hold a parameter in, by its name.
        more: for ``from_pretrained``.

    Raises:
        ImportError, OSError, RuntimeError, ValueError, KeyError, AttributeError: as transformers does.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        # Which class it is, and of a model with several parts which config, only the library knows.
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    made, config = type(empty), empty.config
    dtypes = {name: stored(name) for name, _ in empty.named_parameters(remove_duplicate=False)}

    class _Kept(made):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            for name, parameter in self.named_parameters(remove_duplicate=False):
                parameter.data = parameter.data.to(dtypes[name])

    _Kept.__name__, _Kept.__qualname__, _Kept.__module__ = made.__name__, made.__qualname__, made.__module__
    return _Kept.from_pretrained(folder, config=config, dtype=torch.float32, **more)
