"""The methods of a ViT that timm's users know, with timm's meaning."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vitreg_core.config import ViTConfig, check_shapes, override
from vitreg_core.embed import Positions, resize_positions
from vitreg_core.errors import InputError
from vitreg_core.features import Features
from vitreg_core.initialise import fill, zero

Intermediate = Tensor | tuple[Tensor, Tensor]


class TimmMethods(nn.Module):
    """What `VisionTransformer` answers to timm's users. Images are normalised pixels; blocks count from 0."""

    config: ViTConfig
    grad_checkpointing: bool
    positions: Positions | None
    norm: nn.Module
    fc_norm: nn.Module
    head: nn.Linear | None

    @abstractmethod
    def stream(self, images: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b n d"]:
        """The residual stream after the last block."""

    @abstractmethod
    def intermediate(
        self, images: Float[Tensor, "b 3 height width"], layers: Sequence[int], *, norm: bool = True
    ) -> list[Features]:
        """Tokens after each named block."""

    @abstractmethod
    def pooled(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        """What the head reads."""

    @abstractmethod
    def layer_index(self, layer: int) -> int:
        """Block number from 0."""

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: the class token and the registers."""
        return len(self.config.prefix)

    @property
    def num_features(self) -> int:
        """Width of a token; the head reads as much."""
        return self.config.embed_dim

    @property
    def head_hidden_size(self) -> int:
        """Width of what the head reads."""
        return self.config.embed_dim

    @property
    def num_classes(self) -> int:
        """Outputs of the head; 0 without one."""
        return self.config.num_classes

    @property
    def feature_info(self) -> list[dict[str, object]]:
        """For every block its module, channels, and pixels per feature."""
        return [
            {"module": f"blocks.{index}", "num_chs": self.config.embed_dim, "reduction": self.config.patch_size}
            for index in range(self.config.depth)
        ]

    def forward_features(self, images: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b n d"]:
        """All tokens after the final norm, prefix tokens first."""
        return self.norm(self.stream(images))

    def forward_head(self, tokens: Float[Tensor, "b n d"], *, pre_logits: bool = False) -> Float[Tensor, "b _"]:
        """Logits for the tokens of `forward_features`; what the head reads with `pre_logits` or without a head."""
        read = self.fc_norm(self.pooled(tokens))
        return read if pre_logits or self.head is None else self.head(read)

    def forward_intermediates(
        self,
        images: Float[Tensor, "b 3 height width"],
        indices: int | Sequence[int] | None = None,
        *,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,  # noqa: ARG002 (timm's signature)
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> tuple[Tensor, list[Intermediate]] | list[Intermediate]:
        """Patches after some blocks, in ascending order, and all tokens after the final norm.

        Args:
            images: normalised pixels.
            indices: blocks; a number means that many last ones, None all.
            return_prefix_tokens: pair each output with its prefix tokens `b r d`.
            norm: apply the final norm to the outputs.
            stop_early: changes nothing: no block is run that no output needs.
            output_fmt: patches as maps `b d rows cols` (NCHW), or as `b p d` (NLC).
            intermediates_only: leave out the tokens after the final norm.
        """
        layers = self.chosen(indices)
        taken = self.intermediate(images, layers if intermediates_only else [*layers, -1], norm=False)
        outputs = [
            self.output(features, reshape=output_fmt == "NCHW", return_prefix_tokens=return_prefix_tokens, norm=norm)
            for features in taken[: len(layers)]
        ]
        return outputs if intermediates_only else (self.norm(taken[-1].tokens), outputs)

    def get_intermediate_layers(
        self,
        images: Float[Tensor, "b 3 height width"],
        n: int | Sequence[int] = 1,
        reshape: bool = False,  # noqa: FBT001, FBT002 (timm's signature)
        return_prefix_tokens: bool = False,  # noqa: FBT001, FBT002
        norm: bool = False,  # noqa: FBT001, FBT002
    ) -> list[Intermediate]:
        """Patches after the last n, or the named, blocks; `reshape` gives maps `b d rows cols`."""
        return [
            self.output(features, reshape=reshape, return_prefix_tokens=return_prefix_tokens, norm=norm)
            for features in self.intermediate(images, self.chosen(n), norm=False)
        ]

    def output(self, features: Features, *, reshape: bool, return_prefix_tokens: bool, norm: bool) -> Intermediate:
        """Tokens of a block in the form asked for."""
        tokens = self.norm(features.tokens) if norm else features.tokens
        prefix, patches = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
        if reshape:
            patches = rearrange(patches, "b (rows cols) d -> b d rows cols", rows=features.grid[0]).contiguous()
        return (patches, prefix) if return_prefix_tokens else patches

    def chosen(self, indices: int | Sequence[int] | None) -> Sequence[int]:
        """Blocks that timm's `indices` stands for, in ascending order."""
        if indices is None:
            return range(self.config.depth)
        if isinstance(indices, int):
            if not 1 <= indices <= self.config.depth:
                raise InputError(f"the last {indices} blocks of {self.config.depth}; give 1 to {self.config.depth}")
            return range(self.config.depth - indices, self.config.depth)
        return sorted({self.layer_index(layer) for layer in indices})

    def get_classifier(self) -> nn.Module:
        """The head; the identity without one."""
        return nn.Identity() if self.head is None else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one; `global_pool` changes what it reads."""
        pools = {"token": "cls", "avg": "avg", None: self.config.pool}
        if global_pool not in pools:
            raise InputError(f'global_pool={global_pool!r} is not one of "token", "avg"; give one of these')
        changes = {"num_classes": num_classes, "pool": pools[global_pool], "head_bias": True}
        config = override(self.config, changes)
        check_shapes(config)
        self.config = config
        self.head = nn.Linear(self.config.embed_dim, num_classes) if num_classes else None
        if self.head is not None:
            self.head.to(next(self.parameters()))
            fill(self.head.weight, 0.02)
            zero(self.head.bias)

    @torch.no_grad()
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resize the stored positions to the grid of another image size, once and for all."""
        config = override(self.config, {"image_size": img_size})
        check_shapes(config)
        if self.positions is not None:
            grid, old = config.grid, self.positions
            resized = resize_positions(old.patches, old.native, grid, antialias=old.antialias, offset=old.offset)
            old.patches, old.native = nn.Parameter(resized.clone()), grid
        self.config = config

    def set_grad_checkpointing(self, enable: bool = True) -> None:  # noqa: FBT001, FBT002 (timm's signature)
        """Trade time for memory in training: compute the inner values of each block again in the backward pass."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are not decayed beyond the usual biases and norms: tokens and positions."""
        names = {"cls", "registers.tokens", "mask_token", "positions.patches", "positions.cls"}
        return names & {name for name, _ in self.named_parameters()}

    def group_matcher(self, *, coarse: bool = False) -> dict[str, object]:
        """Patterns that sort parameters into stem and blocks, for layer-wise learning rates."""
        stem = r"^cls|^registers|^mask_token|^positions|^patch_embed|^pre_norm"
        blocks = [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": stem, "blocks": r"^blocks\.(\d+)" if coarse else blocks}
