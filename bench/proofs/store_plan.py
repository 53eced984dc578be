"""What planning a merge of 671B parameters reads from a bucket, and what the merge would move.

    python -m bench proofs store_plan --dir /var/tmp/adapterkit-huge

Base and adapter are sparse files (`bench.common.giants`) behind a store that counts (`bench.common.folder_store`). Headers are
real; nothing is written. The plan fails here if more than 12 MB of weight files are read for it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import adapterkit
from adapterkit.stores import connect
from bench.common import results
from bench.common.folder_store import FolderStore
from bench.common.giants import make

MOST = 12_000_000  # bytes of headers


def planned(folder: Path, model: str, **how: Any) -> dict[str, Any]:
    """The figures of one plan."""
    stores: list[FolderStore] = []

    def opened(root: Any) -> FolderStore:
        stores.append(FolderStore(root, folder))
        return stores[-1]

    before = connect._OPENERS["s3"]
    connect._OPENERS["s3"] = opened
    connect._open.clear()
    try:
        report = adapterkit.merge(
            f"s3://{model}/base", f"s3://{model}/adapter", f"s3://{model}/out", dry_run=True, **how
        )
    finally:
        connect._OPENERS["s3"] = before
        connect._open.clear()
    headers = sum(read for name, read in stores[0].read_bytes.items() if name.endswith(".safetensors"))
    return {
        "model": model,
        "gb": report.nbytes / 1e9,
        "files": len(report.files),
        "header_mb": headers / 1e6,
        "requests": report.requests,
        "down_gb": report.bytes_down / 1e9,
        "up_gb": report.bytes_up / 1e9,
        "inside_gb": report.bytes_inside / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench proofs store_plan", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--model", default="deepseek-v3")
    args = parser.parse_args()
    folder = args.dir / args.model
    if not (folder / "base").is_dir():
        make(folder, args.model)
    how = {"quant": "keep"} if args.model == "deepseek-v3" else {}
    found = planned(folder, args.model, **how)
    print(found)
    results.note(**{name: round(value, 1) for name, value in found.items() if name not in ("model", "files")})
    results.note(within=int(found["header_mb"] * 1e6 <= MOST))
    assert found["header_mb"] * 1e6 <= MOST, "more than 12 MB of headers were read"


if __name__ == "__main__":
    main()
