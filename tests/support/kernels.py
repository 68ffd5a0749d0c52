"""The compiled kernels, once for each vector width that this machine has."""

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from engine.kernels import native

WIDTHS = (0, 256, 512, 513)


def libraries() -> list[native.Library]:
    """Narrowest first; none where the kernels were not compiled, or are switched off."""
    if native.LIBRARY is None:
        return []
    folder = Path(native.__file__).parent
    (path, *_) = [
        folder / f"_cpu{suffix}"
        for suffix in EXTENSION_SUFFIXES
        if (folder / f"_cpu{suffix}").exists()
    ]
    return [native.Library(path, width) for width in WIDTHS if width <= native.LIBRARY.isa]
