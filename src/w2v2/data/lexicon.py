"""A small English grammar: sentences for the synthetic corpus.

A sentence is grown from the rule `S`. A rule is a list of alternatives; `{NAME}` in an alternative is replaced by
a random alternative of rule `NAME`. Words hold only the letters a-z and the apostrophe.
"""

import re
from functools import cache

import numpy as np

WORD = re.compile(r"[A-Za-z][A-Za-z']*")
"""What counts as one word of a text."""

PEOPLE = """
actor artist aunt author baker barber boy brother builder butcher captain carpenter chief child citizen clerk coach
cook cousin dancer daughter dentist doctor driver engineer farmer father fisherman friend gardener girl grandfather
grandmother guard guest guide hunter husband judge king landlord lawyer leader librarian man manager mayor mechanic
merchant miller miner mother musician nephew neighbor niece nurse officer painter pilot plumber poet policeman
porter president prince princess professor queen reporter sailor scholar scientist secretary servant shepherd singer
sister soldier stranger student surgeon tailor teacher thief tourist traveler uncle waiter weaver wife witness woman
worker writer
"""
ANIMALS = """
bear bee bird bull butterfly camel cat chicken cow crow deer dog dolphin donkey duck eagle elephant fish fox frog
goat goose hawk hen horse kitten lamb lion lizard monkey mouse owl parrot pig pigeon pony puppy rabbit rat raven
salmon sheep snake sparrow spider squirrel swan tiger turtle whale wolf
"""
THINGS = """
arrow axe bag ball banner barrel basket bed bell belt bench bicycle blanket boat bone book boot bottle bowl box
bracelet brick broom brush bucket button camera candle canoe cap card carpet cart chain chair clock coat coin comb
compass cup curtain desk diamond diary drawer dress drum engine envelope fan feather fence flag flute fork gate
glass glove guitar hammer hat helmet jacket jar jewel kettle key kite knife ladder lamp lantern leaf letter lid lock
machine magazine map mask mattress medal mirror motor nail necklace needle net newspaper notebook oar oven painting
paper parcel pen pencil photograph piano picture pillow pin pipe plank plate pot purse quilt radio ribbon ring rope
ruler saddle scarf shawl shelf shield shirt shoe shovel sign silver sketch skirt sled soap sofa spoon stamp stick
stone stool stove suitcase sweater sword table telephone telescope tent ticket tool torch towel toy tractor trumpet
trunk umbrella vase violin wagon wallet watch wheel whistle wire
"""
FOOD = """
apple bacon banana bean biscuit bread broth butter cabbage cake carrot cheese cherry chocolate coffee corn cream
cucumber dinner flour fruit garlic ginger grape honey jam juice lemon lettuce lunch meal melon milk mushroom mustard
nut onion orange pancake pastry peach pear pepper pie plum potato pudding pumpkin rice salad salt sandwich sauce
sausage soup spice stew strawberry sugar supper tea toast tomato vinegar walnut yogurt
"""
PLACES = """
airport attic avenue bakery balcony bank barn basement bay beach bridge cabin castle cathedral cave cellar chapel
church city cliff clinic coast corner cottage courtyard desert factory farm field forest fountain garage garden
glacier hall harbor hill hospital hotel house island jungle kitchen laboratory lake library lighthouse market meadow
mill mine monastery mountain museum office orchard palace park path pier plaza pond port prison quarry ranch
restaurant river road school shore shop square stable stadium station street studio temple theater tower town tunnel
university valley village vineyard wall warehouse waterfall workshop yard
"""
IDEAS = """
accident advantage adventure answer argument battle belief cause chance change choice contract danger decision
defeat delay desire doubt dream duty effort election error event example experiment fact failure faith fear festival
freedom game gift habit history holiday hope idea journey joke knowledge lesson manner meaning measure memory method
mistake moment mystery opinion order pattern peace pleasure poem price problem promise proof purpose question reason
record result reward rule rumor science secret silence skill solution song speech spirit story strength success
surprise system task theory thought tradition trick trouble truth victory vision voice warning wedding wisdom wish
"""
WEATHER = """
breeze cloud darkness dawn fog frost ice lightning mist moon rain rainbow shadow sky snow storm sun thunder wind
"""
NAMES = """
adam agnes albert alice amelia andrew anna arthur barbara benjamin bernard caroline catherine charles charlotte
clara daniel david dorothy edgar edith edward eleanor elizabeth emily emma ernest esther felix florence frances
frank frederick george gerald gilbert grace hannah harold harry helen henry hugo ida isaac isabel jacob james jane
jasper jonathan joseph julia karl laura lawrence leonard lily louis lucy lydia margaret maria mark martha martin
mary matthew michael nancy nathan nicholas nora oliver oscar patrick paul peter philip rachel ralph rebecca richard
robert rose ruth samuel sarah simon sophie stephen susan sylvia theodore thomas victor victoria vincent walter
william
"""
TOWNS = """
africa alaska albany america arizona asia athens australia austria baltimore belfast berlin boston brazil bristol
cairo california canada chicago china cleveland cuba dallas denmark denver detroit dover dublin durham edinburgh
egypt england europe finland florida france geneva georgia germany glasgow greece hamburg havana houston iceland
india ireland israel italy jamaica japan kansas kenya lisbon liverpool london madrid memphis mexico milan montana
montreal moscow naples nevada norway oregon ottawa oxford paris persia peru philadelphia portugal prague rome russia
scotland seattle siberia spain sweden sydney texas tokyo toronto utah venice vermont vienna virginia wales warsaw
windsor
"""
ADJECTIVES = """
amazing ancient angry awful awkward bare beautiful bitter blank bold brave brief bright broad broken brown busy calm
careful careless cheap cheerful clean clear clever clumsy cold common cool crooked cruel curious damp dangerous dark
dear deep delicate dirty distant dry dull eager early empty enormous faint fair faithful false famous fancy fierce
fine firm flat foolish foreign fresh friendly gentle glad golden good grand gray great greedy green handsome happy
hard harsh heavy hollow honest huge humble hungry idle jealous jolly keen kind large late lazy light little lonely
long loose loud lovely lucky merry mild modern modest muddy narrow neat nervous new nice noble noisy odd old pale
patient plain pleasant polite poor pretty proud pure purple quick quiet rare raw red rich ripe rotten rough round
rude rusty sad safe scared secret serious shallow sharp shiny short shy sick silent silly simple slender slight slim
slow small smart smooth soft solid sour spare special square steady steep stiff strange strict strong stubborn
sudden sweet swift tall tame tender terrible thick thin thirsty tidy tight tiny tired tough upset vain vast violent
warm weak wealthy weary wet white whole wide wild wise wonderful wooden yellow young
"""
ADVERBS = """
again almost alone already always badly barely boldly bravely briefly calmly carefully certainly clearly closely
coldly eagerly easily finally firmly forever fully gently gladly greatly happily hardly heavily honestly hurriedly
immediately instead kindly lately loudly maybe merely mostly nearly neatly never nicely often once openly partly
perhaps plainly politely possibly probably properly proudly quickly quietly rarely really recently rudely sadly
safely seldom sharply shortly silently simply slowly smoothly softly somehow sometimes soon steadily strangely
strongly suddenly surely sweetly together truly twice usually warmly wisely
"""
# Verbs by what may follow them. A regular verb is one word, an irregular one is base/past/participle.
DO_THING = """
accept admire borrow bring/brought/brought burn burst/burst/burst buy/bought/bought carry catch/caught/caught
choose/chose/chosen clean close collect count cover decorate deliver destroy discover drag draw/drew/drawn drop
empty examine exchange fetch fill find/found/found finish fix fold forget/forgot/forgotten gather get/got/gotten
hide/hid/hidden hold/held/held ignore keep/kept/kept kick lend/lent/lent lift like lose/lost/lost love
make/made/made mend move need notice offer open order own pack paint pass pick polish prefer prepare present protect
pull push recognize remember remove repair replace return save scratch sell/sold/sold send/sent/sent
shake/shook/shaken share shut/shut/shut steal/stole/stolen store study supply take/took/taken tear/tore/torn
throw/threw/thrown tie touch use wash want watch wear/wore/worn wrap
"""
DO_PERSON = """
advise answer ask beat/beat/beaten believe blame call comfort deceive defend disturb encourage excuse feed/fed/fed
fight/fought/fought follow forgive/forgave/forgiven frighten greet guide hear/heard/heard help hire hug interrupt
introduce invite join know/knew/known lead/led/led leave/left/left marry meet/met/met miss obey pardon pay/paid/paid
persuade please praise punish question reach recall rescue respect satisfy scold see/saw/seen serve support surprise
teach/taught/taught thank trust understand/understood/understood visit warn welcome
"""
DO_FOOD = "bake boil chop cook cut/cut/cut eat/ate/eaten fry mix peel roast slice smell stir swallow taste"
DO_IDEA = """
announce change consider debate deny describe discuss doubt enjoy explain imagine invent mention prove publish
regret repeat report solve suggest win/won/won write/wrote/written
"""
GO = """
arrive climb crawl dance drive/drove/driven escape float fly/flew/flown gallop go/went/gone hurry jump march
ride/rode/ridden run/ran/run rush sail skate step swim/swam/swum travel turn walk wander
"""
REST = """
act agree appear argue bend/bent/bent breathe complain cough cry decay disappear fail fall/fell/fallen
freeze/froze/frozen grow/grew/grown kneel/knelt/knelt laugh lie listen nod pause play pray relax rest
rise/rose/risen shine/shone/shone shiver shout sing/sang/sung sit/sat/sat sleep/slept/slept smile sneeze
speak/spoke/spoken stand/stood/stood stay stop succeed suffer tremble vanish wait wake/woke/woken weep/wept/wept
whisper wonder work worry yawn
"""
SAY = """
admit believe complain declare dream expect feel/felt/felt guess hear/heard/heard hope insist know/knew/known learn
pretend promise realize remark say/said/said suppose suspect swear/swore/sworn think/thought/thought
"""
COLOURS = "black blue brown crimson golden gray green orange pink purple red scarlet silver violet white yellow"
NUMBERS = """
two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen twenty thirty forty fifty sixty seventy eighty ninety
"""
DAYS = "monday tuesday wednesday thursday friday saturday sunday"
MONTHS = "january february march april may june july august september october november december"
MATERIALS = """
brass bronze clay copper cotton glass iron ivory leather marble metal paper plastic silk silver steel stone straw
velvet wood wool
"""
TOPICS = """
biology business chemistry cricket culture economics football gardening geography grammar justice language
literature logic mathematics medicine music nature painting philosophy physics poetry politics religion tennis trade
weather
"""
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth last next"

_PLURALS = """
child/children deer/deer fish/fish fisherman/fishermen goose/geese knife/knives leaf/leaves man/men mouse/mice
policeman/policemen potato/potatoes salmon/salmon scarf/scarves sheep/sheep shelf/shelves thief/thieves
tomato/tomatoes wife/wives wolf/wolves woman/women
"""
_MASS = """
bacon bread broth butter cabbage cheese chocolate coffee corn cream darkness faith flour freedom fruit garlic ginger
history honey jam juice knowledge lettuce milk mustard paper peace pepper rice salt science silence silver soap
strength success sugar tea toast trouble vinegar wire wisdom yogurt
"""
_DOUBLED = "admit chop cut drag drop forget get hug nod prefer regret run shut sit step stir stop swim win wrap"
_FORMS = ("BASE", "S", "PAST", "PART", "ING")
_IRREGULAR_ING = {"lie": "lying", "tie": "tying"}


def _plural(noun: str) -> str:
    irregular = dict(pair.split("/") for pair in _PLURALS.split())
    if noun in irregular:
        return irregular[noun]
    if re.search(r"(s|x|z|ch|sh)$", noun):
        return noun + "es"
    return noun[:-1] + "ies" if re.search(r"[^aeiou]y$", noun) else noun + "s"


def _verb_forms(entry: str) -> tuple[str, str, str, str, str]:
    """Base, third person, past, participle and -ing form of `walk` or of `go/went/gone`."""
    base, *irregular = entry.split("/")
    stem = base + base[-1] if base in _DOUBLED.split() else base
    regular = stem[:-1] + "ied" if re.search(r"[^aeiou]y$", base) else re.sub(r"e?$", "ed", stem, count=1)
    past, participle = irregular or (regular, regular)
    ing = _IRREGULAR_ING.get(base) or (stem if stem.endswith("ee") else stem.removesuffix("e")) + "ing"
    return base, "goes" if base == "go" else _plural(base), past, participle, ing


_RULES = """
S = {CLAUSE}. | {CLAUSE}. | {CLAUSE}. | {SHORT}. | {SHORT}! | {QUESTION}? | {QUESTION}? | {CLAUSE}, {AND} {CLAUSE}.
S = {WHEN} {CLAUSE}, {CLAUSE}. | {CLAUSE} {WHEN} {CLAUSE}. | {TIME}, {CLAUSE}. | {PERSON} {SAY_PAST} that {CLAUSE}.
S = there {WAS} {A_NOUN} {WHERE}. | there were {COUNT} {THING_PL} {WHERE}, {AND} {CLAUSE}.
S = {CLAUSE}, {AND} {CLAUSE} {TIME}. | {IF} {CLAUSE}, {PRONOUN} {MODAL} {VP_BASE}.
S = {PRONOUN} {MODAL} {VP_BASE} {WHEN} {CLAUSE}. | the {WEATHER} {WAS} {ADJ} {TIME}.
S = the {ADJ} {IDEA} of the {PERSON_SG} {WAS} {ADV} {ADJ}. | {NAME} and {NAME} {VP_PAST} {TIME}, {AND} {CLAUSE}.
SHORT = {PLEASE} {VP_BASE} | {NAME} {REST_PAST} {ADV} | {PRONOUN} {REST_PAST} {TIME} | the {PERSON_SG} {REST_PAST}
SHORT = {IT_WAS} {ADJ} | don't {VP_BASE} | let's {VP_BASE} | {NAME} {WAS} {ADJ} | come {ADV} | {HOW} {ADJ}
SHORT = {I_M} {ADJ} | nobody {REST_PAST}
QUESTION = did {SUBJECT} {VP_BASE} | {WILL} {SUBJECT} {VP_BASE} | {WH} did {SUBJECT} {VP_BASE}
QUESTION = {WAS} {PERSON} {ADV} {ADJ} | {WH} {WILL} {SUBJECT} {VP_BASE} | whose {THING} {WAS} {WHERE}
QUESTION = how many {THING_PL} did {SUBJECT} {THING_BASE} | {HAVEN_T} you {DO_PART} | who {VP_PAST} {TIME}
QUESTION = which {THING} {WAS} {ADJ} | isn't {PERSON} {ADJ}
CLAUSE = {SUBJECT} {VP_PAST} | {SUBJECT} {VP_PAST} | {SUBJECT} {VP_PAST} {TIME} | {SUBJECT} {MODAL} {VP_BASE}
CLAUSE = {PERSON} {VP_S} | {PERSON} {WAS} {VP_ING} | {PERSON} {HAS} {DO_PART} | {PEOPLE_PL} {VP_BASE} {TIME}
CLAUSE = {PEOPLE_PL} were {VP_ING} {WHERE} | the {WEATHER} {WEATHER_VERB} over the {PLACE}
CLAUSE = {PERSON} {WAS} {ADV} {ADJ} | the {THING} {WAS} {THING_PART} by {PERSON}
CLAUSE = {PERSON} {WAS} {ADJ} about {IDEA_NP} | the {ANIMAL} {REST_PAST} {WHERE}
CLAUSE = {COUNT} {ANIMAL_PL} {GO_PAST} {WHERE_TO} | the {ADJ} {THING} belonged to {PERSON}
CLAUSE = {PRONOUN} {DIDN_T} {VP_BASE} | everybody {VP_PAST} | {PERSON} studied {TOPIC} in {TOWN}
CLAUSE = {PRONOUN} {DIDN_T} {SAY_BASE} that {SUBJECT} {WOULD} {VP_BASE} | {PERSON} {TRY} to {VP_BASE}
CLAUSE = the {ORDINAL} {PERSON_SG} {VP_PAST}
VP_PAST = {THING_PAST} {THING_NP} | {THING_PAST} {THING_NP} {WHERE} | {PERSON_PAST} {PERSON}
VP_PAST = {PERSON_PAST} {PERSON} {WHERE} | {FOOD_PAST} {FOOD_NP} | {GO_PAST} {WHERE_TO} | {GO_PAST} {ADV} {WHERE_TO}
VP_PAST = {IDEA_PAST} {IDEA_NP} | {REST_PAST} {WHERE} | {ADV} {REST_PAST} | gave {PERSON} {THING_NP}
VP_BASE = {THING_BASE} {THING_NP} | {THING_BASE} {THING_NP} {WHERE} | {PERSON_BASE} {PERSON} | {FOOD_BASE} {FOOD_NP}
VP_BASE = {GO_BASE} {WHERE_TO} | {IDEA_BASE} {IDEA_NP} | {REST_BASE} {WHERE} | {REST_BASE} {ADV}
VP_BASE = put {THING_NP} {WHERE} | talk about {TOPIC}
VP_S = {THING_S} {THING_NP} | {PERSON_S} {PERSON} | {FOOD_S} {FOOD_NP} {TIME} | {GO_S} {WHERE_TO} | {IDEA_S} {IDEA_NP}
VP_S = {ADV} {REST_S}
VP_ING = {THING_ING} {THING_NP} | {PERSON_ING} {PERSON} | {FOOD_ING} {FOOD_NP} | {GO_ING} {WHERE_TO}
VP_ING = {IDEA_ING} {IDEA_NP} | {REST_ING} {ADV}
DO_PART = {THING_PART} {THING_NP} | {PERSON_PART} {PERSON} | {FOOD_PART} {FOOD_NP} | {IDEA_PART} {IDEA_NP}
DO_PART = {GO_PART} {WHERE_TO}
SUBJECT = {PERSON} | {PERSON} | {PERSON} | {PRONOUN} | {PRONOUN} | {PEOPLE_PL} | the {ANIMAL} | {NAME} and {NAME}
PERSON = {NAME} | {NAME} | {DET} {PERSON_SG} | {DET} {ADJ} {PERSON_SG} | {POSS} {PERSON_SG} | {NAME}'s {PERSON_SG}
PERSON = the {PERSON_SG} from {TOWN}
PEOPLE_PL = the {PERSON_PL} | the {ADJ} {PERSON_PL} | {COUNT} {PERSON_PL} | {SOME} {PERSON_PL}
PEOPLE_PL = all of the {PERSON_PL} | {POSS} {PERSON_PL}
A_NOUN = a {ADJ} {PERSON_SG} | a {ADJ} {ANIMAL} | a {ADJ} {THING} | a {COLOUR} {ANIMAL} | a {ADJ} {PLACE}
THING_NP = {DET} {THING} | {DET} {ADJ} {THING} | the {COLOUR} {THING} | {POSS} {THING} | {COUNT} {THING_PL}
THING_NP = {SOME} {ADJ} {THING_PL} | the {THING_PL} | a {MATERIAL} {THING} | {NAME}'s {THING}
THING_NP = the {PERSON_SG}'s {ADJ} {THING} | {COUNT} {COLOUR} {THING_PL} | it | them
FOOD_NP = the {FOOD} | {SOME_MASS} {FOOD} | {POSS} {FOOD} | the {ADJ} {FOOD} | {SOME} {FOOD_PL} | {FOOD} and {FOOD}
FOOD_NP = {COUNT} {FOOD_PL}
IDEA_NP = the {IDEA} | a {ADJ} {IDEA} | {POSS} {IDEA} | {COUNT} {IDEA_PL} | the {ADJ} {IDEA_PL} of {TOWN}
IDEA_NP = {NAME}'s {IDEA} | another {IDEA}
WHERE = {IN} the {PLACE} | {IN} the {ADJ} {PLACE} | near {TOWN} | in {TOWN} | {NEXT_TO} the {THING} | at home
WHERE = {IN} {POSS} {PLACE} | with {PERSON}
WHERE_TO = {TO} the {PLACE} | {TO} the {ADJ} {PLACE} | to {TOWN} | from {TOWN} to {TOWN} | away | {DIRECTION}
WHERE_TO = {TO} {POSS} {PLACE} | home | with {PERSON}
TIME = on {DAY} | in {MONTH} | {AGO_COUNT} ago | yesterday | today | tomorrow | last {PERIOD} | every {PERIOD}
TIME = at {NUMBER} o'clock | for {AGO_COUNT} | {BEFORE} {MEAL} | {BEFORE} the {IDEA} | in the {PART_OF_DAY}
TIME = on the {ORDINAL} of {MONTH} | next {PERIOD} | at midnight | at noon
AGO_COUNT = {NUMBER} {PERIOD_PL} | a few {PERIOD_PL} | many {PERIOD_PL}
COUNT = {NUMBER} | {NUMBER} | {TENS} {DIGIT} | {DIGIT} hundred | {DIGIT} thousand | a dozen | both
TENS = twenty | thirty | forty | fifty | sixty | seventy | eighty | ninety
DIGIT = two | three | four | five | six | seven | eight | nine
PERIOD = second | minute | hour | day | week | month | year | century | morning | evening | night | winter | summer
PERIOD = spring | autumn
MEAL = breakfast | lunch | dinner | supper | school | work | church
PART_OF_DAY = morning | afternoon | evening | night | meantime | end | beginning
BEFORE = before | after | during | until | since
AND = and | but | so | and then | yet | or
WHEN = when | while | because | before | after | although | as | until | since | whenever
IF = if | unless | even if | once
DET = the | the | the | a | a | this | that | each | every | another
POSS = my | your | his | her | our | their
SOME = some | several | many | these | those | few | most
SOME_MASS = some | more | enough | the | no | any
PRONOUN = i | you | he | she | we | they
MODAL = will | would | could | should | must | might | can | can't | won't | couldn't | shouldn't | wouldn't | had to
MODAL = used to
DIDN_T = didn't | didn't | never did | couldn't | wouldn't
WILL = will | could | should | would | can | might | won't | can't | must
WOULD = would | could | might | wouldn't | should
HAVEN_T = haven't | have | had
TRY = tried | wanted | began | agreed | refused | decided | managed | hoped | started | forgot | offered
WAS = was | was | is | wasn't
HAS = has | had | hasn't | hadn't
IT_WAS = it was | it's | that's | it wasn't | he's | she's | they're | we're | it will be | it must be
I_M = i'm | you're | i've been | we've been | you've been
PLEASE = please | now | first | then | always | never | just
HOW = how very | what a day, how | how | so very
WH = why | when | where | how | who | what time | how often
IN = in | inside | outside | behind | near | beyond | beside | around | across from | not far from | at | opposite
NEXT_TO = under | on | beside | behind | above | below | next to | between the {THING} and | against | upon
TO = to | into | through | toward | across | past | along | over | around | out of | back to | up to | down to
DIRECTION = north | south | east | west | upstairs | downstairs | outside | abroad | forward | backward | northward
DIRECTION = uphill
WEATHER_VERB = rose | fell | hung | came | passed | moved | appeared | faded | spread | lingered | gathered
"""


@cache
def rules() -> dict[str, list[str]]:
    """Every rule of the grammar: its name and its alternatives."""
    table: dict[str, list[str]] = {}
    for name, words in {"PERSON": PEOPLE, "ANIMAL": ANIMALS, "THING": THINGS, "FOOD": FOOD, "IDEA": IDEAS}.items():
        table["PERSON_SG" if name == "PERSON" else name] = words.split()
        table[f"{name}_PL"] = [_plural(word) for word in words.split() if word not in _MASS.split()]
    others = {"PLACE": PLACES, "WEATHER": WEATHER, "ADJ": ADJECTIVES, "ADV": ADVERBS, "COLOUR": COLOURS}
    others |= {"NUMBER": NUMBERS, "MATERIAL": MATERIALS, "TOPIC": TOPICS, "ORDINAL": ORDINALS}
    table |= {name: words.split() for name, words in others.items()}
    # Capitals make espeak read a name as a name; the transcript is upper case anyway.
    proper = {"NAME": NAMES, "TOWN": TOWNS, "DAY": DAYS, "MONTH": MONTHS}
    table |= {name: words.title().split() for name, words in proper.items()}
    verbs = {
        "THING": DO_THING,
        "PERSON": DO_PERSON,
        "FOOD": DO_FOOD,
        "IDEA": DO_IDEA,
        "GO": GO,
        "REST": REST,
        "SAY": SAY,
    }
    for name, words in verbs.items():
        forms = zip(*map(_verb_forms, words.split()), strict=True)
        table |= {f"{name}_{form}": list(column) for form, column in zip(_FORMS, forms, strict=True)}
    for line in _RULES.strip().splitlines():
        name, alternatives = line.split(" = ")
        table.setdefault(name, []).extend(alternatives.split(" | "))
    table["PERIOD_PL"] = [_plural(word) for word in table["PERIOD"]]
    return table


def sentence(rng: np.random.Generator) -> str:
    """One random sentence in ordinary spelling, with its punctuation."""

    def grow(match: re.Match[str]) -> str:
        alternatives = rules()[match[1]]
        return re.sub(r"\{(\w+)\}", grow, alternatives[int(rng.random() * len(alternatives))])

    text = re.sub(r"\{(\w+)\}", grow, "{S}")
    text = re.sub(r"\ba (?=(?!uni|use|eur|one\b)[aeiou]|hour|honest)", "an ", text)
    text = re.sub(r"\bi\b", "I", text)
    return text[0].upper() + text[1:]


def transcript(text: str) -> str:
    """The words of `text` in upper case, separated by single spaces, without punctuation."""
    return " ".join(WORD.findall(text)).upper()
