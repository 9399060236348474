"""Where an argument names an image or a video, what is in the file takes its place."""

from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from accvideo.media import check_media, load_media, read_image, read_video
from accvideo.recording.captions import count_frames
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


def test_names_too_long_for_a_file_are_of_none(tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        check_media({"image": "a" * 300 + ".png"}, tmp_path)


def test_damages_that_the_readers_do_not_foresee_are_told(tmp_path):
    """An image that claims more pixels than memory holds, and a video whose title is no UTF-8."""
    Image.new("L", (8, 8)).save(tmp_path / "a.gif")
    huge = (tmp_path / "a.gif").read_bytes()[:6] + b"\xff\xff\xff\xff"
    (tmp_path / "a.png").write_bytes(huge + (tmp_path / "a.gif").read_bytes()[10:])
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        container.metadata["title"] = "abcdefgh"
        stream: Any = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 32
        container.mux([*stream.encode(av.VideoFrame(32, 32, "yuv420p")), *stream.encode()])
    (tmp_path / "a.mkv").write_bytes((tmp_path / "a.mkv").read_bytes().replace(b"abcdefgh", b"abcd\xffabc"))
    with pytest.raises(UserError, match="cannot read the image"):
        read_image(tmp_path / "a.png")
    with pytest.raises(UserError, match="cannot read the video"):
        read_video(tmp_path / "a.mkv")
    with pytest.raises(UserError, match="cannot read the video"):
        count_frames(tmp_path / "a.mkv")
