"""`python -m server`, the same as `logitmill`."""

from server.cli import main

if __name__ == "__main__":
    main()
