"""``python -m xcos_ext`` is the ``xcos`` command."""

from xcos_ext.cli import main

if __name__ == "__main__":
    main()
