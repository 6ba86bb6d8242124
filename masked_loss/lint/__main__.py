# SPDX-License-Identifier: BSD-3-Clause
"""``python -m masked_loss.lint PATH ...`` is ``masked-loss-lint PATH ...``."""

import sys

from masked_loss_lint.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
