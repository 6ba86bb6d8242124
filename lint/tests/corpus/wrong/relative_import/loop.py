from .criterion import criterion


def run(model, loader):
    for inputs, labels, mask in loader:
        loss = criterion(model(inputs), labels)
        (mask * loss).sum().backward()  # expect: ML001
