"""The networks of the released teachers: classes and configurations, no weights.

Configurations are those of the released folders, as diffusers' conversion scripts (`scripts/convert_*_to_diffusers.py`)
write them; entries at a class's default are left out unless they tell the models of a family apart.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Network:
    """A network's class and configuration; no weights."""

    class_name: str
    """Of diffusers or transformers."""
    config: dict[str, Any] = field(default_factory=dict)
    """What differs from the class's defaults."""
    depth: tuple[str, ...] = ()
    """The entries of `config` that count its repeated blocks."""

    def but(self, **changes: Any) -> "Network":
        """The network with other entries of its configuration."""
        return replace(self, config=self.config | changes)

    def build(self, device: str = "meta", **changes: Any) -> nn.Module:
        """The network in bfloat16 with random weights; on the meta device it has shapes and no memory.

        Args:
            device: where it is made.
            changes: of the configuration.
        """
        import diffusers  # here, since a preset's settings need none of it
        import transformers

        config = self.config | changes
        with torch.device(device):
            if hasattr(diffusers, self.class_name):
                network = getattr(diffusers, self.class_name)(**config)
            else:
                network_class = getattr(transformers, self.class_name)
                network = network_class(network_class.config_class(**config))
        return nn.Module.to(network, torch.bfloat16).eval().requires_grad_(False)


UMT5_XXL = Network(
    "UMT5EncoderModel",
    {
        "vocab_size": 256384,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
    },
)
"""google/umt5-xxl."""

T5_XXL = Network("T5EncoderModel", UMT5_XXL.config).but(vocab_size=32128)
"""google/t5-v1_1-xxl."""

LLAMA_8B = Network(
    "LlamaModel",
    {
        "vocab_size": 128320,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
)
"""The language model of xtuner/llava-llama-3-8b-v1_1-transformers."""

CLIP_L = Network(
    "CLIPTextModel",
    {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
)
"""The text half of openai/clip-vit-large-patch14."""

CLIP_H_VISION = Network(
    "CLIPVisionModelWithProjection",
    {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "projection_dim": 1024,
    },
)
"""The image half of laion/CLIP-ViT-H-14-laion2B-s32B-b79K."""

WAN_14B = Network(
    "WanTransformer3DModel",
    {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40, "out_channels": 16},
    depth=("num_layers",),
)

HUNYUAN_VIDEO = Network(
    "HunyuanVideoTransformer3DModel",
    {"num_layers": 20, "num_single_layers": 40, "num_attention_heads": 24, "attention_head_dim": 128},
    depth=("num_layers", "num_single_layers"),
)

LTX = Network("LTXVideoTransformer3DModel", {"num_layers": 28, "out_channels": 128}, depth=("num_layers",))

MOCHI = Network("MochiTransformer3DModel", {"num_layers": 48, "out_channels": 12}, depth=("num_layers",))

WAN_22_VAE = Network(
    "AutoencoderKLWan",
    {
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": 48,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "latents_mean": [0.0] * 48,  # the released ones shift and scale, and cost the same
        "latents_std": [1.0] * 48,
    },
)
"""Of Wan 2.2 TI2V-5B."""
