"""`AsFloat32`: 16-bit parameters compute as float32 ones do, and a part of one is never paid for with the whole."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from adapterkit.gguf.as_float32 import AsFloat32


class Odd(torch.nn.Module):
    """What models do with parameters: tied ends, a norm, a stack of experts, and code that asks for a dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(64, 32)
        self.norm = torch.nn.LayerNorm(32)
        self.experts = torch.nn.Parameter(torch.randn(16, 32, 32))
        self.router = torch.nn.Parameter(torch.randn(16, 32))
        self.back = torch.nn.Linear(32, 32)
        self.conv = torch.nn.Conv1d(32, 32, 3, groups=32, padding=1)
        self.scale = torch.nn.Parameter(torch.randn(32))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embed(ids)).to(self.back.weight.dtype)
        scores = functional.linear(x.float(), self.router.float()) + functional.linear(x, self.router.type(x.dtype))
        best = scores.argmax(-1)
        out = torch.zeros_like(x)
        for expert in range(4):
            out += torch.where(best[:, None] % 4 == expert, functional.linear(x, self.experts[expert]), out)
        first, second = self.experts[5].chunk(2)
        out = out + functional.linear(x, torch.cat([second, first])) + x @ self.experts.transpose(1, 2)[6]
        out = out + torch.bmm(x[None], self.experts[7:8])[0] + self.experts.permute(1, 2, 0)[0, :, 3]
        out = self.conv(out.T[None])[0].T * self.scale + torch.ones((), dtype=self.scale.dtype) / 3
        out = functional.rms_norm(self.back(out), (32,), self.scale, torch.finfo(self.scale.dtype).eps)
        mask = torch.full((1,), torch.finfo(next(self.parameters()).dtype).min, dtype=next(self.parameters()).dtype)
        return functional.linear(out + mask.clamp(-1), self.embed.weight)


def odd() -> Odd:
    torch.manual_seed(2)
    return Odd().eval()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_computes_as_float32(dtype: torch.dtype) -> None:
    model, ids = odd().to(dtype), torch.arange(40) % 64
    wide = odd().to(dtype).float()
    with torch.no_grad(), AsFloat32(model.parameters()):
        found = model(ids)
        assert (model.scale.dtype, model.scale[:2].dtype, model.router.T.dtype) == (torch.float32,) * 3
    assert {one.dtype for one in model.parameters()} == {dtype}
    with torch.no_grad():
        assert torch.equal(found, wide(ids))
        assert not torch.equal(found, model(ids).float())


def test_what_is_no_parameter_stays_as_it_is() -> None:
    model, given = torch.nn.Linear(4, 4).half(), torch.ones(3, 4).half()
    with torch.no_grad(), AsFloat32(model.parameters()):
        assert (given.dtype, (given * 2).dtype, given[0].dtype) == (torch.float16,) * 3
        assert (model.weight.shape, len(model.weight), model.weight.stride()) == ((4, 4), 4, (4, 1))
        assert model.weight.data_ptr() == model.weight[0].data_ptr() == model.weight.float().data_ptr()
        assert model.weight.to(torch.float64).dtype == torch.float64
        assert (model.weight.half() + 0).dtype == torch.float16


def test_one_expert_does_not_cost_the_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    model = odd().half()
    made: list[int] = []
    widen = torch.Tensor.float

    def seen(tensor: torch.Tensor) -> torch.Tensor:
        made.append(tensor.numel())
        return widen(tensor)

    with torch.no_grad(), AsFloat32(model.parameters()), monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "float", seen)
        functional.linear(torch.ones(2, 32), model.experts[3])
        model.embed(torch.tensor([1, 2]))
    assert made == [32 * 32, 2 * 32]
