# SPDX-License-Identifier: BSD-3-Clause
"""masked_loss for other people's trainers. Each module needs what it is named after."""
