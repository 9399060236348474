"""Model cards in the Hub's format: what a student is, how to run it, how it was made, under whose license."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData

from accvideo.teacher import teacher_path

if TYPE_CHECKING:
    from accvideo.student import StudentConfig

TENCENT_TERMS = (
    "HunyuanVideo is under the Tencent Hunyuan Community License, which binds every model distilled from it: no use in "
    "the European Union, the United Kingdom and South Korea, its acceptable-use policy, and a notice with each copy."
)
"""What whoever passes on a student of HunyuanVideo has to know; the license itself says the rest."""


def teacher_name(config: "StudentConfig") -> str:
    """The teacher's hub id, or the name of its folder without the path, which means nothing elsewhere."""
    return config.teacher if teacher_path(config.teacher) is None else Path(config.teacher).name


def license_warning(config: "StudentConfig") -> str | None:
    """What is unusual about the teacher's license, if anything."""
    if "hunyuan" in f"{config.pipeline_class} {config.teacher} {config.license}".lower():
        return TENCENT_TERMS
    return None if config.license else "The teacher's license is not known: look it up before you pass the student on."


def card_header(config: "StudentConfig", lora: bool) -> str:
    """The YAML block of a model card."""
    image = "ImageToVideo" in config.pipeline_class or "I2V" in config.pipeline_class
    task = "image-to-video" if image else "text-to-video"
    on_hub = teacher_path(config.teacher) is None
    hunyuan = license_warning(config) == TENCENT_TERMS
    data: dict[str, Any] = {
        "license": config.license or "other",
        "license_name": "tencent-hunyuan-community" if hunyuan and config.license in (None, "other") else None,
        "library_name": "diffusers",
        "pipeline_tag": task,
        "base_model": config.teacher if on_hub else None,
        "base_model_relation": ("adapter" if lora else "finetune") if on_hub else None,
        "tags": [task, "distillation", "few-step", "accvideo", *(["lora"] if lora else [])],
    }
    return ModelCardData(**{name: value for name, value in data.items() if value is not None}).to_yaml()


def model_card(
    config: "StudentConfig",
    what: str,
    usage: str,
    metrics: Mapping[str, float],
    report: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    lora: bool = False,
) -> str:
    """The text of a model card.

    Args:
        config: of the student.
        what: kind of weights, such as "LoRA of rank 16".
        usage: how to run them, in Markdown.
        metrics: measured while training, by name.
        report: what `accvideo evaluate` wrote to `report.json`.
        notes: further paragraphs.
        lora: whether the weights are a LoRA.
    """
    teacher = teacher_name(config)
    guidance = "its default" if config.teacher_guidance_scale is None else f"{config.teacher_guidance_scale:g}"
    size = "" if config.width is None else f" at {config.width}x{config.height} pixels"
    size += "" if config.num_frames is None else f", {config.num_frames} frames"
    sigmas, timesteps = (
        ", ".join(f"{value:.{digits}f}" for value in values)
        for values, digits in ((config.sigmas, 6), (config.timesteps, 2))
    )
    warning = license_warning(config)
    solver = "" if config.solver == "own" else f" of {config.solver}"
    sections = [
        f"---\n{card_header(config, lora)}\n---",
        f"# {config.num_steps}-step student of {teacher}",
        f"{what} for a `{config.pipeline_class}`, distilled from the teacher's recorded denoising trajectories "
        f"({config.recorded_num_steps or config.teacher_num_steps} steps{solver}, guidance {guidance}) by the method "
        "of AccVideo "
        f"([arXiv:2503.19462](https://arxiv.org/abs/2503.19462)). "
        f"It takes {config.num_steps} denoiser calls a video{size}."
        + "".join(f" Or {number}: `accvideo generate --num-steps {number}`." for number in config.other_num_steps),
        f"## How to run it\n\n{usage}",
        f"Noise levels (sigmas): {sigmas}\n\nTimesteps: {timesteps}\n\n"
        "The student was trained at these and no others: another number of steps, shift or guidance makes bad videos.",
        *notes,
    ]
    if report is not None:
        sections.append(f"## Measured\n\n{report_table(report)}")
    if metrics:
        sections.append(f"## Measured while training\n\n{table(('', ''), metrics.items())}")
    sections += [
        f"## Recipe\n\n{table(('', ''), config.recipe.items())}",
        f"## License\n\n{config.license or 'unknown'}: the teacher's ({teacher}, revision "
        f"{config.revision or 'unknown'}), from which a student is derived." + (f"\n\n{warning}" if warning else ""),
    ]
    return "\n\n".join(sections) + "\n"


def table(header: Sequence[str], rows: Any) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(plain(cell) for cell in line) + " |" for line in lines)


def plain(value: Any) -> str:
    """A cell of a table."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def report_table(report: Mapping[str, Any]) -> str:
    """The rows of `report.json`: means of all metrics, and seconds a video."""
    names = sorted({name for row in report["rows"] for name in row["metrics"]})
    header = ["", "steps", "denoiser calls", "seconds denoising", *names]
    rows = [
        [row["name"], row["num_steps"], row["denoiser_calls"], float(row["seconds_denoising"])]
        + [float(row["metrics"][name]["mean"]) if name in row["metrics"] else "" for name in names]
        for row in report["rows"]
    ]
    return f"{table(header, rows)}\n\nMeans over {report['num_prompts']} prompts, by `accvideo evaluate`."
