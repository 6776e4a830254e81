"""Names of classes and the prompts that they stand in."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitreg_core.data.scenes import SHAPES
from vitreg_core.errors import InputError
from vitreg_core.extras import require

from vitreg_eval.text_files import read_lines

PLACE = "{}"
"""Where the name of a class stands in a template."""
WNID = re.compile(r"n\d{8}")
SCENE_TEMPLATES = tuple(f"a {PLACE} {shape} alone on a smooth background" for shape in SHAPES)
"""Captions of scenes with one object, for every shape; the class is its texture."""


@dataclass(frozen=True)
class Names:
    """Names of classes that may be chosen, and which of them the classes of the data are."""

    names: tuple[str, ...]
    positions: tuple[int, ...]
    """Index into `names` for each class of the data."""
    notes: tuple[str, ...] = ()
    """What the reader must know of the names."""


def class_names(folders: Sequence[str], file: Path | None = None) -> Names:
    """Names for the classes of a data set.

    Args:
        folders: what the data set calls its classes.
        file: a name on each line, in the order of the classes; or lines of folder, tab and name (with any columns
            before), of which those for other folders name classes that may be chosen, too. Without it folders that are
            wnids of ImageNet-1k have open_clip's names; others are taken as names, without a number before them and
            with blanks for underscores.

    Raises:
        InputError: a file that cannot be read or does not fit, two classes of the same name, or unknown wnids.
    """
    if file is not None:
        return read_names(file, folders)
    if folders and all(WNID.fullmatch(folder) for folder in folders):
        return imagenet_names(folders)
    names = [" ".join(re.sub(r"^\d+\.", "", folder).replace("_", " ").split()) or folder for folder in folders]
    refuse_twins(names, [repr(folder) for folder in folders], "class folders", "give --classes FILE with other names")
    bare = all(name.isdecimal() for name in names)
    notes = ("warning: the class folders are numbers; give --classes FILE if they stand for names",) if bare else ()
    return Names(tuple(names), tuple(range(len(names))), notes)


def imagenet_names(wnids: Sequence[str]) -> Names:
    """Open_clip's names of some classes of ImageNet-1k; two pairs of the 1,000 share one.

    Raises:
        InputError: a wnid that is none of ImageNet-1k, or open_clip is not installed.
    """
    clip = require("open_clip", "open-clip", "names of the classes of ImageNet")
    known = require("timm", "open-clip", "wnids of ImageNet").data.ImageNetInfo().label_names()
    names = dict(zip(known, clip.IMAGENET_CLASSNAMES, strict=True))
    for wnid in wnids:
        if wnid not in names:
            raise InputError(
                f"class folder {wnid} is no class of ImageNet-1k; give --classes FILE, lines of wnid, tab, name"
            )
    found = [names[wnid] for wnid in wnids]
    twins = sorted({name for name in found if found.count(name) > 1})
    note = f"note: pairs of classes have the same name ({', '.join(twins)}); of each pair the first is chosen"
    return Names(tuple(found), tuple(range(len(found))), (note,) if twins else ())


def read_names(file: Path, folders: Sequence[str]) -> Names:
    """Names of a user's file; see `class_names`."""
    rows = read_lines(file, "a text file with a class name on each line")
    table = [(number, [cell.strip() for cell in line.split("\t")]) for number, line in rows]
    tabs = [len(cells) > 1 for _, cells in table]
    for (number, cells), tab in zip(table, tabs, strict=True):
        if tab != any(tabs) or not all(cells[-2:]):
            raise InputError(
                f"{file}: line {number} {chr(9).join(cells)[:80]!r} is not folder, tab, name, as others are; mend it"
            )
    lines, names = [str(number) for number, _ in table], [cells[-1] for _, cells in table]
    refuse_twins(names, lines, f"{file}: lines", "give every class a name of its own")
    if any(tabs):
        keys = [cells[-2] for _, cells in table]
        refuse_twins(keys, lines, f"{file}: lines", "name every folder once", fold=False)
        return Names(tuple(names), positions(file, dict(zip(keys, range(len(keys)), strict=True)), folders))
    if len(names) != len(folders):
        raise InputError(
            f"{file}: {len(names)} names for {len(folders)} classes ({folders[0]} to {folders[-1]}); give one line for "
            "each in that order, or lines of folder, tab, name"
        )
    return Names(tuple(names), tuple(range(len(names))))


def positions(file: Path, lines: Mapping[str, int], folders: Sequence[str]) -> tuple[int, ...]:
    """Where the folders stand among the lines of a file.

    Raises:
        InputError: a folder that has no line.
    """
    for folder in folders:
        if folder not in lines:
            raise InputError(f"{file}: no line for the class folder {folder!r}; add folder, tab, name")
    return tuple(lines[folder] for folder in folders)


def refuse_twins(names: Sequence[str], places: Sequence[str], where: str, advice: str, *, fold: bool = True) -> None:
    """Refuse names that are the same to a tokenizer, which sees neither case nor the number of blanks.

    Raises:
        InputError: names both places.
    """
    seen: dict[str, str] = {}
    for name, place in zip(names, places, strict=True):
        same = " ".join(name.split()).casefold() if fold else name
        if same in seen:
            raise InputError(f"{where} {seen[same]} and {place} are both {name[:80]!r}; {advice}")
        seen[same] = place


def templates(file: Path | None, *, scenes: bool) -> tuple[str, ...]:
    """Prompts, each with one place for the name of a class.

    Args:
        file: a prompt on each line; without it the 80 of ImageNet (Radford et al. 2021), or captions of scenes.
        scenes: whether classes are those of scenes.

    Raises:
        InputError: a file that cannot be read, a line without exactly one place, or open_clip is not installed.
    """
    if file is None:
        if scenes:
            return SCENE_TEMPLATES
        clip = require("open_clip", "open-clip", "the templates of ImageNet")
        return tuple(fill(PLACE) for fill in clip.OPENAI_IMAGENET_TEMPLATES)
    rows = read_lines(file, f"a text file with a prompt such as 'a photo of a {PLACE}.' on each line")
    for number, line in rows:
        if line.count(PLACE) != 1:
            raise InputError(
                f"{file}: line {number} {line[:80]!r} has {line.count(PLACE)} places {PLACE} for the name of the "
                f"class; give one, as in 'a photo of a {PLACE}.'"
            )
    return tuple(line for _, line in rows)
