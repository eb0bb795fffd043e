"""What our own code must not do: unpickle, run a shell, or trust a model's code unasked."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from dsmoelora.config import ModelConfig

ROOT = Path(__file__).parents[2]
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
SOURCES = [file for folder in ("dsmoelora", "launch", "benchmarks") for file in (ROOT / folder).rglob("*.py")]


def dangers(source: str) -> list[str]:
    """What is dangerous in a Python source, as `line: what`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        for what in _of_import(node) + _of_call(node):
            found.append(f"{getattr(node, 'lineno', 0)}: {what}")
    return found


def _of_import(node: ast.AST) -> list[str]:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    return [f"imports {name}" for name in names if name.split(".")[0] in PICKLES]


def _of_call(node: ast.AST) -> list[str]:
    if not isinstance(node, ast.Call):
        return []
    name = ast.unparse(node.func)
    options = {option.arg: ast.unparse(option.value) for option in node.keywords}
    rules = {
        "runs a shell": name in SHELLS or options.get("shell", "False") != "False",
        "runs text as code": name in ("eval", "exec"),
        "pickles": name == "torch.save" or name.endswith((".gather_object", ".all_gather_object", "_object_list")),
        "unpickles": name == "torch.load" and options.get("weights_only") != "True",
        "may unpickle": options.get("allow_pickle", "False") != "False",
        "makes any object of YAML": name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    }
    return [what for what, applies in rules.items() if applies]


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_source_does_anything_dangerous(file: Path) -> None:
    assert dangers(file.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.save(x, path)",
        "dist.all_gather_object(out, x)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(command, shell=True)",
        "os.system(f'rm {name}')",
        "yaml.load(text)",
        "eval(text)",
    ],
)
def test_every_danger_would_be_found(line: str) -> None:
    assert len(dangers(f"\n{line}\n")) == 1


def test_plain_forms_are_fine() -> None:
    assert dangers("torch.load(path, weights_only=True); subprocess.run([name]); yaml.safe_load(text)") == []


def test_code_of_a_model_is_not_trusted_unless_asked_for() -> None:
    assert ModelConfig().trust_remote_code is False
