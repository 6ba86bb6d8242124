# SPDX-License-Identifier: BSD-3-Clause
def step(model, batch, mask):
    out = model(**batch)
    return (out.loss * mask).sum()  # expect: ML001
