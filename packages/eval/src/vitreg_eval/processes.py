"""The processes that share a command, where `accelerate launch` started several."""

import os
from typing import NamedTuple

from vitreg_core.errors import InputError


class Processes(NamedTuple):
    """This process among those that share a command."""

    rank: int = 0
    """Number of this one, from 0."""
    size: int = 1
    """How many there are."""

    def wait(self) -> None:
        """Go on when all have come here."""
        if self.size > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()


def several() -> int:
    """How many processes the environment tells of."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def refuse_without_cache() -> None:
    """Refuse several processes that have no folder to share features through.

    Raises:
        InputError: says what to give.
    """
    if several() > 1:
        raise InputError(f"{several()} processes share features through a folder: give --cache DIR, the same for all")


def processes(*, cpu: bool) -> Processes:
    """This process among those that the environment tells of; alone without `accelerate launch`.

    Args:
        cpu: they compute on CPUs, even where there are GPUs.

    Raises:
        InputError: the environment tells of several, but they do not find each other.
    """
    if several() <= 1:
        return Processes()
    from accelerate import PartialState  # only several processes need it

    try:
        state = PartialState(cpu=cpu)
    except (ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"WORLD_SIZE={several()}, but the processes do not meet ({reason}); start them with accelerate launch"
        ) from None
    return Processes(state.process_index, state.num_processes)
