"""Text to token ids and back, with the Hugging Face tokenizer of a model directory."""

import contextlib
import copy
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm_jax.errors import UserError
from dlm_jax.files import check_sums, read_json
from dlm_jax.models.config import MAX_ROWS
from dlm_jax.schema.json_text import check_regular
from dlm_jax.schema.kinds import (
    ANY,
    FLAG,
    TEXT,
    Schema,
    check_fields,
    either,
    list_of,
    map_of,
    nested,
    real,
    whole,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

TOKEN = either(TEXT, map_of(either(TEXT, FLAG)))  # a token, or one with its flags
LIST = either(list_of(TOKEN), map_of(TOKEN))
# The fields of `tokenizer_config.json` that are read and written: what a text needs. A stranger's directory may have
# others, and some of those name code that `transformers` would run (`auto_map`).
CONFIG: Schema = {
    "tokenizer_class": TEXT, "bos_token": TOKEN, "eos_token": TOKEN, "unk_token": TOKEN, "sep_token": TOKEN,
    "pad_token": TOKEN, "cls_token": TOKEN, "mask_token": TOKEN, "additional_special_tokens": LIST,
    "extra_special_tokens": LIST, "added_tokens_decoder": map_of(TOKEN), "add_prefix_space": FLAG,
    "add_bos_token": FLAG, "add_eos_token": FLAG, "legacy": FLAG, "split_special_tokens": FLAG,
    "clean_up_tokenization_spaces": FLAG, "spaces_between_special_tokens": FLAG, "errors": TEXT, "trim_offsets": FLAG,
    "model_max_length": real(0), "model_input_names": list_of(TEXT), "padding_side": TEXT, "truncation_side": TEXT,
    "chat_template": either(TEXT, list_of(map_of(TEXT)))}
# `tokenizer.json`. Its parts are read by the package `tokenizers`.
PIPELINE: Schema = {
    "version": TEXT, "model": map_of(ANY), "normalizer": map_of(ANY), "pre_tokenizer": map_of(ANY),
    "post_processor": map_of(ANY), "decoder": map_of(ANY),
    "added_tokens": list_of(nested({"id": whole(0, MAX_ROWS), "content": TEXT, "special": FLAG}))}
SCHEMAS: dict[str, Schema] = {"tokenizer.json": PIPELINE, "tokenizer_config.json": CONFIG,
                              "special_tokens_map.json": CONFIG, "added_tokens.json": {}, "config.json": {}}
MAX_PENDING = 4  # a UTF-8 character has at most four bytes, so at most four tokens wait for its completion
SUFFIXES = {".json", ".txt", ".model", ".jinja"}  # of the files that make a tokenizer


class Tokenizer:
    """A fast (Rust) tokenizer. It never adds start or end tokens: callers that need them add `bos_id` or `eos_id`."""

    bos_id: int | None  # the token that a text starts with
    eos_id: int | None  # the token that ends a text

    def __init__(self, wrapped: Any, bos_id: int | None = None, eos_id: int | None = None) -> None:
        """Wraps a fast `transformers` tokenizer; usually called through `load`."""
        self._wrapped = wrapped
        self.bos_id = wrapped.bos_token_id if bos_id is None else bos_id
        self.eos_id = wrapped.eos_token_id if eos_id is None else eos_id
        self._backend: Backend = wrapped.backend_tokenizer
        self._backend.no_truncation()  # a directory may enable both, and both would change the text
        self._backend.no_padding()
        added = self._backend.get_added_tokens_decoder().items()
        self._hidden = {token for token, content in added if content.special and token != self.mask_id}

    @classmethod
    def load(cls, directory: str | Path, bos_id: int | None = None, eos_id: int | None = None) -> "Tokenizer":
        """The tokenizer of a Hugging Face directory. It uses no network and runs no code from the directory.

        bos_id, eos_id: the model's, if it names them; they override the tokenizer's own, which may differ or be absent.
        Raises `UserError` if the directory does not exist or holds no fast tokenizer, and if a file of it is damaged.
        """
        if not Path(directory).is_dir():
            raise UserError(f"there is no directory {directory}; name one that holds a tokenizer")
        check_sums(Path(directory), [path.name for path in Path(directory).iterdir() if path.suffix in SUFFIXES])
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would warn that PyTorch is absent
        import transformers  # takes a second, which commands without text should not pay
        verbosity = transformers.utils.logging.get_verbosity()
        transformers.utils.logging.set_verbosity_error()  # it warns about the unknown model type of an export
        try:
            _check_files(Path(directory))
            reader = transformers.PreTrainedTokenizerFast if _is_plain(Path(directory)) else transformers.AutoTokenizer
            wrapped = reader.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
            return cls(wrapped, bos_id, eos_id)
        except (UserError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # Rust's panics are no `Exception`s; a slow tokenizer has no backend
            cause = str(error).strip().split("\n")[0] or type(error).__name__
            raise UserError(f"cannot read a tokenizer from {directory} ({cause}); "
                            "copy the original tokenizer.json and tokenizer_config.json there") from error
        finally:
            transformers.utils.logging.set_verbosity(verbosity)

    @property
    def mask_id(self) -> int | None:
        """The mask token, or None if none has been added."""
        return self._wrapped.mask_token_id

    @property
    def size(self) -> int:
        """Number of ids, including added tokens. A model's embedding may have more rows."""
        return len(self._wrapped)

    @property
    def largest_id(self) -> int:
        """The largest id that a text may get. Ids may have gaps, so it can exceed `size` - 1."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def wrapped(self) -> Any:
        """The tokenizer as `transformers` has it, with its chat template and its own idea of start and end tokens."""
        return self._wrapped

    @property
    def backend(self) -> "Backend":
        """The underlying `tokenizers.Tokenizer`, which other processes can unpickle without importing this package."""
        return self._backend

    def encode(self, text: str) -> list[int]:
        """The ids of `text` alone, without start or end tokens."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_inside(self, text: str) -> list[int]:
        """The ids of `text` as the continuation of another text: without the leading space that some tokenizers add."""
        prefix = self.encode("\n")
        ids = self.encode("\n" + text)
        return ids[len(prefix):] if ids[:len(prefix)] == prefix else self.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, computed on all cores."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens except the mask token. Unknown ids add nothing."""
        return self._text([token for token in map(int, ids) if token not in self._hidden])

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each id adds to the text; joined, the pieces of an encoded text are that text.

        A token that only starts a character adds nothing, and the one that completes it adds the whole character. A
        character that is never completed shows as U+FFFD.
        """
        shown = [(index, token) for index, token in enumerate(map(int, ids)) if token not in self._hidden]
        tokens = [token for _, token in shown]
        pieces = [""] * len(ids)
        # tokens[:emitted] have been turned into pieces; tokens[context:emitted] decide how the next piece joins on.
        context = emitted = 0
        for end, (index, _) in enumerate(shown, start=1):
            known, text = self._text(tokens[context:emitted]), self._text(tokens[context:end])
            must_emit = end == len(tokens) or tokens[end] == self.mask_id or end - emitted == MAX_PENDING
            if must_emit or (len(text) > len(known) and not text.endswith("\N{REPLACEMENT CHARACTER}")):
                pieces[index] = text[len(known):]
                context, emitted = emitted, end
        return pieces

    def _text(self, tokens: list[int]) -> str:
        return self._backend.decode(tokens, skip_special_tokens=False)

    def with_mask(self, token: str = "<|mask|>", *, id: int) -> "Tokenizer":
        """A copy with `token` as its mask token. Raises `UserError` if its id would not be `id`."""
        from tokenizers import AddedToken
        wrapped = copy.deepcopy(self._wrapped)
        wrapped.add_special_tokens({"mask_token": AddedToken(token, special=True, normalized=False)})
        if wrapped.mask_token_id != id:
            raise UserError(f"the mask token {token} would get the id {wrapped.mask_token_id} and the model expects "
                            f"{id}; use the tokenizer that belongs to the model, or another mask token")
        return Tokenizer(wrapped, self.bos_id, self.eos_id)

    def save(self, directory: str | Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, with the fields of `CONFIG`, into `directory`. The end
        token pads where there is no token for that, so that texts of unequal length make a batch.

        Raises `OSError` where they cannot be written.
        """
        with _os_errors():
            self._wrapped.save_pretrained(str(directory), save_jinja_files=False)  # a stranger may have named some
        file = Path(directory) / "tokenizer_config.json"
        fields = {name: value for name, value in read_json(file).items() if name in CONFIG}
        if fields.get("eos_token") is not None:
            fields.setdefault("pad_token", fields["eos_token"])
        file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")

    def fingerprint(self) -> str:
        """16 hex digits that identify how text is tokenized, equal in every process and after `save` and `load`.

        Added tokens do not count: a mask token added later does not change the ids of a text.
        """
        description = json.loads(self._backend.to_str())
        relevant = {name: description[name] for name in ("normalizer", "pre_tokenizer", "model")}
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    """The Rust side reports a full disk as a bare `Exception`; this raises the `OSError` that it is everywhere else."""
    try:
        yield
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def _check_files(directory: Path) -> None:
    """Raises `UserError` for a JSON file that does not fit its schema, and for a pipe or device among the files."""
    for path in directory.iterdir():
        if path.name in SCHEMAS:
            check_fields(read_json(path), SCHEMAS[path.name], str(path))
        elif path.suffix in SUFFIXES:
            check_regular(path)


def _is_plain(directory: Path) -> bool:
    """Whether the directory names the plain class. AutoTokenizer would find it too, but load PyTorch first."""
    config = directory / "tokenizer_config.json"
    class_name = read_json(config).get("tokenizer_class") if config.exists() else None
    return class_name in ("PreTrainedTokenizerFast", "TokenizersBackend")
