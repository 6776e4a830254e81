import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from vitreg_core import VisionTransformer, ViTConfig, create_model, load_model, save_model
from vitreg_core.data.scenes import draw_scenes
from vitreg_core.errors import InputError
from vitreg_core.features import QKV
from vitreg_core.planted import plant_register_neurons
from vitreg_eval.config import (
    ClassifyOptions,
    DepthOptions,
    DoctorOptions,
    KnnOptions,
    LinearOptions,
    LostOptions,
    NormsOptions,
    SegmentOptions,
)
from vitreg_eval.datasets import scenes
from vitreg_eval.extract import all_tokens, extract
from vitreg_eval.search import pad_to_patches
from vitreg_eval.tasks import classify, depth, doctor, knn, linear, lost, norms, segment
from vitreg_eval.training import evaluations

CONFIG = ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, registers=2, num_classes=3)
SMALL = {"train_images": 96, "test_images": 64}


@pytest.fixture
def model() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(CONFIG).eval()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of random photos in train and val."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 4)):
        for index in range(count):
            folder = tmp_path / "photos" / split / f"class{index % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (40 + index, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "photos"


def test_training_and_test_scenes_never_meet(model: VisionTransformer) -> None:
    sets = [scenes(model.preprocess, 100, seed, split) for seed in (0, 1) for split in ("train", "test")]
    drawn = [image.numpy().tobytes() for image_set in sets for batch in image_set.batches() for image in batch.images]
    assert len(drawn) == len(set(drawn)) == 400
    assert len({image_set.data.hash for image_set in sets}) == 4


def test_features_of_a_set_are_those_of_its_images(model: VisionTransformer) -> None:
    image_set = scenes(model.preprocess, 70, 0, "test")
    found = extract(model, image_set, KnnOptions(), all_tokens(model))
    batches = list(image_set.batches())
    with torch.no_grad():
        expected = model(batches[1].images)
    assert expected.cls is not None
    torch.testing.assert_close(found.cls[64:], expected.cls)
    torch.testing.assert_close(found.features.patches[64:], expected.patches)
    assert torch.equal(found.targets["label"][64:], batches[1].targets["label"])


def test_probes_on_scenes_give_numbers_with_intervals(model: VisionTransformer, tmp_path: Path) -> None:
    outcomes = {
        "knn": knn.run(model, KnnOptions(**SMALL, k=5), tmp_path),
        "linear": linear.run(model, LinearOptions(**SMALL, steps=3), tmp_path),
        "segment": segment.run(model, SegmentOptions(**SMALL, steps=3), tmp_path),
        "depth": depth.run(model, DepthOptions(**SMALL, steps=3), tmp_path),
    }
    for outcome in outcomes.values():
        assert outcome.data.n == 64
        for metric in outcome.metrics.values():
            assert metric.n == 64
            assert metric.ci95 is not None
            assert metric.ci95[0] <= metric.value <= metric.ci95[1]
    assert outcomes["knn"].metrics == knn.run(model, KnnOptions(**SMALL, k=5), tmp_path).metrics


def test_probes_read_folders(model: VisionTransformer, photos: Path, tmp_path: Path) -> None:
    outcome = knn.run(model, KnnOptions(data=photos, k=3), tmp_path)
    assert (outcome.data.n, outcome.data.split) == (4, "val")


def test_splits_with_other_classes_are_refused(model: VisionTransformer, photos: Path) -> None:
    (photos / "val" / "class1").rename(photos / "val" / "other")
    with pytest.raises(InputError, match=r"classes only in train or only in val: \['class1', 'other'\]"):
        knn.run(model, KnnOptions(data=photos), photos)
    with pytest.raises(InputError, match=r"class folders only in train or val: \['class1', 'other'\]; make them equal"):
        evaluations(photos, "label", "fp32")


def test_classify_counts_what_the_head_gets_right(model: VisionTransformer, photos: Path, tmp_path: Path) -> None:
    assert model.head is not None
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([0.0, 1.0, -1.0]))
    outcome = classify.run(model, ClassifyOptions(data=photos / "val"), tmp_path)
    assert outcome.metrics["top1"].value == 0.5
    assert outcome.notes == ["warning: the head has 3 outputs; the 2 class folders are taken for its first ones"]
    with pytest.raises(InputError, match="no data: give --data DIR or set VITREG_DATA"):
        classify.run(model, ClassifyOptions(), tmp_path)


def test_classify_refuses_more_classes_than_outputs(model: VisionTransformer, photos: Path, tmp_path: Path) -> None:
    for name in ("x", "y"):
        (photos / "val" / name).mkdir()
        Image.new("RGB", (40, 40)).save(photos / "val" / name / "1.png")
    with pytest.raises(InputError, match="4 class folders, the head has 3 outputs"):
        classify.run(model, ClassifyOptions(data=photos / "val"), tmp_path)


def test_an_unreadable_image_stops_an_evaluation_by_name(
    model: VisionTransformer, photos: Path, tmp_path: Path
) -> None:
    (photos / "val" / "class0" / "0.png").write_text("no picture")
    with pytest.raises(InputError, match=r"0\.png: not a readable image"):
        classify.run(model, ClassifyOptions(data=photos / "val"), tmp_path)


def test_lost_pads_after_normalising_and_gives_boxes_inside_the_image(model: VisionTransformer, photos: Path) -> None:
    images = torch.randn(1, 3, 41, 50)
    padded = pad_to_patches(images, 8)
    assert padded.shape == (1, 3, 48, 56)
    assert torch.equal(padded[..., :41, :50], images)
    assert padded[..., 41:, :].abs().sum() == padded[..., 50:].abs().sum() == 0
    options = LostOptions(images=photos, batch_size=2)
    found = lost.search(model, lost.open_photos(model, options).photos, options, pictured=[1])
    assert len(found) == 10
    for find in found:
        height, width = find.image_size
        x0, y0, x1, y1 = find.discovery.box
        assert 0 <= x0 < x1 <= width
        assert 0 <= y0 < y1 <= height
        assert find.correct is None
    assert [find.pixels is not None for find in found] == [False, True] + [False] * 8
    alone = lost.search(model, lost.open_photos(model, options).photos, options.model_copy(update={"batch_size": 1}))
    assert [find.discovery.box for find in alone] == [find.discovery.box for find in found]


class Oracle(VisionTransformer):
    """Keys that are +1 on objects and -1 elsewhere, read off a colour that only the background has."""

    def qkv(self, images: torch.Tensor, layer: int) -> QKV:
        parts = super().qkv(images, layer)
        background = F.avg_pool2d(images[:, :1], self.patch_size).flatten(1) < 0
        signs = torch.where(background, 1.0, -1.0)[:, None, :, None]
        keys = parts.keys.clone()
        keys[:, :, self.num_prefix_tokens :] = signs
        return QKV(parts.queries, keys, parts.values)


def test_lost_measures_corloc_on_true_boxes() -> None:
    oracle = Oracle(CONFIG)
    pixels = torch.zeros(3, 32, 32)
    pixels[:, 8:24, 8:16] = 1.0
    right, wrong = torch.tensor([[8, 8, 16, 24]]), torch.tensor([[20, 20, 32, 32]])
    photos = [lost.Photo("a", pixels, right), lost.Photo("b", pixels, wrong), lost.Photo("c", pixels, None)]
    found = lost.search(oracle, iter(photos), LostOptions())
    assert [find.discovery.box for find in found] == [(8, 8, 16, 24)] * 3
    assert [find.correct for find in found] == [True, False, None]
    measured = lost.evaluate(found, seed=0)
    assert (measured["corloc"].value, measured["corloc"].n) == (0.5, 2)
    assert measured["full_image_share"].value == 0


def test_lost_writes_boxes_and_pictures(model: VisionTransformer, tmp_path: Path) -> None:
    outcome = lost.run(model, LostOptions(test_images=5), tmp_path)
    records = json.loads((tmp_path / "boxes.json").read_text())
    assert len(records) == outcome.metrics["corloc"].n == 5
    assert outcome.metrics["corloc"].value == np.mean([record["correct"] for record in records])
    with Image.open(tmp_path / "boxes.png") as picture:
        assert picture.width > 100


def test_lost_says_when_the_features_are_all_alike(model: VisionTransformer, tmp_path: Path) -> None:
    with torch.no_grad():
        model.block(1).attn.qkv.bias[24:48] = 100.0
    outcome = lost.run(model, LostOptions(test_images=5), tmp_path)
    assert outcome.metrics["full_image_share"].value == 1
    assert "found in 100% of the images: their keys are all alike; try --features values" in outcome.notes[1]


def test_norms_are_those_of_the_residual_stream(model: VisionTransformer, tmp_path: Path) -> None:
    options = NormsOptions(test_images=20)
    outcome = norms.run(model, options, tmp_path)
    images = next(iter(scenes(model.preprocess, 20, 0, "test").batches())).images
    with torch.no_grad():
        last = model.stream(images).norm(dim=-1)
    assert outcome.metrics["cls"].value == pytest.approx(last[:, 0].mean().item(), rel=1e-5)
    assert outcome.metrics["register_1"].value == pytest.approx(last[:, 2].mean().item(), rel=1e-5)
    assert outcome.metrics["patch_max"].value == pytest.approx(last[:, 3:].max(dim=1).values.mean().item(), rel=1e-5)
    assert len(json.loads((tmp_path / "norms.json").read_text())["patches_per_block"]) == 2


def test_the_doctor_finds_a_planted_artifact_and_none_in_a_clean_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    clean = create_model("vit_ti8", image_size=64, depth=4, embed_dim=96, layer_scale=0.1).eval()
    with torch.no_grad():
        clean.positions.patches.mul_(20)
    planted, _ = plant_register_neurons(clean, clean.preprocess.normalize(draw_scenes(96, 3).image), layer=1)
    options = DoctorOptions(test_images=128)
    sick = doctor.run(planted, options, tmp_path)
    assert sick.metrics["emergence_block"].value == 1
    assert 0.01 < sick.metrics["outlier_fraction"].value < 0.06
    assert ": artifacts: " in sick.notes[0]
    [findings] = json.loads((tmp_path / "findings.json").read_text()).values()
    assert [block["found"] for block in findings["blocks"]] == [False] + [True] * 3
    well = doctor.run(clean, options, tmp_path)
    assert well.metrics["outlier_fraction"].value == 0
    assert "cutoff" not in well.metrics
    assert ": no outlier mode" in well.notes[0]


def test_a_task_runs_on_a_saved_model(model: VisionTransformer, tmp_path: Path) -> None:
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    options = KnnOptions(**SMALL, k=5)
    assert knn.run(loaded, options, tmp_path).metrics == knn.run(model, options, tmp_path).metrics


WEIGHTS = Path("weights") / "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


@pytest.mark.real_data
def test_the_sample_vit_has_the_accuracy_that_its_page_gives(shared_data: Path, tmp_path: Path) -> None:
    """data/README.md: 80.8 % and 95.5 % on all 1,000 photos."""
    options = ClassifyOptions(data=shared_data / "imagenet-sample" / "val")
    outcome = classify.run(load_model(shared_data / WEIGHTS), options, tmp_path)
    assert outcome.metrics["top1"].n == 1000
    assert outcome.metrics["top1"].value == pytest.approx(0.808, abs=0.0015)
    assert outcome.metrics["top5"].value == pytest.approx(0.955, abs=0.0015)


@pytest.mark.real_data
def test_knn_on_imagenette_gives_the_accuracy_that_its_page_gives(shared_data: Path, tmp_path: Path) -> None:
    """data/README.md: 97.8 % with k = 20 and T = 0.07; one photo of 400 is 0.25 %."""
    options = KnnOptions(data=shared_data / "imagenette-224")
    outcome = knn.run(load_model(shared_data / WEIGHTS), options, tmp_path)
    assert (outcome.metrics["top1"].n, outcome.data.split) == (400, "val")
    assert outcome.metrics["top1"].value == pytest.approx(0.978, abs=0.006)


@pytest.mark.real_data
def test_the_doctor_finds_the_artifacts_of_the_sample_vit(shared_data: Path, tmp_path: Path) -> None:
    """reference/registers_analysis.md section 7: every image, about 2 %, abruptly in the second half."""
    options = DoctorOptions(images=shared_data / "imagenet-sample" / "val", limit=64)
    found = doctor.run(load_model(shared_data / WEIGHTS), options, tmp_path).metrics
    assert found["outlier_images"].value == 1.0
    assert 0.015 < found["outlier_fraction"].value < 0.03
    assert found["emergence_block"].value in {6, 7}
    assert 500 < found["max_norm"].value < 700


@pytest.mark.real_data
def test_lost_searches_every_voc_image(shared_data: Path, tmp_path: Path) -> None:
    options = LostOptions(dataset="voc07", data=shared_data / "VOCdevkit")
    outcome = lost.run(load_model("vit_ti32"), options, tmp_path)
    assert outcome.metrics["corloc"].n == 5
    assert {record["image"] for record in json.loads((tmp_path / "boxes.json").read_text())} == {
        path.name for path in (shared_data / "VOCdevkit/VOC2007/JPEGImages").iterdir()
    } & {
        f"{line.split()[0]}.jpg"
        for line in (shared_data / "VOCdevkit/VOC2007/ImageSets/Main/trainval.txt").read_text().splitlines()
    }
