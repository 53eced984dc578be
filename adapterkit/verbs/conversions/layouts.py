"""A whole model of images or video in the layout of its own code, as ComfyUI loads it, or in diffusers'."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.adapters.families.relayout import DIFFUSERS, ORIGINAL, Relaid, relaid
from adapterkit.bases import open_model
from adapterkit.checkpoint.decoded import dequantized
from adapterkit.checkpoint.pipeline import components
from adapterkit.checkpoint.plan import plan_file, plan_safetensors
from adapterkit.errors import TargetError, UsageError, counted, option
from adapterkit.verbs.conversions.conversion import Conversion, count_types
from adapterkit.verbs.conversions.folder import folder_recorder

if TYPE_CHECKING:
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.requests.convert import ConvertRequest

LAYOUTS = {"diffusers": DIFFUSERS, "comfyui": ORIGINAL}
PARTS = ("unet", "transformer")  # how a file's denoiser is named behind FILE#
FILE = "model.safetensors"


def plan(asked: ConvertRequest, jobs: int, to: str) -> Conversion:
    """The denoiser in the layout ``to``.

    Raises:
        UsageError: a format of adapters alone, no config for a folder of diffusers, or other parts in the file.
        TargetError: the folder that gives the config has other tensors.
        CheckpointError: see `adapterkit.adapters.families.relayout.relaid`.
    """
    from adapterkit.adapters.load import file_and_parts

    path, parts = file_and_parts(asked.src)
    if to not in LAYOUTS:
        raise UsageError(f"{asked.src} is a whole model, and {to} is a format of adapters", "use diffusers or comfyui")
    if parts and (len(parts) > 1 or parts[0] not in PARTS):
        raise UsageError(f"'{'+'.join(parts)}' is not the denoiser of {path}", f"name FILE#{PARTS[0]}")
    if asked.rank or asked.energy:
        raise UsageError("a whole model has no rank", f"leave out {option('rank')} and {option('energy')}")
    opened = open_model(path if parts else asked.src, headers_only=getattr(asked, "headers_only", False))
    if components(opened.config):
        raise UsageError(
            f"{opened.ref} is a pipeline, and {to} is the layout of one model",
            f"convert one of its folders ({', '.join(components(opened.config))})",
        )
    view = dequantized(opened)
    if view.shapes == opened.shapes:
        view = opened  # float8 without scales: its bytes stay
    found = relaid(view, LAYOUTS[to], str(asked.src))
    notes = [*view.notes, f"{found.family.name} in the {LAYOUTS[to]} layout"]
    if found.left:
        if not parts:
            raise UsageError(
                f"{asked.src} holds {counted(len(found.left), 'tensor')} of other parts too, as '{found.left[0]}'",
                f"name the denoiser alone: {path}#{PARTS[0]}",
            )
        some = counted(len(found.left), "tensor of other parts is", "tensors of other parts are")
        notes.append(f"{some} left out, as '{found.left[0]}'")
    if found.dropped:
        notes.append(f"left out, since diffusers has no such tensor: {', '.join(found.dropped)}")
    record = folder_recorder(opened, to, "converted", {"verb": "convert", "to": to})
    if to == "comfyui":
        made = plan_file(FILE, list(found.tensors.values()), {"format": "pt"})
        types = count_types(found.tensors)
        return Conversion(opened.ref, to, made, found.tensors, opened.sources, types, {}, tuple(notes), record)
    like = _config_of(asked, found)
    shards = dict.fromkeys(found.tensors, FILE)
    folder = replace(like, tensors=found.tensors, shards=shards, metadata={}, index=None, sources=opened.sources)
    made = plan_safetensors(folder, jobs=jobs)
    side = {file.name: file.bytes() for file in like.side_files}
    return Conversion(
        opened.ref, to, made, found.tensors, opened.sources, count_types(found.tensors), side, tuple(notes), record
    )


def _config_of(asked: ConvertRequest, found: Relaid) -> Checkpoint:
    """The folder of diffusers that gives the config, once its tensors are those of the result.

    Raises:
        UsageError: none is given, or it is no folder of diffusers.
        TargetError: another size.
    """
    if asked.base is None:
        raise UsageError(
            "diffusers' config.json says sizes that a file does not",
            f"name a folder of diffusers of this model with {option('base', 'DIR')}",
        )
    like = open_model(asked.base, headers_only=True)
    if "_class_name" not in like.config:
        raise UsageError(
            f"{like.ref} is no folder of diffusers: its config.json has no _class_name", "name its transformer/"
        )
    if like.config["_class_name"] not in found.family.classes:
        raise TargetError(
            f"{like.ref} is a {like.config['_class_name']}, and this is {found.family.name}", "name its own"
        )
    shapes = {name: tensor.shape for name, tensor in found.tensors.items()}
    other = next(
        (name for name in shapes.keys() | like.shapes.keys() if shapes.get(name) != like.shapes.get(name)), None
    )
    if other is not None:
        here, there = shapes.get(other), like.shapes.get(other)
        raise TargetError(
            f"{like.ref} is another model: '{other}' is {list(there) if there else 'not there'}, and here "
            f"{list(here) if here else 'not there'}",
            "name a folder of the same model",
        )
    return like


__all__ = ["LAYOUTS", "plan"]
