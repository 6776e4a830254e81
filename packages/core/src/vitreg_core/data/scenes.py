"""Drawn scenes, the embedded data set: textured shapes on a smooth ground, with labels, captions, boxes and depth.

A scene is sampled in units of the image side, always on the CPU, so that one seed means one scene at every size and on
every device. It is then painted from the farthest object to the nearest. All object dims of length 3 count the main
object first, then the second and the third largest.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitreg_core.errors import InputError

SHAPES = ("disc", "square", "triangle", "star", "cross", "heart", "flower", "bar")
"""Names of the shapes."""
TEXTURES = ("plain", "striped", "checked", "dotted", "ringed", "zigzag")
"""Names of the textures: the classes of objects, in the order of `Scenes.label`."""
NUM_RELATIONS = len(TEXTURES) * len(SHAPES)
"""Number of classes of `Scenes.relation`."""
MIN_IMAGE_SIZE = 16
"""Smallest side in pixels at which every object still shows."""

ANGLES = 1024  # steps in the table of outlines
MAX_SEED = 2**32 - 1
HAZE_COLOUR = 0.65
HAZE_RANGE = 20.0  # metres; colours fade by depth / HAZE_RANGE
RADII = ((0.22, 0.28), (0.14, 0.175), (0.09, 0.11))  # of the disc as large as the object: main, second, third
REACH = 1.6  # radii; no outline goes farther from its centre
SLANT = 0.08  # metres over one radius; small enough that the depths of two objects never cross
OVERLAP = 0.25  # share of its radius that an object may hide behind another, where the scene has the room
CELLS = 6  # rows and columns of places tried for the second and the third object
WAVES = {  # texture: cosine p over (u, v), cosine q over (u, v), rings, zigzag, offset; ink where their sum is below 0
    "plain": (0, 0, 0, 0, 0, 0, 9),
    "striped": (9.4, 0, 0, 0, 0, 0, -1),
    "checked": (5.5, 5.5, 5.5, -5.5, 0, 0, 0),
    "dotted": (9.4, 0, 0, 9.4, 0, 0, 0.8),
    "ringed": (0, 0, 0, 0, 11, 0, -1),
    "zigzag": (9.4, 0, 0, 0, 0, 7, -1),
}
T = TypeVar("T", bound="Objects | Ground")


@dataclass(frozen=True)
class Scenes:
    """A batch of drawn scenes. Objects come in order of size, the main one first; -1 and zeros where there is none."""

    image: Float[Tensor, "b 3 height width"]
    """Colours in 0 to 1."""
    label: Int[Tensor, " b"]
    """Class of the main object: its texture, an index of TEXTURES."""
    relation: Int[Tensor, " b"]
    """Texture of the main object and shape of the second (its own when alone): texture * len(SHAPES) + shape."""
    shapes: Int[Tensor, "b 3"]
    """Shape of each object, -1 where there is none."""
    textures: Int[Tensor, "b 3"]
    """Texture of each object, an index of TEXTURES, -1 where there is none."""
    boxes: Int[Tensor, "b 3 4"]
    """x0 y0 x1 y1 in pixels, half-open: the tight box of each object's visible pixels, zeros where there is none."""
    mask: Int[Tensor, "b height width"]
    """0 on the ground, else 1 + the class (texture) of the visible object."""
    instances: Int[Tensor, "b height width"]
    """0 on the ground, else 1 + the place of the visible object in `shapes`."""
    depth: Float[Tensor, "b height width"]
    """Metres: 1 to 4 on objects, 4 to 10 on the ground. Far colours fade into a grey haze."""

    @property
    def present(self) -> Bool[Tensor, "b 3"]:
        """Which of the three objects exist."""
        return self.shapes >= 0

    def captions(self) -> list[str]:
        """One sentence per scene: the main object, and where it is from each other object, by their boxes' centres."""
        table = zip(self.shapes.tolist(), self.textures.tolist(), self.boxes.tolist(), strict=True)
        return [caption(*scene) for scene in table]


@dataclass(frozen=True)
class Objects:
    """What stands in each scene. Lengths are in units of the image side, y points down."""

    ids: Int[Tensor, "b 3"]  # 1 for the main object, 2, 3; 0 where there is none
    shapes: Int[Tensor, "b 3"]
    textures: Int[Tensor, "b 3"]
    centres: Float[Tensor, "b 3 2"]
    radii: Float[Tensor, "b 3"]  # of the disc of the same area
    turns: Float[Tensor, "b 3"]  # radians
    paper: Float[Tensor, "b 3 3"]
    ink: Float[Tensor, "b 3 3"]
    depths: Float[Tensor, "b 3"]  # metres at the centre
    slants: Float[Tensor, "b 3 2"]  # metres over one radius, along the object's own axes


@dataclass(frozen=True)
class Ground:
    """The background: a slanted plane, a colour gradient and a faint wave, each as offset and slopes along x and y."""

    colours: Float[Tensor, "b 2 3"]
    gradient: Float[Tensor, "b 3"]
    wave: Float[Tensor, "b 3"]
    depth: Float[Tensor, "b 3"]


def draw_scenes(
    count: int, seed: int | tuple[int, ...], *, image_size: int = 64, device: torch.device | str = "cpu"
) -> Scenes:
    """Draw scenes of image_size x image_size pixels; the same seed gives the same tensors.

    A tuple seeds a stream: `(seed, step)` draws the batch of one step, independent of every other step's, so training
    resumes anywhere. Different seeds, also of different length, never share a random state. Objects and labels depend
    on count and seed alone, not on size and device; pixels differ by rounding between kinds of device.

    Raises:
        InputError: count below 1, image_size below 16, or a seed outside 0 to 2**32 - 1.
    """
    if count < 1:
        raise InputError(f"{count} scenes; draw 1 or more")
    if image_size < MIN_IMAGE_SIZE:
        raise InputError(f"scenes of {image_size} pixels; use {MIN_IMAGE_SIZE} or more, or objects vanish")
    sampler = Sampler(count, seed)
    objects, ground = sample_objects(sampler), sample_ground(sampler)
    scenes = [
        paint(take_part(objects, part, device), take_part(ground, part, device), image_size)
        for part in chunks(count, image_size, torch.device(device))
    ]
    return Scenes(**{name: torch.cat([vars(part)[name] for part in scenes]) for name in vars(scenes[0])})


class Sampler:
    """Random numbers for a batch of scenes, from one generator.

    NumPy's, because a torch generator on the CPU keeps but 32 bits of its seed, so that long streams would repeat.
    """

    def __init__(self, count: int, seed: int | tuple[int, ...]) -> None:
        words = seed if isinstance(seed, tuple) else (seed,)
        if not words or not all(0 <= word <= MAX_SEED for word in words):
            raise InputError(f"seed {seed!r}; use an integer from 0 to {MAX_SEED}, or a tuple of such integers")
        self.count = count
        self.generator = np.random.default_rng([len(words), *words])  # without the length, 1 and (1, 0) are the same

    def uniform(self, low: float, high: float, *shape: int) -> Float[Tensor, "b *shape"]:
        """Numbers in low to high, for each scene."""
        return low + (high - low) * torch.from_numpy(self.generator.random((self.count, *shape), dtype=np.float32))

    def choice(self, classes: int, *shape: int) -> Int[Tensor, "b *shape"]:
        """Class indices, all as likely, for each scene."""
        return torch.from_numpy(self.generator.integers(classes, size=(self.count, *shape)))


def sample_objects(sampler: Sampler) -> Objects:
    """Draw one to three objects for each scene, each in a metre of depth of its own."""
    present = sampler.choice(3)[:, None] >= torch.arange(3)
    low, high = torch.tensor(RADII).unbind(1)
    radii = low + (high - low) * sampler.uniform(0.0, 1.0, 3)
    depths = 1.5 + sampler.uniform(0.0, 1.0, 3).argsort(1) + sampler.uniform(-0.25, 0.25, 3)
    return Objects(
        ids=torch.where(present, torch.arange(1, 4), 0),
        shapes=torch.where(present, sampler.choice(len(SHAPES), 3), -1),
        textures=torch.where(present, sampler.choice(len(TEXTURES), 3), -1),
        centres=torch.where(present[..., None], sample_centres(sampler, radii), -9.0),  # far outside the image
        radii=radii,
        turns=sampler.uniform(0.0, 2 * math.pi, 3),
        paper=add_haze(bright_colours(sampler).lerp(torch.ones(()), 0.3), depths[..., None]),
        ink=add_haze(bright_colours(sampler) * 0.35, depths[..., None]),
        depths=depths,
        slants=sampler.uniform(-SLANT, SLANT, 3, 2),
    )


def sample_centres(sampler: Sampler, radii: Float[Tensor, "b 3"]) -> Float[Tensor, "b 3 2"]:
    """Place the main object anywhere, and the others where they overlap little, or least."""
    rows, cols = torch.meshgrid(torch.arange(CELLS), torch.arange(CELLS), indexing="ij")
    cells = rearrange([rows, cols], "xy rows cols -> (rows cols) xy")
    margins = radii[:, :, None, None]
    centres = margins[:, 0] + (1 - 2 * margins[:, 0]) * sampler.uniform(0.0, 1.0, 1, 2)
    for index in (1, 2):
        places = (cells + sampler.uniform(0.0, 1.0, CELLS**2, 2)) / CELLS
        places = margins[:, index] + (1 - 2 * margins[:, index]) * places
        gaps = (
            (places[:, :, None] - centres[:, None]).norm(dim=3)
            - radii[:, None, :index]
            - radii[:, None, index : index + 1]
        )
        room = torch.minimum(gaps.amin(2), -OVERLAP * radii[:, index : index + 1])
        best = (room + sampler.uniform(0.0, 1e-3, CELLS**2)).argmax(1)  # any of those with room enough
        centres = torch.cat([centres, places[torch.arange(len(places)), best][:, None]], dim=1)
    return centres


def bright_colours(sampler: Sampler) -> Float[Tensor, "b 3 3"]:
    """Draw a bright colour of any hue for each object."""
    return 0.5 + 0.5 * torch.cos(sampler.uniform(0.0, 2 * math.pi, 3, 1) + torch.arange(3) * (2 * math.pi / 3))


def sample_ground(sampler: Sampler) -> Ground:
    """Draw a background for each scene: two muted colours, 4 to 10 metres away."""
    direction = sampler.uniform(0.0, 2 * math.pi, 2)
    turn = torch.stack([direction.cos(), direction.sin()], dim=2)  # b, of gradient and wave, x y
    centre, slopes = sampler.uniform(5.5, 8.5, 1), sampler.uniform(-1.5, 1.5, 2)
    return Ground(
        colours=sampler.uniform(0.2, 0.9, 2, 3),
        gradient=torch.cat([0.5 - 0.35 * turn[:, 0].sum(1, keepdim=True), 0.7 * turn[:, 0]], dim=1),
        wave=torch.cat([sampler.uniform(0.0, 2 * math.pi, 1), turn[:, 1] * sampler.uniform(20.0, 60.0, 1)], dim=1),
        depth=torch.cat([centre - 0.5 * slopes.sum(1, keepdim=True), slopes], dim=1),
    )


def add_haze(colour: Tensor, depth: Tensor) -> Tensor:
    """Fade a colour seen at a depth in metres, as air does."""
    return colour + (HAZE_COLOUR - colour) * (depth / HAZE_RANGE)


def chunks(count: int, image_size: int, device: torch.device) -> Iterator[slice]:
    """Cut a batch into runs of scenes small enough for a CPU's cache or a GPU's memory."""
    pixels = 2**15 if device.type == "cpu" else 2**24
    step = max(1, pixels // image_size**2)
    return (slice(start, start + step) for start in range(0, count, step))


def take_part(batch: T, part: slice, device: torch.device | str) -> T:
    """Some scenes of a batch, on a device."""
    return type(batch)(**{name: value[part].to(device) for name, value in vars(batch).items()})


def far_to_near(objects: Objects) -> Objects:
    """Sort the objects of each scene by depth, the farthest first."""
    order = objects.depths.argsort(1, descending=True)
    rows = torch.arange(len(order), device=order.device)[:, None]
    return Objects(**{name: value[rows, order] for name, value in vars(objects).items()})


def paint(objects: Objects, ground: Ground, image_size: int) -> Scenes:
    """Paint the ground, then the objects from far to near."""
    image, depth = paint_ground(ground, image_size)
    instances = torch.zeros_like(depth)  # floats, as a CPU compares integers slowly
    described, objects = objects, far_to_near(objects)
    for place in range(3):
        window = find_window(objects, place, image_size)
        u, v, p, q, slant = plane_values(object_planes(objects, place), image_size, window).unbind(1)
        radius = torch.sqrt(u * u + v * v)
        scale = rearrange(objects.radii[:, place] * image_size, "b -> b 1 1")  # pixels
        inside = (outline_distance(u, v, objects.shapes[:, place]) - radius).mul_(scale)
        paper = paper_share(p, q, v, radius, scale, objects.textures[:, place])
        colour = mix_colours(objects.ink[:, place], objects.paper[:, place], paper)
        image[:, :, *window].lerp_(colour, rearrange((inside + 0.5).clamp_(0, 1), "b height width -> b 1 height width"))
        visible = inside > 0
        values = slant.add_(rearrange(objects.depths[:, place], "b -> b 1 1"))
        depth[:, *window] = torch.where(visible, values, depth[:, *window])
        ids = rearrange(objects.ids[:, place].float(), "b -> b 1 1")
        instances[:, *window] = torch.where(visible, ids, instances[:, *window])
    return describe(described, image, depth, instances)


def find_window(objects: Objects, place: int, image_size: int) -> tuple[slice, slice]:
    """Rows and columns beyond which one object shows in no scene of a chunk; all on a GPU, which it would stall."""
    if objects.ids.device.type != "cpu":
        return slice(None), slice(None)
    present = objects.ids[:, place, None] > 0
    centres, reach = objects.centres[:, place] * image_size, objects.radii[:, place, None] * (REACH * image_size) + 1
    left, top = (centres - reach).clamp(min=0).masked_fill(~present, image_size).amin(0).int().tolist()
    right, bottom = (centres + reach).masked_fill(~present, 0).amax(0).ceil().int().tolist()
    return slice(top, max(top, bottom)), slice(left, max(left, right))


def paint_ground(
    ground: Ground, image_size: int
) -> tuple[Float[Tensor, "b 3 height width"], Float[Tensor, "b height width"]]:
    """Paint the background; returns image and depth."""
    planes = torch.stack([ground.gradient, ground.wave, ground.depth], dim=1)
    gradient, wave, depth = plane_values(planes, image_size, (slice(None), slice(None))).unbind(1)
    colour = mix_colours(ground.colours[:, 0], ground.colours[:, 1], gradient).add_(wave.cos_().mul_(0.025)[:, None])
    return add_haze(colour, depth[:, None]).clamp_(0, 1), depth


def plane_values(
    planes: Float[Tensor, "b k 3"], image_size: int, window: tuple[slice, slice]
) -> Float[Tensor, "b k height width"]:
    """Evaluate planes (offset, then slopes of x and y) at the centres of the pixels in some rows and columns."""
    steps = (torch.arange(image_size, device=planes.device) + 0.5) / image_size
    offset, across, down = planes[..., None].unbind(2)
    rows, cols = offset + down * steps[window[0]], across * steps[window[1]]
    return rearrange(rows, "b k height -> b k height 1") + rearrange(cols, "b k width -> b k 1 width")


def object_planes(objects: Objects, place: int) -> Float[Tensor, "b 5 3"]:
    """Planes of one object: its own axes u and v in radii, the phases of its texture's two cosines, its slant."""
    cos, sin = objects.turns[:, place].cos(), objects.turns[:, place].sin()
    axes = torch.stack([cos, sin, -sin, cos], dim=1).div(objects.radii[:, place, None])
    axes = rearrange(axes, "b (k xy) -> b k xy", k=2)
    offset = -(axes * objects.centres[:, place, None]).sum(2, keepdim=True)
    frame = torch.cat([offset, axes], dim=2)
    waves = rearrange(wave_table(frame.device)[objects.textures[:, place], :4], "b (k xy) -> b k xy", k=2)
    mixes = torch.cat([waves, objects.slants[:, place, None]], dim=1)
    # no matrix product: autocast and TF32 would round it
    return torch.cat([frame, (mixes[..., None] * frame[:, None]).sum(2)], dim=1)


def outline_distance(
    u: Float[Tensor, "b height width"], v: Float[Tensor, "b height width"], shapes: Int[Tensor, " b"]
) -> Float[Tensor, "b height width"]:
    """Distance, in radii, from the object's centre to its outline in each pixel's direction."""
    step = torch.atan2(v, u).mul_(ANGLES / (2 * math.pi)).add_(ANGLES / 2 + 0.5).to(torch.int64)
    row = shapes.clamp(min=0) * (ANGLES + 1)
    return outline_table(u.device).take(step.add_(rearrange(row, "b -> b 1 1")))


def paper_share(
    p: Float[Tensor, "b height width"],
    q: Float[Tensor, "b height width"],
    v: Float[Tensor, "b height width"],
    radius: Float[Tensor, "b height width"],
    scale: Float[Tensor, "b 1 1"],
    textures: Int[Tensor, " b"],
) -> Float[Tensor, "b height width"]:
    """Share of the paper's colour at each pixel, the rest being ink, over edges about a pixel wide."""
    rings, zigzag, offset = rearrange(wave_table(p.device)[textures, 4:], "b k -> k b 1 1")
    phase = v * 1.5
    phase = phase.sub_(phase.round()).abs_().mul_(zigzag).add_(p).add_(radius.mul_(rings))
    return phase.cos_().add_(q.cos_()).add_(offset).mul_(scale / 9.4).add_(0.5).clamp_(0, 1)


def mix_colours(
    first: Float[Tensor, "b 3"], second: Float[Tensor, "b 3"], share: Float[Tensor, "b height width"]
) -> Float[Tensor, "b 3 height width"]:
    """Mix two colours by the share of the second at each pixel."""
    change = rearrange(second - first, "b c -> b c 1 1")
    return (share[:, None] * change).add_(rearrange(first, "b c -> b c 1 1"))


@cache
def wave_table(device: torch.device) -> Float[Tensor, "textures 7"]:
    """WAVES as a tensor."""
    return torch.tensor([WAVES[name] for name in TEXTURES], dtype=torch.float32, device=device)


@cache
def outline_table(device: torch.device) -> Float[Tensor, "shapes angles"]:
    """Distance from centre to outline by angle from -pi to pi, for shapes as large as a disc of radius 1."""
    angles = torch.linspace(-math.pi, math.pi, ANGLES + 1, dtype=torch.float64)
    outlines = {
        "disc": torch.ones_like(angles),
        "square": rectangle(angles, 1.0),
        "triangle": pointed(angles, 3, math.cos(math.pi / 3)),
        "star": pointed(angles, 5, 0.45),
        "cross": torch.maximum(rectangle(angles, 3.0), rectangle(angles + math.pi / 2, 3.0)),
        "heart": heart(angles),
        "flower": 1 + 0.3 * torch.cos(6 * angles),
        "bar": rectangle(angles, 2.6),
    }
    table = torch.stack([outlines[name] for name in SHAPES])
    area = table[:, :-1].square().mean(1, keepdim=True)  # over that of the unit disc
    return (table / area.sqrt()).to(device, torch.float32)


def pointed(angles: Tensor, points: int, inner: float) -> Tensor:
    """Outline of a star whose inner corners lie at a share `inner` of its points' distance."""
    half = math.pi / points
    turn = (torch.remainder(angles, 2 * half) - half).abs()  # from the nearest inner corner
    return inner * math.sin(half) / (inner * torch.sin(turn) + torch.sin(half - turn))


def rectangle(angles: Tensor, ratio: float) -> Tensor:
    """Outline of a rectangle of sides 2 * ratio and 2."""
    return torch.minimum(ratio / angles.cos().abs(), 1 / angles.sin().abs())


def heart(angles: Tensor) -> Tensor:
    """Outline of the well-known heart curve, about its origin."""
    t = np.linspace(0, 2 * math.pi, 4 * ANGLES)
    x, y = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    order = np.arctan2(y, x).argsort()
    return torch.from_numpy(np.interp(angles, np.arctan2(y, x)[order], np.hypot(x, y)[order], period=2 * math.pi))


def describe(
    objects: Objects,
    image: Float[Tensor, "b 3 height width"],
    depth: Float[Tensor, "b height width"],
    instances: Float[Tensor, "b height width"],
) -> Scenes:
    """Collect what was painted with all that is known of it."""
    classes = torch.cat([torch.zeros_like(objects.textures[:, :1]), objects.textures + 1], dim=1)
    ids = instances.to(torch.int64)
    main, other = objects.shapes[:, 0], objects.shapes[:, 1]
    return Scenes(
        image=image,
        label=objects.textures[:, 0],
        relation=objects.textures[:, 0] * len(SHAPES) + torch.where(other >= 0, other, main),
        shapes=objects.shapes,
        textures=objects.textures,
        boxes=tight_boxes(instances),
        mask=classes.gather(1, ids.flatten(1)).view_as(ids),
        instances=ids,
        depth=depth,
    )


def tight_boxes(instances: Float[Tensor, "b height width"]) -> Int[Tensor, "b 3 4"]:
    """Tight half-open boxes of the pixels of each object."""
    places = rearrange(torch.arange(1, 4, device=instances.device), "k -> k 1 1")
    gaps = (instances[:, None] - places).abs_()  # 0 at the object's pixels
    x0, x1 = extent(gaps.amin(2) == 0)
    y0, y1 = extent(gaps.amin(3) == 0)
    return torch.stack([x0, y0, x1, y1], dim=2)


def extent(taken: Bool[Tensor, "b 3 side"]) -> tuple[Int[Tensor, "b 3"], Int[Tensor, "b 3"]]:
    """First taken place and the one after the last; zeros where none is."""
    steps = torch.arange(taken.shape[2], device=taken.device)
    last = torch.where(taken, steps + 1, 0).amax(2)
    first = torch.where(taken, steps, taken.shape[2]).amin(2)
    return torch.minimum(first, last), last


def caption(shapes: list[int], textures: list[int], boxes: list[list[int]]) -> str:
    """Say what the main object of one scene is, and where it is from the others."""
    names = [f"a {TEXTURES[t]} {SHAPES[s]}" for s, t in zip(shapes, textures, strict=True) if s >= 0]
    relations = [f"{direction(boxes[0], box)} {name}" for name, box in zip(names[1:], boxes[1:], strict=False)]
    return f"{names[0]} {' and '.join(relations) or 'alone'} on a smooth background"


def direction(box: list[int], other: list[int]) -> str:
    """Where a box is, seen from another, along the axis in which their centres differ most."""
    across, down = box[0] + box[2] - other[0] - other[2], box[1] + box[3] - other[1] - other[3]
    if abs(across) >= abs(down):
        return "to the left of" if across < 0 else "to the right of"
    return "above" if down < 0 else "below"
