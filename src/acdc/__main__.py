"""``python -m acdc`` is the command ``acdc``."""

import sys

from acdc.cli import main

sys.exit(main())
