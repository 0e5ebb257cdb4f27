"""The bodies of requests: OpenAI's fields, and ours for denoising. What is not supported is refused by name."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dlm_jax.errors import UserError, printable, shortened

MAX_CHOICES = 16
Text = Annotated[str, Field(max_length=2**20)]
Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=2**17)]
Stops = Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=4)]
Nothing = Annotated[float | None, Field(ge=0, le=0)]


class Body(BaseModel):
    """Types are strict, and an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Body):
    """What a stream holds besides text."""

    include_usage: bool = False
    include_steps: bool = False  # ours: each denoising step, as what it changed


class Common(Body):
    """The fields that all requests share; None is the server's default."""

    model: str | None = None
    max_tokens: Annotated[int | None, Field(ge=1, le=2**20)] = None
    temperature: float | None = None
    top_p: float | None = None
    seed: Annotated[int | None, Field(ge=0, lt=2**32)] = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stop: str | Stops | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # accepted, and not used
    # Ours: the fields of `Settings`.
    top_k: Annotated[int | None, Field(ge=0, lt=2**31)] = None
    min_p: float | None = None
    unmasking: Annotated[str | None, Field(max_length=64)] = None
    steps: Annotated[int | None, Field(ge=1, lt=2**31)] = None
    block: Annotated[int | None, Field(ge=1, lt=2**31)] = None
    # OpenAI's, at the only values that the sampler can honour.
    presence_penalty: Nothing = None
    frequency_penalty: Nothing = None

    @property
    def stops(self) -> list[str]:
        """The texts at which to stop."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def settings(self) -> dict[str, Any]:
        """The fields of `Settings` that the request states."""
        names = ("temperature", "top_p", "top_k", "min_p", "seed", "unmasking", "steps", "block")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class Completion(Common):
    """The body of /v1/completions."""

    prompt: Text | Tokens | Annotated[list[Text], Field(min_length=1, max_length=256)] \
        | Annotated[list[Tokens], Field(min_length=1, max_length=256)]
    suffix: Text | None = None  # what comes after the hole, which is `max_tokens` wide
    logprobs: Annotated[int | None, Field(ge=0, le=0)] = None  # 0: of the tokens themselves; no alternatives are kept
    echo: bool = False
    best_of: Annotated[int | None, Field(ge=1)] = None

    @model_validator(mode="after")
    def _one_of_n(self) -> "Completion":
        if self.best_of not in (None, self.n):
            raise ValueError("best_of must equal n; all choices are returned")
        return self


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        """The content, its parts joined."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ResponseFormat(Body):
    """Only text."""

    type: Literal["text"]


class Chat(Common):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_completion_tokens: Annotated[int | None, Field(ge=1, le=2**20)] = None
    logprobs: bool = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=0)] = None
    response_format: ResponseFormat | None = None


class Infill(Common):
    """The body of /v1/infill, which is ours: a text whose holes are marked [MASK:n]."""

    text: Text


def read_body(kind: type[BaseModel], fields: Any) -> Any:
    """The body as a `kind`. Raises `UserError` with the field and what is wrong with it."""
    if not isinstance(fields, dict):
        raise UserError("the body must be a JSON object; send one with the fields of the API")
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        if first["type"] == "extra_forbidden":
            name = printable(str(first["loc"][-1]))
            sentence = f"the field '{shortened(name, 60)}' is not supported; see docs/serving.md for what is"
            raise UserError(sentence) from None
        place = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part in kind.model_fields)
        what = first["msg"].removeprefix("Value error, ").removesuffix(".")
        sentence = f"{place or 'the body'}: {what[:1].lower()}{what[1:]}; see docs/serving.md for what is supported"
        raise UserError(shortened(sentence, 400)) from None
