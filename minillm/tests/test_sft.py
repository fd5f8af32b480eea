"""What the notebook of instruction tuning cannot show: errors, random dialogues in Unicode and with
the texts of special tokens, limits."""
import random

import pytest
import torch
from transformers.utils.chat_template_utils import render_jinja_template

from minillm import sft
from minillm.data import ENDOFTEXT, IGNORE, encode_document
from minillm.model import Llama, LlamaConfig
from minillm.sft import (ASSISTANT, USER, Dialogues, begin_as, check_dialogue, encode_dialogue,
                         encode_prompt, finetune)
from minillm.tokenizer import Tokenizer
from minillm.train import TrainConfig, token_loss
from minillm.world import World, questions

SPECIAL = (ENDOFTEXT, USER, ASSISTANT)
CONFIG = LlamaConfig(vocab_size=300, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48,
                     max_seq_len=64)
TEMPLATE = (
    "{{ '<|endoftext|>' }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<|user|>' + m.content + '<|assistant|>' }}"
    "{% else %}{% generation %}{{ m.content + '<|endoftext|>' }}{% endgeneration %}{% endif %}"
    "{% endfor %}")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([story.text for story in World().stories(60)], 300, SPECIAL)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Llama(CONFIG)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def random_text(rng, hostile):
    alphabet = ["a", "Z", " ", "  ", "\n", "ë", "你", "🦙", "\u0301", "\x00", "'s", "12345",
                "<|", "|>"]
    if hostile:
        alphabet += ["<|use", "r|>", *SPECIAL]
    text = "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 12)))
    return text if text.strip() else "x"


def random_dialogue(rng, hostile=True):
    n = rng.randint(1, 7)
    return [(user, assistant)[i % 2](random_text(rng, hostile)) for i in range(n)]


# ---- ids and mask


def test_ids_and_mask_of_random_dialogues(tokenizer):
    """Derived the other way around: cut the ids at the role tokens, and compare each part with its
    message."""
    special = tokenizer.special_tokens
    end, roles = special[ENDOFTEXT], {special[USER]: "user", special[ASSISTANT]: "assistant"}
    for seed in range(300):
        messages = random_dialogue(random.Random(seed))
        ids, mask = encode_dialogue(messages, tokenizer)
        assert len(ids) == len(mask) and ids[0] == end and not mask[0]
        starts = [i for i, token in enumerate(ids) if token in roles]
        assert [roles[ids[i]] for i in starts] == [m["role"] for m in messages], \
            "a message made a turn of its own"
        for message, a, b in zip(messages, starts, [*starts[1:], len(ids)]):
            assert not mask[a], "the role token is given, not learnt"
            part, answer = ids[a + 1:b], message["role"] == "assistant"
            assert mask[a + 1:b] == [answer] * len(part)
            assert (part[-1:] == [end]) == answer, \
                "the end token belongs to answers, and to them only"
            assert tokenizer.decode(part[:-1] if answer else part) == message["content"]
            assert end not in (part[:-1] if answer else part)


def test_equals_the_template_in_jinja(tokenizer):
    """transformers renders our template, tiktoken encodes it: the same ids; and the same characters
    are marked for learning."""
    fast = tokenizer.to_tiktoken()
    for seed in range(100):
        messages = random_dialogue(random.Random(seed), hostile=False)
        (text,), spans = render_jinja_template([messages], chat_template=TEMPLATE,
                                               return_assistant_tokens_mask=True)
        ids, mask = encode_dialogue(messages, tokenizer)
        # then the template goes on with <|assistant|>
        waiting = messages[-1]["role"] == "user"
        expected = encode_prompt(messages, tokenizer) if waiting else ids
        assert fast.encode(text, allowed_special="all") == expected
        learnt, marked = [i for i, m in zip(ids, mask) if m], []
        for a, b in spans[0]:
            marked += fast.encode(text[a:b], allowed_special="all")
        assert learnt == marked


def test_prompt_is_the_beginning_of_the_answered_dialogue(tokenizer):
    for seed in range(100):
        messages = random_dialogue(random.Random(seed))
        messages = messages if messages[-1]["role"] == "user" else messages[:-1]
        prompt = encode_prompt(messages, tokenizer)
        ids, mask = encode_dialogue([*messages, assistant("Yes.")], tokenizer)
        assert ids[:len(prompt)] == prompt and not mask[len(prompt) - 1] and all(mask[len(prompt):])


@pytest.mark.parametrize("messages, words", [
    ([], "at least one message"),
    ([assistant("Hi")], "message 0 must be from the user .* got 'assistant'"),
    ([user("Hi"), user("Hi")], "message 1 must be from the assistant .* got 'user'"),
    ([user("Hi"), assistant("Hi"), assistant("Hi")], "message 2 must be from the user"),
    ([{"role": "system", "content": "Be brief."}, user("Hi")], "message 0 .* got 'system'"),
    ([{"role": None, "content": "Hi"}], "message 0 .* got None"),
    ([user("Hi"), assistant("")], r"message 1 \(assistant\) is empty"),
    ([user(" \n\t")], r"message 0 \(user\) is empty"),
    (["Hi"], "message 0 must be {.*got 'Hi'"),
    ("Hi", "message 0 must be {"),
    ([{"role": "user"}], "message 0 must be {"),
])
def test_bad_dialogues(tokenizer, messages, words):
    for function in (
        check_dialogue,
        lambda m: encode_dialogue(m, tokenizer),
        lambda m: encode_prompt(m, tokenizer),
        lambda m: Dialogues([m], tokenizer, 1),
    ):
        with pytest.raises(ValueError, match=words):
            function(messages)


def test_bad_contents(tokenizer):
    for content in None, 3, b"Hi", ["Hi"]:
        words = "message 0 must be a str: got " + type(content).__name__
        with pytest.raises(TypeError, match=words):
            encode_dialogue([user(content)], tokenizer)
    with pytest.raises(ValueError, match="surrogate"):
        encode_dialogue([user("\ud800")], tokenizer)
    with pytest.raises(ValueError, match="last message must be from the user.*'assistant'"):
        encode_prompt([user("Hi"), assistant("Hi")], tokenizer)


def test_tokenizer_without_the_roles():
    plain = Tokenizer.train("a story, a story", 258)
    with pytest.raises(ValueError, match=r"lacks the special token <\|user\|>"):
        encode_dialogue([user("Hi")], plain)


# ---- batches


def test_targets_are_the_masks_shifted(tokenizer):
    dialogues = [random_dialogue(random.Random(seed)) for seed in range(200)]
    dialogues = [d if len(d) > 1 else [*d, assistant("Yes.")] for d in dialogues]
    batches = Dialogues(dialogues, tokenizer, 7, seed=1)
    seen = set()
    for i in range(60):                                        # two epochs
        inputs, targets = batches[i]
        assert inputs.shape == targets.shape and inputs.dtype == targets.dtype == torch.int64
        for row, wanted, j in zip(inputs.tolist(), targets.tolist(), batches.chosen(i)):
            ids, mask = encode_dialogue(dialogues[j], tokenizer)
            seen.add(j)
            expected = [token if learnt else IGNORE for token, learnt in zip(ids[1:], mask[1:])]
            padding = [IGNORE] * (len(wanted) - len(expected))
            assert row[:len(ids) - 1] == ids[:-1] and wanted == expected + padding
    assert len(seen) > 190


def test_unmasked_differs_in_targets_only(tokenizer):
    dialogues = questions.dialogues(20)
    masked, unmasked = (Dialogues(dialogues, tokenizer, 5, masked=m) for m in (True, False))
    for i in range(8):
        (a, s), (b, t) = masked[i], unmasked[i]
        assert torch.equal(a, b) and (t[s != IGNORE] == s[s != IGNORE]).all()
        assert (s != IGNORE).sum() < (t != IGNORE).sum()
        lengths = [len(masked.documents[j]) - 1 for j in masked.chosen(i)]
        assert (t != IGNORE).sum(1).tolist() == lengths


@pytest.mark.parametrize("masked", (True, False))
def test_of_replayed_texts_every_token_is_learned(tokenizer, masked):
    dialogues = questions.dialogues(12)
    texts = [story.text for story in World().stories(8)]
    batches, seen = Dialogues(dialogues, tokenizer, 4, masked=masked, replay=texts), set()
    for i in range(5):
        for row, j in zip(batches[i][1].tolist(), batches.chosen(i)):
            seen.add(j)
            if j >= len(dialogues):
                ids = encode_document(texts[j - len(dialogues)], tokenizer)
                assert row == ids[1:] + [IGNORE] * (len(row) - len(ids) + 1)
            elif masked:
                assert row.count(IGNORE) > len(row) - len(batches.documents[j]) + 1
    assert seen == set(range(20))


def test_a_replayed_text_that_is_too_long_is_named(tokenizer, model):
    config = TrainConfig(steps=1, warmup=1, bar=False)
    with pytest.raises(ValueError, match=r"text 1 of replay has \d+ tokens, more than max_seq_len"):
        finetune(model, [[user("Hi"), assistant("Hello!")]], tokenizer, config, batch_size=1,
                 replay=["Short.", "long " * 100])


def test_dialogues_of_nothing_but_prompts(tokenizer, model):
    good = [user("Hi"), assistant("Hello!")]
    for masked in True, False:
        with pytest.raises(ValueError, match="dialogue 1 has no answer to learn from"):
            Dialogues([good, [user("Hi")], good], tokenizer, 1, masked=masked)
    before = {n: p.clone() for n, p in model.named_parameters()}
    config = TrainConfig(steps=1, warmup=1, bar=False)
    for wrong, words in (
        ([[user("Hi")]], "no answer"),
        ([good, [user("Hi"), user("Hi")]], "message 1"),
        ([], "batch_size"),
        ([good, [user("long " * 100), assistant("Hi")]],
         r"dialogue 1 has \d+ tokens, more than max_seq_len=64"),
    ):
        with pytest.raises(ValueError, match=words):
            finetune(model, wrong, tokenizer, config, batch_size=1)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()), \
        "a refused dataset changed the model"


def test_longest_dialogue_that_fits(tokenizer, model):
    # <|endoftext|> <|user|> x... <|assistant|> y <|endoftext|>, the last is target only
    for n, fits in (60, True), (61, False):
        dialogue = [user("\x00" * n), assistant("\x00")]
        assert len(encode_dialogue(dialogue, tokenizer)[0]) == n + 5
        arguments = Llama(CONFIG), [dialogue], tokenizer, TrainConfig(steps=1, warmup=1, bar=False)
        if fits:
            assert finetune(*arguments, batch_size=1)[0]["tokens"] == 2
        else:
            words = "dialogue 0 has 66 tokens, more than max_seq_len=64"
            with pytest.raises(ValueError, match=words):
                finetune(*arguments, batch_size=1)


def test_another_function_can_train(tokenizer, model):
    """finetune hands it what train would get, and returns what it returns."""
    called, config = [], TrainConfig(steps=1, warmup=1, bar=False)

    def fit(*arguments):
        called.append(arguments)
        return [{"step": 0}]

    dialogue = [user("Hi"), assistant("Hello!")]
    history = finetune(model, [dialogue], tokenizer, config, batch_size=1, fit=fit)
    (trained, batches, given), = called
    assert history == [{"step": 0}] and trained is model and given is config
    assert isinstance(batches, Dialogues) and batches.batch_size == 1


def test_only_answers_teach(tokenizer):
    """The loss of a batch is the cross-entropy of the answer's tokens and its end, and of nothing
    else."""
    torch.manual_seed(0)
    model = Llama(CONFIG)
    (_, targets), = [Dialogues([[user("abc"), assistant("de")]], tokenizer, 1)[0]]
    ids, mask = encode_dialogue([user("abc"), assistant("de")], tokenizer)
    logits = model(torch.tensor([ids[:-1]]))
    answer = torch.tensor(mask[1:])
    expected = torch.nn.functional.cross_entropy(
        logits[0][answer], torch.tensor(ids[1:])[answer], reduction="sum")
    loss = token_loss(model, torch.tensor([ids[:-1]]), targets)
    assert torch.isclose(loss, expected, atol=1e-4)


def test_names():
    public = {"check_dialogue", "encode_dialogue", "encode_prompt", "Dialogues", "finetune",
              "replies", "reply"}
    assert public <= set(sft.__all__)


def test_a_marker_begins_as_a_copy_of_one_row_and_nothing_else_changes(tokenizer):
    model, before = Llama(CONFIG), Llama(CONFIG)
    before.load_state_dict(model.state_dict())
    begin_as(model, tokenizer, ASSISTANT, "?")
    name, (question,) = "model.embed_tokens.weight", tokenizer.encode("?")
    rows, old = model.state_dict()[name], before.state_dict()[name]
    changed = [i for i in range(300) if not torch.equal(rows[i], old[i])]
    assert changed == [tokenizer.special_tokens[ASSISTANT]]
    assert torch.equal(rows[changed[0]], old[question])
    others = model.state_dict().keys() - {name}
    assert all(torch.equal(model.state_dict()[n], before.state_dict()[n]) for n in others)
    assert model.model.embed_tokens.weight.requires_grad


@pytest.mark.parametrize("token, other, said", [
    ("<|tool|>", "?", "not a special token"), ("?", "?", "not a special token"),
    (ASSISTANT, "xyz qrs", "only one row"), (ASSISTANT, "", "is 0 tokens")])
def test_a_marker_that_cannot_begin_so_is_refused(tokenizer, token, other, said):
    model = Llama(CONFIG)
    rows = model.model.embed_tokens.weight.detach().clone()
    with pytest.raises(ValueError, match=said):
        begin_as(model, tokenizer, token, other)
    assert torch.equal(model.model.embed_tokens.weight, rows)
