"""Jobs that are written for a scheduler: a Slurm job array, a Kubernetes Indexed Job.

A template is a file with ``{{name}}``, which is given here, and ``{{name=default}}``, which the user gives by ``--set
name=value`` or leaves as it is. The tasks are `adapterkit run PLAN --task I --tasks N`.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit import disk
from adapterkit.checkpoint.store_write import store_memory
from adapterkit.errors import NotFound, OutputError, UsageError, option
from adapterkit.ops.device import CUDA
from adapterkit.places import Address, here
from adapterkit.requests.workers import K8S, SLURM
from adapterkit.stores.files import brought
from adapterkit.verbs.engines.pool import Reading
from adapterkit.verbs.execute import inputs_of

if TYPE_CHECKING:
    from adapterkit.verbs.execute import OpenPlan

FILES = {SLURM: "slurm.sh", K8S: "k8s.yaml"}
SUBMIT = {SLURM: ("sbatch",), K8S: ("kubectl", "apply", "-f")}
ROOM = 1.25  # of memory, beyond what the plan says
_PLACE = re.compile(r"\{\{\s*([a-z][a-z0-9_]*)\s*(?:=([^{}\n]*))?\}\}")
_NAME = re.compile(r"[^a-z0-9]+")

MOST_TEMPLATE = 1 << 20  # bytes


def template_of(engine: str) -> str:
    """The template that comes with the package."""
    return (resources.files("adapterkit.verbs.engines") / "templates" / FILES[engine]).read_text(encoding="utf-8")


def filled(template: str, given: Mapping[str, str], own: Mapping[str, str], where: str) -> str:
    """A template with its places filled.

    Args:
        given: what is known here.
        own: what the user gave, for places that have a default.
        where: what to call the template in an error.

    Raises:
        UsageError: a place that nobody fills, or a value for none.
    """
    places = dict(_PLACE.findall(template))
    strange = sorted(own.keys() - places.keys())
    if strange:
        free = ", ".join(sorted(places.keys() - given.keys())) or "nothing"
        raise UsageError(f"{where} has no place '{strange[0]}'", f"it takes {free}")

    def put(found: re.Match[str]) -> str:
        name, default = found[1], found[2]
        if name in own:
            return own[name]
        if name in given:
            return given[name]
        if default is None:
            raise UsageError(
                f"{where}: nothing says what {{{{{name}}}}} is", f"give it: {option('set', f'{name}=...')}"
            )
        return default

    return _PLACE.sub(put, template)


def write_job(opened: OpenPlan, plan: Path | Address, request: Any, count: int, size: int) -> tuple[str, ...]:
    """Write the job beside the output, and hand it over where that was asked for; what to tell the user.

    Args:
        plan: where the plan file lies.
        count: tasks, at most; there are never more than parts.
        size: work of a part.

    Raises:
        NotFound: the template is not there, or the scheduler's command.
        UsageError: see `filled`.
        OutputError: the scheduler refused the job.
    """
    engine, out = request.on, here(opened.out)
    near = [one for one in inputs_of(opened.plan) if not Path(one).is_absolute() and Path(one).exists()]
    if near and engine == K8S:
        raise UsageError(
            f"the plan names '{near[0]}' relative to this folder, and a pod runs in another one",
            "give its whole path, and plan again",
        )
    named = str(out if isinstance(opened.out, Path) else opened.out)
    tasks = min(count, len(opened.parts))
    path = out.with_name(f"{out.name}.{FILES[engine]}")
    text, where = _template(request)
    jobs = request.jobs or 1
    arguments = ["run", str(plan), "-o", named, "--part-size", str(size), "--jobs", str(jobs), "--tasks", str(tasks)]
    arguments += [*["--force"] * bool(request.force), *Reading.here().options]
    memory = int((opened.plan.peak_memory + store_memory(opened.plan, opened.out, jobs)) * ROOM / 2**20) + 1
    gpu = opened.device.startswith(CUDA)
    given = {
        "name": _job_name(out.name),
        "tasks": str(tasks),
        "last": str(tasks - 1),
        "jobs": str(jobs),
        "memory": str(memory),
        "gpus": str(int(gpu)),
        "gpu": "#SBATCH -G 1" if gpu else "# (no GPU: the plan computes on the CPU)",
        "log": shlex.quote(str(out.with_name(f"{out.name}.%A_%a.log"))),
        "plan": str(plan),
        "folder": shlex.quote(str(Path.cwd())),
        "out": named,
        "command": shlex.join([sys.executable, "-m", "adapterkit", *arguments]),
        "arguments": json.dumps([*arguments, "--task", "$(JOB_COMPLETION_INDEX)"]),
    }
    made = filled(text, given, dict(request.set), where)
    disk.deliver(path, made.encode())
    command = [*SUBMIT[engine], str(path)]
    if not request.submit:
        return (f"job of {tasks} tasks written to {path}; hand it over: {shlex.join(command)}",)
    return (f"job of {tasks} tasks written to {path}", _submitted(command))


def _template(request: Any) -> tuple[str, str]:
    if request.template is None:
        return template_of(request.on), f"the template of {request.on}"
    path = str(request.template)  # as it was given
    try:
        return disk.read_regular(brought(request.template), MOST_TEMPLATE, path).decode("utf-8"), path
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not text in UTF-8", "save it again as UTF-8") from None
    except NotFound:
        raise NotFound(
            f"{path} does not exist", "copy a template with adapterkit run --print-template ENGINE"
        ) from None


def _submitted(command: list[str]) -> str:
    """What the scheduler said of the job."""
    if shutil.which(command[0]) is None:
        raise NotFound(f"{command[0]} is not here", f"hand the job over where it is: {shlex.join(command)}")
    done = subprocess.run(command, capture_output=True, text=True)
    said = (done.stdout + done.stderr).strip().splitlines()
    if done.returncode:
        raise OutputError(f"{command[0]} refused the job ({said[-1] if said else done.returncode})", "see its file")
    return said[-1] if said else f"{command[0]} took it"


def _job_name(name: str) -> str:
    """A name that Slurm and Kubernetes (RFC 1123) both take."""
    return f"adapterkit-{_NAME.sub('-', name.lower()).strip('-')}"[:52].rstrip("-")
