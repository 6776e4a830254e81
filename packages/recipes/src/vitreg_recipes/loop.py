"""The training loop."""

import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration
from torch import nn
from vitreg_core.errors import InputError
from vitreg_core.precision import Precision, use_precision

from vitreg_recipes.config import RunConfig
from vitreg_recipes.data import Batch
from vitreg_recipes.hooks import Hook, standard_hooks
from vitreg_recipes.launch import check_launch
from vitreg_recipes.measure import Evaluation
from vitreg_recipes.objectives.accumulate import check_parts
from vitreg_recipes.parts import assemble
from vitreg_recipes.run_folder import close_run, open_run
from vitreg_recipes.state import TrainState
from vitreg_recipes.strategy import refuse_lone_process
from vitreg_recipes.trackers import check_trackers


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    hooks: Iterable[Hook] = (),
    evaluations: Mapping[str, Evaluation] | None = None,
    command: str = "train(config, resume=True)",
) -> nn.Module:
    """Train a model; one process of however many the launcher started.

    Args:
        config: the run; where `out` is set, log, checkpoints and the final model are written there.
        resume: continue the run in `config.out` from its newest checkpoint, to the same weights as if it had not
            stopped.
        hooks: called after every step with the state and the step's metrics, before the step may be saved.
        evaluations: called with the model every `evaluate_every` steps, in the main process alone, which the others
            wait for; the numbers that they return are logged under the evaluation's name.
        command: what continues the run, for the message of a run that was stopped.

    Returns:
        The trained model, in evaluation mode, where it was trained; split over the processes with strategy=fsdp2.

    Raises:
        InputError: fields that do not fit together, unusable data, a folder that holds another run, a loss that is not
            finite, or a full disk.
        SystemExit: SIGTERM or Ctrl-C, after a checkpoint was written (code 0).
    """
    state = set_up(config, start(config))
    open_run(state, resume=resume)
    products: Precision = "fp32" if config.precision == "bf16" else config.precision  # Accelerate sees to bf16
    with (
        use_precision(products, state.accelerator.device),
        standard_hooks(state, hooks, evaluations or {}, command) as between,
    ):
        for batch in islice(batches(state), state.steps - state.step):
            metrics = state.objective.step(batch)
            state.objective.clip()
            state.advance()
            state.objective.after_step()
            for hook in between:
                hook(state, metrics)
    close_run(state)
    return state.model.eval()


def start(config: RunConfig) -> Accelerator:
    """Check the config and join the other processes.

    Raises:
        InputError: the config does not fit, or the launcher's processes do not know of each other.
    """
    config.check()
    check_trackers(config)
    try:
        accelerator = Accelerator(
            mixed_precision="bf16" if config.precision == "bf16" else "no",
            log_with=list(config.trackers) or None,
            project_config=ProjectConfiguration(logging_dir=None if config.out is None else str(config.out)),
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.accumulate),
        )
    except ValueError as error:
        raise InputError(f"precision={config.precision}: {error}; train it in a process of its own") from None
    check_parts(config, check_launch(accelerator.num_processes))
    if config.strategy == "fsdp2":
        refuse_lone_process(accelerator)
    return accelerator


def set_up(config: RunConfig, accelerator: Accelerator) -> TrainState:
    """Build the parts of a run."""
    return TrainState(accelerator, assemble(config, accelerator))


def batches(state: TrainState) -> Iterator[Batch]:
    """Batches of this process, from the present step on; the state counts the time that they keep it waiting."""
    source = state.data.batches(state.step, state.share, state.accelerator.device)
    while True:
        asked = time.perf_counter()
        batch = next(source)
        state.data_seconds += time.perf_counter() - asked
        yield batch
