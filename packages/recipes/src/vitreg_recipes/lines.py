"""Files with a line of JSON per measurement, continued exactly when a run is resumed."""

import json
from collections.abc import Mapping
from pathlib import Path

from vitreg_core.errors import InputError
from vitreg_core.whole import write_text

from vitreg_recipes.state import TrainState


class Lines:
    """A file in the folder of the run, and the trackers; the main process writes, the others do nothing.

    Lines past the present step, which will be written again, and a line that was cut off are removed at the start.
    """

    def __init__(self, state: TrainState, name: str, prefix: str = "") -> None:
        out, main = state.config.out, state.accelerator.is_main_process
        self.path = out / name if out is not None and main else None
        self.prefix = prefix
        """Stands before the names of the values in the trackers."""
        if self.path is not None:
            drop_lines(self.path, state.step)

    def write(self, state: TrainState, values: Mapping[str, float | None]) -> None:
        """Add a line with the present step.

        Raises:
            InputError: the file cannot be written.
        """
        if self.path is not None:
            try:
                with self.path.open("a") as file:
                    file.write(json.dumps({"step": state.step, **values}) + "\n")
            except OSError as error:
                raise InputError(f"{self.path}: cannot be written ({error}); make room, then --resume") from None
        told = {f"{self.prefix}{name}": value for name, value in values.items() if value is not None}
        state.accelerator.log(told, step=state.step)


def drop_lines(path: Path, step: int) -> None:
    """Remove the lines past a step, and a line that was cut off."""
    if not path.exists():
        return
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    write_text(path, "".join(kept))
