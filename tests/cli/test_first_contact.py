"""What somebody meets who does not know adapterkit: a path alone, help, empty places, wrong words, other libraries' noise."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from models import edit_config, plain_adapter, plain_base
from safetensors.torch import save_file

from adapterkit.adapters.config import AdapterConfig
from adapterkit.cli import VERBS, app, foreign, main
from adapterkit.cli.look import look
from adapterkit.errors import UsageError
from adapterkit.gguf.filetypes import file_type
from adapterkit.requests import every
from adapterkit.verbs.merge import merge


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one call."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADAPTERKIT_HOME", str(tmp_path / "home"))
    plain_adapter(tmp_path / "my adapter", plain_base(tmp_path / "base"), base_model_name_or_path="base")
    return tmp_path


# ------------------------------------------------------------------ a path alone


def test_an_adapter_and_what_comes_next(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "my adapter")
    said, *commands = out.splitlines()
    assert code == 0
    assert said == "my adapter: a LoRA of rank 4 on q_proj, up_proj, for base"
    assert [line.split()[1] for line in commands] == ["check", "merge", "merge"]
    assert commands[0] == "  adapterkit check base 'my adapter'"


def test_the_commands_that_are_named_work(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is run as it is printed, and so are those for what the second one made; the first one by a shell."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(Path(__file__).parents[2])}

    def shell(command: str) -> None:
        done = subprocess.run(["bash", "-c", command], cwd=here, env=env, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, (command, done.stderr)

    def here_too(command: str) -> None:
        name, *words = shlex.split(command)
        assert name == "adapterkit"
        code, _, err = run(capsys, *words)
        assert code == 0, (command, err)

    _, (check, folder, _) = look("my adapter")
    shell(check)
    here_too(folder)
    what, (verify, _, register) = look("my adapter-merged")
    assert what == "my adapter-merged: LlamaForCausalLM, 4,400 parameters, merged by adapterkit from base, my adapter"
    here_too(verify)
    assert register == "adapterkit register 'my adapter-merged' --name my-adapter-merged"
    here_too(register)


def test_other_places(here: Path) -> None:
    base, adapter = here / "base", here / "my adapter"
    what, commands = look("base")
    assert what == "base: LlamaForCausalLM, 4,400 parameters"
    assert commands[1] == "adapterkit merge base ADAPTER -o base-merged"
    edit_config(adapter, use_rslora=True)
    assert look("my adapter")[0].startswith("my adapter: an rsLoRA of rank 4 on")
    edit_config(adapter, base_model_name_or_path=None)
    what, commands = look("my adapter")
    assert what.endswith("; it does not name its base")
    assert commands[1] == "adapterkit merge BASE 'my adapter' -o 'my adapter-merged'"
    what, (command,) = look(".")
    assert what == ".: a folder with 1 adapter and 1 model: my adapter, base"
    assert command in ("adapterkit base", "adapterkit 'my adapter'")
    (here / "r.toml").write_text('base = "base"\n')
    assert look("r.toml")[1][0] == "adapterkit build r.toml --plan"
    merge(base, [adapter], here / "m")
    assert "merged by adapterkit" in look("m")[0]


def test_one_file_and_one_checkpoint(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of images there is no GGUF: each command that is named for such files works as it is printed."""
    torch.manual_seed(0)
    paths = [f"model.diffusion_model.double_blocks.{i}.img_attn.proj" for i in range(2)]
    paths += [f"model.diffusion_model.single_blocks.{i}.linear2" for i in range(2)]
    save_file({f"{path}.weight": torch.randn(8, 8) for path in paths}, here / "flux.safetensors")
    lora = {}
    for path in paths:
        flat = "lora_unet_" + path.removeprefix("model.diffusion_model.").replace(".", "_")
        lora |= {f"{flat}.lora_down.weight": torch.randn(2, 8), f"{flat}.lora_up.weight": torch.randn(8, 2)}
    save_file(lora, here / "style.safetensors")
    _, (check, merged, verify) = look("style.safetensors")
    assert merged == "adapterkit merge BASE style.safetensors -o style-merged.safetensors"
    for command in (check, merged, verify):
        code, _, err = run(capsys, *command.replace("BASE", "flux.safetensors").split()[1:])
        assert code == 0, (command, err)
    what, commands = look("style-merged.safetensors")
    assert "merged by adapterkit from flux.safetensors, style.safetensors" in what
    _, after = look("flux.safetensors")
    commands += [line.replace("ADAPTER", "style.safetensors") for line in after]
    assert [line.split()[1] for line in commands] == ["verify", "register", "inspect", "merge", "verify"]
    for command in commands:
        code, _, err = run(capsys, *command.split()[1:])
        assert code == 0, (command, err)


def test_a_pipeline_and_its_parts(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pipeline is one thing, not a folder of models; neither it nor its denoiser becomes GGUF."""
    unet = {"down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight": torch.ones(8, 8)}
    (here / "sdxl/unet").mkdir(parents=True)
    save_file(unet, here / "sdxl/unet/diffusion_pytorch_model.safetensors")
    (here / "sdxl/unet/config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    parts = {"_class_name": "StableDiffusionXLPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (here / "sdxl/model_index.json").write_text(json.dumps(parts))
    for place in ("sdxl", "sdxl/unet"):
        what, (inspect, _, convert) = look(place)
        assert "a folder with" not in what
        for command in (inspect, convert):
            code, _, err = run(capsys, *command.split()[1:])
            assert code == 0, (command, err)


def test_json_and_what_is_not_there(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "base", "--json")
    assert code == 0
    assert json.loads(out)["next"][0] == "adapterkit inspect base"
    assert run(capsys, "./nothing")[0] == 7
    code, _, err = run(capsys, "mrge")
    assert code == 2
    assert "Did you mean 'merge'?" in err


def test_a_base_or_a_name_that_was_left_out(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["-o", "out"]):
        code, _, err = run(capsys, "merge", "my adapter", *more)
        assert code == 2
        assert "my adapter is an adapter; its base comes first: adapterkit merge base my adapter" in err
    assert "Missing argument 'ADAPTER...'" in run(capsys, "merge", "base")[2]
    code, _, err = run(capsys, "register", "my adapter")
    assert code == 2
    assert "Missing option '--name'" in err


# ------------------------------------------------------------------ help


@pytest.mark.parametrize("request_", [one for one in every() if one.FIRST], ids=lambda one: one.VERB)
def test_the_options_that_people_need_first_lead(request_: type) -> None:
    shown = CliRunner().invoke(app, [request_.VERB, "--help"], prog_name="adapterkit").output  # type: ignore[attr-defined]
    lines = shown[shown.index("Needed first:") :].splitlines()[1:]
    block = lines[: lines.index("")]
    flags = [line.split()[0] for line in block if line.startswith("  -")]
    assert len(flags) == len(request_.FIRST) == 6  # type: ignore[attr-defined]
    assert shown.index("Needed first:") < min(shown.index(word) for word in ("Run:",) if word in shown)
    command = app.get_command(click.Context(app), request_.VERB)  # type: ignore[attr-defined]
    assert command is not None
    assert len([flag for flag in flags if flag in ("-o,", *(name for one in command.params for name in one.opts))]) == 6


def test_help_names_every_method_once() -> None:
    shown = CliRunner().invoke(app, ["merge", "--help"], prog_name="adapterkit").output
    assert shown.count("arcee-fusion") == 1


# ------------------------------------------------------------------ empty places and wrong names


@pytest.mark.parametrize("verb", ["merge", "combine", "check", "extract", "convert"])
def test_only_options_of_methods_stand_under_combining(verb: str) -> None:
    """The rest is of the run: how inputs are read, and in which form the report is shown."""
    shown = CliRunner().invoke(app, [verb, "--help"]).output
    sections = {part.partition(":")[0]: part for part in shown.split("\n\n")}
    combining = sections.get("Combining", "")
    assert ("--density" in combining) == (verb in ("merge", "combine", "check"))
    for flag in ("--no-verify-download", "--follow-links", "--json", "--help"):
        assert flag not in combining
        assert flag in sections["Run"]


def test_an_empty_registry_says_how_to_begin(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "the registry" in (err := run(capsys, "list")[2])
    assert "is empty; add an adapter: adapterkit register ./my-adapter --name my-adapter" in err
    assert run(capsys, "register", "my adapter", "--name", "tickets", "--base", "base")[0] == 0
    assert "fits these filters; adapterkit list shows everything" in run(capsys, "list", "--method", "dora")[2]
    code, _, err = run(capsys, "show", "tickest")
    assert code == 7
    assert "did you mean 'tickets'?" in err
    assert "list shows what is" in run(capsys, "show", "zzz")[2]


@pytest.mark.parametrize(
    ("fields", "label"),
    [
        ({"peft_type": "LORA"}, "LoRA"),
        ({"peft_type": "LORA", "use_dora": True}, "DoRA"),
        ({"peft_type": "LORA", "use_rslora": True}, "rsLoRA"),
        ({"peft_type": "LORA", "use_rslora": True, "use_dora": True}, "rsLoRA with DoRA"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa_niter_4"}, "PiSSA"),
        ({"peft_type": "LORA", "init_lora_weights": True}, "LoRA"),
        ({"peft_type": "ADALORA"}, "AdaLoRA"),
        ({"peft_type": "vblora"}, "VB-LoRA"),
        ({"peft_type": "IA3"}, "IA3"),
    ],
)
def test_methods_are_named_as_their_authors_do(fields: dict[str, object], label: str) -> None:
    assert AdapterConfig(fields, "x").label == label


def test_a_merge_names_the_method(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(here / "my adapter", use_rslora=True)
    code, out, _ = run(capsys, "merge", "base", "my adapter", "-o", "out", "--dry-run")
    assert code == 0
    assert "my adapter (rsLoRA)" in out


# ------------------------------------------------------------------ other libraries


def test_what_other_libraries_say_is_said_by_us() -> None:
    code = (
        "import warnings\nfrom adapterkit.cli.output import others_speak_through_us as quiet\nquiet()\n"
        "for _ in range(3): warnings.warn('a thing\\n  went \\x1b[31mwrong', RuntimeWarning)\n"
        "import os; print(os.environ['HF_HUB_DISABLE_PROGRESS_BARS'])\n"
        "from huggingface_hub.utils import are_progress_bars_disabled; print(are_progress_bars_disabled())\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TQDM", "PYTHONWARN"))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900, env=clean)
    assert done.stderr == "warning: a thing went \\x1b[31mwrong\n"
    assert done.stdout.split() == ["1", "True"]
    asked = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, timeout=900)
    assert asked.stderr.count("RuntimeWarning") == 3


def test_every_verb_has_help_that_is_short() -> None:
    for name, verb in VERBS.items():
        assert len(verb.text) < 90, name


# ------------------------------------------------------------------ words of other tools

FOREIGN = {
    "merge_and_unload base 'my adapter'": "No such command 'merge_and_unload'. Here it is adapterkit merge --help",
    "quantize base": "No such command 'quantize'. Here it is adapterkit convert --help",
    "version": "Here it is adapterkit --version",
    "merge base 'my adapter' merged": ". If merged is the output: -o merged",
    "merge base 'my adapter' --output-dir out": "No such option '--output-dir'. Here it is -o or --out.",
    "merge --base-model base --lora 'my adapter' -o x": "given without an option: adapterkit merge BASE ADAPTER...",
    "merge base --lora 'my adapter' -o x": "given without an option: adapterkit merge BASE ADAPTER...",
    "convert --model base -o x": "given without an option: adapterkit convert SRC",
    "merge base 'my adapter' -o x.gguf -q q4_k_m": "No such option '-q'. Here it is --quant.",
    "merge base 'my adapter' -o x --torch_dtype bfloat16": "No such option '--torch_dtype'. Here it is --dtype.",
    "merge base 'my adapter' -o x --dtype half": "Did you mean 'f16'?",
    "merge base 'my adapter' -o x --dtype bfloat16": "Did you mean 'bf16'?",
    "combine 'my adapter' 'my adapter' -o x --method tis": "Did you mean 'ties'?",
    "resize 'my adapter' -o x -r 2": "No such option '-r'. Here it is --rank.",
    "merge base 'My adapter' -o x": "My adapter does not exist; did you mean my adapter?",
    "merge base ./runs/checkpoint-9 -o x": "./runs/checkpoint-9 does not exist; did you mean runs/checkpoint-5?",
    "merge base runs/checkpoint-9 -o x": "of the folders here, did you mean runs/checkpoint-5?",
    "merge base 'my adapter/adapter_config.json' -o x": "is a file that holds no tensors that are read here; give its folder",
    "verify made --base base": "Missing option '--adapter'; as in: adapterkit verify made --base base --adapter 'my adapter'",
    "serve-args runs --for vllm": "'runs' is a folder here, and not in the registry",
}


def test_words_of_other_tools_and_near_misses_say_what_is_meant(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "runs/checkpoint-5").mkdir(parents=True)
    merge("base", ["my adapter"], "made")
    wrong = {}
    for typed, said in FOREIGN.items():
        code, _, err = run(capsys, *shlex.split(typed))
        if code == 0 or said not in " ".join(err.split()):
            wrong[typed] = err
    assert wrong == {}


def test_words_of_other_tools_stand_for_what_is_there() -> None:
    """Each row leads to a verb or an option that exists, and none takes a word that is ours."""
    assert set(foreign.VERBS) <= set(VERBS)
    theirs = [word for words in foreign.VERBS.values() for word in words]
    assert len(theirs) == len(set(theirs))
    assert not set(theirs) & set(VERBS)
    flags = {flag for name in VERBS for one in _command(name).params for flag in one.opts}
    assert {flag for ours in foreign.OPTIONS for flag in ours} <= flags


def _command(name: str) -> click.Command:
    command = app.get_command(click.Context(app), name)
    assert command is not None
    return command


def test_a_quantization_that_is_none(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A word that neither a folder nor a GGUF file has is not said to be of GGUF."""
    for word in ("4bit", "nf5"):
        code, _, err = run(capsys, "merge", "base", "my adapter", "-o", "out", "--quant", word)
        assert code == 2
        assert f"'{word}' is no quantization; use " in err
        assert " nf4, " in err
    for word, meant in (("half", "f16"), ("fp16", "f16"), ("bfloat16", "bf16")):
        _, _, err = run(capsys, "merge", "base", "my adapter", "-o", "out", "--quant", word)
        assert f"'{word}' is no quantization of a folder; 16 bits are written with --dtype {meant}," in err
        with pytest.raises(UsageError, match=f"'{word}' is no quantization; did you mean '{meant.upper()}'"):
            file_type(word)
    for word in ("Q4_K_M", "q4_k"):
        assert (
            "name the output like OUT.gguf"
            in run(capsys, "merge", "base", "my adapter", "-o", "out", "--quant", word)[2]
        )
