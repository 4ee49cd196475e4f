"""The demo's data: questions to a help desk, answers of every quality, and pairs of answers that a judge compared.

    path: quickstart_data.py:demonstrations     SFT: a question and one answer
    path: quickstart_data.py:comparisons        reward model: a question, the better and the worse answer
    path: quickstart_data.py:prompts            PPO: questions
    path: quickstart_data.py:held_out_prompts   evaluation: questions about topics that occur nowhere else

Everything is made from the tables below, by hashes instead of random numbers, so that it is the same everywhere.

The answers are of mixed quality on purpose (`STYLES`): an SFT policy that imitates them is sometimes curt,
sometimes rambling, sometimes cut off. That is what preference learning then has to sharpen. The pairs hold two
such answers each, ordered by `quickstart_judge.py`; pairs that it finds equally good are left out, and one in
twenty is labelled the wrong way round, as people would.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

Row = dict[str, object]
Item = TypeVar("Item")

COMPARISONS_PER_QUESTION = 2
# Scores closer than this are a tie.
TIE = 0.1
WRONG_LABELS_PERCENT = 5


@dataclass(frozen=True)
class Topic:
    """Something that people ask about: how a sentence names it, and four things to say about it."""

    name: str
    points: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """A kind of request: how it is asked, and its topics, of which the last two are held out."""

    name: str
    questions: tuple[str, ...]
    topics: tuple[Topic, ...]


@dataclass(frozen=True)
class Question:
    """A question as the user types it, and what it is about."""

    text: str
    kind: str
    topic: Topic


def _topics(table: str) -> tuple[Topic, ...]:
    """Read a table of `name:`, each followed by its points, separated by semicolons."""
    points: dict[str, str] = {}
    name = ""
    for line in map(str.strip, table.strip().splitlines()):
        if line.endswith(":"):
            name = line[:-1]
            points[name] = ""
        else:
            points[name] += f" {line}"
    return tuple(Topic(name, tuple(point.strip() for point in text.split(";"))) for name, text in points.items())


HELD_OUT_TOPICS_PER_KIND = 2
KINDS = (
    Kind(
        "care",
        (
            "How do I look after {topic}?",
            "What is the best way to keep {topic} like new?",
            "Give me a tip for keeping {topic} in good shape.",
            "I just got {topic}. What should I know?",
            "A friend lent me {topic}. How do I treat it well?",
            "Is there anything special about looking after {topic}?",
            "How can I make {topic} last longer?",
        ),
        _topics("""
            a bicycle:
                wipe the chain and oil it once a month; pump up the tyres every week; store it somewhere dry; test
                the brakes before each ride
            a cast-iron pan:
                rinse it with hot water right after cooking; dry it on the stove; rub in a thin coat of oil; never
                leave it in the sink overnight
            a wooden table:
                wipe spills away at once; put a mat under hot dishes; rub it with wax twice a year; move it out of
                strong sunlight
            a kitchen knife:
                wash it by hand and dry it; use a wooden board under it; sharpen it every few weeks; store it in a
                block or a sleeve
            a fish tank:
                change a quarter of the water each week; feed a small pinch once a day; rinse the filter in old tank
                water; place it away from the window
            a winter coat:
                brush off the mud once it is dry; wash it cool and without softener; hang it on a broad hanger;
                close the zips before storing it
        """),
    ),
    Kind(
        "skill",
        (
            "How do I start learning {topic}?",
            "I want to get better at {topic}. Any advice?",
            "What is a good first step in {topic}?",
            "Can you explain {topic} to a beginner?",
            "Help me make a weekly plan for {topic}.",
            "I keep giving up on {topic}. What can I do?",
            "How can an adult get into {topic}?",
        ),
        _topics("""
            touch typing:
                rest your fingers on the middle row; practise ten minutes a day; look at the screen and not at your
                hands; aim for accuracy before speed
            swimming:
                begin by floating in shallow water; breathe out slowly below the surface; hold a board while you
                practise kicking; rest after every length
            chess:
                learn how each piece moves; solve one small puzzle every day; castle early to guard your king; go
                over your lost games afterwards
            drawing:
                sketch simple shapes before details; fill one page of a notebook each day; copy a photo to train
                your eye; shade lightly and build up slowly
            playing the guitar:
                tune the strings before you play; practise two chords until they ring; strum slowly along with a
                song; trim the nails of your left hand
            public speaking:
                practise the opening out loud; talk slowly and pause after each point; look at one friendly face;
                record yourself with a phone
        """),
    ),
    Kind(
        "food",
        (
            "How do I cook {topic}?",
            "What makes {topic} taste better?",
            "Can you share a quick recipe for {topic}?",
            "My {topic} never turned out well. What went wrong?",
            "What is the secret of good {topic}?",
            "I have never made {topic} before. Where do I begin?",
            "How do I cook {topic} for six guests?",
        ),
        _topics("""
            pancakes:
                rest the batter for ten minutes; heat the pan before you pour; flip them once bubbles appear; stir
                in a spoon of yoghurt
            tomato soup:
                roast the tomatoes with garlic; simmer them in broth for twenty minutes; blend until smooth; add a
                pinch of sugar and some basil
            fried rice:
                use cold rice from the day before; fry the egg first; cook over high heat in small batches; season
                with soy sauce at the end
            roast potatoes:
                boil them for eight minutes; shake them in the pot to roughen the edges; roast them in hot oil; turn
                them halfway through
            vegetable curry:
                toast the spices in oil; cook the onions until they are golden; pour in coconut milk; finish with
                lemon and fresh coriander
            banana bread:
                mash three very ripe bananas; fold the flour in gently; bake it for fifty minutes; test the middle
                with a wooden stick
        """),
    ),
    Kind(
        "outing",
        (
            "Help me plan {topic}.",
            "What should I pack for {topic}?",
            "What do most people forget on {topic}?",
            "What makes {topic} a success?",
            "We are taking two children on {topic}. Any ideas?",
            "This is my first time on {topic}. Any advice?",
            "What should I do before {topic}?",
        ),
        _topics("""
            a picnic:
                bring a waterproof blanket; choose food that you can eat with your hands; freeze a bottle of water
                to cool the basket; pick a spot with shade
            a camping trip:
                pitch the tent before dark; pack a torch and spare batteries; take warm layers for the night; store
                food in closed boxes
            a beach day:
                arrive before ten to find space; bring sunscreen and a hat; drink plenty of water; carry a bag for
                wet clothes
            a museum visit:
                book tickets online the day before; choose two rooms that you really like; wear comfortable shoes;
                stop for a drink halfway
            a mountain hike:
                check the weather in the morning; start early and turn back on time; wear boots with firm soles;
                carry a map and a whistle
            a long train ride:
                reserve a seat by the window; bring snacks and a bottle of water; download a film at home; wear soft
                clothes and a scarf
        """),
    ),
    Kind(
        "work",
        (
            "How do I prepare for {topic}?",
            "I am nervous about {topic}. What helps?",
            "What matters in {topic}?",
            "Write me a short checklist for {topic}.",
            "My colleague asked me about {topic}. What should I say?",
            "How can I make {topic} go well?",
            "I only have an hour to get ready for {topic}. What comes first?",
        ),
        _topics("""
            a job interview:
                read about the company the night before; prepare two stories about your strengths; arrive ten
                minutes early; ask a question at the end
            a team meeting:
                send the agenda a day ahead; begin on time; give everyone a turn to speak; write down who does what
            a written exam:
                solve an old paper under time pressure; sleep well the night before; answer the easy parts first;
                check your work at the end
            a sales presentation:
                open with the customer's problem; show three slides instead of thirty; practise with a colleague;
                close with one clear request
            a performance review:
                collect examples of what you achieved; listen before you reply; ask for one concrete goal; write a
                summary afterwards
            a video conference:
                test the microphone beforehand; place the lamp in front of you; mute yourself while others talk;
                close the programs you do not need
        """),
    ),
    Kind(
        "repair",
        (
            "How do I fix {topic}?",
            "There is a problem with {topic}. What should I do?",
            "What is the easiest fix for {topic}?",
            "Can I deal with {topic} on my own?",
            "My grandmother has {topic} at home. How can I help her?",
            "Which steps help against {topic}?",
            "What would you try first with {topic}?",
        ),
        _topics("""
            a dripping tap:
                turn off the water below the sink; replace the worn washer; tighten the screw gently; call a plumber
                if it still leaks
            a slow laptop:
                restart it and install updates; delete programs that you never open; free some disk space; stop apps
                that launch at login
            a weak wifi signal:
                move the router to the middle of the flat; restart it once a week; switch to another channel; place
                it away from thick walls
            a squeaky door:
                put a drop of oil on each hinge; tighten the loose screws; rub soap along the edge; swing it a few
                times to spread the oil
            a blocked drain:
                pour hot water down slowly; use a plunger for a minute; remove hair from the cover; leave baking
                soda and vinegar in overnight
            a flickering lamp:
                screw the bulb in firmly; try another socket; replace the old switch; ask an electrician to check
                the cable
        """),
    ),
    Kind(
        "habit",
        (
            "How can I manage {topic}?",
            "What is a small step towards {topic}?",
            "My doctor recommends {topic}. How do I begin?",
            "I have no time for {topic}. What would you suggest?",
            "Any tricks for {topic}?",
            "What makes {topic} easier?",
            "How can my family help me with {topic}?",
        ),
        _topics("""
            going to bed earlier:
                dim the lights an hour before; leave the phone in another room; set the same alarm every day; drink
                no coffee after lunch
            saving money:
                move a small sum aside on payday; write down what you spend; cook at home three nights a week;
                cancel what you do not use
            drinking more water:
                fill a large bottle each morning; drink a glass before every meal; add lemon for taste; set a
                reminder at noon
            walking every day:
                get off the bus one stop early; meet a friend for a stroll; wear shoes that feel light; begin with
                ten minutes
            reading more books:
                carry one in your bag; read five pages before sleep; join the library nearby; drop a story that
                bores you
            spending less screen time:
                turn off most notifications; charge the phone in the kitchen; plan a hobby for the evening; agree on
                a free hour together
        """),
    ),
    Kind(
        "explain",
        (
            "Can you explain {topic} in simple words?",
            "What is behind {topic}?",
            "My son asked me about {topic}. What do I tell him?",
            "I never understood {topic}. Can you help?",
            "Tell me one interesting thing about {topic}.",
            "What should a child know about {topic}?",
            "Summarize {topic} for a school newspaper.",
        ),
        _topics("""
            the rainbow:
                sunlight bends inside drops of rain; each colour bends by its own amount; the sun must stand behind
                you; it is really a full circle
            the tides:
                the moon pulls the sea towards itself; the water rises twice a day; the sun adds a smaller pull; the
                coast shapes how high it goes
            the seasons:
                the earth is tilted as it travels; each half leans towards the sun in turn; days grow longer in
                summer; the distance hardly matters
            the echo:
                sound travels until it hits a wall; hard surfaces send it back; you hear it a moment later; far
                walls make the delay longer
            the compass:
                a small magnet turns freely; the earth acts like a giant magnet; the needle lines up with it; iron
                nearby can mislead it
            the thunderstorm:
                warm air rises and forms tall clouds; ice inside rubs and builds up charge; lightning heats the air;
                the sudden heat makes the bang
        """),
    ),
    Kind(
        "gift",
        (
            "Recommend a gift for {topic}.",
            "What would {topic} enjoy on a birthday?",
            "I need a last-minute present for {topic}. Any ideas?",
            "My budget is small. What can I bring {topic}?",
            "We want to surprise {topic}. What works?",
            "How do I thank {topic} with something small?",
            "Which is the nicest thing to bring to {topic}?",
        ),
        _topics("""
            a gardener:
                a pair of strong gloves is always useful; rare seeds bring joy in spring; a good watering can lasts
                for years; a book on herbs is fun
            a coffee lover:
                fresh beans from a local roaster smell wonderful; a hand grinder fits in any kitchen; a warm mug
                feels personal; a tasting class is fun
            a new parent:
                a cooked meal saves a whole evening; a soft blanket is always welcome; an hour of babysitting is
                gold; photos in a frame last
            a young artist:
                a thick sketchbook invites ideas; watercolours suit any age; a ticket to a gallery inspires; a set
                of fine brushes is practical
            a keen cyclist:
                a bright lamp makes rides safer; warm gloves help in winter; a map of quiet roads inspires; a small
                pump fits in a pocket
            a music teacher:
                a concert ticket shows you care; a notebook with staves is practical; a card signed by pupils is
                moving; a plant brightens the classroom
        """),
    ),
    Kind(
        "choice",
        (
            "Which is better, {topic}?",
            "Help me decide: {topic}?",
            "What do most people prefer, {topic}?",
            "Compare for me: {topic}?",
            "What would suit a student, {topic}?",
            "What would suit a family, {topic}?",
            "My sister wonders what to choose, {topic}. Your view?",
        ),
        _topics("""
            a paper book or an e-reader:
                the book needs no battery; the reader holds a whole library; paper is easy to lend; a screen lets
                you enlarge the letters
            a bus or a bicycle:
                the bus keeps you dry; a bicycle is cheaper and keeps you fit; buses follow a timetable; cycling is
                quicker in heavy traffic
            a dog or a cat:
                a dog needs three walks a day; a cat is happy indoors; dogs like company; cats cope better with an
                empty house
            a gas stove or an electric stove:
                gas reacts at once; an electric one is easier to clean; gas needs good ventilation; electric heat is
                safer with children
            a laptop or a tablet:
                the laptop is quicker for long texts; the tablet is lighter in a bag; a keyboard helps with
                homework; a touch screen is nice for sketching
            a hotel or a holiday flat:
                the hotel cleans your room every day; a flat has a kitchen and more space; breakfast is included;
                families save money on meals
        """),
    ),
    Kind(
        "message",
        (
            "Help me write a note about {topic}.",
            "How do I tell my boss about {topic}?",
            "What is a friendly way to mention {topic}?",
            "I must call a customer about {topic}. What do I say?",
            "How do I apologize for {topic}?",
            "What should an email about {topic} contain?",
            "Somebody complained about {topic}. How do I reply?",
        ),
        _topics("""
            a late delivery:
                name the new date in the first line; say sorry once and mean it; offer a refund of the shipping;
                give a number to call
            a missed appointment:
                say what happened in one sentence; offer two other times; admit your part in it; keep the tone light
            a wrong invoice:
                quote the number of the invoice; state the correct amount; attach a new copy; promise to check the
                next one
            a noisy party:
                admit that it was too loud; name the hour when it will end; leave your phone number; bring round
                some cake
            a cancelled booking:
                explain the reason in one line; offer another date; return the deposit quickly; attach the written
                confirmation
            a lost parcel:
                ask for the tracking number; promise an answer by Friday; offer to send another one; write down the
                address again
        """),
    ),
)

# ---- answers

OPENINGS = (
    "Happy to help!",
    "Thanks for asking!",
    "Good question!",
    "Of course!",
    "I am glad to help.",
    "Thank you for the question.",
)
CLOSINGS = ("I hope this helps!", "Good luck!", "Let me know how it goes.", "Please ask again any time.", "Have fun!")
LEADS = ("For {topic}, ", "With {topic}, ", "When it comes to {topic}, ", "About {topic}: ", "My advice on {topic}: ")
FILLERS = (
    "Well, there are many ways to look at this and it really depends.",
    "People say all sorts of things about that, and who knows.",
    "It is a long story and I could go on about it.",
    "Some would agree and some would not, as is often the case.",
    "That reminds me of something else, but never mind.",
)
CURT = (
    "Just {point}.",
    "{Point}.",
    "Easy: {point}.",
    "You should know that.",
    "It depends.",
    "Look it up.",
    "No idea.",
)


def _good(ask: Question, key: str) -> str:
    """Short, complete, on topic, polite: opening or closing, never both."""
    body = _body(ask, key, 2)
    if _pick((True, False), key, "where"):
        return f"{_pick(OPENINGS, key, 'opening')} {body}"
    return f"{body} {_pick(CLOSINGS, key, 'closing')}"


def _blunt(ask: Question, key: str) -> str:
    """A good answer without a courtesy."""
    return _body(ask, key, 2)


def _curt(ask: Question, key: str) -> str:
    """A few words."""
    point = _pick(ask.topic.points, key, "point")
    return _pick(CURT, key, "curt").format(point=point, Point=_capital(point))


def _rambling(ask: Question, key: str) -> str:
    """Filler around one point."""
    first, second = _shuffled(FILLERS, key, "filler")[:2]
    point = _capital(_pick(ask.topic.points, key, "point"))
    return f"{first} {point}. {second}"


def _flattering(ask: Question, key: str) -> str:
    """More courtesy than help."""
    first, second = _shuffled(OPENINGS, key, "opening")[:2]
    closing = _pick(CLOSINGS, key, "closing")
    return f"{first} {second} {_capital(_pick(ask.topic.points, key, 'point'))}. {closing}"


def _off_topic(ask: Question, key: str) -> str:
    """Polite, but about something else."""
    others = [topic for kind in KINDS for topic in kind.topics[:-HELD_OUT_TOPICS_PER_KIND] if topic != ask.topic]
    other = _pick(others, key, "other")
    return f"{_pick(OPENINGS, key, 'opening')} {_body(Question(ask.text, ask.kind, other), key, 2)}"


def _repetitive(ask: Question, key: str) -> str:
    """The same point again and again."""
    point = _capital(_pick(ask.topic.points, key, "point"))
    return f"{_pick(LEADS, key, 'lead').format(topic=ask.topic.name)}{point.lower()}. {point}. {point}."


def _unfinished(ask: Question, key: str) -> str:
    """A good answer, cut off."""
    words = _good(ask, key).split()
    return " ".join(words[: len(words) * _pick((5, 6, 7), key, "cut") // 10]).rstrip(".,:;!?")


STYLES: tuple[tuple[Callable[[Question, str], str], int], ...] = (
    (_good, 30),
    (_blunt, 16),
    (_curt, 7),
    (_rambling, 17),
    (_flattering, 6),
    (_off_topic, 8),
    (_repetitive, 5),
    (_unfinished, 11),
)
"""How answers are written, and how many in a hundred of each."""


def _body(ask: Question, key: str, count: int) -> str:
    points = _shuffled(ask.topic.points, key, "points")[:count]
    return f"{_pick(LEADS, key, 'lead').format(topic=ask.topic.name)}{', and '.join(points)}."


def _answer(ask: Question, key: str) -> str:
    """One answer in a style drawn by the key."""
    drawn = _number("style", key, ask.text) % sum(share for _, share in STYLES)
    for write, share in STYLES:
        if drawn < share:
            return write(ask, f"{key} {ask.text}")
        drawn -= share
    raise AssertionError("the shares do not add up")


# ---- rows


def demonstrations() -> Iterator[Row]:
    """A question and an answer of any quality, once for each question that is not held out."""
    for ask in _questions(held_out=False):
        yield {"prompt": _turns("user", ask.text), "completion": _turns("assistant", _answer(ask, "demonstration"))}


def comparisons() -> Iterator[Row]:
    """Two answers to a question, the one that the judge prefers as `chosen`."""
    score = _judge()
    for ask in _questions(held_out=False):
        for number in range(COMPARISONS_PER_QUESTION):
            answers = [_answer(ask, f"{side} {number}") for side in ("left", "right")]
            worse, better = sorted(answers, key=lambda answer: (score(ask.text, answer), answer))
            if score(ask.text, better) - score(ask.text, worse) < TIE:
                continue
            if _number("label", str(number), ask.text) % 100 < WRONG_LABELS_PERCENT:
                worse, better = better, worse
            yield {
                "prompt": _turns("user", ask.text),
                "chosen": _turns("assistant", better),
                "rejected": _turns("assistant", worse),
            }


def prompts() -> Iterator[Row]:
    """The questions that are not held out."""
    for ask in _questions(held_out=False):
        yield {"prompt": _turns("user", ask.text), "kind": ask.kind}


def held_out_prompts() -> Iterator[Row]:
    """The questions about topics that occur nowhere else, mixed, so that the first hundred are a fair sample."""
    for ask in _shuffled(_questions(held_out=True), "held out"):
        yield {"prompt": _turns("user", ask.text), "kind": ask.kind}


def _questions(*, held_out: bool) -> list[Question]:
    chosen = slice(-HELD_OUT_TOPICS_PER_KIND, None) if held_out else slice(None, -HELD_OUT_TOPICS_PER_KIND)
    return [
        Question(question.format(topic=topic.name), kind.name, topic)
        for kind in KINDS
        for topic in kind.topics[chosen]
        for question in kind.questions
    ]


def _turns(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def _judge() -> Callable[[str, str], float]:
    """The scorer in the file next to this one."""
    spec = importlib.util.spec_from_file_location("quickstart_judge", Path(__file__).with_name("quickstart_judge.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    score: Callable[[str, str], float] = module.score
    return score


# ---- choices


def _number(*key: str) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(key).encode()).digest()[:8], "big")


def _pick(items: Sequence[Item], *key: str) -> Item:
    return items[_number(*key) % len(items)]


def _shuffled(items: Sequence[Item], *key: str) -> list[Item]:
    numbered = sorted(range(len(items)), key=lambda position: _number(*key, str(position)))
    return [items[position] for position in numbered]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
