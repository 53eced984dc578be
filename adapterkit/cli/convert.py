"""`adapterkit convert`"""

from __future__ import annotations

from adapterkit.cli.options import command as command_of
from adapterkit.cli.output import Progress, count, file_count, note, say, show_json, size
from adapterkit.cli.written import asked, told
from adapterkit.errors import counted
from adapterkit.requests.convert import ConvertRequest


@command_of(ConvertRequest, name="convert", short_help="Write a model or an adapter in another format.")
def command(request: ConvertRequest, as_json: bool) -> None:
    """Write SRC in another format: a model in other types, an adapter for another trainer or server, or back.

    \b
    Example:
      adapterkit convert ./model -o model-Q4_K_M.gguf --quant Q4_K_M
      adapterkit convert model-F16.gguf -o model-Q4_K_M.gguf --quant Q4_K_M
      adapterkit convert ./merged --to nf4 --double-quant -o merged-nf4
      adapterkit convert ./model-gptq --to bf16 -o model
      adapterkit convert ./my-adapter --to gguf-lora --base model-F16.gguf -o my-adapter.gguf
      adapterkit convert my-adapter.gguf --to peft --base ./base -o my-adapter
      adapterkit convert ./my-dora --to peft --plain --base ./base --energy 0.999 -o my-lora
      adapterkit convert ./my-adapter --to mlx -o my-mlx-adapter
      adapterkit convert ./old-adapter --to peft --allow-pickle -o my-adapter
    """
    from adapterkit.cli.combine import kept
    from adapterkit.verbs.convert import convert

    with Progress("converting", enabled=not as_json) as progress:
        report = convert(**asked(request, "the file or folder to make", progress))
    if as_json:
        show_json(report)
        return
    for text in report.notes:
        note(f"note: {text}")
    kinds = ", ".join(f"{name} ({times})" for name, times in sorted(report.types.items(), key=lambda kv: -kv[1]))
    say(f"{report.src} to {report.to}: {counted(report.tensors, 'tensor')}, {count(report.copied)} copied; {kinds}")
    if report.modules:
        say(f"  {kept(report.modules)}")
    if told(report, request):
        return
    resumed = f", {report.reused} tensors re-used" if report.reused else ""
    say(f"{report.out}: {size(report.nbytes)} in {file_count(len(report.files))}, {report.seconds:.1f} s{resumed}")
