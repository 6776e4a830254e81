"""Runs with labels, as of DeiT-III."""

from accelerate import Accelerator
from accelerate.utils import set_seed

from vitreg_recipes.build import build, resolved
from vitreg_recipes.config import TrainConfig
from vitreg_recipes.data import open_data
from vitreg_recipes.ema import Ema
from vitreg_recipes.objectives import Objective
from vitreg_recipes.objectives.accumulate import Accumulate
from vitreg_recipes.objectives.elastic import make_network, make_objective
from vitreg_recipes.optim import CosineSchedule, make_optimizer
from vitreg_recipes.parts import Parts, extent
from vitreg_recipes.strategy import distribute


def assemble(config: TrainConfig, accelerator: Accelerator) -> Parts:
    """Build the parts of a run with labels. The weights start alike in all processes; what follows is drawn apart."""
    data = open_data(config)
    set_seed(config.seed)
    model = build(config, data)
    config = resolved(config, model)
    set_seed(config.seed, device_specific=True)
    network = distribute(make_network(model, config.elastic), model.blocks, accelerator, config.strategy)
    optimizer = accelerator.prepare(make_optimizer(model, config.optim))
    objective: Objective = make_objective(network, accelerator, len(data.classes), config)
    if config.accumulate > 1:
        objective = Accumulate(objective, network, accelerator, config.accumulate)
    length = extent(config, data, accelerator)
    schedule = CosineSchedule(config.optim, length.steps, length.epoch_steps)
    ema = None if config.ema is None else Ema(model, config.ema)
    return Parts(config, data, model, objective, optimizer, schedule, length, ema)
