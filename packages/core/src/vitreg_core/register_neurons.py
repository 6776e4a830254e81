"""Register neurons: the hidden units that write outliers, as found on some images, and as a file."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

from pydantic import ConfigDict, FiniteFloat, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from vitreg_core.errors import InputError
from vitreg_core.whole import write_json


class Neuron(NamedTuple):
    """One hidden unit of one block's MLP; both count from 0."""

    layer: NonNegativeInt
    unit: NonNegativeInt


@dataclass(frozen=True)
class Step:
    """A model edited with the first neurons of the ranking, on the calibration images."""

    neurons: NonNegativeInt
    """How many."""
    fraction: FiniteFloat
    """Part of the patch tokens, 0 to 1, whose norm over the median of their image in the unedited model is above the
    cut."""
    found: bool
    """Whether the norms still have an outlier mode, by the rule of `find_outliers`."""
    cosine: FiniteFloat
    """Mean cosine of the class token (the mean patch, without one) after the final norm to that of the original."""


@dataclass(frozen=True)
class RegisterNeurons:
    """Which neurons write the outliers of a model, how well moving them worked, and what this was found with."""

    neurons: tuple[Neuron, ...]
    """The chosen ones, highest score first; none where the model has no outliers."""
    scores: tuple[FiniteFloat, ...]
    """Of each, the mean activation at outliers minus that at other patches, in standard deviations of the latter."""
    tokens: PositiveInt
    """Test-time registers to give the model: as many as a typical image with outliers has of them, at most 8."""
    steps: tuple[Step, ...]
    """The curve of the choice: every number of neurons that was tried, ascending."""
    before: FiniteFloat
    """Part of the patch tokens that are outliers in the unedited model, 0 to 1."""
    after: FiniteFloat
    """Part of them above the cut with the chosen neurons moved, as in the chosen step."""
    cosine: FiniteFloat
    """As in the chosen step; 1 where nothing is moved."""
    met: bool
    """Whether the wanted part of the outliers went, with the cosine above its guard; False without outliers."""
    cut: FiniteFloat | None
    """Log of a norm over the median norm of its image above which a patch token counts; None without outliers."""
    cutoff: FiniteFloat | None
    """The cut as a norm in an image of typical median, for information; None without outliers."""
    outlier_block: NonNegativeInt | None
    """Block after which outliers were marked, from 0: the last, or the clearest where norms drop in the last."""
    emergence_block: NonNegativeInt | None
    """Block in which these outliers appear, from 0: the last one that was searched."""
    rule: Literal["mixture", "small-sample"]
    """Which rule of `find_outliers` gave the verdict."""
    images: PositiveInt
    """Number of calibration images."""
    source: str
    """Where the model's weights come from."""
    weights: str
    """SHA-256 of the model's weights."""
    remaining: FiniteFloat
    """Part of the outliers that was allowed to remain, 0 to 1."""
    guard: FiniteFloat
    """Smallest cosine that was allowed."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    @property
    def verdict(self) -> str:
        """What came out, in one sentence."""
        if self.cutoff is None:
            return f"no outlier mode on {self.images} images: there is nothing to move"
        goal = "" if self.met else f"; no number of neurons kept {self.remaining:.0%} or fewer at a cosine {self.guard}"
        return (
            f"{len(self.neurons)} neuron{'s' * (len(self.neurons) != 1)} to {self.tokens} "
            f"register{'s' * (self.tokens != 1)}: outliers {self.before:.2%} -> {self.after:.2%} "
            f"of the patches, cosine {self.cosine:.4f}{goal}"
        )

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all.

        Raises:
            InputError: the file cannot be written.
        """
        values = asdict(self)
        values["neurons"] = [neuron._asdict() for neuron in self.neurons]
        try:
            write_json(Path(path), values)
        except OSError as error:
            raise InputError(f"{path}: cannot write the register neurons ({error}); give another path") from None

    @classmethod
    def load(cls, path: str | Path) -> "RegisterNeurons":
        """Read what `save` wrote.

        Raises:
            InputError: no such file, or one that is not exactly of this form; names the first field that is not.
        """
        try:
            found = TypeAdapter(cls).validate_json(Path(path).read_bytes())
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error}); give a file of register neurons") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise InputError(
                f"{path}: {where}: {first['msg']}; write it again with find_register_neurons(...).save(path)"
            ) from None
        if len(found.scores) != len(found.neurons):
            raise InputError(f"{path}: {len(found.neurons)} neurons with {len(found.scores)} scores; write it again")
        return found
