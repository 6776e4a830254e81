"""The register vision transformer: images to Features, top to bottom."""

import copy
from collections.abc import Sequence
from typing import Literal, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitreg_core.attention import Group, Rotation, pack, unpack
from vitreg_core.block import Block, drop_path_rates
from vitreg_core.config import PreprocessConfig, ViTConfig, check_shapes, override
from vitreg_core.data.images import Preprocess
from vitreg_core.embed import PatchEmbed, Positions, RotaryPositions
from vitreg_core.errors import InputError
from vitreg_core.features import QKV, Features, block_index, name_tokens
from vitreg_core.hub import HubMethods
from vitreg_core.initialise import initialise
from vitreg_core.moved_neurons import install
from vitreg_core.registers import FirstRegisters, Registers
from vitreg_core.timm_methods import TimmMethods


class VisionTransformer(TimmMethods, HubMethods):
    """A ViT with any number of registers; tokens are the class token, the registers, then the patches.

    Learned positions are added to the patches (and the class token where it has one) before the registers join, and
    rotary ones turn patches only, so registers carry no position (registers paper, section 2.2, as released with
    DINOv2). It is a `Backbone`, and answers to the methods of timm's ViT. `source` says where the weights come from.
    """

    def __init__(self, config: ViTConfig, preprocess: PreprocessConfig | None = None, *, source: str = "") -> None:
        super().__init__()
        check_shapes(config)
        self.config = config
        self.preprocess = Preprocess(preprocess or PreprocessConfig(image_size=max(config.size)))
        self.source = source
        self.grad_checkpointing = False
        dim, rotary = config.embed_dim, config.position == "rope"
        self.patch_embed = PatchEmbed(config)
        self.mask_token = nn.Parameter(torch.zeros(dim)) if config.mask_token else None  # d
        self.positions = None if rotary else Positions(config)
        self.rotary = RotaryPositions(config) if rotary else None
        self.cls = nn.Parameter(torch.zeros(dim)) if config.class_token else None  # d
        self.registers = Registers(config.registers, dim)
        self.pre_norm = nn.LayerNorm(dim, eps=config.norm_eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, rate) for rate in drop_path_rates(config))
        self.norm = nn.Identity() if config.norm_pooled else nn.LayerNorm(dim, eps=config.norm_eps)
        self.fc_norm = nn.LayerNorm(dim, eps=config.norm_eps) if config.norm_pooled else nn.Identity()
        self.head = nn.Linear(dim, config.num_classes, bias=config.head_bias) if config.num_classes else None
        initialise(self)
        if config.moved is not None:
            install(self, config.moved)

    def forward(
        self,
        images: Float[Tensor, "b 3 height width"],
        masks: Bool[Tensor, "b p"] | None = None,
        *,
        registers: int | None = None,
    ) -> Features:
        """Tokens after the final norm.

        Args:
            images: normalised pixels; pixels beyond the last whole patch are dropped.
            masks: patches whose embedding the mask token replaces, before positions are added.
            registers: use the first so many alone, as `with_registers` does for all that a model is asked.

        Raises:
            InputError: images smaller than one patch, masks for a model without a mask token, or registers that the
                model does not have.
        """
        if registers is not None:
            return self.with_registers(registers).forward(images, masks)  # not a call: hooks of this one run once
        return self.name_tokens(self.norm(self.stream(images, masks=masks)), self.patch_embed.grid(images))

    def with_registers(self, count: int) -> "VisionTransformer":
        """This model with its first registers alone, made without copying a weight.

        What changes one changes the other: a gradient reaches the class token, the patches and the registers in use.
        Saved, it is a model with so many registers.

        Args:
            count: 0 to all registers of the model; a model trained with `elastic.sample` is made for it.

        Raises:
            InputError: more registers than there are, or a model some of whose MLPs act on one register.
        """
        if not 0 <= count <= self.num_registers:
            raise InputError(f"{count} registers of a model with {self.num_registers}; use 0 to {self.num_registers}")
        if self.config.moved is not None:
            raise InputError("this model has moved neurons, which need its last register; take registers away before")
        view = copy.copy(self)
        view.config = override(self.config, {"registers": count})
        view._modules = {**self._modules, "registers": FirstRegisters(self.registers, count)}
        view.rotary = self.rotary and RotaryPositions(view.config)  # it counts the tokens before the patches
        return view

    def features(self, images: Float[Tensor, "b 3 height width"]) -> Features:
        """Tokens after the final norm; the same as calling the model."""
        return self(images)

    def packed(
        self,
        batches: Sequence[Float[Tensor, "_ 3 _ _"]],
        masks: Sequence[Bool[Tensor, "_ _"] | None] | None = None,
    ) -> list[Features]:
        """Tokens after the final norm of several batches of different image size, in one pass.

        Equal to calling the model on each batch, but all linear layers see one long sequence (DINOv2, multi-crop). In
        training, drop path acts on each batch by itself.

        Args:
            batches: normalised pixels; each batch has its own size.
            masks: for each batch its masked patches, or None.

        Raises:
            InputError: no batches, images smaller than one patch, or masks that the model or the batches do not fit.
        """
        masks = [None] * len(batches) if masks is None else masks
        if not batches or len(masks) != len(batches):
            raise InputError(
                f"{len(batches)} batches and {len(masks)} masks; give one batch or more, and a mask for each"
            )
        if self.config.moved is not None:  # their MLPs look at all tokens of an image, which a packed sequence hides
            return [self(images, mask) for images, mask in zip(batches, masks, strict=True)]
        embedded = [self.embed(images, mask) for images, mask in zip(batches, masks, strict=True)]
        groups = tuple(
            Group(tokens.shape[0], tokens.shape[1], self.rotation(images))
            for images, tokens in zip(batches, embedded, strict=True)
        )
        tokens = pack(embedded)
        for block in self.blocks:
            tokens = self.run(cast(Block, block), tokens, groups=groups)
        parts = unpack(self.norm(tokens), groups)
        return [
            self.name_tokens(part, self.patch_embed.grid(images)) for part, images in zip(parts, batches, strict=True)
        ]

    def intermediate(
        self, images: Float[Tensor, "b 3 height width"], layers: Sequence[int], *, norm: bool = True
    ) -> list[Features]:
        """Tokens after each named block, in the order named, in one pass.

        Args:
            images: normalised pixels.
            layers: block numbers from 0; negative ones count from the end.
            norm: apply the final norm to each; without it the residual stream itself comes back, in which outliers
                are visible.

        Raises:
            InputError: a block that the model does not have.
        """
        wanted = [self.layer_index(layer) for layer in layers]
        tokens, rotation, grid = self.embed(images), self.rotation(images), self.patch_embed.grid(images)
        after: dict[int, Features] = {}
        for index, block in enumerate(self.blocks[: max(wanted, default=-1) + 1]):
            tokens = self.run(cast(Block, block), tokens, rotation)
            if index in wanted:
                after[index] = self.name_tokens(self.norm(tokens) if norm else tokens, grid)
        return [after[index] for index in wanted]

    def classify(self, images: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b classes"]:
        """Logits of the head on the class token, or on the mean of the patches (`pool` in the config).

        Raises:
            InputError: the weights have no head.
        """
        if self.head is None:
            raise InputError(f"model {self.source or '(unnamed)'} has no classification head; give one that has")
        tokens = self.stream(images)
        read = self.norm(tokens[:, 0]) if self.config.pool == "cls" else self.pooled(self.norm(tokens))
        return self.head(self.fc_norm(read))

    def pooled(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        """What the head reads: the class token, or the mean of the patches."""
        return tokens[:, 0] if self.config.pool == "cls" else tokens[:, self.num_prefix_tokens :].mean(dim=1)

    def qkv(self, images: Float[Tensor, "b 3 height width"], layer: int) -> QKV:
        """Output of the qkv projection of a block; later blocks are not run."""
        return self.block(layer).attn.project(self.attention_input(images, layer))

    def attention(self, images: Float[Tensor, "b 3 height width"], layer: int) -> Float[Tensor, "b h n n"]:
        """Attention weights of a block; rows are queries and sum to 1."""
        return self.block(layer).attn.weights(self.attention_input(images, layer), self.rotation(images))

    def hidden(self, images: Float[Tensor, "b 3 height width"], layer: int) -> Float[Tensor, "b n hidden"]:
        """Hidden units of a block's MLP after the activation."""
        block, tokens = self.block(layer), self.stream(images, self.layer_index(layer))
        return block.mlp.hidden(block.norm2(block.after_attention(tokens, self.rotation(images))))

    def embeddings(self, images: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b p d"]:
        """Patch embeddings before positions are added."""
        self.patch_embed.grid(images)
        return self.patch_embed(images)

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.config.patch_size

    @property
    def embed_dim(self) -> int:
        """Width of a token."""
        return self.config.embed_dim

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.config.depth

    @property
    def num_heads(self) -> int:
        """Attention heads of a block."""
        return self.config.num_heads

    @property
    def num_registers(self) -> int:
        """Register tokens."""
        return self.config.registers

    @property
    def prefix(self) -> tuple[Literal["cls", "register"], ...]:
        """Kinds of the tokens before the patches, in order."""
        return self.config.prefix

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.patch_embed.proj.weight.device

    def embed(
        self, images: Float[Tensor, "b 3 height width"], masks: Bool[Tensor, "b p"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """The sequence that the first block reads."""
        patches = self.embeddings(images)
        if masks is not None:
            if self.mask_token is None:
                raise InputError("masks given to a model without a mask token; build it with mask_token=True")
            if masks.shape != patches.shape[:2]:
                raise InputError(f"masks of shape {(*masks.shape,)} for patches {(*patches.shape[:2],)}; give one each")
            patches = torch.where(masks[:, :, None], self.mask_token.to(patches.dtype), patches)
        cls: Tensor | None = self.cls
        if self.positions is not None:
            patches = patches + self.positions(self.patch_embed.grid(images))
            cls = cls if cls is None or self.positions.cls is None else cls + self.positions.cls
        return self.pre_norm(self.registers(cls, patches))

    def rotation(self, images: Float[Tensor, "b 3 height width"]) -> Rotation | None:
        """How queries and keys of these images are rotated; None for a model with learned positions."""
        return None if self.rotary is None else self.rotary(self.patch_embed.grid(images), images.device)

    def stream(
        self,
        images: Float[Tensor, "b 3 height width"],
        stop: int | None = None,
        masks: Bool[Tensor, "b p"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """The residual stream before block `stop`, or after the last one."""
        tokens, rotation = self.embed(images, masks), self.rotation(images)
        for block in self.blocks[:stop]:
            tokens = self.run(cast(Block, block), tokens, rotation)
        return tokens

    def run(
        self,
        block: Block,
        tokens: Float[Tensor, "b n d"],
        rotation: Rotation | None = None,
        groups: tuple[Group, ...] = (),
    ) -> Float[Tensor, "b n d"]:
        """One block, whose inner values are computed again in the backward pass where gradients are checkpointed."""
        if self.grad_checkpointing and self.training:
            return checkpoint(block, tokens, rotation, groups, use_reentrant=False)
        return block(tokens, rotation, groups)

    def attention_input(self, images: Float[Tensor, "b 3 height width"], layer: int) -> Float[Tensor, "b n d"]:
        """What the attention of a block reads."""
        return self.block(layer).norm1(self.stream(images, self.layer_index(layer)))

    def name_tokens(self, tokens: Float[Tensor, "b n d"], grid: tuple[int, int]) -> Features:
        """Name the tokens of the sequence by kind."""
        return name_tokens(tokens, self.prefix, grid)

    def block(self, layer: int) -> Block:
        """A block by number."""
        return cast(Block, self.blocks[self.layer_index(layer)])

    def layer_index(self, layer: int) -> int:
        """Block number from 0."""
        return block_index(layer, self.depth)
