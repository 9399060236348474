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


def vision_tokenizer(*tokens: str) -> LlamaTokenizerFast:
    """One token a character, and these."""
    tokenizer = llama_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    return tokenizer


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
    tokenizer = vision_tokenizer("<image>")
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=14
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**language_config(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
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
