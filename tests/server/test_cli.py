"""The command: what it takes, what it says, how it exits."""

import logging
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from engine.models.source import config_names
from server import __version__, cli
from server.settings import OPTIONS, Settings, flag, variable

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing from the environment of whoever runs the tests."""
    for model in OPTIONS.values():
        for name in model.model_fields:
            monkeypatch.delenv(variable(name), raising=False)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """What would have been served."""
    settings: list[Settings] = []
    monkeypatch.setattr("server.run.serve", lambda given: settings.append(given) or 0)
    return settings


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_options_reach_the_server(
    served: list[Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[server]\nport = 3\nhost = 'h'\nmax_prompts = 7\n")
    monkeypatch.setenv("LOGITMILL_PORT", "2")
    monkeypatch.setenv("LOGITMILL_MAX_PROMPTS", "6")

    code = run("serve", "--config", str(file), "--port=1", "--no-docs", "--strict-params")

    assert code == 0
    (settings,) = served
    assert (settings.server.port, settings.server.host) == (1, "h")
    assert settings.server.max_prompts == 6
    assert (settings.server.docs, settings.server.strict_params) == (False, True)


@pytest.mark.parametrize(
    ("section", "name"),
    [(section, name) for section, model in OPTIONS.items() for name in model.model_fields],
)
def test_every_option_has_a_flag_with_a_text(
    served: list[Settings], capsys: Captured, section: str, name: str
) -> None:
    option = OPTIONS[section].model_fields[name]
    if option.annotation is bool:
        for prefix, expected in (("--", True), ("--no-", False)):
            assert run("serve", flag(name).replace("--", prefix, 1)) == 0
            assert getattr(getattr(served.pop(), section), name) is expected
    else:
        # Whatever the type, the flag takes a value, and an unusable one is blamed on it.
        assert run("serve", flag(name)) == 2
        assert f"argument {flag(name)}: expected one argument" in capsys.readouterr().err
    assert option.description
    assert run("serve", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert flag(name) in text
    words = option.description.split()[:4]
    assert " ".join(words) in text


def test_help_is_complete(capsys: Captured) -> None:
    assert run("--help") == 0
    short = capsys.readouterr().out
    assert run("serve", "--help") == 0
    long = capsys.readouterr().out

    for text in (short, long):
        assert "LOGITMILL_HOME" in text
        assert all(name in text for name in config_names())
    for command in ("serve", "pull"):
        assert command in short
    assert run("pull", "--help") == 0
    assert "smollm2-135m-instruct" in capsys.readouterr().out


def test_the_version_is_told(capsys: Captured) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"logitmill {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "COMMAND"),
        (["dance"], "dance"),
        (["serve", "--potato"], "--potato"),
        (["serve", "extra"], "extra"),
        (["serve", "--por", "5"], "--por"),  # no guessing
        (["serve", "--port"], "--port"),
        (["serve", "--port", "x"], "--port: .* got 'x'"),
        (["serve", "--docs=1"], "--docs"),
        (["serve", "--config", "/nowhere.toml"], "--config: cannot read /nowhere.toml"),
        (["serve", "--model", "potato"], "'potato' is no folder"),
        (["serve", "--model", "./potato"], "there is no file or folder ./potato"),
        (["serve", "--model", "missing.gguf"], "there is no file or folder missing.gguf"),
        (["serve", "--api-key-file", "/nowhere", "--model", "/tmp"], "--api-key-file"),
        (["pull", "potato"], "'potato' is no folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    capsys: Captured, argv: list[str], says: str
) -> None:
    assert run(*argv) == 2

    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("logitmill: error: ")
    assert re.search(says, line)


@pytest.mark.parametrize(
    "argv",
    [
        ["--api-key", "s3cret", "s3cret2"],
        ["--api_key", "s3cret"],
        ["--api_key=s3cret"],
        ["--api-key", "s3cret", "--api-keys", "s3cret2", "--port"],
        ["--api-key=s3cret,", "--port", "1"],
        ["--apikey", "s3cret", "more"],
    ],
)
def test_no_mistake_puts_a_key_into_the_log(capsys: Captured, argv: list[str]) -> None:
    assert run("serve", *argv) == 2

    captured = capsys.readouterr()
    assert "s3cret" not in captured.out + captured.err
    assert captured.err.startswith("logitmill: error: ")


def test_a_model_that_cannot_be_served_is_told_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "potato"}')

    assert run("serve", "--model", str(tmp_path), "--port", "0") == 2

    (record,) = [record for record in caplog.records if record.levelno > logging.INFO]
    assert record.levelno == logging.ERROR
    assert "potato" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_pull_prints_where_the_model_is(tiny_folder: Path, capsys: Captured) -> None:
    cli.main(["pull", str(tiny_folder)])

    assert capsys.readouterr().out == f"{tiny_folder}\n"


def test_an_interrupt_is_no_error(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    def interrupted(_settings: Settings) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("server.run.serve", interrupted)

    assert run("serve") == 130
    assert capsys.readouterr().err == ""


def test_the_package_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr(sys, "argv", ["server", "--version"])
    with pytest.raises(SystemExit):
        runpy.run_module("server", run_name="__main__")
    assert capsys.readouterr().out.startswith("logitmill ")


def test_parsing_options_loads_no_model_code() -> None:
    """`--help` must not take the seconds that importing torch takes."""
    program = "import sys, server.cli; server.cli._parser(); assert 'torch' not in sys.modules"

    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(("own", "want"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_threads_without_work_soon_sleep(own: dict[str, str], want: str) -> None:
    env = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    done = subprocess.run(
        [sys.executable, "-c", "from server import cli; cli._import_serve()"],
        env=env | own | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"GOMP_SPINCOUNT = '{want}'" in done.stderr
