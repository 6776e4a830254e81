import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import linalg, ndimage
from torch import Tensor
from vitreg_core.errors import InputError
from vitreg_eval.discovery import View
from vitreg_eval.tokencut import joints, second_eigenvector, tokencut

PATCH = 16


def view_of(features: Tensor, grid: tuple[int, int], cut: tuple[int, int] = (5, 3)) -> View:
    size = (grid[0] * PATCH - cut[0], grid[1] * PATCH - cut[1])
    return View(grid=grid, patch_size=PATCH, image_size=size, features=features)


def drawn(picture: list[str], *, dim: int = 32, noise: float = 0.0) -> tuple[Tensor, tuple[int, int]]:
    """One random direction for each letter of a drawn map."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
    letters = sorted(set("".join(picture)))
    features = torch.stack([directions[letters.index(letter)] for row in picture for letter in row])
    return features + noise * torch.randn(features.shape, generator=generator), (len(picture), len(picture[0]))


def smooth(rows: int, cols: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, dim, rows // 4 + 2, cols // 4 + 2, generator=generator)
    fine = F.interpolate(coarse, (rows, cols), mode="bicubic", align_corners=True)
    return (fine + 0.3 * torch.randn(1, dim, rows, cols, generator=generator))[0].flatten(1).T.contiguous()


def literal_tokencut(features: Tensor, grid: tuple[int, int], image_size: tuple[int, int]) -> tuple[int, ...]:
    """The published steps with a dense generalised eigenproblem."""
    f = features.double().numpy()
    f = f / np.linalg.norm(f, axis=1, keepdims=True)
    w = np.where(np.einsum("pd,qd->pq", f, f) > 0.2, 1.0, 1e-5)
    d = np.diag(w.sum(axis=1))
    _, vectors = linalg.eigh(d - w, d)
    y = vectors[:, 1]
    seed = int(np.argmax(np.abs(y)))
    if y[seed] < y.mean():
        y = -y
    labels, _ = ndimage.label((y > y.mean()).reshape(grid))
    rows, cols = np.nonzero(labels == labels.flat[seed])
    right, bottom = (int(cols.max()) + 1) * PATCH, (int(rows.max()) + 1) * PATCH
    left, top = int(cols.min()) * PATCH, int(rows.min()) * PATCH
    return left, top, min(right, image_size[1]), min(bottom, image_size[0])


@pytest.mark.parametrize("grid", [(7, 11), (11, 7), (15, 12), (1, 23), (23, 1)])
def test_boxes_are_those_of_a_dense_generalised_eigenproblem(grid: tuple[int, int]) -> None:
    boxes = set()
    for seed in range(12):
        view = view_of(smooth(*grid, 24, seed), grid)
        assert view.features is not None
        found = tokencut(view)
        assert found.box == literal_tokencut(view.features, grid, view.image_size)
        assert found.score.flatten().argmax() == found.seed
        boxes.add(found.box)
    assert len(boxes) > 3


@pytest.mark.parametrize(("patches", "islands"), [(2, 1), (3, 1), (40, 1), (40, 3), (150, 3)])
def test_the_eigenvector_is_the_second_of_the_dense_problem(patches: int, islands: int) -> None:
    generator = torch.Generator().manual_seed(patches)
    features = torch.randn(patches, 12, generator=generator) + 0.5
    features[-islands:] = -torch.eye(12)[:islands] * 3  # patches that are joined to none
    weights = joints(features, 0.2, 1e-5)
    values, vectors = linalg.eigh(np.diag(weights.sum(axis=0)) - weights, np.diag(weights.sum(axis=0)))
    ours = second_eigenvector(weights)
    degrees = weights.sum(axis=0)
    assert ours @ (degrees * ours) == pytest.approx(1)
    assert ours @ degrees == pytest.approx(0, abs=1e-8)
    assert ours @ (degrees * ours - weights @ ours) == pytest.approx(values[1], rel=1e-6)
    if patches < 3 or values[2] - values[1] > 1e-6:
        assert abs(ours @ (degrees * vectors[:, 1])) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_a_planted_object_is_boxed(noise: float) -> None:
    features, grid = drawn([".........", "...##....", "...##....", "...#.....", "........."], noise=noise)
    found = tokencut(view_of(features, grid))
    assert found.box == (48, 16, 80, 64)
    assert found.component.sum() == 5
    assert not (found.failed or found.full_image or found.seed_on_border)
    assert found.seed in (12, 13, 21, 22, 30)


def test_two_regions_give_the_closed_form_of_the_cut() -> None:
    features, grid = drawn(["#...", "#...", "...."])
    found = tokencut(view_of(features, grid))
    inside, outside = found.score[0, 0].item(), found.score[0, 1].item()
    degree_in, degree_out = 2 + 10e-5, 10 + 2e-5
    assert 2 * degree_in * inside == pytest.approx(-10 * degree_out * outside)  # no overlap with the first vector
    assert 2 * degree_in * inside**2 + 10 * degree_out * outside**2 == pytest.approx(1)
    assert found.box == (0, 0, 16, 32)


def test_of_an_object_in_two_pieces_that_of_the_seed_is_boxed() -> None:
    features, grid = drawn([".......", ".##..#.", ".##....", "......."])
    found = tokencut(view_of(features, grid))
    assert found.mask.sum() == 5
    assert found.box in ((16, 16, 48, 48), (80, 16, 96, 32))
    assert found.component.flatten()[found.seed]


@pytest.mark.parametrize(
    ("features", "grid"),
    [
        (torch.ones(12, 4), (3, 4)),
        (torch.eye(6), (2, 3)),
        (torch.zeros(6, 4), (2, 3)),
        (torch.ones(1, 4), (1, 1)),
        (torch.ones(2, 4), (1, 2)),
    ],
)
def test_where_all_joints_are_alike_no_cut_is_found(features: Tensor, grid: tuple[int, int]) -> None:
    found = tokencut(view_of(features, grid))
    assert (found.failed, found.full_image, found.box) == (True, True, (0, 0, grid[1] * 16 - 3, grid[0] * 16 - 5))


def test_the_length_of_features_does_not_matter_and_the_threshold_does() -> None:
    features = smooth(9, 14, 24, 3)
    box = tokencut(view_of(features, (9, 14))).box
    lengths = torch.rand(len(features), 1, generator=torch.Generator().manual_seed(0)) + 0.5
    assert tokencut(view_of(features * lengths, (9, 14))).box == box
    assert tokencut(view_of(features.double(), (9, 14))).box == box
    assert {tokencut(view_of(features, (9, 14)), tau=tau).box for tau in (-0.2, 0.0, 0.2, 0.4, 0.6)} != {box}


@pytest.mark.parametrize("setting", [{"tau": 1.5}, {"eps": 0.0}, {"eps": 1.0}, {"tau": float("nan")}])
def test_settings_out_of_range_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(InputError, match="use tau from -1 to 1 and eps above 0 and below 1"):
        tokencut(view_of(torch.ones(12, 4), (3, 4)), **setting)


def test_views_without_fit_features_are_refused() -> None:
    with pytest.raises(InputError, match="needs patch features"):
        tokencut(View(grid=(3, 4), patch_size=PATCH, image_size=(48, 64)))
    with pytest.raises(InputError, match="drop class token and registers"):
        tokencut(view_of(torch.ones(13, 4), (3, 4)))
    with pytest.raises(InputError, match="not finite"):
        tokencut(view_of(torch.full((12, 4), float("nan")), (3, 4)))
