"""`adapterkit evaluate`"""

from __future__ import annotations

from pathlib import Path

import click

from adapterkit.cli.output import note, say, show_json


@click.command(name="evaluate", short_help="Run lm-evaluation-harness on a version, its base and null adapters.")
@click.argument("ref")
@click.option("--tasks", required=True, metavar="NAMES", help="Tasks of the harness, divided by commas.")
@click.option("--base", metavar="REF", help="The base; by default the one that the adapter's record or config names.")
@click.option("--null", is_flag=True, help="Also the base with the adapter set to zero, and with its values shuffled.")
@click.option("--no-base", is_flag=True, help="Do not measure the base alone.")
@click.option("--include-path", type=click.Path(path_type=Path), metavar="DIR", help="A folder with tasks of your own.")
@click.option("--limit", type=click.IntRange(1), help="Only so many samples of each task.")
@click.option("--num-fewshot", type=click.IntRange(0), help="Examples in the prompt; else what the task says.")
@click.option("--batch-size", default="1", help="A number, or auto.")
@click.option("--device", default="cpu", help="cpu, cuda, cuda:1, mps.")
@click.option("--dtype", default="auto", help="What weights are loaded as.")
@click.option("--chat-template", is_flag=True, help="Put prompts into the tokenizer's chat template.")
@click.option("--no-attach", is_flag=True, help="Show the figures and keep none.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    ref: str,
    tasks: str,
    base: str | None,
    null: bool,
    no_base: bool,
    include_path: Path | None,
    limit: int | None,
    num_fewshot: int | None,
    batch_size: str,
    device: str,
    dtype: str,
    chat_template: bool,
    no_attach: bool,
    as_json: bool,
) -> None:
    """Measure REF (an adapter, a merged model or a GGUF file) with lm-evaluation-harness, and add the figures to its record.

    Of an adapter, the base is measured with it and without it. Tasks of your own work without a network. A GGUF file's
    values are computed with in transformers, and not in llama.cpp. Needs: pip install 'adapterkit[eval]'.

    \b
    Example:
      adapterkit evaluate my-adapter@3 --tasks tickets --include-path ./tasks --base ./base --null
      adapterkit tag my-adapter@4 prod --require 'acc>base+2se, acc>shuffled'
    """
    from adapterkit.registry.evaluation import sentence
    from adapterkit.verbs.evaluate import evaluate

    report = evaluate(
        ref,
        tasks,
        base=base,
        null=null,
        no_base=no_base,
        include_path=include_path,
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        chat_template=chat_template,
        attach=not no_attach,
        say=lambda subject: note(f"measuring {subject}"),
    )
    attached = report.attached
    kept = "" if attached is None else attached.ref or str(attached.path)
    if as_json:
        show_json({"ref": report.ref, "attached": kept, "measured": [one.to_json() for one in report.measured]})
        return
    for one in report.measured:
        say(f"{one.key}: {sentence(one)}")
    say(f"{kept} carries these figures" if kept else "these figures were not kept")
