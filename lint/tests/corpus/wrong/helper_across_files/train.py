from losses import lm_loss, masked_mean


def step(model, batch):
    loss = lm_loss(model(batch["ids"]), batch["ids"])
    return masked_mean(loss, batch["attention_mask"][:, 1:])
