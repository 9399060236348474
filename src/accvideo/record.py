"""Stage 1: runs the teacher on prompts and keeps the key states and conditional calls of each run."""

import difflib
import hashlib
import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from diffusers import DiffusionPipeline
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from torch import Tensor

from accvideo.call import flatten, replay, without_padding
from accvideo.command import (
    DEFAULT_FPS,
    Prompt,
    call_parameters,
    choose_device,
    parse_pipeline_args,
    progress_bar,
    read_prompt_file,
    shorten,
    with_image,
)
from accvideo.data.manifest import MANIFEST, Manifest, read_manifest
from accvideo.data.schema import parse
from accvideo.flow import keypoint_indices
from accvideo.inference.model import NUM_TEACHER_STEPS
from accvideo.media import check_media, load_media, media_digests
from accvideo.recording.solvers import SOLVERS, Solver, solver_step
from accvideo.recording.workers import CLAIM, PARTIAL, BackgroundWriter, Claims, Place, find_place
from accvideo.student import KeyPointScheduler, student_scheduler
from accvideo.teacher import (
    Approach,
    Watch,
    WatchedStep,
    approach,
    batch_arguments,
    check_scheduler,
    denoisers,
    fingerprint,
    guidance_arguments,
    has_guider,
    item_generator,
    load_pipeline,
    pipeline_defaults,
    provenance,
    shared_arguments,
    watch,
)
from accvideo.trajectory import (
    Header,
    Trajectory,
    misplaced,
    read_trajectory,
    trajectory_name,
    write_trajectory,
    write_whole,
)
from accvideo.types import UserError

OWN_ARGUMENTS = ("prompt", "generator", "num_inference_steps", "output_type", "return_dict", "latents")
"""Arguments of a pipeline's call that the recorder sets itself."""
POLL_SECONDS = 2.0
"""Longest time between two looks at what other recorders are at."""


@dataclass(frozen=True, kw_only=True)
class RecordConfig:
    """Records the teacher's denoising trajectories on the prompts of a file.

    `--preset NAME`, such as wan21-t2v-14b, starts from a released teacher and its settings; a wrong name lists all.
    """

    teacher: tyro.conf.Positional[str]
    """`playground`, a folder that diffusers saved, or a hub id."""
    prompts: Path
    """Text file, one prompt a line; or .csv or .jsonl with a column `prompt` and others (`image`, `video`) that are
    arguments of the pipeline's call; file names in it are relative to its folder."""
    out: Path
    """Folder of the data set; an interrupted recording in it goes on."""
    num_steps: int = 50
    """Denoising steps S of the recording."""
    solver: Solver = "own"
    """How steps are taken, always over the noise levels of the teacher's own scheduler: by that scheduler; by Euler's
    method; or by one of second order, which in 20 to 25 steps comes as near to the flow as Euler's in 50."""
    teacher_num_steps: int | None = None
    """Steps of the teacher's own clips, by its own scheduler, that students will be compared with; `num_steps` by
    default, or 50 where `solver` is another."""
    num_student_steps: int = 5
    """Steps K of the student to come; must divide S."""
    image: Path | None = None
    """First frame, for image-to-video pipelines; a column `image` of the prompts has one for each."""
    guidance_scale: float | None = None
    """The pipeline's own by default."""
    height: int | None = None
    """In pixels; the pipeline's own by default."""
    width: int | None = None
    """In pixels; the pipeline's own by default."""
    num_frames: int | None = None
    """The pipeline's own by default."""
    fps: int | None = None
    """Frames a second the clips are meant for; the pipeline's own by default."""
    shift: float | None = None
    """Of the noise levels towards noise: `shift` or `flow_shift` of the scheduler; as the teacher has it by default."""
    seed: int = 0
    """With an item's number, it makes the item's noise."""
    num_trajectories: int | None = None
    """As many as prompts by default; more go round the prompts again, with other noise."""
    pipeline_arg: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=JSON: any other argument of the pipeline's call; may be repeated. The name of an image or video file is
    replaced by what is in it."""
    batch_size: int = 1
    """Trajectories denoised together. Batches are always whole: what an item becomes depends on this number."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the pipeline; states are stored in float32 in any case."""
    device: str = "auto"
    """`auto` takes the accelerator if there is one; under torchrun, srun or a SLURM array each worker its own."""
    ray: bool = False
    """Record with a pool of workers on Ray (`pip install 'accvideo[ray]'`), here or on the cluster that is set up."""
    num_workers: int | None = None
    """Of the pool on Ray, with a pipeline each; by default as many as accelerators, or processor cores without any."""

    def __post_init__(self) -> None:
        keypoint_indices(self.num_steps, self.num_student_steps)
        if self.solver not in SOLVERS:
            raise UserError(f"solver is {self.solver}; choose one of {', '.join(SOLVERS)}")
        if self.num_workers is not None and not self.ray:
            raise UserError("--num-workers is for --ray; without it, start workers by torchrun, srun or by hand")
        for name in ("num_trajectories", "batch_size", "num_workers", "teacher_num_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1")


def record(config: RecordConfig) -> dict[str, Any]:
    """Records a data set, or the rest of one, and returns a summary of what this process did.

    Any number of processes may do so at once, on one machine or many that share the folder.

    Raises:
        UserError: whatever the user can mend; before the first denoiser call where it can be known by then.
    """
    started = time.perf_counter()
    if config.ray:
        if find_spec("ray") is None:
            raise UserError("--ray takes ray, which is not installed; pip install 'accvideo[ray]'")
        from accvideo.recording.ray_workers import record_on_ray

        return record_on_ray(config)
    place = find_place(os.environ)
    with Recorder(config, place) as recorder:
        blocks = recorder.missing()
        first = place.rank * len(blocks) // place.num_workers
        with progress_bar(visible=place.local_rank == 0) as progress:
            record_blocks(recorder, [*blocks[first:], *blocks[:first]], progress)
    return summary(config.out, recorder.manifest, recorder.num_recorded, recorder.num_blocks, started)


def record_blocks(recorder: "Recorder", blocks: Sequence["Block"], progress: Progress) -> None:
    """Records blocks until all are there, by this recorder or by others."""
    num_steps, waited, pending = recorder.manifest.num_steps, 0.0, dict.fromkeys(blocks)
    bar = progress.add_task("denoising steps", total=len(blocks) * num_steps)
    while pending:
        before = len(pending)
        for block in list(pending):
            done = (len(blocks) - len(pending)) * num_steps
            if recorder.record(block, lambda step, done=done: progress.update(bar, completed=done + step)):
                del pending[block]
        progress.update(bar, completed=(len(blocks) - len(pending)) * num_steps)
        if len(pending) == before:  # others are at all of them; should one die, its block is taken over
            if not waited:
                progress.console.print(f"waiting for {len(pending)} blocks that other recorders are at")
            time.sleep(waited := min(2 * waited + 0.05, POLL_SECONDS))


def summary(folder: Path, manifest: Manifest, num_recorded: int, num_blocks: int, started: float) -> dict[str, Any]:
    """What a recording has done since `started`, and what the folder holds."""
    return {
        "folder": str(folder),
        "num_trajectories": manifest.num_trajectories,
        "num_recorded": num_recorded,
        "denoiser_calls": manifest.denoiser_calls * num_blocks * manifest.batch_size,
        "nested_schedule": manifest.nested_schedule,
        "bytes": sum(entry.stat().st_size for entry in os.scandir(folder) if not entry.name.startswith(".")),
        "seconds": time.perf_counter() - started,
    }


@dataclass(frozen=True)
class Block:
    """Items that are denoised together, and what there is to do for them."""

    number: int
    """Block b holds the items `b * batch_size` up to `(b + 1) * batch_size`."""
    missing: tuple[int, ...] = ()
    """Items without a file."""
    damaged: tuple[int, ...] = ()
    """Items with a file that is damaged."""


class Recorder:
    """A pipeline that records blocks of a data set into a folder, to which others may record at the same time."""

    def __init__(self, config: RecordConfig, place: Place):
        """Loads the pipeline and makes or joins the data set.

        Raises:
            UserError: whatever the user can mend.
        """
        self.config, self.place = config, place
        prompts = read_prompt_file(config.prompts)
        check_folder(config.out)
        device = own_device(config.device, place)
        self.pipeline = load_pipeline(config.teacher, getattr(torch, config.dtype), device)
        if config.shift is not None:
            set_shift(self.pipeline, config.shift)
        check_scheduler(self.pipeline)
        defaults = pipeline_defaults(config.teacher)
        self.arguments = call_arguments(self.pipeline, config, defaults)
        self.prompts = with_image(prompts, config.image)
        check_prompts(self.pipeline, self.prompts, config)
        manifest, self.shared = make_manifest(self.pipeline, config, defaults, self.arguments, self.prompts)
        make_folder(config.out)
        self.num_recorded = self.num_blocks = 0
        self._padding_counts: bool | None = None  # to the denoisers; not known yet
        self.writer, self.claims = BackgroundWriter(), Claims(config.out, identity(manifest))
        try:
            self.manifest = open_folder(config.out, manifest, self.claims)
            self.claims.sweep()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Finishes what is being written and gives all claims back.

        Raises:
            UserError: something could not be written.
        """
        try:
            self.writer.close()
        finally:
            self.claims.close()
            self.claims.sweep()

    def missing(self) -> list[Block]:
        """The blocks of which a trajectory is missing or damaged.

        Of all files that are there the header is read, and checksums of those that fall to this worker: of recorders
        that are started together each reads its share.

        Raises:
            UserError: a file was recorded on another prompt, or with other arguments, images or videos.
        """
        found: dict[int, Block] = {}
        present = {entry.name for entry in os.scandir(self.config.out)}
        for index in range(self.manifest.num_trajectories):
            number = index // self.config.batch_size
            block = found.get(number, Block(number))
            own = number % self.place.num_workers == self.place.rank
            if trajectory_name(index) not in present:
                found[number] = replace(block, missing=(*block.missing, index))
            elif problem := self.check(index, whole=own):
                print(f"warning: {problem}; recording it again", file=sys.stderr)
                found[number] = replace(block, damaged=(*block.damaged, index))
        return list(found.values())

    def check(self, index: int, whole: bool) -> str | None:
        """What is wrong with the file of a trajectory, or None.

        Args:
            index: of the trajectory.
            whole: read all of it, not its header alone.

        Raises:
            UserError: the file cannot be read; or it was recorded on another prompt, or with other arguments, images or
                videos.
        """
        path, prompt = self.config.out / trajectory_name(index), self.prompts[index % len(self.prompts)]
        try:
            if whole:
                trajectory = read_trajectory(path)
                if problem := misplaced(trajectory, index, self.manifest):
                    return f"{path}: {problem}"
                text, arguments, media = trajectory.prompt, trajectory.arguments, trajectory.media
            else:
                header = read_header(path)
                text, arguments, media = header.prompt, header.arguments, None
        except UserError as error:
            if isinstance(error.__cause__, OSError):
                raise
            return str(error)
        for old, new in ((text, prompt.text), (arguments, prompt.arguments)):
            if old != new:
                raise UserError(
                    f"{path} was recorded on the prompt {shorten(old)}, the file of prompts now has {shorten(new)}\n"
                    "Restore the file of prompts, or give another folder"
                )
        if media is not None and (now := self.media(prompt)) != media:
            changed = sorted(name for name in media.keys() | now.keys() if media.get(name) != now.get(name))
            file = {**self.arguments, **prompt.arguments}.get(changed[0])
            raise UserError(
                f"{path} was recorded with another {changed[0]} in {file} than is there now\n"
                "Restore that file, or give another folder"
            )
        return None

    def media(self, prompt: Prompt) -> dict[str, Any]:
        """SHA-256 of the images and videos that the pipeline is called with for a prompt."""
        return media_digests(self.arguments) | media_digests(prompt.arguments, prompt.folder)

    def record(self, block: Block, on_step: Callable[[int], None] | None = None) -> bool:
        """Records what is missing of a block, unless another recorder is at it; says whether it is done.

        It may still be waiting to be written when this returns: see `close`.

        Args:
            block: one of `missing`.
            on_step: called with the number of denoising steps taken, after each.

        Raises:
            UserError: the pipeline cannot be a teacher, or something could not be written.
        """
        if not block.damaged and not self._absent(block):
            return True
        name = f"block-{block.number}"
        if not self.claims.take(name):
            return False
        wanted = [*self._absent(block), *(index for index in block.damaged if self.check(index, whole=True))]
        if not wanted:  # another has recorded it since
            self.claims.release(name)
            return True
        size = self.config.batch_size
        items = range(block.number * size, (block.number + 1) * size)
        media = self.media(self.prompts[items[0] % len(self.prompts)])  # with several items it is the same for all
        solve = solver_step(self.config.solver)
        with watch(self.pipeline, self.manifest.keypoints[:-1], on_step, self.shared, solve) as seen:
            run: Any = self.pipeline
            run(
                num_inference_steps=self.config.num_steps,
                output_type="latent",
                **items_arguments(self.config, self.arguments, self.prompts, items),
            )
        seen.steps = self._without_padding(seen.steps)
        trajectories = trajectories_of(seen, self.manifest, items, self.prompts, media)
        if not self.manifest.denoiser_calls:  # the first of all: a pipeline that is refused leaves no data set
            manifest = replace(self.manifest, denoiser_calls=seen.num_calls)
            self.manifest = open_folder(self.config.out, manifest, self.claims)
        self.num_blocks += 1
        self.writer.put(lambda: self._write(name, [trajectories[index - items[0]] for index in wanted]))
        return True

    @torch.no_grad()
    def _without_padding(self, steps: list[WatchedStep]) -> list[WatchedStep]:
        """The steps, with zeros for the padding of prompts if no denoiser's output differs in a bit: it takes no space.

        Tried once, on the first prompt that is padded.
        """
        bare = [replace(step, call=without_padding(step.call)) for step in steps]
        if self._padding_counts is None and any(new.call is not old.call for new, old in zip(bare, steps, strict=True)):
            networks, firsts = denoisers(self.pipeline), {step.denoiser: step for step in reversed(steps)}
            self._padding_counts = not all(
                torch.equal(
                    *(replay(networks[name], call, step.state) for call in (step.call, without_padding(step.call)))
                )
                for name, step in firsts.items()
            )
        return steps if self._padding_counts else bare

    def _absent(self, block: Block) -> list[int]:
        return [index for index in block.missing if not (self.config.out / trajectory_name(index)).exists()]

    def _write(self, claim: str, trajectories: Sequence[Trajectory]) -> None:
        for trajectory in trajectories:
            write_trajectory(self.config.out, trajectory, self.claims.writer)
            self.num_recorded += 1
        self.claims.release(claim)


def read_header(path: Path) -> Header:
    """The header of a trajectory's file, without the tensors.

    Raises:
        UserError: the file is missing, truncated or no trajectory.
    """
    try:
        with safe_open(path, "pt") as file:
            return parse(Header, file.metadata()["accvideo"])
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a trajectory, or truncated") from error


def own_device(name: str, place: Place) -> str:
    """The device called `name`; of several accelerators, each worker of a machine has its own."""
    device = choose_device(name)
    return f"cuda:{place.local_rank % torch.cuda.device_count()}" if device == "cuda" else device


def check_prompts(pipeline: DiffusionPipeline, prompts: Sequence[Prompt], config: RecordConfig) -> None:
    """Checks what the prompts ask the pipeline's call for, and that their images and videos are there.

    Raises:
        UserError: the call does not take an argument or lacks an image, or a file is missing.
    """
    name, accepted = type(pipeline).__name__, call_parameters(pipeline)
    for number, prompt in enumerate(prompts, 1):
        for argument in prompt.arguments:
            if argument in OWN_ARGUMENTS:
                raise UserError(f"{config.prompts}: the column {argument} is set by the recorder; leave it out")
            if argument not in accepted:
                raise UserError(f"{name} takes no {argument} (of prompt {number}); it takes {', '.join(accepted)}")
        if prompt.arguments and config.batch_size > 1:
            raise UserError(
                f"prompt {number} has a {next(iter(prompt.arguments))} of its own, and {name} takes one a call\n"
                "Leave --batch-size out"
            )
        check_media(prompt.arguments, prompt.folder)


def items_arguments(
    config: RecordConfig, arguments: Mapping[str, Any], prompts: Sequence[Prompt], items: Sequence[int]
) -> dict[str, Any]:
    """The arguments of the pipeline's call that makes these items."""
    chosen = [prompts[index % len(prompts)] for index in items]
    return {
        **batch_arguments([prompt.text for prompt in chosen], config.seed, items),
        **load_media(arguments),
        **load_media(chosen[0].arguments, chosen[0].folder),  # the only one that has any: see `check_prompts`
    }


def set_shift(pipeline: DiffusionPipeline, shift: float) -> None:
    """Gives the pipeline a scheduler like its own with another shift of the noise levels.

    Raises:
        UserError: its noise levels have no shift that can be set.
    """
    settings: Any = pipeline.scheduler.config
    name = next((name for name in ("flow_shift", "shift") if name in settings), None)
    if name is None or settings.get("use_dynamic_shifting") or shift <= 0:
        raise UserError(
            f"shift is {shift}: it must be positive, and {type(pipeline.scheduler).__name__} must have one of its own\n"
            f"{type(pipeline).__name__} may compute it from the size; leave --shift out then"
        )
    scheduler_class: Any = type(pipeline.scheduler)
    pipeline.register_modules(scheduler=scheduler_class.from_config(settings, **{name: shift}))


def check_folder(folder: Path) -> None:
    """Refuses a folder that holds something else.

    Raises:
        UserError: it is a file, or a folder with files but no manifest.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a new or empty folder")
    if folder.is_dir() and not (folder / MANIFEST).exists():
        names = sorted(each.name for each in folder.iterdir())
        if others := [name for name in names if not (CLAIM.fullmatch(name) or PARTIAL.fullmatch(name))]:
            if not (folder / MANIFEST).exists():  # nor has another recorder just begun
                raise UserError(f"{folder} holds something else ({others[0]}); give a new or empty folder")


def make_folder(folder: Path) -> None:
    """Makes a folder unless it is there.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from error


NOT_IDENTITY = ("num_trajectories", "denoiser_calls", "versions")
"""Fields of a manifest in which two recordings of one data set may differ."""


def identity(manifest: Manifest) -> str:
    """A hash that is equal for the manifests of recordings that may share a folder."""
    fields = {name: value for name, value in asdict(manifest).items() if name not in NOT_IDENTITY}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def open_folder(folder: Path, manifest: Manifest, claims: Claims) -> Manifest:
    """Joins the data set in the folder, if it is of the same configuration, or begins it; returns its manifest.

    It begins with a manifest that says how many denoiser calls a trajectory takes; before, nothing is written. A larger
    `num_trajectories` than before extends the data set.

    Raises:
        UserError: the configurations differ.
    """
    with claims.alone("manifest"):
        if not (folder / MANIFEST).exists():
            if rivals := claims.rivals():
                raise UserError(
                    f"{rivals[0]} is recording another configuration into {folder}\nGive another folder, or stop it"
                )
            if manifest.denoiser_calls:
                write_whole(folder / MANIFEST, manifest.to_json().encode(), claims.writer)
            return manifest
        old = read_manifest(folder)
        if names := old.differences(manifest, ignore=NOT_IDENTITY):
            changes = (f"{name} {shorten(getattr(old, name))} -> {shorten(getattr(manifest, name))}" for name in names)
            raise UserError(
                f"{folder} holds a data set of another configuration: {', '.join(changes)}\n"
                "Give another folder, or the configuration it was started with"
            )
        if old.num_trajectories > manifest.num_trajectories:
            raise UserError(f"{folder} is for {old.num_trajectories} trajectories already; ask for as many or more")
        if old.num_trajectories < manifest.num_trajectories:
            old = replace(old, num_trajectories=manifest.num_trajectories)
            write_whole(folder / MANIFEST, old.to_json().encode(), claims.writer)
        return old


def call_arguments(pipeline: DiffusionPipeline, config: RecordConfig, defaults: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the pipeline's call: the command line's, else the teacher folder's, else the pipeline's own.

    Raises:
        UserError: the pipeline's call does not take one of them.
    """
    given = {**defaults.get("pipeline_args", {}), **parse_pipeline_args(config.pipeline_arg)}
    for name in ("height", "width", "num_frames", "guidance_scale"):
        if (value := getattr(config, name)) is None:
            value = defaults.get(name)
        if value is not None:
            given[name] = value
    if "guidance_scale" in given:
        given |= guidance_arguments(pipeline, given.pop("guidance_scale"))
    accepted = call_parameters(pipeline)
    for name in given:
        if name in OWN_ARGUMENTS:
            raise UserError(f"{name} is set by the recorder; leave it out of --pipeline-arg")
        if name not in accepted:
            close = difflib.get_close_matches(name, accepted, n=3) or sorted(accepted)
            raise UserError(f"{type(pipeline).__name__} takes no argument {name}; it takes {', '.join(close)}")
    return given


def make_manifest(
    pipeline: DiffusionPipeline,
    config: RecordConfig,
    defaults: dict[str, Any],
    arguments: dict[str, Any],
    prompts: Sequence[Prompt],
) -> tuple[Manifest, list[str]]:
    """The manifest of a data set, without a denoiser call; warns if students of it cannot run in plain diffusers.

    Also the names of the denoiser's arguments that have no row for each sample.

    Raises:
        UserError: the pipeline refuses its arguments, or cannot be a teacher.
    """

    def first(num_steps: int, item: int = 0, **others: Any) -> Approach:
        return approach(pipeline, num_steps, **items_arguments(config, arguments, prompts, [item]) | others)

    kinds = {tuple(prompt.arguments): item for item, prompt in reversed(list(enumerate(prompts)))}
    for item in sorted(kinds.values())[1:]:  # such as the first prompt without an image
        first(config.num_steps, item)
    few, many = first(config.num_student_steps), first(config.num_steps)
    check_same_call(pipeline, few, many)
    try:
        two = first(config.num_steps, prompt=[prompts[0].text] * 2, generator=item_generator(config.seed, 0))
        shared = shared_arguments(many.arguments, two.arguments)
    except Exception:  # pipelines that take one image or video a call say so in many ways
        shared = []
    (key_sigmas, key_timesteps), (sigmas, timesteps) = ((each.sigmas, each.timesteps) for each in (few, many))
    if len(sigmas) != config.num_steps + 1:
        raise UserError(
            f"{type(pipeline.scheduler).__name__} makes {len(sigmas) - 1} steps of {config.num_steps}; "
            "choose a number of steps that it keeps"
        )
    keypoints = keypoint_indices(config.num_steps, config.num_student_steps)
    nested = is_nested(key_sigmas, [sigmas[i] for i in keypoints], 1e-5)
    nested = nested and is_nested(key_timesteps, [timesteps[i] for i in keypoints[:-1]], 1.0)
    usual_num_steps = config.num_steps if config.solver == "own" else NUM_TEACHER_STEPS
    teacher_num_steps = config.teacher_num_steps or usual_num_steps
    revision, license = provenance(config.teacher)
    own_defaults = call_parameters(pipeline)

    def used(name: str) -> Any:
        value = arguments.get(name, own_defaults.get(name))
        return None if value is inspect.Parameter.empty else value

    manifest = Manifest(
        teacher=config.teacher,
        revision=revision,
        license=license,
        pipeline_class=type(pipeline).__name__,
        fingerprints={name: fingerprint(denoiser) for name, denoiser in denoisers(pipeline).items()},
        num_steps=config.num_steps,
        num_student_steps=config.num_student_steps,
        keypoints=keypoints,
        sigmas=sigmas,
        guidance_scale=pipeline.guider.guidance_scale if has_guider(pipeline) else used("guidance_scale"),
        height=used("height"),
        width=used("width"),
        num_frames=used("num_frames"),
        fps=config.fps or defaults.get("fps") or used("frame_rate") or used("fps") or DEFAULT_FPS,
        pipeline_args={
            name: value
            for name, value in arguments.items()
            if name not in ("guidance_scale", "height", "width", "num_frames")
        },
        dtype=config.dtype,
        seed=config.seed,
        num_trajectories=config.num_trajectories or len(prompts),
        batch_size=config.batch_size,
        scheduler={
            "class": type(pipeline.scheduler).__name__,
            "config": {name: value for name, value in pipeline.scheduler.config.items() if not name.startswith("_")},
        },
        nested_schedule=nested,
        solver=config.solver,
        teacher_num_steps=None if teacher_num_steps == config.num_steps else teacher_num_steps,
        versions={name: version(name) for name in ("accvideo", "torch", "diffusers", "transformers")},
    )
    if isinstance(student_scheduler(manifest, [timesteps[i] for i in keypoints[:-1]]), KeyPointScheduler):
        print(
            f"warning: {type(pipeline.scheduler).__name__} cannot be made to take {config.num_student_steps} steps "
            f"over these noise levels: accvideo can run a student of them, a plain {type(pipeline).__name__} not\n"
            "Record with UniPCMultistepScheduler or DPMSolverMultistepScheduler (use_flow_sigmas=True) to export one",
            file=sys.stderr,
        )
    return manifest, shared


def check_same_call(pipeline: DiffusionPipeline, few: Approach, many: Approach) -> None:
    """Checks that the denoiser is asked the same at its first call, however many steps are to follow.

    Raises:
        UserError: it is not, so that a student would not be asked what its teacher was.
    """
    before = dict(flatten(many.arguments))
    for name, value in flatten(few.arguments):
        if name in ("hidden_states", "timestep") or not isinstance(value, Tensor):
            continue
        if name not in before or not torch.equal(value, before[name]):
            raise UserError(
                f"{type(pipeline).__name__} tells its denoiser {name}, which depends on the number of steps: "
                "a student of fewer steps would not be asked what was recorded"
            )


def is_nested(grid: Sequence[float], other: Sequence[float], tolerance: float) -> bool:
    """Whether two grids are the same within a tolerance."""
    return len(grid) == len(other) and all(abs(a - b) <= tolerance for a, b in zip(grid, other, strict=True))


def trajectories_of(
    seen: Watch, manifest: Manifest, items: range, prompts: Sequence[Prompt], media: dict[str, Any]
) -> list[Trajectory]:
    """The trajectories of the items of one watched run, all with the same images and videos."""
    if seen.num_steps != manifest.num_steps or seen.final is None:
        raise UserError(f"the pipeline took {seen.num_steps} steps of {manifest.num_steps}; accvideo needs all of them")
    states = torch.stack([*(step.state for step in seen.steps), seen.final], dim=1)
    return [
        Trajectory(
            index=index,
            seed=manifest.seed,
            prompt=prompts[index % len(prompts)].text,
            states=states[row],
            calls=tuple(step.call.select(slice(row, row + 1)) for step in seen.steps),
            denoisers=tuple(step.denoiser for step in seen.steps),
            arguments=prompts[index % len(prompts)].arguments,
            media=media,
        )
        for row, index in enumerate(items)
    ]
