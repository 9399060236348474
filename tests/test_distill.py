import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest
import torch
import tyro
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from accvideo.call import DenoiserCall, denoiser_blocks, layer_features, replay
from accvideo.data.dataset import TrajectoryFolder
from accvideo.discriminator import Discriminator
from accvideo.distill import MAX_SKIPPED, distill, set_learning_rates, train
from accvideo.flow import euler_step, shifted_sigmas
from accvideo.inference.student_config import read_student_config
from accvideo.student import Student, load_student
from accvideo.training.checkpoint import read_metrics
from accvideo.training.recipe import PRESETS, DistillConfig, claim_folder
from accvideo.training.start import load_denoisers, start_training
from accvideo.training.steps import Rollouts, Step, Training, accumulate, frozen, gradient, update
from accvideo.trajectory import TrajectoryBatch, collate_trajectories
from accvideo.types import UserError
from tests.recorded import record_tiny
from tests.tiny import tiny_wan_pipeline

ANYWHERE: dict[str, Any] = {
    "data": Path("data"),
    "out": Path("out"),
    "adversarial_start": 0,
    "precision": "float32",
    "device": "cpu",
}


# --- Algorithm 1 on a toy that can be computed by hand ---


class ConstantDenoiser(nn.Module):
    """Its velocity is one number; its only block passes the latents on."""

    dtype = torch.float32
    _no_split_modules = ("Identity",)

    def __init__(self, velocity: float) -> None:
        super().__init__()
        self.velocity = nn.Parameter(torch.tensor(velocity))
        self.blocks = nn.ModuleList([nn.Identity()])

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool) -> tuple[Tensor]:  # noqa: D102
        return (self.velocity.expand_as(self.blocks[0](hidden_states)),)


class Scale(nn.Module):
    """A head whose logit is a multiple of the feature."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, frames: Tensor) -> Tensor:  # noqa: D102
        return self.scale * frames


def toy_batch(number: int) -> TrajectoryBatch:
    """Two samples of three states, each of which is one number."""
    states = torch.randn(2, 3, 1, 1, generator=torch.Generator().manual_seed(number))
    call = DenoiserCall({"timestep": torch.ones(2)}, {})
    return TrajectoryBatch(states, (call, call), ("transformer", "transformer"), ("", ""), (0, 1))


def toy_batches(start: int) -> Iterator[TrajectoryBatch]:
    number = start
    while True:
        yield toy_batch(number)
        number += 1


def toy_training(config: DistillConfig) -> Training:
    training = start_training(
        config, {"transformer": ConstantDenoiser(0.3)}, torch.tensor([1.0, 0.6, 0.0]), [toy_batch(0)]
    )
    assert training.discriminator is not None
    training.discriminator.center.zero_()
    training.discriminator.scale.fill_(1.0)
    training.discriminator.heads = nn.ModuleList([Scale(0.7), Scale(-0.4)])
    training.student_optimizer = torch.optim.SGD(training.student.trained().values())
    training.head_optimizer = torch.optim.SGD(training.discriminator.heads.parameters())
    return training


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


@pytest.mark.parametrize("is_fresh", [False, True])
@pytest.mark.parametrize("how", ["alternating", "joint", "shared"])
def test_the_updates_are_those_of_algorithm_1_in_its_order(
    how: Literal["alternating", "joint", "shared"], is_fresh: bool
):
    """And those of its variants."""
    weight, rate, head_rate, sigmas = 0.5, 0.1, 0.2, [1.0, 0.6, 0.0]
    config = DistillConfig(
        **ANYWHERE,
        full=True,
        num_iterations=6,
        learning_rate=rate,
        schedule="constant",
        head_learning_rate=head_rate,
        adversarial_weight=weight,
        max_gradient_norm=1e9,
        update=how,
        fresh_rollouts=is_fresh,
    )
    training = toy_training(config)
    seen: list[list[float]] = []

    def look(line: dict[str, Any]) -> None:
        assert training.discriminator is not None
        numbers = [*training.student.trained().values(), *training.discriminator.heads.parameters()]
        seen.append([parameter.item() for parameter in numbers])

    train(config, training, torch.tensor(sigmas), toy_batches, log=look)

    theta, heads = 0.3, [0.7, -0.4]
    noise_source = torch.Generator().manual_seed(config.seed)
    latents, record = [], torch.empty(0)
    for iteration in range(6):
        k = iteration % 2
        gap = sigmas[k + 1] - sigmas[k]
        states = toy_batch(iteration).states.flatten(1)
        targets = ((states[:, k + 1] - states[:, k]) / gap).tolist()
        gradient = sum(2 * (theta - target) for target in targets) / 2
        if k == 0 or is_fresh:  # fresh noise, and the record whose latents are the real ones throughout the sweep
            fresh, record = torch.randn(2, 1, 1, generator=noise_source).flatten().tolist(), states
            latents = record[:, 0].tolist() if how == "shared" else fresh
        if k == 1 and is_fresh:
            latents = [value + (sigmas[1] - sigmas[0]) * theta for value in latents]
        if how == "alternating":
            theta -= rate * gradient
        if how == "shared":  # the target leads from where the student is to the record's next state
            pairs = zip(latents, record[:, k + 1].tolist(), strict=True)
            gradient = sum(2 * (theta - (real - value) / gap) for value, real in pairs) / 2
        latents = [value + gap * theta for value in latents]
        adversarial = weight * sum(-sigmoid(-heads[k] * fake) * heads[k] * gap for fake in latents) / 2
        theta -= rate * (adversarial if how == "alternating" else gradient + adversarial)
        real = record[:, k + 1].tolist()
        pushes = sum(sigmoid(heads[k] * fake) * fake for fake in latents) - sum(
            sigmoid(-heads[k] * x) * x for x in real
        )
        heads[k] -= head_rate * weight * pushes / 2
        assert seen[iteration] == pytest.approx([theta, *heads], abs=1e-5)


def test_the_adversarial_half_starts_with_a_whole_sweep():
    def is_judged(**settings: Any) -> list[bool]:
        config = DistillConfig(**ANYWHERE | {"full": True, "num_iterations": 8} | settings)
        lines: list[dict[str, Any]] = []
        train(config, toy_training(config), torch.tensor([1.0, 0.6, 0.0]), toy_batches, log=lines.append)
        return ["head_loss" in line for line in lines]

    assert is_judged(adversarial_start=3) == [False] * 4 + [True] * 4
    assert is_judged(adversarial_start=None) == [False] * 6 + [True] * 2
    assert is_judged(adversarial_start=3, fresh_rollouts=True) == [False] * 3 + [True] * 5


def test_a_loss_leaves_the_gradients_of_frozen_heads_alone():
    """The student's loss passes through the heads and must leave nothing there."""
    training = toy_training(DistillConfig(**ANYWHERE, full=True))
    assert isinstance(training.discriminator, Discriminator)
    batch, rollouts = toy_batch(0), Rollouts(2, seed=0)
    rollouts.start([batch], number=0)
    fake = rollouts.advance(training.student, torch.tensor([1.0, 0.6, 0.0]), Step(0, 1))
    features = training.discriminator.features(fake.latents, batch, 0)
    with frozen(training.discriminator):
        logits = training.discriminator.logits(features, 0)
    accumulate(logits.mean())
    assert all(parameter.grad is None for parameter in training.discriminator.parameters())
    assert all(parameter.requires_grad for parameter in training.discriminator.parameters())
    assert all(parameter.grad is not None for parameter in training.student.trained().values())
    assert not rollouts.queues[1][0].latents.requires_grad  # only one step has a gradient


def test_gradients_are_clipped_and_a_gradient_that_is_not_finite_is_no_step():
    parameter = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    accumulate((parameter * torch.tensor([30.0, 40.0])).sum())
    assert update(optimizer, max_norm=1.0) == pytest.approx(50)
    assert parameter.tolist() == pytest.approx([2.4, 3.2], abs=1e-5) and parameter.grad is None
    accumulate((parameter * torch.tensor([math.nan, 1.0])).sum())
    assert update(optimizer, max_norm=1.0).isnan()
    assert parameter.tolist() == pytest.approx([2.4, 3.2], abs=1e-5) and parameter.grad is None


def test_a_loss_that_is_not_finite_is_no_step_even_if_its_gradient_is_finite():
    parameter = nn.Parameter(torch.tensor([3.0]))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    loss = parameter.sum() + math.inf
    assert torch.autograd.grad(loss, parameter, retain_graph=True)[0].isfinite()
    accumulate(loss)
    assert not update(optimizer, max_norm=1.0).isfinite() and parameter.item() == 3


def test_gradients_of_two_losses_add_up_and_each_has_its_norm():
    parameter, line = nn.Parameter(torch.tensor([1.0, 1.0])), dict[str, Tensor]()
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    for name, direction in {"first": [3.0, 0.0], "second": [0.0, 4.0]}.items():
        with gradient(optimizer, line, name):
            for _ in range(2):
                accumulate((parameter * torch.tensor(direction)).sum() / 2)
    assert {name: norm.item() for name, norm in line.items()} == {"first": 3, "second": 4}
    assert update(optimizer, max_norm=math.inf).item() == 5 and parameter.tolist() == [-2, -3]


def test_bad_batches_are_skipped_and_no_checkpoint_is_written_among_them():
    """Two of them pass without a trace in the weights; when no good one comes any more, the run stops."""
    config = DistillConfig(**ANYWHERE, full=True, num_iterations=40, save_every=2)
    training, saved, lines = toy_training(config), [], []

    def batches(start: int) -> Iterator[TrajectoryBatch]:
        for number, batch in enumerate(toy_batches(start), start):
            bad = number in (4, 5) or number >= 11
            yield replace(batch, states=batch.states + math.inf) if bad else batch

    with pytest.raises(UserError, match="iterations up to 2.: the training has diverged"):
        train(
            config, training, torch.tensor([1.0, 0.6, 0.0]), batches,
            log=lambda line: lines.append(line | {"skipped": training.num_skipped_in_a_row}),
            save=lambda: saved.append(training.iteration),
        )  # fmt: skip
    assert saved == [2, 4, 8, 10]
    assert [line["iteration"] for line in lines if line["skipped"]] == [4, 5, *range(11, 11 + MAX_SKIPPED - 1)]
    assert all(parameter.isfinite() for parameter in training.student.trained().values())


def test_learning_rates_warm_up_and_fall():
    config = DistillConfig(**ANYWHERE, full=True, num_iterations=14, warmup_iterations=4, learning_rate=1.0)
    training, rates = toy_training(config), []
    for training.iteration in range(14):
        set_learning_rates(config, training)
        rates.append(training.student_optimizer.param_groups[0]["lr"])
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[9] == pytest.approx(0.5) and rates[4:] == sorted(rates[4:], reverse=True) and 0 < rates[-1] < 0.05


# --- A teacher known in closed form ---


class MixtureTeacher:
    """The exact flow of 8 narrow Gaussians on a circle."""

    def __init__(self) -> None:
        angles = torch.arange(8) * math.pi / 4
        self.means, self.deviation = 2 * torch.stack([angles.cos(), angles.sin()], dim=1), 0.05

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        """E[noise - data | x] at `sigma`."""
        variance = (1 - sigma) ** 2 * self.deviation**2 + sigma**2
        offset = x[:, None] - (1 - sigma) * self.means
        weights = (-offset.square().sum(2) / (2 * variance)).softmax(1)
        slope = (sigma - (1 - sigma) * self.deviation**2) / variance
        return (weights[..., None] * (slope * offset - self.means)).sum(1)

    def trajectory(self, noise: Tensor, num_steps: int) -> Tensor:
        """States of the Euler method, `[batch, num_steps + 1, 2]`."""
        states, sigmas = [noise], shifted_sigmas(num_steps).tolist()
        for sigma, next_sigma in zip(sigmas, sigmas[1:], strict=False):
            states.append(euler_step(states[-1], self.velocity(states[-1], sigma), sigma, next_sigma))
        return torch.stack(states, dim=1)

    def share_in_modes(self, x: Tensor) -> float:
        """Share of the points within 0.2 of a mode."""
        return ((x[:, None] - self.means).norm(dim=2).amin(1) < 0.2).float().mean().item()


class MixtureDenoiser(nn.Module):
    """A small MLP."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool) -> tuple[Tensor]:  # noqa: D102
        return (self.layers(torch.cat([hidden_states, timestep[:, None]], dim=1)),)


def test_a_distilled_student_beats_the_teacher_at_few_steps():
    """Two steps from noise to 8 modes: the teacher's Euler steps end between them, the student's in them."""
    torch.manual_seed(0)
    teacher, sigmas = MixtureTeacher(), shifted_sigmas(2)
    states = teacher.trajectory(torch.randn(20_000, 2), num_steps=48)[:, ::24]
    test, states = states[:4000], states[4000:]

    def batch(states: Tensor) -> TrajectoryBatch:
        calls = tuple(DenoiserCall({"timestep": sigmas[k].expand(len(states))}, {}) for k in range(2))
        return TrajectoryBatch(states, calls, ("transformer",) * 2, (), ())

    def batches(start: int) -> Iterator[TrajectoryBatch]:
        generator = torch.Generator().manual_seed(0)
        while True:
            yield batch(states[torch.randint(len(states), (256,), generator=generator)])

    config = DistillConfig(**ANYWHERE, full=True, num_iterations=2000, learning_rate=2e-3, adversarial_weight=0)
    training = start_training(config, {"transformer": MixtureDenoiser()}, sigmas, [batch(test)])
    lines: list[dict[str, Any]] = []
    train(config, training, sigmas, batches, [batch(test)], lines.append)

    few_steps = teacher.trajectory(test[:, 0], num_steps=2)[:, -1]
    student, latents = training.student, test[:, 0]
    with torch.no_grad():
        for k in range(2):
            velocity = student.velocity("transformer", batch(test).calls[k], latents)
            latents = euler_step(latents, velocity, float(sigmas[k]), float(sigmas[k + 1]))
    errors = {
        name: (x - test[:, -1]).square().mean().sqrt() for name, x in {"few": few_steps, "student": latents}.items()
    }
    assert lines[-1]["latent_error"] == pytest.approx(errors["student"].item() ** 2, rel=1e-4)
    assert errors["few"] > 0.3 and errors["student"] < 0.6 * errors["few"]
    assert teacher.share_in_modes(few_steps) < 0.02 and teacher.share_in_modes(latents) > 0.3


# --- The stage as a whole, on a tiny Wan ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> TrajectoryFolder:
    return record_tiny(tmp_path_factory.mktemp("teacher"))


def tiny_config(folder: TrajectoryFolder, out: Path, **settings: Any) -> DistillConfig:
    defaults: dict[str, Any] = {
        "num_iterations": 13,
        "batch_size": 2,
        "num_validation": 2,
        "validate_every": 5,
        "save_every": 3,
        "lora_rank": 2,
        "schedule": "constant",
        "adversarial_start": 0,
        "precision": "float32",
        "device": "cpu",
    }
    return DistillConfig(data=folder.path, out=out, **defaults | settings)


def tensors_of(out: Path) -> dict[str, Tensor]:
    return {
        f"{path.name}/{name}": t for path in sorted(out.glob("**/*.safetensors")) for name, t in load_file(path).items()
    }


def metrics_of(out: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(out / "metrics.jsonl")]


@pytest.mark.parametrize(
    "settings",
    [
        {"update": "alternating", "ema_decay": 0.8, "head_updates": 2},
        {"update": "joint", "full": True, "keep_best": True, "shared_head": True, "num_student_steps": (3, 1)},
        {"every_state": True, "num_student_steps": (2,), "adversarial_start": 5},
        {"loss": "consistency", "num_student_steps": (1, 2), "adversarial_start": 4},
        {"loss": "correction", "num_student_steps": (2, 1), "full": True, "adversarial_weight": 0},
    ],
)
def test_a_killed_run_goes_on_to_the_very_same_student(
    folder: TrajectoryFolder, tmp_path: Path, settings: dict[str, Any]
):
    """A kill -9 at several moments, then the same command: metrics and weights are bit-identical."""
    whole, killed = (tiny_config(folder, tmp_path / name, **settings) for name in ("whole", "killed"))
    distill(whole)
    for num_lines in (2, 6, 10, 13):
        if (child := os.fork()) == 0:
            with (tmp_path / "log").open("w") as sink, redirect_stdout(sink):
                os.dup2(sink.fileno(), 2)
                distill(killed)
            os._exit(0)
        while len(read_metrics(killed.out / "metrics.jsonl")) < num_lines:
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert not (killed.out / "student.json").exists()
    distill(killed)
    assert metrics_of(killed.out) == metrics_of(whole.out)
    assert len([line for line in metrics_of(whole.out) if "keypoint" in line]) == 13
    expected, found = tensors_of(whole.out), tensors_of(killed.out)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_metrics_name_every_quantity_and_key_point(folder: TrajectoryFolder, tmp_path: Path):
    distill(tiny_config(folder, tmp_path / "student", update="alternating"))
    lines = read_metrics(tmp_path / "student/metrics.jsonl")
    steps = [line for line in lines if "keypoint" in line]
    assert [line["keypoint"] for line in steps] == [0, 1, 2, 3, 4] * 2 + [0, 1, 2]
    expected = {
        "trajectory_loss",
        "generator_loss",
        "head_loss",
        "real_accuracy",
        "fake_accuracy",
        "logit_gap",
        "seconds",
    }
    expected |= {"gradient_norm", "trajectory_gradient_norm", "adversarial_gradient_norm", "head_gradient_norm"}
    expected |= {"iteration", "keypoint", "num_skipped"}
    assert all(line.keys() == expected for line in steps)
    validations = [line for line in lines if "latent_error" in line]
    assert [line["iteration"] for line in validations] == [4, 9, 12]
    assert all(len(line["validation_loss"]) == 5 for line in validations)


def test_further_head_updates_teach_the_heads_alone(folder: TrajectoryFolder, tmp_path: Path):
    """With a student that stays as it is, they begin with the same judgement, and end with a better one."""
    lines = {}
    for number in (1, 8):
        config = tiny_config(folder, tmp_path / str(number), head_updates=number, learning_rate=0.0, num_iterations=40)
        distill(config)
        lines[number] = [line for line in metrics_of(config.out) if "keypoint" in line]
        for line in lines[number]:
            del line["head_gradient_norm"]  # that of the last update
    assert lines[1][:5] == lines[8][:5]  # each head's first update comes after it was measured
    last = {number: sum(line["head_loss"] for line in each[-5:]) for number, each in lines.items()}
    assert last[8] < 0.8 * last[1]


def test_a_run_of_an_earlier_version_goes_on_without_its_missing_options(folder: TrajectoryFolder, tmp_path: Path):
    config = tiny_config(folder, tmp_path / "out", num_iterations=2)
    distill(config)
    path = config.out / "config.json"
    earlier = json.loads(path.read_text())
    del earlier["head_updates"]
    path.write_text(json.dumps(earlier))
    assert distill(config)["num_iterations"] == 2
    with pytest.raises(UserError, match="head_updates 1, now 2"):
        distill(replace(config, head_updates=2))


def test_only_the_denoiser_is_loaded_and_it_learns(tmp_path: Path):
    """Text encoder and VAE may be gone; the loss on held-out trajectories falls."""
    folder = record_tiny(tmp_path)
    for part in ("text_encoder", "vae", "tokenizer"):
        shutil.rmtree(tmp_path / "teacher" / part)
    distill(
        tiny_config(
            folder, tmp_path / "student", num_iterations=40, learning_rate=3e-3, validate_every=5, adversarial_weight=0
        )
    )
    errors = [
        line["latent_error"] for line in read_metrics(tmp_path / "student/metrics.jsonl") if "latent_error" in line
    ]
    assert errors[-1] < 0.8 * errors[0]


def test_weight_0_leaves_the_adversarial_half_out(folder: TrajectoryFolder, tmp_path: Path):
    distill(tiny_config(folder, tmp_path / "student", adversarial_weight=0, full=True))
    assert not any("head_loss" in line for line in read_metrics(tmp_path / "student/metrics.jsonl"))
    assert not any(name.startswith("heads") for name in tensors_of(tmp_path / "student"))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_lora_is_trained_on_a_quantized_base(folder: TrajectoryFolder, tmp_path: Path, checkpointing: bool):
    """Frozen weights take a byte each, those that train stay float32, and it learns as without; full weights cannot."""
    pytest.importorskip("torchao")
    denoisers = load_denoisers(folder.manifest, "int8")
    student = Student(denoisers, lora_rank=2)
    linear: Any = denoisers["transformer"].get_submodule("blocks.0.attn1.to_q.base_layer")
    assert linear.weight.qdata.dtype == torch.int8
    assert {parameter.dtype for parameter in student.trained().values()} == {torch.float32}

    lines = []
    for name, quantization in {"plain": None, "int8": "int8"}.items():
        settings = {"quantization": quantization, "gradient_checkpointing": checkpointing, "learning_rate": 3e-3}
        distill(tiny_config(folder, tmp_path / name, num_iterations=10, **settings))
        lines.append([line for line in metrics_of(tmp_path / name) if "keypoint" in line])
    assert tensors_of(tmp_path / "int8").keys() == tensors_of(tmp_path / "plain").keys()
    for plain, quantized in zip(*lines, strict=True):
        assert quantized["trajectory_loss"] == pytest.approx(plain["trajectory_loss"], rel=0.05)
        assert quantized["trajectory_loss"] != plain["trajectory_loss"]
        assert quantized["gradient_norm"] == pytest.approx(plain["gradient_norm"], rel=0.2)
    load_student(tmp_path / "int8")


def test_quantization_that_cannot_be_is_refused_before_anything_is_written(
    folder: TrajectoryFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(UserError, match="quantized weights cannot be trained"):
        tiny_config(folder, tmp_path / "student", quantization="int8", full=True)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match="pip install torchao"):
        distill(tiny_config(folder, tmp_path / "student", quantization="int8"))
    assert not (tmp_path / "student").exists()


def test_gradient_checkpointing_bfloat16_and_two_experts_run_together(tmp_path: Path):
    folder = record_tiny(tmp_path, scheduler="unipc", experts=2)
    for full in (False, True):
        out = tmp_path / f"student-{full}"
        settings = {"full": full, "gradient_checkpointing": True, "precision": "bfloat16", "num_iterations": 6}
        distill(tiny_config(folder, out, **settings))
        load_student(out)


def test_blocks_are_compiled_once_for_all_of_a_kind(folder: TrajectoryFolder):
    """Counted by a backend that takes the graphs as they are; the features' hooks lie outside of them."""
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    batch = collate_trajectories([folder[0], folder[1]])
    torch._dynamo.reset()
    with mock.patch("torch.compile", partial(torch.compile, backend=backend)):
        training = start_training(
            tiny_config(folder, Path(), compile=True),
            load_denoisers(folder.manifest),
            folder.manifest.key_sigmas,
            [batch],
        )
    student, discriminator = training.student, training.discriminator
    assert discriminator is not None and len(denoiser_blocks(student.denoisers["transformer"])) > 1
    graphs.clear()
    for keypoint in (0, 1, 0, 1):
        student.velocity("transformer", batch.calls[keypoint], batch.state(keypoint))
    assert len(graphs) == 2  # of the first block, whose input has no gradient, and of the others
    for keypoint in (0, 1, 0, 1):
        discriminator.features(batch.state(keypoint).requires_grad_(), batch, keypoint)
    assert len(graphs) == 3  # adapters are off


def test_a_finished_student_is_left_alone(folder: TrajectoryFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = tiny_config(folder, tmp_path / "student")
    first = distill(config)
    before = {path: path.read_bytes() for path in (tmp_path / "student").rglob("*") if path.is_file()}
    second = distill(config)
    captured = capsys.readouterr()
    assert "finished" in captured.err and captured.out == ""
    assert before == {path: path.read_bytes() for path in (tmp_path / "student").rglob("*") if path.is_file()}
    assert second["latent_error"] == first["latent_error"]


def test_other_settings_in_the_folder_are_refused_by_name(folder: TrajectoryFolder, tmp_path: Path):
    config = tiny_config(folder, tmp_path / "student")
    distill(config)
    with pytest.raises(UserError, match=r"batch_size 2, now 3, seed 0, now 5"):
        distill(replace(config, batch_size=3, seed=5))


def test_a_folder_that_holds_something_else_is_refused(folder: TrajectoryFolder, tmp_path: Path):
    (tmp_path / "student").mkdir()
    (tmp_path / "student/thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds no run"):
        distill(tiny_config(folder, tmp_path / "student"))
    assert [path.name for path in (tmp_path / "student").iterdir()] == ["thesis.tex"]


def test_a_folder_left_by_a_run_killed_at_its_first_write_is_taken(folder: TrajectoryFolder, tmp_path: Path):
    config = tiny_config(folder, tmp_path / "student")
    config.out.mkdir()
    (config.out / ".config.json.tmp").write_text("{")
    claim_folder(config, folder.manifest, range(6))
    assert (config.out / "config.json").exists()
    claim_folder(replace(config, seed=3), folder.manifest, range(6))  # nothing was made by the first settings
    assert json.loads((config.out / "config.json").read_text())["seed"] == 3


def test_a_data_set_of_another_teacher_is_refused(tmp_path: Path):
    folder = record_tiny(tmp_path)
    tiny_wan_pipeline("dpm", seed=9).save_pretrained(tmp_path / "teacher")
    with pytest.raises(UserError, match="another teacher"):
        distill(tiny_config(folder, tmp_path / "student"))
    assert not (tmp_path / "student/metrics.jsonl").exists()
    shutil.rmtree(tmp_path / "teacher")
    with pytest.raises(UserError, match="cannot load the data set's teacher"):
        distill(tiny_config(folder, tmp_path / "student"))


@pytest.mark.parametrize("full", [False, True])
def test_training_goes_on_from_a_student(folder: TrajectoryFolder, tmp_path: Path, full: bool):
    """Before its first iteration the new student is the old one; its discriminator still sees the teacher."""
    distill(tiny_config(folder, tmp_path / "first", full=full, learning_rate=1e-2, num_iterations=10))
    further = tiny_config(folder, tmp_path / "further", full=full, start_from=str(tmp_path / "first"))
    distill(further)
    *_, last = (line for line in read_metrics(tmp_path / "first/metrics.jsonl") if "validation_loss" in line)
    start, *_ = read_metrics(further.out / "metrics.jsonl")
    assert {name: last[name] for name in start["start"]} == start["start"]

    sigmas, batch = folder.manifest.key_sigmas, next(folder.batches(2, seed=0))
    student = start_training(further, load_denoisers(folder.manifest), sigmas, [batch]).student
    teacher = load_denoisers(folder.manifest)["transformer"]
    call, latents = batch.calls[0], batch.states[:, 0]
    expected = layer_features(teacher, call, latents, 1)
    assert torch.equal(student.teacher_features("transformer", call, latents, 1), expected)
    assert not torch.equal(student.velocity("transformer", call, latents), replay(teacher, call, latents))


def test_whole_weights_may_be_a_student_of_another_teacher(folder: TrajectoryFolder, tmp_path: Path):
    """As when a student of a student is trained on with the first teacher: all that is left of its own are weights."""
    other = record_tiny(tmp_path, teacher_seed=1)
    assert other.manifest.fingerprints != folder.manifest.fingerprints
    distill(tiny_config(other, tmp_path / "first", full=True, num_iterations=2))
    further = tiny_config(folder, tmp_path / "further", full=True, start_from=str(tmp_path / "first"))
    distill(further)
    batch = next(folder.batches(2, seed=0))
    started = start_training(further, load_denoisers(folder.manifest), folder.manifest.key_sigmas, [batch]).student
    saved = load_file(tmp_path / "first/transformer/diffusion_pytorch_model.safetensors")
    assert saved.keys() == {name.removeprefix("transformer.") for name in started.trained()}
    assert all(torch.equal(saved[name.removeprefix("transformer.")], p) for name, p in started.trained().items())
    assert read_student_config(further.out).fingerprints == folder.manifest.fingerprints


def test_only_students_of_the_same_kind_and_shape_can_be_gone_on_from(folder: TrajectoryFolder, tmp_path: Path):
    distill(tiny_config(folder, tmp_path / "first", num_iterations=1))
    distill(tiny_config(record_tiny(tmp_path, teacher_seed=1), tmp_path / "other", num_iterations=1))
    for settings, message in (
        ({"start_from": str(tmp_path / "other")}, "is a LoRA for .* their denoisers differ"),
        ({"start_from": "playground-student", "full": True}, "built otherwise .* is .* there and .* here"),
        ({"start_from": str(tmp_path / "first"), "lora_rank": 3}, "was trained with --no-full --lora-rank 2"),
        ({"start_from": str(tmp_path / "first"), "full": True}, "was trained with --no-full --lora-rank 2"),
        ({"start_from": str(tmp_path)}, "holds no finished student"),
    ):
        with pytest.raises(UserError, match=message):
            distill(tiny_config(folder, tmp_path / "student", **settings))
        assert not (tmp_path / "student/metrics.jsonl").exists()

    # A LoRA of a version that adapted other layers.
    path = tmp_path / "first/pytorch_lora_weights.safetensors"
    kept = dict(list(load_file(path).items())[1:])
    save_file(kept, path, safe_open(path, "pt").metadata())
    with pytest.raises(UserError, match=r"another version .* \(1 of .* missing there"):
        distill(tiny_config(folder, tmp_path / "student", start_from=str(tmp_path / "first")))


def test_only_kept_trajectories_are_learned_from(tmp_path: Path):
    """The others are not even read; with all of them kept the student is the same bit for bit."""
    folder = record_tiny(tmp_path)
    keep = tmp_path / "keep.txt"
    keep.write_text("5\n0\n1\n2\n3\n4\n")
    for name, settings in (("all", {"keep": keep}), ("plain", {})):
        distill(tiny_config(folder, tmp_path / name, **settings))
    assert metrics_of(tmp_path / "all") == metrics_of(tmp_path / "plain")
    (tmp_path / "data/000001.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="000001"):
        distill(tiny_config(folder, tmp_path / "damaged"))
    keep.write_text("0\n2\n3\n5")
    distill(tiny_config(folder, tmp_path / "some", keep=keep))
    assert metrics_of(tmp_path / "some") != metrics_of(tmp_path / "plain")
    keep.write_text("0\n2\n3\n4")
    with pytest.raises(UserError, match="other settings .kept"):
        distill(tiny_config(folder, tmp_path / "some", keep=keep))


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "is empty"), ("0\n6\n", '"6" is no number of a trajectory; .* holds 0 to 5'), ("first", "no number"),
     ("-1", "no number"), (None, "cannot read"), ("2", "holds 1 trajectories to learn from and num_validation is 2")],
)  # fmt: skip
def test_files_of_kept_trajectories_that_make_no_sense_are_refused(
    folder: TrajectoryFolder, tmp_path: Path, text: str | None, message: str
):
    if text is not None:
        (tmp_path / "keep.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        distill(tiny_config(folder, tmp_path / "student", keep=tmp_path / "keep.txt"))
    assert not (tmp_path / "student/metrics.jsonl").exists()


def test_at_least_one_trajectory_must_be_left_to_train_on(folder: TrajectoryFolder, tmp_path: Path):
    with pytest.raises(UserError, match="holds 6 trajectories to learn from and num_validation is 6"):
        distill(tiny_config(folder, tmp_path / "student", num_validation=6))


def test_a_training_that_diverges_stops_and_says_so(folder: TrajectoryFolder, tmp_path: Path):
    with pytest.raises(UserError, match=f"no finite gradient in {MAX_SKIPPED} iterations"):
        distill(tiny_config(folder, tmp_path / "student", num_iterations=50, learning_rate=1e30))
    assert not (tmp_path / "student/student.json").exists()


def test_patience_ends_the_run_and_the_best_student_is_kept(folder: TrajectoryFolder, tmp_path: Path):
    """A rate at which the student soon gets worse."""
    settings = {"num_iterations": 200, "learning_rate": 0.3, "validate_every": 1, "patience": 4, "keep_best": True}
    summary = distill(tiny_config(folder, tmp_path / "student", **settings))
    errors = [
        line["latent_error"] for line in read_metrics(tmp_path / "student/metrics.jsonl") if "latent_error" in line
    ]
    best = errors.index(min(errors))
    assert len(errors) == best + 5 == summary["num_iterations"] < 200
    distill(tiny_config(folder, tmp_path / "reference", num_iterations=best + 1, learning_rate=0.3))
    name = "pytorch_lora_weights.safetensors"
    expected, found = (load_file(tmp_path / each / name) for each in ("reference", "student"))
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())


def test_validation_trajectories_are_not_trained_on(
    folder: TrajectoryFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    drawn: set[int] = set()
    original = TrajectoryFolder.batches

    def watched(*args: Any) -> Iterator[TrajectoryBatch]:
        for batch in original(*args):
            drawn.update(batch.indices)
            yield batch

    monkeypatch.setattr(TrajectoryFolder, "batches", watched)
    distill(tiny_config(folder, tmp_path / "student", num_validation=2))
    assert len(drawn) == 4


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_make_a_small_step(folder: TrajectoryFolder, tmp_path: Path, name: str):
    preset = PRESETS[name](data=folder.path, out=tmp_path / "student")
    distill(replace(preset, num_iterations=2, batch_size=1, num_validation=0, precision="float32", device="cpu"))
    assert json.loads((tmp_path / "student/config.json").read_text())["adversarial_weight"] == preset.adversarial_weight


def test_the_papers_own_settings():
    paper = PRESETS["paper"](data=Path("data"), out=Path("out"))
    assert (paper.num_iterations, paper.batch_size, paper.learning_rate, paper.head_learning_rate) == (
        1200,
        32,
        5e-6,
        5e-6,
    )
    assert (paper.adversarial_weight, paper.update, paper.adversarial_loss) == (0.1, "alternating", "nonsaturating")
    assert paper.full and not paper.shared_head and paper.ema_decay == 0 and paper.adversarial_start == 0


def test_the_command_line_knows_every_setting(capsys: pytest.CaptureFixture[str]):
    config = tyro.cli(
        DistillConfig, args=["data", "--out", "o", "--full", "--batch-size", "4", "--feature-layers", "8", "5"]
    )
    assert config == DistillConfig(data="data", out=Path("o"), full=True, batch_size=4, feature_layers=(8, 5))
    with pytest.raises(SystemExit):
        tyro.cli(DistillConfig, args=["--help"])
    assert "lambda_adv" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"head_updates": 0}, "head_updates is 0; the least is 1"),
        ({"keep_best": True, "num_validation": 0}, "held-out"),
    ],
)
def test_settings_without_sense_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        DistillConfig(**ANYWHERE, **settings)


def test_a_full_student_keeps_its_teacher_only_if_it_is_asked_for():
    without = Student({"transformer": ConstantDenoiser(1.0)}, None, keep_teacher=False)
    assert without.teachers["transformer"] is without.denoisers["transformer"]
