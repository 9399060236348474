"""What is recorded depends on the configuration alone, however often the recorder is stopped."""

import functools
import json
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import accvideo.record as stage
from accvideo.call import replay
from accvideo.command import Prompt, read_prompt_file
from accvideo.data.dataset import TrajectoryFolder
from accvideo.data.verify import problems as verify
from accvideo.flow import euler_step
from accvideo.record import Recorder, record
from accvideo.recording.config import RecordConfig
from accvideo.recording.workers import Place, own_device
from accvideo.teacher import denoisers, item_generator, load_pipeline, watch
from accvideo.trajectory import read_trajectory, trajectory_name, write_trajectory
from accvideo.types import UserError
from tests.test_trajectory import make_manifest
from tests.test_workers import PLANTED, end_of, end_within, foreign_claim, fork, plant
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
def config(teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecordConfig:
    """Five trajectories in blocks of two, of a teacher that is loaded once for all tests."""
    monkeypatch.setattr(stage, "load_pipeline", loaded_pipeline)
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


@pytest.fixture
def quick(config: RecordConfig) -> RecordConfig:
    """Twelve trajectories of two steps each in blocks of two: a tenth of a second of work."""
    return replace(config, num_steps=2, num_student_steps=1, guidance_scale=1.0, num_trajectories=12)


loaded_pipeline = functools.cache(load_pipeline)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def work(config: RecordConfig, rank: int = 0, num_workers: int = 1) -> Callable[[], int]:
    """What a worker does that torchrun has started; the result is how many trajectories it wrote."""

    def run() -> int:
        os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(num_workers)})
        return record(config)["num_recorded"]

    return run


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
        prompts = [prompt.text for prompt in read_prompt_file(config.prompts)]
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


@pytest.mark.parametrize("ranks", [[0, 1, 2], [0, 0]])
def test_any_number_of_workers_record_the_same_bytes(quick, tmp_path, ranks):
    """Three of torchrun's, or two that know nothing of each other: none does what another has done."""
    record(quick)
    shared = replace(quick, out=tmp_path / "shared")
    pids = [fork(work(shared, rank, max(ranks) + 1)) for rank in ranks]
    assert sum(end_of(pid) for pid in pids) == 12
    assert contents(shared.out) == contents(quick.out)


def killed_at_random(config: RecordConfig, tmp_path: Path, num_kills: int, num_workers: int) -> None:
    """SIGKILL to each of some workers at a moment of its own, again and again; then the recording is finished.

    What is left after each kill is whole, and what comes out in the end is what one worker records undisturbed.
    """
    began = time.monotonic()
    assert end_of(fork(work(config))) == 12
    seconds, whole = time.monotonic() - began, contents(config.out)
    random, kills, rounds = Random(num_workers), 0, 0
    while kills < num_kills:
        again = replace(config, out=tmp_path / f"killed-{rounds}")
        again.out.mkdir()
        for _ in range(random.randint(1, 3)):
            pids = [fork(work(again, rank, num_workers)) for rank in range(num_workers)]
            began = time.monotonic()
            for moment, pid in sorted((random.uniform(0, seconds), pid) for pid in pids):
                time.sleep(max(0.0, began + moment - time.monotonic()))
                os.kill(pid, signal.SIGKILL)
            hits = sum(end_of(pid) == -signal.SIGKILL for pid in pids)
            kills += hits
            # The machine may be busier or less busy than before: some, not all, should be killed at work.
            seconds *= 1.1 if hits == num_workers else 0.8 if hits == 0 else 1.0
            left = {name: data for name, data in contents(again.out).items() if not name.startswith(".")}
            assert left.items() <= whole.items()
        record(again)
        assert contents(again.out) == whole and verify(again.out) == []
        rounds += 1


def test_killed_recorders_leave_nothing_bad(quick, tmp_path):
    killed_at_random(quick, tmp_path, num_kills=5, num_workers=1)


@pytest.mark.slow
@pytest.mark.parametrize(("num_kills", "num_workers"), [(30, 1), (30, 3)])
def test_many_killed_recorders_leave_nothing_bad(quick, tmp_path, num_kills, num_workers):
    killed_at_random(quick, tmp_path, num_kills, num_workers)


@pytest.mark.slow
def test_the_others_do_what_a_killed_worker_leaves(quick, tmp_path):
    """At ten random moments: the two that live end with everything in the folder."""
    record(quick)
    whole, random = contents(quick.out), Random(0)
    for number in range(10):
        again = replace(quick, out=tmp_path / f"killed-{number}")
        pids = [fork(work(again, rank, 3)) for rank in range(3)]
        time.sleep(random.uniform(0, 1))
        os.kill(killed := random.choice(pids), signal.SIGKILL)
        assert all(end_of(pid) >= 0 for pid in pids if pid != killed)
        end_of(killed)
        assert {name: data for name, data in contents(again.out).items() if not name.startswith(".")} == whole


def test_a_block_is_waited_for_and_taken_over_when_its_worker_dies(quick, capsys):
    def hang() -> None:
        recorder = Recorder(quick, Place())
        recorder.pipeline.transformer.register_forward_pre_hook(lambda *_: time.sleep(600))
        recorder.record(recorder.missing()[0])

    pid = fork(hang)
    while not (quick.out / ".block-0.claim").exists():
        time.sleep(0.01)
    kill = threading.Timer(3, os.kill, (pid, signal.SIGKILL))
    kill.start()
    assert record(quick)["num_recorded"] == 12
    kill.join()
    assert end_of(pid) == -signal.SIGKILL
    assert "waiting for 1 blocks that other recorders are at" in capsys.readouterr().err
    assert verify(quick.out) == []


def test_two_configurations_in_one_folder_at_once_are_refused(quick, tmp_path):
    """The one that comes second, before its first call if it can be known by then; what is there is the other's."""
    other = replace(quick, seed=1)
    with Recorder(quick, Place()) as one, Recorder(other, Place()) as two:
        assert one.record(one.missing()[0])
        one.writer.wait()
        before = contents(quick.out)
        with pytest.raises(UserError, match="another configuration: seed 0 -> 1"):
            two.record(two.missing()[-1])
    assert contents(quick.out).items() <= before.items() and verify(quick.out) != []
    with Recorder(replace(quick, out=tmp_path / "new"), Place()) as one:
        one.claims.take("block-0")
        with pytest.raises(UserError, match=f"process {os.getpid()} on .* is recording another configuration"):
            Recorder(replace(other, out=tmp_path / "new"), Place())
    assert contents(tmp_path / "new") == {}


def test_the_larger_of_two_numbers_of_trajectories_counts(quick):
    """Two recorders of one data set, one of which is to extend it."""
    with Recorder(quick, Place()) as one, Recorder(replace(quick, num_trajectories=14), Place()) as two:
        assert two.record(two.missing()[-1]) and not one.manifest.denoiser_calls
        with pytest.raises(UserError, match="is for 14 trajectories already"):
            one.record(one.missing()[0])
    assert record(replace(quick, num_trajectories=14))["num_recorded"] == 12
    assert verify(quick.out) == []


def test_each_worker_reads_its_share_whole(quick):
    """And the headers of all files: a flipped bit is found by one, a truncated file by each."""
    record(quick)
    flipped, truncated = quick.out / trajectory_name(3), quick.out / trajectory_name(8)
    data = bytearray(flipped.read_bytes())
    data[-1] ^= 1
    flipped.write_bytes(data)
    truncated.write_bytes(truncated.read_bytes()[:-1])
    found = []
    for rank in range(2):
        with Recorder(quick, Place(rank, 2)) as recorder:
            found.append([(block.number, block.damaged) for block in recorder.missing()])
    assert found == [[(4, (8,))], [(1, (3,)), (4, (8,))]]
    assert sum(end_of(fork(work(quick, rank, 2))) for rank in range(2)) == 2
    assert verify(quick.out) == []


@pytest.mark.parametrize("kind", PLANTED)
def test_what_is_planted_in_the_place_of_claims_neither_stops_nor_misleads(quick, tmp_path, kind):
    """A pipe, links to what never ends, to a file outside and to nothing, a large file: the bytes are as ever."""
    record(quick)
    again = replace(quick, out=tmp_path / "again")
    again.out.mkdir()
    outside = foreign_claim(tmp_path, "elsewhere", age=0)
    before = outside.read_bytes(), outside.stat().st_mtime_ns
    for name in ("manifest", "block-0", "block-3"):
        plant(kind, again.out / f".{name}.claim", outside)
    assert end_within(work(again)) == 12
    assert contents(again.out) == contents(quick.out)
    assert (outside.read_bytes(), outside.stat().st_mtime_ns) == before


@pytest.mark.parametrize("kind", [kind for kind in PLANTED if kind != "nowhere"])
def test_what_is_planted_in_the_place_of_trajectories_is_replaced(quick, tmp_path, kind):
    """In the worker's own share, which it reads whole, and in another's, of which it reads the headers."""
    record(quick)
    whole, outside = contents(quick.out), tmp_path / "outside"
    outside.write_bytes(whole[trajectory_name(1)])
    for index in (1, 3):
        (quick.out / trajectory_name(index)).unlink()
        plant(kind, quick.out / trajectory_name(index), outside)
    assert end_within(work(quick, 0, 2)) == 2
    assert contents(quick.out) == whole and not any(path.is_symlink() for path in quick.out.iterdir())
    assert outside.read_bytes() == whole[trajectory_name(1)]


def test_a_link_to_nothing_in_the_place_of_a_trajectory_is_told(quick):
    record(quick)
    for index, rank in ((1, 0), (3, 0)):
        path = quick.out / trajectory_name(index)
        data = path.read_bytes()
        path.unlink()
        path.symlink_to(quick.out / "nowhere")
        with Recorder(quick, Place(rank, 2)) as recorder, pytest.raises(UserError, match=f"00000{index}.*No such file"):
            recorder.missing()
        path.unlink()
        path.write_bytes(data)


def test_a_worker_takes_the_accelerator_of_its_own(monkeypatch):
    """By its number on its machine; with one accelerator in sight (as SLURM may give it), that one."""
    place = Place(rank=13, num_workers=16, local_rank=5)
    assert own_device("cpu", place) == "cpu" and own_device("cuda:2", place) == "cuda:2"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for count, device in ((8, "cuda:5"), (1, "cuda:0")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert own_device("auto", place) == own_device("cuda", place) == device


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


def test_a_file_that_may_not_be_written_leaves_nothing_half_written(quick, tmp_path):
    """A limit on the size of files: a clear error, nothing but the manifest; without it the same command goes on."""
    record(quick)
    size = (quick.out / trajectory_name(0)).stat().st_size
    again = replace(quick, out=tmp_path / "limited")

    def limited() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, size - 1))
        with pytest.raises(UserError, match="File too large") as error:
            record(again)
        return len(str(error.value).splitlines())

    assert end_of(fork(limited)) == 2
    assert contents(again.out).keys() == {"manifest.json"}
    record(again)
    assert contents(again.out) == contents(quick.out)


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A disk of 32 kB, if this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_nothing_half_written(quick, small_disk):
    """A clear error, whole files only, and the same command goes on once there is space."""
    record(quick)
    again = replace(quick, out=small_disk / "data")
    with pytest.raises(UserError, match="No space left on device") as error:
        record(again)
    assert len(str(error.value).splitlines()) == 2
    whole, left = contents(quick.out), contents(again.out)
    assert left.items() <= whole.items() and 2 < len(left) < len(whole)
    subprocess.run(["mount", "-o", "remount,size=10m", small_disk], check=True)
    assert record(again)["num_recorded"] == len(whole) - len(left)
    assert contents(again.out) == whole


def test_prompts_of_any_length_and_script(quick):
    """100,000 characters, control characters, other scripts: recorded, whole, and given back as they were."""
    prompts = [
        "a red square " * 7700,
        "nul \0 bell \a escape \x1b[31m form feed \f tab \t next line \x85 line separator \u2028 end",
        "مربع أحمر",
        "红色的方块",
        "लाल वर्ग",
        "👩‍👩‍👧‍👦 e\u0301 \u202eright to left\u202c \U0010ffff",
        '"quotes", \\ and {braces} ' + "0" * 64,
    ]
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=number % 2 == 0) for number, prompt in enumerate(prompts)]
    config = replace(quick, prompts=quick.prompts.with_suffix(".jsonl"), num_trajectories=None, batch_size=1)
    config.prompts.write_text("\n".join(lines), "utf-8")
    quick.prompts.write_text("\n".join(prompts), "utf-8")
    stripped = [prompt.strip() for prompt in prompts]
    for path in (quick.prompts, config.prompts):
        assert [prompt.text for prompt in read_prompt_file(path)] == stripped
    record(config)
    data = TrajectoryFolder(config.out)
    assert [data[i].prompt for i in range(len(data))] == stripped
    assert verify(config.out) == [] and record(config)["num_recorded"] == 0


@pytest.mark.parametrize("family", ["wan-unipc", "wan-experts", "hunyuan", "ltx", "mochi"])
def test_several_prompts_at_once_are_recorded_as_one_by_one(family, config, monkeypatch):
    """Within rounding: states of length 1 differ by less than 1e-5."""
    make, arguments = TINY_FAMILIES[family]
    pipeline = make()
    monkeypatch.setattr(stage, "load_pipeline", lambda *_: pipeline)
    monkeypatch.setattr(stage, "pipeline_defaults", lambda _: {"pipeline_args": arguments})
    sets = []
    for size in (1, 3):
        out = config.out / str(size)
        record(replace(config, out=out, num_trajectories=3, batch_size=size, guidance_scale=3.0, pipeline_arg=()))
        sets.append(TrajectoryFolder(out))
    for index in range(3):
        one, several = (data[index] for data in sets)
        assert torch.equal(one.states[0], several.states[0])
        assert torch.allclose(one.states, several.states, rtol=0, atol=1e-5 * one.states.abs().max().item())


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


@pytest.mark.slow
def test_compiled_blocks_record_the_same(config, monkeypatch):
    """To rounding; what is recorded may be gone on with by others that are not compiled."""
    monkeypatch.setattr(stage, "load_pipeline", load_pipeline)  # the loaded one is for tests that compile nothing
    compiled = replace(config, out=config.out.with_name("compiled"), compile=True)
    record(config)
    record(compiled)
    (compiled.out / trajectory_name(0)).unlink()
    record(replace(compiled, compile=False))
    for number in range(5):
        found, expected = (TrajectoryFolder(folder)[number].states for folder in (compiled.out, config.out))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


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


@pytest.mark.parametrize(("name", "number"), [("0.png", 0), ("1.png", 1)])
def test_an_image_changed_under_its_name_is_noticed(image_config, tmp_path, name, number):
    """A prompt's own, or the one for all."""
    record(image_config)
    before = (tmp_path / name).read_bytes()
    tiny_image(2).save(tmp_path / name)
    with pytest.raises(UserError, match=f"00000{number}.* with another image in .*{name}") as error:
        record(image_config)
    assert len(str(error.value).splitlines()) == 2
    (tmp_path / name).write_bytes(before)
    assert record(image_config)["num_recorded"] == 0


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
