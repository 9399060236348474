"""A tiny random-weight vision-language model of a real transformers class, its processor built on the spot."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizerFast,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.tiny import llama_tokenizer

SIDE = 28

TEMPLATE = """{% for message in messages %}{{ message.role }}: {% for part in message.content %}\
{% if part.type == 'text' %}{{ part.text }}{% else %}VISION{% endif %}{% endfor %}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
"""Of a chat; VISION stands for the tokens of an image or video."""


def language_config(tokenizer: LlamaTokenizerFast) -> dict[str, Any]:
    """Width 16, one layer."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


def save_tiny_llava(folder: Path) -> None:
    """LLaVA, which knows images only."""
    torch.manual_seed(0)
    tokenizer: Any = llama_tokenizer(image_token="<image>")
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=14
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**language_config(tokenizer)),
        image_token_index=tokenizer.image_token_id,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("VISION", "<image>"),
    ).save_pretrained(folder)


def save_tiny_internvl(folder: Path) -> None:
    """InternVL, which cuts images into tiles and takes each frame of a video as one. Needs torchvision."""
    from transformers import (
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
        InternVLVisionConfig,
        Qwen2Config,
    )
    from transformers.models.got_ocr2 import GotOcr2ImageProcessor

    torch.manual_seed(0)
    tokenizer: Any = llama_tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<image>", video_token="<video>"
    )
    vision = InternVLVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=(SIDE, SIDE),
        patch_size=(7, 7),
    )
    config = InternVLConfig(
        vision_config=vision,
        text_config=Qwen2Config(**language_config(tokenizer)),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
    )
    size = {"height": SIDE, "width": SIDE}
    InternVLForConditionalGeneration(config).save_pretrained(folder)
    InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=TEMPLATE.replace("VISION", "{% if part.type == 'video' %}<video>{% else %}<image>{% endif %}"),
    ).save_pretrained(folder)


def save_tiny_qwen3_vl(folder: Path) -> None:
    """Qwen3-VL, which is told the time of every second frame. Needs torchvision."""
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    torch.manual_seed(0)
    tokenizer: Any = llama_tokenizer(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
    )
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 8,
        "out_hidden_size": 16,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config=language_config(tokenizer) | {"head_dim": 8, "rope_parameters": rotary},
        vision_config=vision,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.vision_start_token_id,
        vision_end_token_id=tokenizer.vision_end_token_id,
    )
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    size = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64 * 8}
    patches = {"size": size, "patch_size": 8, "temporal_patch_size": 2, "merge_size": 2}
    # As in the released template, the video's own marks are the start and end of every frame.
    template = TEMPLATE.replace(
        "VISION", "<|vision_start|><|{% if part.type == 'video' %}video{% else %}image{% endif %}_pad|><|vision_end|>"
    )
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**patches),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**patches),
        chat_template=template,
    ).save_pretrained(folder)
