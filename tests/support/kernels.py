"""The compiled kernels, once for each instruction set that this machine has."""

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from engine.kernels import native

ISAS = (0, 256, 512, 513)


def libraries() -> list[native.Library]:
    """The least able first; none where the kernels were not compiled, or are switched off."""
    if native.LIBRARY is None:
        return []
    folder = Path(native.__file__).parent
    (path, *_) = [
        folder / f"_cpu{suffix}"
        for suffix in EXTENSION_SUFFIXES
        if (folder / f"_cpu{suffix}").exists()
    ]
    return [native.Library(path, isa) for isa in ISAS if isa <= native.LIBRARY.isa]
