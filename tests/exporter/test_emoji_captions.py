"""Captions of emoji: the words of a person, and one activity for all who do it."""

from __future__ import annotations

from typing import Any

import pytest

from ditc.exporter.emoji_captions import GROUPS, NAMES, activity_of, captions_of, plain_name, tone_words


def entry(name: str, category: str, subcategory: str, *short_names: str) -> dict[str, Any]:
    names = list(short_names) or [name.lower().replace(" ", "_")]
    return {
        "name": name,
        "category": category,
        "subcategory": subcategory,
        "short_name": names[0],
        "short_names": names,
    }


def person(name: str, subcategory: str = "person-activity", *short_names: str) -> dict[str, Any]:
    return entry(name, "People & Body", subcategory, *short_names)


NAMED = [
    (entry("GRINNING FACE", "Smileys & Emotion", "face-smiling"), "grinning face"),
    (entry("BLACK HEART SUIT", "Activities", "game"), "red heart suit"),
    (entry("Åland Islands Flag", "Flags", "country-flag"), "flag of aland islands"),
    (entry("St. Kitts & Nevis Flag", "Flags", "country-flag"), "flag of saint kitts and nevis"),
    (entry("Rainbow Flag", "Flags", "flag"), "rainbow flag"),
    (entry("RESCUE WORKER\u2019S HELMET", "Objects", "clothing"), "rescue workers helmet"),
    (entry("CLOCK FACE TWO-THIRTY", "Travel & Places", "time"), "clock showing two thirty"),
    (entry("CLOCK FACE TEN OCLOCK", "Travel & Places", "time"), "clock showing ten o clock"),
    (entry("NO ENTRY SIGN", "Symbols", "warning"), "no entry sign"),
    (entry("NEW MOON SYMBOL", "Travel & Places", "sky & weather"), "new moon"),
    (entry("ARIES", "Symbols", "zodiac"), "aries zodiac sign"),
    (person("WAVING HAND SIGN", "hand-fingers-open", "wave"), "waving hand"),
    (person("FAMILY: MAN, WOMAN, BOY", "family"), "family, man, woman, boy"),
    (person("COUPLE WITH HEART: WOMAN, MAN", "family"), "couple with heart, woman and man"),
    (person("WOMAN: RED HAIR", "person"), "woman with red hair"),
    (person("MAN: BALD", "person"), "bald man"),
    (person("MAN IN TUXEDO", "person-role", "person_in_tuxedo"), "person in tuxedo"),
]


@pytest.mark.parametrize(("emoji", "caption"), NAMED, ids=[caption for _, caption in NAMED])
def test_a_picture_is_called_as_a_person_would_call_it(emoji: dict[str, Any], caption: str) -> None:
    assert plain_name(emoji) == caption


def test_captions_begin_with_the_main_one_and_have_its_other_forms() -> None:
    apple = entry("RED APPLE", "Food & Drink", "food-fruit", "apple")
    assert captions_of(apple) == ("red apple", "apple", "a red apple", "red apple emoji", "red apple, fruit")
    andorra = entry("Andorra Flag", "Flags", "country-flag", "flag-ad")
    assert captions_of(andorra) == (
        "flag of andorra",
        "the flag of andorra",
        "flag of andorra emoji",
        "andorra flag",
    )


def test_an_article_fits_its_noun() -> None:
    assert "an orange book" in captions_of(entry("ORANGE BOOK", "Objects", "book-paper"))
    assert "some grapes" in captions_of(entry("GRAPES", "Food & Drink", "food-fruit"))
    assert not [text for text in captions_of(person("TWO MEN HOLDING HANDS", "family")) if text.startswith("a ")]


def test_a_skin_tone_stands_in_every_caption() -> None:
    captions = captions_of(person("WAVING HAND SIGN", "hand-fingers-open", "wave"), "1F3FE")
    assert captions[0] == "waving hand, medium dark skin tone"
    assert captions[-1] == "waving hand with medium dark skin"
    assert all("medium dark skin" in caption for caption in captions)
    assert tone_words("1F3FB-1F3FF") == "light skin tone and dark skin tone"
    assert tone_words("1F3FD-1F3FD") == "medium skin tone"


def test_codes_and_rude_words_are_no_captions() -> None:
    assert captions_of(entry("PILE OF POO", "Smileys & Emotion", "face-costume", "hankey", "poop", "shit"))[1] == "poop"
    thumb = captions_of(person("THUMBS UP SIGN", "hand-fingers-closed", "+1", "thumbsup"))
    assert thumb[:2] == ("thumbs up", "thumbsup")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (person("RUNNER"), person("WOMAN RUNNING FACING RIGHT")),
        (person("MERMAID", "person-fantasy"), person("MERMAN", "person-fantasy")),
        (person("FATHER CHRISTMAS", "person-fantasy"), person("MX CLAUS", "person-fantasy")),
        (person("FAMILY: MAN, BOY", "family"), person("FAMILY: WOMAN, WOMAN, GIRL, GIRL", "family")),
        (person("KISS", "family"), person("KISS: WOMAN, MAN", "family")),
        (person("BREAST-FEEDING", "person-role"), person("MAN FEEDING BABY", "person-role")),
        (person("TWO MEN HOLDING HANDS", "family"), person("MAN AND WOMAN HOLDING HANDS", "family")),
        (person("MAN", "person"), person("ADULT", "person")),
    ],
    ids=lambda emoji: emoji["name"],
)
def test_all_who_do_one_thing_are_one_activity(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert activity_of(one) == activity_of(other)


def test_things_that_differ_in_more_than_gender_are_two_activities() -> None:
    assert activity_of(person("WOMAN WALKING")) != activity_of(person("WOMAN RUNNING"))
    assert activity_of(entry("BLUE HEART", "Smileys & Emotion", "heart")) != activity_of(
        entry("GREEN HEART", "Smileys & Emotion", "heart")
    )


def test_no_name_is_written_as_itself_and_all_words_are_plain() -> None:
    assert [name for name, caption in NAMES.items() if name == caption] == []
    texts = [*NAMES.values(), *GROUPS.values()]
    assert [text for text in texts if not text.replace(" ", "").isalnum() or text != text.lower()] == []
