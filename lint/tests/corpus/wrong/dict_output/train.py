from model import Classifier


def train(loader):
    model = Classifier().cuda().train()
    for batch in loader:
        out = model(batch["x"], batch["y"])
        loss = out["loss"] * batch["mask"]  # expect: ML001
        loss.mean().backward()
