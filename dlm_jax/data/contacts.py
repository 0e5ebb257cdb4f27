"""Lines of contacts and the JSON that they become: a text with structure, for demonstrations and benchmarks.

'Ned Hill, 37, clerk, Sofia, 6' becomes '{"name": {"first": "Ned", "last": "Hill"}, "age": 37, ...}'. Most of the answer
follows from the line alone and not from the words before it, so a diffusion model can write much of it at once.
"""

import json
import random
from collections.abc import Iterator

FIRST = "Ada Ben Cleo Dan Eve Finn Gus Hana Ian Jude Kim Lena Max Ned Olga Pia Rosa Sam Tess Vera".split()
LAST = "Abel Berg Cole Dorn Ekman Frost Grant Hill Jones Kerr Lund Moss Nash Orr Penn Reed Stone West".split()
JOBS = "baker barber clerk cook driver farmer guard mason nurse painter pilot porter sailor tailor".split()
CITIES = "Athens Basel Bergen Cairo Dublin Geneva Lima Lisbon Madrid Oslo Paris Porto Riga Rome Sofia".split()


def contacts(seed: int) -> Iterator[tuple[str, str]]:
    """Endless different pairs (line, JSON)."""
    chance, seen = random.Random(seed), set()
    while True:
        first, last, job, city = (chance.choice(words) for words in (FIRST, LAST, JOBS, CITIES))
        age = chance.randint(18, 99)
        years = chance.randint(1, age - 16)
        line = f"{first} {last}, {age}, {job}, {city}, {years}"
        if line not in seen:
            seen.add(line)
            yield line, json.dumps({"name": {"first": first, "last": last}, "age": age,
                                    "work": {"job": job, "years": years}, "city": city})
