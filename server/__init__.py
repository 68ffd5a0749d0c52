"""The HTTP front end: OpenAI's API over the engine."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("logitmill")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0.0.0"
