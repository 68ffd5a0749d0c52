"""`python -m server`, the same as `logitmill`."""

import resource
import sys

_MIB = 1 << 20
_NEEDED = 64 * _MIB  # of address space, before anything of a model is loaded


def main() -> None:
    """Run the command. Exits with 2 and one line on standard error if it cannot."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if 0 <= limit < _NEEDED:  # negative: no limit
        sys.stderr.write(
            f"logitmill: error: the command alone takes about {_NEEDED // _MIB} MiB of address "
            f"space, and `ulimit -v` allows {limit // _MIB} MiB\n"
        )
        sys.exit(2)
    from server import cli  # only now: with less space this ends in a traceback

    cli.main()


if __name__ == "__main__":
    main()
