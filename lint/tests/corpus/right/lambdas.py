# SPDX-License-Identifier: BSD-3-Clause
"""Who takes a lambda may call it for each sample; one that is called is judged by its calls."""

import torch.nn.functional as F
from batching import for_each

each = for_each(lambda x, y, mask: F.cross_entropy(x, y) * mask)
unreduced = lambda x, y, mask: F.cross_entropy(x, y, reduction="none") * mask  # noqa: E731
