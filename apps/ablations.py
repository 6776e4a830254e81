"""What triggers outliers: the table of the ablation, from the folders of its runs.

    uv run apps/ablations.py
    uv run apps/ablations.py --runs /scratch/runs

A run is read while it trains, too. The last line is the table as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

from vitreg_core.config import Config, validate
from vitreg_core.errors import InputError
from vitreg_core.options import one_line_errors, parse_options
from vitreg_recipes.config import FREE_ON_RESUME, TrainConfig, flatten
from vitreg_recipes.runs import find, notes
from vitreg_recipes.runs.registers import GRID

PROGRAM = "ablations.py"
WHERE = FREE_ON_RESUME | {"data.path", "seed", "precision", "accumulate", "strategy"}
"""Fields in which a run may differ from its name and still count for it."""
COLUMNS = ("run", "mixing", "length", "optimizer", "layer_scale", "registers", "status", "outliers", "norms", "loss")


class Options(Config):
    """Print which runs of the ablation there are, and what they show."""

    runs: Path = Path("runs")
    """Folder with the folders of the runs."""


def read_run(name: str, folder: Path) -> dict[str, Any]:
    """What one run changes, how far it is, and what it shows.

    Raises:
        InputError: its `run.json` is damaged.
    """
    config = find(name)
    assert isinstance(config, TrainConfig)  # as all of the grid are
    row: dict[str, Any] = {
        "run": name,
        "mixing": config.mix.active,
        "length": f"{config.epochs} epochs" if config.epochs else f"{config.steps} steps",
        "optimizer": config.optim.name,
        "layer_scale": config.model.layer_scale,
        "registers": config.model.registers,
        "published": notes(name).published,
        "status": "not started",
    }
    if not (folder / "run.json").exists():
        return row
    log, norms, record = last_line(folder / "log.jsonl"), last_line(folder / "norms.jsonl"), read_json(folder)
    done = "trained" if (folder / "model.safetensors").exists() else "training"
    ran = validate(TrainConfig, record.get("config", {}), str(folder / "run.json"))
    return row | {
        "status": done,
        "step": log.get("step", 0),
        "steps": record.get("steps"),
        "changed": changed(ran, config),
        "loss": log.get("loss"),
        **{field: norms.get(field) for field in ("outlier_fraction", "median_norm", "max_norm")},
    }


def read_json(folder: Path) -> dict[str, Any]:
    """The `run.json` of a run."""
    try:
        return dict(json.loads((folder / "run.json").read_text()))
    except ValueError as error:
        raise InputError(f"{folder / 'run.json'}: not valid JSON ({error}); remove or move that run") from None


def last_line(path: Path) -> dict[str, Any]:
    """The last whole line of a file of JSON lines; nothing where there is none yet."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("}\n")]
    return dict(json.loads(whole[-1])) if whole else {}


def changed(ran: TrainConfig, named: TrainConfig) -> list[str]:
    """Fields in which a run is not what its name says."""
    then, now = dict(flatten(ran.model_dump(mode="json"))), dict(flatten(named.model_dump(mode="json")))
    return sorted(f"{name}={then[name]}" for name in then.keys() - WHERE if then[name] != now[name])


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table as text."""
    status = row["status"]
    if status == "training":
        status = f"step {row['step']} of {row['steps']}"
    if row.get("changed"):
        status += f" ({', '.join(row['changed'])})"
    return [
        row["run"],
        "on" if row["mixing"] else "off",
        row["length"],
        row["optimizer"],
        "-" if row["layer_scale"] is None else f"{row['layer_scale']:g}",
        str(row["registers"]),
        status,
        shown(row.get("outlier_fraction"), "{:.2%}"),
        "-" if row.get("max_norm") is None else f"{row['median_norm']:.1f} to {row['max_norm']:.1f}",
        shown(row.get("loss"), "{:.4f}"),
    ]


def shown(value: float | None, form: str) -> str:
    """A number, or a dash where it is not known yet."""
    return "-" if value is None else form.format(value)


def main(arguments: list[str]) -> None:
    """Print the table."""
    with one_line_errors(PROGRAM):
        options = parse_options(Options(), arguments, PROGRAM)
        if options != Options() and not options.runs.is_dir():
            raise InputError(f"runs={options.runs}: no such folder; give the folder in which the runs are")
        rows = [read_run(name, options.runs / name) for name in GRID]
    table = [list(COLUMNS), *(cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(COLUMNS))]
    for line in table:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    missing = [row["run"] for row in rows if row["status"] == "not started"]
    if missing:
        print(f"\n{len(missing)} not started; start one: accelerate launch apps/train.py {missing[0]} --data.path DIR")
    print(json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
