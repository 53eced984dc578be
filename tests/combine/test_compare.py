"""`compare` against dense matrices, and how it is shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from models import live, load_model, make_adapter, plain_adapter, plain_base, read_tensors, write_adapter

from adapterkit import compare
from adapterkit.cli import main
from adapterkit.errors import UsageError


def delta(folder: Path, key: str) -> torch.Tensor:
    factors = read_tensors(folder)
    return 2 * factors[f"{key}.lora_B.weight"].double() @ factors[f"{key}.lora_A.weight"].double()


def overlap(x: torch.Tensor, y: torch.Tensor) -> float:
    u, v = (torch.linalg.svd(one)[0][:, :4] for one in (x, y))
    return float((u.T @ v).square().sum()) / 4


def test_every_measure_of_every_layer_and_the_total(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base", layers=2)
    one = plain_adapter(tmp_path / "a", base, seed=1)
    other = plain_adapter(tmp_path / "b", base, seed=2, modules=["q_proj"])
    report = compare([one, other], samples=None)
    assert (report.shared, len(report.layers)) == (2, 4)
    vectors: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    conflicts = []
    for layer in report.layers:
        key = f"base_model.model.{layer.module.removesuffix('.weight')}"
        if "up_proj" in layer.module:
            vectors[0].append(delta(one, key).flatten())
            vectors[1].append(torch.zeros(48 * 16, dtype=torch.float64))
            assert (layer.pairs, layer.norms[1]) == ((), 0.0)
            continue
        x, y = delta(one, key), delta(other, key)
        vectors[0].append(x.flatten())
        vectors[1].append(y.flatten())
        (pair,) = layer.pairs
        assert pair.cosine == pytest.approx(float((x * y).sum() / x.norm() / y.norm()), abs=1e-6)
        assert pair.output_overlap == pytest.approx(overlap(x, y), rel=1e-5)
        assert pair.input_overlap == pytest.approx(overlap(x.T, y.T), rel=1e-5)
        conflicts.append(float((x * y < 0).double().mean()))
        assert pair.sign_conflict == pytest.approx(conflicts[-1])
        assert layer.norms == pytest.approx((float(x.norm()), float(y.norm())), rel=1e-6)
    whole = [torch.cat(parts) for parts in vectors.values()]
    (total,) = report.total
    assert total.cosine == pytest.approx(float(whole[0] @ whole[1] / whole[0].norm() / whole[1].norm()), abs=1e-6)
    assert total.sign_conflict == pytest.approx(sum(conflicts) / 2)


def test_the_same_twice_and_its_opposite(tmp_path: Path) -> None:
    adapter = plain_adapter(tmp_path / "a", plain_base(tmp_path / "base"))
    tensors = {n: -t if "lora_B" in n else t for n, t in read_tensors(adapter).items()}
    opposite = write_adapter(tmp_path / "b", tensors)
    same, against, _ = compare([adapter, adapter, opposite]).total
    assert same.cosine == pytest.approx(1)
    assert (same.output_overlap, same.input_overlap, same.sign_conflict) == pytest.approx((1, 1, 0))
    assert against.cosine == pytest.approx(-1)
    assert (against.output_overlap, against.sign_conflict) == pytest.approx((1, 1))


def test_dora_is_compared_by_its_rows(make_base: Callable[..., Path], tmp_path: Path) -> None:
    from peft import LoraConfig

    base = make_base("llama")
    folders = [
        make_adapter(tmp_path / f"a{i}", base, LoraConfig(r=3, target_modules=["q_proj"], use_dora=not i), seed=i)
        for i in range(2)
    ]
    with pytest.raises(UsageError, match="add base="):
        compare(folders)
    before = load_model(base, double=True).state_dict()
    merged = [live(base, folder).merge_and_unload().state_dict() for folder in folders]
    for layer in compare(folders, base=base).layers:
        x, y = (one[layer.module] - before[layer.module] for one in merged)
        assert layer.pairs[0].cosine == pytest.approx(float((x * y).sum() / x.norm() / y.norm()), abs=1e-5)
        assert layer.norms == pytest.approx((float(x.norm()), float(y.norm())), rel=1e-5)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_table_the_json_and_the_page(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    folders = [str(plain_adapter(tmp_path / name, base, seed=i)) for i, name in enumerate(("a", "b", "<c>"))]

    def run(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["inspect", *arguments])
        return int(stopped.value.code or 0), capsys.readouterr().out

    page = tmp_path / "map.html"
    code, out = run(*folders, "--compare", "--html", str(page))
    assert code == 0
    assert "6 of 6 layers are changed by more than one adapter" in out
    assert out.count("up_proj") == 9  # three layers, three pairs
    report = json.loads(run(*folders, "--compare", "--json")[1])
    assert len(report["total"]) == 3
    text = page.read_text()
    parser = _Page()
    parser.feed(text)
    assert not parser.links
    assert "script" not in parser.tags
    assert "prefers-color-scheme: dark" in text
    assert "&lt;c&gt;" in text
    # a map per pair and measure with 3 rows of 2 columns, and the total of 3 pairs by 4 measures
    assert parser.tags.count("td") == 3 * 4 * 6 + 12
    assert run(*folders)[0] == 2
    assert run(folders[0], "--compare")[0] == 2
