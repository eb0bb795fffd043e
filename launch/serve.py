"""Serve a trained adapter to clients of OpenAI's API: `python launch/serve.py --adapter runs/demo/adapter`.

Chats and completions, streamed or whole, at http://127.0.0.1:8000/v1. One process, without DeepSpeed, on `transformers
serve` (pip install 'dsmoelora[serve]'). docs/serving.md has a client's few lines.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed

import transformers
from transformers import PreTrainedTokenizerBase

from dsmoelora.adapters.folder_files import read_adapter_config
from dsmoelora.cli import FlagParser, run_guarded
from dsmoelora.config.run import QUANTIZE
from dsmoelora.errors import ConfigError, bad_value
from dsmoelora.model import find_trained, trained_tokenizer
from dsmoelora.serving import check_port, check_servable, serve


def main() -> None:
    """Load, then answer until Ctrl-C."""
    options = parse_options(sys.argv[1:])
    transformers.logging.disable_progress_bar()
    trained = find_trained(options.adapter, options.base, options.trust_remote_code, options.quantize)

    def load() -> tuple[Any, PreTrainedTokenizerBase]:
        print(f"Loading {options.adapter} on {trained.base} ...", flush=True)
        tokenizer = trained_tokenizer(options.adapter, options.trust_remote_code)
        model = trained.load()
        print(f"Serving {options.name} at http://{options.host}:{options.port}/v1; Ctrl-C ends it.", flush=True)
        return model, tokenizer

    serve(options.name, load, options.host, options.port, options.continuous_batching)


def parse_options(argv: list[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        CheckpointError: the adapter folder is missing or damaged
        ConfigError: the port is in use, packages are missing, or the adapter cannot be served so
        ModelError: this transformers serves in another way
    """
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--adapter", type=Path, required=True, help="adapter folder, e.g. runs/demo/adapter")
    parser.add_argument("--base", help="folder of the base model; default: the one named in adapter_config.json")
    parser.add_argument("--quantize", choices=QUANTIZE, default="none", help="how the base's weights are kept")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the base model")
    parser.add_argument("--name", help="what clients call the model; default: the adapter folder as given")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; 0.0.0.0 for all that reach this machine")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")
    parser.add_argument("--continuous-batching", action="store_true", help="requests at once share forward passes")
    options = parser.parse_args(argv)
    options.name = options.name or str(options.adapter)
    if not 0 < options.port < 2**16:
        raise bad_value("--port", options.port, "between 1 and 65535", "The default is 8000.")
    router = read_adapter_config(options.adapter).get("router")
    if options.continuous_batching and router == "prompt":
        raise ConfigError(
            "--continuous-batching mixes the tokens of several requests, but the router of this adapter (prompt) "
            "chooses experts once for each request. Drop it."
        )
    check_port(options.host, options.port)
    check_servable()
    return options


if __name__ == "__main__":
    sys.exit(run_guarded(main))
