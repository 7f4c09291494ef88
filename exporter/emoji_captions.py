"""Captions of emoji: what a person would type for a picture, from the names that Unicode and the package give it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["TONES", "activity_of", "captions_of", "plain_name", "tone_words"]

TONES = {"1F3FB": "light", "1F3FC": "medium light", "1F3FD": "medium", "1F3FE": "medium dark", "1F3FF": "dark"}

# Unicode names that say another thing than the picture shows ("black" is filled there), or nothing to anybody
NAMES = {
    "adult": "person",
    "alien monster": "space invader",
    "anticlockwise downwards and upwards open circle arrows": "counterclockwise arrows button",
    "aubergine": "eggplant",
    "automated teller machine": "atm sign",
    "automobile": "red car",
    "back with leftwards arrow above": "back arrow",
    "banknote with dollar sign": "dollar banknote",
    "banknote with euro sign": "euro banknote",
    "banknote with pound sign": "pound banknote",
    "banknote with yen sign": "yen banknote",
    "bath": "person taking a bath",
    "bearded person": "person with beard",
    "bell with cancellation stroke": "bell with slash",
    "bicyclist": "person biking",
    "billiards": "pool 8 ball",
    "black circle for record": "record button",
    "black club suit": "club suit",
    "black diamond suit": "red diamond suit",
    "black down-pointing double triangle": "fast down button",
    "black heart suit": "red heart suit",
    "black left-pointing double triangle": "fast reverse button",
    "black left-pointing triangle": "reverse button",
    "black nib": "black pen nib",
    "black right-pointing double triangle": "fast forward button",
    "black right-pointing triangle": "play button",
    "black question mark ornament": "red question mark",
    "black rightwards arrow": "right arrow",
    "black scissors": "scissors",
    "black spade suit": "spade suit",
    "black sun with rays": "sun",
    "black telephone": "red telephone",
    "black universal recycling symbol": "green recycling symbol",
    "black up-pointing double triangle": "fast up button",
    "breast-feeding": "breast feeding a baby",
    "bride with veil": "person with veil",
    "bust in silhouette": "silhouette of a person",
    "busts in silhouette": "silhouette of two people",
    "chart with downwards trend": "chart going down",
    "chart with upwards trend": "chart going up",
    "chart with upwards trend and yen sign": "chart going up with yen",
    "circled ideograph accept": "japanese acceptable button",
    "circled ideograph advantage": "japanese bargain button",
    "circled ideograph congratulation": "japanese congratulations button",
    "circled ideograph secret": "japanese secret button",
    "circled latin capital letter m": "letter m in a circle",
    "clockwise downwards and upwards open circle arrows": "clockwise arrows",
    "clockwise rightwards and leftwards open circle arrows": "repeat button",
    "clockwise rightwards and leftwards open circle arrows with circled one overlay": "repeat once button",
    "closed lock with key": "lock with key",
    "collision symbol": "collision",
    "cross mark": "red cross mark",
    "dancer": "woman dancing",
    "dash symbol": "dashing away",
    "diamond shape with a dot inside": "diamond with a dot",
    "direct hit": "dart in a target",
    "dizzy symbol": "dizzy star",
    "downwards black arrow": "down arrow",
    "e-mail symbol": "e mail",
    "ear of maize": "ear of corn",
    "ear of rice": "sheaf of rice",
    "earth globe americas": "globe showing america",
    "earth globe asia-australia": "globe showing asia and australia",
    "earth globe europe-africa": "globe showing europe and africa",
    "eight pointed black star": "eight pointed star",
    "electric torch": "flashlight",
    "end with leftwards arrow above": "end arrow",
    "envelope with downwards arrow above": "envelope with arrow",
    "exclamation question mark": "red exclamation and question mark",
    "extraterrestrial alien": "alien",
    "face massage": "person getting massage",
    "face palm": "person facepalming",
    "face savouring delicious food": "yummy face",
    "face throwing a kiss": "face blowing a kiss",
    "face with finger covering closed lips": "shushing face",
    "face with no good gesture": "person gesturing no",
    "face with ok gesture": "person gesturing ok",
    "face with one eyebrow raised": "face with raised eyebrow",
    "face with open mouth vomiting": "vomiting face",
    "face with party horn and party hat": "partying face",
    "face with uneven eyes and wavy mouth": "woozy face",
    "father christmas": "santa claus",
    "fencer": "person fencing",
    "fisted hand sign": "oncoming fist",
    "grinning face with one large and one small eye": "zany face",
    "grinning face with star eyes": "star struck face",
    "guardsman": "person guard",
    "haircut": "person getting haircut",
    "handball": "person playing handball",
    "happy person raising one hand": "person raising hand",
    "hash key": "keycap hash",
    "heavy black heart": "red heart",
    "heavy check mark": "check mark",
    "heavy division sign": "division sign",
    "heavy dollar sign": "dollar sign",
    "heavy equals sign": "equals sign",
    "heavy exclamation mark symbol": "red exclamation mark",
    "heavy large circle": "red hollow circle",
    "heavy minus sign": "minus sign",
    "heavy multiplication x": "multiplication sign",
    "heavy plus sign": "plus sign",
    "hocho": "kitchen knife",
    "horse racing": "person riding a race horse",
    "hundred points symbol": "hundred points",
    "i love you hand sign": "i love you hand",
    "information desk person": "person tipping hand",
    "information source": "letter i information",
    "input symbol for latin capital letters": "capital letters button",
    "input symbol for latin letters": "abc letters button",
    "input symbol for latin small letters": "small letters button",
    "input symbol for numbers": "numbers button",
    "input symbol for symbols": "symbols button",
    "izakaya lantern": "red paper lantern",
    "juggling": "person juggling",
    "keycap: *": "keycap star",
    "kiss": "couple kissing",
    "kneeling person": "person kneeling",
    "large red circle": "red circle",
    "leftwards arrow with hook": "right arrow curving left",
    "leftwards black arrow": "left arrow",
    "mahjong tile red dragon": "mahjong tile with red dragon",
    "man in business suit levitating": "person in suit levitating",
    "man with turban": "person wearing turban",
    "medium black circle": "black circle",
    "medium white circle": "white circle",
    "mens symbol": "mens room sign",
    "mother christmas": "mrs claus",
    "mountain bicyclist": "person mountain biking",
    "moyai": "stone head statue",
    "multiple musical notes": "musical notes",
    "negative squared ab": "ab blood type button",
    "negative squared cross mark": "cross mark button",
    "negative squared latin capital letter a": "a blood type button",
    "negative squared latin capital letter b": "b blood type button",
    "negative squared latin capital letter o": "o blood type button",
    "negative squared latin capital letter p": "parking button",
    "north east arrow": "up right arrow",
    "north west arrow": "up left arrow",
    "octagonal sign": "red stop sign",
    "on with exclamation mark with left right arrow above": "on arrow",
    "pedestrian": "person walking",
    "person bowing deeply": "person bowing",
    "person doing cartwheel": "person cartwheeling",
    "person raising both hands in celebration": "raising hands",
    "person with folded hands": "folded hands",
    "person with headscarf": "woman with headscarf",
    "person with pouting face": "person pouting",
    "pistol": "green water pistol",
    "playing card black joker": "joker playing card",
    "police cars revolving light": "police car light",
    "public address loudspeaker": "loudspeaker",
    "put litter in its place symbol": "litter in bin sign",
    "raised hand with part between middle and ring fingers": "vulcan salute",
    "recreational vehicle": "blue car",
    "reversed hand with middle finger extended": "middle finger",
    "rightwards arrow with hook": "left arrow curving right",
    "rowboat": "person rowing boat",
    "runner": "person running",
    "serious face with symbols covering mouth": "face with symbols on mouth",
    "shocked face with exploding head": "exploding head",
    "shrug": "person shrugging",
    "silhouette of japan": "map of japan",
    "skier": "person skiing",
    "sleeping accommodation": "person in bed",
    "sleeping symbol": "zzz",
    "smiling face with smiling eyes and hand covering mouth": "face with hand over mouth",
    "snowboarder": "person snowboarding",
    "soon with rightwards arrow above": "soon arrow",
    "south east arrow": "down right arrow",
    "south west arrow": "down left arrow",
    "speaker with cancellation stroke": "muted speaker",
    "squared cjk unified ideograph-5272": "japanese discount button",
    "squared cjk unified ideograph-5408": "japanese passing grade button",
    "squared cjk unified ideograph-55b6": "japanese open for business button",
    "squared cjk unified ideograph-6307": "japanese reserved button",
    "squared cjk unified ideograph-6708": "japanese monthly amount button",
    "squared cjk unified ideograph-6709": "japanese not free of charge button",
    "squared cjk unified ideograph-6e80": "japanese no vacancy button",
    "squared cjk unified ideograph-7121": "japanese free of charge button",
    "squared cjk unified ideograph-7533": "japanese application button",
    "squared cjk unified ideograph-7981": "japanese prohibited button",
    "squared cjk unified ideograph-7a7a": "japanese vacancy button",
    "squared katakana koko": "japanese here button",
    "squared katakana sa": "japanese service charge button",
    "squared up with exclamation mark": "up button",
    "standing person": "person standing",
    "steaming bowl": "steaming bowl of ramen",
    "surfer": "person surfing",
    "swimmer": "person swimming",
    "top with upwards arrow above": "top arrow",
    "twisted rightwards arrows": "shuffle button",
    "upwards black arrow": "up arrow",
    "water closet": "water closet sign",
    "water polo": "person playing water polo",
    "waving black flag": "black flag",
    "white down pointing backhand index": "hand pointing down",
    "white exclamation mark ornament": "grey exclamation mark",
    "white heavy check mark": "green check mark button",
    "white left pointing backhand index": "hand pointing left",
    "white medium star": "yellow star",
    "white question mark ornament": "grey question mark",
    "white right pointing backhand index": "hand pointing right",
    "white smiling face": "gently smiling face",
    "white up pointing backhand index": "hand pointing up",
    "white up pointing index": "index finger pointing up",
    "womens symbol": "womens room sign",
    "wrestlers": "people wrestling",
}

# (what a name matches, what it is written as), in turn
PATTERNS: tuple[tuple[str, str], ...] = (
    (r"^clock face (.+) oclock$", r"clock showing \1 o clock"),
    (r"^clock face (.+)$", r"clock showing \1"),
    (r"^squared (.+)$", r"\1 button"),
    (r"^(man|woman|person): bald$", r"bald \1"),
    (r"^(man|woman|person): (.+)$", r"\1 with \2"),
    (r"^kiss: (\w+), (\w+)$", r"couple kissing, \1 and \2"),
    (r"^couple with heart: (\w+), (\w+)$", r"couple with heart, \1 and \2"),
    (r"^family: ", "family, "),
    (r"^large ", ""),
)
FLAGS_PATTERNS = dict.fromkeys(("country-flag", "subdivision-flag"), ((r"^(.+) flag$", r"flag of \1"),))
SIGNS_ARE_DRAWN = ("Symbols", "Travel & Places")  # "no entry sign", but a "waving hand sign" is a hand

# words of a subcategory that say more than the name, for a part of the captions
GROUPS = {
    "country-flag": "flag", "subdivision-flag": "flag", "person-role": "person", "animal-mammal": "animal",
    "person-activity": "person", "transport-ground": "vehicle", "sky & weather": "weather", "clothing": "clothes",
    "person-sport": "sport", "food-prepared": "food", "geometric": "shape", "person-fantasy": "fantasy person",
    "person-gesture": "person", "sport": "sport", "place-building": "building", "tool": "tool",
    "face-concerned": "smiley", "av-symbol": "button", "household": "household object", "game": "game",
    "office": "office object", "animal-bird": "bird", "event": "party", "arrow": "arrow", "food-fruit": "fruit",
    "drink": "drink", "food-vegetable": "vegetable", "body-parts": "part of the body", "place-other": "place",
    "plant-other": "plant", "food-asian": "asian food", "book-paper": "paper", "animal-marine": "sea animal",
    "light & video": "device", "animal-bug": "insect", "face-neutral-skeptical": "smiley", "food-sweet": "sweet food",
    "emotion": "comic symbol", "computer": "computer", "face-smiling": "smiley", "transport-sign": "sign",
    "transport-air": "aircraft", "mail": "mail", "warning": "warning sign", "religion": "religious symbol",
    "zodiac": "zodiac sign", "plant-flower": "flower", "musical-instrument": "musical instrument",
    "face-unwell": "smiley", "hand-fingers-open": "hand", "money": "money", "place-geographic": "landscape",
    "music": "music", "hand-fingers-partial": "hand", "sound": "sound", "face-affection": "smiley",
    "cat-face": "cat smiley", "transport-water": "boat", "animal-reptile": "reptile", "face-costume": "costume",
    "face-negative": "angry smiley", "dishware": "dishes", "arts & crafts": "crafts", "hand-single-finger": "hand",
    "hands": "hands", "medical": "medicine", "writing": "pen", "science": "science", "face-hand": "smiley",
    "punctuation": "punctuation", "award-medal": "medal", "hand-fingers-closed": "hand", "phone": "phone",
    "lock": "lock", "place-religious": "religious building", "face-tongue": "smiley", "face-sleepy": "smiley",
    "math": "math symbol", "person-resting": "person", "face-glasses": "smiley", "monkey-face": "monkey",
    "face-hat": "smiley", "hotel": "hotel", "alphanum": "button", "keycap": "button", "time": "clock",
    "heart": "heart", "currency": "money", "gender": "symbol", "place-map": "map", "animal-amphibian": "animal",
}  # fmt: skip

RUDE = ("shit", "hankey")
GENDERS = frozenset("man men woman women person people male female boy girl adult bride guardsman".split())
# activities that are told in other words for another gender
ALIKE = {
    "mermaid": "mer", "merman": "mer", "merperson": "mer", "santa claus": "claus", "mrs claus": "claus",
    "mx claus": "claus", "prince": "royal", "princess": "royal", "person with crown": "royal",
    "breast feeding a baby": "baby feeding", "child": "young", "boy": "young", "girl": "young",
    "woman with headscarf": "headscarf",
}  # fmt: skip


def plain(text: str) -> str:
    """Return a text in lower case, without accents and punctuation, its words one space apart."""
    spelled = text.replace("&", " and ").replace("St. ", "Saint ")
    letters = "".join(c for c in unicodedata.normalize("NFKD", spelled) if not unicodedata.combining(c)).lower()
    words = re.sub(r"[^a-z0-9,]+", " ", re.sub("['\u2019]", "", letters))
    return " ".join(words.replace(",", ", ").replace(" ,", ",").split())


def plain_name(entry: Mapping[str, Any]) -> str:
    """Return the main caption of an emoji of emoji.json, without a skin tone: its name as a person would type it."""
    name = entry["name"].lower()
    if entry["subcategory"] == "zodiac":
        return f"{name} zodiac sign"
    if entry["short_name"] == "person_in_tuxedo":  # named as the man's is
        return "person in tuxedo"
    if name in NAMES:
        return NAMES[name]
    text = entry["name"]
    for pattern, written in (*FLAGS_PATTERNS.get(entry["subcategory"], ()), *PATTERNS):
        text = re.sub(pattern, written, text, flags=re.IGNORECASE)
    if entry["category"] not in SIGNS_ARE_DRAWN or "moon" in name:
        text = re.sub(r" (sign|symbol)$", "", text, flags=re.IGNORECASE)
    return plain(text)


def tone_words(code: str) -> str:
    """Return the words for the tones of a variation: "1F3FB" or, for two people, "1F3FB-1F3FF"."""
    tones = [TONES[part] for part in code.split("-") if part]
    if len(set(tones)) == 1:
        return f"{tones[0]} skin tone"
    return " and ".join(f"{tone} skin tone" for tone in tones)


def captions_of(entry: Mapping[str, Any], tone: str = "") -> tuple[str, ...]:
    """Return the captions of one picture, the main one first; `tone` is the key of a skin variation."""
    name = plain_name(entry)
    group = GROUPS.get(entry["subcategory"], "")
    names = [name, *_short_names(entry, name)]
    forms = [*names, _with_article(name), f"{name} emoji"]
    if group and group not in name:
        forms.append(f"{name}, {group}")
    if name.startswith("flag of "):
        forms.append(f"{name.removeprefix('flag of ')} flag")
    if tone:
        words = tone_words(tone)
        forms = [f"{form}, {words}" for form in forms] + [f"{name} with {words.replace(' tone', '')}"]
    return tuple(dict.fromkeys(forms))


def _short_names(entry: Mapping[str, Any], name: str) -> Sequence[str]:
    """Return the short names that are words; codes of countries and of characters are none."""
    if entry["subcategory"] in ("country-flag", "time", "subdivision-flag", "family") or "japanese" in name:
        return []
    words = [plain(short.replace("_", " ")) for short in entry["short_names"]]
    known = (name, *RUDE)
    return [text for text in words if text not in known and re.search(r"[a-z]{3}", text) and not re.search(r"\d", text)]


def _with_article(name: str) -> str:
    words = name.replace(",", "").split()
    if name.startswith("flag of"):
        return f"the {name}"
    if (words[-1].endswith("s") and not words[-1].endswith("ss")) or words[0] in ("two", "people"):
        return f"some {name}" if len(words) == 1 else name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def activity_of(entry: Mapping[str, Any]) -> str:
    """Return the key of all emoji that show one thing: a person's gender, direction and company are left out."""
    name = plain_name(entry)
    if entry["category"] != "People & Body":
        return name
    if name.startswith("family"):
        return "family"
    if name in ALIKE:
        return ALIKE[name]
    words = [word.rstrip(",") for word in name.split()]
    for side in ("facing", "right"):
        if "facing" in name and side in words:
            words.remove(side)
    rest = sorted(word for word in set(words) - GENDERS if word not in ("and", "a", "two"))
    return " ".join(rest) or "person"
