"""Settings for the released teachers: what to record, how to distill it, and the networks' own configurations.

Sizes, steps, guidance and shift are the ones the authors of a teacher generate with; steps of the student, key points
and training settings are those of AccVideo (arXiv:2503.19462 and its released code) where it made a student of that
teacher, and follow them by analogy where it did not.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from accvideo.call import DenoiserCall
from accvideo.planning.networks import (
    CLIP_H_VISION,
    CLIP_L,
    HUNYUAN_VIDEO,
    LLAMA_8B,
    LTX,
    MOCHI,
    T5_XXL,
    UMT5_XXL,
    WAN_14B,
    WAN_22_VAE,
    Network,
)
from accvideo.recording.config import RecordConfig
from accvideo.training import recipe
from accvideo.training.recipe import DistillConfig, paper
from accvideo.types import UserError

Guidance = Literal["embedded", "second call", "doubled batch"]
"""How a teacher is guided: by an input of its denoiser, by a second call a step, or by a batch of two."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A released teacher with the settings to record and distill it."""

    teacher: str
    """Hub id of the diffusers folder."""
    pipeline_class: str
    height: int
    """In pixels."""
    width: int
    """In pixels."""
    num_frames: int
    fps: int
    """Frames a second."""
    time_stride: int
    """Frames of a latent frame: clips have `time_stride * n + 1` frames."""
    space_stride: int
    """Pixels of a latent pixel, along each side."""
    patch_size: int
    """Latent pixels of a token, along each side."""
    num_steps: int
    """Denoising steps S of the teacher."""
    num_student_steps: int
    """Steps K of the student: its key points are every (S / K)-th state."""
    guidance_scale: float
    guidance: Guidance
    shift: float | None
    """Of the scheduler's noise levels; None: the pipeline computes its own."""
    pipeline_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the pipeline's call."""
    denoiser: Network
    num_denoisers: int = 1
    """2 where one denoiser takes the noisy steps and another of the same shape the others."""
    vae: Network
    vae_tiling: bool = False
    """Whether the VAE decodes in overlapping tiles."""
    vae_streams: bool = False
    """Whether the VAE takes one latent frame after the other, each but the first two at the same cost."""
    text_encoders: tuple[Network, ...]
    image_encoder: Network | None = None
    """For image-to-video; the VAE then encodes as many frames as it decodes."""
    num_text_tokens: int
    """Tokens a prompt is padded to."""
    timestep_per_token: bool = False
    """Whether the denoiser is told a timestep for each token (Wan 2.2 TI2V)."""
    narrow_states: bool = False
    """Whether all states but one, such as the noise, are in the 16 bits of the denoiser: a file then has them so."""

    def __post_init__(self) -> None:
        self.check_size(self.height, self.width, self.num_frames)

    @property
    def feature_layers(self) -> tuple[int, int]:
        """Blocks (from 1) that the discriminator looks at: the last where noise is left, at the video one at 2/3."""
        depth = sum(self.denoiser.config[entry] for entry in self.denoiser.depth)
        return depth, round(depth * 2 / 3)

    @property
    def calls_per_step(self) -> int:
        """Denoiser calls a guided step takes for each video; a batch of two counts twice."""
        return 1 if self.guidance == "embedded" else 2

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Channels, frames, height and width of the VAE's latents."""
        channels = self.denoiser.config.get("out_channels", 16)
        frames = (self.num_frames - 1) // self.time_stride + 1
        return channels, frames, self.height // self.space_stride, self.width // self.space_stride

    @property
    def state_shape(self) -> tuple[int, ...]:
        """What the scheduler steps on: the latents, or their tokens where the pipeline packs them (LTX-Video)."""
        channels, frames, height, width = self.latent_shape
        packed = self.pipeline_class == "LTXPipeline"
        return (frames * height * width, channels) if packed else self.latent_shape

    def check_size(self, height: int | None, width: int | None, num_frames: int | None) -> None:
        """See that the teacher can make clips of this size; None is the preset's own.

        Raises:
            UserError: it cannot.
        """
        pixels, frames = self.space_stride * self.patch_size, num_frames or self.num_frames
        for name, value in (("height", height or self.height), ("width", width or self.width)):
            if value % pixels or value < pixels:
                raise UserError(
                    f"{name} is {value}: {self.teacher} makes clips of a multiple of {pixels} pixels; the nearest is "
                    f"{max(1, round(value / pixels)) * pixels}"
                )
        if (frames - 1) % self.time_stride:
            below = (frames - 1) // self.time_stride * self.time_stride + 1
            raise UserError(
                f"num_frames is {frames}: {self.teacher} makes clips of {self.time_stride}n + 1 frames; the nearest "
                f"are {below} and {below + self.time_stride}"
            )

    def call(self) -> DenoiserCall:
        """The shapes of the call that the pipeline makes of its denoiser, for one clip, on the meta device."""
        return CALLS[self.denoiser.class_name](self)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor of one row that has a shape and nothing else."""
    return torch.empty(1, *shape, dtype=dtype, device="meta")


def wan_call(preset: Preset) -> DenoiserCall:
    """A Wan pipeline's call."""
    _, *sizes = preset.latent_shape
    tensors = {
        "timestep": meta(dtype=torch.int64),
        "encoder_hidden_states": meta(preset.num_text_tokens, preset.denoiser.config.get("text_dim", 4096)),
    }
    if preset.timestep_per_token:
        frames, height, width = sizes
        tensors["timestep"] = meta(frames * (height // 2) * (width // 2), dtype=torch.float32)
    condition = None
    if preset.image_encoder is not None:
        tensors["encoder_hidden_states_image"] = meta(257, 1280)
        condition = meta(preset.denoiser.config["in_channels"], *sizes)
    return DenoiserCall(tensors, {}, condition, dtype=torch.bfloat16)


def hunyuan_call(preset: Preset) -> DenoiserCall:
    """HunyuanVideo's call."""
    tensors = {
        "timestep": meta(dtype=torch.float32),
        "encoder_hidden_states": meta(preset.num_text_tokens, 4096),
        "encoder_attention_mask": meta(preset.num_text_tokens),
        "pooled_projections": meta(768),
        "guidance": meta(),
    }
    return DenoiserCall(tensors, {}, dtype=torch.bfloat16)


def t5_call(preset: Preset) -> DenoiserCall:
    """Mochi's call."""
    tensors = {
        "timestep": meta(dtype=torch.float32),
        "encoder_hidden_states": meta(preset.num_text_tokens, 4096),
        "encoder_attention_mask": meta(preset.num_text_tokens, dtype=torch.bool),
    }
    return DenoiserCall(tensors, {}, dtype=torch.bfloat16)


def ltx_call(preset: Preset) -> DenoiserCall:
    """LTX-Video's call: it is told the sizes of the video that the tokens are of."""
    _, frames, height, width = preset.latent_shape
    scale = [preset.time_stride / preset.fps, preset.space_stride, preset.space_stride]
    sizes = {"num_frames": frames, "height": height, "width": width, "rope_interpolation_scale": scale}
    return replace(t5_call(preset), constants=sizes)


CALLS: dict[str, Callable[[Preset], DenoiserCall]] = {
    "WanTransformer3DModel": wan_call,
    "HunyuanVideoTransformer3DModel": hunyuan_call,
    "LTXVideoTransformer3DModel": ltx_call,
    "MochiTransformer3DModel": t5_call,
}
"""What a pipeline tells its denoiser, by the denoiser's class."""


WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""Wan's own default (`wan/configs/shared_config.py`)."""

HUNYUAN_544P = Preset(
    teacher="hunyuanvideo-community/HunyuanVideo",
    pipeline_class="HunyuanVideoPipeline",
    height=544,
    width=960,
    num_frames=93,
    fps=24,
    time_stride=4,
    space_stride=8,
    patch_size=2,
    num_steps=50,
    num_student_steps=5,
    guidance_scale=6.0,
    guidance="embedded",
    shift=7.0,
    denoiser=HUNYUAN_VIDEO,
    vae=Network("AutoencoderKLHunyuanVideo"),
    vae_tiling=True,
    text_encoders=(LLAMA_8B, CLIP_L),
    num_text_tokens=256,
    narrow_states=True,
)
"""The paper's teacher at the size that its student was trained at."""

WAN21_T2V_14B = Preset(
    teacher="Wan-AI/Wan2.1-T2V-14B-Diffusers",
    pipeline_class="WanPipeline",
    height=480,
    width=832,
    num_frames=81,
    fps=16,
    time_stride=4,
    space_stride=8,
    patch_size=2,
    num_steps=50,
    num_student_steps=10,
    guidance_scale=5.0,
    guidance="second call",
    shift=5.0,
    pipeline_args={"negative_prompt": WAN_NEGATIVE_PROMPT},
    denoiser=WAN_14B,
    vae=Network("AutoencoderKLWan"),
    vae_streams=True,
    text_encoders=(UMT5_XXL,),
    num_text_tokens=512,
)
"""AccVideo-WanX-T2V-14B's teacher."""

PRESETS: dict[str, Preset] = {
    "hunyuan-544p": HUNYUAN_544P,
    # Section 5.1: the same settings without training at this size.
    "hunyuan-720p": replace(HUNYUAN_544P, height=720, width=1280, num_frames=129),
    "wan21-t2v-14b": WAN21_T2V_14B,
    # Guidance and shift: what Wan's README recommends for this size of the model.
    "wan21-t2v-1.3b": replace(
        WAN21_T2V_14B,
        teacher="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        guidance_scale=6.0,
        shift=8.0,
        denoiser=WAN_14B.but(num_attention_heads=12, ffn_dim=8960, num_layers=30),
    ),
    # AccVideo-WanX-I2V-480P-14B's teacher: 40 steps.
    "wan21-i2v-14b": replace(
        WAN21_T2V_14B,
        teacher="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
        pipeline_class="WanImageToVideoPipeline",
        num_steps=40,
        shift=3.0,
        denoiser=WAN_14B.but(in_channels=36, image_dim=1280, added_kv_proj_dim=5120),
        image_encoder=CLIP_H_VISION,
    ),
    # `wan/configs/wan_t2v_A14B.py`: guidance 4 for the expert of the noisy steps, 3 for the other.
    "wan22-t2v-a14b": replace(
        WAN21_T2V_14B,
        teacher="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        height=720,
        width=1280,
        num_steps=40,
        guidance_scale=4.0,
        shift=12.0,
        pipeline_args={"negative_prompt": WAN_NEGATIVE_PROMPT, "guidance_scale_2": 3.0},
        num_denoisers=2,
    ),
    # `wan/configs/wan_ti2v_5B.py`.
    "wan22-ti2v-5b": replace(
        WAN21_T2V_14B,
        teacher="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        height=704,
        width=1280,
        num_frames=121,
        fps=24,
        space_stride=16,
        denoiser=WAN_14B.but(num_attention_heads=24, ffn_dim=14336, num_layers=30, in_channels=48, out_channels=48),
        timestep_per_token=True,
        vae=WAN_22_VAE,
    ),
    # The pipeline's own defaults and the model card's negative prompt; it computes its shift from the size.
    "ltx": Preset(
        teacher="Lightricks/LTX-Video",
        pipeline_class="LTXPipeline",
        height=512,
        width=704,
        num_frames=161,
        fps=25,
        time_stride=8,
        space_stride=32,
        patch_size=1,
        num_steps=50,
        num_student_steps=5,
        guidance_scale=3.0,
        guidance="doubled batch",
        shift=None,
        pipeline_args={"negative_prompt": "worst quality, inconsistent motion, blurry, jittery, distorted"},
        denoiser=LTX,
        vae=Network("AutoencoderKLLTXVideo"),
        text_encoders=(T5_XXL,),
        num_text_tokens=128,
    ),
    # Settings of `demos/cli.py` in genmoai/mochi; its noise levels are linear, then quadratic.
    "mochi": Preset(
        teacher="genmo/mochi-1-preview",
        pipeline_class="MochiPipeline",
        height=480,
        width=848,
        num_frames=163,
        fps=30,
        time_stride=6,
        space_stride=8,
        patch_size=2,
        num_steps=64,
        num_student_steps=8,
        guidance_scale=4.5,
        guidance="doubled batch",
        shift=None,
        denoiser=MOCHI,
        vae=Network("AutoencoderKLMochi"),
        text_encoders=(T5_XXL,),
        num_text_tokens=256,
        narrow_states=True,
    ),
}
"""The presets by the name that `--preset` knows."""


def find_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        UserError: there is none.
    """
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; known are {', '.join(PRESETS)}")
    return PRESETS[name]


def record_defaults(preset: Preset) -> RecordConfig:
    """What `accvideo record` starts from; prompts and folder are left to the command line."""
    return RecordConfig(
        teacher=preset.teacher,
        prompts=tyro.MISSING,
        out=tyro.MISSING,
        num_steps=preset.num_steps,
        teacher_num_steps=preset.num_steps,
        num_student_steps=preset.num_student_steps,
        guidance_scale=preset.guidance_scale,
        height=preset.height,
        width=preset.width,
        num_frames=preset.num_frames,
        fps=preset.fps,
        shift=preset.shift,
        pipeline_arg=tuple(f"{name}={json.dumps(value)}" for name, value in preset.pipeline_args.items()),
        dtype="bfloat16",
    )


def distill_defaults(preset: Preset, data: str, out: Path) -> DistillConfig:
    """What `accvideo distill` starts from: the paper's settings, with this teacher's feature layers."""
    return replace(paper(data, out), feature_layers=preset.feature_layers)


def names(command: str) -> list[str]:
    """The presets of `accvideo record` or `accvideo distill`; the first is what it starts from without one."""
    return [*(recipe.PRESETS if command == "distill" else ["default"]), *PRESETS]


def defaults(command: str, name: str) -> RecordConfig | DistillConfig:
    """What `accvideo record` or `accvideo distill` starts from with `--preset NAME`.

    Raises:
        UserError: there is no such preset.
    """
    if command == "distill" and name in recipe.PRESETS:
        return recipe.PRESETS[name](data=tyro.MISSING, out=tyro.MISSING)
    if command == "record" and name == "default":
        return RecordConfig(teacher=tyro.MISSING, prompts=tyro.MISSING, out=tyro.MISSING)
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; known are {', '.join(names(command))}")
    if command == "record":
        return record_defaults(PRESETS[name])
    return distill_defaults(PRESETS[name], tyro.MISSING, tyro.MISSING)


def check(name: str, config: RecordConfig | DistillConfig) -> None:
    """See that the options on top of a preset fit its teacher.

    Raises:
        UserError: the teacher cannot make clips of that size.
    """
    if name in PRESETS and isinstance(config, RecordConfig):
        PRESETS[name].check_size(config.height, config.width, config.num_frames)
