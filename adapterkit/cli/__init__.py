"""The command line: one short file per verb, imported when it is called."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import Any, NamedTuple

import click

from adapterkit._version import __version__
from adapterkit.cli.output import fail, form_of, interrupted, note, others_speak_through_us, unheard
from adapterkit.errors import AdapterkitError, heard, nearest, no_memory, out_of_memory, spelled
from adapterkit.packages import lacking


class Verb(NamedTuple):
    """A row of the help.

    Attributes:
        where: module, or module:attribute where one file holds several.
        text: one line for ``--help``.
        downloads: it may read files from the Hub.
    """

    where: str
    text: str
    downloads: bool = False


# group of the help: its verbs, in the order in which people need them
GROUPS: dict[str, dict[str, Verb]] = {
    "First steps": {
        "demo": Verb("adapterkit.cli.demo", "Make a tiny model, train an adapter, merge it, and show that it worked."),
        "doctor": Verb(
            "adapterkit.cli.doctor",
            "Say what is installed, what is missing, and what this machine can do.",
        ),
        "inspect": Verb(
            "adapterkit.cli.inspect",
            "Show what an adapter or a checkpoint is, and how it is.",
            downloads=True,
        ),
    },
    "Models and adapters": {
        "check": Verb(
            "adapterkit.cli.check",
            "Say whether adapters fit a base, and what a server makes of them.",
            downloads=True,
        ),
        "merge": Verb("adapterkit.cli.merge", "Fold adapters into a base, in one streaming pass.", downloads=True),
        "convert": Verb("adapterkit.cli.convert", "Write a model or an adapter in another format.", downloads=True),
        "verify": Verb("adapterkit.cli.verify", "Prove that a merged model is the trained one.", downloads=True),
        "combine": Verb("adapterkit.cli.combine", "Make one adapter of several.", downloads=True),
        "extract": Verb(
            "adapterkit.cli.extract",
            "Make an adapter of the difference of two checkpoints.",
            downloads=True,
        ),
        "resize": Verb("adapterkit.cli.resize", "Bring an adapter to another rank.", downloads=True),
        "imatrix": Verb(
            "adapterkit.cli.imatrix",
            "Measure which columns of the weights matter, for quantizing a model.",
            downloads=True,
        ),
    },
    "Plans and recipes": {
        "build": Verb(
            "adapterkit.cli.build",
            "Carry out a recipe: merge, convert, verify, register, push, reproducibly.",
            downloads=True,
        ),
        "run": Verb(
            "adapterkit.cli.run",
            "Execute a saved plan by workers: here, by Ray, Slurm or Kubernetes.",
            downloads=True,
        ),
        "execute": Verb("adapterkit.cli.execute", "Execute a saved plan, or one part of it.", downloads=True),
    },
    "Registry": {
        "register": Verb(
            "adapterkit.cli.register",
            "Add a folder or file to the registry, as a new version of a name.",
            downloads=True,
        ),
        "list": Verb("adapterkit.cli.records:list_", "List what is registered."),
        "show": Verb("adapterkit.cli.records:show", "Show one version: its files, base, parents and evidence."),
        "lineage": Verb(
            "adapterkit.cli.records:lineage",
            "Show what a version was made from, and what was made of it.",
        ),
        "remove": Verb("adapterkit.cli.aliases:remove", "Take a version out of sight, or bring it back."),
        "export": Verb("adapterkit.cli.bundles:export", "Write versions with all they were made from into one file."),
        "import": Verb("adapterkit.cli.bundles:import_", "Add what a bundle holds to the registry."),
        "remake": Verb("adapterkit.cli.remake", "Make the bytes of a version again that is kept as its recipe."),
        "fsck": Verb("adapterkit.cli.upkeep:fsck", "Read the whole registry and say what is damaged."),
        "gc": Verb("adapterkit.cli.upkeep:gc", "Free blobs that no visible version names."),
        "ui": Verb("adapterkit.cli.ui", "Look at the registry in a browser."),
    },
    "Releases": {
        "evaluate": Verb(
            "adapterkit.cli.evaluate",
            "Run lm-evaluation-harness on a version, its base and null adapters.",
        ),
        "evidence": Verb(
            "adapterkit.cli.evidence",
            "Add what an evaluation measured to a version, or show what is known of one.",
        ),
        "policy": Verb(
            "adapterkit.cli.aliases:policy",
            "Keep what an alias asks of a version before it may point there.",
        ),
        "tag": Verb(
            "adapterkit.cli.aliases:tag",
            "Point an alias such as prod to a version, if what is asked for holds.",
        ),
        "untag": Verb("adapterkit.cli.aliases:untag", "Take an alias off."),
    },
    "Servers and remotes": {
        "deploy": Verb(
            "adapterkit.cli.deploy",
            "Bring a running server to what an alias says, and see that it serves it.",
        ),
        "serve-args": Verb("adapterkit.cli.serve", "Print the command or Modelfile that loads versions in a server."),
        "push": Verb(
            "adapterkit.cli.hub:push",
            "Publish a version to the Hugging Face Hub, an OCI registry or a bucket.",
        ),
        "pull": Verb(
            "adapterkit.cli.hub:pull",
            "Bring a version from the Hub, an OCI registry or a bucket into the registry.",
        ),
    },
    "Provenance": {
        "attest": Verb("adapterkit.cli.attest", "Write a provenance statement (in-toto, SLSA) beside an output."),
        "verify-attestation": Verb(
            "adapterkit.cli.sign:attestation",
            "Say whether signed statements about an output are true of it.",
        ),
        "sign": Verb("adapterkit.cli.sign:sign", "Sign an output or a version with a key of your own."),
        "verify-signature": Verb(
            "adapterkit.cli.sign:verify",
            "Say whether an output or a version is what was signed.",
        ),
    },
}
VERBS = {name: verb for group in GROUPS.values() for name, verb in group.items()}


def _no_verify_download() -> click.Option:
    return click.Option(
        ["--no-verify-download"],
        is_flag=True,
        expose_value=False,
        callback=_set_verify_download,
        help="Do not hold files from the Hub against its digests.",
    )


def _set_verify_download(context: click.Context, option: click.Parameter, given: bool) -> None:
    if given:
        from adapterkit.checkpoint.hub_bytes import set_verify_downloads

        set_verify_downloads(False)
        context.call_on_close(lambda: set_verify_downloads(None))


def _follow_links() -> click.Option:
    return click.Option(
        ["--follow-links"],
        is_flag=True,
        expose_value=False,
        callback=_set_follow_links,
        help="Read configs and tokenizers that are links out of their folder; weights always are.",
    )


def _set_follow_links(context: click.Context, option: click.Parameter, given: bool) -> None:
    if given:
        from adapterkit.checkpoint.listing import set_follow_links

        set_follow_links(True)
        context.call_on_close(lambda: set_follow_links(False))


class Verbs(click.Group):
    """A group whose commands are imported when they are used, so that `--help` stays instant."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module, _, attribute = VERBS[cmd_name].where.partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute or "command")
        if VERBS[cmd_name].downloads and all(one.name != "no_verify_download" for one in command.params):
            getattr(command, "add_option", command.params.append)(_no_verify_download())
            getattr(command, "add_option", command.params.append)(_follow_links())
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb; of a path, say what it is; of a word that is neither, say which verb is most like it."""
        if args and not args[0].startswith("-") and args[0] not in VERBS:
            if _is_place(args[0]):
                from adapterkit.cli.look import command

                return command.name, command, args
            from adapterkit.cli.foreign import command_for

            meant = command_for(args[0])
            hint = f"here it is {meant}" if meant else nearest(args[0], VERBS, "see adapterkit --help")
            ctx.fail(f"No such command '{args[0]}'. {hint[0].upper()}{hint[1:]}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb. click ends with code 1 and no word on every pipe that breaks, which is right for our own output alone.

        Raises:
            ConnectionError: a pipe or a connection of another kind broke.
        """
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            if unheard():
                raise
            raise ConnectionError(str(error)) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        longest = max(map(len, VERBS))
        for group, verbs in GROUPS.items():
            with formatter.section(group):
                formatter.write_dl([(name.ljust(longest), verb.text) for name, verb in verbs.items()])


def _is_place(word: str) -> bool:
    """Whether a word is a path or a Hub id, and not a verb that is spelled wrongly."""
    import os

    return "/" in word or word in (".", "..") or word.startswith("~") or os.path.exists(word)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="adapterkit")
@click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
def app(debug: bool) -> None:
    """Merge, convert, verify and track fine-tuning adapters without loading the model.

    \b
    A first merge:
      adapterkit merge BASE ADAPTER -o merged
    What is this, and what comes next:
      adapterkit PATH
    BASE and ADAPTER are folders, registry names (name[@version|@alias]) or Hub ids (org/name[@revision]).

    \b
    Exit codes: 0 ok, 1 failure, 2 usage or a missing package, 3 a check did not hold, 4 authentication,
    5 network or Hub, 6 refused as unsafe, 7 not found, 130 interrupted.
    """


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line and exit with the documented code."""
    given = sys.argv[1:] if arguments is None else arguments
    # A job that is told to stop tidies up like one that is interrupted at the keyboard. (In the background a shell has that
    # key ignored; being told to stop never is.)
    asked = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGTERM, asked if callable(asked) else signal.default_int_handler)
    others_speak_through_us()
    # Importing numpy starts the threads of OpenBLAS, and each spins for 2^26 ticks before it sleeps: a tenth of a second of
    # every core, for a library that is hardly used. 2^4 is its least.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    with spelled(_as_flag), heard(note):
        _run(given)


def _as_flag(name: str, value: object) -> str:
    """``--weight``, ``--quant Q8_0``; for one that is only switched on, ``--force``."""
    from adapterkit.requests import every

    declared = (options[name] for options in (request.options() for request in every()) if name in options)
    flag = next((one.flag for one in declared if one.flag), f"--{name.replace('_', '-')}")
    return flag if value is None or value is True else f"{flag} {value}"


def _run(given: list[str]) -> Any:
    debug = "--debug" in given
    try:
        code = app.main(args=given, prog_name="adapterkit", standalone_mode=False, obj=tuple(given))
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Abort:
        sys.exit(interrupted(given))
    except KeyboardInterrupt:
        sys.exit(interrupted(given))
    except click.ClickException as error:
        if form_of(given) == "json":
            sys.exit(fail(given, error.exit_code, "usage", error.format_message(), ""))
        error.show()
        sys.exit(error.exit_code)
    except AdapterkitError as error:
        if debug:
            raise
        sys.exit(fail(given, error.exit_code, type(error).__name__, error.message, error.hint, error.place))
    except Exception as error:
        if debug:
            raise
        told = lacking(error)
        if told is not None:
            sys.exit(fail(given, told.exit_code, type(told).__name__, told.message, told.hint))
        if isinstance(error, OSError) and error.filename is not None:  # a path of the user's own, as in --save-plan
            text = f"{error.filename} cannot be used ({error.strerror})"
            sys.exit(fail(given, 1, "OSError", text, "check the path and its permissions"))
        from adapterkit.checkpoint.limits import cramped

        if no_memory(error) or cramped():
            sentence = out_of_memory(error, cramped())
            sys.exit(fail(given, 1, "OutOfMemory", sentence.message, sentence.hint))
        text = f"something unforeseen went wrong ({type(error).__name__}: {error})"
        sys.exit(fail(given, 1, "internal", text, "run it again with --debug and report what it prints"))
