import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from accvideo import cli
from accvideo.plan import (
    ATTENTION_SHARE,
    BASE_BYTES,
    FULL_STATE_BYTES,
    GPUS,
    LORA_STATE_BYTES,
    MATMUL_SHARE,
    VAE_SHARE,
    PlanConfig,
    VideoCosts,
    call_cost,
    consistency_calls,
    count_parameters,
    count_video,
    covered,
    decode_cost,
    denoiser_seconds,
    distilling_bytes,
    plan,
    training_cost,
    trajectory_bytes,
    video_seconds,
    whole,
)
from accvideo.planning.cost import measure
from accvideo.planning.networks import Network
from accvideo.presets import PRESETS, Preset, meta
from accvideo.student import Student
from accvideo.training.consistency import consistency_loss
from accvideo.training.guidance import Guidance, GuidedTeacher
from accvideo.training.steps import Step, paired_loss
from accvideo.trajectory import TrajectoryBatch, trajectory_name
from accvideo.types import UserError
from tests.recorded import record_tiny
from tests.tiny import wan_transformer

PUBLISHED = {
    "hunyuan-720p": (3234, 380),
    "hunyuan-544p": (704, 91),
    "wan21-t2v-14b": (932, 97),
    "wan21-i2v-14b": (768, 112),
}
"""Seconds of a video on one A100, teacher and student (arXiv:2503.19462, Table 1, and AccVideo's README)."""


@cache
def costs(name: str) -> VideoCosts:
    return count_video(PRESETS[name])


def tiny(**changes: Any) -> Preset:
    """The tiny Wan of `record_tiny` as a preset."""
    config = {name: value for name, value in wan_transformer().config.items() if not name.startswith("_")}
    settings = {
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "num_steps": 10,
        "num_student_steps": 5,
        "num_text_tokens": 12,
        "denoiser": Network("WanTransformer3DModel", config, depth=("num_layers",)),
    }
    return replace(PRESETS["wan21-t2v-14b"], **settings | changes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_times_are_predicted_within_a_quarter(name: str):
    preset = PRESETS[name]
    calls = preset.num_steps * preset.calls_per_step, preset.num_student_steps
    predicted = [video_seconds(preset, costs(name), GPUS["a100"], number).total for number in calls]
    assert predicted == pytest.approx(PUBLISHED[name], rel=0.25)
    assert predicted[0] / predicted[1] == pytest.approx(PUBLISHED[name][0] / PUBLISHED[name][1], rel=0.25)


def test_published_training_time_is_predicted_within_a_quarter():
    """12 days on 8 A100 for 1,200 iterations of 32: nothing of the model was fitted on it."""
    training = whole(PRESETS["hunyuan-544p"], lambda *depths: training_cost(PRESETS["hunyuan-544p"], *depths))
    days = 1200 * 32 * denoiser_seconds(training, GPUS["a100"]) / 8 / 86400
    assert days == pytest.approx(12, rel=0.25)


def published_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Seconds at the A100's peak of matrix products, attention and VAE, and the published ones; a row a video."""
    rows, seconds = [], []
    for name, times in PUBLISHED.items():
        preset, cost = PRESETS[name], costs(name)
        for calls, time in zip(
            (preset.num_steps * preset.calls_per_step, preset.num_student_steps), times, strict=True
        ):
            vae = cost.decode.flops + cost.encode.flops
            rows.append([calls * cost.call.matmul + cost.text.matmul, calls * cost.call.attention, vae])
            seconds.append(time)
    return torch.tensor(rows).double() / GPUS["a100"].peak_flops, torch.tensor(seconds).double()


def fitted(rows: torch.Tensor, seconds: torch.Tensor) -> torch.Tensor:
    """The inverse shares with the least squares of relative errors."""
    return torch.linalg.lstsq(rows / seconds[:, None], torch.ones(len(rows), 1).double()).solution[:, 0]


def test_shares_are_the_fit_to_the_published_times_and_predict_the_row_left_out():
    rows, seconds = published_rows()
    assert (1 / fitted(rows, seconds)).tolist() == pytest.approx([MATMUL_SHARE, ATTENTION_SHARE, VAE_SHARE], rel=0.03)
    for left_out in range(len(rows)):
        rest = [row for row in range(len(rows)) if row != left_out]
        predicted = rows[left_out] @ fitted(rows[rest], seconds[rest])
        assert float(predicted) == pytest.approx(float(seconds[left_out]), rel=0.15)


@pytest.mark.parametrize(("scheduler", "narrow"), [("unipc", False), ("euler", True)])
def test_a_trajectory_takes_the_bytes_that_were_planned(tmp_path: Path, scheduler: str, narrow: bool):
    """All of a recorded file but its header."""
    folder = record_tiny(tmp_path, scheduler, dtype="bfloat16", num_trajectories=1)
    data = (folder.path / trajectory_name(0)).read_bytes()
    shorter = 0 if scheduler == "unipc" else 5 * 4  # Wan's presets have UniPC's timesteps, int64
    assert len(data) - 8 - int.from_bytes(data[:8], "little") == trajectory_bytes(tiny(narrow_states=narrow)) - shorter


@pytest.mark.parametrize("rank", [None, 4])
def test_states_of_training_take_the_bytes_that_were_planned(rank: int | None):
    """Weights, teacher, gradients and moments of a real student after an update; the plan adds autocast's copies."""
    denoiser: Any = wan_transformer()
    student = Student({"transformer": denoiser.to(torch.bfloat16)}, lora_rank=rank)
    optimizer = AdamW(student.trained().values())
    for parameter in student.trained().values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    gradients = [parameter.grad for parameter in student.trained().values() if parameter.grad is not None]
    teacher = [] if rank else list(student.teachers["transformer"].parameters())
    real = sum(tensor.nbytes for tensor in [*student.parameters(), *teacher, *moments, *gradients])
    sizes = count_parameters(tiny())
    if rank is None:
        assert real == (FULL_STATE_BYTES - 2) * sizes.denoiser
    else:
        assert real == BASE_BYTES["bfloat16"] * sizes.denoiser + LORA_STATE_BYTES * rank * sizes.lora


def test_memory_falls_with_fewer_bits_fewer_weights_and_more_gpus():
    preset = tiny()
    sizes, training = count_parameters(preset), training_cost(preset, 3)
    config = PlanConfig(preset="ltx", num_gpus=4, lora_rank=16)
    peaks = [distilling_bytes(sizes, training, config, base) for base in (None, *BASE_BYTES)]
    alone, sharded = ([each[name] for each in peaks] for name in ("one_gpu", "sharded"))
    assert alone == sorted(alone, reverse=True)
    assert sharded == sorted(sharded, reverse=True)
    more = distilling_bytes(sizes, training, replace(config, num_gpus=8), None)
    assert training.peak < more["sharded"] < sharded[0] < alone[0] == more["one_gpu"]


def test_training_at_any_depth_follows_from_shallow_ones():
    """Also its peak, which is made of phases that grow differently."""
    preset = tiny(denoiser=replace(tiny().denoiser, config=tiny().denoiser.config | {"num_layers": 7}))
    deep, direct = whole(preset, lambda *depths: training_cost(preset, *depths)), training_cost(preset, 7)
    assert (deep.matmul, deep.attention) == (direct.matmul, direct.attention)
    assert deep.peak == pytest.approx(direct.peak, rel=0.01)


def test_training_takes_the_passes_of_the_method():
    """Student twice and teacher once, there, again (activations recomputed) and back; and the teacher on real latents.

    Back costs twice the way there where weights train (student), once where only latents do (teacher).
    """
    preset = PRESETS["wan21-t2v-1.3b"]
    training = whole(preset, lambda *depths: training_cost(preset, *depths))
    call = whole(preset, lambda *depths: call_cost(preset, *depths))
    assert training.attention / call.attention == pytest.approx(3 * (1 + 1 + 2.5) + 1)
    assert training.matmul / call.matmul == pytest.approx(2 * (1 + 1 + 2) + (1 + 1 + 1) + 1, rel=0.03)


def test_consistency_takes_three_calls_more_than_the_trajectory_loss():
    """The guided teacher's two and the student's at the stepped latents; counted over the real loss and networks."""
    preset = tiny()
    student = Student({"transformer": preset.denoiser.build()}, lora_rank=None, gradient_checkpointing=True)
    call, sigmas, trained = preset.call(), torch.linspace(1, 0, 3), list(student.parameters())
    states = meta(3, *preset.state_shape)
    batch = TrajectoryBatch(states, (call, call), ("transformer",) * 2, ("",), (0,), states.device)
    teacher = GuidedTeacher(student, sigmas, Guidance({"transformer": 5.0}, call, tuple(call.tensors)))
    levels = [torch.full((1,), level, device="meta") for level in (0.8, 0.7)]

    def velocity(latents: Tensor, _: Tensor) -> Tensor:
        return student.velocity("transformer", call, latents)

    def guided(latents: Tensor, _: Tensor) -> Tensor:
        with patch("accvideo.training.guidance.at_level", lambda call, *_: call):  # meta tensors have no timestep
            return teacher.field(batch, 0)(latents, levels[0])

    def consistency() -> None:
        points = states[:, -1], states[:, 0], *levels
        consistency_loss(velocity, guided, *points, end=0.5).mean().backward(inputs=trained)

    def trajectory() -> None:
        paired_loss(student, batch, sigmas, Step(0, 1)).mean().backward(inputs=trained)

    more = measure(consistency).plus(measure(trajectory), -1)
    once = whole(preset, lambda *depths: call_cost(preset, *depths))
    assert (more.matmul, more.attention) == (3 * once.matmul, 3 * once.attention)
    assert consistency_calls(preset) == 3
    assert consistency_calls(replace(preset, guidance="embedded")) == 2


@pytest.mark.parametrize(("length", "expected"), [(24, 24), (32, 32 + 8), (68, 32 + 32 + 20), (90, 32 * 3 + 18)])
def test_tiles_cover_a_length_with_their_overlaps(length: int, expected: int):
    assert covered(length, tile=32, stride=24) == expected


def test_tiled_decoding_costs_what_the_vae_does_in_tiles():
    preset = replace(PRESETS["hunyuan-544p"], height=320, width=448, num_frames=5)
    vae: Any = preset.vae.build()
    vae.enable_tiling()
    with torch.no_grad():
        tiled = measure(lambda: vae.decode(meta(*preset.latent_shape), return_dict=False))
    assert decode_cost(preset, 2).matmul == pytest.approx(tiled.matmul, rel=0.02)


def test_streamed_decoding_follows_from_the_first_frames():
    vae = Network("AutoencoderKLWan", {"base_dim": 8, "z_dim": 16})
    preset = replace(PRESETS["wan21-t2v-14b"], height=32, width=32, num_frames=29, vae=vae, text_encoders=())
    assert count_video(replace(preset, vae_streams=True)).decode.matmul == decode_cost(preset, 8).matmul


def test_two_experts_take_twice_the_memory_and_the_same_call():
    one, two = tiny(), tiny(num_denoisers=2)
    assert count_parameters(two).denoiser == 2 * count_parameters(one).denoiser


def test_plan_is_one_json_object_that_adds_up(capsys: pytest.CaptureFixture[str]):
    options = ["--gpu", "h100", "--num-gpus", "2", "--num-trajectories", "1000", "--json"]
    assert cli.run(["plan", "ltx", *options]) == 0
    output = capsys.readouterr()
    result = json.loads(output.out)
    assert "Lightricks/LTX-Video" in output.err
    teacher = result["seconds_per_video"]["teacher"]
    assert result["hours"]["recording"] == pytest.approx(1000 * (teacher["encoding"] + teacher["denoising"]) / 2 / 3600)
    more = 38_400 * 3 * teacher["denoising"] / 100 / 2 / 3600
    assert result["hours"]["distilling_lora_consistency"] == pytest.approx(result["hours"]["distilling_lora"] + more)
    assert result["bytes"]["trajectories"] == 1000 * result["bytes"]["trajectory"]
    assert result["speedup"]["denoising"] == 100 / 5
    assert 1 < result["speedup"]["end_to_end"] < result["speedup"]["denoising"]
    h100, h200 = result, plan(PlanConfig(preset="ltx", gpu="h200", num_gpus=2))
    assert h100["bytes"]["distilling"] == h200["bytes"]["distilling"]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"preset": "wan"}, "unknown preset 'wan'; known are hunyuan-544p"), ({"num_gpus": 0}, "num_gpus is 0")],
)
def test_mistakes_are_told_before_any_counting(options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        PlanConfig(**{"preset": "ltx", **options})
