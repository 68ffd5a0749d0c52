"""The shape of the code: who imports whom, where devices are named, what crosses threads."""

import ast
import dataclasses
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import errors, messages, types
from engine.messages import Delta, Failed, Finished, FinishReason, Request, StepStats, Token
from engine.params import SamplingParams
from engine.prepare import ModelInfo, Output

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("engine/**/*.py"), *ROOT.glob("server/**/*.py")])
OTHERS = [
    file for name in ("benchmarks", "configs", "tests") for file in ROOT.glob(f"{name}/**/*.py")
]
EVERYTHING = [*SOURCES, *sorted(OTHERS)]

# Besides these, code does not know what a GPU is called.
MAY_NAME_CUDA = ("engine/runner.py", "engine/config.py", "engine/attention/", "engine/kernels/")


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def module_of(file: Path) -> str:
    """engine/logits/__init__.py as engine.logits."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported when the program runs, wherever the statement stands."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imports(node)


def imported_roots(file: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(parsed(file))}


def test_imports_point_from_the_server_to_the_engine() -> None:
    foreign = {
        "server": {"torch", "transformers", "tests"},
        "engine": {"fastapi", "starlette", "uvicorn", "server", "tests"},
    }
    wrong = {
        name_of(file): found
        for file in SOURCES
        if (found := imported_roots(file) & foreign[name_of(file).split("/")[0]])
    }
    assert wrong == {}
    assert any("engine" in imported_roots(file) for file in SOURCES)


def test_no_module_needs_itself() -> None:
    modules = {module_of(file): file for file in SOURCES}
    needs = {
        module: {
            other
            for name in imports(parsed(file))
            for other in (name, name.rpartition(".")[0])
            if other in modules and other != module
        }
        for module, file in modules.items()
    }
    done: set[str] = set()
    while ready := {module for module in needs.keys() - done if needs[module] <= done}:
        done |= ready
    assert needs.keys() == done, "these import each other"


def names_and_strings(file: Path) -> Iterator[str]:
    """Identifiers and strings of a module, but not its docstrings."""
    tree = parsed(file)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name):
                yield name
            case ast.Constant(value=str(text)) if id(node) not in docstrings:
                yield text


def test_only_few_modules_know_of_cuda() -> None:
    knowing = {
        name_of(file)
        for file in SOURCES
        if any("cuda" in text.lower() for text in names_and_strings(file))
    }
    assert [name for name in sorted(knowing) if not name.startswith(MAY_NAME_CUDA)] == []
    assert "engine/runner.py" in knowing


def test_every_module_says_what_it_is_for() -> None:
    silent = []
    for file in EVERYTHING:
        first, _, _ = (ast.get_docstring(parsed(file)) or "").partition("\n")
        empty = name_of(file).startswith("tests/") and not file.read_text().strip()
        if not empty and not first.endswith((".", "?", ":")):
            silent.append(name_of(file))
    assert silent == []


# -- what crosses threads


TOKEN = Token(5, "x", -0.5, ((5, -0.5), (6, -1.5)), 1)
REQUEST = Request(
    "r",
    (1, 2, 3),
    SamplingParams.model_validate({"temperature": 0.5, "stop": "x", "logit_bias": {"5": 1}}),
    16,
    seed=7,
    eos_token_ids=frozenset({2}),
    stop_tokens={9: 9, 1: "<s>"},
    stop_strings=("x",),
    bad_word_ids=((5, 6),),
)
MESSAGES: list[Any] = [
    REQUEST,
    TOKEN,
    Delta("r", 0, "x", (TOKEN,), (TOKEN,), FinishReason.STOP, "x"),
    Finished("r", 3, 0, 1, 1, (FinishReason.LENGTH,), 0.5, 1.0, 1.5, 2.0, 0),
    StepStats(1, 2, 0.5, token_gaps_s=(0.1,)),
    Output(logprobs=2),
    ModelInfo(128, 64, 4, 16, 4, frozenset({2}), "float32", "cpu", "llama", "x", {"top_k": 5}),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_messages_pickle_and_cannot_be_changed(message: Any) -> None:
    assert pickle.loads(pickle.dumps(message)) == message
    is_tuple = isinstance(message, tuple)
    field = message._fields[0] if is_tuple else dataclasses.fields(message)[0].name
    with pytest.raises(AttributeError):
        setattr(message, field, None)


def test_every_dataclass_is_frozen_but_the_schedulers_records() -> None:
    own = {
        name: value
        for module in (types, messages)
        for name, value in vars(module).items()
        if dataclasses.is_dataclass(value) and value.__module__ == module.__name__
    }
    mutable = {name for name, value in own.items() if not value.__dataclass_params__.frozen}
    assert mutable == {"Sequence", "Group"}
    assert all(hasattr(value, "__slots__") for value in own.values())


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidRequest("message", "n", "invalid_value"),
        errors.Overloaded("message", "draining", 7),
        errors.GenerationFailed("message"),
        errors.EngineDead("message"),
        errors.ModelUnavailable("message"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_pickle_with_all_they_say(error: errors.EngineError) -> None:
    failed = Failed("r", error)
    again = pickle.loads(pickle.dumps(failed))
    assert (again.request_id, type(again.error)) == ("r", type(error))
    assert (str(again.error), vars(again.error)) == (str(error), vars(error))
