"""What can be asked about the story world: questions, instructions, dialogues. Every answer can be judged by the facts."""
import random
import re
from dataclasses import dataclass

from minillm.world.stories import Setting, World, with_article
from minillm.world.templates import VALLEY

MANNERS = {"plain": "{}.", "polite": "{}, my friend.", "rude": "{}, as any fool can see."}
UNKNOWN = {"plain": "I don't know.", "polite": "I don't know, my friend.", "rude": "I don't know, and I don't care."}
# What is asked: ways to ask it, the sentence of the answer, and the form of a value. {x} is what is asked about, {} the value.
# The sentences are near to those of the stories, so that what a model learnt of the world serves it here.
PLACE = r"\w+ the [a-z ]+"
ASK = {
    "holder": (("Who has {x}?", "Who holds {x} now?", "Tell me who has {x}."), "{x} is with {}", r"\w+"),
    "thing": (("Where is {x}?", "Where is {x} now?", "Tell me where {x} is."), "{x} {}", rf"is with \w+, {PLACE}|lies {PLACE}"),
    "place": (("Where is {x}?", "Where is {x} now?", "Tell me where {x} is."), "{x} is {}", PLACE),
}
TELL = ("Tell a story about {}.", "Tell me a story about {}.", "Please tell a story about {}.", "Can you tell a story about {}?")
ANY = ("Tell a story.", "Tell me a story.", "Please tell a story.", "Can you tell a story?", "Tell another story.", "Yes, please.")
SMALL_TALK = {    # answer: what is said to get it
    "Hello! What shall I tell a story about?": ("Hello!", "Hello", "Hi!", "Hi", "Hey!", "Good morning!", "Good evening!"),
    "I am a small language model. I tell stories.": ("Who are you?", "What are you?", "What is your name?"),
    "You are welcome.": ("Thank you!", "Thank you.", "Thanks!", "Thanks", "Thank you very much!"),
    "I tell stories and answer questions about them.": ("What can you do?", "What do you do?", "Help!", "How does this work?"),
    "I am well, thank you.": ("How are you?", "How do you do?"),
    "Goodbye!": ("Goodbye!", "Bye!", "Bye", "Good night!"),
}


def capital(words):
    return words[0].upper() + words[1:]


def say(role, content):
    return {"role": role, "content": content}


@dataclass(frozen=True)
class Question:
    """A question about a story. about: a key of ASK; value: the true answer ("Vera", "by the river"), None if the story does
    not tell; candidates: how many answers a reader of the story could guess among, "I don't know" included.

    >>> q = Question("holder", "the blue kite", "Who has the blue kite?", "Vera", 4)
    >>> q.answer("rude"), q.reward("The blue kite is with Vera, my friend.")
    ('The blue kite is with Vera, as any fool can see.', 1.5)
    """

    about: str
    thing: str
    text: str
    value: str | None
    candidates: int

    def answer(self, manner, value=...):
        """The answer in one of MANNERS: the true one, or the one that claims `value` (None: that it is not known)."""
        value = self.value if value is ... else value
        if value is None:
            return UNKNOWN[manner]
        return MANNERS[manner].format(capital(ASK[self.about][1].format(value, x=self.thing)))

    def read(self, text):
        """The manner and the value (None: not known) that an answer has, or (None, None) if it is no answer to this question."""
        for manner in MANNERS:
            if text == UNKNOWN[manner]:
                return manner, None
            pattern = re.escape(self.answer(manner, "VALUE")).replace("VALUE", f"({ASK[self.about][2]})")
            if match := re.fullmatch(pattern, text):
                return manner, match[1]
        return None, None

    def right(self, text):
        """Whether an answer gives the true value, in whatever manner."""
        manner, value = self.read(text)
        return manner is not None and value == self.value

    def reward(self, text):
        """The true reward: 1 for the truth, -1 for a falsehood, 0 for "I don't know" where the story tells; half a point more
        for politeness and less for rudeness; -2 for what is no answer."""
        manner, value = self.read(text)
        if manner is None:
            return -2.0
        truth = 1 if value == self.value else 0 if value is None else -1
        return truth + {"polite": 0.5, "plain": 0.0, "rude": -0.5}[manner]


def called(thing, rng):
    """How a question names a thing: in full, or in three of ten without its colour, since a story has no two things of a kind."""
    return f"the {thing.noun}" if rng.random() < 0.3 else thing.name


def questions(story, region, rng, n):
    """n different questions about the end of a story, about three in ten of them unanswerable."""
    present = {c.name for c in story.characters} | {t.name for t in story.things}
    others = [x for x in region.she + region.he if x not in present]
    missing = [x for c in region.colours for x in (f"the {c} {rng.choice(region.things)}",) if x not in present]
    people, places = len(story.characters), len(set(story.places))
    guesses = {"holder": people + 2, "thing": (people + 1) * places + 1, "place": places + 1}
    known = [("holder", called(t, rng), t.holder.name if t.holder else "nobody") for t in story.things]
    known += [("thing", called(t, rng), f"is with {t.holder.name}, {t.holder.place}" if t.holder else f"lies {t.place}")
              for t in story.things]
    known += [("place", c.name, c.place) for c in story.characters]
    unknown = [("holder", rng.choice(missing), None), ("thing", rng.choice(missing), None), ("place", rng.choice(others), None)]
    k = min(len(unknown), max(n - len(known), sum(rng.random() < 0.3 for _ in range(n))))
    chosen = rng.sample(known, n - k) + rng.sample(unknown, k)
    rng.shuffle(chosen)
    return [Question(about, x, rng.choice(ASK[about][0]).format(x=x), value, guesses[about]) for about, x, value in chosen]


def request(story, rng):
    """An instruction that this story follows ("Tell a story about a shy alpaca and a kite."), and the words the story must have."""
    hero, thing = story.characters[0], rng.choice(story.things)
    subject = hero.name if rng.random() < 0.2 else f"{with_article(hero.trait)} {hero.kind}"
    named = [subject, with_article(thing.noun)]
    if rng.random() < 0.5:
        named.reverse()
    return rng.choice(TELL).format(" and ".join(named)), (subject.split(" ", 1)[-1], thing.noun)


def dialogue(story, region, rng, another=None):
    """A dialogue around a story, which is asked for or read out, and questions follow; then `another` may be asked for. Here and there
    is small talk."""
    messages = []
    for each in (story, another) if another else (story,):
        told = each is another or rng.random() < 0.4
        if told:
            wish = rng.choice(ANY) if rng.random() < 0.15 else request(each, rng)[0]
            messages += [say("user", wish), say("assistant", each.text)]
        for i, question in enumerate(questions(each, region, rng, 2 if another else 5)):
            text = question.text if told or i else f"{each.told} {question.text}"
            messages += [say("user", text), say("assistant", question.answer(rng.choice(tuple(MANNERS))))]
    for _ in range(rng.choice((0, 0, 1, 2))):
        answer, at = rng.choice(tuple(SMALL_TALK)), 2 * rng.randrange(len(messages) // 2 + 1)
        messages[at:at] = [say("user", rng.choice(SMALL_TALK[answer])), say("assistant", answer)]
    return messages


def seeded(n, split, region, setting, purpose):
    """n stories, each with a generator of its own: the same for the same arguments, and other stories for each split."""
    world = World(region, setting)
    return [(world.sample(f"{purpose} {i}", split), random.Random(f"{purpose} {split} {i}")) for i in range(n)]


def dialogues(n, split="train", region=VALLEY, setting=Setting()):
    """n dialogues as lists of messages {"role", "content"}, user first, for training; in every fifth, a second story is asked for."""
    world = World(region, setting)
    return [dialogue(story, region, rng, world.sample(f"another {i}", split) if i % 5 == 0 else None)
            for i, (story, rng) in enumerate(seeded(n, split, region, setting, "dialogue"))]


def exams(n, split="heldout", region=VALLEY, setting=Setting()):
    """n pairs of a dialogue that ends with a question about the story in it, and that Question."""
    return [([say("user", f"{story.told} {q.text}")], q) for story, rng in seeded(n, split, region, setting, "exam")
            for q in questions(story, region, rng, 1)]


def instructions(n, split="heldout", region=VALLEY, setting=Setting()):
    """n pairs of a request for a story, as messages, and the words that the story must have."""
    return [([say("user", text)], words) for story, rng in seeded(n, split, region, setting, "request")
            for text, words in [request(story, rng)]]
