from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from vitreg_core import create_model, load_model
from vitreg_core.config import PreprocessConfig
from vitreg_core.data.images import Preprocess, list_images, read_image
from vitreg_core.denoise import View, averaged_features, denoise, draw_views, move, shift_average
from vitreg_core.errors import InputError
from vitreg_core.features import QKV, Backbone, Features

PATCH = 4


class Equivariant(nn.Module):
    """A backbone without positions, whose kernel is its own mirror image; `artifact` is added at fixed places."""

    patch_size, embed_dim, depth, num_heads, num_registers, num_prefix_tokens = PATCH, 6, 1, 2, 1, 2
    prefix = ("cls", "register")
    source = "stub"

    def __init__(self, artifact: Float[Tensor, "rows cols"] | None = None) -> None:
        super().__init__()
        kernel = torch.randn(6, 3, PATCH, PATCH)
        self.kernel = nn.Parameter(kernel + kernel.flip(-1))
        self.artifact = artifact
        self.preprocess = Preprocess(PreprocessConfig(image_size=24))
        self.device = torch.device("cpu")

    def forward(self, images: Tensor) -> Features:
        return self.features(images)

    def embeddings(self, images: Tensor) -> Tensor:
        return rearrange(F.conv2d(images, self.kernel, stride=PATCH), "b d rows cols -> b (rows cols) d")

    def features(self, images: Tensor) -> Features:
        patches = self.embeddings(images)
        grid = (images.shape[-2] // PATCH, images.shape[-1] // PATCH)
        if self.artifact is not None:
            patches = patches + self.artifact.flatten()[:, None]
        whole = images.mean(dim=(1, 2, 3))[:, None] + torch.arange(6.0)
        return Features(whole, whole[:, None] + 1, patches, grid)

    def intermediate(self, images: Tensor, layers: Sequence[int], *, norm: bool = True) -> list[Features]:
        found = self.features(images)
        return [Features(found.cls, found.registers, found.patches * (1 if norm else 5), found.grid) for _ in layers]

    def qkv(self, images: Tensor, layer: int) -> QKV:
        tokens = rearrange(self.features(images).tokens, "b n (h k) -> b h n k", h=2)
        return QKV(tokens, 2 * tokens, 3 * tokens)

    def attention(self, images: Tensor, layer: int) -> Tensor:
        return torch.full((len(images), 2, 38, 38), 1 / 38)

    def hidden(self, images: Tensor, layer: int) -> Tensor:
        return self.features(images).tokens


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def tiny() -> nn.Module:
    return create_model(
        "vit_ti16_reg2", image_size=48, patch_size=8, embed_dim=16, num_heads=2, depth=2, num_classes=5
    ).eval()


def test_nothing_changes_where_features_move_with_the_picture() -> None:
    model, images = Equivariant(), torch.randn(3, 3, 24, 32)
    found, plain = denoise(model, 9, share=0.4)(images), model(images)
    assert found.grid == (6, 8)
    for name in ("cls", "registers", "patches"):
        torch.testing.assert_close(getattr(found, name), getattr(plain, name), msg=name)


def test_a_view_moves_whole_patches() -> None:
    images = torch.randn(2, 3, 12, 16)
    down = move(images, View(1, -2, mirrored=False), PATCH)
    assert down.shape == images.shape
    torch.testing.assert_close(down[..., 4:, :8], images[..., :8, 8:])
    torch.testing.assert_close(down[..., :4, :8], images[..., 1:5, 8:].flip(-2))  # the free rows are mirrored
    torch.testing.assert_close(move(images, View(1, -2, mirrored=True), PATCH), down.flip(-1))


@pytest.mark.parametrize("place", [(0, 0), (2, 3), (5, 7)])
@pytest.mark.parametrize("flips", [False, True])
def test_an_artifact_that_stays_in_place_is_spread_over_the_patches_that_pass_it(
    place: tuple[int, int],
    flips: bool,  # noqa: FBT001 (pytest's)
) -> None:
    artifact = torch.zeros(6, 8)
    artifact[place] = 100.0
    model, images = Equivariant(artifact), torch.randn(1, 3, 24, 32)
    views = draw_views((6, 8), 6, share=0.4, flips=flips, seed=3)
    rows, cols = torch.meshgrid(torch.arange(6), torch.arange(8), indexing="ij")
    hits, seen = torch.zeros(6, 8), torch.zeros(6, 8)
    for view in views:  # where each patch stands in the view, written out
        row, col = rows + view.down, cols + view.right
        inside = (row >= 0) & (row < 6) & (col >= 0) & (col < 8)
        col = 7 - col if view.mirrored else col
        hits += inside & (row == place[0]) & (col == place[1])
        seen += inside
    patches, counts = averaged_features(model, images, views)
    assert counts.tolist() == seen.flatten().long().tolist()
    expected = (
        model.embeddings(images) + (100 * hits / seen.clamp(min=1)).flatten()[:, None] * (seen > 0).flatten()[:, None]
    )
    torch.testing.assert_close(patches, expected, atol=1e-4, rtol=1e-5)
    assert hits[place] == 0 or flips


def test_an_artifact_in_the_corner_is_gone() -> None:
    artifact = torch.zeros(6, 8)
    artifact[[0, 0, -1, -1], [0, -1, 0, -1]] = 100.0
    model, images = Equivariant(artifact), torch.randn(1, 3, 24, 32)
    error = (denoise(model, 8)(images).patches - model.embeddings(images)).mean(dim=-1).reshape(6, 8)
    assert error[[0, 0, -1, -1], [0, -1, 0, -1]].abs().max() < 1e-4
    assert error.max() < 50  # five views see a patch beside a corner; one or two of them move it there


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("grid", [(2, 2), (14, 14), (1, 9), (37, 20)])
def test_four_views_see_every_patch_and_none_stays_in_place(grid: tuple[int, int], seed: int) -> None:
    views = draw_views(grid, 4, seed=seed)
    images = torch.zeros(1, 3, grid[0] * 2, grid[1] * 2)
    found = shift_average(lambda moved: [torch.ones(1, grid[0] * grid[1], 1)], images, views, 2)
    assert found.seen.min() >= 1
    assert all(view[:2] != (0, 0) for view in views)
    assert max(abs(view.down) for view in views) <= max(1, round(0.15 * grid[0]))
    assert max(abs(view.right) for view in views) <= max(1, round(0.15 * grid[1]))


def test_views_are_fixed_by_their_seed_and_reach_all_shifts() -> None:
    assert draw_views((14, 14), seed=1) == draw_views((14, 14), seed=1) != draw_views((14, 14), seed=2)
    many = set(draw_views((14, 14), 2000))
    assert many == {
        View(down, right, mirrored)
        for down in range(-2, 3)
        for right in range(-2, 3)
        for mirrored in (False, True)
        if (down, right) != (0, 0)
    }
    assert len({view[:2] for view in draw_views((14, 14))}) == 10
    assert not any(view.mirrored for view in draw_views((14, 14), 100, flips=False))


def test_a_patch_that_no_view_saw_is_that_of_the_image_itself() -> None:
    model, images = Equivariant(torch.arange(48.0).reshape(6, 8)), torch.randn(1, 3, 24, 32)
    found = denoise(model, 1, flips=False)
    (view,) = found.views(images)
    lost = torch.ones(6, 8, dtype=torch.bool)
    lost[max(-view.down, 0) : 6 - max(view.down, 0), max(-view.right, 0) : 8 - max(view.right, 0)] = False
    assert lost.any()
    error = (found(images).patches - model(images).patches).abs().amax(dim=-1).reshape(6, 8)
    assert (error[lost] == 0).all()
    assert (error[~lost] > 0.5).all()


def test_a_batch_equals_its_images_one_by_one() -> None:
    model, images = denoise(tiny(), 5), torch.randn(3, 3, 48, 64)
    whole = model(images)
    for index, image in enumerate(images):
        torch.testing.assert_close(model(image[None]).patches, whole.patches[index : index + 1])
    torch.testing.assert_close(denoise(model.model, 5)(images).patches, whole.patches, rtol=0, atol=0)
    assert not torch.equal(denoise(model.model, 5, seed=1)(images).patches, whole.patches)


def test_it_is_a_backbone_that_keeps_what_belongs_to_the_image() -> None:
    plain, images = tiny(), torch.randn(2, 3, 48, 48)
    model = denoise(plain, 4)
    assert isinstance(model, Backbone)
    assert (model.depth, model.num_prefix_tokens, model.prefix) == (2, 3, ("cls", "register", "register"))
    found, before = model.features(images), plain.features(images)
    torch.testing.assert_close(found.cls, before.cls, rtol=0, atol=0)
    torch.testing.assert_close(found.registers, before.registers, rtol=0, atol=0)
    assert not torch.equal(found.patches, before.patches)
    torch.testing.assert_close(model.intermediate(images, [0, -1])[1].patches, found.patches)
    torch.testing.assert_close(model.attention(images, 1), plain.attention(images, 1), rtol=0, atol=0)
    assert model.hidden(images, 0).shape == (2, 39, 64)
    assert model.embeddings(images).shape == (2, 36, 16)
    assert model.source.endswith("averaged over 4 shifts")
    assert "shifts=4, share=0.15, flips=True, seed=0" in repr(model)


def test_tokens_before_the_norm_are_averaged_before_it() -> None:
    plain, images = tiny(), torch.randn(1, 3, 48, 48)
    model = denoise(plain, 4)
    (raw,) = model.intermediate(images, [1], norm=False)
    views = draw_views((6, 6), 4)
    mean = shift_average(lambda moved: [plain.intermediate(moved, [1], norm=False)[0].patches], images, views, 8)
    torch.testing.assert_close(raw.patches, mean.patches[0])


def test_queries_keys_and_values_are_averaged_alike() -> None:
    artifact = torch.zeros(6, 6)
    artifact[0, 0] = 100.0
    model, images = Equivariant(artifact), torch.randn(2, 3, 24, 24)
    found, clean = denoise(model, 8).qkv(images, 0), denoise(model, 8)(images)
    tokens = rearrange(clean.tokens, "b n (h k) -> b h n k", h=2)
    for part, factor in zip((found.queries, found.keys, found.values), (1, 2, 3), strict=True):
        torch.testing.assert_close(part, factor * tokens)


def test_pixels_beyond_the_last_whole_patch_are_dropped() -> None:
    model, images = denoise(Equivariant(), 4), torch.randn(1, 3, 27, 25)
    torch.testing.assert_close(model(images).patches, model(images[..., :24, :24]).patches)


def test_bfloat16_is_summed_in_float32() -> None:
    model, images = Equivariant().bfloat16(), torch.randn(1, 3, 24, 24).bfloat16()
    assert denoise(model, 8)(images).patches.dtype == torch.bfloat16
    torch.testing.assert_close(denoise(model, 8, flips=False)(images).patches, model(images).patches, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shifts": 0}, "shifts=0: give at least 1"),
        ({"share": 0.0}, "share=0.0 of the side; give a number between 0 and 1"),
        ({"share": 1.0}, "share=1.0 of the side; give a number between 0 and 1"),
    ],
)
def test_bad_numbers_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        denoise(Equivariant(), **arguments)


def test_images_that_cannot_be_shifted_are_refused() -> None:
    model = denoise(Equivariant())
    with pytest.raises(InputError, match="images of 1x1 patches cannot be shifted; give larger ones"):
        model(torch.randn(1, 3, 7, 4))
    with pytest.raises(InputError, match="image of 3x24 pixels is smaller than one patch of 4; give larger images"):
        model(torch.randn(1, 3, 3, 24))


@pytest.mark.real_data
def test_outliers_of_a_trained_model_leave_its_patches(shared_data: Path) -> None:
    model = load_model(shared_data / "weights" / "vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    paths = list_images(shared_data / "imagenette-224" / "val")[::100]
    images = torch.stack([model.preprocess(read_image(path)) for path in paths])
    with torch.inference_mode():
        before, after = (
            m.intermediate(images, [-1], norm=False)[0].patches.norm(dim=-1) for m in (model, denoise(model))
        )
    assert (before > 300).float().mean() > 0.015
    assert (after > 300).float().mean() == 0
