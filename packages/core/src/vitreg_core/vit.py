"""The register vision transformer: images to Features, top to bottom."""

from collections.abc import Sequence
from typing import cast

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor, nn

from vitreg_core.block import Block
from vitreg_core.config import PreprocessConfig, ViTConfig
from vitreg_core.data.images import Preprocess
from vitreg_core.embed import PatchEmbed, Positions
from vitreg_core.errors import InputError
from vitreg_core.features import QKV, Features
from vitreg_core.registers import Registers


class VisionTransformer(nn.Module):
    """A ViT with any number of registers; tokens are the class token, the registers, then the patches.

    Positions are added to the patches (and the class token where it has one) before the registers join, so registers
    carry no position (registers paper, section 2.2, as released with DINOv2). It is a `Backbone`.
    `source` says where the weights come from.
    """

    def __init__(self, config: ViTConfig, preprocess: PreprocessConfig | None = None, *, source: str = "") -> None:
        super().__init__()
        check(config)
        self.config = config
        self.preprocess = Preprocess(preprocess or PreprocessConfig(image_size=config.image_size))
        self.source = source
        self.patch_embed = PatchEmbed(config.patch_size, config.embed_dim)
        self.positions = Positions(config)
        self.cls = nn.Parameter(torch.empty(config.embed_dim))  # d
        self.registers = Registers(config.registers, config.embed_dim, config.register_std)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.head = nn.Linear(config.embed_dim, config.num_classes) if config.num_classes else None
        self.apply(initialise_linear)
        nn.init.trunc_normal_(self.cls, std=0.02)

    def forward(self, images: Float[Tensor, "b 3 height width"]) -> Features:
        """Tokens after the final norm.

        Args:
            images: normalised pixels; pixels beyond the last whole patch are dropped.

        Raises:
            InputError: images smaller than one patch.
        """
        return self.split(self.norm(self.stream(images)), images)

    def features(self, images: Float[Tensor, "b 3 height width"]) -> Features:
        """Tokens after the final norm; the same as calling the model."""
        return self(images)

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
        tokens, after = self.embed(images), {}
        for index, block in enumerate(self.blocks[: max(wanted, default=-1) + 1]):
            tokens = block(tokens)
            if index in wanted:
                after[index] = self.split(self.norm(tokens) if norm else tokens, images)
        return [after[index] for index in wanted]

    def classify(self, images: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b classes"]:
        """Logits of the head on the class token.

        Raises:
            InputError: the weights have no head.
        """
        if self.head is None:
            raise InputError(f"model {self.source or '(unnamed)'} has no classification head; give one that has")
        return self.head(self.norm(self.stream(images)[:, 0]))

    def qkv(self, images: Float[Tensor, "b 3 height width"], layer: int) -> QKV:
        """Output of the qkv projection of a block; later blocks are not run."""
        return self.block(layer).attn.project(self.attention_input(images, layer))

    def attention(self, images: Float[Tensor, "b 3 height width"], layer: int) -> Float[Tensor, "b h n n"]:
        """Attention weights of a block; rows are queries and sum to 1."""
        return self.block(layer).attn.weights(self.attention_input(images, layer))

    def hidden(self, images: Float[Tensor, "b 3 height width"], layer: int) -> Float[Tensor, "b n hidden"]:
        """Hidden units of a block's MLP after the activation."""
        block = self.block(layer)
        return block.mlp.hidden(block.norm2(block.after_attention(self.stream(images, self.layer_index(layer)))))

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
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: the class token and the registers."""
        return 1 + self.config.registers

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.cls.device

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are not decayed beyond the usual biases and norms: tokens and positions."""
        names = {"cls", "registers.tokens", "positions.patches", "positions.cls"}
        return names & {name for name, _ in self.named_parameters()}

    def embed(self, images: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b n d"]:
        """The sequence that the first block reads."""
        patches = self.embeddings(images) + self.positions(self.patch_embed.grid(images))
        cls = self.cls if self.positions.cls is None else self.cls + self.positions.cls
        return self.registers(repeat(cls, "d -> b 1 d", b=len(images)), patches)

    def stream(self, images: Float[Tensor, "b 3 height width"], stop: int | None = None) -> Float[Tensor, "b n d"]:
        """The residual stream before block `stop`, or after the last one."""
        tokens = self.embed(images)
        for block in self.blocks[:stop]:
            tokens = block(tokens)
        return tokens

    def attention_input(self, images: Float[Tensor, "b 3 height width"], layer: int) -> Float[Tensor, "b n d"]:
        """What the attention of a block reads."""
        return self.block(layer).norm1(self.stream(images, self.layer_index(layer)))

    def split(self, tokens: Float[Tensor, "b n d"], images: Float[Tensor, "b 3 height width"]) -> Features:
        """Name the tokens of the sequence."""
        return Features(
            cls=tokens[:, 0],
            registers=tokens[:, 1 : self.num_prefix_tokens],
            patches=tokens[:, self.num_prefix_tokens :],
            grid=self.patch_embed.grid(images),
        )

    def block(self, layer: int) -> Block:
        """A block by number."""
        return cast(Block, self.blocks[self.layer_index(layer)])

    def layer_index(self, layer: int) -> int:
        """Block number from 0."""
        if not -self.depth <= layer < self.depth:
            raise InputError(
                f"layer {layer} of a model with {self.depth} blocks; use 0 to {self.depth - 1}, or -1 for the last"
            )
        return layer % self.depth


def check(config: ViTConfig) -> None:
    """Refuse shapes that cannot be built."""
    if config.embed_dim % config.num_heads:
        raise InputError(f"num_heads={config.num_heads} does not divide embed_dim={config.embed_dim}; change one")
    if config.image_size < config.patch_size:
        raise InputError(
            f"image_size={config.image_size} is smaller than patch_size={config.patch_size}; give a larger image_size"
        )


def initialise_linear(module: nn.Module) -> None:
    """Linear layers start as in DeiT-III and DINOv2; convolutions keep torch's default."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
