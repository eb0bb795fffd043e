"""An adapter behind an OpenAI-compatible server: `transformers serve`, with a model of ours in it.

Its handlers, streaming and batching stay as they are. What is ours is how model and tokenizer come, and that prompts
are made by the function that training uses.
"""

from __future__ import annotations

import importlib
import inspect
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from transformers import BatchEncoding, PreTrainedTokenizerBase

from dsmoelora.data.chat import prompt_ids, stop_ids
from dsmoelora.data.problems import RowProblem
from dsmoelora.errors import ConfigError, ModelError, bad_value

TESTED = "5.23"
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
    except ImportError as error:
        raise _other_version(str(error)) from error
    wanted = {
        "__init__": {"force_model", "continuous_batching", "device", "dtype"},
        "_load_model": {"model_id_and_revision"},
        "_load_processor": {"model_id_and_revision"},
        "process_model_name": {"model_id"},
        "get_gen_models": set(),
    }
    for name, parameters in wanted.items():
        method = getattr(ModelManager, name, None)
        if method is None or not parameters <= set(inspect.signature(method).parameters):
            raise _other_version(f"its ModelManager has another {name}")
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

    with _our_manager(name, load):
        Serve(force_model=name, host=host, port=port, continuous_batching=continuous_batching)


@contextmanager
def _our_manager(name: str, load: Callable[[], Loaded]) -> Iterator[None]:
    """Inside the block `Serve` makes a manager that has one model, ours."""
    model_manager: Any = importlib.import_module("transformers.cli.serving.model_manager")
    loaded: list[Loaded] = []

    def once() -> Loaded:
        if not loaded:
            model, tokenizer = load()
            model.generation_config.eos_token_id = stop_ids(tokenizer, model.generation_config.eos_token_id)
            model.generation_config.pad_token_id = tokenizer.pad_token_id
            loaded.append((model, prompting_as_in_training(tokenizer)))
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

    original, model_manager.ModelManager = model_manager.ModelManager, Manager
    try:
        yield
    finally:
        model_manager.ModelManager = original


def prompting_as_in_training(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, whose `apply_chat_template` now makes the tokens of a prompt by `prompt_ids`."""
    render = tokenizer.apply_chat_template

    def apply(conversation: Any, tools: Any = None, *, tokenize: bool = True, **options: Any) -> Any:
        if not tokenize:
            return render(conversation, tools=tools, tokenize=False, **options)
        form = options.pop("return_tensors", None)
        for known in ("add_generation_prompt", "return_dict", "load_audio_from_video"):
            options.pop(known, None)
        try:
            if not conversation:
                raise RowProblem("it has no messages.")
            ids = prompt_ids(tokenizer, conversation, tools, **options)
        except RowProblem as problem:
            from fastapi import HTTPException

            raise HTTPException(400, f"The prompt cannot be asked: {problem}") from None
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
