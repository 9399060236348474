"""What is recorded depends on the configuration alone, however often the recorder is stopped."""

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import accvideo.record as stage
from accvideo.call import replay
from accvideo.command import Prompt, read_prompts
from accvideo.flow import euler_step
from accvideo.record import RecordConfig, record
from accvideo.teacher import denoisers, item_generator, load_pipeline, watch
from accvideo.trajectory import TrajectoryFolder, read_trajectory, trajectory_name, verify, write_trajectory
from accvideo.types import UserError
from tests.test_trajectory import make_manifest
from tests.tiny import TINY_CALL, TINY_FAMILIES, tiny_image, tiny_wan_i2v_pipeline, tiny_wan_pipeline

SIZES: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5, "pipeline_arg": ("max_sequence_length=16",)}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of four teachers."""
    path = tmp_path_factory.mktemp("teachers")
    for scheduler in ("dpm", "unipc", "euler"):
        tiny_wan_pipeline(scheduler).save_pretrained(path / scheduler)
    tiny_wan_pipeline("dpm", seed=1).save_pretrained(path / "other")
    return path


@pytest.fixture
def config(teachers: Path, tmp_path: Path) -> RecordConfig:
    (tmp_path / "prompts.txt").write_text("red square\n\n  a blue circle \ngreen\n")
    return RecordConfig(
        teacher=str(teachers / "dpm"),
        prompts=tmp_path / "prompts.txt",
        out=tmp_path / "trajectories",
        num_steps=6,
        num_student_steps=3,
        num_trajectories=5,
        batch_size=2,
        **SIZES,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def breaking_pipeline(error: BaseException, after: int) -> Callable[..., Any]:
    """A `load_pipeline` whose denoiser raises `error` after some calls."""

    def load(*args: Any) -> Any:
        pipeline: Any = load_pipeline(*args)
        calls = []

        def fail(*_: Any) -> None:
            calls.append(1)
            if len(calls) > after:
                raise error

        pipeline.transformer.register_forward_hook(fail)
        return pipeline

    return load


def test_a_data_set_is_whole_and_readable(config):
    summary = record(config)
    assert (summary["num_trajectories"], summary["num_recorded"], summary["denoiser_calls"]) == (5, 5, 72)
    assert json.loads(json.dumps(summary)) == summary
    assert verify(config.out) == []
    data = TrajectoryFolder(config.out)
    assert [data[i].prompt for i in range(5)] == ["red square", "a blue circle", "green", "red square", "a blue circle"]
    manifest = data.manifest
    assert manifest.denoiser_calls == 12
    assert manifest.keypoints == [0, 2, 4, 6] and len(manifest.sigmas) == 7 and manifest.guidance_scale == 5.0
    assert (manifest.height, manifest.num_frames, manifest.fps) == (32, 5, 16)
    assert manifest.pipeline_args == {"max_sequence_length": 16} and manifest.nested_schedule
    assert manifest.scheduler["class"] == "DPMSolverMultistepScheduler"
    assert data[0].states.dtype == torch.float32


@torch.no_grad()
def test_recorded_trajectories_are_the_pipelines_own(config):
    """First state: the item's noise. Last: what the pipeline returns for the item's block."""
    record(config)
    pipeline: Any = load_pipeline(config.teacher)
    data = TrajectoryFolder(config.out)
    for block in (0, 1, 2):
        items = (2 * block, 2 * block + 1)
        prompts = read_prompts(config.prompts)
        final = pipeline(
            [prompts[i % 3] for i in items],
            generator=[item_generator(0, i) for i in items],
            num_inference_steps=6,
            output_type="latent",
            **TINY_CALL,
        ).frames
        for row, index in enumerate(items):
            if index < 5:
                states = data[index].states
                assert torch.equal(states[-1], final[row])
                assert torch.equal(states[0], torch.randn(states[0].shape, generator=item_generator(0, index)))


@pytest.mark.parametrize("family", [family for family in TINY_FAMILIES if family != "wan-i2v"])
@torch.no_grad()
def test_every_family_records_and_replays(family, config, monkeypatch):
    """Record, verify, read: with as many student steps as teacher steps, the replay is the recording."""
    make, arguments = TINY_FAMILIES[family]
    pipeline = make()
    monkeypatch.setattr(stage, "load_pipeline", lambda *_: pipeline)
    monkeypatch.setattr(stage, "pipeline_defaults", lambda _: {"pipeline_args": arguments})
    record(replace(config, num_student_steps=6, num_trajectories=2, batch_size=1, guidance_scale=1.0, pipeline_arg=()))
    assert verify(config.out) == []
    data = TrajectoryFolder(config.out)
    sigmas = data.manifest.key_sigmas.tolist()
    for trajectory in (data[0], data[1]):
        state = trajectory.states[:1]
        for k, call in enumerate(trajectory.calls):
            velocity = replay(denoisers(pipeline)[trajectory.denoisers[k]], call, state)
            state = euler_step(state, velocity, sigmas[k], sigmas[k + 1])
            expected = trajectory.states[k + 1 : k + 2]
            if family == "wan-dpm":
                assert torch.allclose(state, expected, atol=1e-5)
            elif family != "wan-unipc" or k == 0:  # from its second step on UniPC is no Euler step
                assert torch.allclose(state, expected, atol=1e-6 if family == "wan-unipc" else 0, rtol=0)


@torch.no_grad()
def test_image_conditions_are_stored(tmp_path):
    """Read back, the call of an image-to-video pipeline replays bit for bit."""
    make, arguments = TINY_FAMILIES["wan-i2v"]
    pipeline = make()
    with watch(pipeline) as seen:
        pipeline(prompt=["red"], num_inference_steps=2, guidance_scale=1.0, output_type="latent", **arguments)
    manifest = replace(make_manifest(1), num_steps=2, keypoints=[0, 1, 2], sigmas=seen.sigmas)
    (trajectory,) = stage.trajectories_of(seen, manifest, range(1), [Prompt("red")], {})
    read = read_trajectory(write_trajectory(tmp_path, trajectory))
    for k, step in enumerate(seen.steps):
        assert torch.equal(replay(pipeline.transformer, read.calls[k], read.states[k : k + 1]), step.velocity)


def test_a_recording_goes_on_where_it_stopped(config, tmp_path, monkeypatch):
    """Ctrl-C in the middle leaves whole files only; the rest comes out as if nothing had happened."""
    record(config)
    whole = contents(config.out)
    for after in (3, 15, 30):
        again = replace(config, out=tmp_path / f"stopped-{after}")
        with monkeypatch.context() as patch:
            patch.setattr(stage, "load_pipeline", breaking_pipeline(KeyboardInterrupt(), after))
            with pytest.raises(KeyboardInterrupt):
                record(again)
        left = contents(again.out)
        assert left.items() <= whole.items() and len(left) == (0, 3, 5)[after // 12]
        summary = record(again)
        assert summary["num_recorded"] == 5 - 2 * (after // 12)
        assert contents(again.out) == whole


def test_killed_recorders_leave_nothing_bad(config, tmp_path):
    """SIGKILL once there are some files: what is left is whole, and resumes to what it would have been."""
    longer = replace(config, num_trajectories=24)
    record(longer)
    whole = contents(longer.out)
    again = replace(longer, out=tmp_path / "killed")
    for num_files in (1, 4, 10, 17):
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            record(again)
            os._exit(0)
        deadline = time.monotonic() + 60
        while len(list(again.out.glob("*"))) < num_files and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        left = {name: data for name, data in contents(again.out).items() if not name.startswith(".")}
        assert left.items() <= whole.items() and num_files - 1 <= len(left) < len(whole)
    record(again)
    assert contents(again.out) == whole and verify(again.out) == []


def test_bytes_do_not_depend_on_how_many_are_asked_for(config, tmp_path):
    """Blocks are always whole: three trajectories are the first three of five, and can be extended to them."""
    record(config)
    fewer = replace(config, out=tmp_path / "fewer", num_trajectories=3)
    record(fewer)
    assert (fewer.out / trajectory_name(2)).read_bytes() == (config.out / trajectory_name(2)).read_bytes()
    assert record(replace(fewer, num_trajectories=5))["num_recorded"] == 2
    assert contents(fewer.out) == contents(config.out)
    with pytest.raises(UserError, match="5 trajectories already"):
        record(fewer)


def test_damaged_and_missing_files_are_recorded_again(config, capsys):
    """And the good ones are not touched."""
    record(config)
    whole = contents(config.out)
    times = {path.name: path.stat().st_mtime_ns for path in config.out.iterdir()}
    damaged, missing = config.out / trajectory_name(1), config.out / trajectory_name(4)
    damaged.write_bytes(whole[damaged.name][:-1])
    missing.unlink()
    assert record(config)["num_recorded"] == 2
    assert "000001.safetensors" in capsys.readouterr().err
    assert contents(config.out) == whole
    kept = {path.name for path in config.out.iterdir() if path.stat().st_mtime_ns == times[path.name]}
    assert kept == whole.keys() - {damaged.name, missing.name}


def test_nothing_is_computed_when_nothing_is_missing(config, monkeypatch):
    record(config)
    monkeypatch.setattr(stage, "load_pipeline", breaking_pipeline(AssertionError(), 0))
    assert record(config)["num_recorded"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_student_steps": 2}, "num_student_steps 3 -> 2"),
        ({"seed": 1}, "seed 0 -> 1"),
        ({"batch_size": 1}, "batch_size 2 -> 1"),
        ({"guidance_scale": 2.0}, "guidance_scale 5.0 -> 2.0"),
        ({"width": 48}, "width 32 -> 48"),
        ({"teacher": "other"}, "fingerprints"),
        ({"teacher": "unipc"}, "scheduler"),
        ({"num_trajectories": 0}, "num_trajectories is 0"),
        ({"num_student_steps": 4}, r"choose one of \[1, 2, 3, 6\]"),
        ({"prompts": "nowhere.txt"}, "cannot read the prompts"),
        (
            {"pipeline_arg": ("max_sequence_len=16",)},
            "takes no argument max_sequence_len; it takes max_sequence_length",
        ),
        ({"pipeline_arg": ("max_sequence_length",)}, "is not NAME=JSON"),
        ({"pipeline_arg": ("negative_prompt=blurry",)}, "is not NAME=JSON"),
        ({"pipeline_arg": ("generator=1",)}, "set by the recorder"),
        ({"height": 33}, "WanPipeline refuses"),
        ({"teacher": "nowhere"}, "cannot load the pipeline"),
    ],
)
def test_mistakes_cost_no_denoiser_call(config, teachers, change, message, monkeypatch):
    """Another configuration in the folder, or a wrong one: two lines, before the first call, nothing changed."""
    record(config)
    before = contents(config.out)
    if "teacher" in change:
        change = {"teacher": str(teachers / change["teacher"])}
    if "prompts" in change:
        change = {"prompts": config.prompts.with_name(change["prompts"])}
    monkeypatch.setattr(stage, "load_pipeline", breaking_pipeline(AssertionError(), 0))
    with pytest.raises(UserError, match=message) as error:
        record(replace(config, **change))
    assert len(str(error.value).splitlines()) <= 2
    assert contents(config.out) == before


def test_a_refused_pipeline_leaves_no_data_set(config, monkeypatch):
    """The rule is checked on the first step; mended, the same command works."""
    pipeline: Any = load_pipeline(config.teacher)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with monkeypatch.context() as patch:
        patch.setattr(stage, "load_pipeline", lambda *_: pipeline)
        with pytest.raises(UserError, match="is not next = state"):
            record(config)
    assert contents(config.out) == {}
    record(config)


def test_an_edited_prompt_file_is_noticed(config):
    record(config)
    config.prompts.write_text("red square\nan edited circle\ngreen\n")
    with pytest.raises(UserError, match='000001.*"a blue circle".*"an edited circle"'):
        record(config)


def test_a_folder_of_something_else_is_left_alone(config):
    config.out.mkdir()
    (config.out / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match=r"holds something else \(thesis.txt\)"):
        record(config)
    assert contents(config.out) == {"thesis.txt": b"all of it"}
    with pytest.raises(UserError, match="is a file"):
        record(replace(config, out=config.out / "thesis.txt"))


@pytest.mark.parametrize("text", ["", "\n  \n"])
def test_no_prompts(config, text):
    config.prompts.write_text(text)
    with pytest.raises(UserError, match="holds no prompts"):
        record(config)


def test_a_full_disk_leaves_nothing_half_written(config, monkeypatch):
    """A clear error, whole files only, and the same command goes on once there is space."""
    write = Path.write_bytes
    written = []

    def full(path: Path, data: bytes) -> int:
        written.append(path)
        if len(written) > 3:  # the manifest and two trajectories fit
            write(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match="No space left on device") as error:
            record(config)
    assert len(str(error.value).splitlines()) == 2
    assert sorted(contents(config.out)) == ["000000.safetensors", "000001.safetensors", "manifest.json"]
    assert record(config)["num_recorded"] == 3 and verify(config.out) == []


def test_noise_levels_that_plain_diffusers_cannot_visit_are_told(config, teachers, tmp_path, capsys):
    """UniPC and DPM nest and Euler can be made to; with a terminal level it cannot, and the warning names what can."""
    pipeline: Any = load_pipeline(str(teachers / "euler"))
    pipeline.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0, shift_terminal=0.1))
    pipeline.save_pretrained(tmp_path / "terminal")
    for teacher, nested, warns in (("unipc", True, False), ("euler", False, False), ("terminal", False, True)):
        folder = tmp_path / teacher if teacher == "terminal" else teachers / teacher
        here = replace(config, teacher=str(folder), out=config.out / teacher, num_trajectories=1)
        assert record(here)["nested_schedule"] is nested
        assert TrajectoryFolder(here.out).manifest.nested_schedule is nested
        assert ("UniPCMultistepScheduler" in capsys.readouterr().err) is warns


def test_defaults_of_the_teachers_folder(config, teachers, tmp_path):
    """They fill what the command line leaves open; the command line wins."""
    pipeline = load_pipeline(str(teachers / "dpm"))
    pipeline.save_pretrained(tmp_path / "teacher")
    defaults = {"height": 32, "width": 64, "num_frames": 5, "guidance_scale": 3.0, "fps": 8}
    (tmp_path / "teacher" / "accvideo.json").write_text(
        json.dumps(defaults | {"pipeline_args": {"max_sequence_length": 16}})
    )
    plain = {"height": None, "num_frames": None, "pipeline_arg": (), "width": 32, "num_trajectories": 1}
    record(replace(config, teacher=str(tmp_path / "teacher"), **plain))
    manifest = TrajectoryFolder(config.out).manifest
    assert (manifest.height, manifest.width, manifest.guidance_scale, manifest.fps) == (32, 32, 3.0, 8)
    assert manifest.pipeline_args == {"max_sequence_length": 16}
    assert read_trajectory(config.out / trajectory_name(0)).states.shape == (4, 4, 2, 4, 4)


def test_bfloat16_is_recorded_in_float32(config):
    record(replace(config, dtype="bfloat16", num_trajectories=1))
    trajectory = TrajectoryFolder(config.out)[0]
    assert trajectory.states.dtype == torch.float32 and trajectory.calls[0].dtype == torch.bfloat16
    assert trajectory.calls[0].tensors["encoder_hidden_states"].dtype == torch.bfloat16


@pytest.fixture
def image_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecordConfig:
    """Two prompts, the first with an image of its own, for an image-to-video teacher."""
    pipeline = tiny_wan_i2v_pipeline()
    monkeypatch.setattr(stage, "load_pipeline", lambda *_: pipeline)
    (tmp_path / "teacher").mkdir()
    for seed in (0, 1):
        tiny_image(seed).save(tmp_path / f"{seed}.png")
    (tmp_path / "prompts.csv").write_text("prompt,image\nred square,0.png\ngreen,\n")
    return RecordConfig(
        teacher=str(tmp_path / "teacher"),
        prompts=tmp_path / "prompts.csv",
        image=tmp_path / "1.png",
        out=tmp_path / "data",
        num_steps=2,
        num_student_steps=1,
        **SIZES,
    )


@torch.no_grad()
def test_each_prompt_has_its_image(image_config, tmp_path):
    """Its own, or the one for all; the trajectory is the pipeline's own with that image."""
    record(image_config)
    data = TrajectoryFolder(image_config.out)
    pipeline: Any = stage.load_pipeline("")
    assert [data[i].arguments for i in range(2)] == [{"image": "0.png"}, {"image": str(tmp_path / "1.png")}]
    for index, prompt in enumerate(("red square", "green")):
        final = pipeline(
            prompt=prompt,
            image=tiny_image(index),
            generator=item_generator(0, index),
            num_inference_steps=2,
            output_type="latent",
            **TINY_CALL,
        ).frames
        assert torch.equal(data[index].states[-1:], final)
    assert record(image_config)["num_recorded"] == 0
    image_config.prompts.write_text("prompt,image\nred square,1.png\ngreen,\n")
    with pytest.raises(UserError, match='000000.*"0.png".*"1.png"'):
        record(image_config)


@pytest.mark.parametrize(
    ("prompts", "change", "message"),
    [
        ("prompt,image\nred,nowhere.png\n", {}, "cannot read the image .*nowhere.png"),
        ("prompt,image\nred,0.png\ngreen,\n", {"image": None}, "refuses its arguments.*image"),
        ("prompt,picture\nred,0.png\n", {}, "takes no picture"),
        ("prompt,generator\nred,0\n", {}, "generator is set by the recorder"),
        ("prompt,image\nred,0.png\n", {"batch_size": 2}, "Leave --batch-size out"),
        ("prompt,image\nred,0.png\n", {"height": 33}, "refuses its arguments.*divisible by 16"),
    ],
)
def test_mistakes_with_images_cost_no_denoiser_call(image_config, prompts, change, message):
    image_config.prompts.write_text(prompts)
    stage.load_pipeline("").transformer.register_forward_hook(lambda *_: pytest.fail("the denoiser was called"))
    with pytest.raises(UserError, match=message) as error:
        record(replace(image_config, **change))
    assert len(str(error.value).splitlines()) <= 2 and not list(image_config.out.glob("*"))
