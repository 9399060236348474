from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import nn

from accvideo.planning.cost import Cost, at_depth, measure
from accvideo.planning.networks import Network

WIDTH, HEADS, FFN, TEXT_WIDTH, TEXT_TOKENS, FREQUENCIES, CHANNELS = 48, 2, 96, 20, 7, 32, 4


def tiny_wan(num_layers: int) -> Any:
    config = {
        "num_attention_heads": HEADS,
        "attention_head_dim": WIDTH // HEADS,
        "ffn_dim": FFN,
        "text_dim": TEXT_WIDTH,
        "freq_dim": FREQUENCIES,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": num_layers,
    }
    return Network("WanTransformer3DModel", config).build()


def wan_cost(num_layers: int) -> Cost:
    """Of a call on 3 x 4 x 5 tokens."""
    denoiser = tiny_wan(num_layers)

    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    latents, text, timestep = meta(1, CHANNELS, 3, 8, 10), meta(1, TEXT_TOKENS, TEXT_WIDTH), meta(1)
    with torch.no_grad():
        return measure(
            lambda: denoiser(latents, timestep, text, return_dict=False), known=[*denoiser.parameters(), latents, text]
        )


def test_operations_of_wan_are_those_of_its_formula():
    """Two for each weight and token it is multiplied with, four for each pair of tokens and channel in attention."""
    num_layers, tokens = 3, 60
    self_attention, cross_attention = 4 * tokens * WIDTH**2, 2 * (tokens + TEXT_TOKENS) * WIDTH**2
    block = self_attention + cross_attention + 2 * tokens * WIDTH * FFN
    time_and_text = FREQUENCIES * WIDTH + WIDTH**2 + 6 * WIDTH**2 + TEXT_TOKENS * (TEXT_WIDTH * WIDTH + WIDTH**2)
    in_and_out = 2 * tokens * WIDTH * 4 * CHANNELS  # patches of 2 x 2 latent pixels
    cost = wan_cost(num_layers)
    assert cost.matmul == 2 * (num_layers * block + time_and_text + in_and_out)
    assert cost.attention == 4 * num_layers * tokens * (tokens + TEXT_TOKENS) * WIDTH


def test_parameters_on_meta_are_those_of_the_class():
    config = dict(tiny_wan(2).config)
    real: Any = WanTransformer3DModel.from_config(config)
    assert [p.shape for p in tiny_wan(2).parameters()] == [p.shape for p in real.parameters()]


def test_deep_network_costs_what_its_blocks_tell():
    assert at_depth(wan_cost, [6]) == wan_cost(6)


def test_peak_is_what_lives_at_once():
    """Of a chain of layers without gradients only two tensors live at a time; with them, the input of each."""
    layers = [nn.Linear(32, 32, device="meta") for _ in range(5)]
    inputs = torch.empty(1000, 32, device="meta")
    known = [inputs, *(weight for layer in layers for weight in layer.parameters())]

    def chain() -> torch.Tensor:
        hidden = inputs
        for layer in layers:
            hidden = layer(hidden)
        return hidden

    with torch.no_grad():
        assert measure(chain, known=known).peak == 2 * inputs.nbytes
    assert measure(chain, known=known).peak == 5 * inputs.nbytes


def test_attention_goes_back_at_five_halves_of_the_way_there():
    query, key = (torch.empty(1, 2, length, 8, device="meta", requires_grad=True) for length in (11, 13))

    def attend() -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, key)

    there = measure(attend).attention
    assert there == 4 * 2 * 11 * 13 * 8
    assert measure(lambda: attend().sum().backward()).attention == 3.5 * there


def test_phases_have_peaks_of_their_own():
    kept = []
    cost = measure(lambda: kept.append(torch.empty(1000, device="meta")), lambda: torch.empty(10, device="meta"))
    assert cost.peaks == (4000, 4040)
    assert cost.peak == 4040


def test_torch_is_left_as_it_was():
    before = (F.scaled_dot_product_attention, torch.autocast, torch.nonzero)
    measure(lambda: None)
    assert (F.scaled_dot_product_attention, torch.autocast, torch.nonzero) == before
