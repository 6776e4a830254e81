"""An exam against the model run by hand on the images of its sample."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from vitreg_core import create_model
from vitreg_core.data.images import read_image
from vitreg_core.data.scenes import draw_scenes
from vitreg_core.planted import plant_register_neurons
from vitreg_core.vit import VisionTransformer
from vitreg_eval.analyses.neighbours import neighbour_similarity, similarity_by_kind
from vitreg_eval.analyses.position_probe import probe_positions
from vitreg_eval.config import DoctorOptions
from vitreg_eval.datasets import Batch, ImageSet, TolerantSet
from vitreg_eval.exam import Exam, sample_size
from vitreg_eval.plain import plain
from vitreg_eval.remedies import open_images
from vitreg_eval.results import DataRecord
from vitreg_eval.survey import survey

GRID = (8, 8)
SMALL = {"image_size": 64, "depth": 4, "embed_dim": 96, "layer_scale": 0.1, "registers": 2}


def small() -> VisionTransformer:
    """A random model, whose patches differ by their positions."""
    torch.manual_seed(0)
    model = create_model("vit_ti8", **SMALL).eval()
    with torch.no_grad():
        model.positions.patches.mul_(20)
    return model


def exam_of(model: VisionTransformer, images: TolerantSet, options: DoctorOptions, folder: Path, most: int) -> Exam:
    """An exam as the doctor makes it."""
    found = survey(model, images, options, folder)
    return Exam("model", model, found, options, min(most, sample_size(model, found)))


@torch.no_grad()
def norms_by_hand(model: VisionTransformer, images: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n depth p"]:
    layers = model.intermediate(images, range(model.depth), norm=False)
    return torch.stack([layer.patches.norm(dim=-1) for layer in layers], dim=1)


def outliers_by_hand(exam: Exam, images: Float[Tensor, "n 3 height width"]) -> Bool[Tensor, "n p"]:
    assert isinstance(exam.model, VisionTransformer)
    logs = np.log(norms_by_hand(exam.model, images)[:, exam.diagnosis.block].double().numpy())
    return torch.from_numpy(logs - np.median(logs, axis=1, keepdims=True) > exam.diagnosis.judged.cut)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Exam:
    """Forty scenes, on a model with outliers; the sample is all of them."""
    clean = small()
    model, _ = plant_register_neurons(clean, clean.preprocess.normalize(draw_scenes(96, 3).image), layer=1)
    options = DoctorOptions(test_images=40)
    return exam_of(model, open_images(model, options), options, tmp_path_factory.mktemp("survey"), 40)


@pytest.fixture
def photos(tmp_path: Path) -> Iterator[Path]:
    """Eleven photos of several sizes and brightnesses; the third and the seventh cannot be read."""
    numbers = np.random.default_rng(0)
    for index in range(11):
        pixels = numbers.integers(0, 30 + 20 * index, (70 + index, 90 - index, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index:02}.png")
    for index in (2, 6):
        (tmp_path / f"{index:02}.png").write_bytes(b"no picture")
    return tmp_path


def test_norms_of_a_sample_are_those_of_its_photos(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    model, options = small(), DoctorOptions(images=photos, batch_size=4)
    exam = exam_of(model, open_images(model, options), options, tmp_path_factory.mktemp("survey"), 5)
    sample = exam.sample
    assert sample.rows.tolist() == [0, 1, 4, 7, 9]  # every other one of the nine that can be read, rounded down
    read = [model.preprocess(read_image(photos / f"{row:02}.png")) for row in sample.rows.tolist()]
    torch.testing.assert_close(sample.images, torch.stack(read))
    torch.testing.assert_close(sample.norms, norms_by_hand(model, sample.images))


def test_the_sample_of_drawn_scenes_is_the_first_ones(planted: Exam) -> None:
    assert isinstance(planted.model, VisionTransformer)
    first = next(planted.survey.images.images.batches(0, 40)).images
    assert torch.equal(planted.sample.images, first)
    torch.testing.assert_close(planted.sample.norms, norms_by_hand(planted.model, first))
    by_hand = outliers_by_hand(planted, first)
    assert torch.equal(planted.sample.outliers, by_hand)
    assert 0.01 < by_hand.double().mean() < 0.1


def test_the_position_probe_reads_the_patches_and_their_outliers(planted: Exam) -> None:
    images = planted.sample.images
    with torch.no_grad():
        patches = planted.model.features(images).patches
    by_hand = probe_positions(patches, outliers_by_hand(planted, images), GRID, seed=0)
    assert plain(planted.position_probe) == plain(by_hand)
    assert by_hand.top1.normal.metric.value != by_hand.top1.outlier.metric.value


@torch.no_grad()
def test_likeness_of_neighbours_is_that_of_embeddings_and_of_output(planted: Exam) -> None:
    images = planted.sample.images
    outliers = outliers_by_hand(planted, images)
    tokens = {"input": planted.model.embeddings(images), "output": planted.model.features(images).patches}
    for name, found in (("input", planted.input_neighbours), ("output", planted.output_neighbours)):
        by_hand = similarity_by_kind(neighbour_similarity(tokens[name], GRID), outliers)
        assert (found.normal_pairs, found.outlier_pairs) == (by_hand.normal_pairs, by_hand.outlier_pairs)
        assert found.normal_median == pytest.approx(by_hand.normal_median, abs=1e-5)
        assert found.outlier_median == pytest.approx(by_hand.outlier_median, abs=1e-5)
        assert found.auroc == pytest.approx(by_hand.auroc, abs=1e-3)
    assert planted.input_neighbours.normal_median != pytest.approx(planted.output_neighbours.normal_median, abs=0.05)


def test_wide_images_keep_rows_and_columns_apart(planted: Exam, tmp_path: Path) -> None:
    model = planted.model
    scenes = draw_scenes(40, 5, image_size=96).image[:, :, :64]
    images = model.preprocess.normalize(scenes)
    record = DataRecord(name="wide", split="test", n=40, hash="wide")
    drawn = ImageSet(record, lambda start, stop: iter([Batch(images[start:stop], {})]), {})
    exam = exam_of(model, TolerantSet(drawn, []), DoctorOptions(), tmp_path, 40)
    assert exam.survey.grid == (8, 12)
    assert exam.positions.share.shape == (8, 12)
    share = outliers_by_hand(exam, images).double().mean(dim=0).reshape(8, 12)
    np.testing.assert_allclose(exam.positions.share, share, atol=1e-6)
    with torch.no_grad():
        attention = model.attention(images, -1).mean(dim=1)[:, 0, 3:]  # a class token, two registers
    looked = (attention / attention.sum(dim=1, keepdim=True)).mean(dim=0).reshape(8, 12)
    np.testing.assert_allclose(exam.focus.maps[0], looked, atol=1e-5)
