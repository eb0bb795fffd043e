"""An adapter behind an OpenAI-compatible server: `transformers serve`, with a model of ours in it.

Its handlers, streaming and batching stay as they are. What is ours is how model and tokenizer come, that prompts are
made by the function that training uses, and what a client hears whose request cannot be answered.
"""

from __future__ import annotations

import importlib
import inspect
import math
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import transformers
from torch import Tensor
from transformers import BatchEncoding, GenerationConfig, PreTrainedTokenizerBase

from dsmoelora.data.chat import prompt_ids
from dsmoelora.data.keys import THOUGHTS
from dsmoelora.data.limits import UNLIMITED, Limits
from dsmoelora.data.problems import RowProblem, kind
from dsmoelora.data.tools import tools_of
from dsmoelora.data.turns import Message, asked_messages
from dsmoelora.errors import ConfigError, ModelError, bad_value
from dsmoelora.model.greedy import greedy_config
from dsmoelora.model.limits import limits_of

TESTED = "5.23"
# Numbers of a request, each with the least and the largest that is allowed.
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_output_tokens"), (1, math.inf)),
    "temperature": (0, math.inf),
    "top_p": (0, 1),
}
# Keys of a request's message; a client that sends an answer back may have put others beside them.
_READ = ("role", "content", "name", "tool_calls", "function_call", "tool_call_id", *THOUGHTS)
Loaded = tuple[Any, PreTrainedTokenizerBase]


def check_servable() -> None:
    """Make sure that this transformers serves, and in the way that we know.

    Raises:
        ConfigError: packages are missing
        ModelError: its parts are others than those that a model of ours can be put into
    """
    from transformers.utils import import_utils

    if not getattr(import_utils, "is_serve_available", lambda: True)():
        raise ConfigError("launch/serve.py needs a server's packages. pip install 'dsmoelora[serve]'")
    try:
        from transformers.cli.serve import Serve
        from transformers.cli.serving.model_manager import ModelManager
        from transformers.cli.serving.server import build_server  # noqa: F401
        from transformers.cli.serving.utils import BaseHandler
    except ImportError as error:
        raise _other_version(str(error)) from error
    wanted: list[tuple[type, str, set[str]]] = [
        (ModelManager, "__init__", {"force_model", "continuous_batching", "device", "dtype"}),
        (ModelManager, "_load_model", {"model_id_and_revision"}),
        (ModelManager, "_load_processor", {"model_id_and_revision"}),
        (ModelManager, "process_model_name", {"model_id"}),
        (ModelManager, "get_gen_models", set()),
        (BaseHandler, "_build_generation_config", {"body", "model_generation_config", "use_cb"}),
        (BaseHandler, "get_processor_inputs_from_messages", {"messages", "modality"}),
    ]
    for owner, name, parameters in wanted:
        method = getattr(owner, name, None)
        if method is None or not parameters <= set(inspect.signature(method).parameters):
            raise _other_version(f"its {owner.__name__} has another {name}")
    if not {"force_model", "continuous_batching", "host", "port"} <= set(inspect.signature(Serve).parameters):
        raise _other_version("its Serve takes other options")


def check_port(host: str, port: int) -> None:
    """Make sure that a server can listen there.

    Raises:
        ConfigError: the port is in use, or the address is none of this machine
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address[:2], family=family).close()
    except OSError as error:
        remedy = "Choose another with --port, or another --host."
        raise bad_value("--port", port, f"a free one at {host} ({error.strerror})", remedy) from None


def serve(name: str, load: Callable[[], Loaded], host: str, port: int, continuous_batching: bool = False) -> None:
    """Serve until the process is told to end.

    Args:
        name: under which clients know the model
        load: gives model and tokenizer; called once, before the first request is taken
        host, port: where to listen
        continuous_batching: requests at the same time share forward passes
    """
    from transformers.cli.serve import Serve

    with _our_parts(name, load):
        Serve(force_model=name, host=host, port=port, continuous_batching=continuous_batching)


@contextmanager
def _our_parts(name: str, load: Callable[[], Loaded]) -> Iterator[None]:
    """Inside the block `Serve` makes a server that has one model, ours, and takes requests as they are meant."""
    model_manager: Any = importlib.import_module("transformers.cli.serving.model_manager")
    server: Any = importlib.import_module("transformers.cli.serving.server")
    handler: Any = importlib.import_module("transformers.cli.serving.utils").BaseHandler
    loaded: list[Loaded] = []
    own = GenerationConfig()  # settings of the base, which hold where a client gives no temperature

    def once() -> Loaded:
        if not loaded:
            model, tokenizer = load()
            greedy = greedy_config(model.generation_config, tokenizer)
            vars(own).update(vars(model.generation_config))
            own.pad_token_id, own.eos_token_id = greedy.pad_token_id, greedy.eos_token_id
            model.generation_config = greedy  # `generate` fills from it whatever a request leaves open
            limits = limits_of(model)
            model.generate = within_limits(limits, tokenizer, model.generate)
            loaded.append((model, prompting_as_in_training(tokenizer, limits)))
        return loaded[0]

    class Manager(model_manager.ModelManager):
        """Its only model is the one at hand."""

        def _load_model(self, *_: Any, **__: Any) -> Any:
            return once()[0]

        def _load_processor(self, *_: Any, **__: Any) -> Any:
            return once()[1]

        @staticmethod
        def process_model_name(model_id: str) -> str:
            """The name as it is; the original adds a revision of the hub."""
            return model_id

        @staticmethod
        def get_gen_models(cache_dir: str | None = None) -> list[dict[str, Any]]:
            """The list of models; the original asks the hub's cache, which need not exist."""
            return [{"id": name, "object": "model", "created": 0, "owned_by": "dsmoelora"}]

    with ExitStack() as stack:
        stack.enter_context(_replaced(model_manager, "ModelManager", Manager))
        stack.enter_context(_replaced(server, "build_server", _telling_errors(server.build_server)))
        build = _as_asked(handler._build_generation_config, own)
        stack.enter_context(_replaced(handler, "_build_generation_config", build))
        stack.enter_context(_replaced(handler, "get_processor_inputs_from_messages", staticmethod(read_messages)))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = inspect.getattr_static(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _as_asked(build: Callable[..., Any], own: GenerationConfig) -> Callable[..., Any]:
    """`_build_generation_config` that refuses numbers out of range, and knows what a temperature means.

    With one of 0 nothing of the base's settings holds, as in `greedy_answers`; with one above 0 answers are sampled.
    The original leaves both to the base, so that one with a penalty would not answer greedily, and one that answers
    greedily would ignore every temperature.

    Args:
        build: the original
        own: settings of the base
    """

    @wraps(build)
    def built(handler: Any, body: dict[str, Any], model_generation_config: GenerationConfig, **options: Any) -> Any:
        check_numbers(body)
        temperature = body.get("temperature")
        if temperature == 0:
            return build(handler, body, model_generation_config, **options)
        config = build(handler, body, own, **options)
        config.update(**own.to_dict(), defaults_only=True)  # where a client gives some settings of its own
        if temperature:
            config.do_sample = True
        return config

    return built


def check_numbers(body: dict[str, Any]) -> None:
    """Make sure that the numbers of a request can be generated with.

    Raises:
        HTTPException: a bad request; one of them cannot
    """
    from fastapi import HTTPException

    for name, (least, most) in RANGES.items():
        value = body.get(name)
        if value is None or (type(value) in (int, float) and least <= value <= most):
            continue
        allowed = f"{least} or more" if most == math.inf else f"between {least} and {most}"
        raise HTTPException(400, f"{name} is {value!r}, but it must be {allowed}.")


def _telling_errors(build: Callable[..., Any]) -> Callable[..., Any]:
    """`build_server` whose server says what is wrong in OpenAI's form, the only one that its clients print."""

    @wraps(build)
    def built(*args: Any, **options: Any) -> Any:
        from fastapi.exceptions import RequestValidationError
        from fastapi.responses import JSONResponse
        from starlette.exceptions import HTTPException

        async def tell(_: Any, problem: Any) -> Any:
            is_malformed = isinstance(problem, RequestValidationError)
            message = "; ".join(one["msg"] for one in problem.errors()) if is_malformed else str(problem.detail)
            status = 422 if is_malformed else problem.status_code
            error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
            return JSONResponse({"error": error}, status)

        app = build(*args, **options)
        for problem in (HTTPException, RequestValidationError):
            app.add_exception_handler(problem, tell)
        return app

    return built


def read_messages(messages: Any, modality: Any = None) -> list[Message]:
    """The messages of a request as training reads the turns of a row.

    The original joins parts with blanks, keeps the role `developer`, and leaves out names, thoughts and the words
    beside calls.

    Args:
        messages: of the request
        modality: as the original takes it; there is text alone

    Raises:
        HTTPException: a bad request; training would refuse such turns
    """
    with _as_bad_request():
        if not isinstance(messages, list):
            raise RowProblem(f"messages is {kind(messages)}, but it must be a list.")
        return asked_messages("messages", [_of_request(message) for message in messages])


def _of_request(message: Any) -> Any:
    """A message without what clients send back of our own answers, and with parts as rows have them."""
    if not isinstance(message, dict):
        return message
    kept = {key: message[key] for key in _READ if message.get(key) is not None}
    content = kept.setdefault("content", "")
    if isinstance(content, list):
        kept["content"] = [_as_text(part) for part in content] or ""
    return kept


def _as_text(part: Any) -> Any:
    is_text = isinstance(part, dict) and part.get("type") in ("text", "input_text", "output_text")
    return {"type": "text", "text": part.get("text")} if is_text else part


def within_limits(
    limits: Limits, tokenizer: PreTrainedTokenizerBase, generate: Callable[..., Any]
) -> Callable[..., Any]:
    """`generate` that refuses what the model has no embeddings for, and ends an answer with the last position.

    Args:
        limits: of the model
        tokenizer: of the model
        generate: the model's own
    """

    @wraps(generate)
    def within(*, input_ids: Tensor, generation_config: GenerationConfig, **options: Any) -> Any:
        with _as_bad_request():
            for ids in input_ids.tolist():
                limits.check(tokenizer, ids)
        if limits.num_positions is not None and generation_config.max_new_tokens is not None:
            room = limits.num_positions - input_ids.shape[1] + 1  # the last token of an answer is not read
            generation_config.max_new_tokens = min(generation_config.max_new_tokens, room)
        return generate(input_ids=input_ids, generation_config=generation_config, **options)

    return within


@contextmanager
def _as_bad_request() -> Iterator[None]:
    try:
        yield
    except RowProblem as problem:
        from fastapi import HTTPException

        raise HTTPException(400, f"The prompt cannot be asked: {problem}") from None


def prompting_as_in_training(tokenizer: PreTrainedTokenizerBase, limits: Limits = UNLIMITED) -> PreTrainedTokenizerBase:
    """The tokenizer, whose `apply_chat_template` now makes the tokens of a prompt by `prompt_ids`.

    Args:
        tokenizer: of the model
        limits: of the model; a prompt beyond them is a bad request
    """
    render = tokenizer.apply_chat_template

    def apply(conversation: Any, tools: Any = None, *, tokenize: bool = True, **options: Any) -> Any:
        if not tokenize:
            return render(conversation, tools=tools, tokenize=False, **options)
        form = options.pop("return_tensors", None)
        for known in ("add_generation_prompt", "return_dict", "load_audio_from_video"):
            options.pop(known, None)
        with _as_bad_request():
            if not conversation:
                raise RowProblem("it has no messages.")
            ids = prompt_ids(tokenizer, conversation, tools_of({"tools": tools}), **options)
            limits.check(tokenizer, ids)
        if form is None:  # as continuous batching wants it
            return {"input_ids": ids, "attention_mask": [1] * len(ids)}
        return BatchEncoding({"input_ids": [ids], "attention_mask": [[1] * len(ids)]}, tensor_type=form)

    vars(tokenizer)["apply_chat_template"] = apply  # of this tokenizer alone
    return tokenizer


def _other_version(what: str) -> ModelError:
    return ModelError(
        f"transformers {transformers.__version__} serves in another way than launch/serve.py knows ({what}). "
        f"Install one that works: pip install 'transformers[serving]=={TESTED}.*'"
    )
