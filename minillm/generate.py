"""Sampling from a model, the plain way: the whole sequence through the model for every token."""
import torch


@torch.no_grad()
def generate(model, ids, max_new_tokens, temperature=1.0, stop=None, seed=0):
    """Continue ids, int64 (b, t), by up to max_new_tokens tokens; returns (b, t + n), n the steps until every row has met `stop`.

    temperature divides the logits before the softmax; 0 takes the most likely token. Raises ValueError if temperature is negative
    or the sequence would pass max_seq_len.
    """
    if temperature < 0:
        raise ValueError(f"temperature must be 0 (greedy) or above: got {temperature}")
    if ids.shape[1] + max_new_tokens > model.config.max_seq_len:
        raise ValueError(f"{ids.shape[1]} + {max_new_tokens} tokens are more than max_seq_len={model.config.max_seq_len}")
    model.eval()
    rng = torch.Generator(ids.device).manual_seed(seed)
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for _ in range(max_new_tokens):
        logits = model(ids)[:, -1].float()
        if temperature == 0:
            new = logits.argmax(-1, keepdim=True)
        else:
            new = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=rng)
        ids = torch.cat((ids, new), dim=1)
        if stop is not None:
            done |= new[:, 0] == stop
            if done.all():
                break
    return ids
