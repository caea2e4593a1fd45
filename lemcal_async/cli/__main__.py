"""``python -m lemcal_async.cli`` runs the ``lemcal`` command."""

import sys

from lemcal_async.cli import main

sys.exit(main())
