"""Texts in the joint space of a dual encoder, computed once and kept on the disk."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm
from vitreg_core.errors import InputError
from vitreg_core.precision import use_precision
from vitreg_core.weights.files import weights_hash

from vitreg_eval.dual import Dual
from vitreg_eval.manifest import architecture_hash

TEXTS = 512
"""Texts of a forward pass, at most; a constant, so that features do not depend on options."""


def text_features(dual: Dual, texts: Sequence[str], cache: Path | None = None) -> Float[Tensor, "n e"]:
    """Texts in the joint space, of length 1, in float32 on the CPU.

    Args:
        dual: reads them.
        texts: in any language that it knows.
        cache: folder that keeps them for the next command.

    Raises:
        InputError: features are not finite, or the folder cannot be written.
    """
    return kept(cache, key(dual, {"texts": list(texts)}), lambda: torch.cat(list(embed(dual, texts, 1))))


def class_features(
    dual: Dual, names: Sequence[str], templates: Sequence[str], cache: Path | None = None
) -> Float[Tensor, "classes e"]:
    """For each class the mean of its prompts, of length 1 (Radford et al. 2021, section 3.1.4), in float32 on the CPU.

    Args:
        dual: reads the prompts.
        names: of the classes.
        templates: prompts with {} where the name stands.
        cache: folder that keeps the features for the next command.

    Raises:
        InputError: features are not finite, or the folder cannot be written.
    """
    prompts = [template.replace("{}", name) for name in names for template in templates]

    def compute() -> Float[Tensor, "classes e"]:
        means = [one.unflatten(0, (-1, len(templates))).mean(dim=1) for one in embed(dual, prompts, len(templates))]
        return torch.nn.functional.normalize(torch.cat(means), dim=-1)

    return kept(cache, key(dual, {"names": list(names), "templates": list(templates)}), compute)


def embed(dual: Dual, texts: Sequence[str], whole: int) -> Iterator[Float[Tensor, "b e"]]:
    """Texts in batches of whole groups of so many.

    Raises:
        InputError: features that are not finite.
    """
    size = whole * max(1, TEXTS // whole)
    with tqdm(total=len(texts), desc="texts", unit="text", disable=None, leave=False) as bar:
        for start in range(0, len(texts), size):
            batch = texts[start : start + size]
            with use_precision("fp32", dual.device):
                found = dual.encode_text(batch).cpu()
            if not found.isfinite().all():
                raise InputError(f"{dual.source}: features of {batch[0]!r} are not finite numbers; check its weights")
            bar.update(len(batch))
            yield found


def key(dual: Dual, texts: dict[str, list[str]]) -> str:
    """SHA-256 over all that features of texts depend on."""
    tokens = dual.tokenize(["a photo of the numbers 1 and 2"]).tolist()
    model = [weights_hash(dual), architecture_hash(dual), type(dual.tokenize).__name__, tokens]
    return hashlib.sha256(json.dumps([model, texts], sort_keys=True).encode()).hexdigest()


def kept(cache: Path | None, digest: str, compute: Callable[[], Float[Tensor, "n e"]]) -> Float[Tensor, "n e"]:
    """Features from the folder; where they are missing or damaged, they are computed and put there.

    Raises:
        InputError: the folder cannot be written.
    """
    if cache is None:
        return compute()
    file = cache / f"texts-{digest[:16]}.safetensors"
    found = read(file, digest)
    if found is None:
        found = compute()
        write(file, found, digest)
    return found


def read(file: Path, digest: str) -> Float[Tensor, "n e"] | None:
    """Features that a file holds, if they are those of the digest and whole."""
    try:
        with safe_open(file, "pt") as content:
            there = (content.metadata() or {}).get("of") == digest
            found: Tensor | None = content.get_tensor("texts") if there else None
    except (OSError, SafetensorError, ValueError):
        return None
    good = found is not None and found.ndim == 2 and found.dtype == torch.float32 and bool(found.isfinite().all())
    return found if good else None


def write(file: Path, features: Float[Tensor, "n e"], digest: str) -> None:
    """Write features, whole or not at all, also where other processes write the same.

    Raises:
        InputError: the folder cannot be written.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(save({"texts": features.contiguous()}, {"of": digest}))
        temporary.replace(file)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise InputError(f"{file}: cannot be written ({error.strerror}); give another --cache") from None
