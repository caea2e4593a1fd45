"""``python -m lemcal_async.cli`` is ``lemcal``."""

import sys

from lemcal_async.cli import main

sys.exit(main())
