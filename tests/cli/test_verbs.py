"""The command line as a user meets it: what each verb prints, in both forms, and how it exits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from models import edit_config, plain_adapter, plain_base, read_bytes, read_tensors

from adapterkit.cli import VERBS, app, main


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return plain_base(tmp_path / "org-base", shards=2)


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return plain_adapter(tmp_path / "adapter", base, base_model_name_or_path="someone/org-base")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one call."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


def test_help_lists_every_verb_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for verb in VERBS:
        assert re.search(rf"^  {verb}\b", out, re.MULTILINE)
    assert "130 interrupted" in out


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_has_a_worked_example(verb: str) -> None:
    shown = CliRunner().invoke(app, [verb, "--help"], prog_name="adapterkit")
    assert shown.exit_code == 0
    assert "Example:" in shown.output
    assert f"adapterkit {verb} " in shown.output or f"adapterkit {verb}\n" in shown.output


def test_merge_and_what_it_reports(
    capsys: pytest.CaptureFixture[str], base: Path, adapter: Path, tmp_path: Path
) -> None:
    code, out, _ = run(capsys, "merge", base, adapter, "-o", tmp_path / "out", "--json")
    report = json.loads(out)
    assert code == 0
    # three layers of q_proj and up_proj; the embedding, the head and three norms stay
    assert (report["tensors"], report["touched"], report["copied"]) == (11, 6, 5)
    assert report["nbytes"] == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert set(read_tensors(tmp_path / "out")) == set(read_tensors(base))

    code, out, _ = run(capsys, "merge", base, adapter, "-o", tmp_path / "again")
    assert code == 0
    assert "6 of 11 tensors changed, the rest copied" in out
    assert read_bytes(tmp_path / "again", record=True) == read_bytes(tmp_path / "out", record=True)

    # Where tensors are rewritten the output may have others than the base: one number is no share of the other.
    code, out, _ = run(capsys, "merge", base, adapter, "-o", tmp_path / "quantized", "--dtype", "f16", "--dry-run")
    assert code == 0
    assert re.search(r"6 tensors changed; of the output's \d+, \d+ are copied, the others rewritten", out)


def test_merge_dry_run_writes_nothing_and_says_the_same(
    capsys: pytest.CaptureFixture[str], base: Path, adapter: Path, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = run(capsys, "merge", base, adapter, "--dry-run", "--json")
    planned = json.loads(out)
    assert code == 0
    assert sorted(tmp_path.rglob("*")) == before
    run(capsys, "merge", base, adapter, "-o", tmp_path / "out")
    assert planned["dry_run"] is True
    assert planned["nbytes"] == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))


def test_merge_two_adapters_with_weights(
    capsys: pytest.CaptureFixture[str], base: Path, adapter: Path, tmp_path: Path
) -> None:
    other = plain_adapter(tmp_path / "other", base, seed=9)
    code, out, _ = run(capsys, "merge", base, adapter, other, "-o", tmp_path / "o", "--weight", 0.5, "--weight", -0.25)
    assert code == 0
    assert "x 0.5" in out
    assert "x -0.25" in out
    name = "model.layers.1.mlp.up_proj.weight"
    expected = read_tensors(base)[name].double()
    for folder, weight in ((adapter, 0.5), (other, -0.25)):
        factors = read_tensors(folder)
        key = f"base_model.model.{name.removesuffix('.weight')}"
        delta = factors[f"{key}.lora_B.weight"].double() @ factors[f"{key}.lora_A.weight"].double()
        expected += weight * 2 * delta  # alpha 8, rank 4
    got = read_tensors(tmp_path / "o")[name]
    assert (got != expected.bfloat16()).float().mean() < 1e-3


def test_saved_plan_executed_in_parts_gives_the_bytes_of_a_whole_run(
    capsys: pytest.CaptureFixture[str], base: Path, adapter: Path, tmp_path: Path
) -> None:
    run(capsys, "merge", base, adapter, "-o", tmp_path / "whole")
    plan = tmp_path / "plan.json"
    assert run(capsys, "merge", base, adapter, "--save-plan", plan)[0] == 0
    for part in (1, 0):
        assert run(capsys, "execute", plan, "-o", tmp_path / "parts", "--part", part)[0] == 0
        assert not (tmp_path / "parts").exists()
    assert run(capsys, "execute", plan, "-o", tmp_path / "parts", "--finish")[0] == 0
    assert read_bytes(tmp_path / "parts", record=True) == read_bytes(tmp_path / "whole", record=True)


def test_finishing_before_all_parts_are_done_is_refused(
    capsys: pytest.CaptureFixture[str], base: Path, adapter: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    run(capsys, "merge", base, adapter, "--save-plan", plan)
    run(capsys, "execute", plan, "-o", tmp_path / "out", "--part", 1)
    code, _, err = run(capsys, "execute", plan, "-o", tmp_path / "out", "--finish")
    assert code == 1
    assert "parts 0 are not done" in err
    assert not (tmp_path / "out").exists()


def test_execute_as_json(capsys: pytest.CaptureFixture[str], base: Path, adapter: Path, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    run(capsys, "merge", base, adapter, "--save-plan", plan)
    for part in (0, 1):
        code, said, err = run(capsys, "execute", plan, "-o", out, "--part", part, "--json")
        assert (code, err) == (0, "")
        found = json.loads(said)
        assert (found["part"], found["parts"]) == (part, 2)
        assert found["nbytes"] == (out.parent / ".out.partial" / found["file"]).stat().st_size
    found = json.loads(run(capsys, "execute", plan, "-o", out, "--finish", "--json")[1])
    assert found["touched"] == 6
    assert {out / name for name in found["files"]} <= set(out.iterdir())
    code, said, _ = run(capsys, "execute", plan, "-o", tmp_path / "other")
    assert code == 0
    assert "in 2 files" in said
    assert read_bytes(tmp_path / "other", record=True) == read_bytes(out, record=True)
    code, _, err = run(capsys, "execute", plan, "-o", out)
    assert (code, f"{out} exists" in err) == (1, True)
    assert not (tmp_path / ".out.partial").exists()  # refused before the work


def test_plan_of_other_inputs_is_refused(
    capsys: pytest.CaptureFixture[str], base: Path, adapter: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    run(capsys, "merge", base, adapter, "--save-plan", plan)
    plain_adapter(adapter, base, rank=2)
    code, _, err = run(capsys, "execute", plan, "-o", tmp_path / "out", "--part", 0)
    assert code == 1
    assert "changed since the plan was made" in err


def test_inspect_adapter(capsys: pytest.CaptureFixture[str], base: Path, adapter: Path) -> None:
    code, out, _ = run(capsys, "inspect", adapter, "--base", base, "--json")
    found = json.loads(out)
    # rank 4 on three q_proj of 16 x 16 and three up_proj of 48 x 16
    parameters = 3 * 4 * (16 + 16) + 3 * 4 * (48 + 16)
    weights = 2 * 40 * 16 + 3 * (16 * 16 + 48 * 16 + 16)
    assert code == 0
    assert (found["kind"], found["method"], found["parameters"]) == ("adapter", "LORA", parameters)
    assert found["share"] == pytest.approx(parameters / weights)
    assert found["ranks"] == {"4": 6}
    assert found["scalings"] == {"2": 6}
    assert found["targets"] == {"q_proj": 3, "up_proj": 3}
    assert found["base"] == "someone/org-base"
    code, out, _ = run(capsys, "inspect", adapter)
    assert "q_proj x3, up_proj x3" in out  # sorted by name
    assert "mergeable   yes" in out


def test_inspect_health(capsys: pytest.CaptureFixture[str], base: Path, tmp_path: Path) -> None:
    import torch
    from models import write_adapter

    tensors = {}
    turned = torch.linalg.qr(torch.ones(16, 16) + torch.arange(16.0).diag()).Q[:, :4].contiguous()
    for layer, b in enumerate((turned, torch.zeros(16, 4), torch.full((16, 4), float("nan")))):
        key = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors |= {f"{key}.lora_A.weight": torch.eye(16)[:4], f"{key}.lora_B.weight": b}
    adapter = write_adapter(tmp_path / "ill", tensors)
    rows = json.loads(run(capsys, "inspect", adapter, "--health", "--json")[1])["health"]
    assert [row["problem"] for row in rows] == ["", "untrained", "nan"]
    # s B A is twice a projection on four coordinates: norm 2 sqrt(4), all four directions equally strong
    assert rows[0]["norm"] == pytest.approx(4.0)
    assert rows[0]["effective_rank"] == pytest.approx(4.0)
    assert "2 of 3 modules have a problem" in run(capsys, "inspect", adapter, "--health")[1]


@pytest.mark.parametrize("layout", ["rank_major", "grouped_by_expert"])
def test_inspect_health_of_stacked_experts(layout: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Expert by expert: the norm of all deltas together, the mean of their effective ranks."""
    import torch
    from models import write_adapter

    experts, rank, rows, columns = 4, 3, 10, 12
    generator = torch.Generator().manual_seed(1)
    a = [torch.randn(rank, columns, generator=generator) for _ in range(experts)]
    b = [torch.randn(rows, rank, generator=generator) for _ in range(experts)]
    b[2].zero_()
    order = (1, 2, 0) if layout == "rank_major" else (1, 0, 2)  # of [expert, row, factor]
    key = "base_model.model.model.layers.0.mlp.experts"
    tensors = {
        f"{key}.lora_A.weight": torch.cat(a),
        f"{key}.lora_B.weight": torch.stack(b).permute(order).reshape(rows, experts * rank),
    }
    fields = {"target_parameters": ["mlp.experts.down_proj"], "lora_B_layout": layout}
    adapter = write_adapter(tmp_path / "stack", tensors, r=rank, lora_alpha=6, **fields)
    found = json.loads(run(capsys, "inspect", adapter, "--health", "--json")[1])
    (row,) = found["health"]
    values = [torch.linalg.svdvals(y.double() @ x.double()) for x, y in zip(a, b, strict=True)]
    shares = [one / one.sum() for one in values if one.sum() > 0]
    effective = sum(float(torch.exp(-(p[p > 1e-12] * p[p > 1e-12].log()).sum())) for p in shares) / experts
    assert found["ranks"] == {"3": 1}
    assert (row["rank"], row["experts"], row["problem"]) == (rank, experts, "")
    assert row["norm"] == pytest.approx(2 * float(torch.cat(values).norm()), rel=1e-6)
    assert row["effective_rank"] == pytest.approx(effective, rel=1e-6)
    assert "mlp.experts (4 experts)" in run(capsys, "inspect", adapter, "--health")[1]


def test_inspect_checkpoint(capsys: pytest.CaptureFixture[str], base: Path) -> None:
    code, out, _ = run(capsys, "inspect", base, "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["kind"], found["tensors"], len(found["files"])) == ("checkpoint", 11, 2)
    assert found["parameters"] == sum(tensor.numel() for tensor in read_tensors(base).values())
    assert "LlamaForCausalLM" in run(capsys, "inspect", base)[1]


def test_inspect_says_why_an_adapter_cannot_be_merged(capsys: pytest.CaptureFixture[str], adapter: Path) -> None:
    edit_config(adapter, alora_invocation_tokens=[1, 2])
    found = json.loads(run(capsys, "inspect", adapter, "--json")[1])
    assert "activated LoRA" in found["mergeable"]


def test_check_fits(capsys: pytest.CaptureFixture[str], base: Path, adapter: Path) -> None:
    code, out, _ = run(capsys, "check", base, adapter, "--json")
    report = json.loads(out)
    assert code == 0
    assert (report["ok"], report["touched"]) == (True, 6)
    assert [finding["code"] for finding in report["findings"]] == ["no-revision"]


def test_check_refuses_what_merge_refuses(capsys: pytest.CaptureFixture[str], adapter: Path, tmp_path: Path) -> None:
    wider = plain_base(tmp_path / "wider", width=32)
    refused, _, said = run(capsys, "merge", wider, adapter, "-o", tmp_path / "out")
    code, out, _ = run(capsys, "check", wider, adapter)
    assert code == refused == 1
    assert said.removeprefix("error: ").strip() in out
    assert "this adapter was trained on another base" in out
    assert "does not hold" in out


def test_check_other_name_is_a_warning(capsys: pytest.CaptureFixture[str], base: Path, adapter: Path) -> None:
    edit_config(adapter, base_model_name_or_path="someone/org-base-instruct", revision="abc1234")
    report = json.loads(run(capsys, "check", base, adapter, "--json")[1])
    assert report["ok"]
    assert [finding["code"] for finding in report["findings"]] == ["other-base"]


def test_check_for_servers(capsys: pytest.CaptureFixture[str], base: Path, adapter: Path) -> None:
    edit_config(adapter, alpha_pattern={"q_proj": 4}, use_rslora=True)
    code, out, _ = run(capsys, "check", base, adapter, "--for", "vllm", "--json")
    codes = [finding["code"] for finding in json.loads(out)["findings"]]
    assert code == 3
    assert "vllm-alpha_pattern" in codes
    assert "vllm-rslora" not in codes
    codes = [
        f["code"]
        for f in json.loads(run(capsys, "check", base, adapter, "--for", "llama.cpp", "--json")[1])["findings"]
    ]
    assert {"llama.cpp-alpha_pattern", "llama.cpp-rslora"} <= set(codes)
    code, _, err = run(capsys, "check", base, adapter, "--for", "nobody")
    assert code == 2
    assert "known: " in err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["merge"], 2, "Missing argument"),
        (["merge", "{base}", "{adapter}"], 2, "--out"),
        (["merge", "{base}", "{adapter}", "-o", "{tmp}/o", "--dtype", "int3"], 2, "is not one of 'auto'"),
        (
            ["merge", "{base}", "{adapter}", "-o", "{tmp}/o", "--weight", "1", "--weight", "2"],
            2,
            "2 weights for 1 adapter",
        ),
        (["merge", "{base}", "{adapter}", "-o", "{tmp}/o", "--max-shard-size", "large"], 2, "not a size"),
        (["merge", "{tmp}/nowhere", "{adapter}", "-o", "{tmp}/o"], 7, "does not exist"),
        (["merge", "{base}", "{base}", "-o", "{tmp}/o"], 2, "merged alone with weight 1 it is itself"),
        (["merge", "{adapter}", "{adapter}", "-o", "{tmp}/o"], 7, "is an adapter, not a checkpoint"),
        (["merge", "{base}", "{adapter}", "-o", "{base}"], 2, "lies in or over the input"),
        (["merge", "{base}", "{adapter}", "-o", "{base}/inside"], 2, "lies in or over the input"),
        (["nothing"], 2, "No such command"),
        (["merge", "{base}", "{adapter}", "--save-plan", "{tmp}/none/plan.json"], 1, "plan.json cannot be written"),
        (["merge", "{base}", "{adapter}", "--save-plan", "{tmp}"], 1, "is a folder"),
        (["merge", "{base}", "", "-o", "{tmp}/o"], 7, "is empty"),
        (["merge", "", "{adapter}", "-o", "{tmp}/o"], 7, "is empty"),
        (["execute", "{adapter}/adapter_model.safetensors", "-o", "{tmp}/o"], 1, "not a plan file"),
        (
            ["execute", "{adapter}/adapter_config.json", "-o", "{tmp}/o", "--part", "0", "--finish"],
            2,
            "exclude each other",
        ),
    ],
)
def test_errors_are_one_sentence_with_their_code_and_leave_nothing(
    capsys: pytest.CaptureFixture[str],
    base: Path,
    adapter: Path,
    tmp_path: Path,
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    given = [argument.format(base=base, adapter=adapter, tmp=tmp_path) for argument in arguments]
    before = sorted(tmp_path.rglob("*"))
    got, out, err = run(capsys, *given)
    assert (got, out) == (code, "")
    assert words in err
    assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before
    got, out, _ = run(capsys, *given, "--json")
    assert got == code
    assert words in json.loads(out)["error"]["message"] + json.loads(out)["error"]["hint"]


def test_results_go_to_stdout_and_progress_does_not(base: Path, adapter: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "adapterkit", "merge", base, adapter, "-o", tmp_path / "out", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONWARNINGS": "error"}
    )
    assert done.stderr == ""
    assert json.loads(done.stdout)["out"] == str(tmp_path / "out")
