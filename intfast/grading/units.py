"""What stands behind a number: units with dimension and factor, money, angles, things counted.

A unit is a product of powers: {"length": 1, "time": -1} with a factor to the base unit. Angles are
measured in radians: a degree is pi / 180, so a factor has a power of pi too.
"""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction
from typing import NamedTuple

TABLE = {
    "length": "m meter metre=1 km kilometer kilometre=1000 cm centimeter centimetre=1/100"
    " dm decimeter=1/10"
    " mm millimeter millimetre=1/1000 inch inches in=127/5000 ft foot feet=381/1250"
    " yd yard=1143/1250"
    " mi mile=201168/125",
    "area": "acre=4046856.4224 hectare=10000000",
    "mass": "g gram=1 kg kilogram=1000 mg milligram=1/1000 Mg=1000000 t ton tonne=1000000"
    " lb lbs pound=45359237/100000 oz ounce=45359237/1600000",
    "time": "s sec second=1 ms millisecond=1/1000 min minute=60 h hr hour=3600 d day=86400"
    " week=604800",
    "month": "month=1 yr year=12",
    "volume": "L l liter litre=1 mL ml milliliter millilitre=1/1000 gal gallon=473176473/125000000"
    " quart=473176473/500000000 pint=473176473/1000000000 cup=473176473/2000000000",
    "dollar": "dollar USD=1 cent=1/100",
    "euro": "euro EUR=1",
    "sterling": "GBP=1 penny pence=1/100",
    "angle": "rad radian=1 degree deg=1/180 arcminute=1/10800 arcsecond=1/648000",
    "temperature": "kelvin=1",
    "celsius": "C Celsius=1",
    "fahrenheit": "F Fahrenheit=1",
    "force": "N newton=1",
    "energy": "J joule=1 kJ kilojoule=1000 cal calorie=523/125 kWh=3600000",
    "power": "W watt=1 kW kilowatt=1000 mW=1/1000 MW=1000000",
    "pressure": "Pa pascal=1 kPa=1000",
    "frequency": "Hz hertz=1 kHz=1000 MHz=1000000",
    "charge": "C coulomb=1",
    "current": "A amp ampere=1 mA=1/1000",
    "voltage": "V volt=1",
    "amount": "mol mole=1",
    "data": "bit=1 byte=8",
    "point": "percentage-point=1",
    "unit": "unit=1",
}
RATES = {"mph": "mi/h", "kmph": "km/h", "kph": "km/h", "fps": "ft/s"}
# Words that change the number in front of them, or say that it is none.
_NO_NOUN = re.compile(
    r"(?:and|basis|but|by|choose|divided|from|if|in|is|are|was|isn|not|nor|no|of|or|over|per|percent|percents|than|times|to"
    r"|vs|versus|minus|plus|mod|modulo|modulus|thus|less|unless|perhaps|always|sometimes|besides|hundreds?|thousands?"
    r"|[a-z]*illions?|dozens?|scores?|gross|pairs|couples|lakhs?|crores?|myriads?|halves|quarters|thirds|[a-z]+ths"
    r"|tens|ones|twos|threes|[a-z]*squares|cubes|powers|factorials?|logs|digits|bases|wrong|false|negatives|positives|base|about|at|as|least|most"
    r"|more|roughly|nearly|almost|around|approximately|remainder|with|without|except|maybe|guess|guesses|it|this|that)"
)
_IRREGULAR = "people children men women mice feet geese fish sheep teeth dice oxen data pence deer"


class Unit(NamedTuple):
    """Dimensions with their powers, sorted; factor * pi ** pi to the base."""

    powers: tuple[tuple[str, int], ...]
    factor: Fraction = Fraction(1)
    pi: int = 0


def _table() -> dict[str, Unit]:
    """{name or symbol: unit}; longer names also in the plural."""
    found: dict[str, Unit] = {}
    for dimension, line in TABLE.items():
        names: list[str] = []
        for word in line.split():
            name, _, factor = word.partition("=")
            names.append(name)
            if not factor:
                continue
            powers, size = ((dimension, 1),), Fraction(factor)
            if dimension in ("area", "volume"):
                powers, size = (("length", 2 if dimension == "area" else 3),), size / 1000
            unit = Unit(powers, size, pi=int(dimension == "angle" and factor != "1"))
            found |= dict.fromkeys(names, unit)
            found |= {f"{n}s": unit for n in names if len(n) > 3 or n in ("day", "cup", "bit")}
            names = []
    return found


NAMES = _table()
_POWER = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}


def parse(text: str, is_one: bool = False) -> Unit | None:
    """The unit that a text without numbers names, or None where not all of it is understood.

    Examples: "kg", "square meters", "\\text{m}/\\text{s}^2", "miles per hour", "red apples".
    is_one: whether one thing is counted, so that its noun may be singular
    """
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r" \1 / \2 ", text)
    text = re.sub(
        r"\bper(?:centage)? cent(?:age)? points?|\bpercentage points?", "percentage-point", text
    )
    text = text.replace("pounds sterling", "GBP").replace(r"\cdot", " ")
    text = re.sub(r"\b[a-z]{3,4}\b", lambda m: RATES.get(m[0], m[0]), text.replace(".", ""))
    powers: Counter[str] = Counter()
    factor, pi, sign, times = Fraction(1), 0, 1, 1
    nouns: list[str] = []
    last: Unit | None = None
    for word in re.findall(r"[A-Za-z][A-Za-z-]*|\^\{?-?\d\}?|/|\S", text):
        unit = NAMES.get(word) or (NAMES.get(word.lower()) if len(word) > 3 else None)
        count = 0
        if word[0] == "^" and word != "^" and last:
            # Once it was counted when it was read.
            unit, count = last, int(re.sub(r"[^-\d]", "", word)) - 1
        elif word in ("squared", "cubed") and last:
            unit, count = last, _POWER[word] - 1
        elif word in ("/", "per") and (powers or nouns):
            if nouns and not (noun := _counted(nouns, is_one)):
                return None
            powers.update({noun: 1} if nouns else {})
            sign, last, nouns = -1, None, []
            continue
        elif word in ("square", "sq", "cubic", "cu") and not nouns:
            times = _POWER[word]
            continue
        elif unit and not nouns:
            last, count, times = unit, times, 1
        elif re.fullmatch(r"[a-z]{3,}", word) and (word == "more" or not _NO_NOUN.fullmatch(word)):
            nouns.append(word)
            continue
        else:
            return None
        for dimension, power in unit.powers:
            powers[dimension] += sign * count * power
        factor, pi = factor * unit.factor ** (sign * count), pi + unit.pi * sign * count
    if times != 1 or not (powers or nouns):
        return None
    if nouns:
        if not (noun := _counted(nouns, is_one or sign < 0)):
            return None
        powers[noun] += sign
    return Unit(tuple(sorted((d, p) for d, p in powers.items() if p)), factor, pi)


def _counted(words: list[str], is_one: bool) -> str:
    """The dimension of a noun with what stands before it; "" where it is none."""
    noun = words[-1]
    is_same = noun in _IRREGULAR.split()
    if len(words) > 4 or noun == "more" or not (is_one or is_same or noun.endswith("s")):
        return ""
    return f"count of {noun if is_same else noun.removesuffix('s')}"
