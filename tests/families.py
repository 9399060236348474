"""Every kind of video pipeline that accvideo works with, tiny, with random weights: no download.

Text encoders and tokenizers are made on the spot. A clip has 16x16 or 32x32 pixels and 5 to 9 frames.
"""

import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AnyFlowPipeline,
    AnyFlowTransformer3DModel,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLMagvit,
    ChronoEditPipeline,
    ChronoEditTransformer3DModel,
    ClassifierFreeGuidance,
    Cosmos2_5_PredictBasePipeline,
    CosmosTransformer3DModel,
    DiffusionPipeline,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeliosPipeline,
    HeliosScheduler,
    HeliosTransformer3DModel,
    HunyuanSkyreelsImageToVideoPipeline,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackPipeline,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    Kandinsky5I2VPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LucyEditPipeline,
    MochiPipeline,
    MotifVideoImage2VideoPipeline,
    MotifVideoPipeline,
    MotifVideoTransformer3DModel,
    SanaImageToVideoPipeline,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    WanAnimatePipeline,
    WanAnimateTransformer3DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)
from PIL import Image
from transformers import (
    ByT5Tokenizer,
    CLIPImageProcessor,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
    T5Gemma2Encoder,
    T5Gemma2EncoderConfig,
)

from accvideo.recording.config import RecordConfig
from tests.tiny import (
    BLOCK_WIDTHS,
    HUNYUAN_SIZES,
    LANGUAGE,
    LETTERS,
    TEXT_WIDTH,
    TINY_CALL,
    TINY_HUNYUAN_CALL,
    VISION,
    WAN_SIZES,
    clip_vision,
    clip_vision_config,
    flow_scheduler,
    quiet,
    t5_tokenizer,
    tiny_hunyuan_pipeline,
    tiny_image,
    tiny_ltx_pipeline,
    tiny_mochi_pipeline,
    tiny_wan_i2v_pipeline,
    tiny_wan_pipeline,
    umt5_encoder,
    wan_transformer,
    wan_vae,
)


@dataclass(frozen=True)
class Family:
    """A tiny pipeline and how to call it."""

    pipeline_class: type[DiffusionPipeline]
    make: Callable[[], Any]
    arguments: dict[str, Any]
    """Of its call, as JSON."""
    media: dict[str, str] = field(default_factory=dict)
    """Arguments that are images and videos, as names of the files that `write_media` makes."""
    guidance_scale: float = 3.0
    guided: dict[str, Any] = field(default_factory=dict)
    """Further arguments when guided."""
    constants: dict[str, int] = field(default_factory=dict)
    """Lengths that the pipeline class sets itself and no argument changes; smaller ones here, for speed."""
    stand_ins: dict[str, Any] = field(default_factory=dict)
    """By their import paths, what stands for parts of packages that are not installed here."""
    tolerance: float = 0.0
    """Largest difference of a replayed state from the recorded one."""
    has_lora: bool = True
    """Whether diffusers gives the denoiser adapters."""
    num_guided_calls: int = 2
    """Denoiser calls a step with that guidance; 1 where it is embedded."""


NUM_STEPS = 2
PROMPTS = ("a red square", "two dots")


@contextmanager
def installed(family: Family) -> Iterator[Family]:
    """A context in which a family's stand-ins and lengths hold."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in family.constants.items():
            setting = property(lambda self, value=value: value, lambda self, _: None)
            patch.setattr(family.pipeline_class, name, setting, raising=False)
        for path, value in family.stand_ins.items():
            module, _, name = path.rpartition(".")
            patch.setattr(importlib.import_module(module), name, value, raising=False)
        yield family


def write_teacher(family: Family, folder: Path) -> None:
    """Writes the pipeline to `teacher`, and `prompts.jsonl` with the images and videos that it names."""
    write_media(folder)
    family.make().save_pretrained(folder / "teacher")
    rows = [{"prompt": prompt, **family.media} for prompt in PROMPTS]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))


def configuration(family: Family, folder: Path, out: str, guidance_scale: float, **guided: Any) -> RecordConfig:
    """Of a recording of two prompts, each of the teacher's two steps kept."""
    return RecordConfig(
        teacher=str(folder / "teacher"),
        prompts=folder / "prompts.jsonl",
        out=folder / out,
        num_steps=NUM_STEPS,
        num_student_steps=NUM_STEPS,
        guidance_scale=guidance_scale,
        pipeline_arg=tuple(f"{name}={json.dumps(value)}" for name, value in {**family.arguments, **guided}.items()),
    )


def write_media(folder: Path) -> None:
    """Writes `image.png`, of 32x32 pixels, and `video.gif`, of 5 frames."""
    tiny_image().save(folder / "image.png")
    first, *others = [tiny_image(seed) for seed in range(5)]
    first.save(folder / "video.gif", save_all=True, append_images=others, duration=60)


def wan_parts(scheduler: str = "euler") -> dict[str, Any]:
    """What the pipelines of Wan's kind have in common."""
    torch.manual_seed(0)
    return {
        "tokenizer": t5_tokenizer(),
        "text_encoder": umt5_encoder(),
        "vae": wan_vae(),
        "scheduler": flow_scheduler(scheduler),
    }


def wan_ti2v() -> WanPipeline:
    """Wan 2.2 TI2V-5B from text: a timestep for each token."""
    return quiet(WanPipeline(**wan_parts(), transformer=wan_transformer(), expand_timesteps=True))


def wan_ti2v_image() -> WanImageToVideoPipeline:
    """Wan 2.2 TI2V-5B from an image: the first frame is put in place of the state's."""
    return quiet(WanImageToVideoPipeline(**wan_parts(), transformer=wan_transformer(), expand_timesteps=True))


def wan_vace() -> WanVACEPipeline:
    """Wan 2.1 VACE: a control branch."""
    parts = wan_parts()
    transformer = WanVACETransformer3DModel(**WAN_SIZES, vace_layers=[0, 1], vace_in_channels=2 * 4 + 64)
    return quiet(WanVACEPipeline(**parts, transformer=transformer.eval()))


def wan_video() -> WanVideoToVideoPipeline:
    """Wan video-to-video."""
    return quiet(WanVideoToVideoPipeline(**wan_parts("unipc"), transformer=wan_transformer()))


def lucy() -> LucyEditPipeline:
    """Lucy Edit: the video to edit is further channels."""
    return quiet(LucyEditPipeline(**wan_parts(), transformer=wan_transformer(in_channels=8)))


def skyreels_transformer(in_channels: int = 4, image_dim: int | None = None) -> SkyReelsV2Transformer3DModel:
    """Width 24, 2 blocks."""
    return SkyReelsV2Transformer3DModel(**WAN_SIZES | {"in_channels": in_channels, "image_dim": image_dim}).eval()


def skyreels() -> SkyReelsV2Pipeline:
    """SkyReels V2 T2V."""
    return quiet(SkyReelsV2Pipeline(**wan_parts("unipc"), transformer=skyreels_transformer()))


def skyreels_image() -> SkyReelsV2ImageToVideoPipeline:
    """SkyReels V2 I2V."""
    parts = wan_parts("unipc") | clip_vision()
    transformer = skyreels_transformer(in_channels=12, image_dim=16)
    return quiet(SkyReelsV2ImageToVideoPipeline(**parts, transformer=transformer))


def chronoedit() -> ChronoEditPipeline:
    """ChronoEdit: the image to edit is the first of the frames."""
    parts = wan_parts() | clip_vision()
    transformer = ChronoEditTransformer3DModel(**WAN_SIZES | {"in_channels": 12, "image_dim": 16})
    return quiet(ChronoEditPipeline(**parts, transformer=transformer.eval()))


def anyflow() -> AnyFlowPipeline:
    """AnyFlow, asked for velocities at a point (not for means over steps)."""
    parts: dict[str, Any] = wan_parts() | {"scheduler": FlowMapEulerDiscreteScheduler()}
    return quiet(AnyFlowPipeline(**parts, transformer=AnyFlowTransformer3DModel(**WAN_SIZES).eval()))


def hunyuan_parts() -> dict[str, Any]:
    """What the pipelines of HunyuanVideo's kind have in common."""
    return {name: part for name, part in tiny_hunyuan_pipeline().components.items() if name != "transformer"}


def hunyuan_transformer(in_channels: int = 4, **settings: Any) -> HunyuanVideoTransformer3DModel:
    """Width 20, 1 double and 1 single block."""
    return HunyuanVideoTransformer3DModel(**HUNYUAN_SIZES | {"in_channels": in_channels} | settings).eval()


def hunyuan_image(condition: str) -> HunyuanVideoImageToVideoPipeline:
    """HunyuanVideo I2V; the image is put in place of a frame (token_replace) or is further channels (latent_concat)."""
    parts = hunyuan_parts()
    llava = LlavaConfig(
        text_config=LlamaConfig(vocab_size=len(LETTERS) + 5, num_hidden_layers=3, pad_token_id=2, **LANGUAGE),
        vision_config=clip_vision_config(),
        image_token_index=len(LETTERS) + 4,
        vision_feature_layer=-1,
    )
    llava.pad_token_id = 2  # read by the pipeline
    transformer = hunyuan_transformer(
        in_channels=4 if condition == "token_replace" else 9,
        guidance_embeds=condition == "token_replace",
        image_condition_type=condition,
    )
    parts |= {"text_encoder": LlavaForConditionalGeneration(llava).eval(), "transformer": transformer}
    return quiet(HunyuanVideoImageToVideoPipeline(**parts, image_processor=CLIPImageProcessor(size=32, crop_size=32)))


def hunyuan_skyreels() -> HunyuanSkyreelsImageToVideoPipeline:
    """SkyReels' image-to-video on HunyuanVideo: guidance by two calls, on by default."""
    parts = hunyuan_parts()
    return quiet(HunyuanSkyreelsImageToVideoPipeline(**parts, transformer=hunyuan_transformer(8, guidance_embeds=True)))


def ltx_image() -> LTXImageToVideoPipeline:
    """LTX-Video I2V: the scheduler steps on the frames after the first, unpacked."""
    return quiet(LTXImageToVideoPipeline(**tiny_ltx_pipeline().components))


def gemma_tokenizer() -> GemmaTokenizer:
    """One token a character."""
    vocab = {token: index for index, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "▁", *LETTERS])}
    return GemmaTokenizer(vocab=vocab, merges=[], model_max_length=64)


def sana_parts() -> dict[str, Any]:
    """What Sana-Video's two pipelines have in common."""
    torch.manual_seed(0)
    gemma = Gemma2Config(
        vocab_size=len(LETTERS) + 5, num_hidden_layers=1, num_key_value_heads=2, head_dim=8, **LANGUAGE
    )
    transformer = SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=TEXT_WIDTH,
    )
    return {
        "tokenizer": gemma_tokenizer(),
        "text_encoder": Gemma2Model(gemma).eval(),
        "vae": wan_vae(),
        "transformer": transformer.eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=8.0),
    }


def sana() -> SanaVideoPipeline:
    """Sana-Video T2V."""
    return quiet(SanaVideoPipeline(**sana_parts()))


def sana_image() -> SanaImageToVideoPipeline:
    """Sana-Video I2V: the first frame is given."""
    return quiet(SanaImageToVideoPipeline(**sana_parts()))


def qwen_tokenizer() -> Qwen2Tokenizer:
    """One token a byte, with a chat template that is the text itself."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>"]
    vocab = {token: index for index, token in enumerate([*LETTERS, "Ġ", "Ċ", *special])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=2048)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


def qwen_text_config() -> dict[str, Any]:
    """Width 16, 3 layers."""
    rope = {"type": "mrope", "mrope_section": [1, 1, 2]}
    own = {"vocab_size": len(LETTERS) + 8, "num_hidden_layers": 3, "num_key_value_heads": 2, "rope_scaling": rope}
    return own | LANGUAGE


def qwen_vision_config() -> dict[str, Any]:
    """Width 16, 1 layer."""
    return {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": TEXT_WIDTH}


def siglip() -> dict[str, Any]:
    """An image encoder of one layer and the processor of its images, by the names of the pipelines' components."""
    config = SiglipVisionConfig(intermediate_size=16, num_hidden_layers=1, **VISION)
    processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    return {"image_encoder": SiglipVisionModel(config).eval(), "feature_extractor": processor}


def hunyuan_15_parts(**settings: Any) -> dict[str, Any]:
    """What HunyuanVideo 1.5's two pipelines have in common."""
    torch.manual_seed(0)
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=TEXT_WIDTH,
        text_embed_2_dim=TEXT_WIDTH,
        image_embed_dim=16,
        rope_axes_dim=(2, 4, 4),
        target_size=64,
        **settings,
    )
    widths: Any = (8, 8, 8, 8, 8)
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=widths, layers_per_block=1, spatial_compression_ratio=16
    )
    byt5 = T5Config(
        vocab_size=384, d_model=TEXT_WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return {
        "text_encoder": Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**qwen_text_config())).eval(),
        "tokenizer": qwen_tokenizer(),
        "transformer": transformer.eval(),
        "vae": vae.eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "text_encoder_2": T5EncoderModel(byt5).eval(),
        "tokenizer_2": ByT5Tokenizer(),
        "guider": ClassifierFreeGuidance(guidance_scale=6.0),
    }


def hunyuan_15() -> HunyuanVideo15Pipeline:
    """HunyuanVideo 1.5 T2V: guidance is a component's."""
    return quiet(HunyuanVideo15Pipeline(**hunyuan_15_parts(task_type="t2v")))


def hunyuan_15_image() -> HunyuanVideo15ImageToVideoPipeline:
    """HunyuanVideo 1.5 I2V."""
    return quiet(HunyuanVideo15ImageToVideoPipeline(**hunyuan_15_parts(task_type="i2v"), **siglip()))


def kandinsky_parts(visual_cond: bool) -> dict[str, Any]:
    """What Kandinsky 5's two video pipelines have in common."""
    parts = hunyuan_parts()
    qwen = Qwen2_5_VLConfig(text_config=qwen_text_config(), vision_config=qwen_vision_config())
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=TEXT_WIDTH,
        in_text_dim2=8,
        time_dim=16,
        model_dim=24,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 4, 4),
        visual_cond=visual_cond,
    )
    for name, weight in transformer.named_parameters():
        if "modulation" in name:  # 0 until they are trained: the blocks would do nothing, and learn nothing
            torch.nn.init.normal_(weight, std=0.1)
    return parts | {
        "text_encoder": Qwen2_5_VLForConditionalGeneration(qwen).eval(),
        "tokenizer": qwen_tokenizer(),  # released: a processor of text and images; here only text is given
        "transformer": transformer.eval(),
    }


def kandinsky() -> Kandinsky5T2VPipeline:
    """Kandinsky 5 T2V: channels last."""
    return quiet(Kandinsky5T2VPipeline(**kandinsky_parts(visual_cond=False)))


def kandinsky_image() -> Kandinsky5I2VPipeline:
    """Kandinsky 5 I2V: the first frame is given, channels last."""
    return quiet(Kandinsky5I2VPipeline(**kandinsky_parts(visual_cond=True)))


def motif_parts() -> dict[str, Any]:
    """What Motif-Video's two pipelines have in common."""
    torch.manual_seed(0)
    text = {
        "vocab_size": len(LETTERS) + 5,
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "dropout_rate": 0.0,
        "attention_dropout": 0.0,
    }
    encoder = T5Gemma2EncoderConfig(
        text_config=text | LANGUAGE,
        vision_config=VISION | {"intermediate_size": 16, "num_hidden_layers": 1},
        mm_tokens_per_image=4,
        image_token_index=len(LETTERS) + 4,
    )
    transformer = MotifVideoTransformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=2,
        num_single_layers=1,
        text_embed_dim=TEXT_WIDTH,
        image_embed_dim=16,
        rope_axes_dim=(2, 4, 4),
    )
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "vae": wan_vae(),
        "text_encoder": T5Gemma2Encoder(encoder).eval(),
        "tokenizer": gemma_tokenizer(),
        "transformer": transformer.eval(),
        "guider": ClassifierFreeGuidance(guidance_scale=4.0),
        "feature_extractor": SiglipImageProcessor(size={"height": 32, "width": 32}),
    }


def motif() -> MotifVideoPipeline:
    """Motif-Video T2V: guidance is a component's."""
    return quiet(MotifVideoPipeline(**motif_parts()))


def motif_image() -> MotifVideoImage2VideoPipeline:
    """Motif-Video I2V."""
    return quiet(MotifVideoImage2VideoPipeline(**motif_parts()))


def easyanimate() -> EasyAnimatePipeline:
    """EasyAnimate T2V."""
    torch.manual_seed(0)
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": TEXT_WIDTH}
    qwen = Qwen2VLConfig(text_config=qwen_text_config(), vision_config=vision)
    transformer = EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        num_layers=2,
        mmdit_layers=2,
        time_embed_dim=8,
        text_embed_dim=TEXT_WIDTH,
        add_noise_in_inpaint_model=False,
    )
    vae = AutoencoderKLMagvit(latent_channels=4, block_out_channels=BLOCK_WIDTHS, layers_per_block=1, norm_num_groups=2)
    return quiet(
        EasyAnimatePipeline(
            vae=vae.eval(),
            text_encoder=Qwen2VLForConditionalGeneration(qwen).eval(),
            tokenizer=qwen_tokenizer(),
            transformer=transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        )
    )


def wan_animate() -> WanAnimatePipeline:
    """Wan 2.2 Animate: a pose and a face video, here in one segment."""
    parts = wan_parts() | clip_vision()
    transformer = WanAnimateTransformer3DModel(
        **WAN_SIZES | {"in_channels": 12, "image_dim": 16},
        latent_channels=4,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    return quiet(WanAnimatePipeline(**parts, transformer=transformer.eval()))


def framepack() -> HunyuanVideoFramepackPipeline:
    """FramePack: frames before the ones denoised are arguments; here in one section."""
    parts = hunyuan_parts() | siglip()
    transformer = HunyuanVideoFramepackTransformer3DModel(
        **HUNYUAN_SIZES, has_image_proj=True, image_proj_dim=16, has_clean_x_embedder=True
    )
    return quiet(HunyuanVideoFramepackPipeline(**parts, transformer=transformer.eval()))


class Guardrail:
    """Stands for the package that Cosmos checks prompts and videos with; it lets all pass."""

    def to(self, device: Any) -> "Guardrail":
        """The same: it has no weights."""
        return self

    def check_text_safety(self, prompt: str) -> bool:
        """True: no prompt is refused."""
        return True

    def check_video_safety(self, video: Any) -> Any:
        """The video itself."""
        return video


def stand_in_torchvision() -> SimpleNamespace:
    """The two functions of torchvision that Cosmos calls."""

    def resize(images: torch.Tensor, size: list[int], interpolation: Any) -> torch.Tensor:
        return torch.nn.functional.interpolate(images, size)

    def to_tensor(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255

    functional = SimpleNamespace(resize=resize, to_tensor=to_tensor)
    return SimpleNamespace(functional=functional, InterpolationMode=SimpleNamespace(NEAREST="nearest"))


def cosmos() -> Cosmos2_5_PredictBasePipeline:
    """Cosmos-Predict 2.5: from text, an image or a video; the given frames are put in place of the state's."""
    parts = wan_parts("unipc")
    qwen = Qwen2_5_VLConfig(text_config=qwen_text_config(), vision_config=qwen_vision_config())
    transformer = CosmosTransformer3DModel(
        in_channels=5,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        text_embed_dim=3 * TEXT_WIDTH,
        adaln_lora_dim=4,
        max_size=(4, 8, 8),
        extra_pos_embed_type=None,
    )
    parts |= {"text_encoder": Qwen2_5_VLForConditionalGeneration(qwen).eval(), "tokenizer": qwen_tokenizer()}
    pipeline = Cosmos2_5_PredictBasePipeline(**parts, transformer=transformer.eval(), safety_checker=Guardrail())
    pipeline.register_modules(safety_checker=None)  # no part of what is saved
    pipeline.safety_checker = Guardrail()
    return quiet(pipeline)


def helios() -> HeliosPipeline:
    """Helios: the frames before the ones denoised are arguments; here in one chunk."""
    parts: dict[str, Any] = wan_parts() | {"scheduler": HeliosScheduler(scheduler_type="euler", stages=1)}
    transformer = HeliosTransformer3DModel(**WAN_SIZES, rope_dim=(4, 4, 4))
    return quiet(HeliosPipeline(**parts, transformer=transformer.eval()))


SIZE = {"height": 32, "width": 32}
HUNYUAN_IMAGE_TEMPLATE = {
    "template": "{}", "crop_start": 0, "image_emb_len": 4, "image_emb_start": 1, "image_emb_end": 5
}  # fmt: skip
HUNYUAN_15_CALL = {"num_frames": 5, **SIZE}
HUNYUAN_15_LENGTHS = {"tokenizer_max_length": 16, "tokenizer_2_max_length": 16, "vision_num_semantic_tokens": 4}
SANA_CALL = {
    **SIZE, "frames": 5, "max_sequence_length": 16, "complex_human_instruction": None, "use_resolution_binning": False
}  # fmt: skip
COSMOS_STAND_INS = {
    "diffusers.pipelines.cosmos.pipeline_cosmos2_5_predict.CosmosSafetyChecker": Guardrail,
    "diffusers.pipelines.cosmos.pipeline_cosmos2_5_predict.torchvision": SimpleNamespace(
        transforms=stand_in_torchvision()
    ),
    "diffusers.models.transformers.transformer_cosmos.transforms": stand_in_torchvision(),
}
IMAGE, VIDEO = {"image": "image.png"}, {"video": "video.gif"}

FAMILIES: dict[str, Family] = {
    "wan": Family(WanPipeline, tiny_wan_pipeline, TINY_CALL),
    "wan-unipc": Family(WanPipeline, lambda: tiny_wan_pipeline("unipc"), TINY_CALL),
    "wan-experts": Family(WanPipeline, lambda: tiny_wan_pipeline(experts=2), TINY_CALL),
    "wan-i2v": Family(WanImageToVideoPipeline, lambda: tiny_wan_i2v_pipeline("euler"), TINY_CALL, IMAGE),
    "wan-ti2v": Family(WanPipeline, wan_ti2v, TINY_CALL),
    "wan-ti2v-i2v": Family(WanImageToVideoPipeline, wan_ti2v_image, TINY_CALL, IMAGE),
    "wan-vace": Family(WanVACEPipeline, wan_vace, TINY_CALL, VIDEO),
    "wan-v2v": Family(WanVideoToVideoPipeline, wan_video, {**SIZE, "max_sequence_length": 16, "strength": 1.0}, VIDEO),
    "lucy": Family(LucyEditPipeline, lucy, TINY_CALL, VIDEO),
    "skyreels": Family(SkyReelsV2Pipeline, skyreels, TINY_CALL),
    "skyreels-i2v": Family(SkyReelsV2ImageToVideoPipeline, skyreels_image, TINY_CALL, IMAGE),
    "hunyuan": Family(HunyuanVideoPipeline, tiny_hunyuan_pipeline, TINY_HUNYUAN_CALL, num_guided_calls=1),
    "chronoedit": Family(ChronoEditPipeline, chronoedit, TINY_CALL, IMAGE),
    "anyflow": Family(AnyFlowPipeline, anyflow, {**TINY_CALL, "use_mean_velocity": False}),
    "hunyuan-i2v": Family(
        HunyuanVideoImageToVideoPipeline,
        lambda: hunyuan_image("token_replace"),
        {**TINY_CALL, "prompt_template": HUNYUAN_IMAGE_TEMPLATE},
        IMAGE,
        num_guided_calls=1,
    ),
    "hunyuan-i2v-concat": Family(
        HunyuanVideoImageToVideoPipeline,
        lambda: hunyuan_image("latent_concat"),
        {**TINY_CALL, "prompt_template": HUNYUAN_IMAGE_TEMPLATE},
        IMAGE,
        guided={"true_cfg_scale": 6.0, "negative_prompt": "ugly"},
    ),
    "hunyuan-skyreels": Family(
        HunyuanSkyreelsImageToVideoPipeline,
        hunyuan_skyreels,
        TINY_HUNYUAN_CALL,
        IMAGE,
        guided={"negative_prompt": "ugly"},
    ),
    "hunyuan15": Family(HunyuanVideo15Pipeline, hunyuan_15, HUNYUAN_15_CALL, constants=HUNYUAN_15_LENGTHS),
    "hunyuan15-i2v": Family(
        HunyuanVideo15ImageToVideoPipeline, hunyuan_15_image, {"num_frames": 5}, IMAGE, constants=HUNYUAN_15_LENGTHS
    ),
    "sana": Family(SanaVideoPipeline, sana, SANA_CALL),
    "sana-i2v": Family(SanaImageToVideoPipeline, sana_image, SANA_CALL, IMAGE),
    "kandinsky5": Family(Kandinsky5T2VPipeline, kandinsky, TINY_CALL),
    "kandinsky5-i2v": Family(Kandinsky5I2VPipeline, kandinsky_image, TINY_CALL, IMAGE),
    "motif": Family(MotifVideoPipeline, motif, TINY_CALL),
    "motif-i2v": Family(MotifVideoImage2VideoPipeline, motif_image, TINY_CALL, IMAGE),
    "easyanimate": Family(
        EasyAnimatePipeline, easyanimate, {**SIZE, "num_frames": 5, "negative_prompt": "ugly"}, has_lora=False
    ),
    "wan-animate": Family(
        WanAnimatePipeline,
        wan_animate,
        {**SIZE, "segment_frame_length": 5, "max_sequence_length": 16},
        {**IMAGE, "pose_video": "video.gif", "face_video": "video.gif"},
        tolerance=1e-5,  # faces are not contiguous as the pipeline gives them; convolutions then round otherwise
    ),
    "framepack": Family(
        HunyuanVideoFramepackPipeline,
        framepack,
        {**TINY_HUNYUAN_CALL, "latent_window_size": 2},
        IMAGE,
        num_guided_calls=1,
    ),
    "cosmos": Family(Cosmos2_5_PredictBasePipeline, cosmos, TINY_CALL, stand_ins=COSMOS_STAND_INS),
    "cosmos-i2v": Family(
        Cosmos2_5_PredictBasePipeline,
        cosmos,
        {**TINY_CALL, "num_latent_conditional_frames": 1},
        IMAGE,
        stand_ins=COSMOS_STAND_INS,
    ),
    "helios": Family(HeliosPipeline, helios, {**TINY_CALL, "num_latent_frames_per_chunk": 2}),
    "ltx-i2v": Family(LTXImageToVideoPipeline, ltx_image, TINY_CALL, IMAGE),
    "ltx": Family(LTXPipeline, tiny_ltx_pipeline, TINY_CALL),
    "mochi": Family(MochiPipeline, tiny_mochi_pipeline, TINY_CALL),
}
"""What passes the whole chain in tests/test_families.py, by name."""
