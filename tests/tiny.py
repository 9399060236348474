"""Tiny random-weight pipelines of the real diffusers classes: no download, tokenizer and text encoder included.

`tiny_wan_pipeline(...).save_pretrained(folder)` makes a teacher's folder. Clips are 32x32 pixels, 5 frames; pass
`**TINY_CALL` to any of the pipelines.
"""

import string
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

TINY_CALL: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 12}
"""Arguments of a pipeline's call that every tiny pipeline takes."""

LETTERS = string.ascii_letters + string.digits + string.punctuation
TEXT_WIDTH = 16


def t5_tokenizer() -> T5TokenizerFast:
    """One token a character."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((letter, -2.0) for letter in LETTERS)]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=64)


def clip_tokenizer() -> CLIPTokenizer:
    """One token a character."""
    letters = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(letters)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def llama_tokenizer() -> LlamaTokenizerFast:
    """One token a character."""
    vocab = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", "▁", *LETTERS])}
    return LlamaTokenizerFast(vocab=vocab, merges=[], pad_token="</s>", model_max_length=512)


def flow_scheduler(name: str, shift: float = 5.0) -> Any:
    """The flow-matching scheduler called `name`: "euler", "unipc" (Wan's released folders) or "dpm" (playground)."""
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    if name == "unipc":
        return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=1
    )


def wan_vae() -> AutoencoderKLWan:
    """4x temporal and 8x spatial compression, 4 channels."""
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()


def wan_transformer(in_channels: int = 4, image_dim: int | None = None, num_layers: int = 3) -> WanTransformer3DModel:
    """Width 24, `num_layers` blocks, 4 output channels."""
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=4,
        text_dim=TEXT_WIDTH,
        freq_dim=32,
        ffn_dim=32,
        num_layers=num_layers,
        image_dim=image_dim,
    )
    return model.eval()


def umt5_encoder() -> UMT5EncoderModel:
    """One layer."""
    config = UMT5Config(
        vocab_size=len(LETTERS) + 4,
        d_model=TEXT_WIDTH,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        num_decoder_layers=1,
    )
    return UMT5EncoderModel(config).eval()


def t5_encoder() -> T5EncoderModel:
    """One layer."""
    config = T5Config(vocab_size=len(LETTERS) + 4, d_model=TEXT_WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def tiny_wan_pipeline(scheduler: str = "euler", seed: int = 0, experts: int = 1) -> WanPipeline:
    """Wan 2.1 T2V, or Wan 2.2 with two denoisers (`experts=2`, boundary at timestep 900)."""
    torch.manual_seed(seed)
    pipeline = WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=umt5_encoder(),
        vae=wan_vae(),
        scheduler=flow_scheduler(scheduler),
        transformer=wan_transformer(),
        transformer_2=wan_transformer() if experts == 2 else None,
        boundary_ratio=0.9 if experts == 2 else None,
    )
    return quiet(pipeline)


def tiny_wan_i2v_pipeline(scheduler: str = "unipc", seed: int = 0) -> WanImageToVideoPipeline:
    """Wan 2.1 I2V with its CLIP image encoder; call it with `image=tiny_image()`."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=16, projection_dim=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    pipeline = WanImageToVideoPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=umt5_encoder(),
        vae=wan_vae(),
        scheduler=flow_scheduler(scheduler),
        transformer=wan_transformer(in_channels=4 + 4 + 4, image_dim=16),
        image_encoder=CLIPVisionModelWithProjection(vision).eval(),
        image_processor=CLIPImageProcessor(size=32, crop_size=32),
    )
    return quiet(pipeline)


def tiny_image(seed: int = 0) -> Image.Image:
    """Noise, 32x32 pixels."""
    pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy())


def quiet(pipeline: Any) -> Any:
    """`pipeline` without its own progress bar."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
