import re
from collections.abc import Iterator
from dataclasses import replace
from math import cos, pi, sin, sqrt

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from scipy import ndimage, stats
from torch import Tensor
from vitreg_core.data.scenes import (
    NUM_RELATIONS,
    SHAPES,
    TEXTURES,
    Ground,
    Objects,
    Sampler,
    Scenes,
    draw_scenes,
    paint,
    sample_ground,
    sample_objects,
    take_part,
)
from vitreg_core.errors import InputError

CORNERS = {  # of shapes of any size
    "square": [(1, 1), (-1, 1), (-1, -1), (1, -1)],
    "bar": [(2.6, 1), (-2.6, 1), (-2.6, -1), (2.6, -1)],
    "triangle": [(cos(a), sin(a)) for a in (0, 2 * pi / 3, 4 * pi / 3)],
    "cross": [
        (3, 1),
        (1, 1),
        (1, 3),
        (-1, 3),
        (-1, 1),
        (-3, 1),
        (-3, -1),
        (-1, -1),
        (-1, -3),
        (1, -3),
        (1, -1),
        (3, -1),
    ],
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small operations on many threads wait for each other when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return draw_scenes(500, 3)


def one_object(shape: str, texture: str, *, turn: float = 0.0) -> tuple[Objects, Ground]:
    """A scene whose only object is centred, white with black ink, with a radius of 0.28."""
    objects, ground = sample_objects(Sampler(1, 0)), sample_ground(Sampler(1, 0))
    absent = torch.tensor([[[0.5, 0.5], [-9.0, -9.0], [-9.0, -9.0]]])
    return replace(
        objects,
        ids=torch.tensor([[1, 0, 0]]),
        shapes=torch.tensor([[SHAPES.index(shape), -1, -1]]),
        textures=torch.tensor([[TEXTURES.index(texture), -1, -1]]),
        centres=absent,
        radii=torch.full((1, 3), 0.28),
        turns=torch.full((1, 3), turn),
        paper=torch.ones(1, 3, 3),
        ink=torch.zeros(1, 3, 3),
    ), ground


def pixel_counts(scenes: Scenes) -> Tensor:
    return torch.stack([(scenes.instances == place).sum((1, 2)) for place in (1, 2, 3)], dim=1)


def test_same_seed_same_tensors() -> None:
    first, second = draw_scenes(40, (5, 9)), draw_scenes(40, (5, 9))
    for name, value in vars(first).items():
        assert torch.equal(value, getattr(second, name)), name


def test_objects_do_not_depend_on_image_size() -> None:
    small, large = draw_scenes(30, 2, image_size=32), draw_scenes(30, 2, image_size=96)
    assert torch.equal(small.relation, large.relation)
    assert torch.equal(small.textures, large.textures)
    assert (small.boxes * 3 - large.boxes).abs().amax() <= 3


def test_a_scene_is_the_same_alone_and_in_a_batch() -> None:
    objects, ground = sample_objects(Sampler(30, 4)), sample_ground(Sampler(30, 4))
    whole = paint(objects, ground, 32)
    for index in range(30):
        part = slice(index, index + 1)
        alone = paint(take_part(objects, part, "cpu"), take_part(ground, part, "cpu"), 32)
        for name, value in vars(alone).items():
            assert torch.allclose(vars(whole)[name][part].float(), value.float(), atol=1e-5), name


def test_autocast_changes_nothing() -> None:
    plain = draw_scenes(20, 1, image_size=32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = draw_scenes(20, 1, image_size=32)
    for name, value in vars(plain).items():
        assert torch.equal(value, vars(cast)[name]), name


def test_seeds_never_share_scenes() -> None:
    seeds: list[int | tuple[int, ...]] = [
        0,
        1,
        2**32 - 1,
        (1, 0),
        (0, 1),
        (1, 0, 0),
        (0, 0),
        *((7, step) for step in range(200)),
        (7, 2**31),
    ]
    centres = {tuple(sample_objects(Sampler(2, seed)).radii.flatten().tolist()) for seed in seeds}
    assert len(centres) == len(seeds)


def test_steps_of_a_stream_are_independent() -> None:
    labels = torch.stack([sample_objects(Sampler(32, (0, step))).shapes[:, 0] for step in range(300)])
    table = np.zeros((len(SHAPES), len(SHAPES)))
    np.add.at(table, (labels[:-1].flatten().numpy(), labels[1:].flatten().numpy()), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_boxes_are_those_of_scipy(scenes: Scenes) -> None:
    for instances, boxes in zip(scenes.instances.numpy(), scenes.boxes.tolist(), strict=True):
        found = [*ndimage.find_objects(instances), None, None][:3]
        expected = [[s[1].start, s[0].start, s[1].stop, s[0].stop] if s else [0, 0, 0, 0] for s in found]
        assert boxes == expected


def test_mask_holds_the_classes_of_the_instances(scenes: Scenes) -> None:
    classes = np.concatenate([np.zeros((500, 1), dtype=np.int64), scenes.textures.numpy() + 1], axis=1)
    expected = np.take_along_axis(classes, scenes.instances.numpy().reshape(500, -1), axis=1).reshape(500, 64, 64)
    assert np.array_equal(scenes.mask.numpy(), expected)
    assert scenes.mask.amax() == len(TEXTURES)


def test_label_is_the_class_of_the_largest_object(scenes: Scenes) -> None:
    counts = pixel_counts(scenes)
    assert torch.equal(scenes.textures[torch.arange(500), counts.argmax(1)], scenes.label)
    assert (counts[:, 1:] < 0.8 * counts[:, :1]).all()


@pytest.mark.parametrize("image_size", [16, 64])
def test_every_object_shows(image_size: int) -> None:
    scenes, objects = draw_scenes(1000, 8, image_size=image_size), sample_objects(Sampler(1000, 8))
    share = pixel_counts(scenes) / (pi * (objects.radii * image_size) ** 2)
    assert share[scenes.present].min() > 0.25
    assert not share[~scenes.present].any()


def test_one_to_three_objects_as_often(scenes: Scenes) -> None:
    counts = scenes.present.sum(1).bincount(minlength=4)
    assert counts[0] == 0
    assert stats.chisquare(counts[1:].numpy()).pvalue > 1e-3
    assert torch.equal(scenes.present, scenes.textures >= 0)


def test_relation_joins_main_texture_and_second_shape(scenes: Scenes) -> None:
    for relation, label, shapes in zip(
        scenes.relation.tolist(), scenes.label.tolist(), scenes.shapes.tolist(), strict=True
    ):
        other = shapes[0] if shapes[1] == -1 else shapes[1]
        assert divmod(relation, 8) == (label, other)


def test_classes_are_balanced() -> None:
    scenes = draw_scenes(6000, 1, image_size=16)
    assert NUM_RELATIONS == 48
    for labels, classes in ((scenes.label, 6), (scenes.relation, 48), (scenes.shapes[:, 0], 8)):
        assert stats.chisquare(labels.bincount(minlength=classes).numpy()).pvalue > 1e-3


def test_captions_say_what_is_drawn_and_where(scenes: Scenes) -> None:
    signs = {"to the left of": (0, -1), "to the right of": (0, 1), "above": (1, -1), "below": (1, 1)}
    name = rf"a ({'|'.join(TEXTURES)}) ({'|'.join(SHAPES)})"
    seen = set()
    for index, caption in enumerate(scenes.captions()):
        assert re.fullmatch(rf"{name} .* on a smooth background", caption)
        words = re.findall(name, caption)
        there = int(scenes.present[index].sum())
        expected = list(
            zip(scenes.textures[index, :there].tolist(), scenes.shapes[index, :there].tolist(), strict=True)
        )
        assert [(TEXTURES.index(texture), SHAPES.index(shape)) for texture, shape in words] == expected
        relations = re.findall(f"({'|'.join(signs)}) {name}", caption)
        assert len(relations) == there - 1
        assert (" alone " in caption) == (there == 1)
        boxes = scenes.boxes[index].reshape(3, 2, 2).float().mean(1)  # object, xy
        for other, (relation, *_) in zip(boxes[1:], relations, strict=False):
            axis, sign = signs[relation]
            offset = boxes[0] - other
            assert sign * offset[axis] == offset.abs().amax()
            seen.add(relation)
    assert seen == set(signs)


def test_the_nearest_object_is_seen() -> None:
    objects, ground = sample_objects(Sampler(200, 6)), sample_ground(Sampler(200, 6))
    scenes = paint(objects, ground, 64)
    alone = []
    for place in range(3):
        others = torch.arange(3) != place
        centres = objects.centres.masked_fill(others[:, None], -9.0)
        alone.append(paint(replace(objects, centres=centres), ground, 64))
    depths, ids = torch.stack([part.depth for part in alone]), torch.stack([part.instances for part in alone])
    nearest = depths.argmin(0, keepdim=True)
    assert ((ids > 0).sum(0) > 1).sum() > 1000  # pixels where objects overlap
    assert torch.equal(scenes.depth, depths.amin(0))
    assert torch.equal(scenes.instances, ids.gather(0, nearest)[0])


def test_depth_ranges(scenes: Scenes) -> None:
    ground = scenes.instances == 0
    low, high = scenes.depth[~ground].aminmax()
    assert 1 <= low < 1.4
    assert 3.6 < high <= 4
    low, high = scenes.depth[ground].aminmax()
    assert 4 <= low < 5
    assert 9 < high <= 10


def test_most_of_an_image_is_background(scenes: Scenes) -> None:
    assert 0.6 < (scenes.instances == 0).float().mean() < 0.8


def test_background_varies_less_than_objects(scenes: Scenes) -> None:
    """The step from a pixel to its neighbour, both on the ground or both on textured objects."""
    steps = scenes.image.diff(dim=3).abs().amax(1)
    kind = scenes.instances > 0
    ground = ~kind[..., 1:] & ~kind[..., :-1]
    assert steps[ground].quantile(0.9) < 0.02 < 0.06 < steps[kind[..., 1:] & kind[..., :-1]].mean()


def test_colours_are_in_range(scenes: Scenes) -> None:
    assert scenes.image.shape == (500, 3, 64, 64)
    low, high = scenes.image.aminmax()
    assert 0 <= low < 0.2
    assert 0.8 < high <= 1


@pytest.mark.parametrize("shape", CORNERS)
def test_outlines_are_those_of_pillow(shape: str) -> None:
    objects, ground = one_object(shape, "plain", turn=0.3)
    corners = np.array(CORNERS[shape])
    x, y = corners.T
    area = 0.5 * abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))
    turned = corners @ np.array([[cos(0.3), sin(0.3)], [-sin(0.3), cos(0.3)]])
    drawing = Image.new("L", (1024, 1024))
    ImageDraw.Draw(drawing).polygon([tuple(512 + 0.28 * 1024 * sqrt(pi / area) * corner) for corner in turned], fill=1)
    ours, theirs = paint(objects, ground, 128).instances[0].numpy(), np.asarray(drawing)[4::8, 4::8]
    assert (ours != theirs).sum() < 0.008 * theirs.sum()


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_have_the_area_of_a_disc(shape: str) -> None:
    objects, ground = one_object(shape, "plain", turn=0.3)
    assert paint(objects, ground, 256).instances.sum() / 256**2 == pytest.approx(pi * 0.28**2, rel=0.01)


@pytest.mark.parametrize(
    ("texture", "across", "down"),
    [("plain", 0, 0), ("striped", 6, 0), ("checked", 4, 4), ("dotted", 0, 0), ("ringed", 6, 6)],
)
def test_ink_lines_met_from_edge_to_edge(texture: str, across: int, down: int) -> None:
    """Changes of colour along the object's axes; closed forms such as cos(9.4 u) on -0.98 < u < 0.98."""
    image = paint(*one_object("disc", texture), 128).image[0, 0]
    inside = slice(64 - 35, 64 + 35)
    for line, changes in ((image[64, inside], across), (image[inside, 64], down)):
        assert (line > 0.5).diff().sum() == changes


def test_shapes_and_textures_differ_from_each_other() -> None:
    looks = [paint(*one_object("disc", texture), 64).image[0, 0] > 0.5 for texture in TEXTURES]
    looks += [paint(*one_object(shape, "plain"), 64).instances[0] > 0 for shape in SHAPES[1:]]
    differences = torch.stack([(first != second).sum() for i, first in enumerate(looks) for second in looks[:i]])
    assert differences.min() > 0.1 * pi * (0.28 * 64) ** 2


@pytest.mark.parametrize(
    ("count", "seed", "image_size", "message"),
    [
        (0, 0, 64, "^0 scenes; draw 1 or more$"),
        (1, 0, 15, "^scenes of 15 pixels; use 16 or more"),
        (1, -1, 64, r"^seed -1; use an integer from 0 to 4294967295, or a tuple"),
        (1, (3, 2**32), 64, r"^seed \(3, 4294967296\); use an integer from 0 to 4294967295"),
        (1, (), 64, r"^seed \(\); use an integer"),
    ],
)
def test_errors_say_what_to_do(count: int, seed: int | tuple[int, ...], image_size: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        draw_scenes(count, seed, image_size=image_size)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_devices_draw_the_same_scenes(scenes: Scenes) -> None:
    theirs = draw_scenes(500, 3, device="cuda")
    assert torch.equal(theirs.relation.cpu(), scenes.relation)
    assert (theirs.instances.cpu() != scenes.instances).float().mean() < 1e-4
    assert (theirs.image.cpu() - scenes.image).abs().mean() < 1e-4
