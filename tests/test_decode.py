"""The videos of a data set, decoded from its latents, and which of the playground's are right."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from accvideo.data.dataset import TrajectoryFolder
from accvideo.decode import decode, load_recorded_teacher, recorded_clips
from accvideo.generate import sample_clips
from accvideo.inference.config import DecodeConfig
from accvideo.inference.model import load_model
from accvideo.playground import world
from accvideo.playground.judge import judge
from accvideo.playground.select import SelectConfig, select
from accvideo.record import record
from accvideo.recording.config import RecordConfig
from accvideo.teacher import denoisers
from accvideo.types import UserError
from tests.recorded import PROMPTS, record_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> TrajectoryFolder:
    return record_tiny(tmp_path_factory.mktemp("tiny"))


def configuration(folder: TrajectoryFolder, out: Path, **changes) -> DecodeConfig:
    return DecodeConfig(data=str(folder.path), out=out, device="cpu", **changes)


def test_a_guided_teachers_videos_are_decoded_at_two_unguided_calls(folder: TrajectoryFolder):
    """Alone or in batches they are what the teacher makes of the noise with guidance in all its steps."""
    teacher = load_recorded_teacher(folder.manifest, "cpu")
    batch_sizes = []
    [denoiser] = denoisers(teacher.pipeline).values()
    denoiser.register_forward_hook(lambda _, args, output: batch_sizes.append(len(output[0])))
    together = recorded_clips(teacher, [folder[index] for index in range(3)])
    assert batch_sizes == [3, 3]
    made = sample_clips(replace(load_model(folder.manifest.teacher), arguments=teacher.arguments),
                        PROMPTS[:3], range(3), num_steps=10, guidance_scale=3.0)  # fmt: skip
    for index, clips in enumerate(made):
        assert torch.equal(clips.frames, recorded_clips(teacher, [folder[index]]))
        assert (clips.frames[0].int() - together[index].int()).abs().max() <= 1


def test_videos_lie_beside_their_prompts_and_decoding_goes_on(folder: TrajectoryFolder, tmp_path: Path):
    out = tmp_path / "videos"
    assert decode(configuration(folder, out, num_videos=2)) == {"folder": str(out), "num_videos": 2, "num_decoded": 2}
    first = (out / "000001.mp4").read_bytes()
    (out / "000000.mp4").unlink()
    assert decode(configuration(folder, out, batch_size=2))["num_decoded"] == 5
    assert decode(configuration(folder, out))["num_decoded"] == 0
    assert (out / "000001.mp4").read_bytes() == first
    assert [path.read_text() for path in sorted(out.glob("*.txt"))] == [f"{prompt}\n" for prompt in PROMPTS]
    assert len(list(out.glob("*.mp4"))) == 6


def test_other_folders_and_other_teachers_are_refused(folder: TrajectoryFolder, tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds no decoded videos"):
        decode(configuration(folder, tmp_path / "full"))
    other = record_tiny(tmp_path / "other", num_trajectories=2, seed=1)
    decode(configuration(other, tmp_path / "videos", num_videos=1))
    with pytest.raises(UserError, match="another data set"):
        decode(configuration(folder, tmp_path / "videos"))
    with pytest.raises(UserError, match="another teacher than .* is now"):
        load_recorded_teacher(replace(folder.manifest, fingerprints={"transformer": "0"}), "cpu")
    with pytest.raises(UserError, match="num_videos is 0"):
        configuration(folder, tmp_path, num_videos=0)


def test_the_judge_says_which_trajectories_are_right(tmp_path: Path):
    """Those whose videos, as the teacher makes them, it finds right; of stars that spin about half."""
    spinning = "a red star spins and a green ring moves left on a striped gray background"
    prompts = [*world.sample_prompts(4, 0), *[spinning] * 4]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    record(
        RecordConfig(teacher="playground", prompts=tmp_path / "prompts.txt", out=tmp_path / "data", num_steps=5,
                     guidance_scale=1.0, batch_size=8, device="cpu")
    )  # fmt: skip
    config = SelectConfig(data=str(tmp_path / "data"), out=tmp_path / "right.txt", batch_size=3, device="cpu")
    result = select(config)
    [clips] = sample_clips(load_model("playground"), prompts, range(8), num_steps=5, guidance_scale=1.0, batch_size=8)
    right = judge(clips.frames, prompts).all_right
    assert [int(line) for line in config.out.read_text().split()] == right.nonzero().flatten().tolist()
    assert 0 < result["num_right"] == right.sum() < 8 and result["all_right"] == right.float().mean()
    with pytest.raises(UserError, match="exists"):
        select(config)


def test_the_judge_knows_the_playground_only(folder: TrajectoryFolder, tmp_path: Path):
    with pytest.raises(UserError, match="accvideo decode"):
        select(SelectConfig(data=str(folder.path), out=tmp_path / "right.txt", device="cpu"))
    assert not list(tmp_path.iterdir())
