"""Conversions: one file for each format that `convert` writes.

The rows of the files that are listed here stand in `adapterkit.requests.formats`; any other file has its own, as ``FORMAT``.
"""

LISTED = frozenset(
    {
        "adapters",
        "compressor",
        "conversion",
        "folder",
        "gguf",
        "gguf_lora",
        "hf",
        "mlx",
        "mmproj",
        "oneshot",
        "peft",
        "single",
    }
)
