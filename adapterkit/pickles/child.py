"""Run in a process of its own: ``python -I child.py PICKLE OUT DTYPES MEMORY``; imports nothing of adapterkit.

Loads with ``weights_only=True`` and writes a safetensors file tensor by tensor. The last line of stdout is JSON: the names,
or what went wrong.
"""

import json
import os
import pickle
import sys
import zipfile
from typing import Any


def bound(memory: int) -> None:
    """Limit the addresses of this process, where the system can."""
    try:
        import resource
    except ImportError:
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    try:
        resource.setrlimit(resource.RLIMIT_AS, (memory if hard < 0 else min(memory, hard), hard))
    except (ValueError, OSError):
        pass


def main() -> dict[str, object]:
    source, out, names = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    if len(sys.argv) > 4:
        bound(int(sys.argv[4]))
    import torch

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 6):  # CVE-2025-32434: weights_only could be passed by
        return {"error": f"torch {torch.__version__} is too old to load pickles safely, 2.6 is needed"}
    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
    except pickle.UnpicklingError as error:
        reason = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "class" in line), "")
        return {"unsafe": (reason or str(error).splitlines()[0])[:300]}
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        return {"error": (str(error).splitlines() or [type(error).__name__])[0][:300]}
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not loaded:
        return {"error": "it holds no mapping of tensors"}
    other = next((name for name, value in loaded.items() if not isinstance(value, torch.Tensor)), None)
    if other is not None:
        return {"error": f"'{other}' is no tensor"}
    return write(out, loaded, names)


def write(out: str, loaded: dict[str, Any], names: dict[str, str]) -> dict[str, object]:
    """Write tensors as a safetensors file; ``names`` maps torch's names of dtypes to the format's."""
    import torch

    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in loaded.items():
        code = names.get(str(tensor.dtype).removeprefix("torch."))
        if code is None or not isinstance(name, str):
            return {"error": f"'{name}' is {tensor.dtype}"}
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(out, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in loaded.values():
            if tensor.numel():
                file.write(memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()))
        file.flush()
        os.fsync(file.fileno())
    return {"names": list(loaded)}


if __name__ == "__main__":
    print(json.dumps(main()))
