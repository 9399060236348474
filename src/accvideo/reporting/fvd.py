"""Features of clips for FVD, by the I3D network of the package cd-fvd; needs `accvideo[fvd]` and the weights' file."""

import sys
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from accvideo.inference.model import digest
from accvideo.metrics import Clips
from accvideo.types import UserError

NUM_FRAMES = 16
"""Frames of a clip that the network is given."""

WEIGHTS_ADDRESS = "https://github.com/songweige/TATS/raw/main/tats/fvd/i3d_pretrained_400.pt"
"""Where cd-fvd takes the weights from."""


class VideoFeatures:
    """The network, ready to run; it is never downloaded."""

    def __init__(self, weights: Path, device: str = "cpu"):
        """Loads the network.

        Args:
            weights: of I3D, trained on Kinetics-400; cd-fvd reads the file.
            device: that it runs on.

        Raises:
            UserError: the file or the package is missing, or the file holds something else.
        """
        if not weights.is_file():
            raise UserError(
                f"there is no file {weights}: FVD takes the weights of I3D, 51 MB, which nothing downloads by itself\n"
                f"curl -L -o {weights} {WEIGHTS_ADDRESS}"
            )
        try:
            fvd: Any = import_module("cdfvd.fvd")
        except (ImportError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"FVD takes cd-fvd, which cannot be imported: {reason}\npip install 'accvideo[fvd]'"
            ) from error
        self.identity = digest(weights.read_bytes())[:16]
        """Hash of the weights."""
        try:
            with redirect_stdout(sys.stderr):
                self._network = fvd.cdfvd(
                    "i3d", ckpt_path=str(weights), n_fake="full", compute_feats=True, device=device
                )
        except Exception as error:  # whatever torch raises over a file that is no checkpoint, or of another network
            reason = str(error).splitlines()[0]
            raise UserError(
                f"cd-fvd cannot read the weights {weights}: {reason}\nGet them from {WEIGHTS_ADDRESS}"
            ) from error

    def __call__(self, clips: Clips) -> Float[Tensor, "batch width"]:
        """The features of each clip, from `NUM_FRAMES` frames at equal distances; of short clips some come twice."""
        frames = clips[:, torch.linspace(0, clips.shape[1] - 1, NUM_FRAMES).round().long()]
        self._network.add_fake_stats(frames.cpu().numpy())
        return torch.from_numpy(self._network.fake_stats.get_all()[-len(clips) :])
