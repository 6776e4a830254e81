from fractions import Fraction

import torch
from vitreg_eval.metrics import box_iou_at_least_half, corloc


def pixels_of(box: list[int]) -> set[tuple[int, int]]:
    return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}


def test_small_boxes_are_judged_as_by_counting_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    boxes = torch.randint(0, 7, (400, 2, 2), generator=generator).sort(dim=1).values.flatten(1)
    exact = 0
    for box, other in zip(boxes[:200], boxes[200:], strict=True):
        one, two = pixels_of(box.tolist()), pixels_of(other.tolist())
        iou = Fraction(len(one & two), len(one | two)) if one and two else Fraction(0)
        assert box_iou_at_least_half(box, other[None]).item() == (iou >= Fraction(1, 2))
        exact += iou == Fraction(1, 2)
    assert exact > 1


def test_an_exact_half_counts_and_one_pixel_less_does_not_at_any_size() -> None:
    for side in (2, 100, 333, 46_340, 100_000):  # the last two overflow 32 bits when multiplied
        box = torch.tensor([0, 0, side, 2 * side])
        others = torch.tensor([[0, 0, side, side], [0, 0, side, side - 1], [0, 0, side, 4 * side]])
        for whole in (torch.int64, torch.int32):
            assert box_iou_at_least_half(box.to(whole), others.to(whole)).tolist() == [True, False, True]


def test_one_box_per_image_meets_any_of_its_objects() -> None:
    predicted = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10], [5, 5, 9, 9]])
    objects = [
        torch.tensor([[50, 50, 60, 60], [0, 0, 10, 20]]),  # the second by 100 of 200
        torch.tensor([[0, 0, 10, 21], [5, 0, 15, 10]]),  # 100 of 210, 50 of 150
        torch.zeros(0, 4, dtype=torch.int64),
        torch.tensor([[5, 5, 9, 9]]),
    ]
    assert corloc(predicted, objects).tolist() == [True, False, False, True]
