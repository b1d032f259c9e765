"""``python -m deconvnet``: the command line without the installed script."""

from deconvnet.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
