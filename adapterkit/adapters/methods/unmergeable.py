"""Methods that do not change weights, or change them differently for every input: each with its reason and a way out.

Source: PEFT 0.21's own merge code, which raises for these, and the papers they implement.
"""

from __future__ import annotations

_PROMPT = ("it adds trained inputs to the prompt and changes no weight", "serve it with PEFT beside the base")

REASONS: dict[str, tuple[str, str]] = {
    "PROMPT_TUNING": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "PREFIX_TUNING": ("it adds trained keys and values to attention and changes no weight", _PROMPT[1]),
    "P_TUNING": _PROMPT,
    "CPT": _PROMPT,
    "CARTRIDGE": ("it is a trained key-value cache and changes no weight", _PROMPT[1]),
    "ADAPTION_PROMPT": ("it adds gated attention over a trained prompt and changes no weight", _PROMPT[1]),
    "XLORA": ("its router mixes adapters anew for every token", "merge one of its member adapters instead"),
    "POLY": ("its routing depends on a task id given at run time", "train one adapter per task"),
    "LILY": ("its router chooses experts from the input", "serve it with PEFT beside the base"),
    "ADAMSS": (
        "which rows of W its parts act on comes from a clustering that was not saved",
        "merge it with the PEFT that trained it",
    ),
    "PSOFT": (
        "its bases are singular vectors of W that were not saved, and their signs differ between machines",
        "turn it into LoRA on the machine that trained it, with PEFT's save_as_lora, and merge that",
    ),
    "SHADOW": ("it is a separate small model beside the base", "take it out with PEFT's unload_shadow()"),
}
