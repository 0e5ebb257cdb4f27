"""Text to token ids and back, through a directory's Hugging Face tokenizer."""

import copy
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlm_jax.errors import UserError

MAX_PENDING = 4  # a UTF-8 character has at most four bytes, so at most four tokens wait to be completed


class Tokenizer:
    """A fast (Rust) tokenizer. Text is never given a start or an end token here: whoever needs one adds `bos_id`, the
    token that a text starts with, or `eos_id`, the one that ends it; None where there is none."""

    def __init__(self, wrapped: Any, bos_id: int | None = None, eos_id: int | None = None) -> None:
        """`wrapped` is a fast `transformers` tokenizer; `load` is the usual way in."""
        self._wrapped = wrapped
        self.bos_id: int | None = wrapped.bos_token_id if bos_id is None else bos_id
        self.eos_id: int | None = wrapped.eos_token_id if eos_id is None else eos_id
        self._backend = wrapped.backend_tokenizer
        self._backend.no_truncation()  # a directory may ask for either, and neither is text
        self._backend.no_padding()
        added = self._backend.get_added_tokens_decoder().items()
        self._hidden = {token for token, content in added if content.special and token != self.mask_id}

    @classmethod
    def load(cls, directory: str | Path, bos_id: int | None = None, eos_id: int | None = None) -> "Tokenizer":
        """The tokenizer of a Hugging Face directory. Neither the network nor code that lies there is used. `bos_id` and
        `eos_id` are those of the model, where it names them; a tokenizer's own may be others, or none.

        Raises `UserError` where there is no directory, or none of its files make a fast tokenizer.
        """
        if not Path(directory).is_dir():
            raise UserError(f"there is no directory {directory}; name one that holds a tokenizer")
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is absent is no news here
        import transformers  # a second, which a command without text need not pay
        verbosity = transformers.utils.logging.get_verbosity()
        transformers.utils.logging.set_verbosity_error()  # it wonders at the model type of an export, none of its own
        try:
            reader = transformers.PreTrainedTokenizerFast if _is_plain(Path(directory)) else transformers.AutoTokenizer
            wrapped = reader.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
            return cls(wrapped, bos_id, eos_id)
        except Exception as error:  # the Rust side raises bare exceptions, and a slow tokenizer has no backend
            cause = str(error).strip().split("\n")[0] or type(error).__name__
            raise UserError(f"cannot read a tokenizer from {directory} ({cause}); "
                            "copy the original tokenizer.json and tokenizer_config.json there") from error
        finally:
            transformers.utils.logging.set_verbosity(verbosity)

    @property
    def mask_id(self) -> int | None:
        """The mask token; None where none was added yet."""
        return self._wrapped.mask_token_id

    @property
    def size(self) -> int:
        """How many ids have a text, added tokens included; a model's table may have more rows."""
        return len(self._wrapped)

    @property
    def backend(self) -> Any:
        """The `tokenizers.Tokenizer` that does the work: another process can have it without importing ours."""
        return self._backend

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, and nothing before or after them."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_inside(self, text: str) -> list[int]:
        """The ids of `text` as the continuation of another text: without the space that some tokenizers put first."""
        before = self.encode("\n")
        ids = self.encode("\n" + text)
        return ids[len(before):] if ids[:len(before)] == before else self.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, on all cores."""
        return [each.ids for each in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`: special tokens are left out, but the mask token is shown. Ids without a text have none."""
        return self._text([token for token in map(int, ids) if token not in self._hidden])

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each id adds to the text: joined, the pieces of an encoded text are that text.

        A token that is only the start of a character adds nothing, and the one that completes it adds all of it. A
        start that stays incomplete shows as U+FFFD.
        """
        shown = [(place, token) for place, token in enumerate(map(int, ids)) if token not in self._hidden]
        tokens = [token for _, token in shown]
        pieces = [""] * len(ids)
        context = given = 0  # the text up to `given` is handed out; from `context` on it says how the next piece joins
        for end, (place, _) in enumerate(shown, start=1):
            before, text = self._text(tokens[context:given]), self._text(tokens[context:end])
            last = end == len(tokens) or tokens[end] == self.mask_id or end - given == MAX_PENDING
            if last or (len(text) > len(before) and not text.endswith("\N{REPLACEMENT CHARACTER}")):
                pieces[place] = text[len(before):]
                context, given = given, end
        return pieces

    def _text(self, tokens: list[int]) -> str:
        return self._backend.decode(tokens, skip_special_tokens=False)

    def with_mask(self, token: str = "<|mask|>", *, id: int) -> "Tokenizer":
        """A tokenizer that also knows `token` as its mask token. Raises `UserError` where its id would not be `id`."""
        from tokenizers import AddedToken
        wrapped = copy.deepcopy(self._wrapped)
        wrapped.add_special_tokens({"mask_token": AddedToken(token, special=True, normalized=False)})
        if wrapped.mask_token_id != id:
            raise UserError(f"the mask token {token} would get the id {wrapped.mask_token_id} and the model expects "
                            f"{id}; use the tokenizer that belongs to the model, or another mask token")
        return Tokenizer(wrapped, self.bos_id, self.eos_id)

    def save(self, directory: str | Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json` into `directory`."""
        self._wrapped.save_pretrained(str(directory))

    def fingerprint(self) -> str:
        """16 hex digits that say how text is cut into ids, the same in every process and after `save` and `load`.

        Added tokens are left out: a mask token added later does not change the ids of a text.
        """
        whole = json.loads(self._backend.to_str())
        parts = {name: whole[name] for name in ("normalizer", "pre_tokenizer", "model")}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _is_plain(directory: Path) -> bool:
    """Whether the directory names the plain class, which AutoTokenizer also finds, after it has loaded PyTorch."""
    config = directory / "tokenizer_config.json"
    named = json.loads(config.read_text()).get("tokenizer_class") if config.exists() else None
    return named in ("PreTrainedTokenizerFast", "TokenizersBackend")
