"""Real or fake, told from the frozen teacher's features by one small head a key point."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from accvideo.call import DenoiserCall, denoiser_blocks
from accvideo.losses import Logits
from accvideo.student import Student
from accvideo.training.distributed import gather
from accvideo.trajectory import TrajectoryBatch
from accvideo.types import Latents, Sigmas, UserError

NUM_GROUPS = 32  # of the heads' GroupNorm; their width is a multiple of it


def head_width(feature_width: int) -> int:
    """Channels inside a head: a third of the features', at least 64 and at most 1024, in whole groups."""
    return min(1024, max(64, feature_width // 3)) // NUM_GROUPS * NUM_GROUPS


class Head(nn.Module):
    """A small 2-D convolutional network with one real-or-fake logit a token (arXiv:2503.19462, section 4.3).

    The paper gives no widths. This is the head of phased consistency models (Wang et al. 2024, arXiv:2405.18407): a
    convolution to `head_width` channels, a residual one of the same width, and one to the logit.

    Args:
        feature_width: channels of the teacher's features.
        kernel_size: of the first two convolutions: 1 looks at each token alone (GroupNorm still sees the whole frame).
    """

    def __init__(self, feature_width: int, kernel_size: int = 1) -> None:
        super().__init__()
        width = head_width(feature_width)

        def block(channels: int) -> nn.Sequential:
            convolution = nn.Conv2d(channels, width, kernel_size, padding="same")
            return nn.Sequential(convolution, nn.GroupNorm(NUM_GROUPS, width), nn.LeakyReLU(0.2))

        self.enter = block(feature_width)
        self.residual = block(width)
        self.logit = nn.Conv2d(width, 1, 1)

    def forward(self, frames: Tensor) -> Tensor:
        """Logits `[frames, 1, height, width]` of features `[frames, channels, height, width]`."""
        hidden = self.enter(frames)
        return self.logit(hidden + self.residual(hidden))


class Discriminator(nn.Module):
    """`D(x, k) = head_k(teacher's features of x at key point k)` (arXiv:2503.19462, section 4.3 and Figure 5).

    The teacher is frozen but passes gradients to its input. Features are those of its last block where noise is left,
    and of the block at two thirds of its depth for the finished video (block 40 of HunyuanVideo's 60), at the latents'
    own noise level. Only the heads have parameters.

    Each channel of the features is first brought to mean 0 and deviation 1, by constants: a few channels of a
    transformer are many times as large as the others, and would be all that a young head sees. On the playground heads
    then tell the last key point's videos apart with an AUC of 0.95 after 160 updates, and of 0.65 without
    (benchmarks/heads.py).

    Args:
        student: whose teacher gives the features.
        sigmas: noise levels of the K + 1 key points.
        parts: some recorded trajectories, by which the features are measured; each rank gives as many others.
        layers: blocks (from 1) that give the features where noise is left, and at the video; None: as above.
        kernel_size: of the heads' convolutions, 1 or 3.
        shared_head: one head for all key points (ablation c of the paper) instead of one each.
        keypoints: student steps whose ends are judged; None: all of them.
    """

    def __init__(
        self,
        student: Student,
        sigmas: Sigmas,
        parts: Sequence[TrajectoryBatch],
        layers: tuple[int, int] | None = None,
        kernel_size: int = 1,
        shared_head: bool = False,
        keypoints: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        judged = range(len(parts[0].calls)) if keypoints is None else keypoints
        self.places = {keypoint: place for place, keypoint in enumerate(judged)}
        self.teacher_features = student.teacher_features
        self.layers = feature_layers(student, parts[0].denoisers, layers)
        self.state_shape = parts[0].states.shape[2:]
        self.final_timestep_ratio = float(sigmas[-1] / sigmas[-2])
        rows = [[channel_moments(self.real_features(part, k)) for k in judged] for part in parts]
        means, variances = gather(torch.stack([torch.stack(row) for row in rows])).unbind(2)
        self.center: Tensor
        self.scale: Tensor
        self.register_buffer("center", means.mean(0))  # [key points, channels]
        self.register_buffer("scale", (variances.mean(0) + means.var(0, correction=0)).sqrt().clamp(min=1e-6))
        width = self.center.shape[1]
        self.heads = nn.ModuleList(Head(width, kernel_size) for _ in range(1 if shared_head else len(judged)))

    @torch.no_grad()
    def real_features(self, batch: TrajectoryBatch, keypoint: int) -> Tensor:
        """`features` of the recorded states that student step `keypoint` should lead to."""
        return self.features(batch.state(keypoint + 1), batch, keypoint)

    def features(self, latents: Latents, batch: TrajectoryBatch, keypoint: int) -> Tensor:
        """The teacher's float32 features `[batch, tokens, width]` of latents that student step `keypoint` led to."""
        if keypoint + 1 < len(batch.calls):
            call, denoiser = batch.call(keypoint + 1), batch.denoisers[keypoint + 1]
        else:
            call, denoiser = at_final_timestep(batch.call(-1), self.final_timestep_ratio), batch.denoisers[-1]
        return self.teacher_features(denoiser, call, latents, self.layers[keypoint]).float()

    def logits(self, features: Tensor, keypoint: int) -> Logits:
        """One logit a token for the features of latents that student step `keypoint` led to; above 0 is real."""
        place = self.places[keypoint]
        features = (features - self.center[place]) / self.scale[place]
        frames, height, width = token_grid(features.shape[1], self.state_shape)
        images = features.reshape(-1, height, width, features.shape[-1]).permute(0, 3, 1, 2)
        head = self.heads[place % len(self.heads)]
        return head(images).reshape(len(features), frames * height * width)


def channel_moments(features: Tensor) -> Float[Tensor, "2 channels"]:
    """Mean and variance of each channel of features `[batch, tokens, channels]`."""
    tokens = features.flatten(0, 1)
    return torch.stack([tokens.mean(0), tokens.var(0, correction=0)])


def feature_layers(student: Student, denoisers: Sequence[str], layers: tuple[int, int] | None) -> list[int]:
    """Number of the block (from 1) that gives the features after each student step; the last step ends at the video.

    Raises:
        UserError: a denoiser has fewer blocks than asked for.
    """
    depths = [len(denoiser_blocks(student.denoisers[name])) for name in denoisers]
    if layers is None:
        return [*depths[1:], max(1, round(depths[-1] * 2 / 3))]
    if not all(1 <= layer <= min(depths) for layer in layers):
        raise UserError(
            f"feature layers {layers} of a denoiser with {min(depths)} blocks; choose from 1 to {min(depths)}"
        )
    return [layers[0]] * (len(depths) - 1) + [layers[1]]


def at_final_timestep(call: DenoiserCall, ratio: float) -> DenoiserCall:
    """The call at the last key point, which the teacher never made: the one before with its timestep scaled.

    `ratio` is the last noise level over the one before: 0, so timestep 0, unless a scheduler counts sigmas upwards.
    """
    timestep = call.tensors["timestep"]
    return replace(call, tensors=call.tensors | {"timestep": (timestep.double() * ratio).to(timestep.dtype)})


def token_grid(num_tokens: int, state_shape: Sequence[int]) -> tuple[int, int, int]:
    """Frames, height and width of `num_tokens` tokens of a state `[channels, frames, height, width]`.

    Tokens of a packed state, or tokens that do not divide by frame, are one frame of one column.
    """
    if len(state_shape) == 4:
        _, frames, height, width = state_shape
        rows = round(math.sqrt(num_tokens / frames * height / width))
        if rows and num_tokens % (frames * rows) == 0:
            return frames, rows, num_tokens // (frames * rows)
    return 1, num_tokens, 1
