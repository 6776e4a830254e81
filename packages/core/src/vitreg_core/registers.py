"""Register tokens: places where the blocks keep what belongs to the whole image."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Registers(nn.Module):
    """Learned tokens without a position, between the class token and the patches (registers paper, section 2.2)."""

    def __init__(self, count: int, embed_dim: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(count, embed_dim))  # r d

    def forward(self, cls: Float[Tensor, " d"] | None, patches: Float[Tensor, "b p d"]) -> Float[Tensor, "b n d"]:
        """Join class token, where there is one, registers and patches into the sequence the blocks read."""
        tokens = self.used()
        prefix = tokens if cls is None else torch.cat([cls[None], tokens])
        return torch.cat([prefix.to(patches.dtype).expand(patches.shape[0], -1, -1), patches], dim=1)

    def used(self) -> Float[Tensor, "r d"]:
        """The tokens that join."""
        return self.tokens


class FirstRegisters(Registers):
    """The first few registers of another module, whose parameter it shares; a state dict holds no more than them."""

    def __init__(self, registers: Registers, count: int) -> None:
        nn.Module.__init__(self)
        self.tokens = registers.tokens  # r d, all of them: a gradient reaches the rows that are used
        self.count = count

    def used(self) -> Float[Tensor, "r d"]:
        """The tokens that join."""
        return self.tokens[: self.count]

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:  # noqa: FBT001 (torch's)
        destination[f"{prefix}tokens"] = self.used() if keep_vars else self.used().detach()
