"""The command: `logitmill serve` and `logitmill pull`, the same as `python -m server`."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from engine.config import EngineConfig, shown_size
from engine.errors import ModelUnavailable
from engine.machine import address_space, free_memory, take_short_turns
from engine.models.source import config_names, locate
from server import __version__, stdio
from server.settings import OPTIONS, BadOption, Settings, flag, resolve, variable

_SPACE_OF_OTHERS = 400 << 20  # of address space, besides torch's own code: libraries and threads
_MEMORY_OF_LIBRARIES = 192 << 20
_DEFAULT_MODEL = EngineConfig.model_fields["model"].default
_TITLES = {"engine": "running the model", "server": "answering requests"}

_EPILOG = f"""\
Every option of `serve` is also an environment variable (--max-model-len is
{variable("max_model_len")}) and a key of the TOML file given by --config. A flag goes before
a variable, a variable before the file, the file before the default.

{variable("home")} is where downloads are kept; default: the platform's cache folder.

Models by name: {", ".join(config_names())}
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Exits with 2 and one line on standard error if it cannot."""
    stdio.protect()
    argv = sys.argv[1:] if argv is None else argv
    # numpy's own threads would have nothing to do, and there is one for every core of the machine.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        args = _parser().parse_args(argv)
        flags = {name: value for name, value in vars(args).items() if value is not None}
        command, file = flags.pop("command"), flags.pop("config", None)
        settings = resolve(flags, file)
        if command == "pull":
            _pull(settings)
        else:
            sys.exit(_import_serve()(settings))
    except (BadOption, ModelUnavailable) as error:
        sys.exit(_fail(_without_keys(str(error), argv)))
    except KeyboardInterrupt:
        sys.exit(130)


def _pull(settings: Settings) -> None:
    """Fetch a model and print where it is. Raises BadOption if that cannot be printed."""
    with _unwound():
        folder = locate(settings.engine.model, settings.source).fetch()
    print(folder)
    if (failure := stdio.lost_output()) is not None:
        raise BadOption(f"cannot write to standard output: {failure.strerror}")


@contextmanager
def _unwound() -> Iterator[None]:
    """Have signals that ask for an end raise an exception, so that nothing half-made is left."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {
        number: signal.signal(number, lambda sent, _: sys.exit(128 + sent)) for number in numbers
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _import_serve() -> Callable[[Settings], int]:
    """Imported only now: torch takes seconds."""
    # Between the parts of a step OpenMP's threads look out for work for some microseconds, then
    # sleep. By default they go on so long that nobody else has a core: not HTTP, nor a thread of
    # theirs that another process keeps from its core.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    take_short_turns()  # before there are other threads
    _check_room()
    try:
        from server.run import serve
    except ValueError as error:  # a variable that is read on import
        raise BadOption(str(error)) from error
    return serve


def _without_keys(message: str, argv: Sequence[str]) -> str:
    """A message about the command line without the keys on it, which a log may keep."""
    after_key = False
    for word in argv:
        name, _, value = word.partition("=")
        if word.startswith("-"):
            after_key = "key" in name.lower()
        elif after_key:
            value = word
        if after_key and value:
            message = message.replace(value, "…")
    return message


def _check_room() -> None:
    """Raise BadOption if the libraries have no room: some end the process without a clear word."""
    sizes = [file.stat().st_size for file in _torch_folder().glob("lib/*.so*")]
    needs = [
        (address_space(), sum(sizes) + _SPACE_OF_OTHERS, "address space"),
        (free_memory(), _MEMORY_OF_LIBRARIES, "memory"),
    ]
    for room, size, kind in needs:
        if room is not None and room.free < size:
            raise BadOption(
                f"the libraries take about {shown_size(size)} of {kind}, and {room.bound} leaves "
                f"{shown_size(room.free)}"
            )


def _torch_folder() -> Path:
    """Where torch is, which is most of the code, without importing it."""
    spec = find_spec("torch")
    return Path(spec.origin).parent if spec is not None and spec.origin else Path()


def _fail(message: str) -> int:
    print(f"logitmill: error: {message}", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        raise BadOption(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="logitmill",
        description="Serve a language model over OpenAI's HTTP API, with every published decoding "
        "method as a request parameter.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"logitmill {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="serve a model",
        description="Serve a model until interrupted.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    serve.add_argument("--config", metavar="FILE", help="a TOML file like those in configs/")
    for section, model in OPTIONS.items():
        group = serve.add_argument_group(_TITLES[section])
        for name, option in model.model_fields.items():
            _add_option(group, name, option)
    pull = commands.add_parser(
        "pull",
        help="download and convert a model, so that serving it starts at once and offline",
        description="Download and convert a model, and print where it is.",
        allow_abbrev=False,
    )
    pull.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help=f"a name, a hub id or a .gguf file; default: {_DEFAULT_MODEL}",
    )
    return parser


def _add_option(group: Any, name: str, option: Any) -> None:
    text = option.description
    if option.default not in (None, []) and not isinstance(option.default, bool):
        text += f" (default: {option.default})"
    text = text.replace("%", "%%")
    if option.annotation is bool:
        group.add_argument(
            flag(name),
            action=argparse.BooleanOptionalAction,
            default=None,
            help=f"{text} (default: {'on' if option.default else 'off'})",
        )
    else:
        group.add_argument(flag(name), default=None, metavar=_metavar(name), help=text)


def _metavar(name: str) -> str:
    return name.rpartition("_")[2].upper()
