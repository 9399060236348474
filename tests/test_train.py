from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file
from torch import nn

from accvideo.playground import networks, remake, train, updates, world
from accvideo.teacher import PLAYGROUND_TEACHER, denoising_grid
from accvideo.types import UserError
from tests.tiny import tiny_wan_pipeline


def tiny_config(out: Path) -> train.TrainConfig:
    return train.TrainConfig(
        out=out,
        vae_iterations=3,
        vae_batch_size=1,
        denoiser_iterations=5,
        refine_iterations=3,
        refine_batch_size=1,
        denoiser_batch_size=2,
        pool_size=8,
        pool_block=4,
        pool_start=4,
        save_every=2,
        device="cpu",
    )


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every iteration draws from generators of its own, so that weights and optimizer state are all there is."""
    monkeypatch.setattr(train, "_BATCHES_MEASURED", 1)
    monkeypatch.setattr(train, "_BATCHES_DRAWN", 2)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train.train(tiny_config(whole))
    schedule, calls = train.schedule, iter(range(100))

    def dies(iteration: int, num_iterations: int) -> float:
        if next(calls) in (2, 8):
            raise KeyboardInterrupt
        return schedule(iteration, num_iterations)

    step, steps = updates.Muon.step, iter(range(100))

    def dies_too(optimizer: updates.Muon) -> None:
        if next(steps) == 2:
            raise KeyboardInterrupt
        step(optimizer)

    monkeypatch.setattr(train, "schedule", dies)
    monkeypatch.setattr(updates.Muon, "step", dies_too)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            train.train(tiny_config(killed))
    train.train(tiny_config(killed))
    for part in ("transformer", "text_encoder", "vae"):
        (path,) = (whole / "teacher" / part).glob("*.safetensors")
        expected, got = load_file(path), load_file(killed / "teacher" / part / path.name)
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[name], got[name]) for name in expected), part
    pipeline = WanPipeline.from_pretrained(whole / "teacher", dtype=torch.float32)
    assert pipeline.vae.config.latents_std != [1.0] * networks.LATENT_CHANNELS


@pytest.fixture(scope="module")
def teacher() -> WanPipeline:
    pipeline = WanPipeline.from_pretrained(PLAYGROUND_TEACHER, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("length", [networks.MAX_TOKENS, 512])
def test_prompts_are_trained_as_the_pipeline_encodes_them(teacher: WanPipeline, length: int):
    prompts = ["", "a red star spins on a plain navy background", "a zebra moves left on a plain gray background"]
    encoded = teacher.tokenizer(prompts, padding="max_length", max_length=networks.MAX_TOKENS, return_tensors="pt")
    with torch.no_grad():
        embeds = networks.encode_prompts(teacher.text_encoder, encoded.input_ids, length)
        expected, _ = teacher.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=length)
    torch.testing.assert_close(embeds, expected)


def test_the_tokenizer_knows_every_word_and_copes_with_others():
    tokenizer = networks.build_tokenizer()
    captions = world.sample_prompts(2000, seed=3)
    tokens = tokenizer(captions).input_ids
    assert tokenizer.unk_token_id not in {token for row in tokens for token in row}
    assert max(map(len, tokens)) <= 18
    assert tokenizer("a zebra").input_ids[1] == tokenizer.unk_token_id
    assert tokenizer("A RED, star").input_ids == [
        *tokenizer("a red").input_ids[:2],
        tokenizer.unk_token_id,
        *tokenizer("star").input_ids,
    ]


def test_going_on_keeps_the_latents_and_the_denoiser(tmp_path: Path, teacher: WanPipeline):
    """Three small updates of everything leave a teacher near the one it started from, but not the same."""
    config = replace(tiny_config(tmp_path / "on"), start_from="playground", denoiser_iterations=3)
    config = replace(config, denoiser_learning_rate=1e-6, refine_learning_rate=1e-5)
    train.train(config)
    after = WanPipeline.from_pretrained(tmp_path / "on" / "teacher", dtype=torch.float32)
    assert not (tmp_path / "on" / "vae.safetensors").exists()
    assert after.vae.config.latents_mean == teacher.vae.config.latents_mean
    clips = world.draw(world.random_scenes(2, torch.Generator().manual_seed(0))) * 2 - 1
    with torch.no_grad():
        old, new = (pipe.vae.encode(clips).latent_dist.mean for pipe in (teacher, after))
    assert 0 < (new - old).abs().mean() < 0.05 * old.std()
    for part in ("transformer", "text_encoder"):
        for weight, other in zip(getattr(teacher, part).parameters(), getattr(after, part).parameters(), strict=True):
            torch.testing.assert_close(weight, other, rtol=0, atol=5e-3)


@pytest.mark.parametrize("student", [None, "playground-student"])
def test_refining_the_decoder_alone_leaves_latents_and_denoiser_as_they_are(
    tmp_path: Path, teacher: WanPipeline, student: str | None
):
    config = replace(tiny_config(tmp_path / "on"), start_from="playground", denoiser_iterations=0, refine_encoder=False)
    train.train(replace(config, refine_by=student))
    after = WanPipeline.from_pretrained(tmp_path / "on" / "teacher", dtype=torch.float32)
    for part in ("transformer", "text_encoder", "vae"):
        for (name, old), new in zip(
            getattr(teacher, part).named_parameters(), getattr(after, part).parameters(), strict=True
        ):
            decodes = part == "vae" and name.startswith(("decoder", "post_quant_conv"))
            assert torch.equal(old, new) == (not decodes), name


def test_a_student_remakes_the_latents_of_clips(teacher: WanPipeline):
    """From its last key point it comes back near to them, less from the one before, less by another caption."""
    scenes = world.random_scenes(4, torch.Generator().manual_seed(0))
    captions, vae = world.captions_of(scenes.requests), teacher.vae
    mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        latents = (vae.encode(world.draw(scenes) * 2 - 1).latent_dist.mean - mean) / std
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    model = remake.load_remaker("playground-student", vae, torch.device("cpu"))
    one, two = ((remake.remade(model, latents, captions, noise, n) - latents).square().mean() for n in (1, 2))
    other = (remake.remade(model, latents, captions[::-1], noise, 2) - latents).square().mean()
    noised = [sigma**2 * (noise - latents).square().mean() for sigma in model.student.sigmas[-2:-4:-1]]  # type: ignore[union-attr]
    assert one < two < other and one < 0.3 * noised[0] and two < 0.3 * noised[1]


def test_only_a_student_remakes_latents_and_only_where_they_stay(tmp_path: Path, teacher: WanPipeline):
    with pytest.raises(UserError, match="playground is a teacher"):
        remake.load_remaker("playground", teacher.vae, torch.device("cpu"))
    with pytest.raises(UserError, match="latents of another encoder"):
        remake.load_remaker("playground-student", networks.build_vae(), torch.device("cpu"))
    with pytest.raises(UserError, match="needs latents that stay"):
        replace(tiny_config(tmp_path), refine_by="playground-student", start_from="playground")


def test_a_third_of_hard_scenes_show_a_star_or_a_cross_that_spins():
    scenes = train.hard_scenes(60, torch.Generator().manual_seed(0))
    captions = world.captions_of(scenes.requests)
    hard = [caption for caption in captions if "star spins" in caption or "cross spins" in caption]
    assert len(captions) == 60 and len(set(captions)) == 60
    assert 20 <= len(hard) <= 24
    assert not scenes.requests.held_out().any()


def test_a_start_from_another_kind_of_teacher_is_refused(tmp_path: Path):
    tiny_wan_pipeline().save_pretrained(tmp_path / "wan")
    with pytest.raises(UserError, match="not a teacher of the playground"):
        networks.load_start(str(tmp_path / "wan"))


def test_errors_on_and_next_to_objects_weigh_more():
    scenes = world.random_scenes(8, torch.Generator().manual_seed(0))
    clips, weight = train.draw_weighted(scenes)
    covered = world.draw_foreground(scenes)[:, None] > 0
    assert clips.min() >= -1 and clips.max() <= 1
    assert weight.mean() == pytest.approx(1, abs=1e-5)
    assert weight[covered].min() > 3 * weight[~covered].mean()
    assert weight.max() / weight.min() == pytest.approx(7, rel=1e-4)
    assert train.pixel_loss(0.5 * torch.ones(8, 3, 17, 64, 64), weight) == pytest.approx(0.5 + 4 * 0.25, rel=1e-4)


def test_a_folder_of_other_settings_is_refused(tmp_path: Path):
    train.claim_folder(tiny_config(tmp_path / "out"))
    train.claim_folder(replace(tiny_config(tmp_path / "out"), save_every=7))
    with pytest.raises(UserError, match="seed 0, now 1"):
        train.claim_folder(replace(tiny_config(tmp_path / "out"), seed=1))


def test_a_pool_that_cannot_start_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="pool_start=4"):
        train.TrainConfig(out=tmp_path, pool_start=4)


def test_the_shipped_teacher_is_small_and_its_grids_nest(teacher: WanPipeline):
    """At most 16 MB; every tenth of 50 levels is one of 5 levels, so that plain diffusers can run its students."""
    assert sum(path.stat().st_size for path in PLAYGROUND_TEACHER.rglob("*")) <= 16_000_000
    call = {"prompt": "", "height": 64, "width": 64, "num_frames": 17}
    long, short = (denoising_grid(teacher, steps, **call)[0] for steps in (50, 5))
    torch.testing.assert_close(long[::10], short)


def test_the_shipped_teacher_follows_prompts(teacher: WanPipeline):
    """Unknown words and prompts padded as far as Wan's pipeline pads by default are no trouble."""
    prompts = ["a red square stays still on a plain gray background", "a zebra on a plain navy background"]
    for length in (networks.MAX_TOKENS, 512):
        video = teacher(
            prompts,
            height=64,
            width=64,
            num_frames=17,
            num_inference_steps=10,
            guidance_scale=3.0,
            max_sequence_length=length,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).frames
        corner = video[:, :, :, :6, :6].mean((1, 3, 4))
        gray, navy = (torch.tensor(world.BACKGROUNDS[name]) / 255 for name in ("gray", "navy"))
        assert (corner[0] - gray).abs().max() < 0.06
        assert (corner[1] - navy).abs().max() < 0.1


def test_muon_orthogonalizes_matrices_and_moves_vectors_by_adam():
    """The step of a matrix has singular values near 1, whatever its gradient's; Adam's first step is the sign."""
    generator = torch.Generator().manual_seed(0)
    matrices = [nn.Parameter(torch.zeros(shape)) for shape in ((6, 4, 3, 3), (12, 5), (12, 5))]
    for scale, matrix in zip((1e-4, 1.0, 1e3), matrices, strict=True):
        matrix.grad = torch.randn(matrix.shape, generator=generator) * scale
    bias, unused = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.ones(2))
    bias.grad = torch.tensor([1e-3, -2.0, 3.0, -1e-2, 5.0])
    updates.Muon(matrices, [bias, unused], lr=0.1).step()
    for matrix, tall in zip(matrices, (1.0, 2.4, 2.4), strict=True):
        assert matrix.grad is not None
        step, gradient = matrix.detach().flatten(1) / (-0.1 * tall**0.5), matrix.grad.flatten(1)
        singular = torch.linalg.svdvals(step)
        assert 0.6 < singular.min() and singular.max() < 1.3
        left, _, right = torch.linalg.svd(gradient, full_matrices=False)
        assert (step * (left @ right)).sum() > 0.98 * step.norm() * (left @ right).norm()
    torch.testing.assert_close(bias.detach(), -0.01 * bias.grad.sign(), rtol=1e-4, atol=0)
    assert torch.equal(unused, torch.ones(2))


def test_running_means_take_no_part_in_the_graph():
    """Else each update would keep the graphs of all updates before it alive."""
    weight, mean = nn.Parameter(torch.ones(3)), torch.zeros(3)
    updates.move_averages([mean], [weight], 0.75)
    torch.testing.assert_close(mean, torch.full((3,), 0.25))
    assert not mean.requires_grad and mean.grad_fn is None
