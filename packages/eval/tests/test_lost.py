from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from vitreg_core.errors import InputError
from vitreg_eval import lost
from vitreg_eval.discovery import Box
from vitreg_eval.lost import LostDiscovery, discover, discover_all

PATCH = 16
GRIDS = [(7, 11), (11, 7), (15, 20), (20, 13), (1, 23), (23, 1), (3, 3), (18, 18)]
CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def pixels(grid: tuple[int, int], *, cut: tuple[int, int] = (5, 3)) -> tuple[int, int]:
    """Height and width of an image whose padding adds `cut` pixels."""
    return grid[0] * PATCH - cut[0], grid[1] * PATCH - cut[1]


def integers(rows: int, cols: int, dim: int, seed: int) -> Tensor:
    """A smooth map of whole numbers up to 20: every sum of products is exact in float32."""
    return (smooth(rows, cols, dim, seed) * 6).round().clamp(-20, 20)


def smooth(rows: int, cols: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, dim, rows // 4 + 2, cols // 4 + 2, generator=generator)
    fine = F.interpolate(coarse, (rows, cols), mode="bicubic", align_corners=True)
    fine = fine + 0.3 * torch.randn(1, dim, rows, cols, generator=generator)
    return fine[0].flatten(1).T.contiguous()


def tones(picture: list[str], *, dim: int = 384) -> tuple[Tensor, tuple[int, int]]:
    """Features +v for each dot and -v for each hash of a drawn map."""
    vector = torch.randint(-20, 21, (dim,), generator=torch.Generator().manual_seed(0)).float()
    signs = torch.tensor([1.0 if sign == "." else -1.0 for row in picture for sign in row])
    return signs[:, None] * vector, (len(picture), len(picture[0]))


def neighbours(at: tuple[int, int]) -> Iterator[tuple[int, int]]:
    row, col = at
    yield from ((row - 1, col), (row + 1, col), (row, col - 1), (row, col + 1))


class Literal(NamedTuple):
    """What the published steps give; no box when the seed is not in its own mask."""

    box: Box | None
    seed: int
    degrees: list[int]
    expansion: list[int]
    mask: list[bool]


def literal_lost(
    features: np.ndarray,
    grid: tuple[int, int],
    image_size: tuple[int, int],
    *,
    k: int = 100,
    bias: float = 0.0,
    center: bool = False,
    normalize: bool = False,
) -> Literal:
    """The published algorithm, step by step, with a dense float64 Gram matrix."""
    f = features.astype(np.float64)
    if center:
        f = f - f.mean(axis=0)
    if normalize:
        f = f / np.maximum(np.sqrt((f**2).sum(axis=1, keepdims=True)), 1e-12)
    count = len(f)
    a = np.einsum("pd,qd->pq", f, f) + bias
    degree = [int(np.count_nonzero(np.delete(a[q], q) > 0)) for q in range(count)]
    order = sorted(range(count), key=lambda q: (degree[q], q))
    seed = order[0]
    voters = [q for q in order[:k] if a[seed, q] > 0]
    mask = [bool(a[voters, q].sum() > 0) for q in range(count)]
    reached = reachable(mask, grid, divmod(seed, grid[1])) if mask[seed] else set()
    return Literal(corners(reached, image_size) if reached else None, seed, degree, voters, mask)


def reachable(mask: list[bool], grid: tuple[int, int], start: tuple[int, int]) -> set[tuple[int, int]]:
    reached, queue = {start}, deque([start])
    while queue:
        for row, col in neighbours(queue.popleft()):
            inside = 0 <= row < grid[0] and 0 <= col < grid[1]
            if inside and mask[row * grid[1] + col] and (row, col) not in reached:
                reached.add((row, col))
                queue.append((row, col))
    return reached


def corners(patches: set[tuple[int, int]], image_size: tuple[int, int]) -> Box:
    rows, cols = [row for row, _ in patches], [col for _, col in patches]
    x1, y1 = (max(cols) + 1) * PATCH, (max(rows) + 1) * PATCH
    return min(cols) * PATCH, min(rows) * PATCH, min(x1, image_size[1]), min(y1, image_size[0])


def assert_same(found: LostDiscovery, expected: Literal, image_size: tuple[int, int]) -> None:
    assert found.box == (expected.box or (0, 0, *image_size[::-1]))
    assert found.failed == (expected.box is None)
    assert found.seed == expected.seed
    assert found.degrees.flatten().tolist() == expected.degrees
    assert found.expansion.tolist() == expected.expansion
    assert found.mask.flatten().tolist() == expected.mask


def straightforward_degrees(features: Tensor, bias: float = 0.0) -> Tensor:
    similar = features @ features.T + bias > 0
    return similar.sum(dim=1) - similar.diagonal().long()


def hostile(name: str, features: Tensor, generator: torch.Generator) -> Tensor:
    """Integer features with something that real ones have, too: what breaks a search that is nearly right."""
    patch = int(torch.randint(len(features), (1,), generator=generator))
    features = features.clone()
    match name:
        case "outlier":
            features[patch] *= 10
        case "zero patch":
            features[patch] = 0
        case "zeros":
            features[:] = 0
        case "equal":
            features[:] = features[patch].clone()
        case "few values":
            features = features.sign()
        case "positive":
            features = features.relu()
        case "duplicates":
            features[::2] = features[patch].clone()
        case "opposite corner":
            features[:] = features[patch].sign() + 2
            features[-1] *= -1
    return features


HOSTILE = ["outlier", "zero patch", "zeros", "equal", "few values", "positive", "duplicates", "opposite corner"]


@pytest.mark.parametrize("grid", GRIDS)
def test_integer_maps_give_what_the_published_steps_give(grid: tuple[int, int]) -> None:
    size = pixels(grid)
    for seed in range(10):
        features = integers(*grid, 12, seed)
        for k, bias in ((100, 0.0), (5, 0.0), (100, -150.0), (30, 64.0)):
            expected = literal_lost(features.numpy(), grid, size, k=k, bias=bias)
            for precise in (features, features.double()):
                found = discover(precise, grid, PATCH, size, k_patches=k, bias=bias)
                assert_same(found, expected, size)


@pytest.mark.parametrize("grid", [*GRIDS, (1, 1), (1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_maps_give_what_the_published_steps_give(grid: tuple[int, int], kind: str) -> None:
    size = pixels(grid)
    for seed in range(4):
        features = hostile(kind, integers(*grid, 12, seed), torch.Generator().manual_seed(seed))
        for bias in (0.0, -20.0):
            expected = literal_lost(features.numpy(), grid, size, bias=bias)
            for precise in (features, features.double()):
                assert_same(discover(precise, grid, PATCH, size, bias=bias), expected, size)


@pytest.mark.parametrize(
    ("device", "precision"),
    [
        ("cpu", torch.float32),
        ("cpu", torch.float64),
        pytest.param("cuda", torch.float32, marks=CUDA),
        pytest.param("cuda", torch.float64, marks=CUDA),
    ],
)
def test_batches_and_sweeps_give_what_single_searches_give(device: str, precision: torch.dtype) -> None:
    grid, biases = (13, 17), (-300.0, 0.0, 40.0, 0.0)
    sizes = [pixels(grid), pixels(grid, cut=(0, 15)), pixels(grid, cut=(15, 0)), pixels(grid, cut=(0, 0))]
    maps = [integers(*grid, 24, seed) for seed in range(3)]
    maps.append(hostile("zero patch", maps[0], torch.Generator().manual_seed(0)))
    batch = torch.stack(maps).to(device, precision)
    by_image = discover_all(batch, grid, PATCH, sizes, k_patches=40, biases=biases)
    assert [len(by_bias) for by_bias in by_image] == [4] * 4
    for features, size, by_bias in zip(maps, sizes, by_image, strict=True):
        for bias, found in zip(biases, by_bias, strict=True):
            assert_same(found, literal_lost(features.numpy(), grid, size, k=40, bias=bias), size)


def test_a_batch_names_the_image_that_is_broken_and_wants_all_sizes() -> None:
    features = torch.ones(3, 12, 4)
    with pytest.raises(InputError, match="2 image sizes for the features of 3 images"):
        discover_all(features, (3, 4), PATCH, [(48, 64)] * 2)
    with pytest.raises(InputError, match="does not fit an image of 64 x 48"):
        discover_all(features, (3, 4), PATCH, [(48, 64), (64, 48), (48, 64)])
    features[1, 5] = float("nan")
    with pytest.raises(InputError, match=r"1 of 36 patches are not finite \(first: image 1 of the batch, patch 5\)"):
        discover_all(features, (3, 4), PATCH, [(48, 64)] * 3)


@pytest.mark.parametrize("grid", [(7, 11), (15, 12)])
@pytest.mark.parametrize("steps", [{"center"}, {"normalize"}, {"center", "normalize"}])
@pytest.mark.parametrize("bias", [0.0, -0.1, 0.05])
def test_preprocessing_is_centre_then_normalise_then_bias(grid: tuple[int, int], steps: set[str], bias: float) -> None:
    for seed in range(6):
        features = (smooth(*grid, 16, seed) + 0.5).double()  # the double keeps signs near 0
        options = {"bias": bias, "center": "center" in steps, "normalize": "normalize" in steps}
        expected = literal_lost(features.numpy(), grid, pixels(grid), **options)
        assert_same(discover(features, grid, PATCH, pixels(grid), **options), expected, pixels(grid))


def test_an_object_of_the_opposite_sign_is_boxed_by_column_then_row() -> None:
    features, grid = tones([".........", "...##....", "...##....", "...#.....", "........."])
    found = discover(features, grid, PATCH, pixels(grid))
    assert found.box == (48, 16, 80, 64)
    assert (found.seed, found.degree, found.expansion.tolist()) == (12, 4, [12, 13, 21, 22, 30])
    assert found.degrees.shape == found.mask.shape == found.component.shape == (5, 9)
    assert torch.equal(found.component, features[:, 0].reshape(grid) != features[0, 0])
    assert (found.failed, found.full_image, found.seed_on_border) == (False, False, False)
    assert found.component_share == found.mask_share == 5 / 45
    assert found.degree_share == 4 / 45


def test_two_equal_objects_give_the_one_of_lower_index() -> None:
    features, grid = tones([".......", ".....##", ".##..##", ".##....", "......."])
    found = discover(features, grid, PATCH, pixels(grid))
    assert found.box == (80, 16, 109, 48)
    assert found.mask.sum() == 8
    assert found.component.sum() == 4


def test_blocks_that_touch_at_a_corner_are_two_objects() -> None:
    features, grid = tones([".......", ".##....", ".##....", "...##..", "...##..", "......."])
    assert discover(features, grid, PATCH, pixels(grid)).box == (16, 16, 48, 48)


@pytest.mark.parametrize("grid", [(4, 6), (30, 40)])
def test_a_checkerboard_gives_its_first_patch(grid: tuple[int, int]) -> None:
    features, _ = tones([("#." * 21)[row % 2 :][: grid[1]] for row in range(grid[0])])
    found = discover(features, grid, PATCH, pixels(grid))
    assert (found.seed, found.box) == (0, (0, 0, 16, 16))
    assert found.seed_on_border


def test_equal_patches_give_the_whole_image() -> None:
    features, grid = tones(["." * 40] * 30)
    found = discover(features, grid, PATCH, pixels(grid))
    assert found.box == (0, 0, 637, 475)
    assert (found.seed, found.degree) == (0, 1199)
    assert found.full_image
    assert not found.failed


def test_an_opposite_last_patch_is_cut_at_the_image() -> None:
    features, grid = tones([".....", ".....", "....#"])
    found = discover(features, grid, PATCH, pixels(grid))
    assert (found.seed, found.box) == (14, (64, 32, 77, 43))


@pytest.mark.parametrize("at", range(10))
def test_a_seed_in_the_outer_rows_or_columns_is_on_the_border(at: int) -> None:
    for picture in ([".....", "....."], [".."] * 5):
        features, grid = tones(picture)
        features[at] *= -1
        assert discover(features, grid, PATCH, pixels(grid)).seed_on_border
    inner, grid = tones(["....", "....", "....", "....", "....", "...."])
    row, col = divmod(at, 2)
    inner[(row % 4 + 1) * 4 + col + 1] *= -1
    assert not discover(inner, grid, PATCH, pixels(grid)).seed_on_border


def test_orthogonal_patches_are_not_similar() -> None:
    found = discover(torch.eye(6), (2, 3), PATCH, (32, 48))
    assert (found.seed, found.degree, found.expansion.tolist(), found.box) == (0, 0, [0], (0, 0, 16, 16))


@pytest.mark.parametrize("grid", [(15, 20), (14, 14), (30, 40)])
def test_integer_features_give_one_answer_in_every_precision_and_block_size(
    grid: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(4):
        features = integers(*grid, 384, seed)
        single = discover(features, grid, PATCH, pixels(grid))
        double = discover(features.double(), grid, PATCH, pixels(grid))
        assert torch.equal(single.degrees.flatten(), straightforward_degrees(features))
        assert torch.equal(single.degrees, double.degrees)
        for rows in (1, 7, 199, 10_000) if grid == (15, 20) else (10_000,):
            monkeypatch.setitem(lost.BLOCK_ROWS, "cpu", rows)
            other = discover(features, grid, PATCH, pixels(grid))
            assert torch.equal(other.degrees, single.degrees)
            assert other.box == single.box == double.box
        monkeypatch.undo()


def test_half_precision_features_are_compared_in_float32() -> None:
    for seed in range(5):
        features = smooth(15, 20, 64, seed).bfloat16()
        half = discover(features, (15, 20), PATCH, (240, 320), center=True)
        single = discover(features.float(), (15, 20), PATCH, (240, 320), center=True)
        assert torch.equal(half.degrees, single.degrees)
        assert torch.equal(half.mask, single.mask)


def test_autocast_and_reduced_matmul_precision_change_nothing_and_stay_on() -> None:
    features = smooth(15, 20, 64, 0)
    plain = discover(features, (15, 20), PATCH, (240, 320))
    torch.set_float32_matmul_precision("medium")
    chosen = torch.backends.mkldnn.matmul.fp32_precision
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            reduced = discover(features, (15, 20), PATCH, (240, 320))
            assert (features @ features.T).dtype == torch.bfloat16
        assert torch.backends.mkldnn.matmul.fp32_precision == chosen != "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(plain.degrees, reduced.degrees)
    assert plain.box == reduced.box


@pytest.mark.parametrize("seed", range(5))
def test_scale_and_rotations_of_feature_space_do_not_matter(seed: int) -> None:
    grid, generator = (9, 14), torch.Generator().manual_seed(seed)
    features = integers(*grid, 24, seed)
    box = discover(features, grid, PATCH, pixels(grid)).box
    order = torch.randperm(24, generator=generator)
    signs = torch.randint(0, 2, (24,), generator=generator) * 2.0 - 1
    for changed in (features / 64, features * 8, features[:, order], features[:, order] * signs):
        assert discover(changed, grid, PATCH, pixels(grid)).box == box


def test_a_mirrored_map_mirrors_the_box() -> None:
    grid, mirrored = (9, 14), 0
    for seed in range(30):
        features = smooth(*grid, 24, seed).double()
        found = discover(features, grid, PATCH, (144, 224), k_patches=1000)
        if (found.degrees == found.degree).sum() > 1:
            continue  # a tie goes to the first patch, which a mirror moves
        flipped = features.reshape(*grid, -1).flip(1).flatten(0, 1)
        x0, y0, x1, y1 = discover(flipped, grid, PATCH, (144, 224), k_patches=1000).box
        assert (224 - x1, y0, 224 - x0, y1) == found.box
        mirrored += not found.full_image
    assert mirrored > 5


@pytest.mark.parametrize("root", [0.5, 2.0, 9.0])
def test_a_bias_equals_a_constant_channel_of_its_root(root: float) -> None:
    changed = 0
    for seed in range(8):
        features = integers(9, 14, 24, seed)
        biased = discover(features, (9, 14), PATCH, (144, 224), bias=root**2)
        longer = torch.cat([features, torch.full((len(features), 1), root)], dim=1)
        appended = discover(longer, (9, 14), PATCH, (144, 224))
        assert torch.equal(biased.degrees, appended.degrees)
        assert biased.box == appended.box
        assert torch.equal(biased.expansion, appended.expansion)
        changed += not torch.equal(biased.mask, discover(features, (9, 14), PATCH, (144, 224)).mask)
    assert changed or root < 1


def test_a_patch_of_zeros_fails_as_a_miss_over_the_whole_image() -> None:
    features, grid = tones([".....", "..##.", "....."])
    features[3] = 0
    found = discover(features, grid, PATCH, pixels(grid))
    assert (found.seed, found.degree, len(found.expansion)) == (3, 0, 0)
    assert (found.failed, found.full_image, found.box) == (True, True, (0, 0, 77, 43))
    assert not found.component.any()
    assert found.component_share == 0


def test_a_bias_below_all_similarities_fails() -> None:
    found = discover(smooth(5, 5, 8, 0), (5, 5), PATCH, (80, 80), bias=-1.5, normalize=True)
    assert found.failed
    assert found.box == (0, 0, 80, 80)


def test_one_patch_is_the_whole_image() -> None:
    found = discover(torch.ones(1, 4), (1, 1), PATCH, (9, 12))
    assert (found.box, found.failed, found.full_image) == ((0, 0, 12, 9), False, True)


def test_pixels_that_the_model_never_saw_stay_outside() -> None:
    assert discover(torch.ones(6, 4), (2, 3), PATCH, (40, 50)).box == (0, 0, 48, 32)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_not_finite_are_named(value: float) -> None:
    features = torch.ones(12, 4)
    features[7, 1] = features[9, 2] = value
    with pytest.raises(InputError, match=r"2 of 12 patches are not finite \(first: patch 7\); run the model in fp32"):
        discover(features, (3, 4), PATCH, (48, 64))


def test_features_whose_sum_overflows_are_still_finite() -> None:
    features = torch.full((4, 4), 60_000.0, dtype=torch.float16)
    assert discover(features, (2, 2), PATCH, (32, 32)).full_image


def test_a_swapped_grid_is_refused() -> None:
    with pytest.raises(InputError, match=r"4 x 3 patches of 16 pixels .* 43 x 61; give the grid as \(rows, columns\)"):
        discover(torch.ones(12, 4), (4, 3), PATCH, pixels((3, 4)))


@pytest.mark.parametrize("count", [0, 11, 13])
def test_prefix_tokens_left_in_are_refused(count: int) -> None:
    grid = (3, 4) if count else (0, 0)
    with pytest.raises(InputError, match=f"{count} patch features for a grid of .*; drop class token and registers"):
        discover(torch.ones(count, 4), grid, PATCH, (48, 64))


def test_a_search_without_candidates_is_refused() -> None:
    with pytest.raises(InputError, match="k_patches=0: LOST needs at least 1 candidate patch"):
        discover(torch.ones(12, 4), (3, 4), PATCH, (48, 64), k_patches=0)


def test_features_whose_products_overflow_are_refused() -> None:
    with pytest.raises(InputError, match=r"features up to 1.0e\+30 overflow when multiplied; scale them down"):
        discover(torch.full((12, 4), 1e30), (3, 4), PATCH, (48, 64))


class LargestTensor(TorchFunctionMode):
    """Remembers the bytes of the largest tensor that an operation makes."""

    size = 0

    def __torch_function__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        made = function(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.size = max(self.size, made.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("biases", [(0.0,), (-1.0, 0.0, 1.0)])
def test_memory_stays_at_a_few_rows_of_the_gram_matrix(biases: tuple[float, ...]) -> None:
    grid = (40, 50)
    with LargestTensor() as largest:
        discover_all(integers(*grid, 8, 0)[None], grid, PATCH, [pixels(grid)], biases=biases)
    assert largest.size == 128 * 2000 * 4


def test_a_result_says_how_it_was_found() -> None:
    features, grid = tones([".........", "...##....", "...##....", "...#.....", "........."])
    found = discover(features, grid, PATCH, pixels(grid))
    assert found.diagnostics() == {
        "seed": 12,
        "seed_on_border": False,
        "mask_share": 0.1111,
        "object_share": 0.1111,
        "full_image": False,
        "failed": False,
        "seed_degree_share": 0.0889,
        "expansion": 5,
    }
    assert found.score.flatten().argmax() == found.seed
    assert found.score[0, 0] == pytest.approx(1 - 39 / 45)
