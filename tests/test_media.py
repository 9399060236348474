"""Where an argument names an image or a video, what is in the file takes its place."""

import numpy as np
import pytest
import torch
from PIL import Image

from accvideo.media import load_media, read_video
from accvideo.types import UserError
from accvideo.video import write_video
from tests.families import write_media
from tests.tiny import tiny_image


def test_files_are_loaded_by_their_suffix(tmp_path):
    """In lists too; prompts that end like a file name, numbers and other text are left alone."""
    write_media(tmp_path)
    others = {"prompt": "a drawing of image.png", "negative_prompt": "image.png", "strength": 0.5, "mode": "animate"}
    loaded = load_media({"image": "image.png", "refs": ["image.png"], "video": "video.gif", **others}, tmp_path)
    assert np.array_equal(loaded["image"], np.asarray(tiny_image()))
    assert np.array_equal(loaded["refs"][0], np.asarray(tiny_image()))
    assert len(loaded["video"]) == 5 and loaded["video"][0].size == (32, 32)
    assert {name: loaded[name] for name in others} == others


def test_a_video_is_what_was_written(tmp_path):
    ramp = torch.arange(0, 250, 50, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 32, 32, 3)
    write_video(tmp_path / "a.mp4", ramp, fps=8)
    frames = torch.from_numpy(np.stack([np.asarray(frame) for frame in read_video(tmp_path / "a.mp4")]))
    assert frames.shape == ramp.shape and (frames.int() - ramp.int()).abs().max() <= 8


def test_an_image_is_read_in_rgb(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 128)).save(tmp_path / "a.png")
    assert load_media({"image": "a.png"}, tmp_path)["image"].mode == "RGB"


@pytest.mark.parametrize("name", ["nowhere.png", "nowhere.mp4", "text.png", "text.mp4", "text.webp"])
def test_what_is_no_file_of_that_kind_is_refused(tmp_path, name):
    for suffix in ("png", "mp4", "webp"):
        (tmp_path / f"text.{suffix}").write_text("a thesis")
    with pytest.raises(UserError, match=f"cannot read the (image|video) .*{name}"):
        load_media({"image": name}, tmp_path)
