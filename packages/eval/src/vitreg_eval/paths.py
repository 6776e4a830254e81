"""Where a user's data is."""

import os
from pathlib import Path

from vitreg_core.errors import InputError

from vitreg_eval.config import AUTO, DoctorOptions, LabelOptions, LostOptions, NormsOptions, TaskOptions


def check_needs(options: TaskOptions) -> None:
    """Refuse, before anything is loaded, what cannot work: no model, missing data, options that do not apply.

    Raises:
        InputError: names all that is missing at once.
    """
    missing = [] if options.model else ["--model SOURCE, a model or run folder, a weights file or a preset"]
    if isinstance(options, LostOptions):
        missing += check_lost(options)
    if isinstance(options, LabelOptions) and options.data is not None and options.label == "relation":
        raise InputError("--label relation with --data: only scenes have relations; leave one of them out")
    if isinstance(options, NormsOptions) and options.limit is not None and options.images is None:
        raise InputError(f"--limit {options.limit} without --images; for scenes give --test_images")
    if AUTO in options.registers and isinstance(options, LostOptions | DoctorOptions):
        raise InputError("--registers auto: this task looks into single blocks, whose tokens then differ; give numbers")
    if missing:
        raise InputError(f"missing: {' and '.join(missing)}")


def check_lost(options: LostOptions) -> list[str]:
    """What LOST lacks; options that do not go together are refused."""
    if options.dataset == "scenes" and options.data is not None:
        raise InputError(f"--data {options.data} with --dataset scenes; give --dataset voc07 or voc12, or --images DIR")
    if options.images is not None and options.dataset != "scenes":
        raise InputError(f"--images {options.images} with --dataset {options.dataset}; give one of them")
    needs_data = options.dataset != "scenes" and options.data is None and not os.environ.get("VITREG_DATA")
    return ["--data DIR, the folder that holds VOCdevkit (or set VITREG_DATA)"] if needs_data else []


def data_folder(given: Path | None) -> Path:
    """The folder of --data, else of $VITREG_DATA.

    Raises:
        InputError: neither is given, or there is no such folder.
    """
    folder = given or (Path(os.environ["VITREG_DATA"]) if os.environ.get("VITREG_DATA") else None)
    if folder is None:
        raise InputError("no data: give --data DIR or set VITREG_DATA")
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give --data an existing one")
    return folder
