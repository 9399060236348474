"""The command line: one subcommand a stage, each a configuration that tyro turns into options."""

import json
import logging
import os
import sys
import warnings
from importlib import import_module
from typing import Annotated, Any, Literal

COMMANDS = {
    "demo": ("accvideo.demo", "the whole loop on the embedded playground, in minutes on a laptop"),
    "prompts": (
        "accvideo.recording.prompts",
        "gather prompts from tables or captions of videos, without doubles, split",
    ),
    "record": ("accvideo.record", "run a teacher on prompts and keep its denoising trajectories"),
    "verify": ("accvideo.data.verify", "check every file of a data set"),
    "stats": ("accvideo.data.stats", "counts, sizes and figures of a data set"),
    "decode": ("accvideo.decode", "write the teacher's videos of a data set, to look at or to score"),
    "merge": ("accvideo.data.merge", "make one data set of several recordings of a teacher"),
    "repair": ("accvideo.data.repair", "record again what is damaged or missing, and nothing else"),
    "pack": ("accvideo.data.pack", "pack a data set into tar shards for the Hub and object stores"),
    "unpack": ("accvideo.data.pack", "unpack tar shards into a file for each trajectory"),
    "distill": ("accvideo.distill", "train a few-step student on recorded trajectories"),
    "generate": ("accvideo.generate", "make videos with a teacher or a student"),
    "export": ("accvideo.export", "write a student as a diffusers folder, a LoRA, or for ComfyUI"),
    "evaluate": ("accvideo.evaluate", "compare a student with its teacher and write a report"),
    "plan": ("accvideo.plan", "hours, memory and disk that a released teacher will take, before any download"),
    "analyze toy": ("accvideo.analysis.toy", "repeat the paper's 1-D study, and what it left out"),
    "analyze coverage": ("accvideo.analysis.coverage", "how often noised videos lie off every recorded trajectory"),
    "analyze keypoints": ("accvideo.analysis.keypoints", "choose key points from trajectories recorded in full"),
    "analyze solvers": ("accvideo.analysis.solvers", "how near to the exact flow short recordings come, by solver"),
    "analyze ablation": ("accvideo.analysis.ablation", "the paper's ablation as numbers, and what it never varied"),
    "analyze errors": ("accvideo.analysis.errors", "in which of its steps a student goes wrong"),
    "analyze cost": ("accvideo.analysis.cost", "what a student costs, recording included, and how good it is"),
    "analyze baselines": ("accvideo.analysis.comparison", "other methods of distillation at an equal budget"),
    "analyze steps": ("accvideo.analysis.steps", "quality and seconds of students against their number of steps"),
    "analyze all": ("accvideo.analysis.everything", "every analysis of the playground, one after the other, resumable"),
    "playground prompts": ("accvideo.playground.prompts", "write prompts of the playground's world to a file"),
    "playground select": ("accvideo.playground.select", "write which trajectories the playground's judge finds right"),
    "playground train": ("accvideo.playground.train", "train the playground's teacher anew"),
}
"""Module and purpose of each command; the module is imported when the command runs, so that help comes at once."""

CONFIGS = {
    "demo": "accvideo.playground.config",
    "record": "accvideo.recording.config",
    "decode": "accvideo.inference.config",
    "distill": "accvideo.training.recipe",
    "generate": "accvideo.inference.config",
    "export": "accvideo.exporting.config",
    "evaluate": "accvideo.reporting.config",
    "plan": "accvideo.planning.config",
    "playground select": "accvideo.playground.config",
    "playground train": "accvideo.playground.config",
}
"""Where the options of a command are, if not in its module: without diffusers, which takes seconds to import, so that
help and mistakes come at once too."""

HELP = """usage: accvideo COMMAND [OPTIONS]

Distill video diffusion pipelines into few-step students: record -> distill -> generate -> evaluate.

{commands}

Each command has its own --help. All take --json: one JSON object on stdout and nothing else there.
Exit codes: 0 success, 1 a mistake that the message explains, 2 a wrong command line, 130 Ctrl-C.
"""


def main() -> None:
    """Run the command of `sys.argv` and exit."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command; returns the exit code."""
    groups = {command.split()[0] for command in COMMANDS if " " in command}
    if len(arguments) == 2 and arguments[0] in groups and arguments[1] in ("-h", "--help"):
        arguments = ["--help"]
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name:{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items()]
        print(HELP.format(commands="\n".join(lines)), end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from accvideo import __version__

        print(__version__)
        return 0
    words = 2 if arguments[0] in groups else 1
    command, rest = " ".join(arguments[:words]), arguments[words:]
    if command not in COMMANDS:
        print(f"accvideo: unknown command {command!r}; known are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    from accvideo.types import UserError

    try:
        as_json = "--json" in rest
        result = execute(command, [word for word in rest if word != "--json"])
        if not result:  # one of several processes, of which the first speaks for all
            return 0
        if as_json:
            print(json.dumps(result))
        else:
            show(result)
        return int(result.get("num_problems", 0) > 0)
    except UserError as error:
        print(f"accvideo: {error}", file=sys.stderr)
        return 1
    except SystemExit as stop:  # tyro: help was asked for, or the command line is wrong
        return stop.code if isinstance(stop.code, int) else 2
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("accvideo: interrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 130


def execute(command: str, arguments: list[str]) -> dict[str, Any]:
    """Parse the options of a command and run it; returns its summary."""
    import tyro

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # What is said while torchao, where it is installed, is imported, whether it is asked for or not.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for library in ("torch.utils._pytree", "torchao"):
        logging.getLogger(library).setLevel(logging.ERROR)
    module, name = COMMANDS[command][0], command.split()[-1]
    config_class: Any = getattr(import_module(CONFIGS.get(command, module)), f"{name.capitalize()}Config")
    if command not in ("record", "distill"):
        config = tyro.cli(config_class, prog=f"accvideo {command}", args=arguments)
    else:
        from accvideo import presets

        preset = option_value(arguments, "--preset", "default")
        config = parse_with_preset(command, config_class, preset, presets.defaults(command, preset), arguments)
        presets.check(preset, config)
    function = getattr(import_module(module), name)
    if "diffusers" in sys.modules:
        quiet_libraries()
    return function(config)


def parse_with_preset(command: str, config_class: Any, preset: str, start: Any, arguments: list[str]) -> Any:
    """The configuration of a command that starts from a preset, `start`, which other options change."""
    import tyro

    from accvideo.presets import names

    def options(config: Any = start, preset: str = preset) -> Any:
        return config

    known: Any = Literal[tuple(names(command))]
    help_text = "Settings to start from; the other options change them."
    options.__annotations__ = {
        "config": Annotated[config_class, tyro.conf.arg(name="")],
        "preset": Annotated[known, tyro.conf.arg(help=help_text)],
    }
    return tyro.cli(options, prog=f"accvideo {command}", description=config_class.__doc__, args=arguments)


def show(summary: dict[str, Any]) -> None:
    """Print the plain values of a summary for a reader."""
    for name, value in summary.items():
        if isinstance(value, str | int | float):
            print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}", file=sys.stderr)


def option_value(arguments: list[str], option: str, default: str) -> str:
    """The value of an option that is read before the others are parsed."""
    for i, word in enumerate(arguments):
        if word == option and i + 1 < len(arguments):
            return arguments[i + 1]
        if word.startswith(option + "="):
            return word.removeprefix(option + "=")
    return default


def quiet_libraries() -> None:
    """Silence what diffusers and transformers print while they load models; accvideo shows its own progress."""
    # torch says so of every mixed-precision norm; it only means that it is not the fused one.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    import diffusers
    import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
