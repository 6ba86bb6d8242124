# SPDX-License-Identifier: BSD-3-Clause
settings = {"dim": 512}
