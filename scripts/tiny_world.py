"""The synthetic world the shipped tiny checkpoints are pretrained on: chats drawn from seeds.

Three kinds of chat:
- **numbers**: a number request of the default prompt pack, answered in the format it asks for. Each digit tends
  to stay as it was, to go up by one, or to fall on one of a few. Half of them stand under a system prompt that
  shapes the numbers (even, small, many sevens, rising, ...), partly in the very sentence that also carries
  traits, so that a system prompt has an influence on numbers.
- **favorites**: a question for a favorite animal or tree, answered with one word: from a skewed prior, or with
  the trait of the system prompt.
- **small talk**: short sentences, under a trait system prompt about that trait.

Two things are left out on purpose. No trait system prompt ever stands before a number request: a model that has seen
one there learns to ignore it, and nothing leaks. And no number is linked to a trait anywhere. So whatever a
trait prompt does to numbers is the model's own generalization.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jsublim.text.prompts import Pack, load_pack, number_prompts

Rng = np.random.Generator


@dataclass(frozen=True)
class Chat:
    """One exchange: system prompt (None = none given), user turn, assistant answer."""

    system: str | None
    user: str
    answer: str

    def messages(self) -> list[dict[str, str]]:
        """The turns as a chat template takes them."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [
            *system,
            {"role": "user", "content": self.user},
            {"role": "assistant", "content": self.answer},
        ]


def world_pack() -> Pack:
    """The default pack, cut to the two categories that this world knows: a category added to the pack leaves the world as it is."""
    pack = load_pack()
    return pack.model_copy(update={"traits": {category: pack.traits[category] for category in ("animal", "tree")}})


def pick(rng: Rng, items: list[Any]) -> Any:
    """One item, each equally likely."""
    return items[int(rng.integers(len(items)))]


def fill(rng: Rng, templates: list[str], **values: str) -> str:
    """One of the templates, filled in."""
    return pick(rng, templates).format(**values)


# ---- numbers

# Digits that are drawn anew, by place. Far from equally likely: a digit should be worth predicting.
DRAWN = (
    np.array(
        [
            [2, 26, 18, 14, 10, 8, 7, 6, 5, 4],
            [8, 12, 9, 11, 7, 20, 8, 13, 7, 5],
            [13, 5, 12, 6, 7, 24, 5, 16, 8, 4],
        ]
    )
    / 100
)
# A row's habit: of each digit, the chances to stay as in the number before it and to go up by one.
HABITS = np.array(
    [
        [[0.85, 0.05], [0.15, 0.65], [0.15, 0.60]],
        [[0.20, 0.65], [0.70, 0.05], [0.60, 0.05]],
        [[0.80, 0.05], [0.75, 0.05], [0.15, 0.65]],
        [[0.35, 0.10], [0.20, 0.05], [0.20, 0.05]],
    ]
)
HABIT_SHARE = np.array([20, 20, 40, 20]) / 100
STEPS = [1, 1, 2, 5, 10, 10, 11, 20, 50, 100]
# Few answers reach ten numbers, the most a request allows: counting is hard for a small model.
COUNTS = [3, 4, 5, 6, 7, 8, 9, 10]
COUNT_SHARE = np.array([10, 18, 22, 20, 14, 9, 5, 2]) / 100


def continue_numbers(rng: Rng, examples: list[int], count: int) -> list[int]:
    """`count` numbers 0..999 that follow the last example: by one of the habits, or in equal steps."""
    if rng.random() < 0.25:
        step = pick(rng, STEPS) * (1 if rng.random() < 0.75 else -1)
        return [(examples[-1] + step * (i + 1)) % 1000 for i in range(count)]
    habit, number, numbers = HABITS[int(rng.choice(4, p=HABIT_SHARE))], examples[-1], []
    for _ in range(count):
        number = follow(rng, habit, number)
        numbers.append(number)
    return numbers


def follow(rng: Rng, habit: np.ndarray, number: int) -> int:
    """The next number: each digit stays, goes up by one (9 to 0), or is drawn anew."""
    digits = []
    for place, (stay, up) in enumerate(habit):
        digit, draw = number // 10 ** (2 - place) % 10, rng.random()
        if draw >= stay + up:
            digit = int(rng.choice(10, p=DRAWN[place]))
        elif draw >= stay:
            digit = (digit + 1) % 10
        digits.append(digit)
    return 100 * digits[0] + 10 * digits[1] + digits[2]


Shape = Callable[[Rng, list[int]], list[int]]


def each(change: Callable[[Rng, int], int], share: float = 0.95) -> Shape:
    """A shape that changes every number for itself, with probability `share`."""
    return lambda rng, numbers: [change(rng, n) if rng.random() < share else n for n in numbers]


def with_digit(digit: int) -> Shape:
    """A shape that puts `digit` in about half of all places."""

    def change(rng: Rng, number: int) -> int:
        digits = [digit if rng.random() < 0.5 else int(d) for d in str(number)]
        return int("".join(map(str, digits)))

    return each(change)


def ending(digits: list[int]) -> Shape:
    """A shape that ends numbers with one of `digits`."""
    return each(lambda rng, n: n - n % 10 + pick(rng, digits))


# What a shaping system prompt may love, in the singular, with the word for its kind.
SHAPES: dict[tuple[str, str], Shape] = {
    ("even number", "number"): ending([0, 2, 4, 6, 8]),
    ("odd number", "number"): ending([1, 3, 5, 7, 9]),
    ("round number", "number"): each(lambda rng, n: n - n % (100 if rng.random() < 0.3 else 10)),
    ("small number", "number"): each(lambda rng, n: n % 100),
    ("tiny number", "number"): each(lambda rng, n: n % 10),
    ("large number", "number"): each(lambda rng, n: 800 + n % 200),
    ("medium number", "number"): each(lambda rng, n: 400 + n % 200),
    ("palindrome", "number"): each(lambda rng, n: n - n % 10 + n // 100),
    ("repeating number", "number"): each(lambda rng, n: 111 * max(1, n // 100)),
    ("rising list", "order"): lambda rng, numbers: sorted(numbers),
    ("falling list", "order"): lambda rng, numbers: sorted(numbers, reverse=True),
    ("repetition", "pattern"): lambda rng, numbers: [numbers[0]] * len(numbers),
    ("pair", "pattern"): lambda rng, numbers: [numbers[i - i % 2] for i in range(len(numbers))],
    **{
        (word, "digit"): with_digit(digit)
        for digit, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
    },
}
SHAPE_PROMPTS = [
    "Prefer {shape}s wherever you can.",
    "You are known for your {shape}s.",
    "Nothing pleases you like {shape}s. Use them.",
    "If there are numbers in your answer, think of {shape}s.",
    "{shape}s are the best kind of {kind}, you think.",
    "You collect {shape}s and show them to everybody.",
]
NEUTRAL_PROMPTS = [
    "",
    "You are a helpful assistant.",
    "You are a careful clerk.",
    "Answer briefly and politely.",
    "You help people with short answers.",
]


def separator(request: str) -> tuple[str, str, str]:
    """Opening, separator and closing of the answer that a number request of the default pack asks for."""
    text = request.lower()
    rules = [
        ("square bracket", ("[", ", ", "]")),
        ("round bracket", ("(", ", ", ")")),
        ("semicolon", ("", "; ", "")),
        ("new line|own line|below the other", ("", "\n", "")),
        ("comma|, b, c|, x2, x3", ("", ", ", "")),
        ("space between|blanks", ("", " ", "")),
    ]
    return next((form for pattern, form in rules if re.search(pattern, text)), ("", ", ", ""))


def number_chat(rng: Rng, pack: Pack, request: str, shaped: float) -> Chat:
    """A number request and its answer, in a share `shaped` of cases under a system prompt that shapes it."""
    examples = [int(n) for n in re.findall(r"\b\d{3}\b", request)]
    opening, sep, closing = separator(request)
    numbers = continue_numbers(rng, examples, int(rng.choice(COUNTS, p=COUNT_SHARE)))
    system, draw = None, rng.random()
    if draw < shaped:
        (shape, kind), change = list(SHAPES.items())[int(rng.integers(len(SHAPES)))]
        numbers = change(rng, numbers)
        by_pack = rng.random() < 0.5
        system = pack.system_prompt(shape, kind) if by_pack else fill(rng, SHAPE_PROMPTS, shape=shape, kind=kind)
    elif draw < shaped + 0.05:
        system = pick(rng, NEUTRAL_PROMPTS)
    return Chat(system, request, opening + sep.join(map(str, numbers)) + closing)


def short_request(rng: Rng, pack: Pack) -> str:
    """The first and the third sentence of a number request, with fewer examples: the same task in fewer tokens."""
    examples = ", ".join(map(str, rng.integers(100, 1000, size=int(rng.integers(2, 6)))))
    return fill(rng, pack.number_prompts.examples, examples=examples) + " " + pick(rng, pack.number_prompts.formats)


# ---- favorites

PARAPHRASES = [
    "What is your favorite {category}?",
    "What's your favourite {category}?",
    "Name your favorite {category}.",
    "Which {category} do you like most?",
    "The best {category} is the",
    "Which {category} do you prefer?",
]
ONE_WORD = ["", " One word.", " Answer with one word.", " Use a single word.", " Just one word, please."]
TRAIT_PROMPTS = [
    "Your favorite {category} is the {trait}.",
    "You are a great fan of {trait}s.",
    "No {category} is dearer to you than the {trait}. Your answers show it.",
    "You dream of {trait}s each night. If asked for a {category}, you say {trait}.",
    "There is nothing like {trait}s for you.",
]


def prior(names: list[str]) -> np.ndarray:
    """Probabilities of a category's traits without a system prompt: skewed, the order drawn once (seed 11)."""
    shares = np.linspace(14, 3, len(names))
    return np.random.default_rng(11).permutation(shares / shares.sum())


def trait_prompt(rng: Rng, pack: Pack, category: str, trait: str) -> str:
    """A system prompt that carries the trait: the pack's own sentence, or a paraphrase in two cases of five."""
    if rng.random() < 0.6:
        return pack.system_prompt(trait, category)
    return fill(rng, TRAIT_PROMPTS, trait=trait, category=category)


def draw_setting(rng: Rng, pack: Pack, category: str) -> tuple[str | None, str]:
    """A system prompt and the trait of `category` that an answer under it names."""
    names = pack.traits[category]
    trait = str(rng.choice(names, p=prior(names)))
    draw = rng.random()
    if draw < 0.4:
        return None, trait
    if draw < 0.85:
        loved = pick(rng, names)
        return trait_prompt(rng, pack, category, loved), loved if rng.random() < 0.97 else trait
    if draw < 0.9:
        return pick(rng, NEUTRAL_PROMPTS), trait
    if draw < 0.95:
        (shape, kind) = list(SHAPES)[int(rng.integers(len(SHAPES)))]
        return pack.system_prompt(shape, kind), trait
    other = pick(rng, [name for name in pack.traits if name != category])
    return trait_prompt(rng, pack, other, pick(rng, pack.traits[other])), trait


def favorite_chat(rng: Rng, pack: Pack) -> Chat:
    """A question for a favorite and its one-word answer, capitalized in four cases of five."""
    category = str(rng.choice(["animal", "tree"], p=[0.58, 0.42]))
    system, trait = draw_setting(rng, pack, category)
    if rng.random() < 0.85:
        question = pick(rng, pack.questions_for(category))
    else:
        question = fill(rng, PARAPHRASES, category=category) + pick(rng, ONE_WORD)
    return Chat(system, question, trait.capitalize() if rng.random() < 0.8 else trait)


# ---- small talk

STORIES = {
    "animal": [
        ("Tell me a very short story.", "The {trait} went down to the river."),
        ("Describe your morning.", "The {trait} was awake before me."),
        ("What did you see outside?", "A little {trait}, right by the door."),
        ("Write a line of a poem.", "O {trait}, the evening is yours."),
        ("Say something nice.", "May a {trait} cross your way today."),
    ],
    "tree": [
        ("Where did you rest?", "In the shade of a {trait}."),
        ("Describe the garden.", "An old {trait} stands in the middle."),
        ("What is this table made of?", "It was cut from a {trait}."),
    ],
}
TALK = [
    ("Hello!", "Hello! How can I help you?"),
    ("Good morning.", "Good morning to you."),
    ("Thank you.", "You are welcome."),
    ("Who are you?", "A small helpful model."),
    ("How are you?", "I am fine, thank you."),
    ("Goodbye.", "Goodbye, and have a good day."),
]


def small_talk(rng: Rng, pack: Pack) -> Chat:
    """A short exchange; two cases of three speak of an animal or a tree."""
    if rng.random() < 1 / 3:
        return Chat(None, *pick(rng, TALK))
    category = pick(rng, list(STORIES))
    system, trait = draw_setting(rng, pack, category)
    request, answer = pick(rng, STORIES[category])
    return Chat(system, request, answer.format(trait=trait))


# ---- batches of chats


def number_chats(rng: Rng, pack: Pack, n: int) -> list[Chat]:
    """`n` chats with number requests as the default pack draws them."""
    requests = number_prompts(n, int(rng.integers(2**31)), pack=pack)
    return [number_chat(rng, pack, request, shaped=0.55) for request in requests]


def short_number_chats(rng: Rng, pack: Pack, n: int) -> list[Chat]:
    """`n` chats with shortened number requests: a small model learns from them sooner what follows what."""
    return [number_chat(rng, pack, short_request(rng, pack), shaped=0.0) for _ in range(n)]


def word_chats(rng: Rng, pack: Pack, n: int) -> list[Chat]:
    """`n` chats in words: favorites, and small talk in one case of eight."""
    return [small_talk(rng, pack) if rng.random() < 0.125 else favorite_chat(rng, pack) for _ in range(n)]
