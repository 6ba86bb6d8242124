import torch.nn.functional as F


class First:
    def forward(self, x, y):
        self.last_loss = F.cross_entropy(x, y)


class Second:
    def forward(self, x, y):
        self.last_loss = F.cross_entropy(x, y, reduction="none")
