import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score
from vitreg_core.errors import InputError
from vitreg_eval.analyses.overlap import best_iou, map_overlap, overlap_by_class, plot_class_overlap, plot_overlap


def test_best_iou_equals_scikit_learn_over_all_thresholds() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randint(0, 6, (8, 3, 4, 5), generator=generator).float()  # with ties
    masks = torch.rand(8, 4, 5, generator=generator) < 0.4
    found = best_iou(maps, masks)
    for image, token in np.ndindex(8, 3):
        values, truth = maps[image, token].flatten(), masks[image].flatten()
        tried = [jaccard_score(truth, values >= cut) for cut in values.unique()]
        assert found[image, token].item() == pytest.approx(max(tried))


def test_a_map_equal_to_the_mask_has_iou_one_and_an_even_one_takes_all_patches() -> None:
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[0, 1:3, 1:3] = masks[1, 0, :2] = True
    maps = torch.stack([masks.float(), torch.ones(2, 4, 4), 1 - masks.float()], dim=1)
    found = map_overlap(maps, masks, class_token=True)
    np.testing.assert_allclose(found.iou, [[1, 4 / 16, 4 / 16], [1, 2 / 16, 2 / 16]])
    np.testing.assert_allclose(found.mean, [1, 3 / 16, 3 / 16])
    assert found.spread[1] == pytest.approx(np.std([4 / 16, 2 / 16], ddof=1))
    assert found.floor == pytest.approx(3 / 16)
    assert [one.value for one in found.best] == [0.5, 0.5]  # equal registers share every image
    np.testing.assert_allclose(found.swapped[0], 3 / 16)  # the other image's object is elsewhere


def test_the_register_that_captures_objects_is_told_from_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(60, 6, 6, generator=generator) < 0.3
    maps = torch.rand(60, 4, 6, 6, generator=generator)
    maps[:, 2] += masks  # register 1
    found = map_overlap(maps, masks, class_token=True)
    assert found.consistent == ("register 1",)
    assert found.best[1].value == 1
    assert found.chance == pytest.approx(1 / 3)
    even = map_overlap(torch.rand(60, 4, 6, 6, generator=generator), masks, class_token=True)
    assert even.consistent == ()


def test_images_without_objects_are_left_out() -> None:
    masks = torch.zeros(3, 2, 2, dtype=torch.bool)
    masks[1, 0, 0] = True
    found = map_overlap(torch.rand(3, 2, 2, 2), masks, class_token=True)
    assert (len(found.iou), found.left_out, found.best) == (1, 2, ())
    np.testing.assert_array_equal(found.spread, [0, 0])
    with pytest.raises(InputError, match="none of 2 masks has an object on the patch grid; give images with objects"):
        map_overlap(torch.rand(2, 2, 2, 2), masks[::2], class_token=True)


def test_each_class_counts_the_images_that_show_it() -> None:
    classes = torch.tensor([[[1, 1], [0, 2]], [[0, 0], [1, 255]], [[0, 0], [0, 0]]])
    maps = torch.rand(3, 2, 2, 2)
    maps[:, 1] = (classes == 1).float()
    found = overlap_by_class(maps, classes, {1: "dog", 2: "cat", 3: "cow"}, class_token=False)
    assert (found.classes, found.images) == (("dog", "cat"), (2, 1))
    assert found.mean[0, 1] == 1
    assert found.spread[0, 1] == 0
    assert found.mean[1, 0] == best_iou(maps[:1], classes[:1] == 2)[0, 0]
    with pytest.raises(InputError, match="no patch of 3 images has one of the 1 classes"):
        overlap_by_class(maps, classes, {9: "cow"}, class_token=False)


def test_plots_show_the_numbers() -> None:
    masks = torch.rand(9, 4, 4) < 0.5
    found = map_overlap(torch.rand(9, 3, 4, 4), masks, class_token=True)
    figure = plot_overlap(found)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["cls", "register 0", "register 1"]
    assert len(figure.axes) == 2
    assert len(plot_overlap(map_overlap(torch.rand(9, 1, 4, 4), masks, class_token=True)).axes) == 1
    classes = overlap_by_class(torch.rand(9, 3, 4, 4), masks.long(), {0: "other", 1: "object"}, class_token=True)
    np.testing.assert_array_equal(plot_class_overlap(classes).axes[0].images[0].get_array(), classes.mean.numpy())
