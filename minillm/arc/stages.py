"""The stages of the model. Each is loaded if this exact recipe was built before, and else built with a progress bar."""
from dataclasses import replace

import numpy as np
import torch

from minillm.arc.cache import ALPHA, RANK, Stage, build, device
from minillm.arc.sizes import SIZES, chosen
from minillm.data import ENDOFTEXT, Rows, Windows, clean, encode_document, split_documents
from minillm.dpo import Pairs, count_pairs, preference_loss, sample_pairs
from minillm.fast_decode import FastDecoder
from minillm.generate import generate
from minillm.lora import add_lora
from minillm.model import Llama
from minillm.quantize import quantize_model
from minillm.sft import ASSISTANT, USER, finetune
from minillm.storage.text_files import read_documents
from minillm.tokenizer import Tokenizer
from minillm.train import train
from minillm.world import World
from minillm.world.questions import dialogues, exams
from minillm.world.templates import HARBOUR

# Those of the chat have their rows from the start, as LLaMA 3 has reserved ones, so that no later stage must grow the model.
SPECIAL_TOKENS = (ENDOFTEXT, USER, ASSISTANT)


STORIES, FILES, CHAT, LORA, DPO = (getattr(SIZES[chosen()], name) for name in ("stories", "files", "chat", "lora", "dpo"))
BETA = 0.1                                # of DPO


def base(bar=True):
    """The base model of the course: trained on the story world, about two minutes on two cores (size cpu) if it was not built before."""
    return build("base", STORIES, make_base, bar, heldout_texts=heldout_texts)


def from_files(paths, bar=True):
    """A base model of the reader's own text files, 20,000 characters or more. Raises ValueError as read_documents does."""
    texts = tuple((name, clean(text)) for name, text in read_documents(paths, least=20_000))
    return build("own", replace(FILES, texts=texts), make_base, bar, heldout_texts=heldout_texts)


def chat(bar=True):
    """The base model tuned on dialogues: it answers questions about a story, and tells stories on demand."""
    return build("chat", CHAT, make_chat, bar, base(bar), ("sft", "world.questions"))


def lora(bar=True):
    """The chat model with a LoRA adapter for the second region, the harbour."""
    return build("lora", LORA, make_lora, bar, chat(bar), ("lora",))


def dpo(bar=True):
    """The chat model tuned on preferences: of its own answers to a question, the one with the greatest true reward is chosen."""
    return build("dpo", DPO, make_dpo, bar, chat(bar), ("dpo", "generate", "fast_decode"))


def int8(bar=True):
    """The dpo model with the linear layers of its blocks in 8 bits, one scale a row. Made anew each time: it takes milliseconds."""
    stage = dpo(bar)
    quantize_model(stage.model)
    return stage


def training_texts(recipe):
    """The documents to learn from: of files, or stories. One story in 25 is from the harbour: enough to know its words, as the
    LLaMA of 2023 knew some Chinese, and too little to know it well, so that there is something to adapt to."""
    regions = World(setting=recipe.setting), World(HARBOUR, recipe.setting)
    return [text for _, text in split_documents(recipe.texts)[0]] or [regions[i % 25 == 24].sample(i).text for i in range(recipe.stories)]


def heldout_texts(recipe):
    return [text for _, text in split_documents(recipe.texts)[1]] or [story.text for story in heldout_stories(recipe.setting)]


def heldout_stories(setting=STORIES.setting):
    """The stories on which every stage is scored."""
    return World(setting=setting).stories(500, "heldout")


def samples(model, tokenizer, n, length=400, seed=0):
    """n texts that the model writes from nothing, each of at most `length` tokens (and max_seq_len), as numbered lines."""
    length = min(length, model.config.max_seq_len - 1)
    start = encode_document("", tokenizer)[0]
    ids = generate(FastDecoder(model), torch.full((n, 1), start, device=next(model.parameters()).device), length, stop=start, seed=seed).tolist()
    texts = [tokenizer.decode(row[1:row.index(start, 1)] if start in row[1:] else row[1:]) for row in ids]
    return "\n".join(f"  {i + 1}. {text.strip()}" for i, text in enumerate(texts))


def make_base(recipe, before, checkpoints, bar):
    training, heldout = training_texts(recipe), heldout_texts(recipe)
    tokenizer = Tokenizer.train(training[:6000], recipe.model.vocab_size, SPECIAL_TOKENS)
    documents = [encode_document(text, tokenizer) for text in training]
    tokens = sum(len(encode_document(text, tokenizer)) - 1 for text in heldout)
    floor = None if recipe.texts else -sum(story.logp for story in heldout_stories(recipe.setting)) / tokens
    if recipe.stories:
        batches = Rows(documents, recipe.batch_size, recipe.seed)
    else:
        batches = Windows(np.concatenate(documents), recipe.batch_size, recipe.model.max_seq_len, recipe.seed)
    torch.manual_seed(recipe.seed)
    model = Llama(recipe.model).to(device())
    if recipe.training.muon:
        # Embeddings of size 1, where 0.02 is usual: found by trying. With 0.02 this recipe learns faster for some hundred steps,
        # and then stays behind, above all in keeping track of who has what.
        torch.nn.init.normal_(model.model.embed_tokens.weight)
    if bar:
        rate = sum(len(text.encode()) for text in heldout) / tokens
        print(f"Tokenizer: {tokenizer.n_vocab} tokens, {rate:.2f} bytes a token. Model: {sum(p.numel() for p in model.parameters()):,} "
              f"parameters. Before training it writes:\n{samples(model, tokenizer, 2, 30)}")
    history = train(model, batches, replace(recipe.training, bar=bar, floor=floor, checkpoint=str(checkpoints)))
    return Stage(model, tokenizer, history, floor)


def make_chat(recipe, before, checkpoints, bar):
    if bar:
        print(f"\nChat: {recipe.examples:,} dialogues, of which the answers are learnt.")
    return tune(recipe, before, dialogues(recipe.examples, setting=before.setting), checkpoints, bar)


def make_lora(recipe, before, checkpoints, bar):
    torch.manual_seed(0)         # A is random: the same whether the stages before were built just now or loaded
    add_lora(before.model, RANK, ALPHA)
    if bar:
        print(f"\nLoRA: {recipe.examples:,} dialogues from the harbour, an adapter of rank {RANK}.")
    return tune(recipe, before, dialogues(recipe.examples, region=HARBOUR, setting=before.setting), checkpoints, bar)


def tune(recipe, before, data, checkpoints, bar):
    config = replace(recipe.training, bar=bar, checkpoint=str(checkpoints))
    return replace(before, history=finetune(before.model, data, before.tokenizer, config, recipe.batch_size), floor=None)


def make_dpo(recipe, before, checkpoints, bar):
    """Each question is answered four times; the best and the worst answer, by the true reward, make a pair."""
    model, tokenizer = before.model, before.tokenizer
    asked = exams(recipe.examples, "train", setting=before.setting)
    pairs = sample_pairs(FastDecoder(model), tokenizer, asked, lambda question, answer: question.reward(answer))
    if bar:
        print(f"\nDPO: {len(pairs):,} pairs of answers of the chat model to {recipe.examples:,} questions.")
    batches = Pairs(pairs, tokenizer, model, recipe.batch_size)
    config = replace(recipe.training, bar=bar, checkpoint=str(checkpoints))
    return replace(before, history=train(model, batches, config, preference_loss(beta=BETA), count_pairs), floor=None)
