"""The training loop."""

import os
from collections.abc import Iterable, Iterator
from itertools import islice

from accelerate import Accelerator
from accelerate.utils import set_seed
from vitreg_core.config import override
from vitreg_core.errors import InputError
from vitreg_core.precision import Precision, use_precision
from vitreg_core.vit import VisionTransformer

from vitreg_recipes.config import TrainConfig, check, local_batch
from vitreg_recipes.data import Batch, Data, Share, open_data
from vitreg_recipes.hooks import Hook, standard_hooks
from vitreg_recipes.objectives.classify import Classifier, Classify
from vitreg_recipes.optim import make_optimizer
from vitreg_recipes.run_folder import close_run, open_run
from vitreg_recipes.state import TrainState


def train(config: TrainConfig, *, resume: bool = False, hooks: Iterable[Hook] = ()) -> VisionTransformer:
    """Train a model; one process of however many the launcher started.

    Args:
        config: the run; where `out` is set, log, checkpoints and the final model are written there.
        resume: continue the run in `config.out` from its newest checkpoint, to the same weights as if it had not
            stopped.
        hooks: called after every step with the state and the step's metrics, before the step may be saved.

    Returns:
        The trained model, in evaluation mode, where it was trained.

    Raises:
        InputError: fields that do not fit together, unusable data, a folder that holds another run, or a loss that is
            not finite.
        SystemExit: SIGTERM or Ctrl-C, after a checkpoint was written (code 0).
    """
    state = set_up(config, start(config))
    open_run(state, resume=resume)
    products: Precision = "fp32" if config.precision == "bf16" else config.precision  # Accelerate sees to bf16
    with use_precision(products, state.accelerator.device), standard_hooks(state, hooks) as between:
        for batch in islice(batches(state), config.steps - state.step):
            metrics = state.objective.step(batch)
            state.objective.clip()
            state.advance()
            state.objective.after_step()
            for hook in between:
                hook(state, metrics)
    close_run(state)
    return state.model.eval()


def start(config: TrainConfig) -> Accelerator:
    """Check the config and join the other processes.

    Raises:
        InputError: the config does not fit, or the launcher's processes do not know of each other.
    """
    check(config)
    try:
        accelerator = Accelerator(mixed_precision="bf16" if config.precision == "bf16" else "no")
    except ValueError as error:
        raise InputError(f"precision={config.precision}: {error}; train it in a process of its own") from None
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != world:
        raise InputError(
            f"WORLD_SIZE={world}, but Accelerate runs {accelerator.num_processes} process(es); without GPUs, start "
            "with ACCELERATE_USE_CPU=true torchrun --nproc_per_node N"
        )
    local_batch(config, world)
    return accelerator


def set_up(config: TrainConfig, accelerator: Accelerator) -> TrainState:
    """Build the parts of a run. The weights start alike in all processes; what follows is drawn apart."""
    data = open_data(config)
    set_seed(config.seed)
    model = build(config, data)
    set_seed(config.seed, device_specific=True)
    network, optimizer = accelerator.prepare(Classifier(model), make_optimizer(model, config.optim))
    objective = Classify(network, accelerator, len(data.classes), config.mix, config.loss)
    return TrainState(config, accelerator, data, model, objective, optimizer)


def build(config: TrainConfig, data: Data) -> VisionTransformer:
    """Build the model, with a head for the classes of the data."""
    shapes = override(config.model, {"num_classes": len(data.classes)})
    return VisionTransformer(shapes, data.preprocess, source=str(config.out or "a run without a folder"))


def batches(state: TrainState) -> Iterator[Batch]:
    """Batches of this process, from the present step on."""
    processes = state.accelerator.num_processes
    share = Share(local_batch(state.config, processes), state.accelerator.process_index, processes)
    return state.data.batches(state.step, share, state.accelerator.device)
