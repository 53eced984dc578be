"""What each verb is asked for: one frozen dataclass per verb.

A field is an option. Its `Option` says type, help, choices, group and role, and the doors read it from there: the command
line (`adapterkit.cli.options`), the recipe (`adapterkit.recipe.schema`), the Python function (`takes`), the record and
the reference in the docs. A new option is one field here and the code that uses it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adapterkit.requests.option import Request


def every() -> tuple[type[Request], ...]:
    """The request of each verb."""
    from adapterkit.requests import adapters, check, convert, evaluate, merge, publish, register, verify, workers

    return (
        merge.MergeRequest,
        convert.ConvertRequest,
        adapters.CombineRequest,
        adapters.ExtractRequest,
        adapters.ResizeRequest,
        check.CheckRequest,
        verify.VerifyRequest,
        register.RegisterRequest,
        publish.PushRequest,
        publish.PullRequest,
        workers.RunRequest,
        evaluate.EvaluateRequest,
    )
