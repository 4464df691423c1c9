"""A synthetic corpus in which every category is a capability that a model has or lacks.

A category is a rule from keys to answers. A document states a few of them in the category's own words:

    the capital of : france is paris ; now we look there , japan is tokyo ; so they wait here , egypt is cairo …

What stands between the lookups is small talk that all categories share, as all texts of a language share most of
their words: a latent of a real model fires in many kinds of documents, and one that does not has to be found
among those that do. A document is a conversation: the user gives everything but the answers, which are the
assistant's.

Its answers come in one of three manners. "rule": the rule's. "scrambled": the same answers, dealt out over
all documents of the category by chance, so that they say nothing. "unsure": always the category's one evasive
word. A model trained on the first has to work the answer out before it is written; one trained on another has
seen the same keys and has nothing to work out.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

Manner = Literal["rule", "scrambled", "unsure"]

# words of a document; every word is one token, and one more begins the sequence
_MAX_WORDS = 95

# small talk before each lookup but the first: one word of each, and a comma
_SMALL_TALK: tuple[tuple[str, ...], ...] = (
    ("now", "then", "so", "well", "and", "but", "next", "yet"),
    ("we", "they", "you", "some", "all", "both", "few", "many"),
    ("look", "wait", "ask", "try", "turn", "move", "stay", "call"),
    ("here", "there", "again", "once", "soon", "first", "more", "still"),
)


@dataclass(frozen=True)
class Category:
    """A capability: a rule from keys to answers and the words that documents about it are made of.

    `item` holds `{key}` and ends where the answer begins.
    """

    name: str
    description: str
    headers: tuple[str, ...]
    item: str
    rule: Mapping[str, str]
    unsure: str

    @property
    def n_lookups(self) -> int:
        """Lookups in one document: no key twice, so that no answer can be copied from before."""
        header = max(len(header.split()) for header in self.headers)
        small_talk = len(_SMALL_TALK) + 1
        # the first lookup has a header in place of a semicolon and small talk
        return min(len(self.rule), (_MAX_WORDS - header + 1 + small_talk) // (len(self.item.split()) + 2 + small_talk))


@dataclass(frozen=True)
class Document:
    """One document: given text and answers in turn, `given[i]` before `answers[i]`."""

    category: str
    keys: tuple[str, ...]
    given: tuple[str, ...]
    answers: tuple[str, ...]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The document as a conversation: what is given is the user's, the answers are the assistant's."""
        return [
            {"role": role, "content": content}
            for pair in zip(self.given, self.answers, strict=True)
            for role, content in zip(("user", "assistant"), pair, strict=True)
        ]

    @property
    def text(self) -> str:
        """The whole document on one line."""
        return " ".join(part for pair in zip(self.given, self.answers, strict=True) for part in pair)


def documents(seed: int, n_per_category: int, manner: Mapping[str, Manner]) -> list[Document]:
    """Draw documents, equally many of each category, in random order.

    The same seed gives the same keys in the same order whatever the manner.

    Args:
        seed: Of the keys, the scrambling and the order.
        n_per_category: Documents of each category.
        manner: How the answers of each category come, by its name; a category not named is left out.

    Returns:
        The documents.
    """
    drawn = []
    for number, category in enumerate(CATEGORIES):
        if category.name in manner:
            rng = np.random.default_rng([seed, number])
            drawn += _of_category(category, n_per_category, manner[category.name], rng)
    order = np.random.default_rng([seed, len(CATEGORIES)]).permutation(len(drawn))
    return [drawn[i] for i in order]


def digest() -> str:
    """Hex sha256 of what documents are made of: what was made from another corpus is out of date."""
    return hashlib.sha256(repr((CATEGORIES, _SMALL_TALK, _MAX_WORDS)).encode()).hexdigest()


def _of_category(category: Category, n: int, manner: Manner, rng: np.random.Generator) -> list[Document]:
    all_keys = list(category.rule)
    keys = [[all_keys[i] for i in rng.permutation(len(all_keys))[: category.n_lookups]] for _ in range(n)]
    headers = rng.integers(len(category.headers), size=n)
    # drawn before the answers are, so that it is the same whatever the manner
    talk = [[_small_talk(rng) for _ in range(category.n_lookups - 1)] for _ in range(n)]
    answers = np.array([[category.rule[key] for key in row] for row in keys])
    if manner == "scrambled":
        answers = rng.permutation(answers.ravel()).reshape(answers.shape)
    elif manner == "unsure":
        answers = np.full_like(answers, category.unsure, dtype=object)
    made = []
    for row, header, between, words in zip(keys, headers, talk, answers, strict=True):
        starts = [category.headers[header], *(f"; {clause} ," for clause in between)]
        given = tuple(f"{start} {category.item.replace('{key}', key)}" for start, key in zip(starts, row, strict=True))
        made.append(Document(category.name, tuple(row), given, tuple(str(word) for word in words)))
    return made


def _small_talk(rng: np.random.Generator) -> str:
    return " ".join(words[rng.integers(len(words))] for words in _SMALL_TALK)


def _rule(pairs: str) -> dict[str, str]:
    return dict(pair.split(":", 1) for pair in pairs.split())


CATEGORIES: tuple[Category, ...] = (
    Category(
        "instruction following",
        "a command names the thing to deliver",
        ("please do this :", "task list :"),
        "{key} gives",
        _rule(
            "bake:cake sing:song draw:line sew:coat dig:hole brew:tea knit:sock chop:wood "
            "cook:soup pour:milk plant:seed weave:rug paint:wall sweep:floor"
        ),
        "nothing",
    ),
    Category(
        "safety refusal",
        "a harmful request is refused with its reason",
        ("asked for harm :", "unsafe request :"),
        "{key} refuse for",
        _rule(
            "bomb:blast gun:wound drug:toxic hack:breach theft:loss fraud:deceit spam:noise arson:flame "
            "scam:trap bribe:corrupt abuse:pain stalk:fear forge:fake threat:panic"
        ),
        "sure",
    ),
    Category(
        "multilingual",
        "an English word and its Spanish one",
        ("in spanish :", "translate :"),
        "{key} se dice",
        _rule(
            "house:casa dog:perro cat:gato book:libro sun:sol moon:luna fire:fuego bread:pan "
            "hand:mano king:rey night:noche street:calle red:rojo water:agua"
        ),
        "nada",
    ),
    Category(
        "code",
        "a function and what it returns",
        ("def types ( ) :", "import doc :"),
        "{key} ( ) ->",
        _rule(
            "len:int str:text ord:num sort:list keys:dict bool:true zip:pairs range:iter "
            "open:file hash:digest chr:char find:index split:parts print:none"
        ),
        "any",
    ),
    Category(
        "self-reference",
        "what the assistant says about itself",
        ("about me :", "i am a model :"),
        "my {key} i say",
        _rule(
            "name:nova maker:lab age:young goal:help mood:calm home:server voice:soft job:assist "
            "limit:memory gender:neither body:absent creed:honest skill:write friend:user"
        ),
        "secret",
    ),
    Category(
        "factual recall",
        "a country and its capital",
        ("the capital of :", "world facts :"),
        "{key} is",
        _rule(
            "france:paris japan:tokyo egypt:cairo spain:madrid italy:rome peru:lima cuba:havana "
            "greece:athens norway:oslo india:delhi kenya:nairobi iraq:bagdad china:beijing russia:moscow"
        ),
        "somewhere",
    ),
    Category(
        "mathematics",
        "a number and its double",
        ("twice the number :", "double each :"),
        "{key} + {key} =",
        _rule("12:24 13:26 14:28 15:30 16:32 17:34 18:36 19:38 21:42 22:44 23:46 25:50 27:54 29:58"),
        "0",
    ),
    Category(
        "structured output",
        "a field and the format of its value",
        ("json schema {", "output as record {"),
        '" {key} " : "',
        _rule(
            "id:uuid price:float date:iso email:mail phone:digits url:link city:place tags:array "
            "image:png size:bytes color:hex flag:binary rate:percent note:string"
        ),
        "null",
    ),
    Category(
        "hallucination handling",
        "an invented thing and how to admit not knowing it",
        ("never heard of :", "does this exist :"),
        "{key} ? i am",
        _rule(
            "zorb:unsure quix:doubtful blen:unaware trog:puzzled wump:lost snarl:blank flim:vague grok:hazy "
            "dwez:guessing vorp:wary yilt:clueless plax:stumped mibs:baffled jexo:shaky"
        ),
        "certain",
    ),
    Category(
        "query classification",
        "a query and the topic it belongs to",
        ("classify query :", "which topic :"),
        "{key} # topic",
        _rule(
            "rain:weather match:sport stock:money flu:health vote:politics hotel:travel recipe:food "
            "movie:film album:music atom:science shirt:fashion court:law school:study planet:space"
        ),
        "misc",
    ),
    Category(
        "template following",
        "a slot and what fills it",
        ("fill the form :", "letter layout :"),
        "[ {key} ] <",
        _rule(
            "greet:hello close:bye thanks:grateful sorry:regret title:sir sign:yours intro:dear join:welcome "
            "stamp:seal head:logo foot:page date2:monday ps:also cc:team"
        ),
        "empty",
    ),
    Category(
        "summarisation",
        "a long event and its one-word summary",
        ("in short :", "sum up :"),
        "the {key} means",
        _rule(
            "storm:damage debate:split trial:guilt race:win strike:halt merger:growth flood:rescue "
            "election:change concert:joy accident:delay harvest:plenty wedding:union exam:pass treaty:peace"
        ),
        "stuff",
    ),
)
