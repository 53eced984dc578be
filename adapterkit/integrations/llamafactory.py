"""LLaMA-Factory with the callback: ``python -m adapterkit.integrations.llamafactory train.yaml``.

LLaMA-Factory takes callbacks from Python alone (``src/llamafactory/train/tuner.py``, ``run_exp``), so this reads its
own config, takes out the keys ``adapterkit_name``, ``adapterkit_alias`` and ``adapterkit_strict``, and starts the
same run with the callback.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from adapterkit.disk import read_regular
from adapterkit.errors import NotFound, UsageError

MOST = 1 << 20  # bytes of a config
KEYS = ("adapterkit_name", "adapterkit_alias", "adapterkit_strict")


def main(arguments: list[str] | None = None) -> None:
    """Train by a config of LLaMA-Factory; ``KEY=VALUE`` after it as ``llamafactory-cli train`` takes them.

    Raises:
        UsageError: no config, or no name to register under.
        NotFound: the config, or LLaMA-Factory itself, is not there.
    """
    given = sys.argv[1:] if arguments is None else arguments
    if not given or "=" in given[0]:
        raise UsageError(
            "no config of LLaMA-Factory was given", "python -m adapterkit.integrations.llamafactory train.yaml"
        )
    own, args = split(_read(Path(given[0])), given[1:])
    if not own.get("adapterkit_name"):
        raise UsageError(f"{given[0]} has no adapterkit_name", "say what the versions are called")
    try:
        from llamafactory.train.tuner import run_exp
    except ImportError:
        raise NotFound("LLaMA-Factory is not installed here", "pip install llamafactory") from None
    run_exp(args=args, callbacks=[callback(own, args)])


def _read(path: Path) -> dict[str, Any]:
    try:
        data = read_regular(path, MOST)
    except NotFound:
        raise NotFound(f"{path} does not exist", "give the config that llamafactory-cli train takes") from None
    found = _yaml(data, str(path))
    if not isinstance(found, dict):
        raise UsageError(f"{path} is no config", "give the one that llamafactory-cli train takes")
    return found


def split(config: dict[str, Any], more: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our keys, and the config without them; ``KEY=VALUE`` words take the place of what it says."""
    for word in more:
        key, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"'{word}' sets nothing", "give KEY=VALUE")
        config = {**config, key: _yaml(value.encode(errors="surrogateescape"), f"the value of {key}")}
    own = {key: config[key] for key in KEYS if key in config}
    return own, {key: value for key, value in config.items() if key not in KEYS}


def _yaml(data: bytes, what: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(data.decode("utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        said = "it nests too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())[:200]
        raise UsageError(f"{what} is no YAML ({said})", "correct it") from None


def callback(own: dict[str, Any], args: dict[str, Any]) -> Any:
    """The callback that our keys ask for."""
    from adapterkit.integrations.transformers import RegisterCallback

    return RegisterCallback(
        str(own["adapterkit_name"]),
        alias=str(own.get("adapterkit_alias") or ""),
        data=str(args.get("dataset") or ""),
        strict=bool(own.get("adapterkit_strict")),
    )


if __name__ == "__main__":
    main()
