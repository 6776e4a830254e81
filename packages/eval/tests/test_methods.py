import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor
from vitreg_core.errors import InputError
from vitreg_eval.discovery import View
from vitreg_eval.lost import LostDiscovery, discover
from vitreg_eval.methods import METHODS

PATCH = 16


def view_of(
    grid: tuple[int, int], features: Tensor | None = None, attention: Tensor | None = None, *, name: str = ""
) -> View:
    size = (grid[0] * PATCH - 5, grid[1] * PATCH - 3)
    return View(grid=grid, patch_size=PATCH, image_size=size, features=features, attention=attention, name=name)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grid", [(9, 14), (1, 5), (4, 1), (1, 1)])
def test_every_method_gives_a_box_inside_the_image(method: str, grid: tuple[int, int]) -> None:
    patches = grid[0] * grid[1]
    view = view_of(grid, random(patches, 24), random(6, patches, seed=1).softmax(dim=1) / 2)
    found = METHODS[method].find(view)
    x0, y0, x1, y1 = found.box
    assert 0 <= x0 < x1 <= view.image_size[1]
    assert 0 <= y0 < y1 <= view.image_size[0]
    assert found.mask.shape == found.component.shape == found.score.shape == grid
    assert 0 <= found.seed < patches
    assert set(found.diagnostics()) >= {"seed", "mask_share", "object_share", "full_image", "failed"}
    assert METHODS[method].find(view).box == found.box


@pytest.mark.parametrize("method", METHODS)
def test_a_method_takes_no_more_than_it_needs(method: str) -> None:
    needs = METHODS[method].needs
    features, attention = random(126, 24), random(6, 126).softmax(dim=1)
    bare = view_of((9, 14), features if needs == "features" else None, attention if needs == "attention" else None)
    METHODS[method].find(bare, **METHODS[method].settings)
    if needs != "nothing":
        with pytest.raises(InputError, match=r"needs patch features|needs the class token's attention"):
            METHODS[method].find(view_of((9, 14)))


def test_settings_are_named_with_their_published_values() -> None:
    assert METHODS["lost"].settings == {"k_patches": 100, "center": False, "normalize": False, "bias": 0.0}
    assert METHODS["tokencut"].settings == {"tau": 0.2, "eps": 1e-5}
    assert METHODS["dino_seg"].settings == {"head": 4, "mass": 0.6}
    assert METHODS["random"].settings == {"seed": 0}


def test_lost_of_a_view_is_lost_of_its_features() -> None:
    features = random(126, 24)
    found = METHODS["lost"].find(view_of((9, 14), features), k_patches=20, center=True, normalize=True, bias=-0.1)
    same = discover(features, (9, 14), PATCH, (139, 221), k_patches=20, center=True, normalize=True, bias=-0.1)
    assert isinstance(found, LostDiscovery)
    assert found.box == same.box
    assert torch.equal(found.expansion, same.expansion)


# Boxes that look at nothing


def test_full_and_center_are_the_image_and_half_its_sides() -> None:
    view = view_of((9, 14))  # 139 x 221 pixels
    full, center = METHODS["full"].find(view), METHODS["center"].find(view)
    assert (full.box, full.full_image, full.mask_share) == ((0, 0, 221, 139), True, 1)
    assert (center.box, center.full_image) == ((55, 34, 166, 105), False)
    assert center.mask.nonzero().min(dim=0).values.tolist() == [34 // 16, 55 // 16]
    assert center.mask.nonzero().max(dim=0).values.tolist() == [104 // 16, 165 // 16]
    assert divmod(center.seed, 14) == (4, 6)


def test_random_boxes_are_uniform_pairs_of_patches_by_seed_and_name() -> None:
    grid, counts = (3, 4), np.zeros((3, 3))
    for number in range(1500):
        x0, y0, x1, y1 = METHODS["random"].find(view_of(grid, name=f"photo-{number}")).box
        assert x0 % PATCH == y0 % PATCH == 0
        assert x1 in (16, 32, 48, 61)
        counts[y0 // PATCH, -(-y1 // PATCH) - 1] += 1
    expected = np.triu(np.full((3, 3), 2.0)) - np.eye(3)  # two orders of two rows, one of twice the same
    assert np.abs(counts / 1500 - expected / 9).max() < 0.04
    names = {METHODS["random"].find(view_of((30, 40), name="a"), seed=seed).box for seed in range(10)}
    assert len(names) > 5


# First principal component


@pytest.mark.parametrize("grid", [(9, 14), (14, 9)])
def test_the_first_component_is_that_of_scikit_learn(grid: tuple[int, int]) -> None:
    for seed in range(5):
        features = random(126, 24, seed=seed) + 3
        found = METHODS["pca"].find(view_of(grid, features))
        theirs = PCA(1, svd_solver="full").fit_transform(features.double().numpy())[:, 0].reshape(grid)
        border = np.ones(grid, dtype=bool)
        border[1:-1, 1:-1] = False
        theirs *= -np.sign(theirs[border].mean())
        np.testing.assert_allclose(found.score.numpy(), theirs, atol=1e-10)
        assert found.seed == theirs.argmax()
        assert np.array_equal(found.mask.numpy(), theirs > 0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_first_component_boxes_a_planted_object(sign: float) -> None:
    features = torch.zeros(5, 9, 8)
    features[1:3, 3:5] = sign
    found = METHODS["pca"].find(view_of((5, 9), features.flatten(0, 1)))
    assert (found.box, found.mask.sum()) == ((48, 16, 80, 48), 4)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_row_of_patches_takes_its_extreme_one_for_object(sign: float) -> None:
    features = torch.zeros(6, 8)
    features[4] = sign
    assert METHODS["pca"].find(view_of((1, 6), features)).box == (64, 0, 80, 11)


def test_equal_patches_have_no_first_component() -> None:
    found = METHODS["pca"].find(view_of((3, 4), torch.ones(12, 8)))
    assert (found.failed, found.box) == (True, (0, 0, 61, 43))


# DINO-seg


def attended(rows: list[list[float]], heads: int = 6, head: int = 4) -> Tensor:
    attention = random(heads, len(rows) * len(rows[0])).softmax(dim=1)
    attention[head] = torch.tensor(rows).flatten()
    return attention


def test_dino_seg_keeps_the_patches_that_hold_most_attention() -> None:
    rows = [[0.01, 0.00, 0.00, 0.00, 0.0], [0.00, 0.16, 0.10, 0.00, 0.2], [0.00, 0.01, 0.00, 0.02, 0.0]]
    found = METHODS["dino_seg"].find(view_of((3, 5), attention=attended(rows)))
    assert found.mask.nonzero().tolist() == [[1, 1], [1, 4]]  # 0.36 of 0.50 reach 0.6; 0.20 do not
    assert found.score.sum() == pytest.approx(1)
    assert found.component.nonzero().tolist() == [[1, 1]]  # the first of two parts of equal size
    more = METHODS["dino_seg"].find(view_of((3, 5), attention=attended(rows)), mass=0.8)
    assert (more.box, divmod(more.seed, 5)) == ((16, 16, 48, 32), (1, 1))


def test_dino_seg_may_choose_the_last_part_and_cuts_it_at_the_image() -> None:
    rows = [[0.3, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.2, 0.25]]
    found = METHODS["dino_seg"].find(view_of((3, 4), attention=attended(rows)), mass=0.9)
    assert (found.box, found.seed) == ((32, 32, 61, 43), 11)
    only = METHODS["dino_seg"].find(view_of((3, 4), attention=attended(rows)), mass=0.1)
    assert only.box == (0, 0, 16, 16)


def test_dino_seg_matches_the_published_rule_of_cumulated_mass() -> None:
    for seed in range(20):
        attention = random(3, 126, seed=seed).mul(2).softmax(dim=1).double()
        found = METHODS["dino_seg"].find(view_of((9, 14), attention=attention), head=2)
        values, order = torch.sort(attention[2] / attention[2].sum())
        kept = torch.zeros(126, dtype=torch.bool)
        kept[order] = values.cumsum(0) > 0.4
        assert torch.equal(found.mask.flatten(), kept)


def test_dino_seg_of_no_head_is_that_of_their_mean() -> None:
    attention = random(3, 126).softmax(dim=1)
    mean = METHODS["dino_seg"].find(view_of((9, 14), attention=attention), head=None)
    alone = METHODS["dino_seg"].find(view_of((9, 14), attention=attention.mean(dim=0, keepdim=True)), head=0)
    assert mean.box == alone.box
    assert torch.equal(mean.score, alone.score)


def test_dino_seg_boxes_the_whole_image_when_no_patch_is_attended() -> None:
    assert METHODS["dino_seg"].find(view_of((3, 4), attention=torch.zeros(5, 12))).full_image


def test_dino_seg_refuses_heads_masses_and_values_that_are_not_there() -> None:
    view = view_of((3, 4), attention=torch.ones(3, 12) / 13)
    with pytest.raises(
        InputError, match="head 4 of an attention layer with 3 heads; use 0 to 2, or none for their mean"
    ):
        METHODS["dino_seg"].find(view)
    for mass in (0.0, 1.1, float("nan")):
        with pytest.raises(InputError, match=f"mass={mass}: the share of attention to keep"):
            METHODS["dino_seg"].find(view, head=0, mass=mass)
    with pytest.raises(InputError, match=r"attention of 1 of 12 patches are not finite \(first: patch 5\)"):
        broken = torch.ones(3, 12)
        broken[:, 5] = float("nan")
        METHODS["dino_seg"].find(view_of((3, 4), attention=broken), head=0)
    with pytest.raises(InputError, match="13 patch features for a grid of 3 x 4"):
        METHODS["dino_seg"].find(view_of((3, 4), attention=torch.ones(5, 13)))
