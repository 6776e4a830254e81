"""Launch commands that would train something else than they say, without a word: refused."""

import os

from vitreg_core.errors import InputError

ALONE_ON_CPU = "without GPUs, start with ACCELERATE_USE_CPU=true torchrun --nproc_per_node N"
SHARDED_BY_ACCELERATE = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")


def check_launch(processes: int) -> int:
    """Compare the processes that Accelerate found with those that the launcher was asked for.

    Args:
        processes: number of processes that Accelerate found.

    Returns:
        That number.

    Raises:
        InputError: the launcher started one process of several asked for, several that do not know of each other, or
            set up Accelerate to share the model, which `strategy` does here.
    """
    for name in SHARDED_BY_ACCELERATE:
        if os.environ.get(name, "").lower() == "true":
            raise InputError(
                f"{name}=true: give --strategy fsdp2 in place of a launcher config that shares the model; see "
                "docs/distributed.md"
            )
    if "WORLD_SIZE" not in os.environ:
        refuse_lost_processes()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if processes != world:
        raise InputError(f"WORLD_SIZE={world}, but Accelerate runs {processes} process(es); {ALONE_ON_CPU}")
    return processes


def refuse_lost_processes() -> None:
    """Refuse to be one process where several were asked for.

    `accelerate launch` sets MASTER_PORT when it is asked for several, and then, without GPUs, starts one.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ:
        raise InputError(
            f"accelerate launch was asked for several processes and started one; {ALONE_ON_CPU}, and with them give a "
            "config with distributed_type: MULTI_GPU"
        )
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1:
        raise InputError(
            f"srun started {tasks} tasks that do not know of each other; give --ntasks-per-node=1 and "
            "start accelerate launch in it (configs/slurm.sh)"
        )
