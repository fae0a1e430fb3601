"""`python -m neuralforge.cli`."""

import sys

from .main import main

sys.exit(main())
