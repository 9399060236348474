from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from accvideo.types import UserError
from accvideo.video import viewing_scale, write_video


@pytest.fixture
def clip() -> torch.Tensor:
    """A square that moves over a colored gradient: 9 frames of 64x48."""
    frames = torch.zeros(9, 48, 64, 3, dtype=torch.uint8)
    frames[..., 0] = torch.linspace(20, 230, 64).to(torch.uint8)
    frames[..., 2] = torch.linspace(20, 230, 48).to(torch.uint8)[:, None]
    for i in range(9):
        frames[i, 16:32, 4 * i : 4 * i + 16] = torch.tensor([240, 200, 20], dtype=torch.uint8)
    return frames


def decode(path: Path) -> tuple[np.ndarray, float]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate is not None
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]), float(
            stream.average_rate
        )


@pytest.mark.parametrize("fps", [8, 23.976])
def test_mp4_decodes_back(tmp_path: Path, clip: torch.Tensor, fps: float):
    """All frames, the frame rate and, within the codec's loss, the colors come back."""
    write_video(tmp_path / "clip.mp4", clip, fps, scale=4)
    images, rate = decode(tmp_path / "clip.mp4")
    assert images.shape == (9, 192, 256, 3)
    assert rate == pytest.approx(fps, rel=1e-3)
    enlarged = clip.repeat_interleave(4, 1).repeat_interleave(4, 2).numpy()
    assert np.abs(images.astype(float) - enlarged).mean() < 2.5
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def test_mp4_says_how_its_colors_are_stored(tmp_path: Path, clip: torch.Tensor):
    write_video(tmp_path / "clip.mp4", clip, 8)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.pix_fmt, context.colorspace) == ("yuv420p", 1)


def test_mp4_of_odd_size_loses_its_last_row(tmp_path: Path, clip: torch.Tensor):
    write_video(tmp_path / "clip.mp4", clip[:, :47, :63], 8)
    assert decode(tmp_path / "clip.mp4")[0].shape == (9, 46, 62, 3)


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_animation_decodes_back(tmp_path: Path, clip: torch.Tensor, suffix: str):
    write_video(tmp_path / f"clip{suffix}", clip, fps=10)
    with Image.open(tmp_path / f"clip{suffix}") as image:
        assert (image.n_frames, image.size, image.info["loop"]) == (9, (64, 48), 0)  # pyright: ignore
        image.seek(8)
        last = np.asarray(image.convert("RGB")).astype(float)
        assert image.info["duration"] == 100
    assert np.abs(last - clip[8].numpy()).mean() < 12


def test_scale_enlarges_tiny_clips_only():
    assert viewing_scale(64, 64) == 4
    assert viewing_scale(48, 64) == 5
    assert viewing_scale(480, 832) == 1


def test_unknown_suffix_is_refused(tmp_path: Path, clip: torch.Tensor):
    with pytest.raises(UserError, match=r"clip\.avi.*\.mp4, \.webp, \.gif"):
        write_video(tmp_path / "clip.avi", clip, 8)
    assert not list(tmp_path.iterdir())


def test_failed_write_leaves_nothing(tmp_path: Path, clip: torch.Tensor):
    """A folder stands where the file should go: the rename fails and the partial file is gone."""
    (tmp_path / "clip.webp").mkdir()
    with pytest.raises(OSError):
        write_video(tmp_path / "clip.webp", clip, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.webp"]
