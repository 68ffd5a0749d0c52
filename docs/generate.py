"""Write the reference pages that follow from the code: parameters.md and options.md.

python docs/generate.py          writes them
python docs/generate.py --check  exits with 1 if they are not up to date
"""

import sys
from pathlib import Path
from typing import Any

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from engine.params import INT64, SamplingParams
from server.schemas import (
    ALIASES,
    UNSUPPORTED,
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
)
from server.settings import OPTIONS, flag, variable

FOLDER = Path(__file__).parent

PARAMETERS = """\
# Request parameters

What the body of `POST /v1/completions` and `POST /v1/chat/completions` may hold. This page is
generated from the validators. `null` is the same as leaving a field out; a number such as
`16.0` is accepted where an integer is meant; nothing is clamped unless it says so.
"""

OPTION_PAGE = """\
# Server options

Options of `logitmill serve`. Each is a flag, an environment variable and a key of a TOML file
(`--config FILE`, with the sections `[engine]`, `[server]` and `[sampling]`); a flag goes before a
variable, a variable before the file, the file before the default.
"""


def parameters_page() -> str:
    """docs/parameters.md."""
    shared = GenerationRequest.model_fields.keys() - SamplingParams.model_fields.keys()
    sections = [
        ("How tokens are chosen", SamplingParams, SamplingParams.model_fields),
        ("Both routes", GenerationRequest, shared),
        ("Only /v1/completions", CompletionRequest, _own(CompletionRequest)),
        ("Only /v1/chat/completions", ChatCompletionRequest, _own(ChatCompletionRequest)),
    ]
    parts = [PARAMETERS]
    for title, model, names in sections:
        fields = {name: field for name, field in model.model_fields.items() if name in names}
        parts.append(f"## {title}\n\n{_table(fields)}")
    aliases = "\n".join(f"- `{alias}` is `{name}`" for alias, name in ALIASES.items())
    parts.append(f"## Other names\n\n{aliases}\n")
    unsupported = ", ".join(f"`{name}`" for name in sorted(UNSUPPORTED))
    parts.append(
        "## Refused by name\n\nThese fields would change the output and are not supported yet. "
        "Any value that asks for something is answered with 400 `unsupported_parameter`:\n\n"
        f"{unsupported}.\n"
    )
    return "\n".join(parts)


def options_page() -> str:
    """docs/options.md."""
    titles = {"engine": "Running the model", "server": "Answering requests"}
    parts = [OPTION_PAGE]
    for section, model in OPTIONS.items():
        rows = [
            f"| `{flag(name)}` | `{variable(name)}` | {_default(field)} | "
            f"{_escaped(field.description or '')} |"
            for name, field in model.model_fields.items()
        ]
        head = f"## {titles[section]}: `[{section}]`\n\n| flag | variable | default | |\n"
        parts.append(head + "|---|---|---|---|\n" + "\n".join(rows) + "\n")
    parts.append(
        f"`{variable('home')}` names the folder in which downloaded and converted models are "
        "kept; default: the platform's cache folder.\n"
    )
    return "\n".join(parts)


def _own(model: type[BaseModel]) -> set[str]:
    return model.model_fields.keys() - GenerationRequest.model_fields.keys() | (
        {"max_tokens"} if model is ChatCompletionRequest else set()
    )


def _table(fields: dict[str, FieldInfo]) -> str:
    rows = [
        f"| `{name}` | {_type(field)} | {_range(field)} | {_default(field)} | "
        f"{_escaped(field.description or '')} |"
        for name, field in fields.items()
    ]
    head = "| field | type | range | default | |\n|---|---|---|---|---|\n"
    return head + "\n".join(rows) + "\n"


def _type(field: FieldInfo) -> str:
    schema = _schema(field)
    options = [schema, *schema.get("anyOf", [])]
    kinds = [option["type"] for option in options if option.get("type") not in (None, "", "null")]
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if any("$ref" in option for option in options):
        kinds.append("object")
    return " or ".join(dict.fromkeys(kinds)) or "any"


def _schema(field: FieldInfo) -> dict[str, Any]:
    for model in (CompletionRequest, ChatCompletionRequest):
        for name, known in model.model_fields.items():
            if known is field or known.description == field.description:
                found: dict[str, Any] = model.model_json_schema()["properties"][name]
                return found
    raise LookupError(field)


def _range(field: FieldInfo) -> str:
    words = []
    for limit in field.metadata:
        match limit:
            case Ge() if limit.ge == -INT64:
                words.append("64 bits")
            case Lt() if limit.lt == INT64:
                pass
            case Ge():
                words.append(f"≥ {limit.ge:g}")
            case Gt():
                words.append(f"> {limit.gt:g}")
            case Le():
                words.append(f"≤ {limit.le:g}")
            case Lt():
                words.append(f"< {limit.lt:g}")
            case MinLen():
                words.append(f"at least {limit.min_length}")
            case MaxLen():
                words.append(f"at most {limit.max_length}")
    return ", ".join(words)


def _default(field: FieldInfo) -> str:
    match field.default:
        case None | [] | {} | "":
            return ""
        case bool():
            return "`true`" if field.default else "`false`"
        case value if value is PydanticUndefined:
            return "required"
        case [""]:
            return "required"
    return f"`{field.default}`"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> int:
    stale = []
    for name, text in (("parameters.md", parameters_page()), ("options.md", options_page())):
        path = FOLDER / name
        if "--check" not in sys.argv:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            stale.append(name)
    if stale:
        print(f"not up to date: {', '.join(stale)}; run python docs/generate.py")
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
