"""`dlm infill`: fill the holes in a text."""

import argparse
from typing import Any

from dlm_jax.commands.arguments import MODEL_HELP, Arguments, add_sampling_flags, text_or_stdin


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `dlm infill`."""
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("text", type=text_or_stdin,
                        help="text with holes: [MASK:8] is 8 tokens wide, [MASK:2-6] as wide as fits best; - reads it "
                             "from stdin")
    add_sampling_flags(parser)


def run(a: Arguments) -> dict[str, Any]:
    """Fills; prints the text and returns it with its cost."""
    from dlm_jax.commands.show_sample import recording, settings_of, show_sample
    from dlm_jax.language_model import load
    lm = load(a.model)
    with recording(lm, a) as recorder:
        sample = lm.infill(a.text, callback=recorder, **settings_of(a))
    return show_sample(lm, sample, recorder, a)
