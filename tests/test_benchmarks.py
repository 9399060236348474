"""Benchmarks that wait for an accelerator run at tiny size, and their clock counts what it says."""

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

PATH = Path(__file__).parents[1] / "benchmarks" / "true_size.py"
SECONDS = 0.2
"""Of a call of `Slow`, and of as long a way back."""


@pytest.fixture(scope="module")
def true_size() -> Any:
    spec = importlib.util.spec_from_file_location("true_size", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("part", ["record", "distill"])
def test_wan_of_random_weights_is_measured(true_size: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str):
    """Recorded or distilled by default, with its throughput and the share of time outside the denoiser."""
    out = tmp_path / "result.json"
    options = ["--num-steps", "10", "--num-trajectories", "1", "--folder", str(tmp_path)]
    monkeypatch.setattr(true_size, "DISTILLED", true_size.DISTILLED[:1])
    monkeypatch.setattr(sys, "argv", ["true_size.py", "--out", str(out), "--size", "tiny", "--only", part, *options])
    true_size.main()
    result = json.loads(out.read_text())[part]["wan21-t2v-1.3b"]
    assert 0 < result["share_outside_denoiser"] < 0.9
    if part == "record":
        seconds = result["seconds_a_trajectory"]
        assert result["denoiser_calls"] == 20 and 0 < seconds["in_denoiser"] < seconds["measured"]
        assert result["trajectories_an_hour"] == pytest.approx(3600 / seconds["measured"])
        assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    else:
        seconds = result["seconds_an_iteration"]
        assert len(seconds["measured"]) == 5
        assert all(0 < part < whole for part, whole in zip(seconds["in_denoiser"], seconds["measured"], strict=True))
        assert result["iterations_an_hour"] == pytest.approx(5 * 3600 / sum(seconds["measured"]))


class Wait(torch.autograd.Function):
    """Nothing, slowly, forth and back."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        """Wait, then the values."""
        time.sleep(SECONDS)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Wait, then their gradient."""
        time.sleep(SECONDS)
        return gradients[0]


class Slow(nn.Module):
    """A network of one weight; ends early, by an error, on negative values."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, values: Tensor) -> Tensor:
        """The values, as heavy as the weight."""
        output: Any = Wait.apply(values * self.weight)
        if (values < 0).any():
            raise ValueError
        return output


@pytest.mark.parametrize(
    ("expected", "name"),
    [(1, "forward"), (1, "early end"), (0, "outside"), (2, "backward"), (0, "head"), (1, "nested")],
)
def test_the_clock_counts_calls_and_ways_back_to_the_weights(true_size: Any, expected: int, name: str):
    denoiser, head, values = Slow(), Slow(), torch.ones(3)
    outer = nn.Sequential(denoiser)
    with true_size.denoiser_clock([outer, denoiser] if name == "nested" else [denoiser], "cpu") as spent:
        if name == "forward":
            denoiser(values)
        elif name == "nested":
            outer(values)
        elif name == "early end":
            with pytest.raises(ValueError):
                denoiser(-values)
        elif name == "outside":
            head(values)
        elif name == "backward":
            denoiser(values).sum().backward()
        else:
            head(values).sum().backward()
    assert expected * SECONDS <= spent.seconds < (expected + 1) * SECONDS
    before = spent.seconds
    denoiser(values).sum().backward()
    assert spent.seconds == before  # nothing is left behind
