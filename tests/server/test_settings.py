"""Options from flags, environment, file and defaults, in that order."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from engine.config import EngineConfig, LogprobsMode
from engine.models.source import config_names, home
from server.app import create_app
from server.config import ServerConfig
from server.settings import OPTIONS, BadOption, Settings, flag, resolve, variable
from tests.support.engines import tiny_core
from tests.support.servers import asgi_client, make_app
from tests.support.wire import COMPLETIONS


def config_file(folder: Path, text: str) -> str:
    file = folder / "options.toml"
    file.write_text(text)
    return str(file)


def section_of(settings: Settings, section: str) -> BaseModel:
    found: BaseModel = getattr(settings, section)
    return found


# Section, name, and what flag, variable and file say, each with what it means; then the default.
PLACES: list[tuple[str, str, list[tuple[Any, Any]], Any]] = [
    ("server", "port", [("1", 1), ("2", 2), ("3", 3)], 8000),
    ("server", "host", [("a", "a"), ("b", "b"), ('"c"', "c")], "127.0.0.1"),
    ("server", "docs", [(False, False), ("true", True), ("false", False)], True),
    ("server", "strict_params", [(False, False), ("1", True), ("false", False)], False),
    ("server", "api_key", [("a, b", ["a", "b"]), ("c", ["c"]), ('["d", "e"]', ["d", "e"])], []),
    (
        "server",
        "served_model_name",
        [("org/a,b", ["org/a", "b"]), ("c", ["c"]), ('"d,e"', ["d", "e"])],
        [],
    ),
    ("server", "max_body_bytes", [("1KiB", 1024), ("2MB", 2_000_000), ("3", 3)], 4 << 20),
    ("server", "drain_delay", [("0", 0.0), ("0.5", 0.5), ("2", 2.0)], 5.0),
    (
        "engine",
        "kv_cache_memory",
        [("2GiB", 2 << 30), ("512M", 512_000_000), ('"1.5GiB"', 3 << 29)],
        None,
    ),
    ("engine", "threads", [("1", 1), ("2", 2), ("3", 3)], None),
    ("engine", "prefix_cache", [(False, False), ("yes", True), ("false", False)], True),
    (
        "engine",
        "dtype",
        [("float32", "float32"), ("bfloat16", "bfloat16"), ('"float16"', "float16")],
        "auto",
    ),
    (
        "engine",
        "logprobs_mode",
        [
            ("raw_logits", LogprobsMode.RAW_LOGITS),
            ("processed_logits", LogprobsMode.PROCESSED_LOGITS),
            ('"processed_logprobs"', LogprobsMode.PROCESSED_LOGPROBS),
        ],
        LogprobsMode.RAW_LOGPROBS,
    ),
]


@pytest.mark.parametrize(("section", "name", "given", "default"), PLACES)
def test_a_flag_goes_before_a_variable_before_a_file_before_the_default(
    tmp_path: Path, section: str, name: str, given: list[tuple[Any, Any]], default: Any
) -> None:
    (by_flag, flag_means), (by_variable, variable_means), (by_file, file_means) = given
    file = config_file(tmp_path, f"[{section}]\n{name} = {by_file}\n")
    environ = {variable(name): by_variable}

    def settled(flags: Mapping[str, Any], file: str | None, environ: Mapping[str, str]) -> Any:
        return getattr(section_of(resolve(flags, file, environ), section), name)

    assert settled({name: by_flag}, file, environ) == flag_means
    assert settled({name: by_flag}, None, {}) == flag_means
    assert settled({}, file, environ) == variable_means
    assert settled({}, file, {}) == file_means
    assert settled({}, None, {}) == default
    if name != "api_key":
        assert settled({}, file, {variable(name): ""}) == file_means  # as good as not set


def test_options_have_one_name_in_three_spellings() -> None:
    assert flag("max_model_len") == "--max-model-len"
    assert variable("max_model_len") == "LOGITMILL_MAX_MODEL_LEN"
    names = [name for model in OPTIONS.values() for name in model.model_fields]
    assert len(set(names)) == len(names)
    assert {EngineConfig, ServerConfig} == set(OPTIONS.values())


# -- models with a configuration of their own


def test_a_named_model_brings_its_source() -> None:
    for name in config_names():
        settings = resolve({"model": name}, None, {})
        assert settings.source is not None
        assert settings.source.parts
    assert resolve({"model": "/somewhere"}, None, {}).source is None


def test_the_default_model_has_a_configuration() -> None:
    settings = resolve({}, None, {})

    assert settings.engine.model == "smollm2-135m-instruct"
    assert settings.source is not None


def test_a_file_may_name_the_model_and_go_before_the_models_own_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = {
        "engine": {"block_size": 8, "threads": 1},
        "sampling": {"temperature": 0.5, "top_k": 9},
    }
    monkeypatch.setattr(
        "server.settings.read_config", lambda name: shipped if name == "mine" else None
    )
    file = config_file(
        tmp_path,
        '[engine]\nmodel = "mine"\nthreads = 2\n[sampling]\ntop_k = 5\nmin_p = 0.1\n',
    )

    settings = resolve({}, file, {})

    assert (settings.engine.block_size, settings.engine.threads) == (8, 2)
    assert settings.sampling == {"temperature": 0.5, "top_k": 5, "min_p": 0.1}
    other = resolve({"model": "other"}, file, {})
    assert (other.engine.block_size, other.engine.threads) == (16, 2)


@pytest.mark.anyio
async def test_sampling_options_apply_where_a_request_gives_none(tiny_folder: Path) -> None:
    sampling = {"temperature": 0.0, "max_tokens": 3, "ignore_eos": True}
    app = create_app(lambda: tiny_core(tiny_folder), ServerConfig(), ["tiny"], sampling=sampling)
    async with asgi_client(app) as client:
        answers = [
            (await client.post(COMPLETIONS, json={"prompt": "the hen"} | extra)).json()
            for extra in ({}, {"seed": 5}, {"max_tokens": 5})
        ]
    greedy = make_app(lambda: tiny_core(tiny_folder))
    async with asgi_client(greedy) as client:
        body = {"prompt": "the hen", "temperature": 0, "max_tokens": 3, "ignore_eos": True}
        expected = (await client.post(COMPLETIONS, json=body)).json()

    counts = [answer["usage"]["completion_tokens"] for answer in answers]
    assert counts == [3, 3, 5]
    texts = [answer["choices"][0]["text"] for answer in answers]
    assert texts[0] == texts[1] == expected["choices"][0]["text"]


# -- what cannot be used


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"port": "x"}, "--port: .*'x'"),
        ({"port": "65536"}, "--port: .*65535"),
        ({"port": "-1"}, "--port"),
        ({"threads": "0"}, "--threads: .*1"),
        ({"threads": "1.5"}, "--threads"),
        ({"dtype": "int8"}, "--dtype: .*'bfloat16'"),
        ({"device": "tpu"}, "--device"),
        ({"kv_cache_memory": "2 potatoes"}, "--kv-cache-memory: .*2GiB"),
        ({"kv_cache_memory": "0"}, "--kv-cache-memory"),
        ({"kv_cache_fraction": "1"}, "--kv-cache-fraction"),
        ({"log_level": "loud"}, "--log-level"),
        ({"api_key": ""}, "--api-key: a key must not be empty"),
        ({"api_key": "a,,b"}, "--api-key: a key must not be empty"),
        ({"api_key_file": ""}, "--api-key-file: "),
        ({"host": ""}, "--host: "),
        ({"model": ""}, "--model: "),
        ({"amateur_model": ""}, "--amateur-model: "),
        ({"head_timeout": "0"}, "--head-timeout: .*greater than 0"),
        ({"body_timeout": "-1"}, "--body-timeout: .*greater than 0"),
        ({"request_timeout": "-1"}, "--request-timeout: .*0"),
        ({"max_batch_tokens": "8", "max_num_seqs": "9"}, "max_batch_tokens .8. .*max_num_seqs"),
        ({"max_logprobs": "-2"}, "--max-logprobs"),
    ],
)
def test_a_bad_flag_is_named_with_what_it_may_be(flags: dict[str, str], says: str) -> None:
    with pytest.raises(BadOption, match=says) as caught:
        resolve(flags, None, {})

    assert "\n" not in str(caught.value)


def test_a_bad_variable_is_named() -> None:
    with pytest.raises(BadOption, match=r"LOGITMILL_PORT: .*'x'"):
        resolve({}, None, {"LOGITMILL_PORT": "x"})
    with pytest.raises(BadOption, match="LOGITMILL_DOCS"):
        resolve({}, None, {"LOGITMILL_DOCS": "perhaps"})


@pytest.mark.parametrize("value", ["", " ", ",", " , ", "a,"])
def test_a_variable_for_keys_that_holds_none_does_not_open_the_server(value: str) -> None:
    """A secret that was not filled in looks like this."""
    with pytest.raises(BadOption, match="LOGITMILL_API_KEY: a key must not be empty"):
        resolve({}, None, {"LOGITMILL_API_KEY": value})
    with pytest.raises(BadOption, match="LOGITMILL_API_KEY_FILE: "):
        resolve({}, None, {"LOGITMILL_API_KEY_FILE": ""})
    assert resolve({"api_key": "k"}, None, {"LOGITMILL_API_KEY": value}).server.api_key == ["k"]


@pytest.mark.parametrize(
    "text",
    ['"secret,"', '["secret", ""]', '["secret", 5]', "{secret = 5}", '["secret", ["more secret"]]'],
)
def test_no_error_shows_a_key(tmp_path: Path, text: str) -> None:
    file = config_file(tmp_path, f"[server]\napi_key = {text}\n")

    with pytest.raises(BadOption, match=r"api_key in .*options\.toml") as caught:
        resolve({}, file, {})

    assert "secret" not in str(caught.value)
    assert "secret" not in repr(ServerConfig(api_key=["secret"]))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[engine\n", "is not TOML"),
        ("port = 5\n", "not port"),
        ("[potato]\n", "not potato"),
        ("engine = 5\n", "not engine"),
        ("[server]\nprot = 5\n", r"\[server\] has no prot"),
        ("[engine]\nport = 5\n", r"\[engine\] has no port"),
        ("[sampling]\nmodel = 5\n", r"\[sampling\] has no model"),
        ('[server]\nport = "x"\n', "port in .*options.toml: .*'x'"),
        ("[sampling]\ntemperature = 3.0\n", r"\[sampling\] temperature: .*got 3.0"),
        ("[sampling]\nn = 2\nbest_of = 1\n", "best_of must be at least n"),
        ('[source]\nfile = "a"\n', "sha256"),
    ],
)
def test_a_bad_file_is_told_what_is_wrong(tmp_path: Path, text: str, says: str) -> None:
    file = config_file(tmp_path, text)

    with pytest.raises(BadOption, match=says) as caught:
        resolve({}, file, {})

    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    for file in (tmp_path / "missing.toml", tmp_path):
        with pytest.raises(BadOption, match="--config: cannot read"):
            resolve({}, str(file), {})
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(BadOption, match="--config: cannot read"):
        resolve({}, str(binary), {})


def test_downloads_go_where_the_variable_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGITMILL_HOME", str(tmp_path))
    assert home() == tmp_path
    for unset in ("", None):
        if unset is None:
            monkeypatch.delenv("LOGITMILL_HOME")
        else:
            monkeypatch.setenv("LOGITMILL_HOME", unset)
        assert home().name == "logitmill"
