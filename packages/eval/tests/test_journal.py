from pathlib import Path

import pytest
from vitreg_core.errors import InputError
from vitreg_eval.journal import Entry, Journal


def test_processes_share_a_folder(tmp_path: Path) -> None:
    entry = Entry(0, (4, 5), [[0, 0, 5, 4], None], {"seed": 1})
    for process in (0, 1):
        with Journal(tmp_path, "key", process) as journal:
            journal.add(entry._replace(number=process))
    with Journal(tmp_path, "key", 0) as journal:
        assert journal.finished == {0, 1}
    assert sorted(journal.entries()) == [entry, entry._replace(number=1)]
    journal.remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "line",
    ["nonsense", "[]", '{"number": 1}', '{"number": 1, "size": [2, 2], "boxes": [[1]], "diagnostics": {}}'],
)
def test_a_damaged_journal_is_an_error(tmp_path: Path, line: str) -> None:
    (tmp_path / "journal-0.jsonl").write_text(f'{{"key": "key"}}\n{line}\n')
    with pytest.raises(InputError, match="delete the file, or give another --out"):
        Journal(tmp_path, "key").__enter__()
