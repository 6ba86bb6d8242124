# SPDX-License-Identifier: BSD-3-Clause
"""Another project in the same repository: no file imports both."""


def step(model, batch, mask):
    out = model(**batch)
    return (out.loss * mask).sum()
