"""The parts of the playground's teacher: tokenizer, text encoder, autoencoder, denoiser; made, loaded and saved."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, DPMSolverMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from accvideo.playground import world
from accvideo.teacher import load_pipeline
from accvideo.types import UserError

LATENT_CHANNELS = 48

TEXT_WIDTH = 128

MAX_TOKENS = 32
"""Length that prompts are padded to; the longest caption has 17 words and an end mark."""

CALL_DEFAULTS = {
    "height": world.SIZE,
    "width": world.SIZE,
    "num_frames": world.NUM_FRAMES,
    "fps": world.FPS,
    "guidance_scale": 3.0,
    "pipeline_args": {"max_sequence_length": MAX_TOKENS},
}

MODEL_CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
tags:
- accvideo
---

# The playground's teacher

A tiny text-to-video pipeline (`WanPipeline`) of captioned clips of moving shapes: 64x64 pixels, 17 frames, 8 frames a
second, guidance scale 3. It is a place to try distillation in, not a model of the real world. Prompts look like
"a red star moves left and a blue ring bounces on a striped gray background". Made by `accvideo playground train`.
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word of the world's grammar; every other word is `<unk>`."""
    sentences = [*world.SHAPES, *world.COLORS, *world.MOTIONS, *world.BACKGROUNDS, *world.PATTERNS]
    words = dict.fromkeys(" ".join(["a an and on background", *sentences]).split())
    vocab = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="$A </s>", special_tokens=[("</s>", vocab["</s>"])]
    )
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **special)


def build_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    """A UMT5 encoder of two layers."""
    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=TEXT_WIDTH,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    return UMT5EncoderModel(config)


def build_vae() -> AutoencoderKLWan:
    """A Wan 2.2 style autoencoder: 4x4 pixels to a patch, then 4x in each axis and in time, to 48 channels."""
    return AutoencoderKLWan(
        base_dim=16,
        decoder_base_dim=20,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        in_channels=48,
        out_channels=48,
        patch_size=4,
        scale_factor_temporal=4,
        scale_factor_spatial=16,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )


def build_denoiser() -> WanTransformer3DModel:
    """A Wan denoiser of 4.7 million weights: one token a latent pixel, four times as wide as the token's numbers."""
    denoiser = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=4,
        attention_head_dim=48,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=128,
        ffn_dim=640,
        num_layers=8,
        rope_max_seq_len=64,
    )
    nn.init.zeros_(denoiser.proj_out.weight)
    nn.init.zeros_(denoiser.proj_out.bias)
    return denoiser


def load_start(name: str | None) -> WanPipeline | None:
    """The teacher to go on from.

    Raises:
        UserError: it is not one that this module has made.
    """
    if name is None:
        return None
    pipeline: Any = load_pipeline(name, torch.float32, torch.device("cpu"))
    vocab = build_tokenizer().get_vocab()
    if not isinstance(pipeline, WanPipeline) or pipeline.tokenizer.get_vocab() != vocab:  # type: ignore[union-attr]
        raise UserError(f"{name} is not a teacher of the playground's world\nGive one, or leave --start-from out")
    return pipeline


def encode_prompts(text_encoder: UMT5EncoderModel, tokens: Tensor, length: int) -> Tensor:
    """Prompt embeddings as Wan's pipeline makes them: zeros behind the end mark, padded to `length` tokens."""
    mask = tokens != 0
    embeds = text_encoder(tokens, mask.long()).last_hidden_state * mask[..., None]
    return nn.functional.pad(embeds, (0, 0, 0, length - tokens.shape[1]))


def save_teacher(
    folder: Path,
    vae: AutoencoderKLWan,
    tokenizer: PreTrainedTokenizerFast,
    text_encoder: UMT5EncoderModel,
    denoiser: WanTransformer3DModel,
) -> None:
    """Save the pipeline in float16, with the defaults of its call beside it.

    The scheduler is the first-order DPM-Solver on flow sigmas, which is the Euler step (to rounding) on a grid whose
    every n-th level is the grid of n times fewer steps; Wan's pipeline could not ask an Euler scheduler for that.
    """
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", solver_order=1, flow_shift=3.0
    )
    pipeline = WanPipeline(
        tokenizer=tokenizer,  # type: ignore[arg-type]
        text_encoder=text_encoder.cpu(),
        vae=vae.cpu(),
        scheduler=scheduler,  # type: ignore[arg-type]
        transformer=denoiser.cpu(),
    )
    pipeline.to(torch.float16).save_pretrained(folder)
    # transformers loads a model in the type it was saved in; the others load in float32.
    text_config = folder / "text_encoder" / "config.json"
    text_config.write_text(text_config.read_text().replace('"float16"', '"float32"'))
    (folder / "README.md").write_text(MODEL_CARD)
    (folder / "accvideo.json").write_text(json.dumps(CALL_DEFAULTS, indent=2) + "\n")
