"""``python -m qatfast``: the ``qatfast`` command."""

import sys

from qatfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
