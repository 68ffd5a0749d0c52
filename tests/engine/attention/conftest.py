"""Where the kernel was not compiled, there is nothing to hold against its reference."""

from engine.kernels import native

collect_ignore = [] if native.LIBRARY is not None else ["test_native.py"]
