"""The text of the story world: words by region, and the sentences that tell each event."""
from dataclasses import dataclass


@dataclass(frozen=True)
class Region:
    """The words of one corner of the world. Places carry their preposition ("by the river")."""

    she: tuple[str, ...]         # names of those that are called she
    he: tuple[str, ...]          # and of those that are called he
    kinds: tuple[str, ...]
    traits: tuple[str, ...]
    places: tuple[str, ...]
    colours: tuple[str, ...]
    things: tuple[str, ...]

    def pronouns(self, name: str) -> tuple[str, str, str]:
        """The pronouns of a name: she, her, her or he, his, him."""
        return ("she", "her", "her") if name in self.she else ("he", "his", "him")


VALLEY = Region(
    she=("Vera", "Mia", "Anna", "Rosa", "Ida", "Lucy", "Nora", "Elsa", "Ruth", "Zoe"),
    he=("Tom", "Ben", "Oscar", "Hugo", "Max", "Felix", "Leo", "Paul", "Sam", "Emil"),
    kinds=("alpaca", "fox", "otter", "rabbit", "hedgehog", "goose", "badger", "mouse", "owl",
           "bear", "goat", "cat"),
    traits=("shy", "brave", "curious", "lazy", "clever", "gentle", "proud", "hungry", "sleepy",
            "honest", "funny", "quiet"),
    places=("by the river", "at the mill", "on the hill", "in the barn", "under the oak",
            "near the well", "behind the church", "in the garden", "on the bridge",
            "at the market"),
    colours=("red", "blue", "green", "yellow", "white", "orange", "purple", "silver"),
    things=("kite", "drum", "bell", "hat", "basket", "lamp", "ball", "umbrella", "book", "scarf",
            "spoon", "apple"),
)

# A second region, with other names, animals, places and things: a model has to learn them later,
# and while it does, it may forget the first.
HARBOUR = Region(
    she=("Wanda", "Greta", "Olive", "Pearl", "Sylvie", "Fanny", "Daphne", "Jonna", "Tilda", "Yara"),
    he=("Finn", "Knut", "Piet", "Jasper", "Bruno", "Otis", "Ralph", "Klaus", "Dario", "Viggo"),
    kinds=("seal", "crab", "gull", "pelican", "walrus", "turtle", "penguin", "dolphin", "heron",
           "lobster", "puffin", "octopus"),
    traits=VALLEY.traits,
    places=("at the pier", "on the beach", "in the lighthouse", "behind the dunes",
            "by the jetty", "under the crane", "near the reef", "on the ferry", "in the cove",
            "at the fish stall"),
    colours=VALLEY.colours,
    things=("anchor", "shell", "rope", "net", "compass", "lantern", "barrel", "flag", "whistle",
            "bucket", "oar", "telescope"),
)

# Sentences. N is the acting character, S the same or a pronoun (if the event before had the same
# actor), O another character, P a place ("by the river"), G the same place without its preposition
# ("the river"), T a thing ("the blue kite").
FIRST = ("Once upon a time, {a} {kind} named {name} lived {P}.",
         "There was once {a} {kind}. {Her} name was {name}, and {she} lived {P}.",
         "{name} the {kind} was {trait}. {She} had a little house {P}.",
         "Long ago, {a} {kind} called {name} lived {P}.")
OTHER = ("{name}, {a} {kind}, lived {P}.",
         "{A} {kind} named {name} had a house {P}.",
         "Everyone knew {name}, the {trait} {kind} {P}.",
         "There was also {name}, {a} {kind}, who lived {P}.")
OWNED = ("{name} had {a} {thing}.", "{name} owned {a} {thing}.", "{A} {thing} belonged to {name}.")
FOUND = ("{A} {thing} lay {P}.", "Somebody had left {a} {thing} {P}.")
DAYS = ("One {} morning", "One {} evening", "On a {} day")
WEATHER = ("warm", "cold", "windy", "rainy", "sunny", "foggy")
# How an event begins, with a weight: 8 of 16 begin with nothing.
LINKS = (("", 8), ("Then ", 3), ("Soon ", 2), ("After lunch ", 1), ("A little later ", 1),
         ("The next day ", 1))
# What can happen: a weight, and the sentences that tell it.
EVENTS = {
    "walk": (2, ("{S} walked to {G}.", "{S} ran all the way to {G}.", "{S} set off for {G}.")),
    "carry": (2, ("{S} carried {T} to {G}.", "{S} went to {G} and took {T} along.")),
    "visit": (2, ("{S} went to see {O} {P}.", "{S} joined {O} {P}.",
                  "{S} looked for {O} and found {him} {P}.")),
    "bring": (3, ("{S} brought {T} to {O} {P}.", "{S} met {O} {P} and gave {him} {T}.")),
    "give": (3, ("{S} gave {O} {T}.", "{S} let {O} have {T}.", "{S} handed {T} to {O} {P}.")),
    "drop": (2, ("{S} put {T} down {P}.", "{S} left {T} {P}.")),
    "take": (3, ("{S} found {T} {P} and took it along.",
                 "{S} went to fetch {T}. It was still {P}.")),
    "rest": (2, ("{S} took a nap {P}.", "{S} sat {P} and sang.", "{S} watched the clouds {P}.",
                 "{S} had some soup {P}.")),
    "play": (2, ("{S} played with {T} {P}.", "{S} showed everybody {T} {P}.",
                 "{S} was very fond of {T}.")),
    "greet": (2, ('{S} said to {O}: "Good to see you!"', "{S} told {O} a story.",
                  "{N} and {O} laughed together.")),
    "muse": (1, ("{S} smiled.", "{S} hummed a little song.")),
    "who": (3, ("{S} wondered who had {T}. It was with {O} {P}.",
                '{S} asked: "Where is {T}?" It was with {O} {P}.')),
    "where": (3, ("{S} thought of {O}. {O} was {P}.",
                  "{S} looked around, and saw {O} {P}.")),
    "lost": (2, ("{S} wondered where {T} was. It lay {P}.",
                 '{S} asked: "Where is {T}?" It lay {P}.')),
}
WITH = "So now {T} is with {name}, {P}."
LIES = "So now {T} lies {P}."
