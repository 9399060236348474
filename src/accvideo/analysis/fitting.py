"""A training loop of small networks that goes on where it was killed."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress
from torch import Tensor, nn
from torch.optim import Adam

from accvideo.checkpoint import load_checkpoint, optimizer_tensors, restore_optimizer, save_checkpoint


@dataclass(frozen=True)
class Fit:
    """What a training changes."""

    modules: Mapping[str, nn.Module]
    """By name."""
    optimizers: Mapping[str, Adam]
    """By the name of the module they train."""


def start_fit(modules: Mapping[str, nn.Module], learning_rates: Mapping[str, float]) -> Fit:
    """Modules with an Adam optimizer each (Kingma and Ba 2014, arXiv:1412.6980)."""
    optimizers = {
        name: Adam(module.parameters(), lr=learning_rates[name], fused=True) for name, module in modules.items()
    }
    return Fit(modules, optimizers)


def descend(fit: Fit, loss: Tensor, *names: str) -> None:
    """One update of the modules with these names alone, whatever else the loss depends on."""
    loss.backward(inputs=[parameter for name in names for parameter in fit.modules[name].parameters()])
    for name in names:
        fit.optimizers[name].step()
        fit.optimizers[name].zero_grad(set_to_none=True)


def run(
    fit: Fit,
    num_iterations: int,
    update: Callable[[int], None],
    folder: Path,
    progress: Progress,
    save_every: int = 1000,
) -> float:
    """Call `update` with the number of each iteration, from the last checkpoint in `folder` on.

    Returns the seconds of all iterations, those before the last checkpoint included.

    Args:
        fit: changed in place.
        num_iterations: of the whole training.
        update: one iteration; what it draws depends on the number alone.
        folder: of the checkpoints; the last one stays and holds the result.
        progress: where to show a bar.
        save_every: iterations between checkpoints.
    """
    start, seconds = restore(fit, folder)
    began = time.perf_counter() - seconds
    bar = progress.add_task(folder.name, total=num_iterations, completed=start)
    for iteration in range(start, num_iterations):
        update(iteration)
        progress.advance(bar)
        if (iteration + 1) % save_every == 0 or iteration + 1 == num_iterations:
            seconds = time.perf_counter() - began
            save(fit, folder, iteration + 1, seconds)
    return seconds


def save(fit: Fit, folder: Path, iteration: int, seconds: float) -> None:
    """Write a checkpoint."""
    tensors: dict[str, Tensor] = {}
    for name, module in fit.modules.items():
        tensors |= {f"module/{name}/{key}": value for key, value in module.state_dict().items()}
        state = optimizer_tensors(fit.optimizers[name])
        tensors |= {f"optimizer/{name}/{key}": value for key, value in state.items()}
    save_checkpoint(folder, iteration, tensors, {"iteration": iteration, "seconds": seconds})


def restore(fit: Fit, folder: Path) -> tuple[int, float]:
    """Take up the newest checkpoint, if there is one; iterations done and their seconds."""
    if (found := load_checkpoint(folder)) is None:
        return 0, 0.0
    tensors, state = found

    def part(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    for name, module in fit.modules.items():
        module.load_state_dict(part(f"module/{name}/"))
        restore_optimizer(fit.optimizers[name], part(f"optimizer/{name}/"))
    return state["iteration"], state["seconds"]
