"""Options of the command that compares results."""

from pathlib import Path

from vitreg_core.config import Config


class CompareOptions(Config):
    """Which differences between results of the same task exceed the noise of the images."""

    results: tuple[str, ...] = ()
    """Files result.json, or folders with one; the first is what the others are compared with."""
    out: Path = Path("runs/eval/compare.json")
    """JSON file for the comparison."""

    def needs(self) -> list[str]:
        """What must still be given."""
        return [] if len(self.results) > 1 else ["two or more results, each a result.json or its folder"]
