import pytest
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
