"""See what a model sees: attention, norms, similarity, PCA and LOST on any photo, in a browser, on this machine alone.

    uv run --group viewer apps/viewer.py --model path/to/weights
    uv run --group viewer apps/viewer.py --model runs/quickstart/r0 --model runs/quickstart/r4 --images photos

It opens on http://127.0.0.1:7860. Nothing is sent anywhere, and uploaded photos are deleted when it stops.
"""

import os
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path

from pydantic import Field
from vitreg_core.config import Config
from vitreg_core.errors import InputError
from vitreg_core.options import one_line_errors, parse_options

PROGRAM = "viewer"
QUICKSTART = Path("runs/quickstart")
LOCAL = ("127.0.0.1", "localhost", "::1")


class ViewerOptions(Config):
    """Look at maps of one or two models on drawn scenes, photos of a folder, or photos uploaded in the browser.

    Choose a block, a head and a token, click a patch, switch test-time registers on. Stop it with Ctrl-C.
    """

    model: tuple[str, ...] = Field(default=(), max_length=2)
    """SOURCE of the weights: a folder or file, a run folder, hub:owner/name. Give the option twice to compare two
    models; without it, those of the quickstart are taken."""
    images: Path | None = None
    """Folder of pictures to choose from; register neurons are then found on them, otherwise on drawn scenes."""
    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 lets everybody on the network in, without a password."""
    port: int = Field(default=7860, ge=1, le=65535)
    """Port to listen on."""


def sources(options: ViewerOptions) -> tuple[str, ...]:
    """The models of the options, or those that the quickstart left.

    Raises:
        InputError: neither, or the same one twice.
    """
    if len(set(options.model)) < len(options.model):
        raise InputError(f"--model {options.model[0]} is given twice; give two different models")
    runs = sorted(path.parent for path in QUICKSTART.glob("r*/model.safetensors"))
    if options.model or runs:
        return options.model or tuple(map(str, runs[:2]))
    raise InputError(
        f"no model: give --model SOURCE (a folder with weights, a run folder, hub:owner/name), or run "
        f"apps/quickstart.py first, whose two models are taken from {QUICKSTART}"
    )


def check_address(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on, before models are read.

    Raises:
        InputError: the port is taken or the address is not of this machine.
    """
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.create_server(address[:2], family=kind):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"--host {host} --port {port}: {reason}; give another --port, or a --host of this machine"
        ) from None


def prepare_environment(temporary: str) -> None:
    """Settings that libraries read as they load."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin slow each other down on busy cores
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = temporary  # uploads, gone when the program ends


def serve(options: ViewerOptions) -> None:
    """Open the models and answer until the program is stopped."""
    chosen = sources(options)
    check_address(options.host, options.port)
    try:
        from viewer_page import build, launch
    except ModuleNotFoundError as error:
        raise InputError(f"no {error.name}: start it as uv run --group viewer apps/viewer.py") from None
    from vitreg_eval.models import open_model
    from vitreg_eval.viewing import Viewer

    viewer = Viewer([open_model(source) for source in chosen], options.images)
    launch(build(viewer), options.host, options.port)
    print(f"viewer: {' and '.join(chosen)} at http://{options.host}:{options.port} (stop with Ctrl-C)", flush=True)
    if options.host not in LOCAL:
        print(f"viewer: --host {options.host}: whoever reaches this port can use it and upload files", flush=True)


def main() -> None:
    """Run the viewer; bad input ends with one line and exit code 2."""
    with one_line_errors(PROGRAM), tempfile.TemporaryDirectory(prefix="vitreg-viewer-") as temporary:
        options = parse_options(ViewerOptions(), sys.argv[1:], PROGRAM)
        prepare_environment(temporary)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the uploads are deleted then, too
        serve(options)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("viewer: stopped")


if __name__ == "__main__":
    main()
