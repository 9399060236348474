"""A training loop of small networks that goes on where it was killed."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.optim import Adam

from accvideo.trajectory import write_whole


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
    path: Path,
    progress: Progress,
    save_every: int = 1000,
) -> float:
    """Call `update` with the number of each iteration, from where the file `path` stands on.

    Args:
        fit: changed in place.
        num_iterations: of the whole training.
        update: one iteration; what it draws depends on the number alone.
        path: holds all that changes, and at the end the result; a .safetensors file.
        progress: where to show a bar.
        save_every: iterations between writing it.

    Returns:
        The seconds of all iterations, of those before a kill too.
    """
    start, seconds = restore(fit, path)
    began = time.perf_counter() - seconds
    bar = progress.add_task(path.stem, total=num_iterations, completed=start)
    for iteration in range(start, num_iterations):
        update(iteration)
        progress.advance(bar)
        if (iteration + 1) % save_every == 0 or iteration + 1 == num_iterations:
            seconds = time.perf_counter() - began
            save(fit, path, iteration + 1, seconds)
    return seconds


def save(fit: Fit, path: Path, iteration: int, seconds: float) -> None:
    """Write modules and optimizers to one file, in place of the one before."""
    tensors: dict[str, Tensor] = {}
    for name, module in fit.modules.items():
        tensors |= {f"{name}/{key}": value for key, value in module.state_dict().items()}
        for number, state in fit.optimizers[name].state_dict()["state"].items():
            tensors |= {f"optimizer/{name}/{number}/{key}": value for key, value in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, safetensors.torch.save(tensors, {"iteration": str(iteration), "seconds": str(seconds)}))


def restore(fit: Fit, path: Path) -> tuple[int, float]:
    """Take up what `save` wrote, if it is there; iterations done and their seconds."""
    if not path.exists():
        return 0, 0.0
    with safetensors.safe_open(path, "pt") as file:
        tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    for name, module in fit.modules.items():
        module.load_state_dict({key: tensors[f"{name}/{key}"] for key in module.state_dict()})
        optimizer = fit.optimizers[name]
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(prefix := f"optimizer/{name}/"):
                number, entry = key.removeprefix(prefix).split("/")
                state.setdefault(int(number), {})[entry] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(about["iteration"]), float(about["seconds"])
