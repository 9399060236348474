from pathlib import Path

import pytest
import torch

from accvideo.metrics import frechet_distance
from accvideo.reporting.fvd import NUM_FRAMES, VideoFeatures
from accvideo.types import UserError


def test_missing_weights_are_told_with_where_they_are(tmp_path: Path):
    """Nothing is fetched: the message has the command that does it."""
    with pytest.raises(UserError, match=f"(?s)no file {tmp_path}/i3d.pt.*curl -L -o {tmp_path}/i3d.pt https://github"):
        VideoFeatures(tmp_path / "i3d.pt")


def test_a_missing_package_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "i3d.pt").write_bytes(b"weights")
    monkeypatch.setitem(__import__("sys").modules, "cdfvd", None)
    with pytest.raises(UserError, match="(?s)takes cd-fvd.*pip install .accvideo"):
        VideoFeatures(tmp_path / "i3d.pt")


@pytest.mark.slow
def test_distances_are_those_of_the_package(tmp_path: Path):
    """On features of the real network, with random weights: our distance is the one that cd-fvd computes."""
    fvd = pytest.importorskip("cdfvd.fvd", exc_type=ImportError)
    i3d = pytest.importorskip("cdfvd.third_party.i3d.pytorch_i3d")
    torch.manual_seed(0)
    torch.save(i3d.InceptionI3d(400, in_channels=3).state_dict(), tmp_path / "i3d.pt")
    clips = torch.randint(0, 256, (2, NUM_FRAMES, 32, 32, 3), dtype=torch.uint8)
    others = clips // 2
    features = VideoFeatures(tmp_path / "i3d.pt")
    ours = frechet_distance(torch.cat([features(clips[:1]), features(clips[1:])]), features(others))
    theirs = fvd.cdfvd("i3d", ckpt_path=str(tmp_path / "i3d.pt"), n_fake="full", device="cpu")
    assert ours == pytest.approx(theirs.compute_fvd(others.numpy(), clips.numpy()), rel=1e-3)
    longer = torch.zeros(1, 2 * NUM_FRAMES - 1, 32, 32, 3, dtype=torch.uint8)
    longer[:, ::2] = clips[:1]
    assert torch.allclose(features(longer), features(clips[:1])), "frames at equal distances, both ends among them"

    (tmp_path / "broken.pt").write_bytes(b"weights")
    with pytest.raises(UserError, match="cannot read the weights"):
        VideoFeatures(tmp_path / "broken.pt")
