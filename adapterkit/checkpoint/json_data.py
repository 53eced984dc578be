"""JSON of a checkpoint: what no sensible file holds is an error of ours before anything works with it."""

from __future__ import annotations

from typing import Any

from adapterkit.errors import CheckpointError
from adapterkit.foreign import OddJson, json_value


def parse_json(data: bytes, where: str) -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
        CheckpointError: what `json_value` refuses.
    """
    try:
        return json_value(data)
    except OddJson as error:
        raise CheckpointError(f"{where} holds {error}", "download or save it again") from None
    except ValueError as error:
        raise CheckpointError(f"{where} is not valid JSON ({error})", "download or save it again") from None
