"""``python -m hpcft``: the same as ``hpcft``."""

from hpcft.cli.main import main

if __name__ == "__main__":
    main()
