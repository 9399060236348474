"""A student for those who do not have accvideo: a plain diffusers folder, a LoRA, or the layout of its authors."""

import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from accvideo.command import progress_bar
from accvideo.exporting.card import license_warning, model_card
from accvideo.exporting.config import ExportConfig
from accvideo.exporting.forms import EXPORT, Output, call_settings, files_of, plan_lora, plan_original, plan_pipeline
from accvideo.exporting.layouts import layout_of
from accvideo.exporting.lora import Extraction
from accvideo.exporting.source import Source, read_json, teacher_files
from accvideo.exporting.usage import extraction_note, usage, what_it_is
from accvideo.exporting.weights import write_weights
from accvideo.inference.model import student_folder
from accvideo.inference.schedulers import KeyPointScheduler
from accvideo.inference.student_config import StudentConfig, read_student_config
from accvideo.training.journal import last_validation
from accvideo.types import UserError


def export(config: ExportConfig) -> dict[str, Any]:
    """Write a student in another form; returns where, what, and for an extracted LoRA the error of every layer.

    Raises:
        UserError: the student cannot take this form, or something else is in the way.
    """
    began = time.perf_counter()
    folder = student_folder(config.student)
    student = read_student_config(folder)
    check_target(config, student)
    check_out(config)
    report = None if config.report is None else read_report(config.report)
    source = Source(folder, student, teacher_files(config, student))
    if config.to in ("comfyui", "original"):
        for name in source.denoisers:
            layout_of(source.denoiser_config(name)["_class_name"])
    if config.out.suffix == ".safetensors" and len(source.denoisers) > 1:
        raise UserError(f"{student.pipeline_class} has {len(source.denoisers)} denoisers; give a folder as --out")
    if warning := license_warning(student):
        print(f"warning: {warning}", file=sys.stderr)

    output, extractions = Output(), {}
    if config.to == "diffusers":
        plan_pipeline(output, source, config)
    elif config.to == "original":
        plan_original(output, source, config)
    else:
        extractions = plan_lora(output, source, config)
    notes = [extraction_note(config, extractions)] if extractions else []
    lora = config.to in ("lora", "comfyui")
    output.texts["README.md"] = model_card(
        student,
        f"{what_it_is(config, student)} ({config.dtype})",
        usage(config, source),
        last_validation(folder / "metrics.jsonl"),
        report,
        notes,
        lora,
    )
    output.texts[EXPORT] = json.dumps(call_settings(config, student) | {"files": sorted(files_of(output))}, indent=2)
    out = write(config, output)
    for line in notes:
        Console(stderr=True).print(line, highlight=False, markup=False)
    return {
        "out": str(config.out),
        "to": config.to,
        "files": sorted(str(path) for path in out),
        "bytes": sum(path.stat().st_size for path in out),
        "num_steps": student.num_steps,
        "guidance_scale": student.guidance_scale,
        "sigmas": student.sigmas,
        "seconds": time.perf_counter() - began,
        **extraction_summary(extractions),
    }


def read_report(path: Path) -> dict[str, Any]:
    """The `report.json` of `accvideo evaluate`.

    Raises:
        UserError: it is none.
    """
    report = read_json(path)
    if not isinstance(report, dict) or not {"rows", "num_prompts"} <= report.keys():
        raise UserError(f"{path} is not a report.json of accvideo evaluate")
    return report


def check_target(config: ExportConfig, student: StudentConfig) -> None:
    """Refuse what a student cannot become.

    Raises:
        UserError: it cannot.
    """
    full = student.lora_rank is None
    if student.other_num_steps:
        numbers = ", ".join(map(str, (student.num_steps, *student.other_num_steps)))
        raise UserError(
            f"{config.student} was trained for several numbers of steps ({numbers}) and is told by its timesteps how "
            "far each step goes, which no other program does\nDistill one for each, with one --num-student-steps"
        )
    if config.to in ("lora", "comfyui") and full and config.rank is None:
        raise UserError(
            f"{config.student} holds full weights; say of which rank the LoRA shall be, such as --rank 32\n"
            "Or keep full weights with --to diffusers or --to original"
        )
    if config.rank is not None and not full:
        raise UserError(f"{config.student} is a LoRA of rank {student.lora_rank} already; leave --rank out")
    if config.to == "diffusers" and student.scheduler["class"] == KeyPointScheduler.__name__:
        levels = ", ".join(f"{sigma:.4f}" for sigma in student.sigmas)
        raise UserError(
            f"no scheduler of diffusers takes a plain {student.pipeline_class} through this student's noise levels "
            f"({levels}): accvideo generate does\n"
            "Export with --to lora, original or comfyui, or record with UniPCMultistepScheduler (use_flow_sigmas=True)"
        )


def check_out(config: ExportConfig) -> None:
    """Refuse to overwrite what no export wrote.

    Raises:
        UserError: something else is there.
    """
    out = config.out
    if out.suffix == ".safetensors" and not out.is_dir():
        for path in (out, out.with_suffix(".md")):
            if path.exists():
                raise UserError(f"{path} exists; give another --out, or delete it")
        return
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out} is a file; give a new or empty folder as --out")
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()}
    ours = set(read_json(out / EXPORT).get("files", ())) if EXPORT in found else set()
    if others := sorted(found - ours):
        raise UserError(f"{out} holds something else ({others[0]}); give a new or empty folder as --out")


def write(config: ExportConfig, output: Output) -> list[Path]:
    """Write everything under another name, then rename it; returns the files.

    Raises:
        UserError: the disk is full, or the place cannot be written.
    """
    single = config.out.suffix == ".safetensors" and not config.out.is_dir()
    partial = config.out.with_name(f".{config.out.name}.tmp")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        total = sum(len(weights) for weights, _ in output.weights.values()) + len(output.copies)
        with progress_bar() as progress:
            bar = progress.add_task("write", total=total)
            for name, path in output.copies.items():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, partial / name)
                progress.advance(bar)
            for name, (weights, header) in output.weights.items():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                write_weights(partial / name, weights, header, lambda: progress.advance(bar))
        for name, text in output.texts.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_text(text, encoding="utf-8")
        if single:
            card = config.out.with_suffix(".md")
            (partial / next(iter(output.weights))).rename(config.out)
            (partial / "README.md").rename(card)
            shutil.rmtree(partial)
            return [config.out, card]
        if config.out.exists():  # empty, or an earlier export
            shutil.rmtree(config.out)
        partial.rename(config.out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot write {config.out}: {error.strerror}; nothing half-written is left") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return [path for path in config.out.rglob("*") if path.is_file()]


def extraction_summary(extractions: Mapping[str, Extraction]) -> dict[str, Any]:
    """What an extracted LoRA leaves out, in numbers."""
    if not extractions:
        return {}
    return {
        "errors": {name: each.errors for name, each in extractions.items()},
        "total_error": {name: each.total_error for name, each in extractions.items()},
        "not_covered": {name: each.not_covered for name, each in extractions.items()},
    }
