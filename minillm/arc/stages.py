"""The stages of the model (base, chat, ...), and the function that makes each from the one before.

A new stage is added here, and its settings in minillm/arc/sizes.py. With another `seed`, what is
random in training is drawn anew, in a stage and in those before it; the stories, dialogues and
questions that the stages learn from and are scored on stay the same.
"""
import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice

import numpy as np
import torch

from minillm.arc.cache import ALPHA, RANK, Stage, build, device
from minillm.arc.fit import fit
from minillm.arc.pool import spread
from minillm.arc.scorecard import write_texts
from minillm.arc.sizes import Recipe, Tuning, size
from minillm.bpe import train_merges
from minillm.data import ENDOFTEXT, Rows, Windows, clean, encode_document, split_documents
from minillm.dpo import Pairs, count_pairs, preference_loss, sample_pairs
from minillm.fast_decode import FastDecoder
from minillm.lora import add_lora
from minillm.model import Llama
from minillm.quantize import quantize_model
from minillm.rl import RLConfig, ppo
from minillm.sft import ASSISTANT, USER, begin_as, finetune
from minillm.storage.text_files import read_documents
from minillm.tokenizer import Tokenizer, count_pieces, merged_tokens
from minillm.train import Batches
from minillm.world import Setting, World
from minillm.world.drills import drill, practice
from minillm.world.questions import exams, talk
from minillm.world.stories import Story
from minillm.world.templates import HARBOUR, VALLEY, Region

# The tokens of the chat have their rows in the embedding from the start (LLaMA 3 reserves some,
# too), so that no later stage has to grow the model.
SPECIAL_TOKENS = (ENDOFTEXT, USER, ASSISTANT)
BETA = 2.0                                # of DPO
GROUP, UPDATES, PRICE = 8, 2, 0.1         # of RLHF: answers per question, steps per rollout, beta


def seeded(recipe: Recipe | Tuning, seed: int) -> Recipe | Tuning:
    """A recipe with `seed` added to its own: 0 leaves it as the course has it."""
    return replace(recipe, seed=recipe.seed + seed)


def base(bar: bool = True, seed: int = 0) -> Stage:
    """The base model of the course: trained on the story world, in three to five minutes on two
    cores (size cpu), if it was not built before."""
    recipe = seeded(size().stories, seed)
    return build("base", recipe, make_base, bar, heldout_texts=heldout_texts)


def from_files(paths: list[str], bar: bool = True) -> Stage:
    """A base model of the user's own text files, 20,000 characters or more. Raises ValueError as
    read_documents does, and for a text so monotonous that it becomes too few tokens.

    A text with few different words gets a smaller vocabulary. The files are told apart by number,
    so that the same text from another folder is the same stage."""
    documents = read_documents(paths, least=20_000)
    numbers = {name: str(i) for i, name in enumerate(dict.fromkeys(name for name, _ in documents))}
    recipe = size().files
    recipe = replace(recipe, texts=tuple((numbers[name], clean(text)) for name, text in documents))
    room = recipe.model.vocab_size - 256 - len(SPECIAL_TOKENS)
    texts, length = training_texts(recipe)[:6000], recipe.model.max_seq_len
    counts = count_pieces(texts, SPECIAL_TOKENS)
    merges = train_merges(counts, room)
    vocab_size = 256 + len(merges) + len(SPECIAL_TOKENS)
    if counts.total() <= length:       # a pre-token is one token or more: now count them
        vocab = dict(enumerate(merged_tokens(merges)))
        tokenizer = Tokenizer(vocab, merges, SPECIAL_TOKENS)
        n = sum(len(encode_document(text, tokenizer)) for text in texts)
        if n <= length:
            raise ValueError(f"{', '.join(numbers)}: the text repeats itself so much that all we "
                             f"learn from becomes {n} tokens, and we need more than {length}: "
                             "give a text with more variety")
    recipe = replace(recipe, model=replace(recipe.model, vocab_size=vocab_size))
    return build("own", recipe, make_base, bar, heldout_texts=heldout_texts)


def chat(bar: bool = True, seed: int = 0) -> Stage:
    """The base model tuned on dialogues: it answers questions about a story, and tells stories on
    demand."""
    recipe = seeded(size().chat, seed)
    return build("chat", recipe, make_chat, bar, base(bar, seed), ("sft", "world.questions"))


def lora(bar: bool = True, seed: int = 0) -> Stage:
    """The chat model with a LoRA adapter for the second region, the harbour."""
    recipe = seeded(size().lora, seed)
    return build("lora", recipe, make_lora, bar, chat(bar, seed), ("lora",))


def dpo(bar: bool = True, seed: int = 0) -> Stage:
    """The chat model tuned on preferences: of its own answers to a question, the one with the
    greatest true reward is chosen."""
    recipe = seeded(size().dpo, seed)
    code = ("dpo", "generate", "fast_decode")
    return build("dpo", recipe, make_dpo, bar, chat(bar, seed), code)


def rlhf(bar: bool = True, seed: int = 0) -> Stage:
    """The chat model after reinforcement learning (PPO): its own answers to questions, graded by
    the true reward, with a penalty for moving away from the chat model."""
    recipe = seeded(size().rlhf, seed)
    code = ("reward", "rl", "generate", "fast_decode")
    return build("rlhf", recipe, make_rlhf, bar, chat(bar, seed), code)


def int8(bar: bool = True, seed: int = 0) -> Stage:
    """The dpo model with the linear layers of its blocks in 8 bits, one scale per row. Made each
    time and not cached, since it takes milliseconds."""
    stage = dpo(bar, seed)
    quantize_model(stage.model)
    return stage


def training_texts(recipe: Recipe) -> list[str]:
    """The documents to learn from: of files, or stories.

    One story in 25 is from the harbour: enough to know its words, as the LLaMA of 2023 knew some
    Chinese, and too little to know it well, so that there is something to adapt to."""
    if recipe.texts:
        return [text for _, text in split_documents(recipe.texts)[0]]
    return tales(recipe.total("stories"), recipe.setting)


def tales(n: int, setting: Setting) -> list[str]:
    """The first n stories that a base model learns from."""
    return spread(partial(tale, World(setting=setting), World(HARBOUR, setting)), range(n))


def tale(valley: World, harbour: World, i: int) -> str:
    """Story number i."""
    return (harbour if i % 25 == 24 else valley).sample(i).text


def talks(n: int, region: Region, setting: Setting) -> list[list[dict[str, str]]]:
    """dialogues(n, "train", region, setting), see there."""
    return spread(partial(talk, split="train", region=region, setting=setting), range(n))


def heldout_texts(recipe: Recipe) -> list[str]:
    """Documents that a base model was not trained on."""
    if recipe.texts:
        return [text for _, text in split_documents(recipe.texts)[1]]
    return [story.text for story in heldout_stories(recipe.setting)]


def heldout_stories(setting: Setting | None = None) -> list[Story]:
    """The stories on which every stage is scored; setting: by default that of the size in use."""
    return World(setting=setting or size().stories.setting).stories(500, "heldout")


def samples(model: torch.nn.Module, tokenizer: Tokenizer, n: int, length: int = 400,
            seed: int = 0) -> str:
    """n texts that the model writes from nothing, each of at most `length` tokens (and
    max_seq_len), as numbered lines."""
    texts = write_texts(FastDecoder(model), tokenizer, n, seed=seed, length=length)
    return "\n".join(f"  {i}. {text.strip()}" for i, text in enumerate(texts, 1))


class Curriculum:
    """The first batches of one source, then those of another, and so on; parts: pairs of a source
    and its number of batches."""

    def __init__(self, *parts: tuple[Batches, int]):
        self.parts = parts

    def __getitem__(self, i: int) -> tuple[torch.Tensor, ...]:
        for source, n in self.parts:
            if i < n:
                return source[i]
            i -= n
        raise IndexError("the curriculum has no more batches")


def curriculum(recipe: Recipe, stories: list[list[int]], tokenizer: Tokenizer) -> Curriculum:
    """The batches of each part of a recipe; each part takes the next texts of each kind."""
    encode = partial(encode_document, tokenizer=tokenizer)
    drills = map(encode, map(drill, range(recipe.total("drills"))))
    practiced = spread(partial(practice, setting=recipe.setting), range(recipe.total("practice")))
    # Practice has no <|endoftext|> before it, or the model would write quizzes from nothing.
    sources = {"drills": drills, "practice": (ids[1:] for ids in map(encode, practiced)),
               "stories": iter(stories)}
    parts = []
    for part in recipe.parts:
        texts = [text for kind, source in sources.items()
                 for text in islice(source, getattr(part, kind))]
        parts.append((Rows(texts, recipe.batch_size, recipe.seed), part.n // recipe.batch_size))
    return Curriculum(*parts)


def make_base(recipe: Recipe, before: None, checkpoints: str, bar: bool) -> Stage:
    """Tokenizer and base model of a recipe; for the arguments see cache.build."""
    training, heldout = training_texts(recipe), heldout_texts(recipe)
    tokenizer = Tokenizer.train(training[:6000], recipe.model.vocab_size, SPECIAL_TOKENS)
    documents = spread(partial(encode_document, tokenizer=tokenizer), training)
    tokens = sum(len(encode_document(text, tokenizer)) - 1 for text in heldout)
    floor = None
    if not recipe.texts:
        floor = -sum(story.logp for story in heldout_stories(recipe.setting)) / tokens
    if recipe.parts:
        batches = curriculum(recipe, documents, tokenizer)
    else:
        batches = Windows(np.concatenate(documents), recipe.batch_size, recipe.model.max_seq_len,
                          recipe.seed)
    torch.manual_seed(recipe.seed)
    model = Llama(recipe.model).to(device())
    if recipe.training.muon:
        # With the usual 0.02 the model tracks less well who has what; with 1 it takes longer to
        # tell names apart (we found both by trial and error).
        torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.3)
    if bar:
        rate = sum(len(text.encode()) for text in heldout) / tokens
        n = sum(p.numel() for p in model.parameters())
        print(f"Tokenizer: {tokenizer.n_vocab} tokens, {rate:.2f} bytes per token. Model: {n:,} "
              f"parameters. Before training it writes:\n{samples(model, tokenizer, 2, 30)}")
    config = replace(recipe.training, bar=bar, floor=floor, checkpoint=str(checkpoints))
    history = fit(model, batches, config, compiling=recipe.compiling)
    return Stage(model, tokenizer, history, floor)


def make_chat(recipe: Tuning, before: Stage, checkpoints: str, bar: bool) -> Stage:
    """The chat model, from the base model."""
    if bar:
        print(f"\nChat: {recipe.examples:,} dialogues, of which the answers are learned, and "
              f"{recipe.replay:,} stories from before.")
    # In the quizzes that the base model has practiced on, the answer follows the question mark.
    # With a random row instead, some runs do not learn to say "I don't know" about things.
    begin_as(before.model, before.tokenizer, ASSISTANT, "?")
    data = talks(recipe.examples, VALLEY, before.setting)
    return tune(recipe, before, data, checkpoints, bar, tales(recipe.replay, before.setting))


def make_lora(recipe: Tuning, before: Stage, checkpoints: str, bar: bool) -> Stage:
    """The chat model with an adapter for the harbour."""
    # A random matrix is drawn here: it should be the same whether the chat stage was built just now
    # or loaded.
    torch.manual_seed(recipe.seed)
    add_lora(before.model, RANK, ALPHA)
    if bar:
        print(f"\nLoRA: {recipe.examples:,} dialogues from the harbour, {recipe.replay:,} from the "
              f"valley, an adapter of rank {RANK}.")
    data = talks(recipe.examples, HARBOUR, before.setting)
    data += talks(recipe.replay, VALLEY, before.setting)
    return tune(recipe, before, data, checkpoints, bar)


def tune(recipe: Tuning, before: Stage, data: list, checkpoints: str, bar: bool,
         replay: Sequence[str] = ()) -> Stage:
    """The stage `before`, tuned on dialogues and, in between, the plain texts of replay."""
    config = replace(recipe.training, bar=bar, checkpoint=str(checkpoints))
    history = finetune(before.model, data, before.tokenizer, config, recipe.batch_size,
                       seed=recipe.seed, replay=replay,
                       fit=partial(fit, compiling=recipe.compiling))
    return replace(before, history=history, floor=None)


def make_dpo(recipe: Tuning, before: Stage, checkpoints: str, bar: bool) -> Stage:
    """Each question is answered four times; the best and the worst answer, by the true reward, make
    a pair."""
    model, tokenizer = before.model, before.tokenizer
    asked = exams(recipe.examples, "train", setting=before.setting)
    pairs = sample_pairs(FastDecoder(model), tokenizer, asked,
                         lambda question, answer: question.reward(answer), seed=recipe.seed)
    if bar:
        print(f"\nDPO: {len(pairs):,} pairs of answers of the chat model to {recipe.examples:,} "
              "questions.")
    batches = Pairs(pairs, tokenizer, model, recipe.batch_size, recipe.seed)
    config = replace(recipe.training, bar=bar, checkpoint=str(checkpoints))
    history = fit(model, batches, config, preference_loss(beta=BETA), count_pairs,
                  recipe.compiling)
    return replace(before, history=history, floor=None)


def make_rlhf(recipe: Tuning, before: Stage, checkpoints: str, bar: bool) -> Stage:
    """Each step draws GROUP answers to each of batch_size questions, and makes the better ones more
    likely. The run takes half a minute, so it keeps no checkpoints."""
    policy, asked = before.model, exams(recipe.examples, "train", setting=before.setting)
    t = recipe.training
    config = RLConfig(steps=t.steps, prompts=recipe.batch_size, answers=GROUP,
                      updates=UPDATES, lr=t.lr, warmup=t.warmup, beta=PRICE, seed=recipe.seed)
    if bar:
        print(f"\nRLHF: {t.steps} steps on {GROUP} answers to each of {recipe.batch_size} "
              "questions.")

    def true_reward(asked, answers, texts):
        return torch.tensor([[question.reward(text or "") for text in row]
                             for (_, question), row in zip(asked, texts)])

    history = ppo(policy, copy.deepcopy(policy), before.tokenizer, asked, true_reward, config,
                  FastDecoder)
    return replace(before, history=history, floor=None)
