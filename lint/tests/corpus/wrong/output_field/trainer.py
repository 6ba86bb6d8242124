"""The model comes in as an argument, so only the name of the field leads back to it."""


def training_step(model, hidden, labels, loss_mask):
    out = model(hidden, labels)
    return (out.loss * loss_mask).sum() / loss_mask.sum().clamp_min(1)  # expect: ML001
