"""How long the viewer takes: a new photo, another view of one that was seen, 20 users at once.

    OMP_WAIT_POLICY=passive python benchmarks/viewer_latency.py [--model vit_s16] [--threads 2] [--repeats 15]

Times are those of the server, from the file or the choice to the finished page: decoding, one pass, all maps, and their
pictures as text. Every photo is new; the aims are 1.5 s for a new photo of 224 pixels and 0.5 s for a change of view.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from PIL import Image
from vitreg_eval.models import open_model
from vitreg_eval.viewing import Choice, Viewer
from vitreg_eval.viewing_page import Shown, clickable, maps_page


def show(viewer: Viewer, key: str, choice: Choice) -> None:
    """All that the server does for one view."""
    views = viewer.view(key, choice)
    maps_page(Shown(views, views, choice))
    clickable(viewer.pictures.pixels(viewer.pictures.open(key)), views[0])


class Took(NamedTuple):
    """Seconds."""

    wall: float
    cpu: float
    """Of all threads; other load on the machine hardly changes it."""


def timed(run: Callable[[], object]) -> Took:
    """How long something takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Took(time.perf_counter() - wall, time.process_time() - cpu)


def photos(folder: Path, count: int, side: int) -> list[Path]:
    """Photos that differ."""
    paths = [folder / f"{side} {number}.jpg" for number in range(count)]
    for path in paths:
        Image.effect_noise((side, side), 60).convert("RGB").save(path)
    return paths


def report(name: str, times: list[Took]) -> None:
    """Print a line."""
    walls = [1e3 * one.wall for one in times]
    cpu = 1e3 * median(one.cpu for one in times)
    print(f"{name}: median {median(walls):.0f} ms, largest {max(walls):.0f} ms, of {len(times)}; CPU {cpu:.0f} ms")


def main() -> None:
    """Measure everything once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_s16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--users", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"torch {torch.__version__}, {options.threads} threads, load before {os.getloadavg()[0]:.1f}, {options.model}"
    )
    viewer = Viewer([open_model(options.model)])
    choice = Choice(viewer.models[0].depth - 1, None, "cls", (0.5, 0.5))
    show(viewer, "scene 0", choice)  # warms up
    with tempfile.TemporaryDirectory() as folder:
        for side in (224, 4000):
            new = photos(Path(folder), options.repeats if side == 224 else 5, side)
            times = [timed(lambda: show(viewer, viewer.pictures.add(path).key, choice)) for path in new]  # noqa: B023
            report(f"new photo, {side} x {side}", times)
        blocks = [choice._replace(layer=layer) for layer in range(viewer.models[0].depth - 1)]
        report("another block", [timed(lambda: show(viewer, "scene 0", block)) for block in blocks])  # noqa: B023
        heads = [choice._replace(head=head, patch=(0.1 * head, 0.5)) for head in range(viewer.models[0].num_heads)]
        report("another head and patch", [timed(lambda: show(viewer, "scene 0", head)) for head in heads])  # noqa: B023
        new = photos(Path(folder), options.users, 256)
        with ThreadPoolExecutor(options.users) as pool:
            waits = pool.map(lambda path: timed(lambda: show(viewer, viewer.pictures.add(path).key, choice)).wall, new)
            print(f"new photo, {options.users} users at once: the last one waits {1e3 * max(waits):.0f} ms")
    print(f"memory of features: {viewer.looks.nbytes / 2**20:.0f} MiB; load after {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
