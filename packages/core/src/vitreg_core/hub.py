"""Models from and to the Hugging Face hub."""

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, cast

from vitreg_core.config import ViTConfig
from vitreg_core.errors import InputError
from vitreg_core.extras import require

if TYPE_CHECKING:
    from vitreg_core.vit import VisionTransformer

CARD = """---
library_name: vitreg
pipeline_tag: image-feature-extraction
tags: [vision-transformer, registers]
---

# {name}

A vision transformer with {registers} registers: patches of {patch_size} pixels, width {embed_dim}, {depth} blocks,
{num_heads} heads, for images of {size} pixels. Weights from: {source}.

```python
from vitreg_core import VisionTransformer

model = VisionTransformer.from_pretrained("{name}")
features = model(model.preprocess(image)[None])  # cls, registers, patches, grid
```
"""


class HubMethods:
    """What `VisionTransformer` offers to users of the hub."""

    config: ViTConfig
    source: str

    @staticmethod
    def from_pretrained(source: str | Path) -> "VisionTransformer":
        """Load a model by any source that `load_model` reads; `org/name` alone is a repository of the hub.

        Raises:
            InputError: as `load_model`.
        """
        from vitreg_core.weights import load_model  # it needs the model

        is_repository = re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", str(source)) and not Path(source).exists()
        return load_model(f"hub:{source}" if is_repository else source)

    def push_to_hub(self, repository: str, *, private: bool = False) -> str:
        """Upload weights, config and a model card; returns the address.

        Args:
            repository: `org/name`; made if it is not there.
            private: who may see a repository that is made.

        Raises:
            InputError: huggingface_hub is not installed, nobody is logged in, or the upload is refused.
        """
        from vitreg_core.weights import save_model  # it needs the model

        hub = require("huggingface_hub", "hub", "push_to_hub")
        with tempfile.TemporaryDirectory() as folder:
            save_model(cast("VisionTransformer", self), folder)
            Path(folder, "README.md").write_text(self.model_card(repository))
            try:
                hub.create_repo(repository, private=private, exist_ok=True)
                hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload a vitreg model")
            except (OSError, ValueError, hub.errors.HTTPError) as error:
                reason = str(error).strip().partition("\n")[0]
                raise InputError(f"{repository}: cannot upload ({reason}); check the name and: hf auth login") from None
        return f"https://huggingface.co/{repository}"

    def model_card(self, repository: str) -> str:
        """What the README of a repository says."""
        height, width = self.config.size
        values = self.config.model_dump(include={"registers", "patch_size", "embed_dim", "depth", "num_heads"})
        source = self.source or "not recorded"
        return CARD.format(name=repository, size=f"{height}x{width}", source=source, **values)
