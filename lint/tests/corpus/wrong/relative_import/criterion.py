from torch import nn

criterion = nn.CrossEntropyLoss(reduction="mean")
