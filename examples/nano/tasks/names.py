"""Names of people and places: those of the lists, and those that no list holds."""

from random import Random

NAMES = (
    "tom anna ben lena max ida paul nora finn emma leo mia jan eva tim sara noah lily hugo rosa otto clara felix marie"
).split()

CITIES = (
    "Berlin Paris London Rome Madrid Vienna Oslo Lisbon Prague Dublin Athens Warsaw Tokyo Delhi Cairo Lagos Lima Quito "
    "Boston Chicago Toronto Sydney Seoul Beijing Moscow Kyiv Zurich Geneva Milan Porto Hanoi Dakar"
).split()

OTHER_CITIES = (
    "Lyon Hamburg Munich Cologne Turin Naples Venice Seville Valencia Bilbao Nice Lille Ghent Bruges Leeds "
    "Bristol Glasgow Cork Bergen Malmo Turku Riga Tallinn Vilnius Krakow Gdansk Brno Graz Linz Basel Bern "
    "Split Sofia Bucharest Ankara Izmir Tbilisi Baku Tehran Mumbai Chennai Kolkata Lahore Dhaka Yangon "
    "Bangkok Manila Osaka Kyoto Nagoya Busan Perth Auckland Nairobi Accra Tunis Rabat Lusaka Harare Denver "
    "Dallas Houston Austin Seattle Portland Montreal Ottawa"
).split()


def made_up_name(rng: Random) -> str:
    """A name that no list holds, such as `Velko` or `Trabim`."""
    vowels, consonants = "aeiou", "bcdfghjklmnprstvwxyz"
    name = ""
    for _ in range(rng.randint(2, 3)):
        name += rng.choice(consonants) + rng.choice(vowels) + (rng.choice("lmnrstk") if rng.random() < 0.35 else "")
    return name.capitalize()


def new_name(rng: Random) -> str:
    return rng.choice(OTHER_CITIES) if rng.random() < 0.3 else made_up_name(rng)


def any_place(rng: Random) -> str:
    return rng.choice(CITIES) if rng.random() < 0.4 else new_name(rng)
