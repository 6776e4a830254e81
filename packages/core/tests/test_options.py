from pathlib import Path

import pytest
import yaml
from vitreg_core.config import Config, ViTConfig
from vitreg_core.errors import InputError
from vitreg_core.options import one_line_errors, parse_options


class Options(Config):
    model: ViTConfig = ViTConfig()
    rate: float | None = 0.5
    """Peak rate."""
    layers: tuple[int, ...] = ()
    center: bool = False


def parse(line: str) -> Options:
    return parse_options(Options(), line.split(), "program")


def test_every_form_of_an_option_is_read() -> None:
    read = parse("--model.drop-path 0.1 --rate=none --layers 1 -1 --layers 3 --center")
    assert (read.model.drop_path, read.rate, read.layers, read.center) == (0.1, None, (1, -1, 3), True)
    assert parse("--center false") == Options()
    assert parse("--rate 1 --rate 2").rate == 2


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("--model.regsters 4", "unknown option --model.regsters; did you mean model.registers"),
        ("--rate", "--rate takes one value, got 0"),
        ("--rate 1 2", "--rate takes one value, got 2"),
        ("--regsters 4 --help", "unknown option --regsters"),
        ("--rate abc", "rate='abc': Input should be a valid number"),
        ("rate 1", "unexpected argument 'rate'; options look like --name value"),
    ],
)
def test_wrong_options_are_named(line: str, advice: str) -> None:
    with pytest.raises(InputError, match=advice):
        parse(line)


def test_help_teaches_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse("--rate 0.25 --help")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "--model.registers" in printed
    assert "Peak rate." in printed


def test_errors_end_the_program_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, one_line_errors("program"):
        parse("--x 1")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "program: error: unknown option --x; --help lists all\n"


def test_a_file_gives_defaults_that_the_command_line_overrides(tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    file.write_text("model: {registers: 4, drop_path: 1e-1}\nlayers: [1, -1]\nrate: null\n")
    read = parse(f"--model.drop_path 0.2 --config {file}")
    assert (read.model.registers, read.model.drop_path, read.layers, read.rate) == (4, 0.2, (1, -1), None)
    assert parse(f"--config={file}").model.drop_path == 0.1


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("model: {regsters: 4}", r"some.yaml: unknown field model.regsters; did you mean model.registers\?; --print-"),
        ("rat: 1", r"some.yaml: unknown field rat; did you mean rate\?; --print-config prints all"),
        ("model: {registers: many}", r"some.yaml: model.registers='many': Input should be a valid integer"),
        ("model: 3", r"some.yaml: model=3: Input should be a valid dictionary"),
        ("rate: [", r"some.yaml: not valid YAML \(.*\); --print-config prints a file to start from"),
        ("- rate", r"some.yaml: holds no names and values; --print-config prints a file to start from"),
        ("1: 2", r"some.yaml: unknown field 1; --print-config prints all"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, text: str, advice: str) -> None:
    (tmp_path / "some.yaml").write_text(text)
    with pytest.raises(InputError, match=advice) as raised:
        parse(f"--config {tmp_path / 'some.yaml'}")
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.yaml: cannot be read \(.*\); give --config a YAML file"):
        parse(f"--config {tmp_path / 'none.yaml'}")
    with pytest.raises(InputError, match="--config takes one file, got 0"):
        parse("--config")


def test_a_printed_config_can_be_given_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = "--rate 1e-6 --layers 1 2 --model.registers 3 --model.layer_scale none --center"
    with pytest.raises(SystemExit) as ended:
        parse(f"{given} --print-config")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["model"]["registers"] == 3
    (tmp_path / "all.yaml").write_text(printed)
    assert parse(f"--config {tmp_path / 'all.yaml'}") == parse(given)
