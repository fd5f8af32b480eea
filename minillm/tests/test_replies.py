"""Answers of a tuned model, one and many, and the loss of distillation."""
import pytest
import torch

from minillm.data import IGNORE
from minillm.model import Llama
from minillm.sft import distill_loss, finetune, replies, reply
from minillm.tests import test_sft
from minillm.tests.test_sft import CONFIG, assistant, user
from minillm.train import TrainConfig

model, tokenizer = test_sft.model, test_sft.tokenizer       # fixtures: pytest finds them by name


# ---- replies


def memory(tokenizer):
    """A model that knows one dialogue by heart."""
    torch.manual_seed(0)
    model = Llama(CONFIG)
    dialogue = [user("Hi"), assistant("Hello 🦙!"), user("Bye"), assistant("So long.")]
    finetune(model, [dialogue] * 4, tokenizer,
             TrainConfig(steps=80, lr=1e-2, warmup=5, bar=False, precision="float32"), batch_size=4)
    return model, dialogue


def test_replies(tokenizer):
    model, dialogue = memory(tokenizer)
    assert reply(model, tokenizer, dialogue[:1]) == dialogue[1]["content"]
    assert reply(model, tokenizer, dialogue[:3]) == dialogue[3]["content"]
    prompts = [dialogue[:3], dialogue[:1], dialogue[:3]]
    both = replies(model, tokenizer, prompts, n=2, max_new_tokens=20, batch_size=4)
    assert both == [["So long."] * 2, ["Hello 🦙!"] * 2, ["So long."] * 2]
    assert replies(model, tokenizer, [dialogue[:1]], max_new_tokens=2) == [[None]]
    [[cut]] = replies(model, tokenizer, [dialogue[:1]], max_new_tokens=2, partial=True)
    assert "Hello 🦙!".startswith(cut)
    assert "Hello 🦙!".startswith(reply(model, tokenizer, dialogue[:1], max_new_tokens=2))
    assert replies(model, tokenizer, []) == []


def test_replies_do_not_depend_on_the_batch(tokenizer, model):
    prompts = [[user("Where is Vera? " * n)] for n in (1, 3, 2, 1)]
    alone = [replies(model, tokenizer, [p], max_new_tokens=12, partial=True)[0] for p in prompts]
    together = replies(model, tokenizer, prompts, max_new_tokens=12, partial=True)
    assert together == alone and len({a for a, in alone}) > 1


def test_sampled_replies_depend_on_the_seed_only(tokenizer, model):
    prompts = [[user("Hi")], [user("Where is Vera?")]]

    def sample(seed):
        return replies(model, tokenizer, prompts, n=3, temperature=1.0, max_new_tokens=10,
                       seed=seed, partial=True)

    assert sample(0) == sample(0) != sample(1)


def test_reply_at_the_end_of_the_context(tokenizer, model):
    # <|endoftext|> <|user|> x... <|assistant|>
    for n, room in (60, 1), (61, 0), (70, 0):
        messages = [user("\x00" * n)]
        if room:
            assert isinstance(reply(model, tokenizer, messages), str)
        else:
            words = f"the dialogue has {n + 3} tokens, and max_seq_len=64 leaves no room"
            with pytest.raises(ValueError, match=words):
                reply(model, tokenizer, messages)
    with pytest.raises(ValueError, match="more than max_seq_len=64"):
        replies(model, tokenizer, [[user("\x00" * 50)]], max_new_tokens=40)
    with pytest.raises(ValueError, match="temperature"):
        reply(model, tokenizer, [user("Hi")], temperature=-1.0)


# ---- distillation


def test_distill_loss_by_hand(model):
    torch.manual_seed(1)
    teacher, inputs = Llama(CONFIG), torch.randint(0, 300, (3, 9))
    targets = inputs.roll(-1, 1)
    targets[:, :4] = targets[1, 6:] = IGNORE
    for t in 0.5, 1.0, 3.0:
        p, q = ((m(inputs) / t).softmax(-1) for m in (teacher, model))
        expected = 0
        for i, j in (targets != IGNORE).nonzero().tolist():
            expected += t**2 * (p[i, j] * (p[i, j] / q[i, j]).log()).sum()
        loss = distill_loss(teacher, t)(model, inputs, targets)
        assert torch.isclose(loss, expected, rtol=1e-3)
    distill_loss(teacher)(model, inputs, targets).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None for p in model.parameters())
    model.zero_grad()


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_distill_temperature(model, temperature):
    with pytest.raises(ValueError, match="temperature must be above 0"):
        distill_loss(model, temperature)
