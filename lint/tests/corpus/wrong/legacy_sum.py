from torch import nn

criterion = nn.NLLLoss(size_average=False)  # expect: ML002


def decode(step, inputs, labels, mask):
    total = 0
    for t in range(labels.size(1)):
        loss = criterion(step(inputs), labels[:, t])
        total += (loss * mask[:, t]).sum()  # expect: ML001
    return total
