# SPDX-License-Identifier: BSD-3-Clause
"""It names nothing that this is about, but it is what connects the two."""

from engine.loop import Loop
from nets.tagger import Tagger

Loop(Tagger()).fit()
