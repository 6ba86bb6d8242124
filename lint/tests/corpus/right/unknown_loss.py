def step(model, batch):
    """Nobody knows here what this model returns."""
    out = model(**batch)
    return (out.loss * batch["mask"]).sum()
