import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import av
import pytest
import torch

from accvideo.cli import run
from accvideo.recording.captions import CaptionConfig, Captioner, caption_folder, count_frames, spread_frames
from accvideo.recording.prompts import PromptsConfig, prompts
from accvideo.types import UserError
from accvideo.video import write_video
from tests.tiny_vlm import save_tiny_internvl, save_tiny_llava, save_tiny_qwen3_vl


def clip(seed: int, num_frames: int = 9) -> torch.Tensor:
    """Frame i is gray, as bright as 20 * i, with a square that differs by seed."""
    frames = torch.zeros(num_frames, 32, 48, 3, dtype=torch.uint8)
    frames += (20 * torch.arange(num_frames, dtype=torch.uint8))[:, None, None, None]
    frames[:, 4 * seed : 4 * seed + 8, 8:24, seed % 3] = 255
    return frames


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    save_tiny_llava(folder)
    return folder


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    for number, name in enumerate(("a.mp4", "b/c.mp4", "d.gif")):
        write_video(folder / name, clip(number), fps=8)
    (folder / "notes.txt").write_text("no video")
    return folder


def test_frames_are_the_middles_of_equal_parts(tmp_path: Path):
    write_video(tmp_path / "a.mp4", clip(0), fps=8)
    assert count_frames(tmp_path / "a.mp4") == 9

    def seen(num_frames: int) -> list[int]:
        glimpse = spread_frames(tmp_path / "a.mp4", 9, num_frames)
        assert (glimpse.total, glimpse.fps, glimpse.frames.shape[1:]) == (9, 8.0, (32, 48, 3))
        shades = [round(value / 20) for value in glimpse.frames[:, 28, 40, 0]]
        assert shades == glimpse.numbers
        return shades

    assert seen(1) == [4] and seen(3) == [1, 4, 7] and seen(9) == list(range(9)) and seen(50) == list(range(9))


def test_a_folder_of_videos_becomes_prompts_and_a_second_run_captions_only_what_is_new(
    model: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = PromptsConfig(
        sources=(videos,), out=tmp_path / "out.txt", model=str(model), num_frames=2, max_new_tokens=8, device="cpu"
    )
    assert prompts(config)["num_read"] == 3
    record = tmp_path / "out.captions.jsonl"
    made = [json.loads(line) for line in record.read_text().splitlines()]
    assert [line["video"] for line in made] == ["a.mp4", "b/c.mp4", "d.gif"]
    assert (tmp_path / "out.txt").read_text().splitlines() == list(dict.fromkeys(line["caption"] for line in made))

    # A kill in the middle of a line, and one video more; whatever is done again is the same.
    whole = record.read_text()
    record.write_text(whole[: whole.index("\n") + 30])
    write_video(videos / "e.mp4", clip(3), fps=8)
    settings = CaptionConfig(str(model), config.instruction, 2, 8)
    captions, bad = caption_folder(videos, settings, record, "cpu", skip_bad=False)
    assert {name: captions[name] for name in ("a.mp4", "b/c.mp4", "d.gif")} == {
        line["video"]: line["caption"] for line in made
    }
    assert list(captions) == ["a.mp4", "b/c.mp4", "d.gif", "e.mp4"] and not bad
    assert len(record.read_text().splitlines()) == 4

    # All is known: the model is not even there. Other settings are not known.
    monkeypatch.setattr("accvideo.recording.captions.Captioner", None)
    assert caption_folder(videos, settings, record, "cpu", skip_bad=False) == (captions, [])
    with pytest.raises(TypeError):
        caption_folder(videos, replace(settings, instruction="?"), record, "cpu", skip_bad=False)


def write_padded(path: Path, seed: int) -> None:
    """A video of 4096 bytes, filled up by a box that players pass over."""
    write_video(path, clip(seed), fps=8)
    rest = 4096 - path.stat().st_size
    path.write_bytes(path.read_bytes() + rest.to_bytes(4, "big") + b"free" + bytes(rest - 8))


def test_a_replaced_video_is_captioned_anew_and_a_renamed_one_is_not(model: Path, tmp_path: Path):
    """Though name, size and date of the one stay, and of the other change."""
    folder, record = tmp_path / "videos", tmp_path / "record.jsonl"
    for seed, name in enumerate(("a.mp4", "b.mp4")):
        write_padded(folder / name, seed)
    settings = CaptionConfig(str(model), "?", 2, 8)
    before, _ = caption_folder(folder, settings, record, "cpu", skip_bad=False)
    (folder / "b.mp4").rename(folder / "c.mp4")
    os.utime(folder / "c.mp4", (0, 0))
    was = (folder / "a.mp4").stat()
    write_padded(folder / "a.mp4", 2)
    os.utime(folder / "a.mp4", ns=(was.st_atime_ns, was.st_mtime_ns))
    assert (folder / "a.mp4").stat().st_size == was.st_size
    after, _ = caption_folder(folder, settings, record, "cpu", skip_bad=False)
    made = [json.loads(line) for line in record.read_text().splitlines()]
    assert [line["video"] for line in made] == ["a.mp4", "b.mp4", "a.mp4"]
    assert after == {"a.mp4": made[2]["caption"], "c.mp4": before["b.mp4"]}


def test_captions_of_videos_known_by_name_and_size_are_refused(model: Path, videos: Path, tmp_path: Path):
    """And not touched, a line that was cut short included."""
    settings, record = CaptionConfig(str(model), "?", 2, 8), tmp_path / "record.jsonl"
    of = {"video": "a.mp4", "bytes": (videos / "a.mp4").stat().st_size, **asdict(settings)}
    text = json.dumps({"of": of, "caption": "old"}) + '\n{"of'
    record.write_text(text)
    with pytest.raises(UserError, match="of an earlier version, .*by name and size.*\n.*captioned anew"):
        caption_folder(videos, settings, record, "cpu", skip_bad=False)
    assert record.read_text() == text


def shown(captioner: Captioner, path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the model reads when it captions four frames of a video."""
    read, generate = [], captioner.model.generate
    monkeypatch.setattr(
        captioner.model, "generate", lambda **inputs: read.append(inputs["input_ids"][0]) or generate(**inputs)
    )
    caption = captioner(spread_frames(path, 9, 4))
    monkeypatch.undo()
    assert isinstance(caption, str)
    return captioner.processor.decode(read[0])


def test_a_model_that_knows_videos_sees_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("torchvision")
    write_video(tmp_path / "a.mp4", clip(0), fps=8)
    for save in (save_tiny_internvl, save_tiny_qwen3_vl):
        save(tmp_path / save.__name__)
    internvl = Captioner(CaptionConfig(str(tmp_path / "save_tiny_internvl"), "What?", 4, 8), "cpu")
    text = shown(internvl, tmp_path / "a.mp4", monkeypatch)
    # One tile of four tokens a frame; as images, each of 32 x 48 is cut into two and shown whole beside.
    assert text.count("<image>") == 4 * 4 and "Frame4: " in text and "What?" in text
    internvl.knows_videos = False
    text = shown(internvl, tmp_path / "a.mp4", monkeypatch)
    assert text.count("<image>") > 2 * 4 * 4 and "Frame" not in text

    qwen = Captioner(CaptionConfig(str(tmp_path / "save_tiny_qwen3_vl"), "What?", 4, 8), "cpu")
    text = shown(qwen, tmp_path / "a.mp4", monkeypatch)
    # Frames 1, 3, 5 and 7, eight a second, two at a time.
    assert "<0.2 seconds>" in text and "<0.8 seconds>" in text and "What?" in text


def test_a_model_that_knows_images_only_sees_images(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_video(tmp_path / "a.mp4", clip(0), fps=8)
    llava = Captioner(CaptionConfig(str(model), "What?", 4, 8), "cpu")
    assert not llava.knows_videos
    assert shown(llava, tmp_path / "a.mp4", monkeypatch).count("<image>") == 4 * (28 // 14) ** 2


def test_a_video_that_cannot_be_read_is_found_before_the_model_is_loaded(videos: Path, model: Path, tmp_path: Path):
    (videos / "bad.mp4").write_bytes(os.urandom(1000))
    (videos / "empty.webm").write_bytes(b"")
    settings = CaptionConfig("no-such-model", "?", 2, 8)
    with pytest.raises(UserError, match="cannot read the video .*bad.mp4"):
        caption_folder(videos, settings, tmp_path / "record.jsonl", "cpu", skip_bad=False)
    captions, bad = caption_folder(
        videos, replace(settings, model=str(model)), tmp_path / "record.jsonl", "cpu", skip_bad=True
    )
    assert len(captions) == 3 and len(bad) == 2


def test_a_video_whose_frames_differ_in_size_is_refused(tmp_path: Path):
    # Motion JPEG is a row of pictures, each with its own size; two such streams make one.
    parts = []
    for number, (height, width) in enumerate(((32, 48), (48, 32))):
        with av.open(str(tmp_path / f"{number}.mjpeg"), "w", format="mjpeg") as container:
            stream = container.add_stream("mjpeg", rate=8, width=width, height=height, pix_fmt="yuvj420p")
            for _ in range(4):
                gray = torch.zeros(height, width, 3, dtype=torch.uint8).numpy()
                container.mux(stream.encode(av.VideoFrame.from_ndarray(gray, format="rgb24")))
            container.mux(stream.encode())
        parts.append((tmp_path / f"{number}.mjpeg").read_bytes())
    video = tmp_path / "several.mjpeg"
    video.write_bytes(b"".join(parts))
    assert count_frames(video) == 8
    assert spread_frames(tmp_path / "1.mjpeg", 4, 2).frames.shape == (2, 48, 32, 3)
    with pytest.raises(UserError, match="cannot read the video .*several.mjpeg: its frames differ in size"):
        spread_frames(video, 8, 2)


def test_what_is_no_model_or_no_folder_of_videos_is_refused(videos: Path, model: Path, tmp_path: Path):
    record = tmp_path / "record.jsonl"
    with pytest.raises(UserError, match="cannot load .*\n.*image-text-to-text"):
        caption_folder(videos, CaptionConfig(str(tmp_path), "?", 2, 8), record, "cpu", skip_bad=False)
    with pytest.raises(UserError, match="holds no videos"):
        caption_folder(model, CaptionConfig(str(model), "?", 2, 8), record, "cpu", skip_bad=False)
    for data in (b'{"caption": 1}\n', b'{"of": {"sha256": "0"}, "caption": 1}\n', b"[" * 100_000 + b"\n", b"\xff\n"):
        record.write_bytes(data)
        with pytest.raises(UserError, match="no file of captions"):
            caption_folder(videos, CaptionConfig(str(model), "?", 2, 8), record, "cpu", skip_bad=False)


def test_the_command_says_what_a_folder_needs(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["prompts", str(videos), "--out", str(tmp_path / "out.txt")]) == 1
    assert "give it with --model" in capsys.readouterr().err
    (tmp_path / "in.csv").write_text("prompt,image\na fox,\n")
    assert run(["prompts", str(tmp_path / "in.csv"), str(videos), "--out", str(tmp_path / "out.txt")]) == 1
    assert run(["prompts", str(tmp_path / "in.csv"), "--out", str(tmp_path / "out.txt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_prompts"] == 1
