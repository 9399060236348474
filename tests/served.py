"""A folder behind a web server on this machine, for the tests of reading from elsewhere."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Handler(SimpleHTTPRequestHandler):
    """Serves files, lists folders, and knows ranges of bytes unless the server is to lack them."""

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """A whole file, the list of a folder, or a part of a file."""
        server: Any = self.server
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        server.asked.append((self.path, asked and (int(asked[1]), int(asked[2] or -1))))
        if server.num_failures and self.path.endswith((".safetensors", ".tar")):
            server.num_failures -= 1
            self.send_error(503)
            return
        path = Path(self.translate_path(self.path))
        if not asked or not server.ranges or not path.is_file():
            super().do_GET()
            return
        data = path.read_bytes()[int(asked[1]) : int(asked[2] or -2) + 1 or None]
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def served(folder: Path, ranges: bool = True, num_failures: int = 0) -> Iterator[tuple[str, Any]]:
    """The address of a folder, and the server; its `asked` lists what was asked for.

    Args:
        folder: what is served.
        ranges: whether it can send parts of files.
        num_failures: requests for trajectories and shards that fail first.
    """
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    server.ranges, server.num_failures, server.asked = ranges, num_failures, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server
    finally:
        server.shutdown()
        server.server_close()
