# SPDX-License-Identifier: BSD-3-Clause
"""The door to `masked_loss_lint`, which needs neither torch nor this package. See docs/lint.md."""
