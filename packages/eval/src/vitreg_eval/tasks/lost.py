"""LOST on a data set: one box per image from frozen features, and how often it is right."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm
from vitreg_core.errors import InputError
from vitreg_core.features import Backbone
from vitreg_core.weights.files import weights_hash

from vitreg_eval import sweep
from vitreg_eval.analyses.boxes import plot_boxes
from vitreg_eval.analyses.sweep import plot_sweep
from vitreg_eval.baselines import center_box, full_box, random_box
from vitreg_eval.box_files import FoundBox, write_boxes
from vitreg_eval.config import LostOptions
from vitreg_eval.datasets import photos as photo_sets
from vitreg_eval.datasets.photos import Boxes, Photo, PhotoFile, PhotoSet
from vitreg_eval.discovery import Box, Discovery, View
from vitreg_eval.files import save_figure
from vitreg_eval.journal import Entry, Journal
from vitreg_eval.lost_steps import draw_steps
from vitreg_eval.metrics import Metric, measure
from vitreg_eval.results import Outcome, make_folder, write_json
from vitreg_eval.search import Finds, Item, relative, search_items, settings_of

PICTURES = 12
ALIKE_SHARE = 0.5
"""Above this share of whole-image boxes, the reader is told."""
LISTED = 5
"""Names of images that a note gives."""


@dataclass(frozen=True)
class Find:
    """What was found in one image; pixels are kept for the pictures only."""

    name: str
    image_size: tuple[int, int]
    boxes: Boxes | None
    discovery: Discovery
    pixels: Float[Tensor, "3 height width"] | None = None
    patch_size: int = 1

    @property
    def correct(self) -> bool | None:
        """Whether the box meets a true one (IoU at least 0.5); None where there are none."""
        if self.boxes is None:
            return None
        return bool(hits(entry_of(0, self), self.boxes)[0])


@dataclass(frozen=True)
class Known:
    """What is known of an image without searching it."""

    name: str
    image_id: int
    boxes: Boxes | None


@dataclass
class Roll:
    """The images of a set as they pass by: what is known of each, and those that are drawn."""

    pictured: Sequence[int]
    known: list[Known] = field(default_factory=list)
    shown: dict[int, Photo | PhotoFile] = field(default_factory=dict)

    def items(self, photos: Iterable[Photo | PhotoFile]) -> Iterator[Item]:
        """Number the images and remember them."""
        for index, photo in enumerate(photos):
            self.known.append(Known(photo.name, photo.image_id, photo.boxes))
            if index in self.pictured:
                self.shown[index] = photo
            yield Item(index, photo)


def run(backbone: Backbone, options: LostOptions, out: Path) -> Outcome:
    """CorLoc, 0 to 1, and diagnostics; writes boxes as JSON, COCO's results and LOST's pickle, and pictures.

    A search that was stopped goes on where it was, with the journal of finished images in `out` (or --cache). Processes
    that a launcher started share the images.

    Raises:
        InputError: missing or damaged data, an image smaller than a patch, features that are not finite.
    """
    options = options.resolved()
    photo_set = open_photos(backbone, options)
    if options.sweep and isinstance(photo_set.photos, list):
        refuse_unjudged(photo_set)
    roll = Roll(spread(photo_set.data.n, PICTURES))
    state = PartialState()
    journal = open_journal(backbone, photo_set, options, out)
    with journal:
        items = (
            item
            for item in roll.items(photo_set.photos)
            if item.number % state.num_processes == state.process_index and item.number not in journal.finished
        )
        total = -(-photo_set.data.n // state.num_processes)
        for finds in tqdm(
            search_items(backbone, items, options), total=total, desc="lost", unit="image", disable=None, leave=False
        ):
            journal.add(entry_of_finds(finds))
    state.wait_for_everyone()
    entries = sorted(journal.entries())
    state.wait_for_everyone()
    if len(entries) != len(roll.known):
        raise InputError(f"{len(entries)} of {len(roll.known)} images were searched; run the same command again")
    outcome = report(backbone, photo_set, roll, entries, options, out)
    if state.is_main_process:
        journal.remove()
    return outcome


def open_photos(backbone: Backbone, options: LostOptions) -> PhotoSet:
    """The images that the options name."""
    return photo_sets.open_photos(backbone.preprocess, options)


def refuse_unjudged(photo_set: PhotoSet) -> None:
    """Refuse to choose among settings by images that have no true boxes, before any is searched."""
    if not any(photo.boxes is not None and len(photo.boxes) for photo in photo_set.photos):
        raise InputError(
            f"--sweep on {photo_set.data.n} images of {photo_set.data.name} {photo_set.data.split}, none of which has "
            "a true box to judge by; check the annotations, or leave out --sweep"
        )


def open_journal(backbone: Backbone, photo_set: PhotoSet, options: LostOptions, out: Path) -> Journal:
    """The journal of this search: model, settings and images make its key; all processes share its folder."""
    without = {"model", "out", "device", "cache", "batch_size", "steps"}
    content = [options.model_dump(mode="json", exclude=without), photo_set.data.hash]
    content.append(weights_hash(cast(nn.Module, backbone)))
    key = sha256(json.dumps(content).encode()).hexdigest()
    if options.cache is not None:
        folder = options.cache / f"lost-{key[:16]}"
        make_folder(folder)
    else:
        folder = Path(broadcast_object_list([str(out)])[0])
    return Journal(folder, key, PartialState().process_index)


def report(
    backbone: Backbone,
    photo_set: PhotoSet,
    roll: Roll,
    entries: Sequence[Entry],
    options: LostOptions,
    out: Path,
) -> Outcome:
    """Everything that a finished search gives."""
    write_boxes(out, [found_box(entry, known) for entry, known in zip(entries, roll.known, strict=True)])
    save_figure(draw_found(roll, entries), out / "boxes.png")
    drawn = spread(len(roll.shown), options.steps)
    shown = sorted(roll.shown.items())
    save_figure(draw_steps(backbone, [Item(*shown[index]) for index in drawn], options), out / "steps.png")
    metrics = evaluate_entries(entries, roll.known, backbone.patch_size, options.seed)
    notes = [f"boxes of all images in {out / 'boxes.json'}, pictures in {out / 'boxes.png'} and {out / 'steps.png'}"]
    notes += [*alike_note(metrics, options), *photo_set.notes, *missing_notes(entries, roll.known)]
    if options.preset is not None:
        notes.append(
            f"preset {options.preset} on {options.features}: keys for DINOv2, values for DeiT-III and OpenCLIP"
        )
    if options.sweep:
        chosen, lines = report_sweep(entries, roll.known, metrics["corloc_whole_image"].value, options, out)
        metrics |= chosen
        notes += lines
    return Outcome(metrics, photo_set.data, notes)


def report_sweep(
    entries: Sequence[Entry], known: Sequence[Known], whole_image: float, options: LostOptions, out: Path
) -> tuple[dict[str, Metric], list[str]]:
    """The metrics of both choices, and the table; writes sweep.json and sweep.png."""
    judged = [(entry, one) for entry, one in zip(entries, known, strict=True) if has_boxes(one)]
    names = [one.name for _, one in judged]
    correct = torch.stack([hits(entry, cast(Tensor, one.boxes)) for entry, one in judged])
    settings = settings_of(options)
    metrics, chosen = sweep.chosen_metrics(names, correct, options.seed)
    common = options.model_dump(include={"k_patches", "center", "normalize", "outliers", "preset"})
    choices = {
        name: {**settings[index]._asdict(), **metrics[f"corloc_{name.replace('-', '_')}"].model_dump()}
        for name, index in chosen.items()
    }
    content = {"common": {**common, "relative_bias": relative(options)}, "choices": choices}
    write_json(out / "sweep.json", {**content, "curve": sweep.curve(settings, correct, options.seed)})
    lines = {
        f"{facet} {layer}": sorted(
            (setting.bias, float(correct[:, index].double().mean()))
            for index, setting in enumerate(settings)
            if (setting.features, setting.layer) == (facet, layer)
        )
        for facet, layer in dict.fromkeys((setting.features, setting.layer) for setting in settings)
    }
    save_figure(plot_sweep(lines, whole_image, relative(options)), out / "sweep.png")
    told = [
        f"{name}: {settings[index].features} of block {settings[index].layer}, bias {settings[index].bias:g}"
        for name, index in chosen.items()
    ]
    where = f"the whole curve in {out / 'sweep.json'} and {out / 'sweep.png'}; boxes and corloc are of the options' own"
    return metrics, [*sweep.table(settings, correct), *told, f"{where} setting"]


def search(
    backbone: Backbone,
    photos: Iterable[Photo | PhotoFile],
    options: LostOptions,
    pictured: Sequence[int] = (),
) -> list[Find]:
    """Search images with one setting, in memory; `pictured` images keep their pixels."""
    items = (Item(index, photo) for index, photo in enumerate(photos))
    finds = sorted(search_items(backbone, items, options), key=lambda one: one.item.number)
    return [
        Find(
            one.item.photo.name,
            one.item.photo.size,
            one.item.photo.boxes,
            one.found[0],
            one.item.photo.pixels if one.item.number in pictured else None,
            backbone.patch_size,
        )
        for one in finds
    ]


def evaluate(found: Sequence[Find], seed: int) -> dict[str, Metric]:
    """As `evaluate_entries`, of a search in memory."""
    known = [Known(find.name, index, find.boxes) for index, find in enumerate(found)]
    return evaluate_entries([entry_of(*pair) for pair in enumerate(found)], known, found[0].patch_size, seed)


def evaluate_entries(entries: Sequence[Entry], known: Sequence[Known], patch_size: int, seed: int) -> dict[str, Metric]:
    """CorLoc over the images with true boxes, that of boxes that no model is needed for, and signs of trouble."""
    judged = [(entry, one) for entry, one in zip(entries, known, strict=True) if has_boxes(one)]
    metrics = {}
    if judged:
        rows = []
        for entry, one in judged:
            boxes = cast(Tensor, one.boxes)
            plain = torch.tensor(baseline_boxes(entry, one.name, patch_size, seed))
            rows.append(torch.cat([hits(entry, boxes)[:1], sweep.meets(plain, boxes)]))
        names = ("corloc", "corloc_whole_image", "corloc_center", "corloc_random")
        columns = torch.stack(rows).unbind(dim=1)
        metrics = {name: measure(column, seed=seed) for name, column in zip(names, columns, strict=True)}
    for name in ("full_image", "seed_on_border"):
        share = torch.tensor([bool(entry.diagnostics[name]) for entry in entries])
        metrics[f"{name}_share"] = measure(share, seed=seed)
    return metrics


def baseline_boxes(entry: Entry, name: str, patch_size: int, seed: int) -> list[Box]:
    """The whole image, its centre, and a random box of whole patches."""
    height, width = entry.size
    grid = -(-height // patch_size), -(-width // patch_size)
    view = View(grid=grid, patch_size=patch_size, image_size=entry.size, name=name)
    return [full_box(view).box, center_box(view).box, random_box(view, seed=seed).box]


def hits(entry: Entry, boxes: Int[Tensor, "n 4"]) -> Bool[Tensor, " settings"]:
    """Whether the box of each setting meets a true one; a failed search does not."""
    found = torch.tensor([box or [0, 0, 0, 0] for box in entry.boxes])
    return sweep.meets(found, boxes)


def has_boxes(known: Known) -> bool:
    """Whether an image counts in CorLoc."""
    return known.boxes is not None and len(known.boxes) > 0


def entry_of_finds(finds: Finds) -> Entry:
    """What the journal keeps of an image."""
    boxes = [None if one.failed else [int(value) for value in one.box] for one in finds.found]
    return Entry(finds.item.number, finds.item.photo.size, boxes, finds.found[0].diagnostics())


def entry_of(index: int, find: Find) -> Entry:
    """The same of a search in memory."""
    box = None if find.discovery.failed else [int(value) for value in find.discovery.box]
    return Entry(index, find.image_size, [box], find.discovery.diagnostics())


def found_box(entry: Entry, known: Known) -> FoundBox:
    """One image for the files; a search that failed gives the whole image."""
    height, width = entry.size
    x0, y0, x1, y1 = entry.boxes[0] or (0, 0, width, height)
    correct = bool(hits(entry, cast(Tensor, known.boxes))[0]) if has_boxes(known) else None
    return FoundBox(known.name, known.image_id, (x0, y0, x1, y1), correct, entry.diagnostics)


def alike_note(metrics: dict[str, Metric], options: LostOptions) -> list[str]:
    """What to do where features tell nothing."""
    share = metrics["full_image_share"].value
    if share <= ALIKE_SHARE or options.method == "full":
        return []
    return [
        f"nothing but the whole image was found in {share:.0%} of the images: their {options.features} are all "
        "alike; try --features values, --center or --bias"
    ]


def missing_notes(entries: Sequence[Entry], known: Sequence[Known]) -> list[str]:
    """Images that CorLoc leaves out, and those that count as misses though nothing was found."""
    empty = [one.name for one in known if one.boxes is not None and not len(one.boxes)]
    failed = [one.name for entry, one in zip(entries, known, strict=True) if entry.boxes[0] is None]
    notes = [f"{len(empty)} images without true boxes are left out of CorLoc: {listed(empty)}"] if empty else []
    lost = f"{len(failed)} searches failed and count as misses, with the whole image as box: {listed(failed)}"
    return [*notes, lost] if failed else notes


def listed(names: Sequence[str]) -> str:
    """The first few names."""
    return ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")


def spread(total: int, count: int) -> list[int]:
    """Up to `count` indices below `total`, evenly spread."""
    return [index * total // count for index in range(count)] if total > count else list(range(total))


def draw_found(roll: Roll, entries: Sequence[Entry]) -> Figure:
    """Some images, with true boxes and what was found."""
    shown = sorted(roll.shown.items())
    boxes = [found_box(entries[index], roll.known[index]).box for index, _ in shown]
    true = [[] if photo.boxes is None else photo.boxes.tolist() for _, photo in shown]
    return plot_boxes([photo.pixels.permute(1, 2, 0).numpy() for _, photo in shown], boxes, true)
