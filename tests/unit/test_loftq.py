"""Experts that start from what packing has lost: against PEFT, and against the formula."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsmoelora import AdapterConfig, inject
from dsmoelora.adapters.four_bit import FrozenLinear4bit, packed, unpacked
from dsmoelora.adapters.starts.loftq import LoftqSearch, TakenOff, loftq, without
from dsmoelora.adapters.starts.svd import StartFactors
from dsmoelora.errors import ConfigError, ModelError
from dsmoelora.model.quantizing import check_packed, loftq_searches
from tests.plain_loftq import plain_loftq

bitsandbytes = pytest.importorskip("bitsandbytes", reason="the extra [quant] is not installed")


def weight_of_size(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 0.05


def kept(weight_OD: Tensor, taken: StartFactors, scale: float) -> Tensor:
    return unpacked(packed(without(weight_OD, taken, scale), torch.float32), tuple(weight_OD.shape), torch.float32)


def updates(start: StartFactors, scale: float) -> Tensor:
    return scale * start.b_EOR.double() @ start.a_EDR.double().mT


@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_one_expert_is_what_peft_makes(
    shape: tuple[int, int], iterations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT takes no scale into account, so it is 1 here; and it knows accelerators alone."""
    from peft.utils import loftq_utils

    weight_OD = weight_of_size(*shape)
    for kind in (torch.Tensor, bitsandbytes.nn.Params4bit):
        there = kind.to

        def here(self: Any, *args: Any, there: Any = there, **options: Any) -> Any:
            args, options = (
                tuple("cpu" if one == "cuda" else one for one in args),
                {key: "cpu" if one == "cuda" else one for key, one in options.items()},
            )
            return there(self, *args, **options)

        monkeypatch.setattr(kind, "to", here)
    monkeypatch.setattr(loftq_utils, "is_xpu_available", lambda: False)
    expected_OD, a_RD, b_OR = loftq_utils.loftq_init(weight_OD, 4, 8, iterations)
    monkeypatch.undo()
    config = AdapterConfig(r=8, lora_alpha=8, num_experts=1, init="loftq", loftq_iterations=iterations)
    taken, start = loftq(weight_OD, config, torch.float32)
    torch.testing.assert_close(kept(weight_OD, taken, 1.0), expected_OD)
    torch.testing.assert_close(updates(start, 1.0)[0], (b_OR @ a_RD).double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("num_experts", "num_used"), [(4, 4), (4, 2), (3, 1)])
def test_several_experts_share_the_largest_directions(num_experts: int, num_used: int) -> None:
    weight_OD = weight_of_size(96, 64)
    config = AdapterConfig(r=5, lora_alpha=7, num_experts=num_experts, top_k=num_used, init="loftq")
    taken, start = loftq(weight_OD, config, torch.float32)
    expected = plain_loftq(weight_OD, num_experts, num_used, 5, config.loftq_iterations)
    torch.testing.assert_close(kept(weight_OD, taken, config.scale).double(), expected.kept_OD)
    own_EOD = updates(start, config.scale)
    torch.testing.assert_close(own_EOD, num_used * expected.parts_EOD, rtol=1e-4, atol=1e-6)
    lengths_E = own_EOD.flatten(1).norm(dim=1)
    assert lengths_E.max() / lengths_E.min() < 1.3, "no expert speaks louder than the others"
    if num_used == num_experts:
        u, singular, v_t = torch.linalg.svd(expected.lost_OD)
        best_OD = (u[:, :20] * singular[:20]) @ v_t[:20]
        torch.testing.assert_close(own_EOD.mean(0), best_OD, rtol=1e-4, atol=1e-6)


def test_the_scale_is_the_best_for_tokens_that_use_some_of_the_experts() -> None:
    """The mean over all choices of K experts, with gates 1 / K."""
    weight_OD, num_used = weight_of_size(96, 64), 2
    config = AdapterConfig(r=4, lora_alpha=8, num_experts=4, top_k=num_used, init="loftq")
    taken, start = loftq(weight_OD, config, torch.float32)
    lost_OD = weight_OD.double() - kept(weight_OD, taken, config.scale)
    own_EOD = updates(start, config.scale)

    def error(factor: float) -> float:
        chosen = [own_EOD[list(some)].sum(0) / num_used for some in combinations(range(4), num_used)]
        return sum(float((lost_OD - factor * one).square().sum()) for one in chosen) / len(chosen)

    square_D = torch.linalg.svdvals(lost_OD).square()
    expected = square_D.sum() - num_used / 4 * square_D[:16].sum()
    assert error(1.0) == pytest.approx(float(expected), rel=1e-4)
    assert error(1.0) < min(error(0.9), error(1.1)) and error(1.0) < 0.9 * float(square_D.sum())
    assert error(2.0) > error(1.0), "the scale E"


def test_more_iterations_lose_less() -> None:
    weight_OD, errors = weight_of_size(256, 128), []
    for iterations in (1, 2, 3):
        config = AdapterConfig(r=16, lora_alpha=8, num_experts=1, init="loftq", loftq_iterations=iterations)
        taken, start = loftq(weight_OD, config, torch.float32)
        seen_OD = kept(weight_OD, taken, config.scale) + updates(start, config.scale)[0]
        errors.append(float((weight_OD - seen_OD).norm() / weight_OD.norm()))
    assert errors[0] > errors[1] > errors[2]


def test_a_weight_that_loses_nothing() -> None:
    """Its experts start at 0, not at something that is no number."""
    config = AdapterConfig(r=2, num_experts=2, top_k=1, init="loftq")
    _, start = loftq(torch.ones(64, 64), config, torch.float32)
    assert not start.a_EDR.any() and not start.b_EOR.any()


def test_a_layer_packs_what_is_left_and_remembers_the_weight_as_it_came() -> None:
    weight_OD, config = weight_of_size(96, 64), AdapterConfig(r=2, num_experts=2, top_k=1, init="loftq")
    layer = nn.Linear(64, 96, bias=False)
    layer.__class__ = FrozenLinear4bit
    assert isinstance(layer, FrozenLinear4bit)
    layer.prepare = search = LoftqSearch(config, torch.bfloat16, torch.device("cpu"))
    flat = layer.pack(weight_OD, torch.float32)
    assert search.taken is not None and search.start is not None and search.taken.a_EDR.dtype == torch.bfloat16
    taken_off = TakenOff(search.taken, config.scale)
    assert torch.equal(flat, packed(taken_off(weight_OD), torch.float32)), "as a program that reads the adapter does"
    assert layer.as_read is not None and layer.as_read[0] == weight_OD[0, 0]


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(64, 64)


def test_a_decomposition_that_fails_is_told_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ZeRO-3 rank 0 reads alone: it must not stop where the others wait for it."""

    def fail(_: Tensor) -> None:
        raise torch.linalg.LinAlgError("it does not converge")  # type: ignore[attr-defined]

    model, config = OneLayer(), AdapterConfig(r=2, num_experts=2, top_k=1, target_modules=["q_proj"], init="loftq")
    layer: Any = model.q_proj
    layer.__class__ = FrozenLinear4bit
    layer.prepare = LoftqSearch(config, torch.float32, torch.device("cpu"))
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    layer.weight = nn.Parameter(layer.pack(layer.weight.detach(), torch.float32), requires_grad=False)
    with pytest.raises(ModelError, match=r"'loftq', but what 4 bits lose of q_proj.weight has no singular.*converge"):
        check_packed(model, {0: "q_proj"})


def test_layers_that_have_no_such_start() -> None:
    config = AdapterConfig(r=2, num_experts=2, top_k=1, target_modules=["q_proj"], init="loftq")
    with pytest.raises(ConfigError, match=r"adapter\.init is 'loftq'.*another one here: its start is found while"):
        inject(OneLayer(), config)
    many = AdapterConfig(r=40, num_experts=2, top_k=1, target_modules=["q_proj"], init="loftq")
    with pytest.raises(ConfigError, match=r"num_experts x r = 2 x 40 = 80 is above min\(in, out\) = 64 of q_proj"):
        loftq_searches(OneLayer(), many, torch.float32, torch.device("cpu"))
