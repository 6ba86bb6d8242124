# SPDX-License-Identifier: BSD-3-Clause
from models.classifier import Classifier
from training import loop

step, model = loop.step, Classifier()
