"""What happens between steps: log, measurements, snapshots, checkpoints, a clean stop."""

import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType

from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from vitreg_recipes.checkpoints import save_checkpoint, save_snapshot
from vitreg_recipes.log import Log, Progress
from vitreg_recipes.measure import Evaluate, Evaluation, Norms
from vitreg_recipes.state import TrainState
from vitreg_recipes.trackers import open_trackers

Hook = Callable[[TrainState, Mapping[str, Tensor]], None]
"""Called after every step with the state and the metrics of the step."""
AGREE_EVERY = 10
"""Steps between the moments at which several processes agree on whether to stop."""


@contextmanager
def standard_hooks(
    state: TrainState, extra: Iterable[Hook], evaluations: Mapping[str, Evaluation], command: str
) -> Iterator[list[Hook]]:
    """Yield the hooks of a run in the order of their calls: log, measurements, the caller's, save, stop, progress.

    All that writes a line, and all that may draw from the generators, comes before the save: so whatever the process
    is killed in, a resumed run writes every line once and draws the same.
    """
    log, evaluate = Log(state), Evaluate(state, evaluations)
    measured: list[Hook] = [log, Norms(state), evaluate, *extra]
    with open_trackers(state), Progress(state, [log, evaluate]) as progress:
        if state.config.out is None:
            yield [*measured, progress]
        else:
            save = Save(state.config.out)
            with Stop(save, command) as stop:
                yield [*measured, save, stop, progress]


class Save:
    """Checkpoints every few steps, and at the end; snapshots, which stay, as often as the config says."""

    def __init__(self, out: Path) -> None:
        self.checkpoints = out / "checkpoints"
        self.snapshots = out / "snapshots"
        self.saved = -1

    def __call__(self, state: TrainState, _metrics: Mapping[str, Tensor]) -> None:
        """Save where something is due: the snapshot first, or a resumed run might pass it by."""
        config = state.config
        if config.snapshot_every is not None and state.step % config.snapshot_every == 0:
            save_snapshot(state, self.snapshots)
        if state.step % config.save_every == 0 or state.step == state.steps:
            self.save(state)

    def save(self, state: TrainState) -> None:
        """Save, unless this step is saved."""
        if self.saved != state.step:
            save_checkpoint(state, self.checkpoints)
            self.saved = state.step


class Stop:
    """On SIGTERM or Ctrl-C, saves after the step under way and exits with 0. A second signal acts as it used to."""

    def __init__(self, save: Save, command: str) -> None:
        self.save = save
        self.command = command
        """What continues the run."""
        self.asked = False
        self.before: dict[int, object] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():  # the only one that may handle signals
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self.ask)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.restore()

    def __call__(self, state: TrainState, _metrics: Mapping[str, Tensor]) -> None:
        """Save and exit if that was asked for."""
        if state.step < state.steps and self.agreed(state):
            self.save.save(state)
            if state.accelerator.is_main_process:
                saved = f"stopped at step {state.step} of {state.steps}, saved in {state.config.out}"
                tqdm.write(f"{saved}; continue with: {self.command}", file=sys.stderr)
            raise SystemExit(0)

    def agreed(self, state: TrainState) -> bool:
        """Whether any process was asked to stop; all give the same answer, at the same step."""
        if state.accelerator.num_processes == 1:
            return self.asked
        return state.step % AGREE_EVERY == 0 and any(gather_object([self.asked]))

    def ask(self, _number: int, _frame: FrameType | None) -> None:
        """Note the signal."""
        self.asked = True
        self.restore()

    def restore(self) -> None:
        """Put the earlier handlers back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self.before = {}
