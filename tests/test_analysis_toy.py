import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from rich.progress import Progress

from accvideo.analysis import toy as toy_module
from accvideo.analysis.baselines.dmd2 import distribution_matching_gradient, distribution_matching_loss, predicted_video
from accvideo.analysis.fitting import descend, run, start_fit
from accvideo.analysis.line import (
    DATA,
    exact_velocity,
    moved_data,
    off_trajectory,
    trajectories,
    useless_share,
)
from accvideo.analysis.networks import Norm, Normalized, VelocityNetworks, generator
from accvideo.analysis.toy import PAPER_SHARES, ToyConfig, toy
from accvideo.analysis.toy_training import (
    Study,
    record,
    renoised_steps,
    train_accvideo,
    train_dmd,
    train_perflow,
    train_teacher,
    windows,
)
from accvideo.flow import noised, shifted_sigmas
from accvideo.metrics import wasserstein_distance
from accvideo.types import UserError

SMALL = Study(seeds=(0, 1), width=8, num_steps=10, num_trajectories=64, iterations=10, batch_size=32)


def quiet() -> Progress:
    return Progress(disable=True)


def test_the_exact_velocity_of_two_points_is_a_hyperbolic_tangent():
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    for sigma in (0.1, 0.5, 1.0):
        mean = 3 * torch.tanh(3 * (1 - sigma) * x / sigma**2)
        torch.testing.assert_close(exact_velocity(x, sigma), (x - mean) / sigma)


def test_the_exact_flow_ends_at_the_data():
    noise = torch.randn(1, 4096, generator=generator(0, "test", 0))
    states = trajectories(exact_velocity, noise, shifted_sigmas(50))
    assert states.shape == (1, 4096, 51)
    assert wasserstein_distance(states[0, :, -1], DATA) < 0.1
    assert wasserstein_distance(states[0, :, 0], DATA) > 2


@pytest.mark.parametrize("degree", [0.0, 0.75, 3.0])
def test_moved_data_has_the_degree_of_mismatch_asked_for(degree: float):
    """Eq. 4 of arXiv:2503.19462: the sum of the distances to the nearest point of the training data."""
    mismatch = sum(min(abs(point - own) for own in DATA) for point in moved_data(degree))
    assert mismatch == pytest.approx(degree)


def test_a_point_is_off_when_it_is_far_from_every_trajectory():
    points, states = (
        torch.randn(200, generator=generator(0, "a", 0)) * 3,
        torch.randn(50, generator=generator(0, "b", 0)),
    )
    nearest = (points[:, None] - states).abs().amin(1)
    assert torch.equal(off_trajectory(points, states, 0.1), nearest > 0.1)
    assert 0 < (nearest > 0.1).sum() < 200


def test_the_exact_flow_has_about_the_papers_shares_of_useless_points():
    """The paper gives neither tolerance nor direction; with ours, the bars of its Figure 2 (e) come out within 4 %."""
    noise = torch.randn(1, 2048, generator=generator(0, "test", 1))
    states, sigmas = trajectories(exact_velocity, noise, shifted_sigmas(50))[0], shifted_sigmas(50)
    shares = [useless_share(moved_data(m), states, sigmas, 0.1, generator(0, "c", 0)) for m in PAPER_SHARES]
    assert shares == sorted(shares)
    for share, paper in zip(shares, PAPER_SHARES.values(), strict=True):
        assert abs(share - paper) < 0.045


def test_norm_is_batch_normalization():
    own, reference = Norm(2, 4), torch.nn.BatchNorm1d(4)
    hidden = torch.randn(2, 2048, 4, generator=generator(0, "norm", 0)) * 3 + 1
    torch.testing.assert_close(own(hidden)[1], reference(hidden[1]), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(own.running_variance[1, 0], reference.running_var, atol=2e-3, rtol=2e-3)
    own.eval(), reference.eval()
    torch.testing.assert_close(own(hidden)[1], reference(hidden[1]), atol=2e-3, rtol=2e-3)


def test_the_gradient_of_a_norm_is_that_of_its_definition():
    draws = [
        torch.randn(shape, generator=generator(0, "gradient", i))
        for i, shape in enumerate([(2, 9, 3), *[(2, 1, 3)] * 2])
    ]
    assert torch.autograd.gradcheck(
        lambda *arguments: Normalized.apply(*arguments)[0], [draw.double().requires_grad_() for draw in draws]
    )


def test_a_seed_does_not_depend_on_the_others(tmp_path: Path):
    """Networks side by side are as if each were alone."""
    together, _ = train_teacher(Study(seeds=(3, 5), width=8, teacher_iterations=3), tmp_path / "a", quiet())
    alone, _ = train_teacher(Study(seeds=(5,), width=8, teacher_iterations=3), tmp_path / "b", quiet())
    x = torch.linspace(-4, 4, 20).expand(2, -1)
    torch.testing.assert_close(together(x, 0.3)[1:], alone(x[1:], 0.3), atol=2e-3, rtol=1e-3)
    assert (together(x, 0.3)[0] - together(x, 0.3)[1]).abs().max() > 0.1


def test_repeated_networks_compute_the_same():
    teacher = VelocityNetworks((0, 1), width=8).eval()
    x = torch.randn(2, 16, generator=generator(0, "x", 0))
    torch.testing.assert_close(teacher.repeated(3)(x.repeat(3, 1), 0.4), teacher(x, 0.4).repeat(3, 1))


def test_the_teacher_learns_the_exact_velocity(tmp_path: Path):
    study = Study(seeds=(0,), width=16, teacher_iterations=150, teacher_batch_size=256, teacher_learning_rate=5e-3)
    untrained = toy_module.teacher_numbers(study, VelocityNetworks((0,), 16).eval())["velocity_error"][0]
    teacher, _ = train_teacher(study, tmp_path, quiet())
    assert toy_module.teacher_numbers(study, teacher)["velocity_error"][0] < untrained / 3


def test_an_update_changes_the_named_modules_only():
    modules = {"one": torch.nn.Linear(1, 1), "two": torch.nn.Linear(1, 1)}
    fit = start_fit(modules, {"one": 0.1, "two": 0.1})
    before = [module.weight.clone() for module in modules.values()]
    descend(fit, (modules["one"](torch.ones(1)) * modules["two"](torch.ones(1))).sum(), "one")
    assert not torch.equal(modules["one"].weight, before[0]) and torch.equal(modules["two"].weight, before[1])


@pytest.mark.parametrize("method", [train_perflow, train_accvideo, train_dmd])
def test_a_killed_training_ends_like_one_that_was_not(method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(f"{method.__module__}.run", lambda *args, save_every=0: run(*args, save_every=1))
    teacher = VelocityNetworks(SMALL.seeds, SMALL.width).eval()
    recorded = [record(SMALL, teacher)] if method is train_accvideo else []
    whole = method(SMALL, teacher, *recorded, tmp_path / "whole", quiet()).networks

    class Killed(Exception):
        pass

    class Killing(Progress):
        def advance(self, task, advance: float = 1) -> None:
            super().advance(task, advance)
            if self.tasks[-1].completed == (2 if method is train_accvideo else 4):
                raise Killed

    with pytest.raises(Killed):
        method(SMALL, teacher, *recorded, tmp_path / "killed", Killing(disable=True))
    resumed = method(SMALL, teacher, *recorded, tmp_path / "killed", quiet()).networks
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    start = teacher.repeated(len(whole.leave.weight) // 2)
    assert not torch.equal(whole.leave.weight, start.leave.weight)


def test_students_of_recorded_trajectories_come_nearer_to_their_teacher_than_its_own_few_steps(tmp_path: Path):
    study = Study(seeds=(0,), num_trajectories=512, iterations=150, learning_rate=2e-3)
    teacher = VelocityNetworks(study.seeds).eval()
    noise, key_sigmas = study.normal("test", 0, 256), torch.tensor(study.key_sigmas)
    reference = trajectories(teacher, noise, study.sigmas)[..., -1]

    def error(networks: VelocityNetworks) -> list[float]:
        rows = trajectories(networks, noise.repeat(len(networks.leave.weight), 1), key_sigmas)[..., -1]
        return (rows - reference).abs().mean(1).tolist()

    students = train_accvideo(study, teacher, record(study, teacher), tmp_path, quiet())
    assert list(students.teacher_calls) == ["trajectory loss", "one shared head", "AccVideo"]
    assert max(error(students.networks)) < error(teacher)[0] / 3


def test_windows_start_at_forward_diffused_data_and_end_where_the_teacher_leads():
    teacher = VelocityNetworks(SMALL.seeds, SMALL.width).eval()
    start, end, window = windows(SMALL, teacher).unbind(-1)
    assert start.shape == (len(SMALL.mismatches) * 2, SMALL.num_trajectories * SMALL.num_student_steps)
    last = window == SMALL.num_student_steps - 1
    high = last[0] & (torch.arange(start.shape[1]) >= start.shape[1] // 2)
    for row, mismatch in ((0, 0.0), (4, 3.0)):  # the last window starts at noise level 0.2
        assert start[row, high].mean() == pytest.approx(0.8 * (3 + mismatch / 2), abs=0.1)
    for k in range(SMALL.num_student_steps):
        chosen = window[3] == k
        inner = SMALL.sigmas[2 * k : 2 * k + 3]
        expected = trajectories(teacher, start[2:4][:, chosen], inner)[1, :, -1]
        torch.testing.assert_close(end[3, chosen], expected)


def test_renoised_steps_of_an_exact_network_keep_the_data():
    """For data that is one point, every step predicts that point, so each level is it with fresh noise."""
    noise, fresh = torch.randn(1, 8), [torch.randn(1, 8) for _ in range(3)]
    seen = renoised_steps(lambda x, sigma: exact_velocity(x, sigma, (2.0,)), noise, (1.0, 0.5, 0.2, 0.0), fresh)  # pyright: ignore
    torch.testing.assert_close(seen[1], 0.5 * 2 + 0.5 * fresh[0])
    torch.testing.assert_close(seen[-1], torch.full((1, 8), 2.0))


def gaussian_prediction(latents: torch.Tensor, sigma: torch.Tensor, mean: float, deviation: float) -> torch.Tensor:
    """The mean of all videos that `latents` may be of, for videos drawn from a normal distribution."""
    keep = (1 - sigma) * deviation**2 / ((1 - sigma) ** 2 * deviation**2 + sigma**2)
    return mean + keep * (latents - (1 - sigma) * mean)


def test_the_matching_gradient_is_that_of_the_reverse_kl_divergence_between_gaussians():
    """Its mean over samples and noise is along d KL / d mean, and it vanishes where the distributions agree.

    KL of noised N(m, 1) to noised N(0, 1) is ((1 - sigma) m)^2 / (2 v), v = (1 - sigma)^2 + sigma^2; its derivative
    times sigma^2 / (1 - sigma) is m sigma^2 (1 - sigma) / v, the difference of the predicted videos times 1 - sigma.
    """
    mean, sigma = 0.7, torch.rand(20_000, dtype=torch.float64, generator=generator(0, "level", 0)) * 0.9 + 0.05
    noise = torch.randn(2, 20_000, dtype=torch.float64, generator=generator(0, "noise", 0))
    video = mean + noise[0]
    latents = noised(video, noise[1], sigma)
    fake, real = (gaussian_prediction(latents, sigma, center, 1.0) for center in (mean, 0.0))
    gradient = distribution_matching_gradient(video[:, None], real[:, None], fake[:, None])[:, 0]
    unnormalized = gradient * (video - real).abs()
    torch.testing.assert_close(unnormalized, mean * sigma**2 / ((1 - sigma) ** 2 + sigma**2))
    same = distribution_matching_gradient(video[:, None], fake[:, None], fake[:, None])
    assert same.abs().max() == 0


def test_the_matching_loss_has_the_matching_gradient():
    video, real, fake = (torch.randn(3, 4, 5, generator=generator(i, "loss", 0)) for i in range(3))
    video.requires_grad_()
    distribution_matching_loss(video, real, fake).sum().backward()
    torch.testing.assert_close(video.grad, distribution_matching_gradient(video.detach(), real, fake) / 20)


def test_the_predicted_video_of_the_straight_velocity_is_the_video():
    video, noise, sigma = torch.randn(3, 2, 4), torch.randn(3, 2, 4), torch.tensor([0.1, 0.5, 1.0])
    torch.testing.assert_close(predicted_video(noised(video, noise, sigma), noise - video, sigma), video)


def test_the_study_writes_numbers_table_and_figure_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(toy_module, "NUM_SAMPLES", 400)
    config = ToyConfig(out=tmp_path / "toy", num_seeds=2, teacher_iterations=20, iterations=5, num_trajectories=64)
    results = toy(config)
    assert [row["mismatch"] for row in results["useless"]] == list(PAPER_SHARES)
    names = [row["name"] for row in results["models"]]
    assert names[3:] == [
        *(f"PeRFlow, M = {m}" for m in (0, 1.5, 3)), "trajectory loss", "one shared head", "AccVideo",
        "DMD", *(f"DMD2, M = {m}" for m in (0, 1.5, 3)),
    ]  # fmt: skip
    by_name = {row["name"]: row for row in results["models"]}
    assert by_name["teacher, 50 steps"]["to_teacher"] == [0, 0]
    assert by_name["AccVideo"]["teacher_calls"] == 64 * 50 + 2 * 5 * 256
    assert all(math.isfinite(value) and value > 0 for value in by_name["DMD2, M = 3"]["to_moved"])
    figure = ElementTree.parse(tmp_path / "toy" / "toy.svg").getroot()
    assert "prefers-color-scheme: dark" in "".join(figure.itertext())
    assert "PeRFlow, M = 1.5" in (tmp_path / "toy" / "toy.md").read_text()

    monkeypatch.setattr(toy_module, "estimate_seconds", None)  # nothing is left to estimate
    again = toy(config)
    assert again["models"] == results["models"] and again["seconds"] == results["seconds"]
    with pytest.raises(UserError, match="iterations 5, now 10"):
        toy(ToyConfig(out=tmp_path / "toy", num_seeds=2, teacher_iterations=20, iterations=10, num_trajectories=64))
