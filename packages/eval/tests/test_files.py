from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image
from vitreg_core.errors import InputError
from vitreg_eval.files import save_figure, write_whole


def test_a_file_that_cannot_be_written_is_one_error_and_what_was_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole(tmp_path / "new" / "a", b"old")

    def full(path: Path, content: bytes) -> int:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match=r"new/a: cannot be written \(No space left on device\); give another --out"):
        write_whole(tmp_path / "new" / "a", b"new")
    assert [path.read_bytes() for path in (tmp_path / "new").iterdir()] == [b"old"]


def test_a_figure_is_a_png_or_one_error(tmp_path: Path) -> None:
    save_figure(Figure(figsize=(2, 1), dpi=50), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (100, 50))
    (tmp_path / "b.png").mkdir()
    with pytest.raises(InputError, match=r"b\.png: cannot be written"):
        save_figure(Figure(), tmp_path / "b.png")
