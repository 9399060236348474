"""Metrics for those who watch a training: TensorBoard where it is installed, Weights & Biases where it is asked for."""

import hashlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from accvideo.training.checkpoint import appended, writing
from accvideo.types import UserError

Tracker = Literal["auto", "none", "tensorboard", "wandb"]
"""Where metrics go beside metrics.jsonl; "auto" is TensorBoard where it is installed."""

Write = Callable[[Mapping[str, Any]], None]


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics by name; what differs by key point is a curve each, `name/keypoint_2`."""
    if "start" in line:
        return scalars(line["start"])
    if "alarm" in line:
        return {f"alarm/{line['alarm']}": line["measured"]}
    by_keypoint = f"/keypoint_{line['keypoint']}" if "keypoint" in line else ""
    found: dict[str, float] = {}
    for name, value in line.items():
        if name in ("iteration", "keypoint"):
            continue
        if isinstance(value, list):
            found |= {f"{name}/keypoint_{keypoint}": each for keypoint, each in enumerate(value)}
        else:
            found[name if name in ("num_skipped", "seconds") else name + by_keypoint] = value
    return found


def check_tracker(tracker: Tracker) -> None:
    """See that a tracker is there.

    Raises:
        UserError: it is not installed.
    """
    if tracker not in ("auto", "none") and find_spec(tracker) is None:
        raise UserError(f"{tracker} is not installed: pip install 'accvideo[{tracker}]', or leave out --track")


@contextmanager
def tracked(tracker: Tracker, out: Path, settings: Mapping[str, Any], iteration: int) -> Iterator[Write]:
    """A function that hands each line of metrics to a tracker.

    Args:
        tracker: which one.
        out: folder of the student; TensorBoard's files go to `out/tensorboard`.
        settings: of the run, as JSON.
        iteration: where the run goes on; TensorBoard forgets what a killed run wrote of later iterations.

    Raises:
        UserError: TensorBoard's files cannot be written.
    """
    if tracker == "auto":
        tracker = "tensorboard" if find_spec("tensorboard") is not None else "none"
    if tracker == "tensorboard":
        with _tensorboard(out / "tensorboard", iteration) as write:
            yield write
    elif tracker == "wandb":
        with _wandb(out, settings) as write:
            yield write
    else:
        yield lambda line: None


@contextmanager
def _tensorboard(folder: Path, iteration: int) -> Iterator[Write]:
    # Not torch's SummaryWriter: a thread of its own writes, whose errors come late, after a traceback.
    from tensorboard.compat.proto import event_pb2
    from tensorboard.summary.writer.record_writer import RecordWriter
    from torch.utils.tensorboard.summary import scalar, text

    protocol: Any = event_pb2
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
    with appended(folder / name) as append:
        records = RecordWriter(SimpleNamespace(write=append))

        def add(**what: Any) -> None:
            records.write(protocol.Event(wall_time=time.time(), **what).SerializeToString())

        def write(line: Mapping[str, Any]) -> None:
            for name, value in scalars(line).items():
                add(step=line["iteration"], summary=scalar(name, value))
            if "alarm" in line:
                add(step=line["iteration"], summary=text("alarms", line["message"]))

        add(file_version="brain.Event:2")
        add(step=iteration, session_log=protocol.SessionLog(status=protocol.SessionLog.START))
        yield write


@contextmanager
def _wandb(out: Path, settings: Mapping[str, Any]) -> Iterator[Write]:
    import wandb

    # The same folder is the same run, also after a kill; steps are ours, for W&B's own may not go back.
    identity = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]
    run = wandb.init(
        project="accvideo", name=out.name, id=identity, dir=str(out), config=dict(settings), resume="allow"
    )
    run.define_metric("*", step_metric="iteration")

    def write(line: Mapping[str, Any]) -> None:
        run.log({"iteration": line["iteration"], **scalars(line)})
        if "alarm" in line:
            run.alert(title=line["alarm"], text=line["message"])

    code = 1
    try:
        yield write
        code = 0
    finally:
        run.finish(exit_code=code)  # as a context it would print the traceback of an error that has a message
