"""The contacts of demonstrations: lines, and JSON that says the same."""

import itertools
import json

from dlm_jax.data.contacts import contacts


def test_the_json_says_what_the_line_says():
    for line, text in itertools.islice(contacts(1), 200):
        fields = json.loads(text)
        name, work = fields["name"], fields["work"]
        assert line == (f"{name['first']} {name['last']}, {fields['age']}, {work['job']}, {fields['city']}, "
                        f"{work['years']}")


def test_a_seed_gives_the_same_contacts_and_none_twice():
    first, again = (list(itertools.islice(contacts(2), 5000)) for _ in range(2))
    assert first == again and len(set(first)) == 5000
