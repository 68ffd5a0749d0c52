"""Where the kernels were not compiled, there is nothing to hold against their references."""

from engine.kernels import native

IN_NEED = [
    "test_choose.py",
    "test_filters.py",
    "test_history.py",
    "test_quantized.py",
    "test_rows.py",
]
collect_ignore = [] if native.LIBRARY is not None else IN_NEED
