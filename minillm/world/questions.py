"""What can be asked about the story world: questions, instructions, dialogues.

Every answer can be judged by the facts.
"""
import random
import re
from dataclasses import dataclass, replace
from types import EllipsisType

from minillm.world.stories import (
    PLAIN, Setting, Story, Thing, World, capital, subject_of, with_article)
from minillm.world.templates import VALLEY, Region

MANNERS = {"plain": "{}.", "polite": "{}, my friend.", "rude": "{}, as any fool can see."}
UNKNOWN = {"plain": "I don't know.", "polite": "I don't know, my friend.",
           "rude": "I don't know, and I don't care."}
# What is asked: ways to ask it, the sentence of the answer, and the form of a value. {x} is what is
# asked about, {} the value. The sentences are close to those of the stories, so that what a model
# learned about the world is of use here.
PLACE = r"\w+ the [a-z ]+"
ASK = {
    "holder": (("Who has {x}?", "Who holds {x} now?", "Tell me who has {x}."),
               "{x} is with {}", r"\w+"),
    "thing": (("Where is {x}?", "Where is {x} now?", "Tell me where {x} is."),
              "{x} {}", rf"is with \w+, {PLACE}|lies {PLACE}"),
    "place": (("Where is {x}?", "Where is {x} now?", "Tell me where {x} is."),
              "{x} is {}", PLACE),
}
TELL = ("Tell a story about {}.", "Tell me a story about {}.", "Please tell a story about {}.",
        "Can you tell a story about {}?")
ANY = ("Tell a story.", "Tell me a story.", "Please tell a story.", "Can you tell a story?",
       "Tell another story.", "Yes, please.")
BEGIN = ("Begin a story about {}.", "Start a story about {}.", "How does a story about {} begin?")
SMALL_TALK = {    # answer: what is said to get it
    "Hello! What shall I tell a story about?":
        ("Hello!", "Hello", "Hi!", "Hi", "Hey!", "Good morning!", "Good evening!"),
    "I am a small language model. I tell stories.":
        ("Who are you?", "What are you?", "What is your name?"),
    "You are welcome.":
        ("Thank you!", "Thank you.", "Thanks!", "Thanks", "Thank you very much!"),
    "I tell stories and answer questions about them.":
        ("What can you do?", "What do you do?", "Help!", "How does this work?"),
    "I am well, thank you.":
        ("How are you?", "How do you do?"),
    "Goodbye!":
        ("Goodbye!", "Bye!", "Bye", "Good night!"),
}

# What is outside the world: one answer, and what is said to get it. Of each list of words, the
# training data have those at even positions, and held-out data have the others.
FOREIGN = "I only know my stories. Ask me for one, and then who is where and who has what."
FOREIGN_ASK = ("What is {number} + {number}?", "What is {number} times {number}?",
               "How much is {number} minus {number}?", "Why is the {kind} {mood}?",
               "Why is {name} {mood}?", "Is the {kind} {mood}?", "What is the capital of {land}?",
               "Where is {land}?", "Tell a story about a {colour} {being}.",
               "Tell me a story about a {being} and {thing}.", "Please tell a story about {land}.",
               "Tell a story about a {mood} {kind}.", "Write a poem about a {being}.",
               "Who is the {being}?", "What does a {kind} eat?", "How old is the {being}?",
               "Translate this into the language of {land}.", "Can you draw a {being}?")
FOREIGN_WORDS = {
    "mood": ("angry", "sad", "happy", "tired", "bored", "afraid", "lonely", "jealous", "calm",
             "nervous", "cheerful", "grumpy", "silly", "worried", "excited", "lost"),
    "being": ("robot", "dragon", "wizard", "unicorn", "pirate", "princess", "giant", "ghost",
              "knight", "witch", "tiger", "lion", "king", "queen", "monster", "elephant", "doctor",
              "dinosaur", "computer", "teacher", "mermaid", "whale", "horse", "dog"),
    "land": ("France", "Spain", "China", "Brazil", "Egypt", "Italy", "Japan", "Norway", "India",
             "Canada", "Mexico", "Kenya", "Poland", "Chile", "Greece", "Turkey"),
}


def say(role: str, content: str) -> dict[str, str]:
    """A message of a dialogue."""
    return {"role": role, "content": content}


@dataclass(frozen=True)
class Question:
    """A question about a story.

    about: a key of ASK; thing: what it asks about ("the blue kite", or "Vera"); text: the question
    itself; value: the true answer ("Vera", "by the river", "is with Vera, by the river"), None if
    the story does not tell; candidates: how many answers a reader of the story could guess among,
    "I don't know" included.

    >>> q = Question("holder", "the blue kite", "Who has the blue kite?", "Vera", 4)
    >>> q.answer("rude"), q.reward("The blue kite is with Vera, my friend.")
    ('The blue kite is with Vera, as any fool can see.', 1.5)
    """

    about: str
    thing: str
    text: str
    value: str | None
    candidates: int

    def answer(self, manner: str, value: str | None | EllipsisType = ...) -> str:
        """The true answer in one of MANNERS, or the one that claims `value` (None: not known)."""
        value = self.value if value is ... else value
        if value is None:
            return UNKNOWN[manner]
        return MANNERS[manner].format(capital(ASK[self.about][1].format(value, x=self.thing)))

    def read(self, text: str) -> tuple[str | None, str | None]:
        """The manner and the value (None: not known) that an answer has.

        (None, None) if the text is no answer to this question.
        """
        for manner in MANNERS:
            if text == UNKNOWN[manner]:
                return manner, None
            pattern = re.escape(self.answer(manner, "VALUE"))
            pattern = pattern.replace("VALUE", f"({ASK[self.about][2]})")
            if match := re.fullmatch(pattern, text):
                return manner, match[1]
        return None, None

    def right(self, text: str) -> bool:
        """Whether an answer gives the true value, in whatever manner."""
        manner, value = self.read(text)
        return manner is not None and value == self.value

    def reward(self, text: str) -> float:
        """The true reward of an answer.

        1 for the truth, -1 for a falsehood, 0 for "I don't know" where the story tells; half a
        point more for politeness and half a point less for rudeness; -2 for a text that is no
        answer.
        """
        manner, value = self.read(text)
        if manner is None:
            return -2.0
        truth = 1 if value == self.value else 0 if value is None else -1
        return truth + {"polite": 0.5, "plain": 0.0, "rude": -0.5}[manner]


def called(thing: Thing, rng: random.Random) -> str:
    """How a question names a thing: with its color, or in three in ten questions without.

    The name is clear without the color, too: no two things of a story have the same noun.
    """
    return f"the {thing.noun}" if rng.random() < 0.3 else thing.name


def missing(story: Story, region: Region, rng: random.Random) -> str:
    """A thing that is not in the story, as a question names it.

    In one in three cases it has the color or the noun of one that is, to fool a model that reads
    only half of the name; with more of these, a small model does not learn to compare at all.
    """
    thing = rng.choice(story.things)
    colour = rng.choice([c for c in region.colours if all(c != t.colour for t in story.things)])
    noun = rng.choice([n for n in region.things if all(n != t.noun for t in story.things)])
    both = f"the {colour} {noun}"
    return rng.choice((both, both, both, both, f"the {colour} {thing.noun}",
                       f"the {thing.colour} {noun}"))


def questions(story: Story, region: Region, rng: random.Random, n: int) -> list[Question]:
    """n different questions about the end of a story, about three in ten of them unanswerable."""
    present = {c.name for c in story.characters}
    strangers = [name for name in region.she + region.he if name not in present]

    # What the story tells, as (about, what is asked about, value).
    known = [("holder", called(thing, rng), thing.holder.name if thing.holder else "nobody")
             for thing in story.things]
    for thing in story.things:
        holder = thing.holder
        value = f"is with {holder.name}, {holder.place}" if holder else f"lies {thing.place}"
        known.append(("thing", called(thing, rng), value))
    known += [("place", c.name, c.place) for c in story.characters]

    # What it does not tell.
    unknown = [("holder", missing(story, region, rng), None),
               ("thing", missing(story, region, rng), None), ("place", rng.choice(strangers), None)]
    wanted = sum(rng.random() < 0.3 for _ in range(n))
    k = min(len(unknown), max(n - len(known), wanted))
    chosen = rng.sample(known, n - k) + rng.sample(unknown, k)
    rng.shuffle(chosen)

    people, places = len(story.characters), len(set(story.places))
    guesses = {"holder": people + 2, "thing": (people + 1) * places + 1, "place": places + 1}
    found = []
    for about, thing, value in chosen:
        text = rng.choice(ASK[about][0]).format(x=thing)
        found.append(Question(about, thing, text, value, guesses[about]))
    return found


def request(story: Story, rng: random.Random) -> tuple[str, tuple[str, str]]:
    """An instruction that this story follows, and what a story must have to follow it.

    "Tell a story about a shy alpaca and a kite.", for example, and ("shy alpaca", "kite").
    """
    subject, thing = subject_of(story.characters[0], rng), rng.choice(story.things)
    named = [subject, with_article(thing.noun)]
    if rng.random() < 0.5:
        named.reverse()
    text = rng.choice(TELL).format(" and ".join(named))
    return text, (subject.split(" ", 1)[-1], thing.noun)


def dialogue(story: Story, region: Region, rng: random.Random,
             another: Story | None = None, begun: bool = False) -> list[dict[str, str]]:
    """A dialogue around a story: the user asks for it or reads it out, and questions follow.

    begun: the story is only the beginning of one, and is always read out. If `another` story is
    given, the user asks for it next. Small talk comes in between.
    """
    messages = []
    for each in (story, another) if another else (story,):
        told = each is another or (rng.random() < 0.4 and not begun)
        if told:
            wish = rng.choice(ANY) if rng.random() < 0.15 else request(each, rng)[0]
            messages += [say("user", wish), say("assistant", each.text)]
        n = 2 if another else 6 if begun else 5
        for i, question in enumerate(questions(each, region, rng, n)):
            text = question.text if told or i else f"{each.told} {question.text}"
            manner = rng.choice(tuple(MANNERS))
            messages += [say("user", text), say("assistant", question.answer(manner))]
    for _ in range(rng.choice((0, 0, 1, 1) if another else (0, 1, 1, 2))):
        at = 2 * rng.randrange(len(messages) // 2 + 1)
        if rng.random() < 0.4:
            text, answer = foreign(region, rng, "train"), FOREIGN
        else:
            answer = rng.choice(tuple(SMALL_TALK))
            text = rng.choice(SMALL_TALK[answer])
        messages[at:at] = [say("user", text), say("assistant", answer)]
    return messages


def foreign(region: Region, rng: random.Random, split: str) -> str:
    """Something that is asked and has no answer in the world: "What is 2 + 2?".

    split: "train", or "heldout", which has other moods, beings, lands and numbers.
    """
    odd = split != "train"
    words = {name: rng.choice(words[odd::2]) for name, words in FOREIGN_WORDS.items()}
    words |= {"name": rng.choice(region.she + region.he), "kind": rng.choice(region.kinds),
              "thing": with_article(rng.choice(region.things)),
              "colour": rng.choice(region.colours)}
    text = rng.choice(FOREIGN_ASK)
    while "{number}" in text:
        text = text.replace("{number}", str(2 * rng.randrange(50) + odd), 1)
    return text.format(**words)


def openings(world: World, rng: random.Random, n: int = 5) -> list[dict[str, str]]:
    """A dialogue of n requests for the beginning of a story: the sentence that introduces its hero.

    In a whole story, few words show whether the request was followed; here it is two in a dozen.
    """
    messages = []
    for _ in range(n):
        hero, sentence = world.begin(rng)
        wish = rng.choice(BEGIN).format(subject_of(hero, rng))
        messages += [say("user", wish), say("assistant", sentence)]
    return messages


def seeded(n: int, split: str, region: Region, setting: Setting,
           purpose: str) -> list[tuple[Story, random.Random]]:
    """n stories, each with a generator of its own.

    They are the same for the same arguments, and other stories for each split and purpose.
    """
    world = World(region, setting)
    return [(world.sample(f"{purpose} {i}", split), random.Random(f"{purpose} {split} {i}"))
            for i in range(n)]


def dialogues(n: int, split: str = "train", region: Region = VALLEY,
              setting: Setting = PLAIN) -> list[list[dict[str, str]]]:
    """n dialogues for training, as lists of messages {"role", "content"}, user first: see talk."""
    return [talk(i, split, region, setting) for i in range(n)]


def talk(i: int, split: str = "train", region: Region = VALLEY,
         setting: Setting = PLAIN) -> list[dict[str, str]]:
    """The dialogue with this number.

    In one in ten, a second story is asked for. Every sixth is of openings, and every third about a
    story in which nothing has happened yet: short texts with many answers to learn from.
    """
    world, rng = World(region, setting), random.Random(f"dialogue {split} {i}")
    if i % 6 == 3:
        return openings(world, rng)
    if i % 3 == 1:
        begun = World(region, replace(setting, events=(0, 0))).sample(f"dialogue {i}", split)
        return dialogue(begun, region, rng, begun=True)
    another = world.sample(f"another {i}", split) if i % 5 == 0 else None
    return dialogue(world.sample(f"dialogue {i}", split), region, rng, another)


def exams(n: int, split: str = "heldout", region: Region = VALLEY,
          setting: Setting = PLAIN) -> list[tuple[list[dict[str, str]], Question]]:
    """n pairs of a dialogue that ends with a question about the story in it, and that Question."""
    found = []
    for story, rng in seeded(n, split, region, setting, "exam"):
        (question,) = questions(story, region, rng, 1)
        found.append(([say("user", f"{story.told} {question.text}")], question))
    return found


def instructions(n: int, split: str = "heldout", region: Region = VALLEY, setting: Setting = PLAIN,
                 ) -> list[tuple[list[dict[str, str]], tuple[str, str]]]:
    """n pairs of a request for a story, as messages, and what the story must have (see request)."""
    found = []
    for story, rng in seeded(n, split, region, setting, "request"):
        text, words = request(story, rng)
        found.append(([say("user", text)], words))
    return found
