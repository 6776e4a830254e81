"""Scenes: ours against drawing the same objects one by one with Pillow, in turn, in one process on one thread.

    python benchmarks/scenes.py [--repeats 7] [--seed 0]

The Pillow way fills polygons, lines and ellipses image by image, without smooth edges, labels and boxes, over a ground
made by NumPy. How far its pictures agree with ours is printed beside the speeds, in images per second: by the wall
clock and, for a machine that others share, by the time the CPU gave us.
"""

import argparse
import math
import time
from itertools import product
from statistics import median

import numpy as np
import torch
from PIL import Image, ImageDraw
from vitreg_core.data.scenes import (
    HAZE_COLOUR,
    HAZE_RANGE,
    REACH,
    TEXTURES,
    Ground,
    Objects,
    Sampler,
    draw_scenes,
    far_to_near,
    outline_table,
    sample_ground,
    sample_objects,
)

BATCHES = {64: 256, 224: 32}  # image size: scenes in a batch
BAND = math.pi / 9.4  # width of a stripe in radii
Drawn = tuple[np.ndarray, np.ndarray, np.ndarray]  # image, depth, instances


class Pen:
    """Draws on a Pillow image in an object's own coordinates, in radii."""

    def __init__(self, canvas: Image.Image, centre: np.ndarray, radius: float, turn: float) -> None:
        self.draw, self.radius, self.centre = ImageDraw.Draw(canvas), radius, centre - 0.5
        self.axes = radius * np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])

    def spots(self, points: np.ndarray) -> list[tuple[float, ...]]:
        """Pixel coordinates of points."""
        return [tuple(spot) for spot in (points @ self.axes + self.centre).tolist()]

    def polygon(self, points: np.ndarray, fill: int | tuple[int, ...]) -> None:
        """Fill a polygon."""
        self.draw.polygon(self.spots(points), fill=fill)

    def line(self, points: np.ndarray, width: float, fill: tuple[int, ...]) -> None:
        """Draw a broken line."""
        self.draw.line(self.spots(points), fill=fill, width=round(width * self.radius))

    def circle(self, point: tuple[float, float], radius: float, fill: tuple[int, ...], width: float = 0) -> None:
        """Fill a circle, or draw a ring of some width inside it."""
        (x, y), reach = self.spots(np.array([point]))[0], radius * self.radius
        box = (x - reach, y - reach, x + reach, y + reach)
        if width:
            self.draw.ellipse(box, outline=fill, width=round(width * self.radius))
        else:
            self.draw.ellipse(box, fill=fill)


def pillow_ink(pen: Pen, texture: str, ink: tuple[int, ...]) -> None:
    """Draw the inked parts of a texture."""
    odd = [(2 * step + 1) * BAND for step in range(-4, 4)]
    if texture == "ringed":
        for ring in range(3):
            pen.circle((0, 0), (2 * ring + 1.5) * math.pi / 11, ink, math.pi / 11)
    elif texture == "striped":
        for u in odd:
            pen.line(np.array([[u, -REACH], [u, REACH]]), BAND, ink)
    elif texture == "zigzag":
        bend = np.stack([-3.5 / 9.4 * (np.arange(-5, 6) % 2), np.arange(-5, 6) / 3], axis=1)
        for u in odd:
            pen.line(bend + np.array([u, 0]), 0.7 * BAND, ink)
    elif texture == "dotted":
        for spot in product(odd, odd):
            pen.circle(spot, 0.165, ink)
    elif texture == "checked":
        square = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
        for cell in np.argwhere(np.add.outer(np.arange(6), np.arange(6)) % 2):
            pen.polygon((square + cell - np.array([3.5, 2.5])) * math.pi / 5.5, ink)


def pillow_ground(ground: Ground, index: int, size: int) -> tuple[Image.Image, np.ndarray]:
    """Make the background and its depth."""
    steps = (np.arange(size, dtype=np.float32) + 0.5) / size
    planes = (getattr(ground, name)[index].numpy() for name in ("gradient", "wave", "depth"))
    gradient, wave, depth = (p[0] + p[1] * steps + p[2] * steps[:, None] for p in planes)
    first, second = ground.colours[index].numpy()
    colour = first + gradient[..., None] * (second - first) + 0.025 * np.cos(wave)[..., None]
    colour += (HAZE_COLOUR - colour) * (depth[..., None] / HAZE_RANGE)
    return Image.fromarray((colour.clip(0, 1) * 255).astype(np.uint8)), depth


def pillow_scene(objects: Objects, ground: Ground, index: int, size: int) -> Drawn:
    """Draw one scene from far to near."""
    image, depth = pillow_ground(ground, index, size)
    labels = Image.new("L", (size, size))
    rows, cols = np.mgrid[:size, :size] + 0.5
    for place in range(3):
        item = {name: value[index, place].numpy() for name, value in vars(objects).items()}
        if not item["ids"]:
            continue
        centre, radius, turn = item["centres"] * size, float(item["radii"]) * size, float(item["turns"])
        paper, ink = (tuple((item[name] * 255).astype(int).tolist()) for name in ("paper", "ink"))
        surface, stencil = Image.new("RGB", (size, size), paper), Image.new("1", (size, size))
        pillow_ink(Pen(surface, centre, radius, turn), TEXTURES[item["textures"]], ink)
        outline = outline_table(torch.device("cpu"))[int(item["shapes"]), :-1:8].double().numpy()
        angles = np.linspace(-math.pi, math.pi, len(outline), endpoint=False)
        Pen(stencil, centre, radius, turn).polygon(outline[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1), 1)
        image.paste(surface, mask=stencil)
        labels.paste(int(item["ids"]), mask=stencil)
        slope = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]]).T @ item["slants"]
        plane = item["depths"] + ((cols - centre[0]) * slope[0] + (rows - centre[1]) * slope[1]) / radius
        depth = np.where(np.asarray(stencil), plane, depth)
    return np.asarray(image), depth, np.asarray(labels)


def pillow(count: int, seed: tuple[int, ...], size: int) -> Drawn:
    """Draw the scenes of draw_scenes one after another."""
    sampler = Sampler(count, seed)
    objects, ground = far_to_near(sample_objects(sampler)), sample_ground(sampler)
    drawn = [pillow_scene(objects, ground, index, size) for index in range(count)]
    image, depth, instances = (np.stack(arrays) for arrays in zip(*drawn, strict=True))
    return image.transpose(0, 3, 1, 2).astype(np.float32) / 255, depth, instances


def measure(size: int, repeats: int, seed: int) -> None:
    """Print how the two ways compare at one image size."""
    count = BATCHES[size]
    scenes, (image, depth, instances) = draw_scenes(count, (seed, 0), image_size=size), pillow(count, (seed, 0), size)
    same = (scenes.instances.numpy() == instances).mean()
    colour, metres = np.abs(scenes.image.numpy() - image).mean(), np.abs(scenes.depth.numpy() - depth).mean()
    print(f"{size} px: same object at {same:.2%} of pixels, colours differ by {colour:.3f}, depth by {metres:.3f} m")
    for name, clock in (("wall clock", time.perf_counter), ("CPU time", time.process_time)):
        ours, theirs = [], []
        for step in range(1, repeats + 1):
            start = clock()
            draw_scenes(count, (seed, step), image_size=size)
            middle = clock()
            pillow(count, (seed, step), size)
            ours.append(count / (middle - start))
            theirs.append(count / (clock() - middle))
        fast, slow = median(ours), median(theirs)
        spread = f"{min(ours):.0f} to {max(ours):.0f}"
        print(f"{size} px, {name}: ours {fast:.0f} ({spread}), Pillow {slow:.0f}, ratio {fast / slow:.2f}")


def main() -> None:
    """Compare at every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for size in BATCHES:
        measure(size, options.repeats, options.seed)


if __name__ == "__main__":
    main()
