from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from torch import Tensor
from vitreg_core import VisionTransformer, ViTConfig
from vitreg_core.errors import InputError
from vitreg_core.features import Features
from vitreg_core.planted import plant_register_neurons
from vitreg_eval.config import TokensOptions
from vitreg_eval.labelled_features import hold_out
from vitreg_eval.logistic import STRENGTHS
from vitreg_eval.tasks import tokens

CLASSES, PATCHES, WIDTH = 4, 16, 24


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Photos of one colour each class, with noise and one flat patch; the corner pixel names the class."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 120), ("val", 60)):
        for index in range(count):
            folder = tmp_path / "photos" / split / f"class{index % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            row, col = generator.integers(0, 4, 2) * 8
            pixels[row : row + 8, col : col + 8] = 60 * (index % CLASSES)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "photos"


@pytest.fixture
def model() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(ViTConfig(image_size=32, patch_size=8, embed_dim=WIDTH, depth=3, num_heads=3)).eval()


class Telling(VisionTransformer):
    """A model whose class tokens and outliers know the class, and whose normal patches know nothing."""

    def __init__(self, *, outliers: bool) -> None:
        super().__init__(ViTConfig(image_size=32, patch_size=8, embed_dim=WIDTH, depth=1, num_heads=3))
        self.outliers = outliers

    def stream(self, images: Tensor, stop: int | None = None, masks: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def made(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Class and patch tokens; the flat patch, if any, carries the class."""
        pixels = self.preprocess.denormalize(images)
        flat = pixels.unfold(2, 8, 8).unfold(3, 8, 8).std(dim=(1, 4, 5)).flatten(1).argmin(dim=1)
        colours = pixels.unfold(2, 8, 8).unfold(3, 8, 8).mean(dim=(1, 4, 5)).flatten(1)
        colour = colours[torch.arange(len(flat)), flat]
        code = torch.nn.functional.one_hot((colour * 255 / 60).round().long(), WIDTH).float()
        generator = torch.Generator().manual_seed(int(colour.sum() * 1000))
        patches = torch.randn(len(images), PATCHES, WIDTH, generator=generator)
        if self.outliers:
            patches[torch.arange(len(flat)), flat] = 100 * code
        return code, patches


@pytest.fixture
def telling(monkeypatch: pytest.MonkeyPatch) -> type[Telling]:
    """Put the planted tokens in the place of a forward pass, before and after the norm."""

    def passes(backbone: Telling, examples: tokens.Examples, options: TokensOptions):  # noqa: ANN202
        for batch in tokens.image_set(examples, backbone.preprocess, options.batch_size).batches():
            cls, patches = backbone.made(batch.images)
            features = Features(cls, patches[:, :0], torch.nn.functional.normalize(patches, dim=-1), (4, 4))
            yield tokens.Pass(features, patches.norm(dim=-1))

    monkeypatch.setattr(tokens, "passes", passes)
    return Telling


def test_what_only_outliers_and_class_token_know_comes_back(
    telling: type[Telling], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "STRENGTHS", STRENGTHS[20:30:3])
    outcome = tokens.run(telling(outliers=True), TokensOptions(data=photos, draws=2), photos)
    found = {name: metric.value for name, metric in outcome.metrics.items()}
    assert found["cls_top1"] == found["outlier_top1"] == found["outlier_images"] == 1
    assert abs(found["normal_top1"] - 1 / CLASSES) < 0.2
    assert found["cutoff"] < 100
    assert "120 of 120 to train on, 60 of 60 to judge by" in outcome.notes[-1]


def test_without_outliers_there_are_two_rows(
    telling: type[Telling], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "STRENGTHS", STRENGTHS[20:30:3])
    outcome = tokens.run(telling(outliers=False), TokensOptions(data=photos), photos)
    assert set(outcome.metrics) == {"cls_top1", "normal_top1", "outlier_images"}
    assert outcome.metrics["outlier_images"].value == 0
    assert "no outlier mode" in outcome.notes[-1]


def test_tokens_are_those_of_the_model(model: VisionTransformer, photos: Path) -> None:
    examples = tokens.open_splits(None, photos).val
    images = torch.stack([model.preprocess(examples.read(index)) for index in range(len(examples))])
    planted, _ = plant_register_neurons(model, images, layer=1, share=0.05, factor=20.0)
    with torch.no_grad():
        normed, plain = planted(images), planted.intermediate(images, [-1], norm=False)[0]
    norms = plain.patches.norm(dim=-1)
    cutoff = float(norms.median() * 5)
    found = tokens.collect(planted, examples, TokensOptions(batch_size=7), cutoff, 0)
    outliers = norms > cutoff
    assert torch.equal(found.has_outlier, outliers.any(dim=1))
    assert 0 < int(found.there.sum()) < len(examples)
    torch.testing.assert_close(found.kinds["cls"][0], normed.cls)
    assert (len(found.kinds["cls"]), len(found.kinds["normal"])) == (1, 3)
    for kind, among in (("outlier", outliers), ("normal", ~outliers)):
        for drawn in found.kinds[kind]:
            same = (drawn[:, None] - normed.patches).abs().amax(dim=-1) < 1e-5
            assert torch.equal((same & among).any(dim=1), among.any(dim=1))


def test_draws_differ_and_come_back_with_the_seed(model: VisionTransformer, photos: Path) -> None:
    examples = tokens.open_splits(None, photos).val

    def drawn(**options: int) -> Tensor:
        found = tokens.collect(model, examples, TokensOptions(batch_size=7, **options), None, 0)
        return found.kinds["normal"]

    first = drawn(draws=2)
    assert torch.equal(drawn(draws=3)[:2], first)
    for other in (first[1:], drawn(draws=1, seed=1)):
        kept = (other[0] == first[0]).all(dim=1).double().mean()
        assert kept < 0.3  # by chance 1 of 16 patches


def test_registers_have_rows_of_their_own(photos: Path) -> None:
    torch.manual_seed(0)
    config = ViTConfig(image_size=32, patch_size=8, embed_dim=WIDTH, depth=1, num_heads=3, registers=2)
    model = VisionTransformer(config).eval()
    examples = tokens.open_splits(None, photos).val
    found = tokens.collect(model, examples, TokensOptions(batch_size=7), None, 0)
    images = torch.stack([model.preprocess(examples.read(index)) for index in range(len(examples))])
    with torch.no_grad():
        registers = model(images).registers
    assert list(found.kinds) == ["cls", "register_0", "register_1", "normal"]
    for index in range(2):
        torch.testing.assert_close(found.kinds[f"register_{index}"][0], registers[:, index])


def test_several_draws_give_the_mean_and_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "STRENGTHS", STRENGTHS[20:30:3])
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    signal = torch.nn.functional.one_hot(labels, 6).double()
    noise = torch.randn(2, 60, 6, generator=generator).double()
    there, none = torch.ones(60, dtype=torch.bool), torch.zeros(60, dtype=torch.bool)

    def of(draws: Tensor) -> tokens.Metric:
        both = tokens.Tokens({"normal": draws}, there, none, labels)
        return tokens.judge(both, both, "normal", TokensOptions(), 3)[1]

    both = of(torch.stack([signal, noise[1]]))
    each = [of(one[None]) for one in (signal, noise[1])]
    assert each[0].value == 1 > each[1].value
    assert both.value == pytest.approx((each[0].value + each[1].value) / 2)
    assert both.note == f"mean of 2 draws: 1.0000, {each[1].value:.4f}"
    assert each[0].note == ""


def test_mean_average_precision_is_averaged_over_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(40, 3, generator=generator).double() for _ in range(2)]
    truth = (torch.rand(40, 3, generator=generator) < 0.4).long()
    name, metric = tokens.average(scores, truth, 0)
    theirs = [average_precision_score(truth.numpy(), one.numpy(), average="macro") for one in scores]
    assert name == "map"
    assert metric.value == pytest.approx(np.mean(theirs))
    assert metric.ci95[0] < metric.value < metric.ci95[1]


def test_every_patch_is_drawn_as_often() -> None:
    patches = torch.arange(4.0)[None, :, None].expand(4000, 4, 1)
    among = torch.tensor([True, False, True, True]).expand(4000, 4)
    drawn = tokens.draw(patches, among, torch.Generator().manual_seed(0)).flatten().long()
    assert (torch.bincount(drawn, minlength=4) / 4000).tolist() == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3], abs=0.03)


def test_the_score_is_that_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    features = torch.nn.functional.one_hot(labels, 6) + torch.randn(90, 6, generator=generator)
    there, none = torch.ones(90, dtype=torch.bool), torch.zeros(90, dtype=torch.bool)
    both = tokens.Tokens({"cls": features[None]}, there, none, labels)
    name, metric = tokens.judge(both, both, "cls", TokensOptions(), 3)
    rest, held = hold_out(90, 0.1, 0)

    def fit(strength: float, chosen: Tensor) -> LogisticRegression:
        return LogisticRegression(C=strength, max_iter=5000, tol=1e-8).fit(features[chosen], labels[chosen])

    best = max(STRENGTHS, key=lambda strength: fit(strength, rest).score(features[held], labels[held]))
    assert name == "cls_top1"
    assert metric.value == pytest.approx(fit(best, torch.arange(90)).score(features, labels))


def test_too_few_images_with_outliers_are_refused(telling: type[Telling], photos: Path) -> None:
    with pytest.raises(InputError, match=r"only 0 training and 0 other images .* above and below 1000; give another"):
        tokens.run(telling(outliers=True), TokensOptions(data=photos, cutoff=1000), photos)


def test_too_few_images_without_outliers_are_refused(telling: type[Telling], photos: Path) -> None:
    for path in photos.glob("train/*/*"):
        if int(path.stem) > 7:
            path.unlink()
    with pytest.raises(InputError, match="8 training and 60 other images; give 10 or more to train on"):
        tokens.run(telling(outliers=False), TokensOptions(data=photos), photos)


def test_automatic_registers_are_refused() -> None:
    with pytest.raises(InputError, match="--registers auto"):
        TokensOptions(model=("x",), registers="auto").needs()
