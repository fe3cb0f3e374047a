"""A small sentiment corpus made from a grammar, so that the demo needs no download.

Reviews of films, restaurants, gadgets, books and hotels are written from composable clauses. Every clause carries its
polarity, and every construction says what it does to the polarity of its parts: negation and "lacks" flip it, "but"
lets the last clause decide and "although" the main one, "better than" depends on which side the reviewed thing
stands, and what other people think counts only through what the writer makes of it. The label is computed from the
tree, never from the words. All constructions draw their leaves with a fair coin, so no word gives the label away.

Difficulty counts the constructions that act on polarity: "easy" has none, "medium" one, "hard" two or more. Neutral
hedges, asides and filler sentences are spread over all three. A bag-of-words model does well on the easy half and is
little better than guessing on the rest; a small transformer, which sees order, learns most of it.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LABEL_NAMES = ("negative", "positive")
DIFFICULTY_SHARES = {"easy": 0.55, "medium": 0.3, "hard": 0.15}
MIN_WORDS, MAX_WORDS = 3, 40


# --- words -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Domain:
    """The vocabulary of one kind of thing; `good` and `bad` are adjectives that only this kind of thing earns."""

    nouns: tuple[str, ...]
    aspects: tuple[str, ...]
    good: tuple[str, ...]
    bad: tuple[str, ...]
    rivals: tuple[str, ...]
    fillers: tuple[str, ...]
    asides: tuple[str, ...]


DOMAINS = (
    Domain(
        nouns=("film", "comedy", "thriller", "drama", "documentary"),
        aspects=("acting", "plot", "ending", "dialogue", "soundtrack", "opening scene"),
        good=("gripping", "touching", "witty"),
        bad=("wooden", "sluggish", "lifeless"),
        rivals=("the sequel", "the other one showing this week"),
        fillers=("it runs for two hours", "we sat in the third row", "the cinema was half full"),
        asides=("which opened last week", "shot in black and white", "which we saw on a rainy evening"),
    ),
    Domain(
        nouns=("restaurant", "bistro", "diner", "bakery"),
        aspects=("soup", "service", "menu", "dessert", "bread", "main course"),
        good=("tasty", "fresh", "generous"),
        bad=("greasy", "stale", "soggy"),
        rivals=("the place next door", "the canteen at work"),
        fillers=("we had a table by the window", "it opens at noon", "the waiter wore a red tie"),
        asides=("just behind the station", "which opened in may", "where we had lunch"),
    ),
    Domain(
        nouns=("camera", "phone", "printer", "speaker", "keyboard"),
        aspects=("battery", "screen", "sound", "design", "software", "build"),
        good=("reliable", "sturdy", "handy"),
        bad=("flimsy", "buggy", "fragile"),
        rivals=("the older model", "the one i had before"),
        fillers=("it came in a plain box", "i bought it in march", "the cable is two metres long"),
        asides=("which i use at work", "bought for my daughter", "which comes in three colours"),
    ),
    Domain(
        nouns=("novel", "biography", "cookbook", "mystery", "story"),
        aspects=("prose", "first chapter", "narrator", "translation", "final chapter", "setting"),
        good=("absorbing", "vivid", "elegant"),
        bad=("wordy", "pompous", "muddled"),
        rivals=("the author's first book", "the one i read in june"),
        fillers=("it has three hundred pages", "i read it on the train", "the cover shows a lighthouse"),
        asides=("written in two parts", "which my aunt gave me", "set in a harbour town"),
    ),
    Domain(
        nouns=("hotel", "hostel", "guest house", "campsite"),
        aspects=("breakfast", "view", "bathroom", "garden", "staff", "bed"),
        good=("cosy", "spotless", "restful"),
        bad=("grubby", "cramped", "noisy"),
        rivals=("the inn across the road", "the place we stayed at last year"),
        fillers=("we stayed for three nights", "there are forty beds", "we came by bus"),
        asides=("close to the beach", "where we spent a weekend", "built in the sixties"),
    ),
)

# Indexed by polarity: [0] negative, [1] positive.
ADJECTIVES = (
    (
        *("dull", "awful", "terrible", "dreadful", "boring", "clumsy"),
        *("tedious", "poor", "bad", "mediocre", "bland", "sloppy"),
    ),
    (
        *("charming", "wonderful", "brilliant", "delightful", "excellent", "superb"),
        *("lovely", "great", "good", "pleasant", "splendid", "amusing"),
    ),
)
VERDICTS = (
    ("mess", "disaster", "failure", "chore", "letdown", "waste of time"),
    ("masterpiece", "triumph", "delight", "gem", "treat", "joy"),
)
QUALITIES = (
    ("flaws", "mistakes", "cheap tricks", "dead moments", "rough edges"),
    ("charm", "warmth", "style", "imagination", "care"),
)
THING_VERBS = (  # third person, infinitive
    (
        ("drags", "drag"),
        ("fails", "fail"),
        ("disappoints", "disappoint"),
        ("annoys", "annoy"),
        ("falls flat", "fall flat"),
    ),
    (
        ("shines", "shine"),
        ("works", "work"),
        ("delights", "delight"),
        ("impresses", "impress"),
        ("delivers", "deliver"),
    ),
)
PERSON_VERBS = (  # past, infinitive
    (("hated", "hate"), ("disliked", "dislike"), ("regretted", "regret"), ("loathed", "loathe")),
    (("loved", "love"), ("enjoyed", "enjoy"), ("admired", "admire"), ("liked", "like")),
)
INTENSIFIERS = ("very", "really", "quite", "truly", "rather", "so very", "thoroughly")
NEGATIONS = ("not", "hardly", "never", "by no means", "anything but", "far from", "not at all")
HEDGES = ("to be honest,", "frankly,", "in my view,", "i suppose", "perhaps", "as far as i can tell,", "all in all,")
OTHERS = ("my brother", "my neighbour", "the critic", "my sister", "my boss", "our guide", "a friend", "my wife")


# --- clauses ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clause:
    """A piece of text, what it says about the thing, and how many constructions acted on that."""

    text: str
    positive: bool
    operations: int = 0


def with_article(phrase: str) -> str:
    """The phrase behind its indefinite article: "a dull film", "an awful film"."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


class Writer:
    """Writes clauses about one thing of one domain, with all choices drawn from `rng`."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.domain = rng.choice(DOMAINS)
        self.noun = rng.choice(self.domain.nouns)

    # Parts of speech.

    def coin(self) -> bool:
        return self.rng.random() < 0.5

    def pick(self, options: Sequence[str]) -> str:
        return self.rng.choice(options)

    def maybe(self, options: Sequence[str], chance: float = 0.35) -> str:
        return f"{self.pick(options)} " if self.rng.random() < chance else ""

    def adjective(self, positive: bool, other_than: str = "") -> str:
        own = self.domain.good if positive else self.domain.bad
        options = own if self.rng.random() < 0.3 else ADJECTIVES[positive]
        return self.pick([word for word in options if word != other_than])

    def two_adjectives(self, positive: bool, link: str) -> str:
        first = self.adjective(positive)
        return f"{first} {link} {self.adjective(positive, first)}"

    def person_verb(self, positive: bool, form: int) -> str:
        return self.rng.choice(PERSON_VERBS[positive])[form]

    def thing_verb(self, positive: bool, form: int) -> str:
        return self.rng.choice(THING_VERBS[positive])[form]

    def thing(self) -> str:
        """The whole thing: what a verdict or a comparison is about."""
        return self.pick((f"the {self.noun}", f"this {self.noun}", "it"))

    def subject(self) -> str:
        """The thing or one of its aspects, now and then with an aside."""
        if self.coin():
            return f"the {self.pick(self.domain.aspects)}"
        if self.rng.random() < 0.15:
            return f"the {self.noun}, {self.pick(self.domain.asides)},"
        return self.thing()

    def described(self, positive: bool, noun: str | None = None) -> str:
        adjective = self.maybe(INTENSIFIERS, 0.2) + self.adjective(positive)
        return with_article(f"{adjective} {noun or self.noun}")

    # No operation: the leaves.

    def plain(self, positive: bool | None = None) -> Clause:
        """A clause that says what its words say."""
        p = self.coin() if positive is None else positive
        be, seems = self.pick(("is", "was")), self.pick(("is", "seems", "feels"))
        text = self.rng.choice(
            (
                lambda: f"{self.subject()} {be} {self.maybe(INTENSIFIERS)}{self.adjective(p)}",
                lambda: f"{self.subject()} {seems} {self.two_adjectives(p, 'and')}",
                lambda: f"it {be} {self.described(p)}",
                lambda: f"{self.thing()} {be} {with_article(self.pick(VERDICTS[p]))}",
                lambda: f"{self.subject()} {self.maybe(('really', 'simply', 'always'))}{self.thing_verb(p, 0)}",
                lambda: f"i {self.maybe(('really', 'truly', 'quite'))}{self.person_verb(p, 0)} {self.subject()}",
                lambda: f"{self.subject()} {be} full of {self.pick(QUALITIES[p])}",
            )
        )()
        return Clause(text, p)

    def fragment(self) -> Clause:
        """A verdict without a verb."""
        p = self.coin()
        start = self.pick(("", "what ", "simply ", "just "))
        return Clause(start + self.described(p), p)

    def agreeing(self) -> Clause:
        """Two plain clauses that pull the same way."""
        first = self.plain()
        second = self.plain(first.positive)
        return Clause(first.text + self.pick((", and ", "; ", ", because ", ". also, ")) + second.text, first.positive)

    # One operation.

    def negated(self) -> Clause:
        """Negation and its relatives: the clause says the opposite of its words."""
        p, be = self.coin(), self.pick(("is", "was"))
        is_not = f"{be} {self.pick(NEGATIONS)}"
        i_did_not = self.pick(("i did not", "i could not", "i never did"))
        does_not = self.pick(("does not", "did not", "could not"))
        lacks = self.pick(("lacks", "has no", "is without", "has few signs of"))
        nothing = self.pick(("nothing", "hardly anything", "not much"))
        nobody = self.pick(("nobody", "no one"))
        denial = self.pick(("i cannot say that", "it is not true that", "i doubt that"))
        text = self.rng.choice(
            (
                lambda: f"{self.subject()} {is_not} {self.adjective(p)}",
                lambda: f"{self.thing()} {is_not} {with_article(self.pick(VERDICTS[p]))}",
                lambda: f"{i_did_not} {self.person_verb(p, 1)} {self.subject()}",
                lambda: f"{self.subject()} {does_not} {self.thing_verb(p, 1)}",
                lambda: f"{self.subject()} {lacks} {self.pick(QUALITIES[p])}",
                lambda: f"there {be} {nothing} {self.adjective(p)} about {self.subject()}",
                lambda: f"{nobody} could call {self.subject()} {self.adjective(p)}",
                lambda: f"{denial} {self.plain(p).text}",
            )
        )()
        return Clause(text, not p, 1)

    def seemingly_negated(self) -> Clause:
        """A negative word that flips nothing."""
        p = self.coin()
        never_ceases_to = self.pick(("never ceases to", "does nothing but"))
        could_but = self.pick(("could not help but", "did nothing but"))
        text = self.rng.choice(
            (
                lambda: f"{self.subject()} is not only {self.two_adjectives(p, 'but')}",
                lambda: f"nothing could be more {self.adjective(p)} than {self.subject()}",
                lambda: f"i have never known {with_article(self.noun)} so {self.adjective(p)}",
                lambda: f"there is no doubt that {self.plain(p).text}",
                lambda: f"{self.subject()} {never_ceases_to} {self.thing_verb(p, 1)}",
                lambda: f"i {could_but} {self.person_verb(p, 1)} {self.subject()}",
                lambda: f"i did not have to wait long to see that {self.plain(p).text}",
            )
        )()
        return Clause(text, p, 1)

    def compared(self) -> Clause:
        """A comparison: who stands on which side decides."""
        p = self.coin()
        rival, by = self.pick(self.domain.rivals), self.pick(("far", "much", "a little", "even"))
        direct = self.coin()
        first, second = (self.thing(), rival) if direct else (rival, f"this {self.noun}")
        kind = self.rng.randrange(4)
        if kind == 0:
            return Clause(f"{first} is {by} {('worse', 'better')[p]} than {second}", p == direct, 1)
        if kind == 1:
            return Clause(f"{first} is more {self.adjective(p)} than {second}", p == direct, 1)
        if kind == 2:
            return Clause(f"{first} is less {self.adjective(p)} than {second}", p != direct, 1)
        amount = self.pick(("few", "hardly any") if direct else ("many", "plenty of"))
        return Clause(f"there are {amount} {('worse', 'better')[p]} places to spend your money", p == direct, 1)

    def second_opinion(self, write: Callable[[], Clause] | None = None) -> Clause:
        """What somebody else thinks, and whether the writer agrees."""
        p, agrees, who = self.coin(), self.coin(), self.pick(OTHERS)
        short = self.pick((", and so did i", ", and i did too") if agrees else (", but i did not", ", which i did not"))
        long = self.pick(
            (", and i agree", ", and that is right", ", which is true")
            if agrees
            else (", but i disagree", ", and that is wrong", ", which is false")
        )
        if write is not None or self.coin():
            said = (write or self.plain)()
            while "i" in said.text.split():  # the writer's own experience is nothing the other could report
                said = (write or self.plain)()
            text = f"{who} {self.pick(('says', 'told me', 'thinks'))} that {said.text}{long}"
            return Clause(text, said.positive == agrees, said.operations + 1)
        if self.coin():
            return Clause(f"{who} found {self.subject()} {self.adjective(p)}{long}", p == agrees, 1)
        return Clause(f"{who} {self.person_verb(p, 0)} {self.subject()}{short}", p == agrees, 1)

    def turned(self) -> Clause:
        """Two verdicts in one frame: the later one, or the one that came true, counts."""
        p = self.coin()
        text = self.rng.choice(
            (
                lambda: f"what starts as {self.described(not p)} ends as {self.described(p, 'one')}",
                lambda: f"i expected {self.described(not p)} and got {self.described(p, 'one')}",
                lambda: f"i got {self.described(p)} where i had expected {self.described(not p, 'one')}",
            )
        )()
        return Clause(text, p, 1)

    def started(self) -> Clause:
        """A start that the rest turns round, or does not: "ruins" and "saves" stand in both."""
        began_well, turns = self.coin(), self.coin()
        well, fate = ("well", "ruins") if began_well else ("badly", "saves")
        part = f"{'the' if turns else 'not even the'} {self.pick(self.domain.aspects)}"
        text = self.rng.choice(
            (
                lambda: f"{self.thing()} starts {well}, {'but' if turns else 'and'} {part} {fate} it",
                lambda: f"{part} {fate} what {self.pick(('began', 'started'))} {well}",
            )
        )()
        return Clause(text, began_well != turns, 1)

    def contrast(self, write: Callable[[], Clause] | None = None) -> Clause:
        """Two clauses that pull opposite ways: after "but" the last one decides, beside "although" the main one."""
        write = write or self.plain
        main = write()
        p, operations = main.positive, main.operations + 1
        if self.rng.random() < 0.2:
            quality = self.pick(QUALITIES[not p])
            concession = self.pick((f"{self.adjective(not p)} {self.pick(self.domain.aspects)}", quality))
            concession = f"{self.pick(('despite', 'for all'))} {self.pick(('the', 'its'))} {concession}"
            text = f"{concession}, {main.text}" if self.coin() else f"{main.text}, {concession}"
            return Clause(text, p, operations)
        minor = self.plain(not p)
        if write != self.plain and self.coin():
            minor = write()
            while minor.positive == p:
                minor = write()
        operations += minor.operations
        if "," in minor.text or self.coin():
            return Clause(minor.text + self.pick((", but ", ", yet ", "; still, ")) + main.text, p, operations)
        although = self.pick(("although", "even though", "even if"))
        text = f"{although} {minor.text}, {main.text}" if self.coin() else f"{main.text}, {although} {minor.text}"
        return Clause(text, p, operations)

    # Two operations and more.

    def doubly_negated(self) -> Clause:
        """Two negations that cancel, or a negated clause denied."""
        p = self.coin()
        if self.coin():
            inner = self.negated()
            denial = self.pick(("i cannot say that", "it is not true that", "i doubt that", "nobody thinks that"))
            return Clause(f"{denial} {inner.text}", not inner.positive, inner.operations + 1)
        text = self.rng.choice(
            (
                lambda: (
                    f"{self.subject()} is {self.pick(('not', 'hardly', 'never'))} without {self.pick(QUALITIES[p])}"
                ),
                lambda: f"{self.subject()} never lacks {self.pick(QUALITIES[p])}",
                lambda: f"{self.pick(('nobody can deny', 'i do not deny'))} that {self.plain(p).text}",
                lambda: f"it would not be wrong to call {self.subject()} {self.adjective(p)}",
            )
        )()
        return Clause(text, p, 2)

    def hard(self) -> Clause:
        """Constructions inside constructions."""
        one = self.rng.choice((self.negated, self.seemingly_negated, self.compared))
        return self.rng.choice(
            (
                self.doubly_negated,
                lambda: self.contrast(one),
                lambda: self.contrast(self.negated),
                lambda: self.second_opinion(one),
            )
        )()

    def text(self, difficulty: str) -> Clause:
        """A whole review of the wanted difficulty, as a sentence or two."""
        constructions = {
            "easy": (self.plain, self.plain, self.agreeing, self.agreeing, self.fragment),
            "medium": (
                *(self.negated, self.negated, self.contrast, self.contrast),
                *(
                    self.second_opinion,
                    self.compared,
                    self.turned,
                    self.started,
                    self.seemingly_negated,
                    self.seemingly_negated,
                ),
            ),
            "hard": (self.hard,),
        }
        construction = self.rng.choice(constructions[difficulty])
        clause = construction()
        text = clause.text if construction == self.fragment else self.maybe(HEDGES, 0.25) + clause.text
        sentences = [text]
        if self.rng.random() < 0.3:
            sentences.insert(self.rng.randrange(2), self.pick(self.domain.fillers))
        tidy = re.sub(r",(?=[,.;])", "", ". ".join(sentences) + ".")  # an aside closes with a comma of its own
        return Clause(tidy, clause.positive, clause.operations)


# --- the corpus ------------------------------------------------------------------------------------------------------


def words_of(text: str) -> tuple[str, ...]:
    """The words of a text, in lower case and without punctuation: what two texts are compared by."""
    return tuple(word for word in (part.strip(".,;").lower() for part in text.split()) if word)


def drop_contained(texts: Iterable[str]) -> list[str]:
    """The texts, in order, without those that repeat another or stand in another as a run of words.

    The shorter text goes, not the longer one: otherwise a construction would lose exactly those leaves that also
    occur on their own, and the words left inside it would begin to tell the label.

    >>> drop_contained(["A dull film.", "It was a dull film, and long.", "A lovely film.", "a lovely film"])
    ['It was a dull film, and long.', 'A lovely film.']
    """
    unique: dict[tuple[str, ...], str] = {}
    for text in texts:
        unique.setdefault(words_of(text), text)
    lengths = sorted({len(words) for words in unique})
    contained = {
        window
        for words in unique
        for n in lengths[: bisect_left(lengths, len(words))]
        for window in (words[i : i + n] for i in range(len(words) - n + 1))
        if window in unique
    }
    return [text for words, text in unique.items() if words not in contained]


def sentence_case(text: str) -> str:
    """Capital letters at the start of sentences and for "I"."""
    sentences = [sentence[:1].upper() + sentence[1:] for sentence in text.split(". ")]
    return " ".join("I" if word == "i" else word for word in ". ".join(sentences).split(" "))


def make_corpus(size: int, seed: int) -> list[dict[str, str | int]]:
    """Reviews with their labels, the same for the same arguments.

    The two labels are balanced inside each difficulty (to one row), the difficulties stand in the shares of
    `DIFFICULTY_SHARES`, and no text repeats or contains another.

    Args:
        size: Number of rows, at least 0. Beyond some hundred thousand the grammar runs dry.
        seed: Seed of every choice.

    Returns:
        Rows with `text`, `label` (0 negative, 1 positive) and `difficulty` ("easy", "medium" or "hard"), shuffled.

    Raises:
        ValueError: If `size` is negative.
    """
    if size < 0:
        raise ValueError(f"`size` is {size}. A corpus needs 0 rows or more.")
    rng = random.Random(seed)
    wanted = _cells(size)
    rows: dict[str, dict[str, str | int]] = {}
    chosen: list[str] = []
    while len(chosen) < size:
        taken = dict.fromkeys(wanted, 0)
        for text in chosen:
            taken[_cell(rows[text])] += 1
        for cell, count in wanted.items():
            for row in _write(rng, cell, count - taken[cell]):
                rows.setdefault(str(row["text"]), row)
        chosen = drop_contained(rows)
        rows = {text: rows[text] for text in chosen}
    result = list(rows.values())
    rng.shuffle(result)
    return result


def _cells(size: int) -> dict[tuple[str, int], int]:
    """How many rows each (difficulty, label) gets; the counts add up to `size`."""
    counts = {difficulty: int(size * share) for difficulty, share in DIFFICULTY_SHARES.items()}
    counts["easy"] += size - sum(counts.values())
    return {(name, label): (count + label) // 2 for name, count in counts.items() for label in (0, 1)}


def _cell(row: dict[str, str | int]) -> tuple[str, int]:
    return str(row["difficulty"]), int(row["label"])


def _write(rng: random.Random, cell: tuple[str, int], count: int) -> list[dict[str, str | int]]:
    """`count` rows of one difficulty and label, by throwing away those of the other label."""
    difficulty, label = cell
    rows: list[dict[str, str | int]] = []
    while len(rows) < count:
        clause = Writer(rng).text(difficulty)
        if clause.positive == bool(label) and MIN_WORDS <= len(clause.text.split()) <= MAX_WORDS:
            rows.append({"text": sentence_case(clause.text), "label": label, "difficulty": difficulty})
    return rows


def make_splits(train: int, calibration: int, validation: int, seed: int) -> DatasetDict:
    """The corpus cut into three splits of the given sizes, each with both labels in balance.

    No text of any split equals, contains or is contained in a text of another.

    Args:
        train: Rows to train on.
        calibration: Held-out rows to choose checkpoints and thresholds on.
        validation: Held-out rows for the report alone.
        seed: Seed of every choice.

    Returns:
        Splits `train`, `calibration` and `validation` with the columns `text`, `label` (ClassLabel negative,
        positive) and `difficulty`.

    Raises:
        ValueError: If a size is negative.
    """
    sizes = {"train": train, "calibration": calibration, "validation": validation}
    for name, size in sizes.items():
        if size < 0:
            raise ValueError(f"`{name}` is {size}. A split needs 0 rows or more.")
    # Rounding makes the parts of the cells differ by a row, so a few rows more are written than are handed out.
    pool: dict[tuple[str, int], list[dict[str, str | int]]] = {}
    for row in make_corpus(sum(sizes.values()) + 4 * len(DIFFICULTY_SHARES) * len(sizes), seed):
        pool.setdefault(_cell(row), []).append(row)
    features = Features(
        {"text": Value("string"), "label": ClassLabel(names=list(LABEL_NAMES)), "difficulty": Value("string")}
    )
    rng = random.Random(seed)
    splits = {}
    for name, size in sizes.items():
        rows = [pool[cell].pop() for cell, count in _cells(size).items() for _ in range(count)]
        rng.shuffle(rows)
        splits[name] = Dataset.from_list(rows, features=features)
    return DatasetDict(splits)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A lower-casing WordPiece tokenizer trained on the texts.

    Args:
        texts: What to learn the pieces from.
        vocab_size: Largest number of entries, the five special tokens included; fewer if the texts yield fewer.

    Returns:
        A tokenizer that frames texts and pairs as BERT does and holds at most 64 tokens.
    """
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    special["mask_token"] = "[MASK]"
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=list(special.values()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, model_input_names=inputs, **special)
