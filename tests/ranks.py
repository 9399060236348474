"""Several ranks of a training, as torchrun would start them, forked from a process that has imported everything."""

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path


def start_ranks(function: Callable[[], object], size: int, log: Path) -> list[int]:
    """Fork processes that call `function` as ranks of one another; returns their ids. Errors go to `log`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(size):
        if (child := os.fork()) == 0:
            code = 1
            try:
                with log.open("a") as sink:
                    os.dup2(sink.fileno(), 1)
                    os.dup2(sink.fileno(), 2)
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="localhost")
                function()
                code = 0
            except BaseException:
                log.with_name(f"{log.name}.{rank}").write_text(traceback.format_exc())
            finally:
                os._exit(code)
        children.append(child)
    return children


def run_ranks(function: Callable[[], object], size: int, log: Path) -> None:
    """Call `function` as several ranks, and fail if it does in any of them."""
    codes = [os.waitpid(child, 0)[1] for child in start_ranks(function, size, log)]
    errors = [path.read_text() for path in sorted(log.parent.glob(f"{log.name}.*"))]
    assert codes == [0] * size, "\n".join(errors) or log.read_text()
