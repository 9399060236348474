"""The layouts in which the authors of Wan and HunyuanVideo published their weights, and ComfyUI loads them.

diffusers' own conversions (`convert_wan_transformer_to_diffusers`, `convert_hunyuan_video_transformer_to_diffusers`)
lead from these layouts to diffusers'; here is the way back.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from accvideo.exporting.lora import Factors
from accvideo.exporting.weights import LazyTensor, Weights
from accvideo.types import UserError


@dataclass(frozen=True)
class Place:
    """Where the rows of a module's weight go."""

    module: str
    """Of the original layout."""
    part: int
    """Of the parts that the original module stacks, such as q, k and v."""
    num_parts: int
    swapped: bool
    """Whether its two halves change places: diffusers' last norm has the scale first, the original the shift."""


Rule = tuple[str, str, int]
"""A module's name in diffusers, its name in the original layout, and its part there; {} stands for a number."""

WAN: tuple[Rule, ...] = (
    ("patch_embedding", "patch_embedding", 0),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0", 0),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2", 0),
    ("condition_embedder.time_proj", "time_projection.1", 0),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0", 0),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2", 0),
    ("condition_embedder.image_embedder.norm1", "img_emb.proj.0", 0),
    ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1", 0),
    ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3", 0),
    ("condition_embedder.image_embedder.norm2", "img_emb.proj.4", 0),
    ("blocks.{}.scale_shift_table", "blocks.{}.modulation", 0),
    *(
        (f"blocks.{{}}.{ours}.{name}", f"blocks.{{}}.{theirs}.{original}", 0)
        for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for name, original in (
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            ("to_out.0", "o"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
            ("add_k_proj", "k_img"),
            ("add_v_proj", "v_img"),
            ("norm_added_k", "norm_k_img"),
        )
    ),
    ("blocks.{}.norm2", "blocks.{}.norm3", 0),
    ("blocks.{}.ffn.net.0.proj", "blocks.{}.ffn.0", 0),
    ("blocks.{}.ffn.net.2", "blocks.{}.ffn.2", 0),
    ("scale_shift_table", "head.modulation", 0),
    ("proj_out", "head.head", 0),
)
"""Wan 2.1 and 2.2, text and image to video."""

HUNYUAN_VIDEO: tuple[Rule, ...] = (
    ("x_embedder.proj", "img_in.proj", 0),
    ("time_text_embed.timestep_embedder.linear_1", "time_in.mlp.0", 0),
    ("time_text_embed.timestep_embedder.linear_2", "time_in.mlp.2", 0),
    ("time_text_embed.guidance_embedder.linear_1", "guidance_in.mlp.0", 0),
    ("time_text_embed.guidance_embedder.linear_2", "guidance_in.mlp.2", 0),
    ("time_text_embed.text_embedder.linear_1", "vector_in.in_layer", 0),
    ("time_text_embed.text_embedder.linear_2", "vector_in.out_layer", 0),
    ("context_embedder.proj_in", "txt_in.input_embedder", 0),
    ("context_embedder.time_text_embed.timestep_embedder.linear_1", "txt_in.t_embedder.mlp.0", 0),
    ("context_embedder.time_text_embed.timestep_embedder.linear_2", "txt_in.t_embedder.mlp.2", 0),
    ("context_embedder.time_text_embed.text_embedder.linear_1", "txt_in.c_embedder.linear_1", 0),
    ("context_embedder.time_text_embed.text_embedder.linear_2", "txt_in.c_embedder.linear_2", 0),
    *(
        (
            f"context_embedder.token_refiner.refiner_blocks.{{}}.{ours}",
            f"txt_in.individual_token_refiner.blocks.{{}}.{theirs}",
            part,
        )
        for ours, theirs, part in (
            ("norm1", "norm1", 0),
            ("norm2", "norm2", 0),
            ("attn.to_q", "self_attn_qkv", 0),
            ("attn.to_k", "self_attn_qkv", 1),
            ("attn.to_v", "self_attn_qkv", 2),
            ("attn.to_out.0", "self_attn_proj", 0),
            ("ff.net.0.proj", "mlp.fc1", 0),
            ("ff.net.2", "mlp.fc2", 0),
            ("norm_out.linear", "adaLN_modulation.1", 0),
        )
    ),
    *(
        (f"transformer_blocks.{{}}.{ours}", f"double_blocks.{{}}.{theirs}", part)
        for ours, theirs, part in (
            ("attn.to_q", "img_attn_qkv", 0),
            ("attn.to_k", "img_attn_qkv", 1),
            ("attn.to_v", "img_attn_qkv", 2),
            ("attn.norm_q", "img_attn_q_norm", 0),
            ("attn.norm_k", "img_attn_k_norm", 0),
            ("attn.to_out.0", "img_attn_proj", 0),
            ("attn.add_q_proj", "txt_attn_qkv", 0),
            ("attn.add_k_proj", "txt_attn_qkv", 1),
            ("attn.add_v_proj", "txt_attn_qkv", 2),
            ("attn.norm_added_q", "txt_attn_q_norm", 0),
            ("attn.norm_added_k", "txt_attn_k_norm", 0),
            ("attn.to_add_out", "txt_attn_proj", 0),
            ("norm1.linear", "img_mod.linear", 0),
            ("norm1_context.linear", "txt_mod.linear", 0),
            ("ff.net.0.proj", "img_mlp.fc1", 0),
            ("ff.net.2", "img_mlp.fc2", 0),
            ("ff_context.net.0.proj", "txt_mlp.fc1", 0),
            ("ff_context.net.2", "txt_mlp.fc2", 0),
        )
    ),
    *(
        (f"single_transformer_blocks.{{}}.{ours}", f"single_blocks.{{}}.{theirs}", part)
        for ours, theirs, part in (
            ("attn.to_q", "linear1", 0),
            ("attn.to_k", "linear1", 1),
            ("attn.to_v", "linear1", 2),
            ("proj_mlp", "linear1", 3),
            ("proj_out", "linear2", 0),
            ("attn.norm_q", "q_norm", 0),
            ("attn.norm_k", "k_norm", 0),
            ("norm.linear", "modulation.linear", 0),
        )
    ),
    ("norm_out.linear", "final_layer.adaLN_modulation.1", 0),
    ("proj_out", "final_layer.linear", 0),
)
"""HunyuanVideo 13B."""

LAYOUTS: dict[str, tuple[Rule, ...]] = {
    "WanTransformer3DModel": WAN,
    "HunyuanVideoTransformer3DModel": HUNYUAN_VIDEO,
}
"""By the class of the denoiser."""

SWAPPED = {"final_layer.adaLN_modulation.1"}
"""Modules of the original layout whose halves are the other way round in diffusers."""

COMFYUI_NAMES = {
    r"^(time_in|guidance_in|txt_in\.t_embedder)\.mlp\.0$": r"\1.in_layer",
    r"^(time_in|guidance_in|txt_in\.t_embedder)\.mlp\.2$": r"\1.out_layer",
    r"^txt_in\.c_embedder\.linear_1$": "txt_in.c_embedder.in_layer",
    r"^txt_in\.c_embedder\.linear_2$": "txt_in.c_embedder.out_layer",
}
"""Modules that ComfyUI's LoRA loader knows by other names than the original layout's (HunyuanVideo's embedders)."""


def layout_of(denoiser_class: str) -> tuple[Rule, ...]:
    """The original layout of a class of denoisers.

    Raises:
        UserError: none is known.
    """
    if denoiser_class not in LAYOUTS:
        raise UserError(
            f"the original layout of {denoiser_class} is not known; known are those of {', '.join(LAYOUTS)}\n"
            "Export with --to diffusers or --to lora"
        )
    return LAYOUTS[denoiser_class]


def place(module: str, layout: tuple[Rule, ...]) -> Place:
    """Where a module of diffusers' layout is in the original one.

    Raises:
        UserError: the layout has no such module.
    """
    numbers = re.findall(r"(?<=blocks\.)\d+", module)
    pattern = re.sub(r"(?<=blocks\.)\d+", "{}", module)
    for ours, theirs, part in layout:
        if ours == pattern:
            num_parts = sum(each == theirs for _, each, _ in layout)
            return Place(theirs.format(*numbers), part, num_parts, theirs in SWAPPED)
    raise UserError(f"{module} has no place in the original layout; export with --to diffusers or --to lora")


def stacks(modules: Iterable[str], layout: tuple[Rule, ...]) -> dict[str, list[tuple[str, Place]]]:
    """For each module of the original layout, the modules of diffusers' layout that it stacks, in order.

    Raises:
        UserError: some of them are missing.
    """
    places = [(module, place(module, layout)) for module in modules]
    found: dict[str, list[tuple[str, Place]]] = {}
    for module, each in sorted(places, key=lambda pair: pair[1].part):
        found.setdefault(each.module, []).append((module, each))
    for original, parts in found.items():
        if len(parts) != (num_parts := parts[0][1].num_parts):
            raise UserError(f"{original} stacks {num_parts} modules, of which {len(parts)} are there ({parts[0][0]})")
    return found


def swap_halves(tensor: Tensor) -> Tensor:
    """A tensor whose two halves of rows have changed places."""
    return torch.cat(tensor.chunk(2)[::-1])


def original_weights(weights: Weights, layout: tuple[Rule, ...]) -> Weights:
    """Weights of diffusers' layout in the original one."""
    modules: dict[str, dict[str, str]] = {"": {}, ".weight": {}, ".bias": {}}
    for name in weights:
        suffix = next(suffix for suffix in (".weight", ".bias", "") if name.endswith(suffix))
        modules[suffix][name.removesuffix(suffix)] = name

    def stacked(parts: list[tuple[LazyTensor, bool]]) -> LazyTensor:
        first = parts[0][0]
        if len(parts) == 1 and not parts[0][1]:
            return first

        def read() -> Tensor:
            return torch.cat([swap_halves(part.read()) if swapped else part.read() for part, swapped in parts])

        return LazyTensor((sum(part.shape[0] for part, _ in parts), *first.shape[1:]), first.dtype, read)

    return {
        original + suffix: stacked([(weights[names[module]], each.swapped) for module, each in parts])
        for suffix, names in modules.items()
        for original, parts in stacks(names, layout).items()
    }


def original_lora(lora: Mapping[str, Factors], layout: tuple[Rule, ...]) -> dict[str, Factors]:
    """A LoRA of diffusers' layout in the original one, exactly.

    Where modules are stacked, the ranks add up: `[B1 A1; B2 A2] = diag(B1, B2) [A1; A2]`.
    """
    converted = {}
    for original, parts in stacks(lora, layout).items():
        factors = [lora[module] for module, _ in parts]
        up = torch.block_diag(*(each.up for each in factors))
        if parts[0][1].swapped:
            up = swap_halves(up)
        converted[original] = Factors(torch.cat([each.down for each in factors]), up)
    return converted


def comfyui_name(module: str) -> str:
    """The name by which ComfyUI's LoRA loader knows a module of the original layout."""
    for pattern, name in COMFYUI_NAMES.items():
        module = re.sub(pattern, name, module)
    return f"diffusion_model.{module}"
